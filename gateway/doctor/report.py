"""``tidegate doctor``: what this machine has, what is missing, what to do about it.

``diagnose`` reads settings and asks a ``Machine``; it decides only what an answer means.
Every check says what was found, also when it is well, and every one that is not says what to do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from autoscaler.settings import PoolSettings
from autoscaler.types import GpuCapacity
from gateway.compose.process import child_environ
from gateway.doctor.checks import Check, Status, diagnose_cache, fail, ok, warn
from gateway.doctor.machine import Machine
from gateway.settings.schema import Settings
from gateway.terminal import count, size
from loaders.engines.base import engine_of
from loaders.engines.vllm.engine import EngineInstall

OLDEST, NEWEST = (3, 11), (3, 13)
GIB = 1 << 30
ENGINE_MEMORY_BYTES = 3 * GIB
"""What vLLM's CPU build takes beside weights and KV cache: three processes with torch in each."""
MIN_DISK_BYTES = 2 * GIB
FILES_BESIDE_CONNECTIONS = 512
"""Open files of a worker that are no connections: listeners, logs, shared memory, libraries."""


def run_doctor(settings: Settings, *, measure: bool = True) -> list[Check]:
    """Look at this machine. Takes as long as importing vLLM does, some ten seconds; with
    ``measure`` three times that, for what is started and timed."""
    machine = Machine(child_environ(settings, os.environ))
    checks = diagnose(settings, machine)
    engine = next((check for check in checks if check.name == "engine"), None)
    device = None
    if engine is not None and engine.status is not Status.FAIL:
        install = machine.install(_path(settings.loaders.engine_python))
        device = install.device if install is not None else None
    return [*checks, *diagnose_cache(settings, machine, device=device, measure=measure)]


def diagnose(settings: Settings, machine: Machine) -> list[Check]:
    """What the answers of ``machine`` mean for these settings, in the order of a start."""
    agent = machine.agent(settings.state_dir)
    if agent is not None and machine.owner(settings.state_dir) is None:
        return _diagnose_agent(settings, machine, agent)
    processes = [pool for pool in settings.pools if pool.backend == "process"]
    installed = [pool for pool in processes if engine_of(pool.engine).program(settings.loaders)]
    gpus = machine.gpus()
    install = machine.install(_path(settings.loaders.engine_python)) if installed else None
    checks = [
        _python(machine),
        _system(machine),
        _cores(settings, machine, processes),
        _memory(settings, machine, installed, install),
        _disk(settings, machine),
        _gpus(processes, gpus),
        _data_path(machine),
    ]
    if installed:
        checks += _engine(settings, machine, install, gpus)
    for pool in settings.pools:
        checks += _pool(pool, settings, machine, gpus, install)
    checks += _listeners(settings, machine)
    checks += [_open_files(settings, machine), _state(settings, machine)]
    checks += _tls(settings, machine)
    return checks


def _diagnose_agent(settings: Settings, machine: Machine, pid: int) -> list[Check]:
    """Of a node where a cache agent runs and no gateway; its pools are ignored."""
    holder = f"the cache agent that runs here (pid {pid})"
    text = f"a cache agent runs here (pid {pid}): engine, pools and API port are not looked at"
    gateway = settings.gateway
    return [
        _python(machine),
        _system(machine),
        ok("agent", text),
        _port("admin port", gateway.admin_host, gateway.admin_port, machine, holder),
        _state(settings, machine),
    ]


def _python(machine: Machine) -> Check:
    version = machine.python()
    text = ".".join(map(str, version))
    if OLDEST <= version[:2] <= NEWEST:
        return ok("python", text)
    return fail("python", text, "use Python 3.11, 3.12 or 3.13")


def _system(machine: Machine) -> Check:
    system, release, processor = machine.system()
    text = f"{system} {release} on {processor}"
    if system != "Linux":
        return fail("system", text, "Tidegate runs on Linux")
    if not machine.shares_ports():
        return fail(
            "system",
            f"{text}; two sockets cannot share a port",
            "SO_REUSEPORT is needed: this sandbox or kernel forbids it",
        )
    return ok("system", text)


def _cores(settings: Settings, machine: Machine, processes: Sequence[PoolSettings]) -> Check:
    cores, quota = machine.cores()
    text = f"{cores} usable"
    if quota is not None and quota < cores:
        text += f", {quota:g} of them paid for by this container's quota"
    usable = min(float(cores), quota) if quota is not None else float(cores)
    if usable < 2:
        return warn(
            "cpu",
            text,
            "gateway and engine share one core: answers come slowly, also under little load",
        )
    pinned = sum(pool.max_replicas * (pool.process.cpus_per_replica or 0) for pool in processes)
    if pinned > cores:
        return warn(
            "cpu",
            f"{text}, and the pools at their largest pin {pinned}",
            "lower cpus_per_replica or max_replicas, or cores will be shared",
        )
    if settings.gateway.workers > cores:
        return warn(
            "cpu",
            f"{text}, and gateway.workers is {settings.gateway.workers}",
            "more workers than cores only take turns; 0 is one per core",
        )
    return ok("cpu", text)


def _memory(
    settings: Settings,
    machine: Machine,
    installed: Sequence[PoolSettings],
    install: EngineInstall | None,
) -> Check:
    total, available = machine.memory_bytes()
    text = f"{_gib(total)}, {_gib(available)} available"
    if install is None or install.device != "cpu":
        return ok("memory", text)
    needed = 0
    for pool in installed:
        model = machine.model(_path(Path(pool.model or "")))
        weights = model.weights_bytes if model else 0
        cache = settings.loaders.cpu_kv_cache_gib * GIB
        needed += pool.max_replicas * (weights + cache + ENGINE_MEMORY_BYTES)
    text += f"; the engines at their most take about {_gib(needed)}"
    if needed > total:
        return warn(
            "memory",
            text,
            "lower max_replicas or loaders.cpu_kv_cache_gib, or take a smaller model",
        )
    if needed > available and machine.owner(settings.state_dir) is None:
        return warn("memory", text, "end something that takes memory, or expect it to be killed")
    return ok("memory", text)


def _disk(settings: Settings, machine: Machine) -> Check:
    free = machine.disk_free_bytes(settings.state_dir)
    if free is None:
        return warn("disk", "free space is not known", f"look at {settings.state_dir}")
    kept = settings.autoscaler
    logs = kept.log_bytes * kept.log_files * kept.log_replicas * max(1, len(settings.pools))
    text = f"{size(free)} free at {settings.state_dir}; logs take {size(logs)} at most"
    if free < min(MIN_DISK_BYTES, logs):
        return warn("disk", text, "free space, or lower autoscaler.log_bytes and log_replicas")
    return ok("disk", text)


def _gpus(processes: Sequence[PoolSettings], gpus: Sequence[GpuCapacity] | None) -> Check:
    if gpus is None:
        return warn(
            "gpu",
            "there is an NVIDIA driver, and it does not answer",
            "run nvidia-smi and read its error; engines on GPUs will not start",
        )
    if not gpus:
        return ok("gpu", "no NVIDIA GPU: engines run on the CPU")
    names = ", ".join(f"{gpu.index}: {gpu.name} {_gib(gpu.memory_bytes)}" for gpu in gpus)
    text = f"{names} (driver {gpus[0].driver})"
    wanting = [pool for pool in processes if engine_of(pool.engine).capabilities.loads_weights]
    if wanting and not any(pool.process.gpus_per_replica for pool in wanting):
        return warn(
            "gpu",
            f"{text}; no pool has gpus_per_replica, so every engine sees all of them",
            "set process.gpus_per_replica = 1 in each pool that needs a GPU of its own",
        )
    return ok("gpu", text)


def _data_path(machine: Machine) -> Check:
    if machine.is_compiled():
        return ok("data path", "compiled")
    return warn(
        "data path",
        "plain Python: right, and about half as fast as compiled",
        "with a C compiler and Python's headers (python3-dev), `make dev` compiles it",
    )


def _engine(
    settings: Settings,
    machine: Machine,
    install: EngineInstall | None,
    gpus: Sequence[GpuCapacity] | None,
) -> Iterator[Check]:
    python = _path(settings.loaders.engine_python)
    if install is None:
        yield fail(
            "engine",
            f"no vLLM beside {python}",
            "`make engine` installs it; loaders.engine_python names another environment; "
            "`--engine simulated` needs none",
        )
        return
    text = f"{install.distribution} {install.version} beside {python}"
    if install.device == "cpu" and machine.has_avx2() is False:
        yield fail(
            "engine",
            f"{text} needs a processor with AVX2, and this one has none",
            "use `--engine simulated`, or a static pool of engines that run elsewhere",
        )
        return
    device, problem = machine.engine_device(python)
    if device is None:
        yield fail("engine", f"{text} cannot be imported: {problem}", "`make clean-engine engine`")
    elif install.device == "cuda" and device != "cuda":
        yield fail(
            "engine",
            f"{text} is the GPU build and finds no GPU (device {device!r})",
            "TIDEGATE_ENGINE=cpu make clean-engine engine installs the CPU build",
        )
    elif gpus and install.device == "cpu":
        yield warn(
            "engine",
            f"{text} is the CPU build, and there is a GPU",
            "`make clean-engine engine` installs the GPU build",
        )
    else:
        yield ok("engine", f"{text}, computes on {device}")


def _pool(
    pool: PoolSettings,
    settings: Settings,
    machine: Machine,
    gpus: Sequence[GpuCapacity] | None,
    install: EngineInstall | None,
) -> Iterator[Check]:
    name = f"pool {pool.name}"
    if pool.backend == "static":
        yield from _static_pool(name, pool, machine)
        return
    if pool.backend == "kubernetes":
        workload = pool.kubernetes
        place = f" in {workload.namespace}" if workload.namespace else ""
        yield ok(name, f"{workload.kind} {workload.name}{place}, scaled by {workload.scaled_by}")
        return
    engine = engine_of(pool.engine)
    if not engine.capabilities.loads_weights:
        yield ok(name, f"{engine.name} engine, no model behind it")
        return
    yield from _pool_gpus(name, pool, gpus)
    device = "CPU" if install is not None and install.device == "cpu" else "GPU"
    used = f"{pool.min_replicas} to {count(pool.max_replicas, 'replica')} on {device}"
    given = pool.model or ""
    model = machine.model(_path(Path(given)))
    if model is None and given.startswith((".", "/", "~")):
        yield fail(name, f"there is no directory {given}", "`make engine` makes the default model")
    elif model is None and "://" in given:
        yield ok(name, f"{used}; {given} is fetched into the model cache by the first request")
    elif model is None:
        yield ok(name, f"{used}; {given} is a name, which the engine fetches at its first start")
    elif model.damage:
        advice = "`make engine` makes it again" if model.verified else "fetch the model again"
        yield fail(name, f"{given}: {'; '.join(model.damage[:3])}", advice)
    else:
        state = "every byte verified" if model.verified else "not verified, it has no manifest"
        yield ok(name, f"{used}; {given}, {_gib(model.weights_bytes)} of weights, {state}")
    if device == "CPU" and pool.max_replicas > 1 and not pool.process.cpus_per_replica:
        binding = settings.loaders.cpu_bind
        if binding == "auto":
            yield warn(
                name,
                "several replicas on the CPU, none pinned: each would choose the same cores",
                'set process.cpus_per_replica, or loaders.cpu_bind = "nobind"',
            )


def _pool_gpus(
    name: str, pool: PoolSettings, gpus: Sequence[GpuCapacity] | None
) -> Iterator[Check]:
    wanted = pool.process
    if not wanted.gpus_per_replica:
        return
    there = {gpu.index for gpu in gpus or ()}
    missing = [index for index in wanted.gpus if index not in there]
    usable = len(set(wanted.gpus) & there) if wanted.gpus else len(there)
    if missing:
        which = ", ".join(map(str, missing))
        yield fail(name, f"gpus names {which}, which is not there", "correct process.gpus")
    elif usable < wanted.gpus_per_replica:
        yield fail(
            name,
            f"a replica needs {count(wanted.gpus_per_replica, 'GPU')} and {usable} can be used",
            "lower gpus_per_replica (0 for the CPU)",
        )
    elif wanted.gpu_memory_bytes is None and usable < wanted.gpus_per_replica * pool.max_replicas:
        fit = usable // wanted.gpus_per_replica
        yield warn(
            name,
            f"max_replicas is {pool.max_replicas} and the GPUs are enough for {fit}",
            "lower max_replicas, or share GPUs with gpu_memory_bytes",
        )


def _static_pool(name: str, pool: PoolSettings, machine: Machine) -> Iterator[Check]:
    closed = []
    for url in pool.static.urls:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        problem = machine.can_connect(parts.hostname or "", port)
        if problem is not None:
            closed.append(f"{url} ({problem})")
    text = f"{count(len(pool.static.urls), 'externally managed server')}"
    if not closed:
        all_do = "it accepts" if len(pool.static.urls) == 1 else "all of them accept"
        yield ok(name, f"{text}, {all_do} connections")
    else:
        found = f"{text}; no connection to {', '.join(closed[:3])}"
        yield warn(name, found, "start them or correct urls; requests go to the others meanwhile")


def _listeners(settings: Settings, machine: Machine) -> Iterator[Check]:
    owner = machine.owner(settings.state_dir)
    holder = None if owner is None else f"the Tidegate that runs here (pid {owner})"
    gateway = settings.gateway
    yield _port("port", gateway.host, gateway.port, machine, holder)
    yield _port("admin port", gateway.admin_host, gateway.admin_port, machine, holder)


def _port(name: str, host: str, port: int, machine: Machine, holder: str | None) -> Check:
    """A listener's port; ``holder`` is the program that may have it already."""
    if port == 0:
        return ok(name, "chosen by the system at start")
    problem = machine.can_listen(host, port)
    if problem is None:
        return ok(name, f"{host}:{port} is free")
    if holder is not None:
        return ok(name, f"{host}:{port} is held by {holder}")
    flag = "--port" if name == "port" else "--admin-port"
    return fail(name, problem, f"free it, or choose another with {flag}")


def _open_files(settings: Settings, machine: Machine) -> Check:
    soft, hard = machine.open_files()
    connections = settings.gateway.max_connections
    needed = 2 * connections + FILES_BESIDE_CONNECTIONS
    text = f"{soft} may be open, {needed} are wanted for {connections} connections"
    if soft >= needed:
        return ok("open files", text)
    how = f"`ulimit -n {needed}` before the start"
    if hard < needed:
        how = f"raise the hard limit ({hard}) for this user or service"
    return warn("open files", text, f"{how}, or lower gateway.max_connections")


def _state(settings: Settings, machine: Machine) -> Check:
    problem = machine.can_write(settings.state_dir)
    if problem is None:
        return ok("state", f"{settings.state_dir} can be written")
    return fail(
        "state", f"{settings.state_dir}: {problem}", "set state_dir to a directory of yours"
    )


def _tls(settings: Settings, machine: Machine) -> Iterator[Check]:
    if settings.gateway.tls_certificate is None:
        return
    found = machine.bad_tls(settings)
    for path, why in found:
        yield fail("tls", f"{path}: {why}", "name PEM files that this user can read")
    if not found:
        yield ok("tls", f"{settings.gateway.tls_certificate} can be used")


def _path(path: Path) -> Path:
    return path.expanduser()


def _gib(size_bytes: int | None) -> str:
    return "?" if size_bytes is None else f"{size_bytes / GIB:.1f} GiB"
