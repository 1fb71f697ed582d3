"""All processes of one replica: found, kept on record, and ended together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace

from autoscaler.backends.base import Leftover, StateInUse, StillRunning
from autoscaler.backends.process.procs import (
    ProcessId,
    ProcessStat,
    boot_id,
    end_all,
    find_family,
    find_marked,
    list_stats,
)
from autoscaler.backends.process.registry import ProcessRecord, ProcessRegistry

Sleep = Callable[[float], Awaitable[None]]

CLAIM_TRIES = 20
CLAIM_PAUSE_S = 0.25
"""A killed Tidegate's workers may hold its lock for a moment longer than it lives: 5 s in all."""


class Family:
    """The processes of one replica, whose record it owns."""

    def __init__(self, record: ProcessRecord, registry: ProcessRegistry) -> None:
        self._record = record
        self._registry = registry

    def refresh(self, stats: Iterable[ProcessStat]) -> None:
        """Put on record who belongs to the replica now. Raises ``OSError`` if it cannot."""
        members = frozenset(self._find(list(stats)))
        if members != self._record.members:
            self._record = replace(self._record, members=members)
            self._registry.write(self._record)

    def rename(self, replica_id: str) -> None:
        """Keep the record under another name. Raises ``OSError`` if it cannot."""
        before = self._record.replica_id
        self._record = replace(self._record, replica_id=replica_id)
        self._registry.write(self._record)
        self._registry.remove(before)

    def pids(self) -> list[int]:
        """The processes that were seen at the last ``refresh``, the leader at least."""
        known = {self._record.leader, *self._record.members}
        return sorted(process.pid for process in known)

    async def end(self, *, grace_s: float, sleep: Sleep, reap: Callable[[], object]) -> set[int]:
        """SIGTERM, ``grace_s`` seconds, SIGKILL; then off the record. Returns the pids found.

        ``reap`` is called before each look, so that an ended child of ours does not count as
        there. Raises ``StillRunning``, and keeps the record, if one survives.
        """
        found: set[ProcessId] = set(self._record.members)

        def look() -> set[ProcessId]:
            reap()
            family = self._find(list_stats(), found)
            found.update(family)
            return family

        def look_closely() -> set[ProcessId]:
            # A process may have left the session and lost its parent; the mark is still on it.
            found.update(find_marked(self._record.mark, list_stats(), os.getpid()))
            return look()

        left = await asyncio.to_thread(look_closely)
        seen = {process.pid for process in left}
        if left:
            await end_all(look, grace_s=grace_s, sleep=sleep)
            left = await end_all(look_closely, grace_s=0.0, sleep=sleep)
        if left:
            pids = sorted(process.pid for process in left)
            raise StillRunning(f"{self._record.replica_id}: processes {pids} survive SIGKILL")
        await asyncio.to_thread(self._registry.remove, self._record.replica_id)
        return seen

    def _find(self, stats: list[ProcessStat], more: Iterable[ProcessId] = ()) -> set[ProcessId]:
        known = {*self._record.members, *more}
        return find_family(self._record.leader, known, stats, os.getpid())


async def end_leftovers(
    registry: ProcessRegistry, *, grace_s: float, sleep: Sleep
) -> list[Leftover]:
    """Own the registry, and end every process on it that runs still.

    Raises ``StateInUse`` when its owner is alive. A record that cannot be cleared stays, and its
    processes are tried again by the next start.
    """
    for attempt in range(CLAIM_TRIES + 1):
        try:
            registry.claim()
            break
        except StateInUse:
            if attempt == CLAIM_TRIES:
                raise
            await sleep(CLAIM_PAUSE_S)
    here = boot_id()
    leftovers = []
    endings = []
    for record in await asyncio.to_thread(registry.read):
        if record.boot_id != here:
            await asyncio.to_thread(registry.remove, record.replica_id)
            leftovers.append(Leftover(replica_id=record.replica_id, pids=()))
        else:
            endings.append(_end_leftover(record, registry, grace_s, sleep))
    return leftovers + list(await asyncio.gather(*endings))


async def _end_leftover(
    record: ProcessRecord, registry: ProcessRegistry, grace_s: float, sleep: Sleep
) -> Leftover:
    pids = await Family(record, registry).end(grace_s=grace_s, sleep=sleep, reap=lambda: None)
    return Leftover(replica_id=record.replica_id, pids=tuple(sorted(pids)))
