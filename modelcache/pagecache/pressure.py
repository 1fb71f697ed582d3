"""How much memory there is for pages, and whether other processes read from the disks: what work in
the background must leave to others.

Memory is the machine's, or less where a control group says so. A disk's count of bytes read, less
what this process had read, is what others read. Ours are counted when a read is asked for and the
disk's when it is done, so the difference falls back while reads are under way: only when it rises
above the most it ever was has another process read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Where ``proc`` and ``sys`` are."""

SECTOR_BYTES = 512
WINDOW_S = 0.25
"""How long the disk counts as in use after another process was seen to read."""

LOOK_S = 0.02
"""Least seconds between two looks at the counters, which cost some 50 µs each."""

BUSY_BYTES = 4 * 1024 * 1024
"""Bytes that others must have read since the last look to count: a log being opened does not."""


@dataclass(slots=True)
class _Seen:
    most_bytes: int
    looked_s: float
    busy_until_s: float


class ForegroundReads:
    """Call it to ask: ``prewarm(files, yield_to=ForegroundReads(paths))``.

    Always false where the disks cannot be told (a network or overlay file system) or the kernel
    does not count.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        root: Path = ROOT,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._own = root / "proc/self/io"
        self._disks = [
            stat
            for device in sorted({os.stat(path).st_dev for path in paths})
            if (stat := _stat_file(root, device)).exists()
        ]
        self._clock = clock
        others = self._others_bytes()
        now_s = clock()
        self._seen = None if others is None else _Seen(others, now_s, now_s)

    def __call__(self) -> bool:
        """Whether others read from the disks now."""
        if self._seen is None:
            return False
        now_s = self._clock()
        if now_s - self._seen.looked_s < LOOK_S:
            return now_s < self._seen.busy_until_s
        self._seen.looked_s = now_s
        others = self._others_bytes()
        if others is not None and others - self._seen.most_bytes >= BUSY_BYTES:
            self._seen.most_bytes = others
            self._seen.busy_until_s = now_s + WINDOW_S
        return now_s < self._seen.busy_until_s

    def _others_bytes(self) -> int | None:
        if not self._disks:
            return None
        with contextlib.suppress(OSError, ValueError, IndexError):
            disks = sum(int(disk.read_text().split()[2]) for disk in self._disks)
            for line in self._own.read_text().splitlines():
                name, _, value = line.partition(": ")
                if name == "read_bytes":
                    return disks * SECTOR_BYTES - int(value)
        return None


def _stat_file(root: Path, device: int) -> Path:
    return root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}/stat"


def total_bytes(root: Path = ROOT) -> int | None:
    """Memory this process and its kin may take; ``None`` if unknown."""
    limits = [_meminfo(root, "MemTotal"), *(limit for limit, _ in _groups(root))]
    return min((limit for limit in limits if limit is not None), default=None)


def available_bytes(root: Path = ROOT) -> int | None:
    """Memory to be had without swapping or killing a process; ``None`` if unknown.

    Page cache counts as available, as the kernel's own ``MemAvailable`` has it.
    """
    free = [_meminfo(root, "MemAvailable")]
    free += [max(0, limit - used) for limit, used in _groups(root)]
    return min((one for one in free if one is not None), default=None)


def page_budget_bytes(setting: int | None, root: Path = ROOT) -> int:
    """What may be kept in the page cache: the setting, else half of the memory, else nothing."""
    return setting if setting is not None else (total_bytes(root) or 0) // 2


def _meminfo(root: Path, name: str) -> int | None:
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return None


def _groups(root: Path) -> list[tuple[int, int]]:
    """Limit and use (page cache not counted) of each control group around us that has a limit."""
    found = []
    for folder, names in _folders(root):
        limit = _number(folder / names[0])
        used = _number(folder / names[1])
        if limit is None or used is None:
            continue
        cache = 0
        for line in _read(folder / "memory.stat").splitlines():
            key, _, value = line.partition(" ")
            if key == names[2]:
                cache = int(value)
        found.append((limit, max(0, used - cache)))
    return found


def _folders(root: Path) -> list[tuple[Path, tuple[str, str, str]]]:
    """Folders of our control groups, from the innermost out, with the names of their files."""
    new = ("memory.max", "memory.current", "file")
    old = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache")
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", new
        elif "memory" in controllers.split(","):
            top, names = root / "sys/fs/cgroup/memory", old
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        # In a container with a name space of its own the path may not be there, but the top is.
        found += [(top.joinpath(*parts[:n]), names) for n in range(len(parts), -1, -1)]
    return found


def _number(path: Path) -> int | None:
    """A file's number; ``None`` where there is none, or it says that there is no limit."""
    text = _read(path).strip()
    number = int(text) if text.isdigit() else None
    # Version 1 says "no limit" by a number near 2^63.
    return number if number is not None and number < 1 << 60 else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
