"""One replica's process as its backend holds it: started either way, watched, and described."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoscaler.backends.base import Probe, ReplicaSpec
from autoscaler.backends.process import guard
from autoscaler.backends.process.family import Family, StartedEngine
from autoscaler.backends.process.logs import ReplicaLog, find_error, message_of
from autoscaler.backends.process.procs import ProcessId, list_stats, read_stat, sum_pss_bytes
from autoscaler.settings import PoolSettings
from loaders.engines.base import (
    START_PHASES,
    EngineCommand,
    Placement,
    ServedModel,
    engine_of,
    later_phase,
)
from loaders.engines.vllm.forkserver.client import ForkedProcess
from loaders.engines.vllm.forkserver.wire import PARKED, SERVING, read_marks
from modelcache.refs import SECRET_NAME, secret_arguments

PHASE_CHARACTERS = 160
PHASE_LINES = 200
ERROR_LINES = 1_000

STORE_CREDENTIAL = re.compile(
    r"GOOGLE_APPLICATION_CREDENTIALS|(HF|HUGGING_FACE_HUB|AWS|OSS|ALIBABA_CLOUD)_"
    r"(TOKEN|TOKEN_PATH|\w+_TOKEN|ACCESS_KEY\w*|SECRET_ACCESS_KEY|\w+_TOKEN_FILE|\w*CREDENTIALS\w*)"
)
MIN_SECRET_CHARACTERS = 8
UNKNOWN_STATUS = 256
"""In place of an exit status, of a process that was not our child: that it ended is all we know."""


class AdoptedProcess:
    """The guard of an engine that an earlier control process started; as much of
    ``subprocess.Popen`` as a process backend uses. It is not our child: that it has ended is seen,
    how is not."""

    stdin = None

    def __init__(self, guard: ProcessId) -> None:
        """Raises ``OSError`` when this process is gone."""
        self.pid = guard.pid
        self._handle = os.pidfd_open(guard.pid)
        try:
            stat = read_stat(guard.pid)
        except OSError:
            self.close()
            raise
        if stat is None or stat.id != guard or stat.gone:
            self.close()
            raise ProcessLookupError(f"process {guard.pid} is gone")

    def poll(self) -> int | None:
        """``UNKNOWN_STATUS`` once it has ended; ``None`` while it runs."""
        if self._handle < 0:
            return UNKNOWN_STATUS
        look = select.poll()
        look.register(self._handle, select.POLLIN)  # readable once the process has ended
        return UNKNOWN_STATUS if look.poll(0) else None

    def kill(self) -> None:
        """SIGKILL, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    def close(self) -> None:
        """Give back what is held for it."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1


Process = subprocess.Popen[bytes] | ForkedProcess | AdoptedProcess
"""The guard of an engine; it ends as the engine did."""


@dataclass(slots=True, kw_only=True, eq=False)
class ReplicaProcess:
    """One replica's process, and everything held for it until it is gone.

    ``port`` keeps its port ours (``reserve_port``); ``proven``: what listens there was seen to be a
    process of this replica. ``process`` is the guard and ``pid`` the engine below it, once that is
    known. ``told`` is what a forked engine has told (monotonic seconds, what), ``plainly`` why it
    was not forked where it might have been.
    """

    spec: ReplicaSpec
    placement: Placement
    port: socket.socket
    mark: str
    log: ReplicaLog
    command: EngineCommand
    process: Process | None = None
    pid: int | None = None
    family: Family | None = None
    model: ServedModel | None = None
    listed: tuple[str, ...] = ()
    ended: bool = False
    proven: bool = False
    phase: str = START_PHASES[0]
    told: list[tuple[float, str]] = field(default_factory=list)
    plainly: str = ""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        """The engine's base URL."""
        return f"http://{self.placement.host}:{self.placement.port}"

    @property
    def is_parked(self) -> bool:
        """Whether it has come to where a parked engine waits."""
        return bool(self.told) and self.told[-1][1] == PARKED

    @property
    def serves(self) -> bool:
        """Whether a forked engine has told that its server is up."""
        return any(what == SERVING for _, what in self.told)

    def listen(self) -> bool:
        """Take note of what a forked engine has told; false when it will tell no more."""
        if not isinstance(self.process, ForkedProcess):
            return False
        news = self.process.read_marks()
        for at_s, _, what in read_marks(news or b""):
            self.told.append((at_s, what))
            self.phase = later_phase(self.phase, what.partition(":")[0])
        return news is not None

    def describe_phase(self) -> str:
        """What it is at while it starts: one of ``START_PHASES``, and its newest line."""
        self.listen()
        messages = [message_of(line) for line in self.log.tail(PHASE_LINES)]
        shown = engine_of(self.spec.pool.engine).start_phase(messages, self.phase)
        if not self.told or shown == "compiling":  # of all else a forked one tells more precisely
            self.phase = shown
        text = ": ".join([self.phase, *messages[-1:]])[:PHASE_CHARACTERS]
        return f"{text} (started plainly: {self.plainly})" if self.plainly else text


def guard_argv(*arguments: str) -> list[str]:
    """The command line of a guard."""
    return [sys.executable, "-I", "-S", guard.__file__, *arguments]


def spawn_guard(
    arguments: Sequence[str],
    env: Mapping[str, str],
    log: ReplicaLog,
    pass_fds: Sequence[int] = (),
) -> subprocess.Popen[bytes]:
    """Start a guard behind its gate, in a session of its own. Raises ``OSError``."""
    # Not through asyncio: a cancelled start could lose the process between its birth and us.
    output = log.open()
    try:
        return subprocess.Popen(
            guard_argv(*arguments),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=dict(env),
            pass_fds=pass_fds,
            start_new_session=True,
            bufsize=0,
        )
    finally:
        os.close(output)


def open_gate(process: subprocess.Popen[bytes] | ForkedProcess) -> None:
    """Let what has been put on record begin."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"!")
        process.stdin.close()


def spawn_plainly(
    child: ReplicaProcess, env: Mapping[str, str], directory: Path
) -> subprocess.Popen[bytes]:
    """Start the guard, which starts the engine after its gate opens; ``directory`` has its record.
    Raises ``OSError``."""
    cores = ",".join(map(str, child.placement.cpus)) or "-"
    arguments = ("start", str(os.getpid()), str(directory), cores, *child.command.argv)
    return spawn_guard(arguments, env, child.log)


def find_engine(guard_pid: int) -> int | None:
    """The engine of a guard: the first child it had. ``None`` before that, and when it is gone."""
    children = [one.id for one in list_stats() if one.parent == guard_pid and not one.gone]
    first = min(children, key=lambda one: (one.start_ticks, one.pid), default=None)
    return None if first is None else first.pid


def make_env(
    environ: Mapping[str, str], command: EngineCommand, spec: ReplicaSpec, placement: Placement
) -> dict[str, str]:
    """The environment of an engine, but for its mark.

    The credentials of stores are for engines that fetch their models themselves. ``SPT_NOENV``
    keeps setproctitle (vLLM uses it) from overwriting the environment, in which the mark is found
    again.
    """
    model = spec.pool.model or ""
    loads = engine_of(spec.pool.engine).capabilities.loads_weights
    fetches = loads and "://" not in model and not Path(model).is_dir()
    env = {
        name: value
        for name, value in environ.items()
        if fetches or not STORE_CREDENTIAL.fullmatch(name)
    }
    env |= {**command.env, **spec.pool.env}
    if placement.gpus:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, placement.gpus))
    return {**env, "SPT_NOENV": "1"}


def secrets_of(pool: PoolSettings, environ: Mapping[str, str]) -> Iterator[str]:
    """What an engine is given and may write to its log that must not be shown: values of variables
    and of flags whose names say so."""
    for name, value in {**environ, **pool.env}.items():
        # As one of eight characters or more: "true" is no secret, and would be hidden everywhere.
        if SECRET_NAME.search(name) and len(value) >= MIN_SECRET_CHARACTERS:
            yield value
    yield from secret_arguments(pool.engine_args)


def make_probe(
    child: ReplicaProcess,
    *,
    alive: bool,
    ready: bool | None,
    detail: str,
    phase: str = "",
    cause: str = "",
) -> Probe:
    """What was seen of a replica, with what is known of it."""
    pool, model = child.spec.pool, child.model
    length = None if model is None else model.max_model_len_tokens
    return Probe(
        alive=alive,
        ready=ready,
        detail=detail,
        phase=phase,
        cause=cause,
        url=child.url,
        served_model=None if model is None else model.name,
        listed=child.listed,
        max_model_len_tokens=length or pool.max_model_len_tokens,
        stream_usage=model is not None and model.stream_usage,
        pid=child.pid,
        gpus=child.placement.gpus,
        cpus=child.placement.cpus,
    )


def probe_ended(child: ReplicaProcess, status: int, *, lines: int) -> Probe:
    """A replica whose process has ended: how, why, and the last lines it wrote."""
    how = "has ended" if status == UNKNOWN_STATUS else f"exited with status {status}"
    if status < 0:
        with contextlib.suppress(ValueError):
            how = f"was ended by {signal.Signals(-status).name}"
    tail = child.log.tail(ERROR_LINES)
    cause = find_error(tail, engine_of(child.spec.pool.engine).consequences)
    why = f": {cause}" if cause else ""
    shown = "\n".join(tail[-lines:])
    said = f"\nits last lines:\n{shown}" if tail else "; it wrote nothing"
    detail = f"the engine {how}{why} (log: {child.log.path}){said}"
    return make_probe(
        child, alive=False, ready=False, detail=detail, cause=cause or f"the engine {how}"
    )


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that cannot be interrupted; a cancellation is raised when it has ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


@dataclass(frozen=True, slots=True, kw_only=True)
class Standby:
    """An engine that is forked and waits for its weights. ``parked`` is false until it has come
    so far; ``pss_bytes`` is the memory of its processes, of what they share only their part;
    ``None`` where it cannot be told."""

    pool: str
    pid: int
    parked: bool
    pss_bytes: int | None


def describe_standby(child: ReplicaProcess) -> Standby | None:
    """A standby that lives, or ``None``."""
    if child.process is None or child.family is None or child.process.poll() is not None:
        return None
    child.listen()
    return Standby(
        pool=child.spec.pool.name,
        pid=child.pid or child.process.pid,
        parked=child.is_parked,
        pss_bytes=sum_pss_bytes(child.family.pids()),
    )


def describe_engine(spec: ReplicaSpec, placement: Placement, log: ReplicaLog) -> StartedEngine:
    """What is put on record of an engine, for a later control process."""
    pool = spec.pool
    return StartedEngine(
        pool=pool.name,
        model=pool.model,
        placement=placement,
        digest=spec.digest,
        log=str(log.path),
    )
