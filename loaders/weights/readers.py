"""Reading a stretch of a file into memory, through the page cache or past it, checked on the way.

What is in the page cache is copied out of it; what is not is read past it (``O_DIRECT``), which
costs a tenth of the CPU and leaves the cache to others. Which it is to be is asked of the kernel
for every read, because it differs within a file and changes while it is loaded. Bytes are hashed
while they are still in the processor's caches.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import xxhash

from loaders.weights.files import OpenFile
from loaders.weights.plan import ALIGN_BYTES, Read
from modelcache.safetensors_index import BadFile

STEP_BYTES = 1024 * 1024
"""What is copied out of the page cache and hashed at a time: half a core's L2 cache or so. Smaller
costs calls, larger costs the caches."""
NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTTY})
"""How file systems say that they cannot read past the cache (this file, this way)."""

How = Literal["auto", "cached", "direct"]
"""``auto``: past the page cache what is mostly not in it. ``cached``: everything through the cache,
which leaves it there for the next start. ``direct``: everything past it, where that is possible."""

CountCached = Callable[[int, int, int], int | None]
"""Pages cached of an open file, from a byte on, of so many bytes; ``None``: cannot tell."""


ReadAt = Callable[[int, list[memoryview], int], int]
"""``os.preadv``: from an open file into memory, from a byte on; how many bytes came."""


@dataclass(frozen=True, slots=True)
class ReadBuffer:
    """Memory for a part of a file: ``view[0]`` is for byte ``start``, a multiple of
    ``ALIGN_BYTES``, and the view reaches to the next such multiple behind the part."""

    view: memoryview
    start: int


@dataclass(slots=True, kw_only=True)
class Tally:
    """The bytes that one thread has read out of the page cache, past it, and checked. It counts for
    itself, so that none waits for another to count."""

    cached_bytes: int = 0
    direct_bytes: int = 0
    verified_bytes: int = 0


@dataclass(slots=True, kw_only=True)
class WeightReader:
    """Reads for all threads. ``turns`` is how many may copy from the page cache at once: that is
    work for a core, and more than there are cores only get in each other's way."""

    how: How
    count_cached: CountCached
    turns: threading.Semaphore
    read_at: ReadAt = os.preadv
    _page_bytes: int = field(default_factory=lambda: os.sysconf("SC_PAGE_SIZE"))

    def fill(self, file: OpenFile, read: Read, places: Sequence[ReadBuffer], tally: Tally) -> None:
        """Read what ``read`` says, a place for each of its segments, and check its piece.

        Raises ``BadFile`` where the bytes are not there or not what they were.
        """
        hasher = xxhash.xxh3_64() if read.piece is not None and file.sums else None
        fd = self._choose(file, read)
        with self.errors_of(file):
            if fd is None or not self._fill_direct(fd, read, places, hasher, tally):
                with self.turns:
                    for segment, place in zip(read.segments, places, strict=True):
                        self._fill_cached(file.fd, segment.start, segment.end, place, hasher, tally)
            if hasher is not None and file.sums is not None and read.piece is not None:
                file.sums.check(read.piece, hasher.intdigest())

    def copy_cached(
        self,
        file: OpenFile,
        start: int,
        end: int,
        place: ReadBuffer,
        hasher: xxhash.xxh3_64 | None = None,
    ) -> None:
        """Copy bytes ``start`` to ``end`` out of the page cache, hashed on the way. ``place`` need
        not be aligned. Raises ``BadFile`` where they are not there."""
        with self.errors_of(file):
            self._fill_cached(file.fd, start, end, place, hasher, Tally())

    @contextmanager
    def errors_of(self, file: OpenFile) -> Iterator[None]:
        """What goes wrong with ``file`` is a ``BadFile`` that names it."""
        try:
            yield
        except BadFile as error:
            raise BadFile(error.message, path=str(file.path), piece=error.piece) from None
        except OSError as error:
            reason = error.strerror or str(error)
            raise BadFile(f"cannot be read: {reason}", path=str(file.path)) from error

    def is_cached(self, file: OpenFile, read: Read) -> bool | None:
        """Whether it is to be copied out of the page cache; ``None`` where the kernel cannot tell.
        A question, no read."""
        if self.how != "auto":
            return self.how == "cached"
        pages = self.count_cached(file.fd, read.start, read.end - read.start)
        return None if pages is None else 2 * pages * self._page_bytes >= read.end - read.start

    def _choose(self, file: OpenFile, read: Read) -> int | None:
        """The descriptor to read with past the cache, or ``None``."""
        return file.direct() if self.is_cached(file, read) is False else None

    def _fill_direct(
        self,
        fd: int,
        read: Read,
        places: Sequence[ReadBuffer],
        hasher: xxhash.xxh3_64 | None,
        tally: Tally,
    ) -> bool:
        """Whether it could be done; where not, nothing has been hashed yet."""
        for index, (segment, place) in enumerate(zip(read.segments, places, strict=True)):
            begin = segment.start - segment.start % ALIGN_BYTES
            try:
                self._read_aligned(fd, begin, segment.end, place)
            except OSError as error:
                if index == 0 and error.errno in NO_DIRECT:
                    return False
                raise
            tally.direct_bytes += segment.end - segment.start
            if hasher is not None:
                view = place.view[segment.start - place.start : segment.end - place.start]
                for at in range(0, len(view), STEP_BYTES):
                    hasher.update(view[at : at + STEP_BYTES])
                tally.verified_bytes += len(view)
        return True

    def _read_aligned(self, fd: int, begin: int, end: int, place: ReadBuffer) -> None:
        """Read from ``begin``, which is aligned, at least to ``end``, in whole blocks."""
        until = -(-end // ALIGN_BYTES) * ALIGN_BYTES
        at = begin
        while at < end:
            got = self.read_at(fd, [place.view[at - place.start : until - place.start]], at)
            if got == 0 or (got % ALIGN_BYTES and at + got < end):
                raise BadFile(f"cut short while it was read: it ends at byte {at + got}")
            at += got

    def _fill_cached(
        self,
        fd: int,
        start: int,
        end: int,
        place: ReadBuffer,
        hasher: xxhash.xxh3_64 | None,
        tally: Tally,
    ) -> None:
        at = start
        while at < end:
            view = place.view[at - place.start : min(at + STEP_BYTES, end) - place.start]
            got = self.read_at(fd, [view], at)
            if got == 0:
                raise BadFile(f"cut short while it was read: it ends at byte {at}")
            at += got
            tally.cached_bytes += got
            if hasher is not None:
                hasher.update(view[:got])
                tally.verified_bytes += got
