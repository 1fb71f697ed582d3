"""The page holder's process: reads from standard input what to hold, reports on standard output,
and ends with its parent.

Each line is a JSON object. In: ``{"files": {key: [[path, start, end], ...]}}``, always everything.
Out, after each round: ``{"rounds", "cpu_s", "problems"}``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from modelcache.pagecache import linux_pages, pressure
from modelcache.pagecache.residency import FileSpan, merge, opened, pull
from modelcache.types import CacheError, FileRange

Identity = tuple[int, int, int]
"""Device, inode and size: a file that differs in one is another file."""


RESERVE_FRACTION = 0.05
"""Of the memory: less than this available, and nothing is kept by force."""

READ_BYTES = 65_536


@dataclass(slots=True, kw_only=True)
class MappedRange:
    """One range of a file, mapped. ``locked_bytes`` from its beginning are locked."""

    span: FileSpan
    start: int
    identity: Identity
    mapping: linux_pages.Mapping
    locked_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class MappedFiles:
    """The files of one key: as asked for, as mapped, and what is wrong."""

    files: tuple[FileRange, ...]
    held: list[MappedRange] = field(default_factory=list)
    mapped: bool = False
    problem: str = ""


class HeldPages:
    """What is to be kept. One thread owns it.

    ``available`` says how much memory there is (``None``: unknown). Below ``reserve_bytes``
    nothing is brought back or marked: other users of memory come first.
    """

    def __init__(
        self, *, lock: bool, available: Callable[[], int | None], reserve_bytes: int
    ) -> None:
        self.rounds = 0
        self.pressed = False
        self._lock = lock
        self._available = available
        self._reserve_bytes = reserve_bytes
        self._kept: dict[str, MappedFiles] = {}

    def want(self, wanted: Mapping[str, Sequence[FileRange]]) -> None:
        """Keep exactly this from now on."""
        for key, kept in list(self._kept.items()):
            if tuple(wanted.get(key, ())) != kept.files:
                self._unmap(kept)
                del self._kept[key]
        for key, files in wanted.items():
            if files:
                self._kept.setdefault(key, MappedFiles(files=tuple(files)))

    def round(self) -> Iterator[None]:
        """Bring back, mark or lock everything once; yields after each few milliseconds' work."""
        self.pressed = False
        for kept in list(self._kept.values()):
            kept.problem = ""
            try:
                self._map(kept)
                for held in kept.held:
                    yield from self._hold(kept, held)
            except CacheError as error:
                kept.problem = str(error)
                self._unmap(kept)
            if self.pressed:
                return
        self.rounds += 1

    def problems(self) -> dict[str, str]:
        """Why not all of it is kept, by key; nothing of those that are."""
        return {key: kept.problem for key, kept in self._kept.items() if kept.problem}

    def close(self) -> None:
        """Let everything go. Idempotent."""
        self.want({})

    def _map(self, kept: MappedFiles) -> None:
        """Map what is not, and map again what has become another file."""
        if any(_identity(held.span.path) != held.identity for held in kept.held):
            self._unmap(kept)
        if kept.mapped:
            return
        for span in merge(kept.files):
            with opened(span.path) as fd:
                found = os.fstat(fd)
                identity = (found.st_dev, found.st_ino, found.st_size)
                for start, end in span.ranges:
                    at = start - start % linux_pages.PAGE_BYTES
                    try:
                        mapping = linux_pages.Mapping(fd, at, end - at)
                    except OSError as error:
                        raise CacheError(f"cannot map {span.path}: {error.strerror}") from error
                    kept.held.append(
                        MappedRange(span=span, start=at, identity=identity, mapping=mapping)
                    )
        kept.mapped = True

    def _hold(self, kept: MappedFiles, held: MappedRange) -> Iterator[None]:
        for at, size in linux_pages.windows(0, held.mapping.length):
            free = self._available()
            if free is not None and free < self._reserve_bytes:
                self.pressed = True
                return
            if self._lock and not kept.problem:
                self._lock_window(kept, held, at, size)
            if held.locked_bytes < at + size:
                self._mark(held, at, size)
            yield

    def _lock_window(self, kept: MappedFiles, held: MappedRange, at: int, size: int) -> None:
        if held.locked_bytes != at:
            return
        try:
            held.mapping.lock(at, size)
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EPERM, errno.EAGAIN):
                raise CacheError(f"cannot lock {held.span.path}: {error.strerror}") from error
            kept.problem = (
                f"not all of it locked, the rest touched: {error.strerror} (RLIMIT_MEMLOCK, or "
                "`ulimit -l`, says how much this user may lock)"
            )
            return
        held.locked_bytes = at + size

    def _mark(self, held: MappedRange, at: int, size: int) -> None:
        try:
            if held.mapping.populate(at, size):
                return
            with opened(held.span.path) as fd, open("/dev/null", "wb") as nowhere:
                done = 0
                while done < size:
                    moved = pull(nowhere.fileno(), fd, held.start + at + done, size - done)
                    if not moved:
                        return
                    done += moved
        except OSError as error:
            short = _identity(held.span.path) != held.identity
            why = "it was cut short or replaced" if short else error.strerror
            raise CacheError(f"cannot keep {held.span.path}: {why}") from error

    def _unmap(self, kept: MappedFiles) -> None:
        for held in kept.held:
            held.mapping.close()
        kept.held.clear()
        kept.mapped = False


def _identity(path: str) -> Identity | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)
        return found.st_dev, found.st_ino, found.st_size
    return None


def main(arguments: Sequence[str]) -> int:
    """``TOUCH_S LOCK`` (0 or 1); ends with code 0 when standard input does."""
    touch_s, lock = float(arguments[0]), arguments[1] == "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Under a shortage of memory this is the process to end: it costs a slower start, no answer.
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    keeping = HeldPages(
        lock=lock,
        available=pressure.available_bytes,
        reserve_bytes=int((pressure.total_bytes() or 0) * RESERVE_FRACTION),
    )
    with suppress(BrokenPipeError):
        _serve(keeping, touch_s)
    keeping.close()
    return 0


def _serve(keeping: HeldPages, touch_s: float) -> None:
    received = b""
    steps = None
    next_s = time.monotonic()
    while True:
        now_s = time.monotonic()
        wait_s = 0.0 if steps is not None else max(0.0, next_s - now_s)
        if select.select([0], [], [], wait_s)[0]:
            data = os.read(0, READ_BYTES)
            if not data:
                return
            *lines, received = (received + data).split(b"\n")
            if lines:
                # Only the newest counts: each says everything.
                keeping.want(parse(lines[-1]))
                steps, next_s = None, now_s
        if steps is None and time.monotonic() >= next_s:
            steps = keeping.round()
        if steps is not None and next(steps, StopIteration) is StopIteration:
            steps, next_s = None, time.monotonic() + touch_s
            _tell(keeping)


def parse(line: bytes) -> dict[str, list[FileRange]]:
    """What a line says is to be kept."""
    files = json.loads(line)["files"]
    return {
        key: [FileRange(path=path, start=start, end=end) for path, start, end in ranges]
        for key, ranges in files.items()
    }


def _tell(keeping: HeldPages) -> None:
    told = {
        "rounds": keeping.rounds,
        "cpu_s": time.process_time(),
        "problems": keeping.problems(),
    }
    data = json.dumps(told).encode() + b"\n"
    while data:
        data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
