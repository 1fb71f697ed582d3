"""The fork server of a process backend: started, watched, replaced, and asked for engines.

It is on record like an engine, so that it does not outlive Tidegate's care, but nothing depends on
it: while it is not there, engines are started the plain way, and it is said why.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from autoscaler.backends.base import StillRunning
from autoscaler.backends.process.family import Family, ProcessRegistry, describe_process
from autoscaler.backends.process.guard import MARK
from autoscaler.backends.process.logs import ReplicaLog
from autoscaler.backends.process.procs import (
    KILLED_S,
    has_ended,
    list_stats,
    read_pss_bytes,
    reap_orphans,
)
from autoscaler.backends.process.replica import guard_argv, open_gate, spawn_guard, to_the_end
from loaders.engines.base import EngineCommand
from loaders.engines.vllm.engine import site_packages
from loaders.engines.vllm.forkserver.client import (
    ForkedProcess,
    ForkError,
    ForkRequest,
    ForkServer,
    ServerLost,
    Unfit,
    adopt_orphans,
    poll_child,
    server_argv,
)
from loaders.engines.vllm.forkserver.wire import ENGINE

LOG = logging.getLogger("tidegate.autoscaler")

RECORD_ID = "fork-server"
ROOT = str(Path(__file__).resolve().parents[3])
LAUNCHER_FLAG = "-c"
WATCH_S = 0.5
IDENTITY_S = 5.0
STEADY_S = 60.0
"""A server that lasted this long had nothing wrong with it from the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkPlan:
    """What to keep ready: an engine's Python, the environment its engines get (all but what is
    each one's own), the models whose code to import, and what is waited at most: between two tries
    to bring it up, for its imports, by a start for those imports, and for a fork."""

    python: Path
    env: Mapping[str, str]
    device: str
    models: tuple[str, ...] = ()
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0
    import_timeout_s: float = 600.0
    wait_s: float = 45.0
    timeout_s: float = 10.0


FORK_STATES = ("off", "importing", "ready", "waiting", "unfit")


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkServerStatus:
    """How the fork server is. ``state`` is off, importing, ready, waiting (for its next try) or
    unfit; ``pss_bytes`` its memory, of what it shares with others only its part."""

    state: str
    reason: str = ""
    pid: int | None = None
    pss_bytes: int | None = None
    import_s: float | None = None
    forked: int = 0
    crashes: int = 0


class Forks:
    """One fork server, kept running."""

    def __init__(self, plan: ForkPlan, *, registry: ProcessRegistry, log: ReplicaLog) -> None:
        self._plan, self._registry = plan, registry
        self.log = log
        self._state, self._reason = "off", "it has not been started"
        self._process: subprocess.Popen[bytes] | None = None
        self._family: Family | None = None
        self._server: ForkServer | None = None
        self._identity = ""
        self._import_s: float | None = None
        self._forked = self._crashes = 0
        self._lost = asyncio.Event()
        self._settled = asyncio.Event()
        self._runner: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to bring it up and keep it so."""
        if self._runner is None:
            self._runner = asyncio.create_task(self._run(), name="fork-server")

    def status(self) -> ForkServerStatus:
        """How it is now."""
        pid = None if self._process is None else self._process.pid
        return ForkServerStatus(
            state=self._state,
            reason=self._reason,
            pid=pid,
            pss_bytes=None if pid is None else read_pss_bytes(pid),
            import_s=self._import_s,
            forked=self._forked,
            crashes=self._crashes,
        )

    async def fork(
        self, command: EngineCommand, env: Mapping[str, str], cpus: Sequence[int], mark: str, *,
        log: int, parked: bool = False,
    ) -> ForkedProcess:  # fmt: skip
        """Fork the engine that ``command`` would start; it waits behind its gate.

        Waits for a server that is importing. Raises ``ForkError``, with the reason, where the
        engine has to be started the plain way: ``ServerLost`` if that may soon be otherwise.
        """
        python, flag, _, *args = command.argv
        if python != str(self._plan.python.absolute()) or flag != LAUNCHER_FLAG:
            raise ForkError("its program is another")
        if self._state == "importing":
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._plan.wait_s):
                    await self._settled.wait()
        if self._server is None or self._state != "ready":
            kind = ForkError if self._state in {"unfit", "off"} else ServerLost
            raise kind(f"the fork server is {self._state}: {self._reason}")
        if await self._registry.run(identity, self._plan.python) != self._identity:
            self._lose("the engine's packages have changed")
            raise ServerLost("the engine's packages have changed")
        guard = guard_argv("watch", ENGINE, str(self._registry.directory))
        request = ForkRequest(
            args=args, env=env, cpus=cpus, mark=(MARK, mark), guard=guard, parked=parked
        )
        try:
            process = await self._server.fork(request, log, timeout_s=self._plan.timeout_s)
        except ServerLost as error:
            self._lose(str(error))
            raise
        self._forked += 1
        return process

    def _lose(self, reason: str) -> None:
        self._state, self._reason = "waiting", reason
        self._lost.set()

    async def _run(self) -> None:
        pause_s = self._plan.backoff_s
        try:
            adopt_orphans()
        except OSError as error:
            self._settle("unfit", str(error))
            return
        while True:
            began_s, state = time.monotonic(), "waiting"
            try:
                await self._bring_up()
                await self._watch()
            except Unfit as error:
                self._reason, state = str(error), "unfit"
            except (ServerLost, OSError) as error:
                self._reason = str(error) or type(error).__name__
            self._crashes += 1
            self._settle(state, self._reason)  # before it is ended: no start may ask it any more
            await to_the_end(self._take_down())
            if time.monotonic() - began_s >= STEADY_S:
                pause_s = self._plan.backoff_s
            LOG.warning("the fork server is %s (%s): engines start plainly", state, self._reason)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2.0, self._plan.backoff_max_s)
            # No event tells of packages on a disk.
            while self._state == "unfit" and await self._registry.run(self._same_packages):  # noqa: ASYNC110
                await asyncio.sleep(IDENTITY_S)

    def _same_packages(self) -> bool:
        return identity(self._plan.python) == self._identity

    def _settle(self, state: str, reason: str) -> None:
        self._state, self._reason = state, reason
        self._settled.set()

    async def _bring_up(self) -> None:
        self._state, self._reason = "importing", "it imports vLLM"
        self._settled.clear()
        self._lost.clear()
        self._identity = await self._registry.run(identity, self._plan.python)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            server = ForkServer(ours)
            self._launch(theirs)
            async with asyncio.timeout(self._plan.import_timeout_s):
                import_s = await server.hello(device=self._plan.device, models=self._plan.models)
        except TimeoutError as error:
            ours.close()
            limit_s = self._plan.import_timeout_s
            raise ServerLost(f"it has not imported everything within {limit_s:g} s") from error
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        self._server, self._import_s = server, import_s
        self._settle("ready", "")
        LOG.info("the fork server is ready after %.1f s", import_s)

    def _launch(self, channel: socket.socket) -> None:
        """Start it behind a gate, put it on record, open the gate."""
        value = secrets.token_hex(16)
        env = {**self._plan.env, MARK: value, "SPT_NOENV": "1"}
        argv = server_argv(str(self._plan.python.absolute()), ROOT, channel.fileno())
        tie = ("tie", str(os.getpid()), "-", *argv)
        process = self._process = spawn_guard(tie, env, self.log, [channel.fileno()])
        record = describe_process(process.pid, replica_id=RECORD_ID, mark=value)
        self._registry.write(record)
        self._family = Family(record, self._registry)
        open_gate(process)

    async def _watch(self) -> None:
        """Return, with the reason noted, when it is gone or no longer of use."""
        next_look_s = time.monotonic() + IDENTITY_S
        while not self._lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(WATCH_S):
                    await self._lost.wait()
            process = self._process
            if process is None or (status := process.poll()) is not None:
                self._reason = f"it ended with status {status}" if process else "it is gone"
                return
            if self._server is None or self._server.broken:
                self._reason = "it did not answer in time"
                return
            if time.monotonic() >= next_look_s:
                next_look_s = time.monotonic() + IDENTITY_S
                if not await self._registry.run(self._same_packages):
                    self._reason = "the engine's packages have changed"
                    return

    async def _take_down(self) -> None:
        server, process, family = self._server, self._process, self._family
        self._server = self._process = self._family = None
        if server is not None:
            server.hang_up()
        await self._end(process, family)
        for guard, engine in () if server is None else server.close():
            await _end_late(guard, engine)

    async def _end(self, process: subprocess.Popen[bytes] | None, family: Family | None) -> None:
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        if family is None:
            process.kill()
        else:
            with contextlib.suppress(StillRunning, OSError):
                ended = await family.end(grace_s=1.0, reap=process.poll)
                reap_orphans({process.pid}, ended, await self._registry.run(list_stats))
        if not await has_ended(process.poll, within_s=KILLED_S):
            LOG.error("the fork server (pid %d) survives SIGKILL", process.pid)

    async def close(self) -> None:
        """End it. What it forked goes on."""
        if self._runner is not None:
            self._runner.cancel()
            await asyncio.gather(self._runner, return_exceptions=True)
            self._runner = None
        await self._take_down()
        with contextlib.suppress(OSError):
            adopt_orphans(False)
        self._settle("off", "Tidegate is closing")


async def _end_late(guard: int, engine: int) -> None:
    """End an engine that was forked for a start that was cancelled, and learn its end. Its
    guard is our child, so that its number is its own until then; should that have been killed, the
    engine is."""
    for child in (guard, engine):
        with contextlib.suppress(ChildProcessError, ProcessLookupError):
            if poll_child(child) is None:
                os.kill(engine, signal.SIGKILL)
                await has_ended(partial(poll_child, child), within_s=KILLED_S)


def identity(python: Path) -> str:
    """A digest of what decides which code an engine runs: its interpreter, and what is installed
    beside it. Reads names and times only."""
    seen = [str(python.absolute()), str(python.resolve())]
    for site in site_packages(python):
        with os.scandir(site) as entries:
            found = [one for one in entries if one.name.endswith(".dist-info")]
        for entry in sorted(found, key=lambda one: one.name):
            with contextlib.suppress(OSError):
                seen.append(f"{entry.name} {entry.stat().st_mtime_ns}")
    return hashlib.sha256("\n".join(seen).encode()).hexdigest()
