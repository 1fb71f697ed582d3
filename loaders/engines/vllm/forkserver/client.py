"""The control process's side of the fork server: asks for engines, and watches those it got.

An engine is forked together with its guard, its parent. The guard is a child of ours like that of
any other engine, because we take in orphans (``adopt_orphans``) and the fork server orphans it: so
we learn how the engine ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import os
import signal
import socket
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.engines.vllm.forkserver import wire

PR_SET_CHILD_SUBREAPER = 36
WAIT_POLL_S = 0.05
LAUNCH = (
    "import sys; sys.path.append(sys.argv.pop(1)); "
    "from loaders.engines.vllm.forkserver.server import main; sys.exit(main(sys.argv[1:]))"
)
"""Finds this package whether or not it is installed for the engine's Python."""


class ForkError(Exception):
    """The fork server could not fork this engine; the message says why, for people."""


class ServerLost(ForkError):
    """The fork server is gone, or no longer of use."""


class Unfit(ServerLost):
    """It found that engines cannot be forked here; another one would find the same."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkRequest:
    """An engine to fork. ``mark`` is the variable, with its value, that tells its processes from
    others, ``guard`` the command of its guard, in which ``{engine}`` stands for the engine's pid;
    ``parked`` has it wait, before its weights, until it is told to go."""

    args: Sequence[str]
    env: Mapping[str, str]
    cpus: Sequence[int]
    mark: tuple[str, str]
    guard: Sequence[str]
    parked: bool = False


def adopt_orphans(wanted: bool = True) -> None:
    """Become the parent of descendants whose own parent ends, or leave them to the system again.
    Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"orphans cannot be taken in: {os.strerror(number)}")


def server_argv(python: str, root: str, channel: int) -> list[str]:
    """The command line of a fork server that was given a socket under this number."""
    return [python, "-c", LAUNCH, root, str(channel)]


def poll_child(pid: int) -> int | None:
    """The wait status of a child, once it has ended. Raises ``ChildProcessError`` for one that is
    not there."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return status if found else None


class ForkedProcess:
    """The guard of a forked engine; as much of ``subprocess.Popen`` as a process backend uses.

    ``engine`` is the engine's own pid, ``gate`` opens it, ``marks`` tells what it is at (see
    ``marks.read_marks``), ``go`` wakes a parked one.
    """

    def __init__(self, pid: int, *, engine: int, gate: int, marks: int, go: int | None) -> None:
        self.pid = pid
        self.engine = engine
        self.returncode: int | None = None
        self.stdin = os.fdopen(gate, "wb", buffering=0)
        self.marks = marks
        self._go = go
        self._asking = threading.Lock()

    def poll(self) -> int | None:
        """The exit status, negative for a signal; ``None`` while it runs."""
        with self._asking:
            if self.returncode is None:
                try:
                    status = poll_child(self.pid)
                except ChildProcessError:
                    self.returncode = 0  # its end was learnt elsewhere, and cannot be any more
                else:
                    if status is not None:
                        self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

    def kill(self) -> None:
        """SIGKILL to the engine, unless it has ended; the guard ends with it."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.engine, signal.SIGKILL)

    def go(self) -> None:
        """Let a parked engine load its weights. Raises ``OSError`` when it is gone."""
        if self._go is None:
            raise OSError("this engine is not parked")
        os.write(self._go, b"!" * 64)  # one byte for each worker that may be waiting
        os.close(self._go)
        self._go = None

    def read_marks(self) -> bytes | None:
        """What it has told since the last call; ``None`` when it will tell no more."""
        try:
            return os.read(self.marks, 65_536) or None
        except BlockingIOError:
            return b""
        except OSError:
            return None

    def close(self) -> None:
        """Give back what is held for it."""
        self.stdin.close()
        for fd in (self.marks, self._go):
            if fd is not None and fd >= 0:
                os.close(fd)
        self.marks, self._go = -1, None


class ForkServer:
    """The channel to one fork server process. Not for more than one loop."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._channel.setblocking(False)
        self._lock = asyncio.Lock()
        self._broken = False

    async def hello(self, *, device: str, models: Sequence[str]) -> float:
        """Have it import everything; returns when it can fork, the seconds that took. Raises
        ``Unfit`` or ``ServerLost``."""
        answer = await self._ask({"device": device, "models": list(models)})
        if answer.get("kind") != "ready":
            raise Unfit(str(answer.get("reason", "it answered something else")))
        return float(answer["seconds"])

    async def fork(self, request: ForkRequest, log: int, *, timeout_s: float) -> ForkedProcess:
        """Fork an engine whose output goes to ``log``; it waits behind its gate.

        Raises ``ForkError`` when it refuses, ``ServerLost`` when it is gone, or has not answered
        within ``timeout_s``: then it is of no more use.
        """
        async with contextlib.AsyncExitStack() as stack:

            def pipe() -> tuple[int, int]:
                reading, writing = os.pipe2(os.O_CLOEXEC)
                return reading, writing

            gate_in, gate_out = pipe()
            marks_in, marks_out = pipe()
            theirs, ours = [gate_in, marks_out], [gate_out, marks_in]
            go: int | None = None
            if request.parked:
                go_in, go = pipe()
                theirs.append(go_in)
                ours.append(go)
            for fd in theirs:
                stack.callback(os.close, fd)
            os.set_blocking(marks_in, False)
            os.set_blocking(marks_out, False)
            message = {
                "args": list(request.args),
                "env": dict(request.env),
                "cwd": os.getcwd(),
                "cpus": list(request.cpus),
                "mark": list(request.mark),
                "guard": list(request.guard),
            }
            asked = asyncio.ensure_future(self._ask(message, [log, *theirs]))
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await asyncio.shield(asked)
                if answer.get("kind") != "forked":
                    raise ForkError(str(answer.get("reason", "it answered something else")))
            except BaseException as error:
                for fd in ours:  # the gate's end: one that was forked after all ends by itself
                    os.close(fd)
                if isinstance(error, TimeoutError):
                    asked.cancel()
                    raise ServerLost(f"it has not answered within {timeout_s:g} s") from error
                if isinstance(error, asyncio.CancelledError):
                    await _let_go(asked, timeout_s)
                raise
            pid, engine = int(answer["pid"]), int(answer["engine"])
            return ForkedProcess(pid, engine=engine, gate=gate_out, marks=marks_in, go=go)

    async def _ask(self, message: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        async with self._lock:
            if self._broken:
                raise ServerLost("an answer of it was not waited for")
            try:
                wire.send(self._channel, message, fds)
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    raise ForkError("its command and environment are too large") from error
                raise ServerLost(f"it cannot be asked: {error}") from error
            try:
                return await self._answer()
            except asyncio.CancelledError:
                self._broken = True  # its answer, if it comes, would be taken for the next one
                raise

    async def _answer(self) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                answer, fds = wire.receive(self._channel)
            except BlockingIOError:
                await self._readable(loop)
                continue
            except (wire.Closed, ValueError, OSError) as error:
                raise ServerLost(f"it has ended: {error}") from error
            for fd in fds:
                os.close(fd)
            return answer

    async def _readable(self, loop: asyncio.AbstractEventLoop) -> None:
        ready = asyncio.Event()
        loop.add_reader(self._channel, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._channel)

    @property
    def broken(self) -> bool:
        """Whether an answer did not come in time: it is of no more use."""
        return self._broken

    def hang_up(self) -> None:
        """Tell the fork server to end; the engines it forked go on."""
        with contextlib.suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    def close(self) -> list[tuple[int, int]]:
        """End the channel. Returns guards and engines that it forked for a start that was called
        off by then: its answers that came late."""
        late = []
        with contextlib.suppress(BlockingIOError, wire.Closed, ValueError, OSError):
            while True:
                answer, fds = wire.receive(self._channel)
                for fd in fds:
                    os.close(fd)
                if answer.get("kind") == "forked":
                    late.append((int(answer["pid"]), int(answer["engine"])))
        self._channel.close()
        return late


async def _let_go(asked: asyncio.Future[dict[str, Any]], timeout_s: float) -> None:
    """Learn the end of an engine that was forked for a start that was cancelled."""
    with contextlib.suppress(ForkError, TimeoutError):
        async with asyncio.timeout(timeout_s):
            answer = await asked
        if answer.get("kind") == "forked":
            with contextlib.suppress(ChildProcessError):
                for _ in range(round(timeout_s / WAIT_POLL_S)):
                    if poll_child(int(answer["pid"])) is not None:
                        break
                    await asyncio.sleep(WAIT_POLL_S)
