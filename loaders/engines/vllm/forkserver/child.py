"""The life of a forked process until it is vLLM's server."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.engines.vllm.forkserver.patches import make_hold, patch_vllm
from loaders.engines.vllm.forkserver.wire import ENGINE, IMPORTING, Marks

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 125
GUARD_ENV = frozenset({"PATH", "LD_LIBRARY_PATH"})
"""What a guard needs of its engine's environment: its Python may need the libraries."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStart:
    """What is to be started. ``fds`` are the log, the gate, the marks and, parked, the go.
    ``guard`` is the command of the engine's guard, in which ``ENGINE`` stands for its pid."""

    args: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    cpus: tuple[int, ...]
    mark: tuple[str, str]
    guard: tuple[str, ...]
    device: str
    fds: tuple[int, ...]

    @classmethod
    def read(cls, message: dict[str, Any], fds: list[int], device: str) -> EngineStart:
        """From a message. Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        if len(fds) not in (3, 4):
            raise ValueError(f"3 or 4 file descriptors are needed, not {len(fds)}")
        name, value = message["mark"]
        return cls(
            args=tuple(map(str, message["args"])),
            env={str(key): str(item) for key, item in message["env"].items()},
            cwd=str(message["cwd"]),
            cpus=tuple(map(int, message["cpus"])),
            mark=(str(name), str(value)),
            guard=tuple(map(str, message["guard"])),
            device=device,
            fds=tuple(fds),
        )


def fork_orphan(start: EngineStart) -> tuple[int, int] | None:
    """Fork an engine and its guard. Returns the pids of both, the guard's first; ``None`` in the
    engine.

    The guard is the engine's parent, and belongs to Tidegate and not to us: its own parent, a
    process in between, ends at once, and Tidegate takes in orphans. So the engine outlives the
    fork server, and Tidegate learns by the guard how it ended.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    middle = os.fork()
    if middle:
        os.close(writing)
        told = os.read(reading, 64).split()
        os.close(reading)
        os.waitpid(middle, 0)
        if len(told) != 2:
            raise OSError("the process in between could not fork")
        return int(told[0]), int(told[1])
    try:
        os.close(reading)
        if os.fork():
            os._exit(0)
        os.setsid()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        guard = os.getpid()
        engine = os.fork()
        if engine == 0:
            os.close(writing)
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != guard:
                os._exit(NOT_STARTED)
            return None
        os.write(writing, f"{guard} {engine}".encode())
        # A small process instead of one more copy of this one; its file descriptors close with it.
        argv = [str(engine) if part == ENGINE else part for part in start.guard]
        name, value = start.mark
        needed = {key: item for key, item in start.env.items() if key in GUARD_ENV}
        os.execve(argv[0], argv, {**needed, name: value})
    except BaseException:  # noqa: BLE001 -- whatever it is, this process has no other use
        os._exit(1)


def become_engine(start: EngineStart) -> int:
    """In the forked process: wait for the gate, then be vLLM's server. Returns an exit status."""
    log, gate, told, *go = start.fds
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    restamp(*start.mark)
    if os.read(gate, 1) != b"!":
        return NOT_STARTED
    os.close(gate)
    os.environ.clear()
    os.environ.update(start.env)
    os.chdir(start.cwd)
    if start.cpus:
        os.sched_setaffinity(0, start.cpus)
    marks = Marks(told)
    marks(IMPORTING)
    hold = make_hold(marks, go[0]) if go else None
    try:
        patch_vllm(marks, device=start.device, hold=hold)
        return _serve(start.args)
    except Exception:  # noqa: BLE001 -- the engine's log is where a failed start is explained
        traceback.print_exc()
        return 1


def restamp(name: str, new: str) -> None:
    """Give this process its own value of a variable in ``/proc/self/environ``, which shows the
    memory in which the kernel once put the environment: a fork shares that with its server. So
    processes are told apart from outside as if each had been started.

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


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _serve(args: tuple[str, ...]) -> int:
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm", *args]
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    with contextlib.suppress(KeyboardInterrupt):
        main()
    return 0
