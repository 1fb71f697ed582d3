"""Keeps models in the page cache, within a budget of memory.

Clean pages that are not in use are reclaimed even with memory to spare: measured, half was gone
after two minutes. Mapped and touched they stay. A process of its own does that: mapped weights
count as its memory, so a shortage ends it, not the gateway; here it is started again.
"""

from __future__ import annotations

import json
import logging
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelcache.pagecache.residency import merge
from modelcache.types import CacheError, FileRange, NoSpace

LOG = logging.getLogger("tidegate.modelcache")

RESTART_S = 1.0
RESTART_MOST_S = 60.0
"""Pauses before a holder process that ended is started again double up to this."""

STEADY_ROUNDS = 3
"""Rounds after which a holder process counts as sound, and the next pause is short again."""

END_S = 5.0
READ_BYTES = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class PageHolderStatus:
    """The page holder at this moment.

    ``restarts``: how often its process ended unasked. ``rounds``, ``cpu_s`` (processor seconds) and
    ``problems`` (by key: why not all is kept) are the present process's.
    """

    pid: int | None
    restarts: int
    rounds: int
    cpu_s: float
    problems: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesToHold:
    """Files to keep, and their bytes when they were asked for."""

    files: tuple[FileRange, ...]
    size_bytes: int


class PageHolder:
    """Keeps what it is given until it is dropped. Thread-safe; nothing here waits for a disk.

    ``budget_bytes`` bounds the sum over all keys, and what exceeds it is refused: the caller knows
    what to release. ``touch_s``: seconds between two touches. ``lock``: lock pages instead
    (``mlock``); where that is not allowed they are touched, and the log says so.
    """

    def __init__(self, *, budget_bytes: int, touch_s: float = 10.0, lock: bool = False) -> None:
        self._budget_bytes = budget_bytes
        self._argv = (
            sys.executable, "-I", "-m", "modelcache.pagecache.holder_process",
            str(touch_s), str(int(lock)),
        )  # fmt: skip
        self._changed = threading.Condition()
        self._wanted: dict[str, FilesToHold] = {}
        self._told: dict[str, Any] = {}
        self._restarts = 0
        self._pid: int | None = None
        self._closed = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    @property
    def budget_bytes(self) -> int:
        """Most bytes that are kept."""
        return self._budget_bytes

    def keep(self, key: str, files: Sequence[FileRange]) -> None:
        """Keep ``files`` under ``key``, in place of what was kept under it.

        Returns at once; what is not cached yet is read in the background. Raises ``NoSpace``
        where it exceeds the budget, ``CacheError`` where a file is not there.
        """
        size = sum(span.size_bytes for span in merge(files))
        with self._changed:
            if self._closed:
                raise CacheError("the page holder is closed")
            others = sum(one.size_bytes for name, one in self._wanted.items() if name != key)
            if others + size > self._budget_bytes:
                raise NoSpace(
                    f"keeping {size:,} bytes of {key} in the page cache exceeds "
                    f"modelcache.page_budget_bytes: {others:,} of {self._budget_bytes:,} are taken"
                )
            self._wanted[key] = FilesToHold(files=tuple(files), size_bytes=size)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="page-holder", daemon=True)
                self._thread.start()
        self._wake_up()

    def drop(self, key: str) -> bool:
        """Keep the files of ``key`` no longer; whether there were any.

        They stay cached until the kernel wants the memory; ``pagecache.drop`` lets go at once.
        """
        with self._changed:
            found = self._wanted.pop(key, None) is not None
        if found:
            self._wake_up()
        return found

    def status(self) -> PageHolderStatus:
        """Its process, and what that told last."""
        with self._changed:
            told = {"rounds": 0, "cpu_s": 0.0, "problems": {}, **self._told}
            return PageHolderStatus(pid=self._pid, restarts=self._restarts, **told)

    def close(self) -> None:
        """Let everything go and end the process. Idempotent."""
        with self._changed:
            self._closed = True
            thread, self._thread = self._thread, None
        self._wake_up()
        if thread is not None:
            thread.join()
        with self._changed:
            if self._wake >= 0:
                os.close(self._wake)
                self._wake = -1

    def _wake_up(self) -> None:
        with self._changed:
            self._changed.notify_all()
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    def _run(self) -> None:
        """Have a process as long as there is anything to keep."""
        pause_s = RESTART_S
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._wanted))
                if self._closed:
                    return
            rounds = self._live()
            with self._changed:
                self._told, self._pid = {}, None
                if self._closed or not self._wanted:
                    continue
                self._restarts += 1
                pause_s = RESTART_S if rounds >= STEADY_ROUNDS else min(2 * pause_s, RESTART_MOST_S)
                self._changed.wait_for(lambda: self._closed, timeout=pause_s)

    def _live(self) -> int:
        """One process, from its start to its end; the rounds it did."""
        try:
            process = subprocess.Popen(
                self._argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
            )
        except OSError:
            return 0  # No memory or no processes left: the next try may do.
        with self._changed:
            self._pid = process.pid
        assert process.stdin is not None
        assert process.stdout is not None
        os.set_blocking(process.stdin.fileno(), False)
        rounds = 0
        try:
            rounds = self._talk(process.stdin.fileno(), process.stdout.fileno())
        finally:
            process.stdin.close()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
        return rounds

    def _talk(self, to_child: int, from_child: int) -> int:
        """Tell the process what changes, note what it tells, until either side ends it."""
        sent: Mapping[str, FilesToHold] | None = None
        outgoing = received = b""
        rounds = 0
        while True:
            with self._changed:
                if self._closed or not self._wanted:
                    return rounds
                wanted = dict(self._wanted)
            if wanted != sent and not outgoing:
                sent, outgoing = wanted, _line(wanted)
            writers = [to_child] if outgoing else []
            readable, writable, _ = select.select([from_child, self._wake], writers, [])
            if self._wake in readable:
                os.eventfd_read(self._wake)
            if writable:
                try:
                    outgoing = outgoing[os.write(to_child, outgoing) :]
                except BrokenPipeError:
                    return rounds
            if from_child in readable:
                data = os.read(from_child, READ_BYTES)
                if not data:
                    return rounds
                *lines, received = (received + data).split(b"\n")
                if lines:
                    told = json.loads(lines[-1])
                    rounds = told["rounds"]
                    with self._changed:
                        before, self._told = self._told.get("problems", {}), told
                    for key, problem in told["problems"].items():
                        if problem != before.get(key):
                            LOG.warning("pages of %s: %s", key, problem)


def _line(wanted: Mapping[str, FilesToHold]) -> bytes:
    files = {
        key: [(file.path, file.start, file.end) for file in one.files]
        for key, one in wanted.items()
    }
    return json.dumps({"files": files}).encode() + b"\n"
