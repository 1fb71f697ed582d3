"""Linux processes by pid and start time, which together name one process of one boot for ever."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from autoscaler.backends.process import guard

PROC = Path("/proc")
POLL_S = 0.05
LISTENING = "0A"
KILL_ROUNDS = 100
"""Looks after the first SIGKILL, each followed by another: some 5 s in all."""
KILLED_S = KILL_ROUNDS * POLL_S
"""How long is waited for the end of a process after SIGKILL: what is there then hangs in the
kernel."""


@dataclass(frozen=True, slots=True, order=True)
class ProcessId:
    """A process: its pid, and the clock tick since boot at which it started."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStat:
    """A process as ``/proc/PID/stat`` tells it."""

    id: ProcessId
    parent: int
    session: int
    gone: bool


def boot_id() -> str:
    """The name of this boot; start times of another boot mean nothing."""
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def read_stat(pid: int) -> ProcessStat | None:
    """A process; ``None`` if there is none with this pid, or it is hidden from us. Raises
    ``OSError`` where it cannot be told."""
    fields = guard.read_stat(pid)
    if fields is None:
        return None
    return ProcessStat(
        id=ProcessId(pid, int(fields[19])),
        parent=int(fields[1]),
        session=int(fields[3]),
        gone=fields[0] in guard.GONE,
    )


def list_stats() -> list[ProcessStat]:
    """Every process of this machine that this one can see."""
    pids = [int(entry) for entry in os.listdir(PROC) if entry.isdigit()]
    return [stat for stat in map(read_stat, pids) if stat is not None]


def sum_pss_bytes(pids: Iterable[int]) -> int | None:
    """The memory of these processes, of what they share with others only their part; ``None`` where
    none of them can be read."""
    sizes = [size for pid in pids if (size := read_pss_bytes(pid)) is not None]
    return sum(sizes) if sizes else None


def read_pss_bytes(pid: int) -> int | None:
    """Memory of a process, of pages it shares only its part; ``None`` where it cannot be told."""
    try:
        text = (PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return None
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return None


def find_listeners(port: int) -> set[int]:
    """The sockets (inodes) that listen on a TCP port and may be reached at 127.0.0.1. Raises
    ``OSError`` where it cannot be told."""
    found = set()
    for name in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError), (PROC / "net" / name).open() as file:
            for line in file:
                _, local, _, state, _, _, _, uid, _, inode, *_ = line.split()
                # Beside a reserved port, another user's IPv6 socket can be for IPv6 only.
                reached = state == LISTENING and (name == "tcp" or int(uid) == os.geteuid())
                if reached and int(local.rpartition(":")[2], 16) == port:
                    found.add(int(inode))
    return found


def holds_sockets(inodes: Collection[int], pids: Iterable[int]) -> bool:
    """Whether these processes have each of these sockets open."""
    missing = {f"socket:[{inode}]" for inode in inodes}
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended, or is not ours to look into
            for entry in (PROC / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    missing.discard(os.readlink(entry))
    return not missing


def reap_orphans(
    leaders: Iterable[int], known: Iterable[int], stats: Iterable[ProcessStat]
) -> None:
    """Let go of ended processes that came to us when their own parent ended: the ``known`` ones,
    and those in the ``leaders``' sessions. Leaders are left to the process that started them."""
    heads, others = set(leaders), set(known)
    for stat in stats:
        pid = stat.id.pid
        if not stat.gone or stat.parent != os.getpid() or pid in heads:
            continue
        if pid in others or stat.session in heads:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def carries(process: ProcessId, mark: str) -> bool:
    """Whether this process is our user's, and was started with ``mark`` in its environment. Raises
    ``OSError`` where it cannot be told."""
    try:
        with (PROC / str(process.pid) / "environ").open("rb") as file:
            ours = os.fstat(file.fileno()).st_uid == os.geteuid()
            marked = ours and mark.encode() in file.read().split(b"\0")
    except guard.NOT_THERE:
        return False
    stat = read_stat(process.pid) if marked else None
    return stat is not None and stat.id == process


def find_family(
    leader: ProcessId, known: Iterable[ProcessId], stats: Iterable[ProcessStat], own_pid: int
) -> set[ProcessId]:
    """The processes of a replica: its leader, known ones, their session, their descendants.

    A session id stays taken while anyone is in it. So a process that shares the leader's session
    with a process that is surely ours belongs to us, even after the leader has died.
    """
    alive = [stat for stat in stats if not stat.gone and stat.id.pid != own_pid]
    ours = {leader, *known}
    family = {stat.id for stat in alive if stat.id in ours}
    sessions = {stat.session for stat in alive if stat.id in family} & {leader.pid}
    family |= {stat.id for stat in alive if stat.session in sessions}
    while True:
        pids = {process.pid for process in family}
        more = {stat.id for stat in alive if stat.parent in pids} - family
        if not more:
            return family
        family |= more


def find_marked(mark: str, stats: Iterable[ProcessStat], own_pid: int) -> set[ProcessId]:
    """The processes that were started with ``mark`` in their environment."""
    return {
        stat.id
        for stat in stats
        if not stat.gone and stat.id.pid != own_pid and carries(stat.id, mark)
    }


def send_signal(process: ProcessId, number: signal.Signals) -> None:
    """Signal exactly this process; nothing happens if it is gone and its pid is another's."""
    guard.send((process.pid, process.start_ticks), number)


async def end_all(
    find: Callable[[], Awaitable[set[ProcessId]]], *, grace_s: float
) -> set[ProcessId]:
    """SIGTERM to all that ``find`` finds, SIGKILL to what is left after ``grace_s``.

    Those that appear meanwhile are included. Returns what survived: nothing, unless it hangs in
    the kernel.
    """
    asked: set[ProcessId] = set()
    looks = max(1, round(grace_s / POLL_S)) if grace_s > 0 else 0
    for _ in range(looks):
        left = await find()
        if not left:
            return left
        for process in left - asked:
            send_signal(process, signal.SIGTERM)
        asked |= left
        await asyncio.sleep(POLL_S)
    for _ in range(KILL_ROUNDS):
        left = await find()
        if not left:
            return left
        for process in left:
            send_signal(process, signal.SIGKILL)
        await asyncio.sleep(POLL_S)
    return await find()


async def has_ended(poll: Callable[[], object], *, within_s: float) -> bool:
    """Whether a process ends within this time: ``poll`` tells anything but ``None`` once it has. It
    is asked now and then, so that no thread waits."""
    for _ in range(max(1, round(within_s / POLL_S))):
        if poll() is not None:
            return True
        await asyncio.sleep(POLL_S)
    return poll() is not None
