"""What a forked process tells about itself: its mark in ``/proc``, and what it is at.

``/proc/PID/environ`` shows the memory in which the kernel once put the environment, and a fork
shares that with its server. So the server is given a mark of its own, and each child writes another
of the same length over its copy: processes are told apart from outside as if each had been started.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path

IMPORTING, LOADING, WARMING, SERVING = "importing", "loading", "warming", "serving"
PARKED = "parked"


def restamp(name: str, new: str) -> None:
    """Give this process its own value of a variable in ``/proc/self/environ``.

    Raises ``RuntimeError`` where the variable is not there with a value of the same length.
    """
    stat = Path("/proc/self/stat").read_bytes()
    fields = stat[stat.rindex(b")") + 2 :].split()
    start, end = int(fields[47]), int(fields[48])
    memory = ctypes.string_at(start, end - start)
    prefix, value = f"{name}=".encode(), new.encode()
    for entry in memory.split(b"\0"):
        if entry.startswith(prefix) and len(entry) == len(prefix) + len(value):
            address = start + (b"\0" + memory).index(b"\0" + entry + b"\0") + len(prefix)
            ctypes.memmove(address, value, len(value))
            return
    raise RuntimeError(f"{name} cannot be found in this process's environment")


class Marks:
    """Writes what the engine is at to a pipe, one short line each, with the monotonic time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, at: str) -> None:
        """Tell. A reader that has gone, or does not read, does not block the writer."""
        try:
            os.write(self._fd, f"{time.monotonic():.4f} {os.getpid()} {at}\n".encode())
        except OSError:
            self._fd = -1


def read_marks(data: bytes) -> list[tuple[float, int, str]]:
    """Whole lines of marks as (monotonic seconds, pid, what); what is not one is left out."""
    found = []
    for line in data.decode(errors="replace").splitlines():
        parts = line.split(" ", 2)
        try:
            found.append((float(parts[0]), int(parts[1]), parts[2]))
        except (ValueError, IndexError):
            continue
    return found
