"""What prepares models, over a cache, a keeper and standbys that only note what they are asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from autoscaler.backends.base import BackendError, ReplicaSpec, Unsupported
from autoscaler.settings import PoolSettings
from autoscaler.warmth import Warmth
from autoscaler.warmth_parts import Cancelled, OnProgress, list_files
from modelcache.types import (
    Cancelled as CalledOff,
)
from modelcache.types import (
    FileRange,
    InUse,
    NoSpace,
    NotFound,
    Priority,
    Progress,
    Tier,
)

URL = "s3://models/m"


@dataclass(frozen=True)
class Model:
    url: str
    revision: str
    path: Path


@dataclass
class FakeCache:
    """A cache of one model below ``root``; ``block`` holds a download until it is called off."""

    root: Path
    here: bool = False
    error: Exception | None = None
    block: threading.Event | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    evicted_before_lease: bool = False
    calls: list[tuple[str, Any]] = field(default_factory=list)
    leases: list[str] = field(default_factory=list)
    results: list[str] = field(default_factory=list)
    """Who holds what preparation steps have made."""
    results_evicted: bool = False

    def model(self) -> Model:
        path = self.root / "view"
        path.mkdir(exist_ok=True)
        (path / "a.safetensors").write_bytes(b"weights")
        return Model(URL, "1", path)

    def find(self, url: str, revision: str | None = None) -> Model | None:
        assert url == URL
        return self.model() if self.here else None

    def preload(
        self,
        url: str,
        *,
        revision: str | None = None,
        priority: Priority = Priority.PRELOAD,
        on_progress: OnProgress | None = None,
        cancelled: Cancelled | None = None,
    ) -> Model:
        assert on_progress is not None
        assert cancelled is not None
        self.calls.append(("preload", priority))
        if self.error is not None:
            raise self.error
        on_progress(Progress(phase="fetching", bytes_done=1, bytes_total=2))
        if self.block is not None:
            self.block.set()
            while not cancelled():
                threading.Event().wait(0.01)
            self.ended.set()
            raise CalledOff("called off")
        self.here = True
        return self.model()

    @contextlib.contextmanager
    def lease(self, model: Model, holder: str) -> Iterator[None]:
        if self.evicted_before_lease:
            self.evicted_before_lease = self.here = False
            raise NotFound("it was evicted")
        if model.url != URL and self.results_evicted:
            raise NotFound("it was evicted")
        holders = self.leases if model.url == URL else self.results
        holders.append(holder)
        try:
            yield
        finally:
            holders.remove(holder)

    def evict(self, url: str, revision: str | None = None) -> int:
        if self.leases:
            raise InUse(f"leased by {self.leases}")
        self.here = False
        self.calls.append(("evict", url))
        return 1


@dataclass
class FakeKeeper:
    kept: dict[str, Sequence[FileRange]] = field(default_factory=dict)
    error: Exception | None = None
    closed: bool = False

    def keep(self, key: str, files: Sequence[FileRange]) -> None:
        if self.error is not None:
            raise self.error
        self.kept[key] = files

    def drop(self, key: str) -> bool:
        return self.kept.pop(key, None) is not None

    def close(self) -> None:
        self.closed = True


@dataclass(frozen=True)
class Standing:
    pool: str


@dataclass
class FakeStandbys:
    there: dict[str, ReplicaSpec] = field(default_factory=dict)
    error: Exception | None = None

    async def standby(self, spec: ReplicaSpec) -> None:
        if self.error is not None:
            raise self.error
        self.there[spec.pool.name] = spec

    async def end_standby(self, pool: str) -> None:
        self.there.pop(pool, None)

    def standbys(self) -> Sequence[Standing]:
        return [Standing(pool=name) for name in self.there]


class Node:
    """A ``Warmth`` over fakes."""

    def __init__(self, root: Path, *pools: PoolSettings, **parts: Any) -> None:
        self.cache = FakeCache(root)
        self.keeper = FakeKeeper()
        self.standbys = FakeStandbys()
        self.read: list[Sequence[FileRange]] = []
        self.reports: list[Progress | None] = []
        self.warmth = Warmth(
            pools,
            cache=self.cache,
            keeper=self.keeper,
            standbys=self.standbys,
            prewarm=self.prewarm,
            **parts,
        )

    def prewarm(
        self, files: Sequence[FileRange], on_progress: OnProgress, cancelled: Cancelled
    ) -> None:
        on_progress(Progress(phase="paging", bytes_done=3, bytes_total=7))
        self.read.append(files)

    async def prepare(self, pool: PoolSettings, replica_id: str = "m-1") -> ReplicaSpec:
        spec = ReplicaSpec(id=replica_id, pool=pool)
        return await self.warmth.prepare(spec, self.reports.append)

    async def paged(self) -> None:
        """What goes on beside a start has ended."""
        for hold in list(self.warmth._holds.values()):
            if hold.paging is not None:
                await hold.paging


def pool(model: str = URL, **fields: Any) -> PoolSettings:
    return PoolSettings.model_validate({"name": "m", "engine": "vllm", "model": model, **fields})


def run(node: Node, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        try:
            await story()
        finally:
            await node.warmth.close()
        assert node.cache.leases == node.cache.results == []
        assert node.keeper.closed

    asyncio.run(whole())


def test_a_url_becomes_a_path_leased_and_paged_beside_the_start(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path, remote)

    async def story() -> None:
        assert node.warmth.tiers(remote) == {Tier.REMOTE}
        assert node.warmth.tier(remote) is Tier.REMOTE
        spec = await node.prepare(remote)
        assert spec.pool.model == str(tmp_path / "view")
        assert (spec.id, spec.pool.name) == ("m-1", "m")
        assert node.cache.calls == [("preload", Priority.WAKE)]
        assert node.cache.leases == ["m-1"]
        await node.paged()
        await asyncio.sleep(0)
        assert node.warmth.tier(remote) is Tier.PAGED
        assert [one.path for one in node.keeper.kept["m"]] == [
            str(tmp_path / "view" / "a.safetensors")
        ]
        assert [one.phase for one in node.reports if one is not None] == ["fetching", "paging"]
        assert node.reports[-1] is None
        await node.warmth.release("m-1")
        assert node.cache.leases == []
        await node.warmth.release("m-1")

    run(node, story)


def test_what_is_on_this_disk_is_used_without_asking_the_store(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path, remote)
    node.cache.here = True
    node.cache.error = OSError("the store is away")

    async def story() -> None:
        await node.prepare(remote)
        assert node.cache.calls == []
        await node.prepare(remote, "m-2")
        await node.prepare(remote, "m-2")
        assert sorted(node.cache.leases) == ["m-1", "m-2"]

    run(node, story)


def test_what_is_evicted_before_it_is_leased_is_fetched_again(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path, remote)
    node.cache.here = node.cache.evicted_before_lease = True

    async def story() -> None:
        await node.prepare(remote)
        assert node.cache.calls == [("preload", Priority.WAKE)]
        assert node.cache.leases == ["m-1"]

    run(node, story)


def test_a_download_that_is_called_off_ends(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path, remote)
    node.cache.block = threading.Event()

    async def story() -> None:
        assert node.cache.block is not None
        task = asyncio.create_task(node.prepare(remote))
        await asyncio.to_thread(node.cache.block.wait)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await node.warmth.release("m-1")
        assert await asyncio.to_thread(node.cache.ended.wait, 30.0)
        assert node.cache.calls == [("preload", Priority.WAKE)]
        assert node.warmth.tier(remote) is Tier.REMOTE

    run(node, story)


def test_a_failed_download_says_why_and_holds_nothing(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path, remote)
    node.cache.error = NoSpace("it needs 15 GB, 3 GB are free")

    async def story() -> None:
        with pytest.raises(NoSpace, match="3 GB are free"):
            await node.prepare(remote)
        await node.warmth.release("m-1")
        assert node.cache.leases == []
        assert node.warmth.tier(remote) is Tier.REMOTE

    run(node, story)


def test_without_a_cache_a_url_cannot_be_had(tmp_path: Path) -> None:
    remote = pool()

    async def story() -> None:
        warmth = Warmth([remote])
        with pytest.raises(Unsupported, match="needs the model cache"):
            await warmth.prepare(ReplicaSpec(id="m-1", pool=remote), lambda progress: None)
        await warmth.close()

    asyncio.run(story())


def test_a_directory_is_used_where_it_lies(tmp_path: Path) -> None:
    local = pool(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"w")
    node = Node(tmp_path, local)

    async def story() -> None:
        await node.warmth.look(local)
        assert node.warmth.tiers(local) == {Tier.ON_DISK, Tier.PAGED, Tier.FORKED}
        spec = await node.prepare(local)
        assert spec.pool.model == str(tmp_path)
        assert node.cache.leases == node.cache.calls == []
        with pytest.raises(Unsupported, match="not removed"):
            await node.warmth.settle(local, Tier.REMOTE)

    run(node, story)


def test_a_name_is_the_engines_to_find(tmp_path: Path) -> None:
    named = pool("org/model", engine="simulated")
    node = Node(tmp_path, named)

    async def story() -> None:
        await node.warmth.look(named)
        assert node.warmth.tiers(named) == {Tier.ON_DISK}
        assert (await node.prepare(named)).pool is named
        assert node.reports == [None]

    run(node, story)


def test_down_the_tiers_and_what_each_lets_go_of(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path, remote)
    node.cache.here = True

    async def story() -> None:
        await node.warmth.look(remote)
        assert node.warmth.tier(remote) is Tier.ON_DISK
        await node.warmth.settle(remote, Tier.FORKED)
        assert node.warmth.tier(remote) is Tier.FORKED
        spec = node.standbys.there["m"]
        assert (spec.id, spec.pool.model) == ("m-standby", str(tmp_path / "view"))
        assert node.cache.leases == ["m, at zero"]
        assert "m" in node.keeper.kept
        await node.warmth.settle(remote, Tier.PAGED)
        assert node.warmth.tier(remote) is Tier.PAGED
        assert node.standbys.there == {}
        assert len(node.read) == 1, "what is kept is not read again"
        await node.warmth.settle(remote, Tier.ON_DISK)
        assert node.warmth.tier(remote) is Tier.ON_DISK
        assert node.keeper.kept == {}
        assert node.cache.leases == []
        await node.warmth.settle(remote, Tier.REMOTE)
        assert node.warmth.tier(remote) is Tier.REMOTE
        assert node.cache.calls == [("evict", URL)]

    run(node, story)


async def until(condition: Callable[[], bool]) -> None:
    """The test's own time limit bounds it."""
    for _ in range(6_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


def test_at_zero_pages_are_read_behind_others_and_for_a_replica_at_once(tmp_path: Path) -> None:
    behind: list[Sequence[FileRange]] = []
    remote = pool()
    node = Node(tmp_path, remote, prewarm_behind=lambda files, *_: behind.append(files))
    node.cache.here = True

    async def story() -> None:
        await node.warmth.look(remote)
        await node.warmth.settle(remote, Tier.PAGED)
        assert (len(behind), len(node.read)) == (1, 0)
        await node.warmth.settle(remote, Tier.ON_DISK)
        await node.prepare(remote)
        await until(lambda: bool(node.read))
        assert len(behind) == 1

    run(node, story)


def test_pages_that_one_replica_lets_go_of_are_not_taken_for_kept(tmp_path: Path) -> None:
    """Two replicas at once: the first is ended while it pages, the second then has to."""
    remote = pool()
    begun, ended = threading.Event(), threading.Event()
    reads: list[int] = []

    def prewarm(files: Sequence[FileRange], on_progress: OnProgress, cancelled: Cancelled) -> None:
        reads.append(len(files))
        if len(reads) == 1:
            begun.set()
            while not cancelled():
                threading.Event().wait(0.005)
            ended.set()

    node = Node(tmp_path, remote)
    node.warmth._prewarm = prewarm
    node.cache.here = True

    async def story() -> None:
        await node.warmth.look(remote)
        await node.prepare(remote, "m-1")
        assert await asyncio.to_thread(begun.wait, 60)
        await node.prepare(remote, "m-2")
        await asyncio.sleep(0.05)
        await node.warmth.release("m-1")
        assert await asyncio.to_thread(ended.wait, 60)
        await until(lambda: node.warmth.tier(remote) is Tier.PAGED)
        assert len(reads) == 2
        assert "m" in node.keeper.kept

    run(node, story)


def test_a_model_of_two_pools_stays_for_the_other(tmp_path: Path) -> None:
    one, other = pool(), pool(name="n")
    node = Node(tmp_path, one, other)
    node.cache.here = True

    async def story() -> None:
        for each in (one, other):
            await node.warmth.look(each)
        with pytest.raises(BackendError, match="that of n too"):
            await node.warmth.settle(one, Tier.REMOTE)
        assert node.cache.here

    run(node, story)


def test_a_standby_is_taken_by_a_start_and_missed_when_it_dies(tmp_path: Path) -> None:
    local = pool(str(tmp_path), warmth={"paged_s": 0})
    node = Node(tmp_path, local)

    async def story() -> None:
        await node.warmth.look(local)
        await node.warmth.settle(local, Tier.FORKED)
        node.standbys.there.clear()
        await node.warmth.look(local)
        assert node.warmth.tier(local) is not Tier.FORKED
        await node.warmth.settle(local, Tier.FORKED)
        await node.prepare(local)
        assert node.warmth.tier(local) is not Tier.FORKED

    run(node, story)


def test_pages_past_the_budget_are_no_reason_not_to_start(tmp_path: Path) -> None:
    local = pool(str(tmp_path))
    node = Node(tmp_path, local)
    node.keeper.error = NoSpace("exceeds modelcache.page_budget_bytes")

    async def story() -> None:
        await node.prepare(local)
        await node.paged()
        assert node.warmth.tier(local) is Tier.ON_DISK
        assert node.read == [], "nothing is read that is not kept"
        await node.warmth.settle(local, Tier.FORKED)
        assert node.warmth.tier(local) is Tier.FORKED
        with pytest.raises(NoSpace):
            await node.warmth.settle(local, Tier.PAGED)

    run(node, story)


@pytest.mark.parametrize("engine", ["vllm", "simulated"])
def test_a_pool_that_wants_no_pages_gets_none(tmp_path: Path, engine: str) -> None:
    local = pool(str(tmp_path), engine=engine, warmth={"paged_s": 0, "forked_s": 0})
    node = Node(tmp_path, local)

    async def story() -> None:
        await node.prepare(local)
        await node.paged()
        assert node.keeper.kept == {}
        assert (Tier.FORKED in node.warmth.tiers(local)) == (engine == "vllm")

    run(node, story)


def test_preparation_steps_are_run_once_and_their_result_is_what_starts(tmp_path: Path) -> None:
    remote = pool()
    made: list[tuple[str, Path]] = []

    node = Node(tmp_path, remote, transform=transforming(tmp_path, made))

    async def story() -> None:
        spec = await node.prepare(remote)
        await node.prepare(remote, "m-2")
        assert spec.pool.model == str(tmp_path / "made")
        assert made == [(URL, tmp_path / "view")]
        await node.warmth.settle(remote, Tier.FORKED)
        assert node.standbys.there["m"].pool.model == str(tmp_path / "made")

    run(node, story)


def transforming(
    root: Path, made: list[tuple[str, Path]], held: list[str] | None = None
) -> Callable[..., contextlib.AbstractContextManager[Model]]:
    """Preparation steps whose result is noted in ``made``, and who holds it in ``held``."""

    @contextlib.contextmanager
    def transform(
        model: str, source: Path, holder: str, tell: OnProgress, cancelled: Cancelled
    ) -> Iterator[Model]:
        made.append((model, source))
        result = root / "made"
        result.mkdir(exist_ok=True)
        (result / "a.safetensors").write_bytes(b"made")
        names = [] if held is None else held
        names.append(holder)
        try:
            yield Model("prepared://key", "made", result)
        finally:
            names.remove(holder)

    return transform


def test_what_steps_have_made_is_leased_by_each_who_uses_it(tmp_path: Path) -> None:
    """A running, starting or standing-by replica reads the result, so the result must stay."""
    remote = pool()
    held: list[str] = []
    node = Node(tmp_path, remote, transform=transforming(tmp_path, [], held))

    async def story() -> None:
        await node.prepare(remote)
        assert (held, node.cache.results) == (["m-1"], [])
        await node.prepare(remote, "m-2")
        assert (held, node.cache.results) == (["m-1"], ["m-2"])
        await node.warmth.settle(remote, Tier.PAGED)
        assert node.cache.results == ["m-2", "m, at zero"]
        await node.warmth.settle(remote, Tier.FORKED)
        assert node.cache.results == ["m-2", "m, at zero"], "once, however often it is settled"
        await node.warmth.release("m-1")
        await node.warmth.release("m-2")
        assert (held, node.cache.results) == ([], ["m, at zero"])
        await node.warmth.settle(remote, Tier.ON_DISK)
        assert (held, node.cache.results) == ([], [])

    run(node, story)


def test_a_directory_s_results_are_leased_too(tmp_path: Path) -> None:
    local = pool(str(tmp_path))
    held: list[str] = []
    node = Node(tmp_path, local, transform=transforming(tmp_path, [], held))

    async def story() -> None:
        await node.warmth.look(local)
        await node.warmth.settle(local, Tier.PAGED)
        assert held == ["m, at zero"]
        await node.warmth.settle(local, Tier.PAGED)
        assert held + node.cache.results == ["m, at zero"]
        await node.prepare(local)
        assert sorted(held + node.cache.results) == ["m, at zero", "m-1"]

    run(node, story)


def test_a_result_that_was_evicted_is_made_again(tmp_path: Path) -> None:
    remote = pool()
    made: list[tuple[str, Path]] = []
    held: list[str] = []
    node = Node(tmp_path, remote, transform=transforming(tmp_path, made, held))

    async def story() -> None:
        await node.prepare(remote)
        await node.warmth.release("m-1")
        node.cache.results_evicted = True
        spec = await node.prepare(remote, "m-2")
        assert len(made) == 2
        assert held == ["m-2"]
        assert spec.pool.model == str(tmp_path / "made")

    run(node, story)


def test_a_newer_revision_replaces_what_was_kept_of_the_older(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path, remote)
    node.cache.here = True

    async def story() -> None:
        await node.prepare(remote)
        await node.paged()
        assert node.warmth.tier(remote) is Tier.PAGED
        node.cache.root = tmp_path / "newer"
        node.cache.root.mkdir()
        spec = await node.prepare(remote, "m-2")
        assert spec.pool.model == str(tmp_path / "newer" / "view")
        await node.paged()
        (kept,) = node.keeper.kept["m"]
        assert kept.path.startswith(str(tmp_path / "newer"))

    run(node, story)


def test_files_that_an_engine_reads(tmp_path: Path) -> None:
    for name in ("model.safetensors", "pytorch_model.bin", "tokenizer.json", "sub/x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    with (tmp_path / "large.bin").open("wb") as file:
        file.truncate(100 * 1024 * 1024)
    names = [Path(one.path).relative_to(tmp_path).as_posix() for one in list_files(tmp_path)]
    assert names[0] == "model.safetensors"
    assert {"tokenizer.json", "sub/x.txt"} <= set(names)
    assert "large.bin" not in names
    (tmp_path / "model.safetensors").unlink()
    names = [Path(one.path).name for one in list_files(tmp_path)]
    assert names[:2] == ["large.bin", "pytorch_model.bin"]
