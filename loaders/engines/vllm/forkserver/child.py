"""The life of a forked process until it is vLLM's server."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from typing import Any

from loaders.engines.vllm.forkserver.marks import IMPORTING, Marks, restamp
from loaders.engines.vllm.forkserver.patches import make_hold, quicken, say

PR_SET_PDEATHSIG = 1
NOT_STARTED = 125
LOOK_S = 1.0
GRACE_S = 15.0
"""Between Tidegate's end and that of an engine that has not ended by itself."""

PARENT_S = 2.0
"""Longest wait for the kernel to give the orphan to Tidegate, which takes microseconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be started. ``fds`` are the log, the gate, the marks and, parked, the go."""

    args: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    cpus: tuple[int, ...]
    mark: tuple[str, str]
    parent: int
    device: str
    fds: tuple[int, ...]

    @classmethod
    def read(cls, message: dict[str, Any], fds: list[int], device: str) -> Order:
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
            parent=int(message["parent"]),
            device=device,
            fds=tuple(fds),
        )


def fork_orphan(order: Order) -> int | None:
    """Fork an engine that belongs to Tidegate and not to us: its parent, a process in between, ends
    at once, and Tidegate takes in orphans. So the engine outlives the fork server, dies with
    Tidegate, and Tidegate itself learns how it ended. Returns its pid; ``None`` in the engine.
    """
    reading, writing = os.pipe()
    middle = os.fork()
    if middle:
        os.close(writing)
        told = os.read(reading, 32)
        os.close(reading)
        os.waitpid(middle, 0)
        if not told:
            raise OSError("the process in between could not fork")
        return int(told)
    try:
        os.close(reading)
        engine = os.fork()
        if engine == 0:
            os.close(writing)
            return None
        os.write(writing, str(engine).encode())
    except BaseException:  # noqa: BLE001 -- whatever it is, this process has no other use
        os._exit(1)
    os._exit(0)


def become_engine(order: Order) -> int:
    """In the forked process: wait for the gate, then be vLLM's server. Returns an exit status."""
    log, gate, told, *go = order.fds
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    if not _is_child_of(order.parent):
        say("the engine was not taken in by Tidegate")
        return NOT_STARTED
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    restamp(*order.mark)
    if os.getppid() != order.parent or os.read(gate, 1) != b"!":
        return NOT_STARTED
    os.close(gate)
    os.environ.clear()
    os.environ.update(order.env)
    os.chdir(order.cwd)
    if order.cpus:
        os.sched_setaffinity(0, order.cpus)
    threading.Thread(
        target=end_with, args=(order.parent,), name="tidegate-leash", daemon=True
    ).start()
    marks = Marks(told)
    marks(IMPORTING)
    hold = make_hold(marks, go[0]) if go else None
    try:
        quicken(marks, device=order.device, hold=hold)
        return _serve(order.args)
    except Exception:  # noqa: BLE001 -- the engine's log is where a failed start is explained
        traceback.print_exc()
        return 1


def end_with(parent: int) -> None:
    """End this engine, its processes included, some time after Tidegate has gone.

    The kernel has sent SIGTERM by then. One that is just starting may not end by that: its main
    thread does, and then waits for others that wait for an engine core.
    """
    while os.getppid() == parent:
        time.sleep(LOOK_S)
    time.sleep(GRACE_S)
    os.killpg(0, signal.SIGKILL)


def _is_child_of(parent: int) -> bool:
    deadline_s = time.monotonic() + PARENT_S
    while os.getppid() != parent:
        if time.monotonic() > deadline_s:
            return False
        time.sleep(0.001)
    return True


def _serve(args: tuple[str, ...]) -> int:
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm", *args]
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    with contextlib.suppress(KeyboardInterrupt):
        main()
    return 0
