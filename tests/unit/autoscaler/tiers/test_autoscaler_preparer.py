"""The preparer, over a cache, a page holder and standbys that only note what they are asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
from fake_node import URL, Node, pool, run, until

from autoscaler.backends.base import BackendError, Unsupported
from autoscaler.tiers.preparer import THREADS, list_files
from modelcache.ports import IsCancelled, OnProgress
from modelcache.types import FileRange, NoSpace, Priority, Tier


def test_a_url_becomes_a_path_leased_and_paged_beside_the_start(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path)

    async def story() -> None:
        assert node.preparer.tiers(remote) == {Tier.REMOTE}
        assert node.preparer.tier(remote) is Tier.REMOTE
        spec = await node.prepare(remote)
        assert spec.pool.model == str(tmp_path / "view")
        assert (spec.id, spec.pool.name) == ("m-1", "m")
        assert node.cache.calls == [("preload", Priority.WAKE)]
        assert node.cache.leases == ["m-1"]
        await node.paged()
        await asyncio.sleep(0)
        assert node.preparer.tier(remote) is Tier.PAGED
        assert [one.path for one in node.page_holder.kept["m"]] == [
            str(tmp_path / "view" / "a.safetensors")
        ]
        assert [one.phase for one in node.reports if one is not None] == ["fetching", "paging"]
        assert node.reports[-1] is None
        await node.preparer.release("m-1")
        assert node.cache.leases == []
        await node.preparer.release("m-1")

    run(node, story)


def test_what_is_on_this_disk_is_used_without_asking_the_store(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path)
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
    node = Node(tmp_path)
    node.cache.here = node.cache.evicted_before_lease = True

    async def story() -> None:
        await node.prepare(remote)
        assert node.cache.calls == [("preload", Priority.WAKE)]
        assert node.cache.leases == ["m-1"]

    run(node, story)


def test_a_download_that_is_cancelled_ends(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path)
    node.cache.block = threading.Event()

    async def story() -> None:
        assert node.cache.block is not None
        task = asyncio.create_task(node.prepare(remote))
        await asyncio.to_thread(node.cache.block.wait)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        await node.preparer.release("m-1")
        assert await asyncio.to_thread(node.cache.ended.wait, 30.0)
        assert node.cache.calls == [("preload", Priority.WAKE)]
        assert node.preparer.tier(remote) is Tier.REMOTE

    run(node, story)


def test_a_model_that_is_here_waits_for_no_download(tmp_path: Path) -> None:
    """However many wait for a store that does not answer."""
    node = Node(tmp_path)
    node.cache.block = threading.Event()

    async def story() -> None:
        pools = [pool(name=f"p{number}", tiers={"paged_s": 0}) for number in range(THREADS + 8)]
        tasks = [asyncio.create_task(node.prepare(one, f"{one.name}-1")) for one in pools]
        await until(lambda: len(node.cache.calls) == THREADS)
        node.cache.here = True
        async with asyncio.timeout(30.0):
            await node.prepare(pool(tiers={"paged_s": 0}))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(node, story)


def test_a_failed_download_says_why_and_holds_nothing(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path)
    node.cache.error = NoSpace("it needs 15 GB, 3 GB are free")

    async def story() -> None:
        with pytest.raises(NoSpace, match="3 GB are free"):
            await node.prepare(remote)
        await node.preparer.release("m-1")
        assert node.cache.leases == []
        assert node.preparer.tier(remote) is Tier.REMOTE

    run(node, story)


def test_a_directory_is_used_where_it_lies(tmp_path: Path) -> None:
    local = pool(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"w")
    node = Node(tmp_path)

    async def story() -> None:
        await node.preparer.refresh(local)
        assert node.preparer.tiers(local) == {Tier.ON_DISK, Tier.PAGED, Tier.FORKED}
        spec = await node.prepare(local)
        assert spec.pool.model == str(tmp_path)
        assert node.cache.leases == node.cache.calls == []
        with pytest.raises(Unsupported, match="not removed"):
            await node.preparer.move_to(local, Tier.REMOTE)

    run(node, story)


def test_what_runs_in_a_cluster_is_not_forked_here(tmp_path: Path) -> None:
    node = Node(tmp_path)
    away = pool(str(tmp_path), backend="kubernetes", kubernetes={"name": "llama"})

    async def story() -> None:
        await node.preparer.refresh(away)
        assert Tier.FORKED not in node.preparer.tiers(away)

    run(node, story)


def test_a_name_is_the_engines_to_find(tmp_path: Path) -> None:
    named = pool("org/model", engine="simulated")
    node = Node(tmp_path)

    async def story() -> None:
        await node.preparer.refresh(named)
        assert node.preparer.tiers(named) == {Tier.ON_DISK}
        assert (await node.prepare(named)).pool is named
        assert node.reports == [None]

    run(node, story)


def test_down_the_tiers_and_what_each_lets_go_of(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path)
    node.cache.here = True

    async def story() -> None:
        await node.preparer.refresh(remote)
        assert node.preparer.tier(remote) is Tier.ON_DISK
        await node.preparer.move_to(remote, Tier.FORKED)
        assert node.preparer.tier(remote) is Tier.FORKED
        spec = node.standbys.there["m"]
        assert (spec.id, spec.pool.model) == ("m-standby", str(tmp_path / "view"))
        assert node.cache.leases == ["m, at zero"]
        assert "m" in node.page_holder.kept
        await node.preparer.move_to(remote, Tier.PAGED)
        assert node.preparer.tier(remote) is Tier.PAGED
        assert node.standbys.there == {}
        assert len(node.read) == 1, "what is kept is not read again"
        await node.preparer.move_to(remote, Tier.ON_DISK)
        assert node.preparer.tier(remote) is Tier.ON_DISK
        assert node.page_holder.kept == {}
        assert node.cache.leases == []
        await node.preparer.move_to(remote, Tier.REMOTE)
        assert node.preparer.tier(remote) is Tier.REMOTE
        assert node.cache.calls == [("evict", URL)]

    run(node, story)


def test_a_pool_that_is_forgotten_holds_nothing_and_may_come_back_with_another_model(
    tmp_path: Path,
) -> None:
    remote, local = pool(), pool(str(tmp_path))
    node = Node(tmp_path)
    node.cache.here = True

    async def story() -> None:
        await node.preparer.move_to(remote, Tier.FORKED)
        assert node.preparer.tiers(local) == {Tier.ON_DISK, Tier.FORKED}
        await node.preparer.forget(remote)
        assert (node.cache.leases, node.page_holder.kept, node.standbys.there) == ([], {}, {})
        assert node.preparer.tier(remote) is Tier.REMOTE
        await node.preparer.forget(remote)
        await node.preparer.forget(remote)

    run(node, story)


def test_at_zero_pages_are_read_behind_others_and_for_a_replica_at_once(tmp_path: Path) -> None:
    behind: list[Sequence[FileRange]] = []
    remote = pool()
    node = Node(tmp_path, prewarm_behind=lambda files, *_: behind.append(files))
    node.cache.here = True

    async def story() -> None:
        await node.preparer.refresh(remote)
        await node.preparer.move_to(remote, Tier.PAGED)
        assert (len(behind), len(node.read)) == (1, 0)
        await node.preparer.move_to(remote, Tier.ON_DISK)
        await node.prepare(remote)
        await until(lambda: bool(node.read))
        assert len(behind) == 1

    run(node, story)


def test_a_pool_that_is_denied_pages_has_none_until_it_starts(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path)
    node.cache.here = True

    async def story() -> None:
        await node.preparer.refresh(remote)
        await node.preparer.move_to(remote, Tier.PAGED)
        assert node.preparer.has_pages(remote)
        node.preparer.deny_pages({"m"})
        assert not node.preparer.has_pages(remote)
        assert node.page_holder.kept == {}
        assert Tier.PAGED not in node.preparer.tiers(remote)
        await node.prepare(remote)
        await until(lambda: node.preparer.has_pages(remote))
        node.preparer.deny_pages(frozenset())
        assert node.preparer.has_pages(remote)

    run(node, story)


def test_pages_that_one_replica_lets_go_of_are_not_taken_for_kept(tmp_path: Path) -> None:
    """Two replicas at once: the first is ended while it pages, the second then has to."""
    remote = pool()
    begun, ended = threading.Event(), threading.Event()
    reads: list[int] = []

    def prewarm(
        files: Sequence[FileRange], on_progress: OnProgress, cancelled: IsCancelled
    ) -> None:
        reads.append(len(files))
        if len(reads) == 1:
            begun.set()
            while not cancelled():
                threading.Event().wait(0.005)
            ended.set()

    node = Node(tmp_path, prewarm=prewarm)
    node.cache.here = True

    async def story() -> None:
        await node.preparer.refresh(remote)
        await node.prepare(remote, "m-1")
        assert await asyncio.to_thread(begun.wait, 60)
        await node.prepare(remote, "m-2")
        await asyncio.sleep(0.05)
        await node.preparer.release("m-1")
        assert await asyncio.to_thread(ended.wait, 60)
        await until(lambda: node.preparer.tier(remote) is Tier.PAGED)
        assert len(reads) == 2
        assert "m" in node.page_holder.kept

    run(node, story)


def test_pages_are_not_kept_for_a_move_that_was_cancelled_as_it_asked_for_them(
    tmp_path: Path,
) -> None:
    """What asks for them looks at the disk first, in a thread that cannot be cancelled."""
    remote = pool()
    asking, go = threading.Event(), threading.Event()
    node = Node(tmp_path)
    node.cache.here = True
    keep = node.page_holder.keep

    def slowly(key: str, files: Sequence[FileRange]) -> None:
        asking.set()
        go.wait(60)
        keep(key, files)

    node.page_holder.keep = slowly  # type: ignore[method-assign]

    async def story() -> None:
        move = asyncio.create_task(node.preparer.move_to(remote, Tier.PAGED))
        assert await asyncio.to_thread(asking.wait, 60)
        move.cancel()
        await node.preparer.forget(remote)
        go.set()
        with contextlib.suppress(asyncio.CancelledError):
            await move
        await asyncio.sleep(0.05)
        assert node.page_holder.kept == {}

    run(node, story)


def test_a_model_of_two_pools_stays_for_the_other(tmp_path: Path) -> None:
    one, other = pool(), pool(name="n")
    node = Node(tmp_path)
    node.cache.here = True

    async def story() -> None:
        for each in (one, other):
            await node.preparer.refresh(each)
        with pytest.raises(BackendError, match="that of n too"):
            await node.preparer.move_to(one, Tier.REMOTE)
        assert node.cache.here

    run(node, story)


def test_a_standby_is_taken_by_a_start_and_missed_when_it_dies(tmp_path: Path) -> None:
    local = pool(str(tmp_path), tiers={"paged_s": 0})
    node = Node(tmp_path)

    async def story() -> None:
        await node.preparer.refresh(local)
        await node.preparer.move_to(local, Tier.FORKED)
        node.standbys.there.clear()
        await node.preparer.refresh(local)
        assert node.preparer.tier(local) is not Tier.FORKED
        await node.preparer.move_to(local, Tier.FORKED)
        await node.prepare(local)
        assert node.preparer.tier(local) is not Tier.FORKED

    run(node, story)


def test_pages_past_the_budget_are_no_reason_not_to_start(tmp_path: Path) -> None:
    local = pool(str(tmp_path))
    node = Node(tmp_path)
    node.page_holder.error = NoSpace("exceeds modelcache.page_budget_bytes")

    async def story() -> None:
        await node.prepare(local)
        await node.paged()
        assert node.preparer.tier(local) is Tier.ON_DISK
        assert node.read == [], "nothing is read that is not kept"
        await node.preparer.move_to(local, Tier.FORKED)
        assert node.preparer.tier(local) is Tier.FORKED
        with pytest.raises(NoSpace):
            await node.preparer.move_to(local, Tier.PAGED)

    run(node, story)


@pytest.mark.parametrize("engine", ["vllm", "simulated"])
def test_a_pool_that_wants_no_pages_gets_none(tmp_path: Path, engine: str) -> None:
    local = pool(str(tmp_path), engine=engine, tiers={"paged_s": 0, "forked_s": 0})
    node = Node(tmp_path)

    async def story() -> None:
        await node.prepare(local)
        await node.paged()
        assert node.page_holder.kept == {}
        assert (Tier.FORKED in node.preparer.tiers(local)) == (engine == "vllm")

    run(node, story)


def test_a_newer_revision_replaces_what_was_kept_of_the_older(tmp_path: Path) -> None:
    remote = pool()
    node = Node(tmp_path)
    node.cache.here = True

    async def story() -> None:
        await node.prepare(remote)
        await node.paged()
        assert node.preparer.tier(remote) is Tier.PAGED
        node.cache.root = tmp_path / "newer"
        node.cache.root.mkdir()
        spec = await node.prepare(remote, "m-2")
        assert spec.pool.model == str(tmp_path / "newer" / "view")
        await node.paged()
        (kept,) = node.page_holder.kept["m"]
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
