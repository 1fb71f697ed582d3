"""Which pools have a request, and when that changes: what wakes those who scale from zero.

Fed by the control loop's observations and by the data path's wake signals, on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping

from autoscaler.types import PoolDemand

LATCH_S = 2.0
"""Seconds that a wake signal counts for a request, whatever the counters say: they come later."""
MAX_WAITING = 64
"""Callers that wait for a change; more are answered at once."""


class Activity:
    """``version`` counts the changes. It begins at a time, so that one of an earlier process is
    another."""

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.version = int(wall_s() * 1000)
        self._clock = clock
        self._active: dict[str, bool | None] = {}
        self._latched_until_s: dict[str, float] = {}
        self._changed = asyncio.Event()
        self._waiting = 0

    def is_active(self, pool: str) -> bool | None:
        """Whether the pool has a request, held or in flight; ``None``: not known."""
        return self._active.get(pool)

    def observe(self, pools: Mapping[str, PoolDemand]) -> None:
        """Take in what the control loop sees."""
        now_s = self._clock()
        for gone in self._active.keys() - pools.keys():
            del self._active[gone]
            self._latched_until_s.pop(gone, None)
        for name, demand in pools.items():
            latched = now_s < self._latched_until_s.get(name, 0.0)
            self._set(name, True if latched else has_request(demand))

    def hold(self, pool: str) -> None:
        """The data path holds a request of this pool."""
        self._latched_until_s[pool] = self._clock() + LATCH_S
        self._set(pool, True)

    def _set(self, pool: str, active: bool | None) -> None:
        if pool not in self._active or self._active[pool] is not active:
            self._active[pool] = active
            self.version += 1
            self._changed.set()
            self._changed = asyncio.Event()

    async def wait(self, after: int, wait_s: float) -> None:
        """Until the version is another than ``after``, for at most ``wait_s``."""
        if self.version != after or self._waiting >= MAX_WAITING:
            return
        self._waiting += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
        finally:
            self._waiting -= 1


def has_request(demand: PoolDemand) -> bool | None:
    """Whether a request is held or in flight; ``None`` where what is known has none."""
    counts = (demand.queued_requests, demand.inflight_requests)
    if any(counts):
        return True
    return None if None in counts else False
