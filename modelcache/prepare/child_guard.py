"""Runs a command that must not outlive whoever started it.

    python -m modelcache.prepare.child_guard GRACE_S PROGRAM ARGUMENT...

The command gets a process group of its own. When this process is told to end (SIGTERM), or its
parent dies in whatever way, the whole group is told so, and killed after ``GRACE_S`` seconds. Exits
as the command did: its code, or 128 and the number of the signal that ended it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

_PR_SET_PDEATHSIG = 1
NOT_STARTED = 127


class _End(BaseException):
    """We were told to end."""


def main(arguments: Sequence[str]) -> int:
    """Run the command to its end, or to ours."""
    parent = os.getppid()
    grace_s, argv = float(arguments[0]), list(arguments[1:])

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _End

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    process = None
    try:
        if os.getppid() != parent:
            return 128 + signal.SIGTERM  # It died before it could be noticed.
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, process_group=0)
        code = process.wait()
    except OSError as error:
        sys.stderr.write(f"cannot start {argv[0]}: {error.strerror}\n")
        return NOT_STARTED
    except _End:
        code = -signal.SIGTERM
    if process is not None:
        # What the command left running in its group ends with it.
        _end_group(process, grace_s)
    return code if code >= 0 else 128 - code


def _end_group(process: subprocess.Popen[bytes], grace_s: float) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
