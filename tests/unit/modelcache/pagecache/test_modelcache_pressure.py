"""Whether others read from a disk: told from its counter and ours."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelcache.pagecache.pressure import BUSY_BYTES, LOOK_S, WINDOW_S, ForegroundReads

MIB = 1024 * 1024


class Disk:
    """Counters in a folder that looks like ``/``, and a clock."""

    def __init__(self, root: Path, file: Path) -> None:
        device = os.stat(file).st_dev
        self.root = root
        self.stat = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"
        self.own = root / "proc/self/io"
        self.now_s = 100.0
        for path in (self.stat, self.own):
            path.parent.mkdir(parents=True)
        self.read_bytes = self.own_bytes = 0
        self.read(7 * MIB, own=False)

    def read(self, size: int, *, own: bool, done: bool = True) -> None:
        self.own_bytes += size if own else 0
        self.read_bytes += size if done else 0
        self.stat.write_text(f"  9 0 {self.read_bytes // 512} 1 2 3 4\n")
        self.own.write_text(f"rchar: 5\nread_bytes: {self.own_bytes}\nwrite_bytes: 3\n")
        self.now_s += 2 * LOOK_S

    def clock(self) -> float:
        return self.now_s


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    return Disk(tmp_path / "root", tmp_path)


def test_others_reads_make_it_busy_for_a_while(tmp_path: Path, disk: Disk) -> None:
    busy = ForegroundReads([str(tmp_path)], root=disk.root, clock=disk.clock)
    assert not busy()
    disk.read(BUSY_BYTES, own=False)
    assert busy()
    disk.now_s += WINDOW_S / 2
    assert busy()
    disk.now_s += WINDOW_S
    assert not busy()
    disk.read(BUSY_BYTES - 512, own=False)
    assert not busy()
    disk.read(512, own=False)
    assert busy(), "small reads add up"


def test_our_own_reads_do_not_whenever_they_are_done(tmp_path: Path, disk: Disk) -> None:
    busy = ForegroundReads([str(tmp_path)], root=disk.root, clock=disk.clock)
    for _ in range(3):
        disk.read(64 * MIB, own=True, done=False)  # asked for
        assert not busy()
        disk.read_bytes += 64 * MIB  # done
        disk.read(0, own=False)
        assert not busy()
    disk.read(64 * MIB, own=True, done=False)
    disk.read_bytes += 64 * MIB
    disk.read(BUSY_BYTES, own=False)
    assert busy()


def test_looks_no_more_often_than_it_must(tmp_path: Path, disk: Disk) -> None:
    busy = ForegroundReads([str(tmp_path)], root=disk.root, clock=disk.clock)
    disk.read(2 * BUSY_BYTES, own=False)
    disk.now_s -= 1.5 * LOOK_S
    assert not busy()
    disk.now_s += LOOK_S
    assert busy()
    disk.stat.unlink()
    disk.now_s += 2 * LOOK_S
    assert busy(), "what was seen still counts"


@pytest.mark.parametrize("missing", ["stat", "own"])
def test_is_never_busy_where_nothing_is_counted(tmp_path: Path, disk: Disk, missing: str) -> None:
    (disk.stat if missing == "stat" else disk.own).unlink()
    busy = ForegroundReads([str(tmp_path)], root=disk.root, clock=disk.clock)
    assert not busy()
    disk.now_s += 1
    assert not busy()


def test_counters_that_vanish_or_say_nonsense_are_survived(tmp_path: Path, disk: Disk) -> None:
    busy = ForegroundReads([str(tmp_path)], root=disk.root, clock=disk.clock)
    disk.now_s += 1
    disk.stat.write_text("nonsense")
    assert not busy()


def test_works_on_this_machine() -> None:
    busy = ForegroundReads(["/var/tmp"])
    assert busy() in (True, False)
