"""Engines as child processes of Tidegate, on this machine.

Each runs in a session of its own, behind a gate (``launch``) that opens when it is on record. What
is on record is ended by whoever owns the state directory next, so no engine outlives Tidegate's
care: not after a crash, not after ``kill -9``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autoscaler.backends import launch
from autoscaler.backends.base import (
    BackendError,
    Command,
    Leftover,
    MakeCommand,
    NoRoom,
    Placement,
    Probe,
    ReplicaSpec,
    StillRunning,
)
from autoscaler.backends.family import Family, Sleep, end_leftovers
from autoscaler.backends.health import HealthClient, ServedModel, choose_model
from autoscaler.backends.logs import ReplicaLog, message_of, prune
from autoscaler.backends.process_registry import ProcessRecord, ProcessRegistry
from autoscaler.backends.procs import ProcessStat, boot_id, list_stats, read_stat
from autoscaler.placement import Gpu, GpuUse, assign_cpus, assign_gpus
from autoscaler.settings import AutoscalerSettings

HOST = "127.0.0.1"
MARK = "TIDEGATE_REPLICA_MARK"
PHASE_CHARACTERS = 160
PORT_TRIES = 32
KEEP_S = 1.0


@dataclass(slots=True, kw_only=True, eq=False)
class Child:
    """One replica's process, and everything held for it until it is gone."""

    spec: ReplicaSpec
    placement: Placement
    mark: str
    log: ReplicaLog
    process: subprocess.Popen[bytes] | None = None
    family: Family | None = None
    model: ServedModel | None = None
    ended: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def url(self) -> str:
        """The engine's base URL."""
        return f"http://{self.placement.host}:{self.placement.port}"


class ProcessBackend:
    """Backend for pools with ``backend = "process"``.

    ``command`` makes the command line of a replica; ``list_gpus`` tells the GPUs of this machine
    (``None``: unknown) and is asked when a replica that needs one is started.
    """

    owns_replicas = True

    def __init__(
        self,
        *,
        state_dir: Path,
        settings: AutoscalerSettings,
        command: MakeCommand,
        list_gpus: Callable[[], Sequence[Gpu] | None] = lambda: None,
        cpus: Sequence[int] | None = None,
        environ: Mapping[str, str] | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._command = command
        self._list_gpus = list_gpus
        self._cpus = sorted(os.sched_getaffinity(0)) if cpus is None else list(cpus)
        self._environ = os.environ if environ is None else environ
        self._sleep = sleep
        self._logs = state_dir.absolute() / "logs"
        self._registry = ProcessRegistry(state_dir.absolute() / "replicas")
        self._client = HealthClient(timeout_s=settings.health_timeout_s)
        self._children: dict[str, Child] = {}
        self._keeper: asyncio.Task[None] | None = None

    async def start(self, spec: ReplicaSpec) -> None:
        """Launch a replica's process. Raises ``NoRoom`` without a free GPU, ``BackendError`` when
        it cannot be launched."""
        if spec.id in self._children:
            raise BackendError(f"{spec.id} has been started already")
        self._registry.claim()
        gpus, cpus = await self._place(spec)
        placement = Placement(host=HOST, port=self._free_port(), gpus=gpus, cpus=cpus)
        directory = self._logs / re.sub(r"[^A-Za-z0-9._-]+", "-", spec.pool.name)
        log = ReplicaLog(
            directory / f"{spec.id}.log",
            max_bytes=self._settings.log_bytes,
            files=self._settings.log_files,
        )
        child = Child(spec=spec, placement=placement, mark=secrets.token_hex(16), log=log)
        self._children[spec.id] = child
        try:
            async with child.lock:
                living = {one.log.path for one in self._children.values()}
                await asyncio.to_thread(
                    prune, directory, keep=self._settings.log_replicas, living=living
                )
                await self._launch(child)
        except BaseException as error:
            with contextlib.suppress(StillRunning):
                await self._end(child, grace_s=0.0)
            if isinstance(error, OSError | ValueError):
                raise BackendError(f"{spec.id} was not started: {error}") from error
            raise
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep(), name="process-backend-keeper")

    async def _place(self, spec: ReplicaSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
        pool = spec.pool
        inventory = None
        if pool.gpus_per_replica:
            inventory = await asyncio.to_thread(self._list_gpus)
        children = self._children.values()
        gpus = assign_gpus(
            count=pool.gpus_per_replica,
            memory_bytes=pool.gpu_memory_bytes,
            allowed=pool.gpus,
            inventory=inventory,
            uses=[
                GpuUse(index=index, memory_bytes=child.spec.pool.gpu_memory_bytes)
                for child in children
                for index in child.placement.gpus
            ],
        )
        if gpus is None:
            which = f"of {list(pool.gpus)} " if pool.gpus else ""
            known = "" if inventory is not None else " (which GPUs there are is not known)"
            raise NoRoom(f"{pool.gpus_per_replica} GPU {which}needed, not so many are free{known}")
        cpus = assign_cpus(
            count=pool.cpus_per_replica,
            available=self._cpus,
            taken=[core for child in children for core in child.placement.cpus],
        )
        return gpus, cpus

    def _free_port(self) -> int:
        """A port nobody listens on, and that no other replica was given."""
        taken = {child.placement.port for child in self._children.values()}
        for _ in range(PORT_TRIES):
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
                probe.bind((HOST, 0))
                port: int = probe.getsockname()[1]
            if port not in taken:
                return port
        raise BackendError(f"no free port was found on {HOST} in {PORT_TRIES} tries")

    async def _launch(self, child: Child) -> None:
        """Start the gate, put it on record, open it."""
        spec, placement = child.spec, child.placement
        command = self._command(spec, placement)
        process = self._spawn(child, command)
        child.process = process
        stat = read_stat(process.pid)
        if stat is None or process.stdin is None:
            raise BackendError(f"{spec.id} ended while it was being launched")
        record = ProcessRecord(
            replica_id=spec.id, boot_id=boot_id(), leader=stat.id, mark=f"{MARK}={child.mark}"
        )
        await to_the_end(asyncio.to_thread(self._registry.write, record))
        child.family = Family(record, self._registry)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(b"!")
        process.stdin.close()

    def _spawn(self, child: Child, command: Command) -> subprocess.Popen[bytes]:
        # Not through asyncio: a cancelled start could lose the process between its birth and us.
        cores = ",".join(map(str, child.placement.cpus)) or "-"
        gate = [sys.executable, "-I", "-S", launch.__file__, str(os.getpid()), cores]
        output = child.log.open()
        try:
            return subprocess.Popen(
                [*gate, *command.argv],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=self._make_env(child, command.env),
                start_new_session=True,
                bufsize=0,
            )
        finally:
            os.close(output)

    def _make_env(self, child: Child, command_env: Mapping[str, str]) -> dict[str, str]:
        # Our own settings may hold secrets, and SPT_NOENV keeps setproctitle (vLLM uses it) from
        # overwriting the environment, in which the mark is found again.
        env = {k: v for k, v in self._environ.items() if not k.startswith("TIDEGATE__")}
        env |= {**command_env, **child.spec.pool.env}
        if child.placement.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, child.placement.gpus))
        env |= {MARK: child.mark, "SPT_NOENV": "1"}
        return env

    async def probe(self, replica_id: str) -> Probe:
        """See whether the process lives, and ask the engine whether it is well."""
        child = self._children.get(replica_id)
        if child is None or child.process is None:
            return Probe(alive=False, ready=False, detail="it has no process")
        status = child.process.poll()
        if status is not None:
            detail = self._ending(child, status)
            return self._make_probe(child, alive=False, ready=False, detail=detail)
        pool = child.spec.pool
        health = await self._client.check(child.url, pool.health_path, {})
        if health.ready and child.model is None:
            models = await self._client.list_models(child.url, {})
            child.model = choose_model(models, pool.name, pool.model)
        lines = [] if health.ready else child.log.tail(1)
        phase = message_of(lines[0])[:PHASE_CHARACTERS] if lines else ""
        return self._make_probe(
            child, alive=True, ready=health.ready, detail=health.detail, phase=phase
        )

    def _make_probe(
        self, child: Child, *, alive: bool, ready: bool | None, detail: str, phase: str = ""
    ) -> Probe:
        pool, model = child.spec.pool, child.model
        length = None if model is None else model.max_model_len_tokens
        return Probe(
            alive=alive,
            ready=ready,
            detail=detail,
            phase=phase,
            url=child.url,
            served_model=None if model is None else model.name,
            max_model_len_tokens=length or pool.max_model_len_tokens,
            pid=None if child.process is None else child.process.pid,
            gpus=child.placement.gpus,
            cpus=child.placement.cpus,
        )

    def _ending(self, child: Child, status: int) -> str:
        """How a process ended, with the last lines it wrote."""
        how = f"exited with status {status}"
        if status < 0:
            with contextlib.suppress(ValueError):
                how = f"was ended by {signal.Signals(-status).name}"
        lines = child.log.tail(self._settings.log_tail_lines)
        said = "; it wrote nothing" if not lines else "; its last lines:\n" + "\n".join(lines)
        return f"the engine {how} (log: {child.log.path}){said}"

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """SIGTERM to all processes of a replica, SIGKILL after ``grace_s``."""
        child = self._children.get(replica_id)
        if child is not None:
            async with child.lock:
                await self._end(child, grace_s=grace_s)

    async def _end(self, child: Child, *, grace_s: float) -> None:
        process = child.process
        if child.ended:
            return
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()  # A gate that has not opened ends by itself.
            if child.family is None:
                process.kill()
                await asyncio.to_thread(self._registry.remove, child.spec.id)
            else:
                await child.family.end(grace_s=grace_s, sleep=self._sleep, reap=process.poll)
            await asyncio.to_thread(process.wait)
        child.ended = True
        del self._children[child.spec.id]

    async def sleep(self, replica_id: str, level: int) -> None:
        """Ask the engine to sleep (vLLM's ``/sleep``; it needs ``--enable-sleep-mode``)."""
        child = self._find(replica_id)
        timeout_s = self._settings.call_timeout_s
        await self._client.post(f"{child.url}/sleep?level={level}", {}, timeout_s=timeout_s)

    async def wake(self, replica_id: str) -> None:
        """Ask the engine to wake (vLLM's ``/wake_up``)."""
        child = self._find(replica_id)
        timeout_s = self._settings.call_timeout_s
        await self._client.post(f"{child.url}/wake_up", {}, timeout_s=timeout_s)

    def _find(self, replica_id: str) -> Child:
        child = self._children.get(replica_id)
        if child is None:
            raise BackendError(f"{replica_id} has no process")
        return child

    async def adopt(self) -> list[Leftover]:
        """Own the state directory, and end the processes its last owner left running."""
        grace_s = self._settings.terminate_s
        return await end_leftovers(self._registry, grace_s=grace_s, sleep=self._sleep)

    async def _keep(self) -> None:
        """Rotate logs, and keep the record of each replica's processes up to date."""
        while True:
            await self._sleep(KEEP_S)
            if not self._children:
                continue
            # A full disk, say, must not end an engine: the next look tries again.
            with contextlib.suppress(OSError):
                stats = await asyncio.to_thread(list_stats)
                for child in [one for one in self._children.values() if not one.lock.locked()]:
                    async with child.lock:
                        await asyncio.to_thread(self._keep_one, child, stats)

    def _keep_one(self, child: Child, stats: Sequence[ProcessStat]) -> None:
        if child.family is not None and not child.ended:
            child.family.refresh(stats)
        child.log.rotate()

    async def close(self) -> None:
        """End all replicas, at once, within ``terminate_s`` and a little."""
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None
        grace_s = self._settings.terminate_s
        ids = list(self._children)
        results = await asyncio.gather(
            *(self.stop(one, grace_s=grace_s) for one in ids), return_exceptions=True
        )
        await self._client.close()
        self._registry.release()
        errors = [one for one in results if isinstance(one, Exception)]
        if errors:
            raise errors[0]


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await work that cannot be interrupted; a cancellation is raised when it has ended."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
