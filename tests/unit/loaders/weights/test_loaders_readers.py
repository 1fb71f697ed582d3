"""Readers: through the page cache or past it, the same bytes, and what is off is said."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors_files import sums_of

from loaders.weights.files import OpenFile, find_files, opened
from loaders.weights.plan import ALIGN_BYTES, Read, Segment
from loaders.weights.readers import CountCached, How, ReadAt, ReadBuffer, Tally, WeightReader
from loaders.weights.staging_buffers import Stretch
from modelcache.safetensors_index import BadFile

SIZE = 3 * 1024 * 1024 + 777
DATA = random.Random(5).randbytes(SIZE)
CUT = 1_234_567


@pytest.fixture
def file(tmp_path: Path) -> Iterator[OpenFile]:
    (tmp_path / "x").write_bytes(DATA)
    with opened(find_files(tmp_path / "x"), lambda _: sums_of(DATA)) as files:
        yield files[0]


def fill(
    file: OpenFile,
    how: How,
    cached: int | None = None,
    *,
    end: int = SIZE,
    read_at: ReadAt = os.preadv,
) -> tuple[bytes, Tally]:
    """Read the file into two places that meet in the middle of a page."""
    counts: CountCached = lambda fd, start, size: cached  # noqa: E731
    reader = WeightReader(
        how=how, count_cached=counts, turns=threading.Semaphore(1), read_at=read_at
    )
    segments = (Segment(batch=0, start=0, end=CUT), Segment(batch=1, start=CUT, end=end))
    starts = [s.start - s.start % ALIGN_BYTES for s in segments]
    stretches = [Stretch(SIZE + ALIGN_BYTES) for _ in segments]
    places = [ReadBuffer(m.view, start) for m, start in zip(stretches, starts, strict=True)]
    tally = Tally()
    reader.fill(file, Read(file=0, piece=0, segments=segments), places, tally)
    parts = [
        bytes(p.view[s.start - p.start : s.end - p.start])
        for s, p in zip(segments, places, strict=True)
    ]
    return b"".join(parts), tally


@pytest.mark.parametrize("how", ["cached", "direct"])
def test_the_bytes_are_the_file_s(file: OpenFile, how: How) -> None:
    data, tally = fill(file, how)
    assert data == DATA
    assert (tally.cached_bytes, tally.direct_bytes) == ((SIZE, 0) if how == "cached" else (0, SIZE))
    assert tally.verified_bytes == SIZE


@pytest.mark.parametrize(
    ("cached", "direct"),
    [(None, False), (0, True), (SIZE // 4096 // 3, True), (SIZE // 4096 // 3 * 2, False)],
)
def test_what_is_mostly_not_cached_is_read_past_the_cache(
    file: OpenFile, cached: int | None, direct: bool
) -> None:
    data, tally = fill(file, "auto", cached)
    assert data == DATA
    assert tally.direct_bytes == (SIZE if direct else 0)


def test_where_reading_past_the_cache_cannot_be_it_is_not_done(file: OpenFile) -> None:
    direct = file.direct()

    def refuse(fd: int, buffers: list[memoryview], offset: int) -> int:
        if fd == direct:
            raise OSError(errno.EINVAL, "no")
        return os.preadv(fd, buffers, offset)

    data, tally = fill(file, "direct", read_at=refuse)
    assert data == DATA
    assert (tally.cached_bytes, tally.verified_bytes) == (SIZE, SIZE)
    file.close()
    file.fd = os.open(file.path, os.O_RDONLY)
    assert file.direct() is None
    assert fill(file, "direct")[0] == DATA


@pytest.mark.parametrize("how", ["cached", "direct"])
def test_short_reads_are_carried_on(file: OpenFile, how: How) -> None:
    def short(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(fd, [buffers[0][: 5 * ALIGN_BYTES]], offset)

    assert fill(file, how, read_at=short)[0] == DATA


@pytest.mark.parametrize("how", ["cached", "direct"])
def test_an_end_that_comes_too_soon_is_an_error(file: OpenFile, how: How) -> None:
    os.truncate(file.path, SIZE - 5)
    with pytest.raises(BadFile, match=r"/x: cut short"):
        fill(file, how)


def test_a_disk_that_cannot_read_is_an_error_that_says_so(file: OpenFile) -> None:
    def fail(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(BadFile, match=r"/x: cannot be read: Input/output error"):
        fill(file, "auto", read_at=fail)


@pytest.mark.parametrize("how", ["cached", "direct"])
def test_wrong_bytes_are_an_error_that_names_the_piece(file: OpenFile, how: How) -> None:
    with file.path.open("r+b") as changed:
        changed.seek(CUT)
        changed.write(bytes([DATA[CUT] ^ 4]))
    with pytest.raises(BadFile, match="damaged: bytes 0 to") as caught:
        fill(file, how)
    assert caught.value.piece == 0
