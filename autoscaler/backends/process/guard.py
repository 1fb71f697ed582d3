"""The guard: the parent of one engine, which ends it when no control process is left.

Run as a script (``python -I -S guard.py ...``) at the head of a session of its own, in one of
three ways:

``start PARENT DIRECTORY CORES PROGRAM ARGUMENT...``
    waits for one byte on its standard input, starts the program, and guards it. The control
    process (``PARENT``) sends that byte after it has put the guard on record, so that no engine
    ever runs that a later control process would not find. Its death is the end of the input.
``watch ENGINE DIRECTORY``
    guards a child that it has already: a forked engine, which waits behind a gate of its own.
``tie PARENT CORES PROGRAM ARGUMENT...``
    waits as ``start`` does, then becomes the program, which the kernel sends SIGTERM when the
    control process dies. For what no later control process would take over.

A control process lives while the lock on ``DIRECTORY/lock`` is held. When it is free, or the
engine's own record has been removed, the guard waits for the next control process as long as the
last one has written into the lock file, then ends the engine and all its descendants. If the guard
itself is killed, the kernel sends the engine SIGTERM. A guard ends as its engine did.

Standard library only, and nothing that takes long to import.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import signal
import sys
import time

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 125
NOT_FOUND = 127

MARK = "TIDEGATE_REPLICA_MARK"
LOCK = "lock"
POLL_S = 0.2
END_POLL_S = 0.05
KILL_ROUNDS = 100
GONE = b"ZXx"
"""States of processes that have ended."""
NOT_THERE = (FileNotFoundError, ProcessLookupError, PermissionError)
"""How ``/proc`` says that a process is gone, or hidden from us. Any other error (no descriptor, no
memory) says nothing of it."""
TERMS_BYTES = 64
"""What the lock file holds: ``KEEP_S GRACE_S``, filled up with blanks to this length, so that it
is always replaced as a whole."""


def main(arguments: list[str]) -> int:
    """Do what the module says; returns an exit status."""
    way, *rest = arguments
    if way == "watch":
        engine, directory = int(rest[0]), rest[1]
        return guard(engine, directory)
    parent = int(rest[0])
    if way == "tie":
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent or os.read(0, 1) != b"!":
        return NOT_STARTED
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    if way == "tie":
        return become(rest[2:], cores=rest[1])
    directory, cores, *program = rest[1:]
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    own_pid = os.getpid()
    engine = os.fork()
    if engine == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        os.setpgid(0, 0)
        os._exit(become(program, cores=cores) if os.getppid() == own_pid else NOT_STARTED)
    return guard(engine, directory)


def become(program: list[str], *, cores: str) -> int:
    """Replace this process by the program; returns an exit status if that cannot be done."""
    try:
        if cores != "-":
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
        os.execvp(program[0], program)
    except OSError as error:
        os.write(2, f"{program[0]} was not started: {error}\n".encode())
    return NOT_FOUND


def guard(engine: int, directory: str) -> int:
    """Wait for the end of the engine, or bring it about; returns its exit status."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
    owner = Owner(directory, os.environ.get(MARK, ""))
    left_s: float | None = None
    while True:
        status = reap(engine)
        if status is None and owner.lives():
            left_s = None
        elif status is not None and owner.lives():
            return end_like(status)
        else:
            now_s = time.monotonic()
            left_s = now_s if left_s is None else left_s
            keep_s, grace_s = owner.terms()
            if status is not None or (now_s - left_s >= keep_s and owner.take_leave()):
                status, ended = end_family(engine, status, grace_s)
                if ended:
                    owner.forget()
                return end_like(status)
        signal.sigtimedwait({signal.SIGCHLD}, POLL_S)


class Owner:
    """The control process, as the guard knows it: by the lock that it holds."""

    def __init__(self, directory: str, mark: str) -> None:
        self._record = os.path.join(directory, f"{mark}.json")
        self._ending = os.path.join(directory, f"{mark}.ending")
        self._lock = -1
        with contextlib.suppress(OSError):
            self._lock = os.open(os.path.join(directory, LOCK), os.O_RDONLY | os.O_CLOEXEC)

    def lives(self) -> bool:
        """Whether there is one, and it knows this engine."""
        if self._try_lock():
            fcntl.flock(self._lock, fcntl.LOCK_UN)
            return False
        return self._lock >= 0 and os.path.exists(self._record)

    def terms(self) -> tuple[float, float]:
        """How long an engine is kept without an owner, and has between SIGTERM and SIGKILL, in
        seconds; nothing where the last owner has not said."""
        with contextlib.suppress(OSError, ValueError):
            keep_s, grace_s = os.pread(self._lock, TERMS_BYTES, 0).split()
            return float(keep_s), float(grace_s)
        return 0.0, 0.0

    def take_leave(self) -> bool:
        """Mark the record as that of an engine that ends; false if there is an owner again.

        While this holds the lock no other process can become the owner, so an engine is either
        adopted or ended by its guard, and never both.
        """
        held = self._try_lock()
        if not held and self.lives():
            return False
        with contextlib.suppress(OSError):
            os.rename(self._record, self._ending)
        if held:
            fcntl.flock(self._lock, fcntl.LOCK_UN)
        return True

    def forget(self) -> None:
        """Remove the record of an engine whose processes are gone."""
        for path in (self._ending, self._record):
            with contextlib.suppress(OSError):
                os.unlink(path)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (OSError, ValueError):
            return False
        return True


def reap(engine: int) -> int | None:
    """Let go of children that have ended; the engine's wait status, once it is among them."""
    found = None
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == engine:
                found = status
            elif pid == 0:
                break
    return found


def end_family(engine: int, status: int | None, grace_s: float) -> tuple[int, bool]:
    """SIGTERM to every descendant, SIGKILL after ``grace_s``; returns the engine's wait status, and
    whether all of them are gone. What is not (it hangs in the kernel) is the next control
    process's, by the record.

    Since orphans of descendants become children of the guard, descendants are all there is.
    """
    ended = False
    asked: set[tuple[int, int]] = set()
    kill_at_s = time.monotonic() + grace_s
    rounds = 0
    while rounds < KILL_ROUNDS:
        found = reap(engine)
        status = found if status is None else status
        forced = time.monotonic() >= kill_at_s
        rounds += forced
        left: set[tuple[int, int]] = set()
        with contextlib.suppress(OSError):  # who is left is not known: the next look tells
            left = descendants(os.getpid())
            ended = not left
        if ended:
            break
        for process in left if forced else left - asked:
            send(process, signal.SIGKILL if forced else signal.SIGTERM)
        asked |= left
        signal.sigtimedwait({signal.SIGCHLD}, END_POLL_S)
    return signal.SIGKILL if status is None else status, ended


def descendants(root: int) -> set[tuple[int, int]]:
    """Living processes below this one, as pid and start time."""
    started: dict[int, int] = {}
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        fields = read_stat(entry) if entry.isdigit() else None
        if fields is not None and fields[0] not in GONE:
            started[int(entry)] = int(fields[19])
            children.setdefault(int(fields[1]), []).append(int(entry))
    found: set[tuple[int, int]] = set()
    waiting = [root]
    while waiting:
        for pid in children.get(waiting.pop(), ()):
            found.add((pid, started[pid]))
            waiting.append(pid)
    return found


def read_stat(pid: object) -> list[bytes] | None:
    """The fields of ``/proc/PID/stat`` after the command's name; ``None`` for one that is gone, or
    hidden. Raises ``OSError`` where it cannot be told."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            text = file.read()
    except NOT_THERE:
        return None
    return text[text.rindex(b")") + 2 :].split()


def send(process: tuple[int, int], number: signal.Signals) -> None:
    """Signal exactly this process, not another that was given its pid."""
    pid, started = process
    with contextlib.suppress(OSError):
        handle = os.pidfd_open(pid)
        try:
            fields = read_stat(pid)
            if fields is not None and int(fields[19]) == started:
                signal.pidfd_send_signal(handle, number)
        finally:
            os.close(handle)


def end_like(status: int) -> int:
    """The exit status for this wait status; does not return where it was a signal."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    prctl(PR_SET_DUMPABLE, 0)  # it is not the guard that crashed
    with contextlib.suppress(OSError, ValueError):
        signal.signal(-code, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
    os.kill(os.getpid(), -code)
    return 128 - code


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
