"""A ``NodePreparer`` over a cache, a page holder and standbys that only note what is asked."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoscaler.backends.base import ReplicaSpec
from autoscaler.settings import PoolSettings
from autoscaler.tiers.preparer import NodePreparer
from modelcache.ports import IsCancelled, OnProgress
from modelcache.types import Cancelled, FileRange, InUse, NotFound, Priority, Progress

URL = "s3://models/m"


@dataclass(frozen=True)
class Model:
    url: str
    revision: str
    path: Path
    manifest: None = None


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
        cancelled: IsCancelled | None = None,
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
            raise Cancelled("called off")
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
class FakePageHolder:
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
    """A ``NodePreparer`` over fakes."""

    def __init__(self, root: Path, **parts: Any) -> None:
        self.cache = FakeCache(root)
        self.page_holder = FakePageHolder()
        self.standbys = FakeStandbys()
        self.read: list[Sequence[FileRange]] = []
        self.reports: list[Progress | None] = []
        fakes: dict[str, Any] = {
            "cache": self.cache,
            "page_holder": self.page_holder,
            "standbys": self.standbys,
            "prewarm": self.prewarm,
            "prewarm_behind": parts.get("prewarm", self.prewarm),
        }
        self.preparer = NodePreparer(**{**fakes, **parts})

    def prewarm(
        self, files: Sequence[FileRange], on_progress: OnProgress, cancelled: IsCancelled
    ) -> None:
        on_progress(Progress(phase="paging", bytes_done=3, bytes_total=7))
        self.read.append(files)

    async def prepare(self, pool: PoolSettings, replica_id: str = "m-1") -> ReplicaSpec:
        spec = ReplicaSpec(id=replica_id, pool=pool)
        return await self.preparer.prepare(spec, self.reports.append)

    async def paged(self) -> None:
        """What goes on beside a start has ended."""
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))


def pool(model: str = URL, **fields: Any) -> PoolSettings:
    return PoolSettings.model_validate({"name": "m", "engine": "vllm", "model": model, **fields})


def run(node: Node, story: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def whole() -> None:
        try:
            await story()
        finally:
            await node.preparer.close()
        assert node.cache.leases == node.cache.results == []
        assert node.page_holder.closed

    asyncio.run(whole())


async def until(condition: Callable[[], bool]) -> None:
    """The test's own time limit bounds it."""
    for _ in range(6_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")
