"""The processes of one replica: kept on record on disk, found again, and ended together.

The record is what the next control process of the same state directory knows them by.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec

from autoscaler.backends.base import StateInUse, StillRunning
from autoscaler.backends.process import guard
from autoscaler.backends.process.procs import (
    ProcessId,
    ProcessStat,
    boot_id,
    carries,
    end_all,
    find_family,
    find_listeners,
    find_marked,
    holds_sockets,
    list_stats,
    read_stat,
)
from loaders.engines.base import Placement
from modelcache.store.files import make_directory

LOG = logging.getLogger("tidegate.autoscaler")

Result = TypeVar("Result")

THREADS = 4
MARK = re.compile(r"[0-9a-f]{32}")
RECORD_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")
VERSION: Final = 2
RECORD_BYTES = 1 << 20
NO_PROCESS = ProcessId(0, -1)
CLAIM_TRIES = 50
CLAIM_PAUSE_S = 0.1
"""A process that is just being started may hold the lock of a killed control process for a moment
longer than that lives, and a guard looks at it: 5 s in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedEngine:
    """What an engine was started as: what a later control process needs to take it over.

    ``model`` is where the pool's model is on this disk; ``digest`` is ``ReplicaSpec.digest``.
    """

    pool: str
    model: str | None
    placement: Placement
    digest: str
    log: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessRecord:
    """The processes of one replica. ``mark`` is in the environment of all of them, as the value of
    ``TIDEGATE_REPLICA_MARK``; ``leader`` is the guard. ``engine`` is ``None`` for what cannot be
    taken over; ``ending`` says that the guard is ending it."""

    replica_id: str
    boot_id: str
    leader: ProcessId
    mark: str
    members: frozenset[ProcessId] = frozenset()
    engine: StartedEngine | None = None
    ending: bool = False

    @property
    def variable(self) -> str:
        """The mark as it stands in an environment."""
        return f"{guard.MARK}={self.mark}"


def describe_process(
    pid: int, *, replica_id: str, mark: str, engine: StartedEngine | None = None
) -> ProcessRecord:
    """What is put on record of a process that was just launched. Raises ``OSError`` when it has
    ended."""
    stat = read_stat(pid)
    if stat is None:
        raise ProcessLookupError("it ended while it was being launched")
    return ProcessRecord(
        replica_id=replica_id, boot_id=boot_id(), leader=stat.id, mark=mark, engine=engine
    )


class ProcessRegistry:
    """One file per replica, replaced as a whole, in a directory only one control process may own.

    While it owns the directory it holds a lock, which is how the guards of its engines know that it
    lives; ``keep_s`` and ``grace_s`` are their terms for the time after it.
    """

    def __init__(self, directory: Path, *, keep_s: float = 0.0, grace_s: float = 0.0) -> None:
        self.directory = directory
        self._terms = f"{keep_s:g} {grace_s:g}".ljust(guard.TERMS_BYTES).encode()
        self._lock: int | None = None
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tidegate-processes")

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do what waits for a disk or for ``/proc`` in a thread. These threads are for nothing
        else: whatever else this process waits for, engines can be started and ended."""
        running = asyncio.get_running_loop()
        return await running.run_in_executor(self._threads, work, *arguments)

    def claim(self) -> None:
        """Become the owner of the directory. Raises ``StateInUse`` while another process is."""
        if self._lock is not None:
            return
        make_directory(self.directory)
        lock = os.open(self.directory / guard.LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.pwrite(lock, self._terms, 0)
        except BlockingIOError:
            os.close(lock)
            raise StateInUse(
                f"{self.directory} belongs to another Tidegate that is running; "
                "give this one its own state_dir"
            ) from None
        except BaseException:
            os.close(lock)
            raise
        self._lock = lock

    async def claim_patiently(self) -> None:
        """``claim``, tried again for some seconds."""
        for _ in range(CLAIM_TRIES):
            try:
                self.claim()
                return
            except StateInUse:
                await asyncio.sleep(CLAIM_PAUSE_S)
        self.claim()

    def release(self) -> None:
        """Give the directory up; nothing to do for one that is not ours."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def write(self, record: ProcessRecord) -> None:
        """Put a record on disk, in place of the replica's earlier one; whole, or not at all."""
        if not RECORD_ID.fullmatch(record.replica_id):
            raise ValueError(f"{record.replica_id!r} cannot be the id of a replica")
        path = self._path(record.mark)
        draft = path.with_suffix(".new")
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        # Not synced to disk: a record is of use only until the next boot.
        try:
            with open(os.open(draft, flags, 0o600), "wb") as file:
                file.write(render_record(record))
            draft.replace(path)
        except OSError:
            with suppress(OSError):
                draft.unlink()
            raise

    def has(self, mark: str) -> bool:
        """Whether there is a record of this mark."""
        return self._path(mark).exists()

    def remove(self, mark: str) -> None:
        """Forget a replica's processes."""
        path = self._path(mark)
        path.unlink(missing_ok=True)
        path.with_suffix(ENDING).unlink(missing_ok=True)

    def read(self) -> list[ProcessRecord]:
        """All records. One that cannot be read (a full disk, another version) is only a mark; a
        file that is no record of ours is renamed ``*.unread``."""
        records = []
        for path in sorted([*self.directory.glob("*.json"), *self.directory.glob(f"*{ENDING}")]):
            try:
                text = read_own(path)
            except FileNotFoundError:  # its guard has removed it
                continue
            except (OSError, ValueError) as error:
                text, mark = "", ""
                LOG.warning("%s is not used: %s", path, error)
            else:
                mark = path.stem
            if not MARK.fullmatch(mark):
                path.replace(path.with_suffix(".unread"))
                continue
            try:
                record = parse_record(text, mark)
            except (msgspec.DecodeError, RecursionError, OverflowError) as error:
                LOG.warning("%s cannot be read (%s): its processes are ended", path, error)
                record = ProcessRecord(
                    replica_id=f"unknown-{mark[:8]}", boot_id="", leader=NO_PROCESS, mark=mark
                )
            records.append(replace(record, ending=path.suffix == ENDING))
        return records

    def _path(self, mark: str) -> Path:
        if not MARK.fullmatch(mark):
            raise ValueError(f"{mark!r} cannot be the mark of a replica")
        return self.directory / f"{mark}.json"


ENDING = ".ending"


def read_own(path: Path) -> str:
    """The text of a file that only our user may have written. Raises ``OSError``, and
    ``ValueError`` for any other file."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), encoding="utf-8") as file:
        stat = os.fstat(file.fileno())
        if stat.st_uid != os.geteuid() or stat.st_mode & 0o022:
            raise ValueError("others than our user may have written it")
        return file.read(RECORD_BYTES)


class RecordFile(msgspec.Struct, kw_only=True):
    """A record as its file has it; a process is (pid, start time in ticks)."""

    version: Literal[2] = VERSION
    replica_id: Annotated[str, msgspec.Meta(pattern=rf"\A{RECORD_ID.pattern}\Z")]
    boot_id: str
    leader: tuple[int, int]
    members: list[tuple[int, int]]
    engine: StartedEngine | None


def render_record(record: ProcessRecord) -> bytes:
    """A record as its file's text."""
    leader, members = record.leader, sorted(record.members)
    return msgspec.json.encode(
        RecordFile(
            replica_id=record.replica_id,
            boot_id=record.boot_id,
            leader=(leader.pid, leader.start_ticks),
            members=[(one.pid, one.start_ticks) for one in members],
            engine=record.engine,
        )
    )


def parse_record(text: str, mark: str) -> ProcessRecord:
    """A record from its file's text. Raises ``msgspec.DecodeError``."""
    found = msgspec.json.decode(text, type=RecordFile)
    return ProcessRecord(
        replica_id=found.replica_id,
        boot_id=found.boot_id,
        leader=ProcessId(*found.leader),
        mark=mark,
        members=frozenset(ProcessId(*one) for one in found.members),
        engine=found.engine,
    )


class Family:
    """The processes of one replica, whose record it owns."""

    def __init__(self, record: ProcessRecord, registry: ProcessRegistry) -> None:
        self._record = record
        self._registry = registry

    def refresh(self, stats: Iterable[ProcessStat]) -> None:
        """Put on record the processes of the replica now. Raises ``OSError`` if it cannot."""
        members = frozenset(self._find(list(stats)))
        if members != self._record.members or not self._registry.has(self._record.mark):
            self._record = replace(self._record, members=members)
            self._registry.write(self._record)

    def rename(self, replica_id: str, engine: StartedEngine) -> None:
        """Keep the record for another replica. Raises ``OSError`` if it cannot."""
        self._record = replace(self._record, replica_id=replica_id, engine=engine)
        self._registry.write(self._record)

    def listens(self, port: int) -> bool | None:
        """Whether what listens on a port is a process of this replica; ``None`` while nothing does.
        Raises ``OSError`` where it cannot be told."""
        inodes = find_listeners(port)
        if not inodes:
            return None
        return holds_sockets(inodes, (one.pid for one in self._find(list_stats())))

    def pids(self) -> list[int]:
        """The processes that were seen at the last ``refresh``, the leader at least."""
        known = {self._record.leader, *self._record.members}
        return sorted(process.pid for process in known)

    async def end(self, *, grace_s: float, reap: Callable[[], object]) -> set[int]:
        """SIGTERM, ``grace_s`` seconds, SIGKILL; then off the record. Returns the pids found.

        ``reap`` is called before each look, so that an ended child of ours does not count as
        there. Raises ``StillRunning``, and keeps the record, if one survives.
        """
        found: set[ProcessId] = set(self._record.members)
        seen: set[int] = set()

        def look() -> set[ProcessId]:
            reap()
            family = self._find(list_stats(), found)
            found.update(family)
            seen.update(process.pid for process in family)
            return family

        def look_closely() -> set[ProcessId]:
            # A process may have left the session and lost its parent; the mark is still on it.
            found.update(find_marked(self._record.variable, list_stats(), os.getpid()))
            return look()

        run = self._registry.run
        left = await run(look_closely)
        if left:
            await end_all(partial(run, look), grace_s=grace_s)
            left = await end_all(partial(run, look_closely), grace_s=0.0)
        if left:
            pids = sorted(process.pid for process in left)
            raise StillRunning(f"{self._record.replica_id}: processes {pids} survive SIGKILL")
        await run(self._registry.remove, self._record.mark)
        return seen

    def _find(self, stats: list[ProcessStat], more: Iterable[ProcessId] = ()) -> set[ProcessId]:
        known = {*self._record.members, *more}
        return find_family(self._record.leader, known, stats, os.getpid())


def trust(record: ProcessRecord) -> ProcessRecord:
    """A record from disk, without the processes that do not carry its mark: whatever a file says,
    no process is touched that was not started with it, or by one that was."""
    members = frozenset(one for one in record.members if carries(one, record.variable))
    leader = record.leader
    if not carries(leader, record.variable):
        leader = ProcessId(leader.pid, NO_PROCESS.start_ticks)
    return replace(record, leader=leader, members=members)
