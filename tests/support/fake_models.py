"""Models that exist only in memory, and what preparing them takes."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from dataclasses import dataclass, field, replace

from autoscaler.backends.base import ReplicaSpec, Unsupported
from autoscaler.settings import PoolSettings
from autoscaler.tiers.preparer import Report
from modelcache.types import TIERS, Progress, Tier

SIZE_BYTES = 10_000_000_000
PLACE = "/cache/m"


class NullPreparer:
    """A preparer of models that engines find by themselves: always on disk, never moved."""

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        return frozenset({Tier.ON_DISK})

    def tier(self, pool: PoolSettings) -> Tier:
        return Tier.ON_DISK

    def size_bytes(self, pool: PoolSettings) -> int | None:
        return None

    @property
    def page_budget_bytes(self) -> int | None:
        return None

    def has_pages(self, pool: PoolSettings) -> bool:
        return False

    def deny_pages(self, pools: Set[str]) -> None:
        raise AssertionError("it has no budget")

    async def refresh(self, pool: PoolSettings) -> None:
        pass

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        return spec

    async def release(self, replica_id: str) -> None:
        pass

    async def move_to(self, pool: PoolSettings, tier: Tier) -> None:
        pass

    async def forget(self, pool: PoolSettings) -> None:
        pass

    async def close(self) -> None:
        pass


@dataclass
class FakePreparer(NullPreparer):
    """A preparer whose model is fetched in ``fetch_s`` and, if ``page_s`` is set, paged in that
    time beside the engine's start. Its faults are set by the test."""

    here: Tier = Tier.ON_DISK
    """Where the model is."""
    possible: frozenset[Tier] = frozenset({Tier.FORKED, Tier.PAGED, Tier.ON_DISK, Tier.REMOTE})
    fetch_s: float = 20.0
    move_s: float = 1.0
    page_s: float | None = None
    error: Exception | None = None
    move_error: Exception | None = None
    unsupported: frozenset[Tier] = frozenset()
    held: set[str] = field(default_factory=set)
    prepared: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    moved: list[Tier] = field(default_factory=list)
    moves_cancelled: list[Tier] = field(default_factory=list)
    refreshes: int = 0
    closed: bool = False

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        return frozenset({Tier.REMOTE}) if self.here is Tier.REMOTE else self.possible

    def tier(self, pool: PoolSettings) -> Tier:
        return self.here

    async def refresh(self, pool: PoolSettings) -> None:
        self.refreshes += 1

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        self.prepared.append(spec.id)
        if self.error is not None:
            raise self.error
        if spec.pool.model is None:
            return spec
        self.held.add(spec.id)
        try:
            if self.here is Tier.REMOTE:
                for part in range(10):
                    report(
                        Progress(
                            phase="fetching",
                            bytes_done=part * SIZE_BYTES // 10,
                            bytes_total=SIZE_BYTES,
                            rate_bytes_s=SIZE_BYTES / self.fetch_s,
                        )
                    )
                    await asyncio.sleep(self.fetch_s / 10)
        except asyncio.CancelledError:
            self.cancelled.append(spec.id)
            raise
        if self.here in {Tier.REMOTE, Tier.ON_DISK}:
            self.here = Tier.PAGED
        if self.page_s is None:
            report(None)
        else:
            report(Progress(phase="paging", bytes_done=0, bytes_total=SIZE_BYTES))
            asyncio.get_running_loop().call_later(self.page_s, report, None)
        return replace(spec, pool=spec.pool.model_copy(update={"model": PLACE}))

    async def release(self, replica_id: str) -> None:
        self.held.discard(replica_id)

    async def move_to(self, pool: PoolSettings, tier: Tier) -> None:
        try:
            await asyncio.sleep(self.move_s)
        except asyncio.CancelledError:
            self.moves_cancelled.append(tier)
            raise
        if self.move_error is not None:
            raise self.move_error
        if tier in self.unsupported:
            raise Unsupported(f"no {tier} here")
        assert tier in TIERS
        self.moved.append(tier)
        self.here = tier

    async def close(self) -> None:
        self.closed = True
