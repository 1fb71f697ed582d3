"""The processes of one replica: kept on record on disk, found again, and ended together.

The record is what the next Tidegate of the same state directory knows them by.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

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

Sleep = Callable[[float], Awaitable[None]]
RECORD_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
VERSION = 1
CLAIM_TRIES = 20
CLAIM_PAUSE_S = 0.25
"""A killed Tidegate's workers may hold its lock for a moment longer than it lives: 5 s in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """The processes of one replica. ``mark`` is in the environment of all of them."""

    replica_id: str
    boot_id: str
    leader: ProcessId
    mark: str
    members: frozenset[ProcessId] = frozenset()


class ProcessRegistry:
    """One file per replica, replaced as a whole, in a directory only one Tidegate may own."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock: int | None = None

    def claim(self) -> None:
        """Become the owner of the directory. Raises ``StateInUse`` while another process is."""
        if self._lock is not None:
            return
        self._directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            raise StateInUse(
                f"{self._directory} belongs to another Tidegate that is running; "
                "give this one its own state_dir"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    def release(self) -> None:
        """Give the directory up; nothing to do for one that is not ours."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, record: ProcessRecord) -> None:
        """Put a record on disk, in place of the replica's earlier one; whole, or not at all."""
        path = self._path(record.replica_id)
        text = json.dumps(
            {
                "version": VERSION,
                "replica_id": record.replica_id,
                "boot_id": record.boot_id,
                "leader": [record.leader.pid, record.leader.start_ticks],
                "mark": record.mark,
                "members": [[one.pid, one.start_ticks] for one in sorted(record.members)],
            }
        )
        # Not synced to disk: a record is of use only until the next boot.
        draft = path.with_suffix(".new")
        draft.write_text(text)
        draft.replace(path)

    def remove(self, replica_id: str) -> None:
        """Forget a replica's processes."""
        self._path(replica_id).unlink(missing_ok=True)

    def read(self) -> list[ProcessRecord]:
        """All records. A file that is none (cut short by a full disk) is renamed ``*.unread``."""
        records = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                records.append(parse_record(path.read_text()))
            except (ValueError, KeyError, TypeError):
                path.replace(path.with_suffix(".unread"))
        return records

    def _path(self, replica_id: str) -> Path:
        if not RECORD_ID.fullmatch(replica_id):
            raise ValueError(f"{replica_id!r} cannot be the id of a replica")
        return self._directory / f"{replica_id}.json"


def parse_record(text: str) -> ProcessRecord:
    """A record from its file's text. Raises ``ValueError``, ``KeyError`` or ``TypeError``."""
    fields = json.loads(text)
    if fields["version"] != VERSION:
        raise ValueError(f"a record of version {fields['version']} cannot be read")
    return ProcessRecord(
        replica_id=str(fields["replica_id"]),
        boot_id=str(fields["boot_id"]),
        leader=ProcessId(*map(int, fields["leader"])),
        mark=str(fields["mark"]),
        members=frozenset(ProcessId(*map(int, pair)) for pair in fields["members"]),
    )


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
