"""The page holder, with real files and its real process."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from modelcache.pagecache import linux_pages, pressure
from modelcache.pagecache.holder import PageHolder
from modelcache.pagecache.holder_process import HeldPages
from modelcache.pagecache.residency import drop, residency
from modelcache.types import CacheError, FileRange, NoSpace

MIB = 1024 * 1024


@pytest.fixture
def disk() -> Iterator[Path]:
    """A folder on a disk that other users may enter: of a tmpfs nothing can be made cold."""
    with tempfile.TemporaryDirectory(prefix="tidegate-holder-", dir="/var/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def cold(path: Path, size_bytes: int = MIB) -> FileRange:
    path.write_bytes(os.urandom(size_bytes))
    file = FileRange(path=str(path))
    # The kernel spares pages that something is being done with at the moment.
    until(lambda: drop([file]).bytes_cached == 0)
    return file


def until(check: Callable[[], bool], limit_s: float = 60.0) -> None:
    end_s = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < end_s, "it did not come about"
        time.sleep(0.01)


def cached(*files: FileRange) -> int | None:
    return residency(files).bytes_cached


def mapped(pid: int | None) -> str:
    return Path(f"/proc/{pid}/smaps").read_text()


@pytest.fixture
def holder() -> Iterator[PageHolder]:
    holder = PageHolder(budget_bytes=4 * MIB, touch_s=0.05)
    yield holder
    holder.close()


def test_brings_in_what_it_is_to_keep_and_brings_back_what_was_dropped(
    disk: Path, holder: PageHolder
) -> None:
    file = cold(disk / "file")
    holder.keep("m", [file])
    until(lambda: cached(file) == MIB)
    assert holder.status().problems == {}
    # What is cached by a read ahead may not be mapped yet; after a whole round all of it is.
    rounds = holder.status().rounds
    until(lambda: holder.status().rounds > rounds + 1)
    # Mapped pages survive a request to forget them.
    assert drop([file]).bytes_cached == MIB
    rounds = holder.status().rounds
    until(lambda: holder.status().rounds > rounds + 1)
    assert cached(file) == MIB


def test_keeps_only_the_ranges_asked_for(disk: Path, holder: PageHolder) -> None:
    cold(disk / "file", 4 * MIB)
    part = FileRange(path=str(disk / "file"), start=MIB + 5, end=2 * MIB)
    holder.keep("rank0", [part])
    until(lambda: cached(part) == MIB - 5)
    sizes = [
        line for line in mapped(holder.status().pid).splitlines() if line.endswith(f"{disk}/file")
    ]
    assert len(sizes) == 1
    first, last = (int(at, 16) for at in sizes[0].split()[0].split("-"))
    assert last - first == MIB


def test_the_budget_holds_over_all_keys(disk: Path, holder: PageHolder) -> None:
    holder.keep("a", [cold(disk / "a", 3 * MIB)])
    two = cold(disk / "b", 2 * MIB)
    with pytest.raises(NoSpace, match=r"2,097,152 bytes of b .* 3,145,728 of 4,194,304 are taken"):
        holder.keep("b", [two])
    holder.keep("a", [cold(disk / "c", 2 * MIB)])  # in its own place, not beside it
    holder.keep("b", [two])
    with pytest.raises(NoSpace):
        holder.keep("d", [FileRange(path=two.path, end=1)])
    assert holder.drop("a")
    assert not holder.drop("a")
    holder.keep("d", [cold(disk / "d", 2 * MIB)])


def test_what_is_dropped_is_unmapped_and_can_be_let_go(disk: Path, holder: PageHolder) -> None:
    a, b = cold(disk / "a"), cold(disk / "b")
    holder.keep("a", [a])
    holder.keep("b", [b])
    until(lambda: cached(a) == cached(b) == MIB)
    until(lambda: f"{disk}/a" in mapped(holder.status().pid))
    holder.drop("a")
    until(lambda: f"{disk}/a" not in mapped(holder.status().pid))
    until(lambda: drop([a]).bytes_cached == 0)
    assert f"{disk}/b" in mapped(holder.status().pid)


def test_a_file_cut_short_or_replaced_or_gone_ends_nothing(disk: Path, holder: PageHolder) -> None:
    file, other = cold(disk / "file", 2 * MIB), cold(disk / "other")
    holder.keep("m", [file])
    holder.keep("n", [other])
    until(lambda: cached(file) == 2 * MIB)
    pid = holder.status().pid
    os.truncate(file.path, 100)
    rounds = holder.status().rounds
    until(lambda: holder.status().rounds > rounds + 2)
    assert cached(file) == 100

    replacement = cold(disk / "new", MIB)
    os.replace(replacement.path, file.path)
    until(lambda: cached(file) == MIB)

    os.unlink(file.path)
    until(lambda: "No such file" in holder.status().problems.get("m", ""))
    # An unlinked file must not go on taking disk space.
    until(lambda: str(disk / "file") not in mapped(pid))
    assert cached(other) == MIB
    assert (holder.status().pid, holder.status().restarts) == (pid, 0)


def test_a_file_cut_short_while_its_pages_are_marked_is_no_signal(disk: Path) -> None:
    """Between the look at its size and the marking."""
    file = cold(disk / "file", 2 * MIB)
    sizes: list[int] = []
    looks: list[Callable[[], int | None]] = [lambda: None]
    keeping = HeldPages(lock=False, available=lambda: looks[0](), reserve_bytes=0)
    keeping.want({"m": [file]})

    def cut() -> int | None:
        sizes.append(os.stat(file.path).st_size)
        os.truncate(file.path, 100)
        return None

    looks[0] = cut
    list(keeping.round())
    assert sizes == [2 * MIB]
    assert "cut short or replaced" in keeping.problems()["m"]
    looks[0] = lambda: None
    list(keeping.round())
    assert keeping.problems() == {}
    keeping.close()


def test_its_process_is_started_again_and_told_again(disk: Path, holder: PageHolder) -> None:
    holder.keep("m", [cold(disk / "file")])
    until(lambda: holder.status().rounds > 0)
    pid = holder.status().pid
    assert pid is not None
    assert Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"
    os.kill(pid, signal.SIGKILL)
    until(lambda: holder.status().pid not in (None, pid))
    until(lambda: f"{disk}/file" in mapped(holder.status().pid))
    assert holder.status().restarts == 1


def test_its_process_ends_with_whoever_started_it(disk: Path) -> None:
    file = cold(disk / "file")
    script = """
import sys, time
from modelcache.pagecache.holder import PageHolder
from modelcache.types import FileRange
holder = PageHolder(budget_bytes=1 << 30, touch_s=0.05)
holder.keep("m", [FileRange(path=sys.argv[1])])
while not holder.status().rounds:
    time.sleep(0.01)
print(holder.status().pid, flush=True)
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script, file.path], stdout=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()

    def gone() -> bool:
        try:
            return "holder_process" not in Path(f"/proc/{pid}/cmdline").read_text()
        except OSError:
            return True

    until(gone)


def test_close_ends_the_process_and_refuses_more(disk: Path) -> None:
    holder = PageHolder(budget_bytes=MIB, touch_s=60.0)
    holder.keep("m", [cold(disk / "file")])
    until(lambda: holder.status().rounds > 0)
    pid = holder.status().pid
    holder.close()
    holder.close()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(CacheError, match="closed"):
        holder.keep("m", [FileRange(path=str(disk / "file"))])
    PageHolder(budget_bytes=0).close()


def test_refuses_files_that_are_not_there(disk: Path, holder: PageHolder) -> None:
    with pytest.raises(CacheError, match="no-such"):
        holder.keep("m", [FileRange(path=str(disk / "no-such"))])
    assert holder.status().pid is None


LOCKING = """
import json, os, resource, sys
from modelcache.pagecache import linux_pages as kernel
from modelcache.pagecache.holder_process import HeldPages
from modelcache.types import FileRange
kernel._libc()
limit = int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
keeping = HeldPages(lock=True, available=lambda: None, reserve_bytes=0)
keeping.want({"m": [FileRange(path=sys.argv[1])]})
list(keeping.round())
list(keeping.round())
status = open("/proc/self/status").read().split("VmLck:")[1].split()[0]
print(json.dumps([keeping.problems(), int(status) * 1024]))
"""


@pytest.mark.parametrize("limit_bytes", [64 * 1024, 2 * MIB])
def test_locks_what_it_may_and_touches_the_rest(disk: Path, limit_bytes: int) -> None:
    """As a user without the right to lock beyond RLIMIT_MEMLOCK."""
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    assert hard == -1 or hard >= limit_bytes or os.geteuid() == 0, (soft, hard)
    file = cold(disk / "file")
    ran = subprocess.run(
        [sys.executable, "-c", LOCKING, file.path, str(limit_bytes)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    allowed = limit_bytes > MIB
    problems, locked = json.loads(ran.stdout)
    assert locked == (MIB if allowed else 0)
    assert ("RLIMIT_MEMLOCK" in problems.get("m", "")) is not allowed
    assert residency([file]).bytes_cached == MIB


def test_a_locked_file_cut_short_ends_nothing(disk: Path) -> None:
    file = cold(disk / "file", 4096)
    keeping = HeldPages(lock=True, available=lambda: None, reserve_bytes=0)
    keeping.want({"m": [file]})
    list(keeping.round())
    os.truncate(file.path, 10)
    list(keeping.round())
    assert keeping.problems() == {}
    assert cached(file) == 10
    keeping.close()


def test_brings_nothing_back_while_memory_is_short(disk: Path) -> None:
    file = cold(disk / "file")
    free = [99]
    keeping = HeldPages(lock=False, available=lambda: free[0], reserve_bytes=100)
    keeping.want({"m": [file]})
    list(keeping.round())
    assert keeping.pressed
    assert residency([file]).bytes_cached == 0
    free[0] = 100
    list(keeping.round())
    assert not keeping.pressed
    assert residency([file]).bytes_cached == MIB
    keeping.close()


def test_reads_where_the_kernel_cannot_populate(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linux_pages, "_POPULATE_READ", 12_345)
    file = cold(disk / "file", MIB + 77)
    keeping = HeldPages(lock=False, available=lambda: None, reserve_bytes=0)
    keeping.want({"m": [file]})
    list(keeping.round())
    assert residency([file]).bytes_cached == MIB + 77
    assert keeping.problems() == {}
    keeping.close()


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = {"proc/meminfo": "MemTotal:  1000 kB\nMemFree: 10 kB\nMemAvailable:   600 kB\n"}


@pytest.mark.parametrize(
    ("name", "files", "total", "available"),
    [
        ("plain", {}, 1_024_000, 614_400),
        (
            "cgroup v2, a limit further out",
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/b/memory.current": "5\n",
                "sys/fs/cgroup/a/memory.max": "300000\n",
                "sys/fs/cgroup/a/memory.current": "250000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 50000\nfile 150000\n",
            },
            300_000,
            200_000,
        ),
        (
            "cgroup v1 seen from inside a container",
            {
                "proc/self/cgroup": "9:cpu:/x\n4:memory:/not/here\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "400000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "390000\n",
                "sys/fs/cgroup/memory/memory.stat": "cache 1\ntotal_cache 90000\n",
            },
            400_000,
            100_000,
        ),
        (
            "cgroup v1 without a limit",
            {
                "proc/self/cgroup": "4:memory:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "390000\n",
            },
            1_024_000,
            614_400,
        ),
    ],
)
def test_memory_is_what_the_machine_and_its_control_groups_leave(
    tmp_path: Path, name: str, files: dict[str, str], total: int, available: int
) -> None:
    root = machine(tmp_path, {**MEMINFO, **files})
    assert pressure.total_bytes(root) == total
    assert pressure.available_bytes(root) == available
    assert pressure.page_budget_bytes(None, root) == total // 2
    assert pressure.page_budget_bytes(7, root) == 7


def test_unknown_memory_keeps_nothing(tmp_path: Path) -> None:
    assert pressure.total_bytes(tmp_path) is None
    assert pressure.available_bytes(tmp_path) is None
    assert pressure.page_budget_bytes(None, tmp_path) == 0
    assert pressure.total_bytes() is not None
