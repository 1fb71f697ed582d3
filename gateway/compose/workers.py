"""The worker processes, seen from the control process: started, sent messages, watched, drained.

One of them may be the endpoint picker, after those that carry requests themselves.

The listening sockets belong to the control process and are inherited, one per worker on the same
port (SO_REUSEPORT): a port that is taken is an error before anything starts, and connections that
wait on a worker that died are taken by its successor.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from autoscaler.backends.process.procs import KILLED_S, has_ended
from gateway.compose.process import ENDING
from gateway.datapath.messages import (
    Drain,
    FailureReport,
    FleetUpdate,
    Leadership,
    Listening,
    ToControl,
    ToWorker,
    Unpacker,
    WakeSignal,
    WorkerConfig,
    pack,
)
from gateway.datapath.shared import Shared
from router.types import Fleet

log = logging.getLogger("tidegate.workers")

_RESTART_S = 0.5
_RESTART_MAX_S = 10.0
_EXIT_GRACE_S = 5.0
# A worker beats several times a second. The checks are counted that saw no beat since the one
# before, not the time: after this process was stopped itself, its workers are not to blame.
_WATCH_S = 0.5
_UNRESPONSIVE_S = 2.0
_START_S = 60.0


@dataclass(slots=True)
class WorkerProcess:
    """One worker: its process and the control process's end of its channel, while it runs."""

    index: int
    kind: str = "http"
    process: subprocess.Popen[bytes] | None = None
    writer: asyncio.StreamWriter | None = None
    listening: bool = False
    starts: int = 0
    last_beat_ms: int = 0
    silent_s: float = 0.0

    @property
    def responds(self) -> bool:
        """Whether its event loop turns, as far as was seen."""
        return self.silent_s < _UNRESPONSIVE_S


class Workers:
    """Owner of the worker processes, their sockets and the shared block."""

    def __init__(
        self,
        config: WorkerConfig,
        listeners: list[socket.socket],
        shared: Shared,
        *,
        picker: socket.socket | None = None,
        on_wake_signal: Callable[[str], None],
        on_failure: Callable[[str], None],
    ) -> None:
        """``picker`` is bound to the endpoint picker's port, where there is to be one; then
        ``shared`` has room for one worker more than there are listeners."""
        self._config = config
        self._listeners = listeners
        self._picker = picker
        self._leads = True
        self.shared = shared
        self._on_wake_signal = on_wake_signal
        self._on_failure = on_failure
        self._fleet: Fleet | None = None
        self.processes = [WorkerProcess(index) for index in range(len(listeners))]
        if picker is not None:
            self.processes.append(WorkerProcess(len(listeners), kind="picker"))
        self._nudge_fds = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in self.processes]
        self._tasks: list[asyncio.Task[None]] = []
        self._watcher: asyncio.Task[None] | None = None
        self._draining = False
        self._changed = asyncio.Event()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        number: int = self._listeners[0].getsockname()[1]
        return number

    @property
    def picker_port(self) -> int | None:
        """The port of the endpoint picker."""
        return None if self._picker is None else int(self._picker.getsockname()[1])

    def start(self) -> None:
        """Start all workers. They take connections once a fleet is published: before, each would
        answer that there is no such model."""
        self._tasks = [asyncio.create_task(self._keep(entry)) for entry in self.processes]
        self._watcher = asyncio.create_task(self._watch())

    async def wait_listening(self) -> None:
        """Until each worker listens. Raises ``RuntimeError`` if one cannot, ``TimeoutError`` after
        a minute."""
        async with asyncio.timeout(60):
            while not all(entry.listening for entry in self.processes):
                self._changed.clear()
                await self._changed.wait()
                for entry in self.processes:
                    if entry.starts > 3 and not entry.listening:
                        raise RuntimeError("a worker process does not start; see the log above")

    def publish(self, fleet: Fleet) -> None:
        """Send all workers a new picture of the fleet."""
        self._fleet = fleet
        for entry in self.processes:
            self._send(entry, FleetUpdate(fleet=fleet))

    def lead(self, leads: bool) -> None:
        """Tell all workers whether this Tidegate leads; they begin with that it does."""
        self._leads = leads
        for entry in self.processes:
            self._send(entry, Leadership(leads=leads))

    def configure(self, config: WorkerConfig) -> None:
        """Have all workers, and those that are started from now on, work by other settings."""
        self._config = config
        for entry in self.processes:
            self._send(entry, msgspec.structs.replace(config, index=entry.index))

    def status(self) -> list[dict[str, object]]:
        """One entry per worker, for ``tidegate status``."""
        return [
            {
                "index": entry.index,
                "kind": entry.kind,
                "pid": entry.process.pid if entry.process else None,
                "state": self._state(entry),
                "restarts": max(0, entry.starts - 1),
            }
            for entry in self.processes
        ]

    @property
    def all_listening(self) -> bool:
        """Whether every worker takes connections, and responds."""
        ready = all(entry.listening and entry.responds for entry in self.processes)
        return ready and not self._draining

    def is_draining(self) -> bool:
        """Whether the workers have been asked to finish."""
        return self._draining

    def _state(self, entry: WorkerProcess) -> str:
        if self._draining:
            return "draining"
        if not entry.listening:
            return "starting"
        return "listening" if entry.responds else "unresponsive"

    def _send(self, entry: WorkerProcess, message: ToWorker) -> None:
        if entry.writer is not None and not entry.writer.is_closing():
            entry.writer.write(pack(message))

    async def _keep(self, entry: WorkerProcess) -> None:
        """Run one worker, and run it again when it dies."""
        pause_s = _RESTART_S
        while not self._draining:
            began = asyncio.get_running_loop().time()
            try:
                await self._run_once(entry)
            except (OSError, ValueError, msgspec.DecodeError) as error:
                if not self.is_draining():  # else we have ended it ourselves
                    log.error("worker %d: %s", entry.index, error)
            finally:
                await self._reap(entry)
            if self.is_draining():
                break
            log.error("worker %d ended; starting it again", entry.index)
            if asyncio.get_running_loop().time() - began > 60:
                pause_s = _RESTART_S
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, _RESTART_MAX_S)

    async def _watch(self) -> None:
        """Replace workers that hang: nothing would end their connections, nor take new ones."""
        while True:
            await asyncio.sleep(_WATCH_S)
            for entry in self.processes:
                self._check_beat(entry)

    def _check_beat(self, entry: WorkerProcess) -> None:
        process, beat_ms = entry.process, self.shared.last_beat_ms(entry.index)
        if process is None or beat_ms != entry.last_beat_ms:
            entry.last_beat_ms, entry.silent_s = beat_ms, 0.0
            return
        responded = entry.responds
        entry.silent_s += _WATCH_S
        if entry.listening and responded and not entry.responds:
            log.warning("worker %d (process %d) does not respond", entry.index, process.pid)
        limit_s = self._config.gateway.worker_timeout_s if entry.listening else _START_S
        if entry.silent_s >= limit_s:
            log.error(
                "worker %d (process %d) has not responded for %g s: it is replaced",
                entry.index,
                process.pid,
                entry.silent_s,
            )
            process.kill()
            if entry.writer is not None:  # what hangs in the kernel would keep its end open
                entry.writer.close()

    async def _run_once(self, entry: WorkerProcess) -> None:
        channel, inherited = socket.socketpair()
        fds = (self.shared.fd, inherited.fileno(), *self._nudge_fds)
        if entry.kind == "picker":
            words = ["gateway.picker", str(self.picker_port), *map(str, fds)]
        else:
            fds = (self._listeners[entry.index].fileno(), *fds)
            words = ["gateway.datapath", *map(str, fds)]
        command = [sys.executable, "-P", "-m", *words]
        entry.starts += 1
        entry.silent_s = 0.0
        with inherited:
            entry.process = self._spawn(command, fds)
        reader, entry.writer = await asyncio.open_connection(sock=channel)
        self._send(entry, msgspec.structs.replace(self._config, index=entry.index))
        self._send(entry, Leadership(leads=self._leads))
        if self._fleet is not None:
            self._send(entry, FleetUpdate(fleet=self._fleet))
        if self._draining:  # since it was started: it had no channel then
            self._send(entry, Drain())
        unpacker = Unpacker(ToControl)
        while data := await reader.read(65536):
            for message in unpacker.feed(data):
                self._handle(entry, message)

    @staticmethod
    def _spawn(command: list[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
        # A fork and exec of a small process: a millisecond, so it need not leave the loop.
        # Ctrl-C and Ctrl-\ reach the whole process group, and a worker ignores signals. Until it
        # has said so itself they are blocked, which it inherits; one for this process comes after.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            return subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _handle(self, entry: WorkerProcess, message: ToControl) -> None:
        if isinstance(message, WakeSignal):
            self._on_wake_signal(message.pool)
        elif isinstance(message, FailureReport):
            self._on_failure(message.replica)
        elif isinstance(message, Listening):
            entry.listening = True
            self._changed.set()

    async def _reap(self, entry: WorkerProcess) -> None:
        """The channel closed: end the process, and clear what it had in flight."""
        entry.listening = False
        if entry.writer is not None:
            entry.writer.close()
            entry.writer = None
        process = entry.process
        if process is not None and not await has_ended(process.poll, within_s=_EXIT_GRACE_S):
            process.kill()
            if not await has_ended(process.poll, within_s=KILLED_S):
                log.error("worker %d: process %d survives SIGKILL", entry.index, process.pid)
        entry.process = None
        self.shared.clear_worker(entry.index)
        self._changed.set()

    async def drain(self) -> None:
        """Stop accepting, let the workers finish what runs, and wait for them to end."""
        self._draining = True
        for listener in self._listeners:
            listener.close()
        for entry in self.processes:
            self._send(entry, Drain())
        if self._tasks:
            limit_s = self._config.gateway.drain_s + 2 * _EXIT_GRACE_S
            _, late = await asyncio.wait(self._tasks, timeout=limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._watcher is not None:
            self._watcher.cancel()
        self.kill()

    def kill(self) -> None:
        """End the workers at once; what they were answering is cut."""
        self._draining = True
        for entry in self.processes:
            if entry.process is not None and entry.process.poll() is None:
                entry.process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    entry.process.wait(KILLED_S)
        while self._nudge_fds:
            os.close(self._nudge_fds.pop())
