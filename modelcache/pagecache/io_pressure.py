"""Whether other processes read from the disks that files are on, so that background work can wait.

A disk's count of bytes read, less what this process had read, is what others read. Ours are counted
when a read is asked for and the disk's when it is done, so the difference falls back while reads
are under way: only when it rises above the most it ever was has another process read.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

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
    does not count. ``root`` is where ``proc`` and ``sys`` are.
    """

    def __init__(
        self,
        paths: Iterable[str],
        *,
        root: Path = Path("/"),
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
