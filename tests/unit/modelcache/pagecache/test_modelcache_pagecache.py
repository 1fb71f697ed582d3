"""Real files on the disk, with what is cached of them checked by ``mincore`` here, not by what is
tested."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from modelcache.pagecache import linux_pages, residency
from modelcache.types import CacheError, Cancelled, FileRange, Progress

PAGE = mmap.PAGESIZE
MIB = 1024 * 1024
PIECE = 8 * MIB


def pages_cached(path: Path) -> list[bool]:
    """Page by page, by an own call of mincore."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    size = path.stat().st_size
    with path.open("r+b") as file, mmap.mmap(file.fileno(), size) as mapped:
        states = ctypes.create_string_buffer(-(-size // PAGE))
        view = ctypes.c_char.from_buffer(mapped)
        assert libc.mincore(ctypes.addressof(view), size, states) == 0
        del view
        return [bool(state & 1) for state in states.raw]


def make(path: Path, size_bytes: int) -> Path:
    """A file that is on the disk, and of which nothing is cached."""
    with path.open("wb") as file:
        file.write(os.urandom(size_bytes))
        file.flush()
        os.fsync(file.fileno())
    make_cold(path)
    return path


def make_cold(path: Path) -> None:
    """Until it is: the kernel spares pages that something is being done with at the moment."""
    for _ in range(1_000):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if not any(pages_cached(path)):
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} stays in the page cache")


def read(path: Path, start: int, length: int) -> None:
    """Read just these pages, with no read-ahead."""
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(file.fileno(), length, start)) == length


def whole(path: Path, start: int = 0, end: int | None = None) -> FileRange:
    return FileRange(path=str(path), start=start, end=end)


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder on a disk: of a file in a tmpfs nothing can be made cold."""
    with tempfile.TemporaryDirectory(prefix="tidegate-pages-", dir="/var/tmp") as folder:
        yield Path(folder)


COUNTERS = {"cachestat": linux_pages.count_by_cachestat, "mincore": linux_pages.count_by_mincore}


@pytest.mark.parametrize("how", COUNTERS)
def test_counts_what_is_cached_to_the_page(disk: Path, how: str) -> None:
    path = make(disk / "file", 3 * MIB + 100)
    counters = (COUNTERS[how],)
    assert residency.residency([whole(path)], counters=counters).bytes_cached == 0
    read(path, 0, 2 * PAGE)
    read(path, 300 * PAGE, PAGE)
    found = residency.residency([whole(path)], counters=counters)
    assert found.bytes_total == 3 * MIB + 100
    assert found.bytes_cached is not None
    missing = pages_cached(path).count(False)
    assert found.bytes_cached == max(0, 3 * MIB + 100 - missing * PAGE) > 0
    assert found.how == how
    read(path, 0, 3 * MIB + 100)
    assert residency.residency([whole(path)], counters=counters).bytes_cached == 3 * MIB + 100


def test_ranges_that_overlap_and_second_names_count_once(disk: Path) -> None:
    path = make(disk / "file", 2 * MIB)
    os.link(path, disk / "again")
    read(path, 0, MIB)
    files = [
        whole(path, 0, MIB),
        whole(path, MIB // 2, 3 * MIB // 2),
        whole(disk / "again", 0, 10),
    ]
    found = residency.residency(files)
    assert (found.bytes_total, found.bytes_cached) == (3 * MIB // 2, MIB)
    assert residency.residency([]).bytes_cached == 0
    assert residency.residency([whole(path, 5 * MIB, 6 * MIB)]).bytes_total == 0


def test_a_range_inside_pages_counts_its_own_bytes(disk: Path) -> None:
    path = make(disk / "file", MIB)
    assert residency.residency([whole(path, 100, 200)]).bytes_cached == 0
    read(path, 0, 10)
    assert residency.residency([whole(path, 100, 200)]).bytes_cached == 100
    assert residency.residency([whole(path, PAGE - 10, PAGE + 10)]).bytes_cached == 0


@pytest.mark.parametrize("name", ["empty", "small"])
def test_small_files(disk: Path, name: str) -> None:
    path = disk / name
    path.write_bytes(b"" if name == "empty" else b"x")
    size = path.stat().st_size
    assert residency.prewarm([whole(path)]).bytes_total == size
    assert residency.residency([whole(path)]).bytes_cached == size


def test_falls_back_from_a_kernel_without_cachestat(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux_pages, "_CACHESTAT", 100_000)
    path = make(disk / "file", MIB)
    read(path, 0, PAGE)
    found = residency.residency([whole(path)])
    assert (found.bytes_cached, found.how) == (PAGE, "mincore")


def test_is_unknown_where_neither_call_can_tell(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of somebody else's file mincore calls every page cached, so it must not be believed."""
    monkeypatch.setattr(linux_pages, "_CACHESTAT", 100_000)
    path = make(disk / "file", MIB)
    path.chmod(0o444)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "getegid", lambda: path.stat().st_gid + 1)
    monkeypatch.setattr(os, "getgroups", list)
    found = residency.residency([whole(path)])
    assert (found.bytes_total, found.bytes_cached) == (MIB, None)
    assert residency.prewarm([whole(path)]).bytes_read == MIB
    assert all(pages_cached(path))


def test_huge_sparse_files_take_no_time_and_no_memory(disk: Path) -> None:
    path = disk / "huge"
    path.touch()
    os.truncate(path, 2 << 40)
    at = (1 << 40) + 5 * PAGE
    read(path, at, 3 * PAGE)
    found = residency.residency([whole(path)])
    assert (found.bytes_total, found.bytes_cached) == (2 << 40, 3 * PAGE)
    report = residency.prewarm([whole(path, at, at + 4 * PAGE)])
    assert (report.bytes_total, report.bytes_skipped) == (4 * PAGE, 0)
    assert report.after.bytes_cached == 4 * PAGE
    with path.open("rb") as file:
        assert linux_pages.count_by_mincore(file.fileno(), at, 4 * PAGE) == 4


def test_what_is_missing_is_told_to_the_piece_and_in_one_run(disk: Path) -> None:
    path = make(disk / "file", 5 * PIECE + 100)
    read(path, PIECE, 2 * PIECE)
    read(path, 4 * PIECE, PAGE)
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        found = residency.missing_ranges(file.fileno(), 0, size_bytes)
    assert found == [(0, PIECE), (3 * PIECE, size_bytes)]


def test_prewarm_brings_in_everything_and_skips_what_is_there(disk: Path) -> None:
    one, two = make(disk / "one", 3 * PIECE), make(disk / "two", PIECE + 12_345)
    read(one, 0, PIECE)
    seen: list[Progress] = []
    report = residency.prewarm([whole(one), whole(two)], on_progress=seen.append)
    assert all(pages_cached(one))
    assert all(pages_cached(two))
    total = 4 * PIECE + 12_345
    assert (report.bytes_total, report.bytes_skipped) == (total, PIECE)
    assert report.bytes_read == total - PIECE
    assert report.bytes_missing == 0
    assert report.after.bytes_cached == total
    done = [progress.bytes_done for progress in seen]
    assert done == sorted(done)
    assert (seen[-1].bytes_done, seen[-1].bytes_total, seen[-1].phase) == (total, total, "paging")
    again = residency.prewarm([whole(one), whole(two)])
    assert (again.bytes_read, again.bytes_skipped) == (0, total)


def test_prewarm_reads_only_the_ranges_asked_for(disk: Path) -> None:
    path = make(disk / "file", 64 * MIB)
    report = residency.prewarm([whole(path, 10 * PAGE, 20 * PAGE)])
    assert report.bytes_read == 10 * PAGE
    assert all(pages_cached(path)[10:20])
    # The kernel reads ahead, but not to the end of the file.
    assert not pages_cached(path)[-1]


def test_prewarm_without_splice_reads(disk: Path) -> None:
    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    path = make(disk / "file", 3 * MIB + 1)
    assert residency.prewarm([whole(path)], sendfile=refuse).bytes_read == 3 * MIB + 1
    assert all(pages_cached(path))


def test_a_file_cut_short_is_reported_and_ends_the_reading(disk: Path) -> None:
    path = make(disk / "file", 4 * PIECE)
    calls = 0

    def cut(out: int, fd: int, at: int, length: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 2:
            os.truncate(path, PIECE)
        return os.sendfile(out, fd, at, length)

    report = residency.prewarm([whole(path)], streams=1, sendfile=cut)
    assert (report.bytes_read, report.bytes_missing) == (PIECE, 3 * PIECE)
    assert report.after.bytes_total == PIECE
    assert residency.prewarm([whole(path, 0, 2 * PIECE)]).bytes_missing == PIECE


def test_prewarm_stops_when_called_off_and_keeps_what_it_read(disk: Path) -> None:
    path = make(disk / "file", 6 * PIECE)
    seen: list[Progress] = []
    with pytest.raises(Cancelled):
        residency.prewarm(
            [whole(path)], cancelled=lambda: len(seen) >= 2, on_progress=seen.append, streams=1
        )
    assert pages_cached(path)[0]
    assert not all(pages_cached(path))


def test_prewarm_stands_back_but_not_for_ever(disk: Path) -> None:
    path = make(disk / "file", 2 * PIECE)
    asked: list[int] = []
    seen: list[Progress] = []

    def busy() -> bool:
        asked.append(len(seen))
        return True

    report = residency.prewarm(
        [whole(path)], yield_to=busy, on_progress=seen.append, yield_most_s=0.06
    )
    assert report.bytes_read == 2 * PIECE
    assert report.yielded_s == pytest.approx(0.12)
    assert asked.count(0) > 1
    assert asked.count(1) > 1, "it looks again before each chunk"
    free = residency.prewarm([whole(make(disk / "b", PIECE))], yield_to=lambda: False)
    assert free.yielded_s == 0


def test_background_reading_has_idle_priority_and_gives_it_back(disk: Path) -> None:
    script = """
import ctypes, sys
from modelcache.pagecache import linux_pages as kernel, residency as pagecache
from modelcache.types import FileRange
libc = ctypes.CDLL(None)
get = kernel._IOPRIO[__import__("platform").machine()][1]
priority = lambda: libc.syscall(get, 1, 0) >> 13
seen = []
pagecache.prewarm([FileRange(path=sys.argv[1])], yield_to=lambda: bool(seen.append(priority())))
print(seen[0], priority())
"""
    path = make(disk / "file", MIB)
    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.split() == ["3", "0"], ran.stderr


def test_drop_lets_go_of_written_pages_and_spares_the_rest(disk: Path) -> None:
    path = disk / "file"
    path.write_bytes(os.urandom(4 * PIECE))  # dirty
    left = residency.drop([whole(path, PIECE, 3 * PIECE)])
    assert (left.bytes_total, left.bytes_cached) == (2 * PIECE, 0)
    states = pages_cached(path)
    assert states.count(True) == 2 * PIECE // PAGE
    assert not any(states[PIECE // PAGE : 3 * PIECE // PAGE])
    assert residency.drop([whole(path)]).bytes_cached == 0
    assert not any(pages_cached(path))


def test_a_missing_file_is_an_error_that_names_it(disk: Path) -> None:
    for call in (residency.residency, residency.prewarm, residency.drop):
        with pytest.raises(CacheError, match=r"no-such.*No such file"):
            call([whole(disk / "no-such")])
    with pytest.raises(ValueError, match="bytes 10 to 5"):
        residency.residency([whole(make(disk / "file", 100), 10, 5)])


def test_a_read_error_is_an_error_that_names_the_place(disk: Path) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    path = make(disk / "file", MIB)
    with pytest.raises(CacheError, match="file at byte 0: Input/output error"):
        residency.prewarm([whole(path)], sendfile=fail)


def test_pages_under_an_overlay_are_counted(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Containers' files: cachestat looks at the upper inode, which has no pages, and says zero."""
    path = make(disk / "file", MIB)
    read(path, 0, PAGE)
    monkeypatch.setattr(linux_pages, "file_system", lambda fd: 0x794C7630)
    found = residency.residency([whole(path)])
    assert (found.bytes_cached, found.how) == (PAGE, "mincore")


def test_populate_of_a_file_cut_short_is_an_error_not_a_signal(disk: Path) -> None:
    path = make(disk / "file", 4 * MIB)
    fd = os.open(path, os.O_RDONLY)
    with linux_pages.Mapping(fd, 0, 4 * MIB) as mapping:
        os.close(fd)
        assert mapping.populate(0, 4 * MIB)
        assert all(pages_cached(path))
        os.truncate(path, MIB)
        with pytest.raises(OSError, match="Bad address"):
            mapping.populate(0, 4 * MIB)
