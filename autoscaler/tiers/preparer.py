"""What has to be there before an engine starts: the protocol of whoever sees to it.

A backend starts engines; a preparer brings their weights near, keeps them there while a replica
needs them, and keeps a pool at zero as warm as the ladder says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from autoscaler.backends.base import ReplicaSpec
from autoscaler.settings import PoolSettings
from modelcache.types import Progress, Tier

Report = Callable[[Progress | None], None]
"""Told how far a preparation is; ``None`` when nothing of it is under way any more. It may still be
told after ``prepare`` has returned, of what goes on beside the engine's start."""


class Preparer(Protocol):
    """Calls for one replica do not overlap; those for one pool may. Called on one event loop."""

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        """The tiers below ``sleeping`` that the pool can be in now. Never empty; no I/O."""
        ...

    def tier(self, pool: PoolSettings) -> Tier:
        """The warmest of them that it is in: what a start would begin from. No I/O."""
        ...

    async def refresh(self, pool: PoolSettings) -> None:
        """See again where the pool's model is; somebody else may have fetched or removed it."""
        ...

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        """Have the model on this node, and hold it for this replica until ``release``.

        Returns what to start: a URL in ``pool.model`` has become a path. May take as long as a
        download, and is called off by cancellation. Raises whatever made it fail.
        """
        ...

    async def release(self, replica_id: str) -> None:
        """The replica is gone, or will not be started. Nothing to do for one that held nothing."""
        ...

    async def move_to(self, pool: PoolSettings, tier: Tier) -> None:
        """Bring a pool at zero to one of its tiers, down or up; called off by cancellation.

        Raises ``Unsupported`` where this pool cannot be in it. Somebody's lease or pin may keep it
        warmer than was asked.
        """
        ...

    async def close(self) -> None:
        """Let go of everything. It is not used afterwards."""
        ...


class NullPreparer:
    """A preparer for models that lie where their engines look for them."""

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        """On disk, and nothing else."""
        return frozenset({Tier.ON_DISK})

    def tier(self, pool: PoolSettings) -> Tier:
        """On disk."""
        return Tier.ON_DISK

    async def refresh(self, pool: PoolSettings) -> None:
        """Nothing moves."""

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        """As it is."""
        return spec

    async def release(self, replica_id: str) -> None:
        """Nothing was held."""

    async def move_to(self, pool: PoolSettings, tier: Tier) -> None:
        """It is settled."""

    async def close(self) -> None:
        """Nothing is open."""
