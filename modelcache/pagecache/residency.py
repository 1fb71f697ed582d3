"""Which bytes of files are in the page cache, bringing them in, and letting them go.

Ranges that overlap, or name one file by two hard links, are counted once. All of it is best
effort: the kernel may drop a page the moment after it was counted. What keeps pages is
``modelcache.pagecache.holder``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from modelcache.pagecache import linux_pages
from modelcache.ports import IsCancelled, OnProgress
from modelcache.types import PIECE_BYTES, CacheError, Cancelled, FileRange, Progress, Residency

RUN_BYTES = 1024 * 1024 * 1024
"""Bytes that one thread reads in a row. The kernel's read-ahead begins anew with each run, first
with single pages: short runs cost twice the time of the processor, then and whenever the pages are
counted or mapped."""

STREAMS = 2
"""Threads that read when no other reader must be considered. One nearly fills a local disk; a
remote one, where each read waits, wants a second."""

YIELD_STEP_S = 0.02
YIELD_MOST_S = 1.0
"""Longest pause before a chunk for other readers' sake: even then some 8 MiB/s go on."""

RATE_WINDOW_S = 3.0
FALLBACK_BYTES = 1024 * 1024
Counter = Callable[[int, int, int], int | None]
"""Pages cached of an open file, from a byte on, of so many bytes; ``None`` where it cannot tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSpan:
    """Merged, sorted, non-empty ranges of one file that exist; ``bytes_missing`` lie past its
    end."""

    path: str
    ranges: tuple[tuple[int, int], ...]
    bytes_missing: int = 0

    @property
    def size_bytes(self) -> int:
        """Bytes in its ranges."""
        return sum(end - start for start, end in self.ranges)


@contextlib.contextmanager
def opened(path: str) -> Iterator[int]:
    """A file open for reading, as its descriptor. Raises ``CacheError`` where it cannot be."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CacheError(f"cannot look at {path}: {error.strerror}") from error
    try:
        yield fd
    finally:
        os.close(fd)


def merge(files: Sequence[FileRange]) -> list[FileSpan]:
    """One span per file, in the order of first mention. Raises ``CacheError`` for a file that is
    not there, ``ValueError`` for a range that begins before the file or after its own end."""
    wanted: dict[tuple[int, int], tuple[str, int, list[tuple[int, int]]]] = {}
    missing: dict[tuple[int, int], int] = {}
    for file in files:
        try:
            found = os.stat(file.path)
        except OSError as error:
            raise CacheError(f"cannot look at {file.path}: {error.strerror}") from error
        size = found.st_size
        end = size if file.end is None else file.end
        if file.start < 0 or end < min(file.start, size):
            raise ValueError(f"{file.path}: bytes {file.start} to {end} are not a range")
        key = (found.st_dev, found.st_ino)
        _, _, ranges = wanted.setdefault(key, (file.path, size, []))
        ranges.append((min(file.start, size), min(end, size)))
        beyond = max(0, end - max(size, file.start))
        missing[key] = max(missing.get(key, 0), beyond)
    return [
        FileSpan(path=path, ranges=tuple(_merged(ranges)), bytes_missing=missing[key])
        for key, (path, _, ranges) in wanted.items()
    ]


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > start:
            merged.append((start, end))
    return [(start, end) for start, end in merged if end > start]


def residency(
    files: Sequence[FileRange], *, counters: Sequence[Counter] = linux_pages.COUNTERS
) -> Residency:
    """How much of ``files`` is cached, to the page; under a millisecond for gigabytes.

    ``counters`` are tried in order. One file that none can tell of makes the whole unknown.
    Raises ``CacheError`` where a file cannot be opened.
    """
    spans = merge(files)
    total = sum(span.size_bytes for span in spans)
    cached = 0
    used: dict[str, None] = {}
    for span in spans:
        with opened(span.path) as fd:
            for start, end in span.ranges:
                found, how = count(fd, start, end, counters)
                if found is None:
                    return Residency(bytes_total=total, bytes_cached=None)
                cached += found
                used[how] = None
    return Residency(bytes_total=total, bytes_cached=cached, how=", ".join(used))


def drop(files: Sequence[FileRange]) -> Residency:
    """Let the kernel forget ``files``, and say what is left of them in the page cache.

    What is not yet on disk is written first. Pages that are mapped stay, and so do the
    ones at an edge of a range that the kernel handles together with some beyond it (up to 2 MiB).
    """
    for span in merge(files):
        with opened(span.path) as fd:
            os.fsync(fd)
            for start, end in span.ranges:
                os.posix_fadvise(fd, start, end - start, os.POSIX_FADV_DONTNEED)
    return residency(files)


SendFile = Callable[[int, int, int, int], int]
"""``os.sendfile``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrewarmReport:
    """What prewarming did. ``bytes_skipped`` were cached already; ``bytes_missing`` lie past the
    end of files that are shorter than was asked, or became so; ``yielded_s`` is time stood back for
    others, ``cpu_s`` the threads' processor time, and ``after`` what is cached now.
    """

    bytes_total: int
    bytes_read: int
    bytes_skipped: int
    bytes_missing: int
    elapsed_s: float
    yielded_s: float
    cpu_s: float
    after: Residency


def prewarm(
    files: Sequence[FileRange],
    *,
    cancelled: IsCancelled = lambda: False,
    on_progress: OnProgress | None = None,
    yield_to: Callable[[], bool] | None = None,
    streams: int = STREAMS,
    yield_most_s: float = YIELD_MOST_S,
    sendfile: SendFile = os.sendfile,
) -> PrewarmReport:
    """Read what is not cached of ``files`` into the page cache, at 0.03 CPU-s/GB or so.

    The bytes go from the file to nowhere inside the kernel (``sendfile`` to ``/dev/null``), past
    no buffer of ours. With ``yield_to`` it is background work: one thread of idle I/O priority
    that stands back while ``yield_to()`` is true, at most ``yield_most_s`` for each chunk. Returns
    when all is read. ``on_progress`` is called from the reading threads, one at a time. Raises
    ``Cancelled`` soon after ``cancelled()`` turns true, ``CacheError`` where a file is not there or
    cannot be read; what was read stays.
    """
    began_s = time.monotonic()
    spans = merge(files)
    runs, skipped = _plan(spans)
    work = _Work(spans, runs, skipped, cancelled, on_progress, yield_to, yield_most_s, sendfile)
    number = max(1, min(streams if yield_to is None else 1, len(runs)))
    threads = [
        threading.Thread(target=work.run, name=f"prewarm-{index}", daemon=True)
        for index in range(1, number)
    ]
    for thread in threads:
        thread.start()
    work.run()
    for thread in threads:
        thread.join()
    if work.error is not None:
        raise work.error
    return PrewarmReport(
        bytes_total=work.bytes_total,
        bytes_read=work.bytes_read,
        bytes_skipped=skipped,
        bytes_missing=sum(span.bytes_missing for span in spans) + work.bytes_missing,
        elapsed_s=time.monotonic() - began_s,
        yielded_s=work.yielded_s,
        cpu_s=work.cpu_s,
        after=residency(files),
    )


def _plan(spans: Sequence[FileSpan]) -> tuple[deque[tuple[str, int, int]], int]:
    """What is to be read as runs of ``(path, start, end)``, and the bytes that need not be."""
    runs: deque[tuple[str, int, int]] = deque()
    skipped = 0
    for span in spans:
        with opened(span.path) as fd:
            for start, end in span.ranges:
                skipped += end - start
                for begin, until in missing_ranges(fd, start, end):
                    skipped -= until - begin
                    for at in range(begin, until, RUN_BYTES):
                        runs.append((span.path, at, min(until, at + RUN_BYTES)))
    return runs, skipped


class _Work:
    """Runs that several threads read, and what they have read so far."""

    def __init__(
        self,
        spans: Sequence[FileSpan],
        runs: deque[tuple[str, int, int]],
        skipped: int,
        cancelled: IsCancelled,
        on_progress: OnProgress | None,
        yield_to: Callable[[], bool] | None,
        yield_most_s: float,
        sendfile: SendFile,
    ) -> None:
        self.bytes_total = sum(span.size_bytes for span in spans)
        self.bytes_read = 0
        self.bytes_missing = 0
        self.yielded_s = 0.0
        self.cpu_s = 0.0
        self.error: Exception | None = None
        self._skipped = skipped
        self._runs = runs
        self._cancelled = cancelled
        self._on_progress = on_progress
        self._yield_to = yield_to
        self._yield_most_s = yield_most_s
        self._sendfile = sendfile
        self._lock = threading.Lock()
        self._seen: deque[tuple[float, int]] = deque([(time.monotonic(), 0)])

    def run(self) -> None:
        """Read runs until there are none; an error ends all threads."""
        before_s = time.thread_time()
        try:
            with linux_pages.idle_io() if self._yield_to else contextlib.nullcontext():
                nowhere = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
                try:
                    while self.error is None and self._runs:
                        self._read_run(nowhere)
                finally:
                    os.close(nowhere)
        except Exception as error:  # noqa: BLE001 (raised again where the threads are joined)
            self.error = error
        with self._lock:
            self.cpu_s += time.thread_time() - before_s

    def _read_run(self, nowhere: int) -> None:
        try:
            path, at, end = self._runs.popleft()
        except IndexError:
            return
        with opened(path) as fd:
            os.posix_fadvise(fd, at, end - at, os.POSIX_FADV_SEQUENTIAL)
            while at < end and self.error is None:
                self._stand_back()
                try:
                    moved = pull(nowhere, fd, at, min(PIECE_BYTES, end - at), self._sendfile)
                except OSError as error:
                    raise CacheError(
                        f"cannot read {path} at byte {at}: {error.strerror}"
                    ) from error
                if not moved:
                    with self._lock:
                        self.bytes_missing += end - at
                    return
                at += moved
                self._report(moved)

    def _stand_back(self) -> None:
        waited_s = 0.0
        while True:
            if self._cancelled():
                raise Cancelled("prewarming was cancelled")
            if self._yield_to is None or waited_s >= self._yield_most_s or not self._yield_to():
                break
            time.sleep(YIELD_STEP_S)
            waited_s += YIELD_STEP_S
        with self._lock:
            self.yielded_s += waited_s

    def _report(self, moved: int) -> None:
        with self._lock:
            self.bytes_read += moved
            now_s = time.monotonic()
            self._seen.append((now_s, self.bytes_read))
            while len(self._seen) > 2 and now_s - self._seen[1][0] > RATE_WINDOW_S:
                self._seen.popleft()
            since_s, since_bytes = self._seen[0]
            if self._on_progress is not None:
                rate = (self.bytes_read - since_bytes) / max(now_s - since_s, 1e-9)
                done = self._skipped + self.bytes_read
                self._on_progress(
                    Progress(
                        phase="paging",
                        bytes_done=done,
                        bytes_total=self.bytes_total,
                        rate_bytes_s=rate,
                    )
                )


def pull(nowhere: int, fd: int, at: int, length: int, sendfile: SendFile = os.sendfile) -> int:
    """Have the kernel read some of a range into the page cache; bytes read, 0 at the file's end.

    ``nowhere`` is an open ``/dev/null``. Raises ``OSError``.
    """
    try:
        return sendfile(nowhere, fd, at, length)
    except OSError as error:
        # Some file systems cannot splice.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        return len(os.pread(fd, min(length, FALLBACK_BYTES), at))


def count(fd: int, start: int, end: int, counters: Sequence[Counter]) -> tuple[int | None, str]:
    """Bytes cached of an open file's range, and by which call that is known."""
    from_page = start - start % linux_pages.PAGE_BYTES
    for counter in counters:
        found = counter(fd, from_page, end - from_page)
        if found is not None:
            # The pages at the edges may reach beyond the range: what is absent is taken from it.
            absent_bytes = (linux_pages.pages(end - from_page) - found) * linux_pages.PAGE_BYTES
            how = getattr(counter, "__name__", "").removeprefix("count_by_")
            return max(0, end - start - absent_bytes), how
    return None, ""


def missing_ranges(
    fd: int, start: int, end: int, counters: Sequence[Counter] = linux_pages.COUNTERS
) -> list[tuple[int, int]]:
    """The parts of an open file's range that are not all cached, to the piece; all of it where
    nothing can tell."""
    found: list[tuple[int, int]] = []
    at = start
    while at < end:
        until = min(end, at - at % PIECE_BYTES + PIECE_BYTES)
        cached, _ = count(fd, at, until, counters)
        if cached is None:
            return [(start, end)]
        if cached < until - at:
            found.append((at, until))
        at = until
    return _merged(found)
