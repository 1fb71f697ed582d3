"""Engines as child processes of Tidegate, on this machine.

Each runs below a guard (``guard``), in a session of its own, and only once it is on record. After
a crash or ``kill -9`` of the control process the next one takes over the engines on record, and
ends those it has no use for; when none comes, each guard ends its engine. So no engine is ever
without an owner for longer than ``keep_engines_s``.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import secrets
import socket
import subprocess
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from autoscaler.backends.base import (
    AdoptedReplica,
    BackendError,
    MakeCommand,
    Probe,
    ReplicaSpec,
    StillRunning,
    Unsupported,
)
from autoscaler.backends.process.family import (
    Family,
    ProcessRecord,
    ProcessRegistry,
    describe_process,
    trust,
)
from autoscaler.backends.process.fork_server import RECORD_ID as FORK_SERVER
from autoscaler.backends.process.fork_server import ForkPlan, Forks, ForkServerStatus
from autoscaler.backends.process.guard import MARK
from autoscaler.backends.process.logs import ReplicaLog, prune
from autoscaler.backends.process.placement import (
    HOST,
    gpu_memory_fraction,
    place,
    read_gpu_memory,
    reserve_port,
)
from autoscaler.backends.process.procs import (
    KILLED_S,
    ProcessId,
    ProcessStat,
    boot_id,
    carries,
    has_ended,
    list_stats,
    reap_orphans,
    sum_pss_bytes,
)
from autoscaler.backends.process.replica import (
    AdoptedProcess,
    Process,
    ReplicaProcess,
    Standby,
    describe_engine,
    describe_standby,
    find_engine,
    make_env,
    make_probe,
    open_gate,
    probe_ended,
    secrets_of,
    spawn_plainly,
    to_the_end,
)
from autoscaler.policy.packing import HOST as HOST_MEMORY
from autoscaler.policy.packing import Device, gpu_devices
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.types import Decision, GpuCapacity, PoolDemand
from loaders.engines.base import (
    DEFAULT_HEALTH_PATH,
    EngineCommand,
    Placement,
    choose_model,
    engine_of,
    list_names,
)
from loaders.engines.client import EngineClient
from loaders.engines.vllm.forkserver.client import ForkedProcess, ForkError, ServerLost

LOG = logging.getLogger("tidegate.autoscaler")
Result = TypeVar("Result")
KEEP_S = 1.0
ORPHAN_S = 30.0
DRIVER_THREADS = 2
PORT_HELD_S = 30.0
"""How long the port of a replica that has ended stays ours: longer than any worker may take to hear
of its end."""


class ProcessBackend:
    """Backend for pools with ``backend = "process"``.

    ``command`` makes the command line of a replica, ``environ`` tells what its environment is made
    of; ``list_gpus`` tells the GPUs of this machine
    (``None``: unknown) and is asked when a replica that needs one is started. With a
    ``fork_plan`` vLLM is forked rather than started, wherever that is possible. ``on_news`` is
    told the replica that is worth a look now.
    """

    owns_replicas = True
    outlives_us = False

    def __init__(
        self,
        *,
        state_dir: Path,
        settings: AutoscalerSettings,
        command: MakeCommand,
        list_gpus: Callable[[], Sequence[GpuCapacity] | None] = lambda: None,
        cpus: Sequence[int] | None = None,
        environ: Callable[[], Mapping[str, str]] = lambda: os.environ,
        fork_plan: ForkPlan | None = None,
        on_news: Callable[[str], None] = lambda replica_id: None,
    ) -> None:
        self._settings = settings
        self._command = command
        self._list_gpus = list_gpus
        self._cpus = sorted(os.sched_getaffinity(0)) if cpus is None else list(cpus)
        self._environ = environ
        self._logs = state_dir.absolute() / "logs"
        self._registry = ProcessRegistry(
            state_dir.absolute() / "replicas",
            keep_s=settings.keep_engines_s,
            grace_s=settings.terminate_s,
        )
        self._client = EngineClient(timeout_s=settings.health_timeout_s)
        self._children: dict[str, ReplicaProcess] = {}
        self._standbys: dict[str, ReplicaProcess] = {}
        self._ended_at_s: dict[ProcessId, float] = {}
        """Children that have ended, by when that was seen."""
        self._ports: deque[tuple[float, socket.socket]] = deque()
        """Ports of replicas that have ended, each with when it did."""
        self._drivers = ThreadPoolExecutor(DRIVER_THREADS, thread_name_prefix="tidegate-drivers")
        self._on_news = on_news
        self._gpus: Sequence[GpuCapacity] | None = None
        """The GPUs as they were seen last."""
        self._forks: Forks | None = None
        if fork_plan is not None:
            self._forks = self._make_forks(fork_plan)
        self._upkeep: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None

    def use_fork_plan(self, plan: ForkPlan | None) -> None:
        """Keep a fork server from now on, where there is none yet and the plan is for one."""
        if self._forks is None and plan is not None:
            self._forks = self._make_forks(plan)
            self._forks.start()

    def _make_forks(self, plan: ForkPlan) -> Forks:
        log = self._make_log(self._logs / f"{FORK_SERVER}.log")
        return Forks(plan, registry=self._registry, log=log)

    def set_pools(self, pools: Sequence[PoolSettings]) -> None:
        """Nothing of them is kept."""

    def urls(self, pool: PoolSettings) -> Sequence[str]:
        """Not used: its replicas are started, not found."""
        return ()

    def recommend(self, pool: PoolSettings, decision: Decision, demand: PoolDemand | None) -> None:
        """Not used: its replicas are started."""

    def devices(self) -> tuple[Device, ...]:
        """See ``Backend``. GPUs are known once a replica was placed on one."""
        size = self._settings.host_memory_bytes
        return (
            *gpu_devices(self._gpus or ()),
            *([] if size is None else [Device(name=HOST_MEMORY, memory_bytes=size)]),
        )

    async def measure_memory(self, replica_id: str) -> int | None:
        """See ``Backend``."""
        child = self._children.get(replica_id)
        if child is None or child.family is None:
            return None
        pids = child.family.pids()
        if child.placement.gpus:
            return await self._ask_drivers(read_gpu_memory, pids)
        return await self._registry.run(sum_pss_bytes, pids)

    async def start(self, spec: ReplicaSpec) -> None:
        """Launch a replica's process, or wake the pool's standby. Raises ``NoCapacity`` without a
        free GPU, ``BackendError`` when it cannot be launched."""
        if spec.id in self._children:
            raise BackendError(f"{spec.id} has been started already")
        self._registry.claim()
        standby = self._standbys.get(spec.pool.name)
        if standby is not None:
            async with standby.lock:
                if self._is_standby(standby):  # else another start has taken it
                    if await self._wake_standby(standby, spec):
                        return
                    await self._end(standby, grace_s=0.0)
        await self._start(spec, self._children, spec.id)

    async def _start(
        self, spec: ReplicaSpec, shelf: dict[str, ReplicaProcess], key: str, *, parked: bool = False
    ) -> None:
        if self._ending is not None:
            await asyncio.shield(self._ending)  # what an earlier run left may hold GPUs and ports
        inventory = None
        if spec.pool.process.gpus_per_replica:
            inventory = self._gpus = await self._ask_drivers(self._list_gpus)
        running = list(self._children.values())
        gpus, cpus = place(spec, running, inventory=inventory, cpus=self._cpus)
        fraction = gpu_memory_fraction(spec.pool.process, inventory)
        try:
            reserved = reserve_port()
        except OSError as error:
            raise BackendError(f"{spec.id} was not started: no port is free: {error}") from error
        port: int = reserved.getsockname()[1]
        placement = Placement(
            host=HOST, port=port, gpus=gpus, cpus=cpus, gpu_memory_fraction=fraction
        )
        directory = self._logs / re.sub(r"[^A-Za-z0-9._-]+", "-", spec.pool.name)
        child = ReplicaProcess(
            spec=spec,
            placement=placement,
            port=reserved,
            mark=secrets.token_hex(16),
            log=self._make_log(directory / f"{spec.id}.log", spec),
            command=EngineCommand(argv=()),
        )
        shelf[key] = child  # what it was given is taken from now on
        try:
            async with child.lock:
                try:
                    child.command = await self._ask_drivers(self._command, spec, placement)
                    living = {one.log.path for one in self._all()}
                    await self._registry.run(
                        partial(prune, directory, keep=self._settings.log_replicas, living=living)
                    )
                    await self._launch(child, parked=parked)
                except BaseException:
                    with contextlib.suppress(StillRunning):
                        await self._end(child, grace_s=0.0)
                    raise
        except (OSError, ValueError) as error:
            raise BackendError(f"{spec.id} was not started: {error}") from error
        self._start_upkeep()

    async def _ask_drivers(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do what may take as long as a GPU's driver that hangs, in threads for nothing else."""
        running = asyncio.get_running_loop()
        return await running.run_in_executor(self._drivers, work, *arguments)

    def _start_upkeep(self) -> None:
        if self._upkeep is None:
            self._upkeep = asyncio.create_task(self._keep(), name="process-backend-upkeep")

    def _make_log(self, path: Path, spec: ReplicaSpec | None = None) -> ReplicaLog:
        settings = self._settings
        told = [] if spec is None else list(secrets_of(spec.pool, self._environ()))
        return ReplicaLog(
            path, max_bytes=settings.log_bytes, files=settings.log_files, secrets=told
        )

    def _all(self) -> list[ReplicaProcess]:
        return [*self._children.values(), *self._standbys.values()]

    async def standby(self, spec: ReplicaSpec) -> None:
        """Keep an engine of a pool forked, all but its weights done, for its next replica.

        ``spec`` is that of a replica to come, its model on this disk; its ``id`` names the standby
        until then. Nothing to do where the pool has one that would serve. Raises ``Unsupported``
        without a fork server, and as ``start`` does.
        """
        kept = self._standbys.get(spec.pool.name)
        if kept is not None:
            alive = kept.process is not None and kept.process.poll() is None
            if alive and await self._fits(kept, spec):
                return
            await self.end_standby(spec.pool.name)
        self._registry.claim()
        await self._start(spec, self._standbys, spec.pool.name, parked=True)

    async def end_standby(self, pool: str) -> None:
        """End a pool's standby; nothing to do if it has none."""
        child = self._standbys.get(pool)
        if child is not None:
            async with child.lock:
                if self._is_standby(child):  # else a start has taken it
                    await self._end(child, grace_s=0.0)

    def _is_standby(self, child: ReplicaProcess) -> bool:
        return any(one is child for one in self._standbys.values())

    def standbys(self) -> tuple[Standby, ...]:
        """The standbys that live, with what they cost."""
        found = (describe_standby(child) for child in list(self._standbys.values()))
        return tuple(one for one in found if one is not None)

    def fork_server(self) -> ForkServerStatus | None:
        """How the fork server is; ``None`` where there is to be none."""
        return None if self._forks is None else self._forks.status()

    async def _fits(self, child: ReplicaProcess, spec: ReplicaSpec) -> bool:
        """Whether a standby is what would be started for ``spec`` now, on what is free now."""
        try:
            command = await self._ask_drivers(self._command, spec, child.placement)
        except ValueError:
            return False
        ours, others = child.placement, [one.placement for one in self._children.values()]
        free = not any({*ours.cpus} & {*one.cpus} or {*ours.gpus} & {*one.gpus} for one in others)
        env = make_env(self._environ(), command, spec, ours)
        kept = make_env(self._environ(), child.command, child.spec, ours)
        return free and tuple(command.argv) == tuple(child.command.argv) and env == kept

    async def _wake_standby(self, child: ReplicaProcess, spec: ReplicaSpec) -> bool:
        """Make a pool's standby its replica, under its lock; false if it cannot be."""
        process, family = child.process, child.family
        if not isinstance(process, ForkedProcess) or family is None or child.ended:
            return False
        if process.poll() is not None or not await self._fits(child, spec):
            return False
        log = self._make_log(child.log.path.with_name(f"{spec.id}.log"), spec)
        engine = describe_engine(spec, child.placement, log)
        try:
            await to_the_end(self._registry.run(family.rename, spec.id, engine))
            child.log.path.rename(log.path)
            process.go()
        except OSError as error:
            LOG.info("%s: its standby is of no use: %s", spec.pool.name, error)
            return False
        del self._standbys[spec.pool.name]  # not before: a cancelled start leaves it a standby
        child.spec, child.log = spec, log
        self._children[spec.id] = child
        return True

    async def _launch(self, child: ReplicaProcess, *, parked: bool = False) -> None:
        """Start the gate, put it on record, open it."""
        spec = child.spec
        env = {
            **make_env(self._environ(), child.command, spec, child.placement),
            MARK: child.mark,
        }
        process = child.process = await self._begin(child, env, parked=parked)
        engine = describe_engine(spec, child.placement, child.log)
        record = describe_process(process.pid, replica_id=spec.id, mark=child.mark, engine=engine)
        await to_the_end(self._registry.run(self._registry.write, record))
        child.family = Family(record, self._registry)
        open_gate(process)
        if isinstance(process, ForkedProcess):
            child.pid = process.engine
            asyncio.get_running_loop().add_reader(process.marks, self._hear, child, process.marks)

    async def _begin(
        self, child: ReplicaProcess, env: Mapping[str, str], *, parked: bool
    ) -> subprocess.Popen[bytes] | ForkedProcess:
        """Fork the engine where that is possible, else start it the plain way and keep why."""
        if self._forks is not None and engine_of(child.spec.pool.engine).capabilities.fork:
            output = child.log.open()
            try:
                return await self._forks.fork(
                    child.command, env, child.placement.cpus, child.mark, log=output, parked=parked
                )
            except ForkError as error:
                if parked:
                    kind = BackendError if isinstance(error, ServerLost) else Unsupported
                    raise kind(f"no engine can be kept forked: {error}") from error
                child.plainly = str(error)
                LOG.info("%s is started the plain way: %s", child.spec.id, error)
            finally:
                os.close(output)
        elif parked:
            raise Unsupported("no engine can be kept forked without a fork server")
        return spawn_plainly(child, env, self._registry.directory)

    def _hear(self, child: ReplicaProcess, marks: int) -> None:
        """A forked engine has told something; that it serves is worth a look at once."""
        served = child.serves
        if not child.listen():
            asyncio.get_running_loop().remove_reader(marks)
        if child.serves and not served:
            self._on_news(child.spec.id)

    async def probe(self, replica_id: str) -> Probe:
        """See whether the process lives, and ask the engine whether it is well."""
        child = self._children.get(replica_id)
        if child is None or child.process is None:
            return Probe(alive=False, ready=False, detail="it has no process")
        return await self._probe(child, child.process)

    async def _probe(self, child: ReplicaProcess, process: Process) -> Probe:
        status = process.poll()
        if status is not None:
            return probe_ended(child, status, lines=self._settings.log_tail_lines)
        if not child.proven:
            refusal = await self._registry.run(why_not_ours, child)
            if refusal:  # nothing is sent to what may be another's: no prompt, no key
                phase = child.describe_phase()
                return make_probe(child, alive=True, ready=False, detail=refusal, phase=phase)
            child.proven = True
        pool, engine = child.spec.pool, engine_of(child.spec.pool.engine)
        health = await engine.health(self._client, child.url, {}, DEFAULT_HEALTH_PATH)
        if child.pid is None:
            child.pid = await self._registry.run(find_engine, process.pid)
        if health.ready and child.model is None:
            models = await engine.list_models(self._client, child.url, {})
            child.model = choose_model(models, pool.name, pool.model)
            child.listed = list_names(models)
        phase = "" if health.ready else child.describe_phase()
        return make_probe(child, alive=True, ready=health.ready, detail=health.detail, phase=phase)

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """SIGTERM to all processes of a replica, SIGKILL after ``grace_s``."""
        child = self._children.get(replica_id)
        if child is not None:
            async with child.lock:
                await self._end(child, grace_s=grace_s)

    async def _end(self, child: ReplicaProcess, *, grace_s: float) -> None:
        """End what there is of a replica, under its lock: two that end it would close twice."""
        process = child.process
        if child.ended:
            return
        if process is not None:
            if process.stdin is not None:
                process.stdin.close()  # A gate that has not opened ends by itself.
            seen: set[int] = set()
            if child.family is None:
                process.kill()
                await self._registry.run(self._registry.remove, child.mark)
            else:
                end = child.family.end(grace_s=grace_s, reap=process.poll)
                seen = await end
            if not await has_ended(process.poll, within_s=KILLED_S):
                raise StillRunning(f"{child.spec.id}: process {process.pid} survives SIGKILL")
            if self._forks is not None:
                reap_orphans({process.pid}, seen, await self._registry.run(list_stats))
            if isinstance(process, ForkedProcess):
                asyncio.get_running_loop().remove_reader(process.marks)
            if not isinstance(process, subprocess.Popen):
                process.close()
        child.ended = True
        self._ports.append((asyncio.get_running_loop().time(), child.port))
        for shelf in (self._children, self._standbys):
            for key in [key for key, one in shelf.items() if one is child]:
                del shelf[key]

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        """Own the state directory, take over what is on record and still wanted, end the rest."""
        await self._registry.claim_patiently()
        records = await self._registry.run(self._registry.read)
        found = await asyncio.gather(*(self._take_over(record, wanted) for record in records))
        rest = [record for record, one in zip(records, found, strict=True) if one is None]
        if rest:
            self._ending = asyncio.create_task(self._end_rest(rest), name="leftovers")
        if self._children:
            self._start_upkeep()
        if self._forks is not None:
            self._forks.start()
        return [one for one in found if one is not None]

    async def _take_over(
        self, record: ProcessRecord, wanted: Sequence[ReplicaSpec]
    ) -> AdoptedReplica | None:
        """Make an engine on record ours; ``None`` if it has to be ended."""
        engine = record.engine
        like = next((one for one in wanted if engine and one.pool.name == engine.pool), None)
        try:
            reason = why_not_adopted(
                record,
                like,
                keep_s=self._settings.keep_engines_s,
                boot_id=boot_id(),
                is_ours=await self._registry.run(carries, record.leader, record.variable),
            )
            if engine is None or like is None or reason:
                LOG.info("%s is not taken over: %s", record.replica_id, reason)
                return None
            spec = adopted_spec(record, like)
            with contextlib.ExitStack() as unless_adopted:
                process = AdoptedProcess(record.leader)
                unless_adopted.callback(process.close)
                child = ReplicaProcess(
                    spec=spec,
                    placement=engine.placement,
                    port=unless_adopted.enter_context(reserve_port(engine.placement.port)),
                    mark=record.mark,
                    log=self._make_log(Path(engine.log), spec),
                    command=await self._ask_drivers(self._command, spec, engine.placement),
                    process=process,
                    family=Family(await self._registry.run(trust, record), self._registry),
                )
                probe = await self._look_at_adopted(child, process)
                unless_adopted.pop_all()
        except (OSError, ValueError) as error:
            LOG.info("%s is not taken over: %s", record.replica_id, error)
            return None
        LOG.info("%s is taken over, with its engine (pid %s)", spec.id, probe.pid)
        return AdoptedReplica(spec=spec, probe=probe)

    async def _look_at_adopted(self, child: ReplicaProcess, process: Process) -> Probe:
        """See what an engine that runs already is like; it is our replica then. One that is too
        busy to answer is, too: its health checks go on. Raises ``ValueError`` for one that is gone
        or does not listen."""
        probe = await self._probe(child, process)
        if not (probe.alive and child.proven):
            raise ValueError(probe.detail)
        if child.spec.id in self._children:  # a leftover of an even earlier run has the same id
            raise ValueError("another replica has its id")
        self._children[child.spec.id] = child
        return probe

    async def _end_rest(self, records: Sequence[ProcessRecord]) -> None:
        """End what is on record and was not taken over. A record that cannot be cleared stays, and
        its processes are tried again by the next start."""

        async def end(record: ProcessRecord) -> None:
            grace_s = 0.0 if record.ending else self._settings.terminate_s
            try:
                family = Family(await self._registry.run(trust, record), self._registry)
                pids = await family.end(grace_s=grace_s, reap=lambda: None)
            except (StillRunning, OSError) as error:
                LOG.error("%s, of an earlier run, cannot be ended: %s", record.replica_id, error)
                return
            if pids:
                text = ", ".join(map(str, sorted(pids)))
                LOG.warning("ended what an earlier run left: %s (pids %s)", record.replica_id, text)

        await asyncio.gather(*(end(record) for record in records))

    async def _keep(self) -> None:
        """Rotate logs, and keep the record of each replica's processes up to date."""
        while True:
            await asyncio.sleep(KEEP_S)
            self._free_ports(before_s=asyncio.get_running_loop().time() - PORT_HELD_S)
            if not self._all() and self._forks is None:
                continue
            # A full disk, say, must not end an engine: the next look tries again.
            with contextlib.suppress(OSError):
                if self._forks is not None:
                    await self._registry.run(self._forks.log.rotate)
                stats = await self._registry.run(list_stats)
                if self._forks is not None:
                    leaders = {one.process.pid for one in self._all() if one.process is not None}
                    families = [one.family for one in self._all() if one.family is not None]
                    known = {pid for family in families for pid in family.pids()}
                    reap_orphans(leaders, known, stats)
                    self._reap_left(leaders, stats)
                for child in [one for one in self._all() if not one.lock.locked()]:
                    async with child.lock:
                        await self._registry.run(self._keep_one, child, stats)

    def _reap_left(self, leaders: set[int], stats: Sequence[ProcessStat]) -> None:
        """Let go of what has ended, came to us when its own parent ended, and is of no replica. It
        is told from a child of ours by that: its end was not taken note of for long."""
        now_s, before = asyncio.get_running_loop().time(), self._ended_at_s
        mine = [one.id for one in stats if one.gone and one.parent == os.getpid()]
        self._ended_at_s = {one: before.get(one, now_s) for one in mine if one.pid not in leaders}
        for one, at_s in self._ended_at_s.items():
            if now_s - at_s >= ORPHAN_S:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(one.pid, os.WNOHANG)

    def _free_ports(self, *, before_s: float = math.inf) -> None:
        """Give back the ports of replicas that ended before this time of the event loop."""
        while self._ports and self._ports[0][0] < before_s:
            self._ports.popleft()[1].close()

    def _keep_one(self, child: ReplicaProcess, stats: Sequence[ProcessStat]) -> None:
        if child.family is not None and not child.ended:
            child.family.refresh(stats)
        child.log.rotate()

    async def close(self, *, keep: bool = False) -> None:
        """End all replicas, at once, within ``terminate_s`` and a little; or keep them."""
        if self._upkeep is not None:
            self._upkeep.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._upkeep
            self._upkeep = None
        if self._ending is not None:
            await self._ending
        grace_s = self._settings.terminate_s
        ids = [] if keep else list(self._children)
        results = await asyncio.gather(
            *(self.stop(one, grace_s=grace_s) for one in ids),
            *(self.end_standby(pool) for pool in list(self._standbys)),
            return_exceptions=True,
        )
        for child in self._children.values():
            if isinstance(child.process, ForkedProcess):
                asyncio.get_running_loop().remove_reader(child.process.marks)
        for child in self._all():
            child.port.close()
        self._free_ports()
        self._children.clear()
        if self._forks is not None:
            await self._forks.close()
        await self._client.close()
        self._registry.release()
        errors = [one for one in results if isinstance(one, Exception)]
        if errors:
            raise errors[0]


def why_not_ours(child: ReplicaProcess) -> str:
    """Why nothing may be sent to the port of a replica; empty once what listens there is seen to be
    one of its processes. From then on it stays so: the port is reserved (``reserve_port``)."""
    port = child.placement.port
    try:
        ours = child.family is not None and child.family.listens(port)
    except OSError as error:
        return f"what listens on port {port} cannot be told: {error}"
    if ours is None:
        return f"nothing listens on port {port} yet"
    return "" if ours else f"another process listens on port {port}"


def why_not_adopted(
    record: ProcessRecord,
    wanted: ReplicaSpec | None,
    *,
    keep_s: float,
    boot_id: str,
    is_ours: bool,
) -> str:
    """Why the engine of a record is not taken over; empty if it is, should it be healthy.

    ``wanted`` is what would be started for its pool now, ``None`` without such a pool. ``is_ours``:
    its guard lives and carries its mark.
    """
    engine = record.engine
    if engine is None or record.ending or record.boot_id != boot_id or not is_ours:
        return "it is not an engine that runs"
    if keep_s <= 0:
        return "autoscaler.keep_engines_s is 0"
    if wanted is None:
        return f"there is no pool {engine.pool} any more"
    if not wanted.digest or wanted.digest != engine.digest:
        return f"the settings of {engine.pool} would start another engine now"
    return ""


def adopted_spec(record: ProcessRecord, wanted: ReplicaSpec) -> ReplicaSpec:
    """The replica that a recorded engine is, its model where it was found when it was started."""
    model = wanted.pool.model if record.engine is None else record.engine.model
    pool = wanted.pool.model_copy(update={"model": model})
    return ReplicaSpec(id=record.replica_id, pool=pool, digest=wanted.digest)
