"""Becomes an engine, once Tidegate has written down that it may.

Run as a script (``python -I -S launch.py PARENT CORES PROGRAM ARGUMENT...``) in a session of its
own, it waits for one byte on its standard input and then replaces itself by the program. Tidegate
sends that byte after the process is in its registry: so no engine ever runs that a later Tidegate
would not find. If Tidegate dies first, the input ends and this process with it; if Tidegate dies
later, the kernel sends the engine SIGTERM.

Standard library only, and nothing that takes long to import.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
NOT_STARTED = 125
NOT_FOUND = 127


def main(arguments: list[str]) -> int:
    """Wait for the byte, then become the program; returns an exit status if it cannot."""
    parent, cores, program = int(arguments[0]), arguments[1], arguments[2:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent or os.read(0, 1) != b"!":
        return NOT_STARTED
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    try:
        if cores != "-":
            os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
        os.execvp(program[0], program)
    except OSError as error:
        os.write(2, f"{program[0]} was not started: {error}\n".encode())
        return NOT_FOUND


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
