"""What is run for a replica: an engine's command line, its environment, and what is kept for it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

from autoscaler.backends.base import Placement, ReplicaSpec
from autoscaler.backends.process.backend import ProcessBackend
from autoscaler.backends.process.fork_server import ForkPlan
from autoscaler.backends.process.gpus import list_gpus
from autoscaler.backends.process.replica import make_env
from autoscaler.policy.placement import GpuCapacity
from autoscaler.settings import PoolSettings
from gateway.admin.schema import ForkServerEntry
from gateway.compose.bundles import Bundles
from gateway.compose.cache import cache_dir
from gateway.settings.schema import Settings
from loaders.engines.vllm.command import (
    EngineCommand,
    find_install,
    simulated_command,
    vllm_command,
)
from loaders.settings import LoaderSettings

SLEEP_FLAG = "--enable-sleep-mode"


def engine_command(
    spec: ReplicaSpec,
    placement: Placement,
    loaders: LoaderSettings,
    bundles: Bundles | None = None,
    gpus: Callable[[], Sequence[GpuCapacity] | None] | None = None,
) -> EngineCommand:
    """The command line of a replica. Raises ``ValueError`` for settings that cannot be run.
    ``gpus`` tells the GPUs of this machine; without, they are looked for."""
    pool = spec.pool
    model = pool.model or pool.name
    if pool.engine == "simulated":
        command = simulated_command(
            model=pool.name,
            host=placement.host,
            port=placement.port,
            args=pool.engine_args,
            max_model_len_tokens=pool.max_model_len_tokens,
        )
    else:
        sleeps = may_sleep(pool, loaders)
        command = vllm_command(
            python=loaders.engine_python,
            model=model,
            served_model=pool.name,
            host=placement.host,
            port=placement.port,
            args=(SLEEP_FLAG, *pool.engine_args) if sleeps else pool.engine_args,
            gpus=placement.gpus,
            cpus=placement.cpus,
            max_model_len_tokens=pool.max_model_len_tokens,
            gpu_memory_fraction=gpu_memory_fraction(pool, gpus),
            settings=loaders,
        )
        if sleeps:
            command.env["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no /sleep
        if bundles is not None:
            command.env.update(bundles.env(command, model, pool.env))
    return EngineCommand(argv=command.argv, env={**command.env, **pool.env})


def gpu_memory_fraction(
    pool: PoolSettings, gpus: Callable[[], Sequence[GpuCapacity] | None] | None = None
) -> float | None:
    """The share of a GPU's memory that a replica may take, where its pool names bytes; ``None``
    leaves it to vLLM. Of GPUs of several sizes the smallest counts."""
    if pool.gpu_memory_bytes is None:
        return None
    sizes = [one.memory_bytes for one in (gpus or list_gpus)() or () if one.memory_bytes]
    if not sizes:
        return None
    return min(1.0, pool.gpu_memory_bytes / min(sizes))


def may_sleep(pool: PoolSettings, loaders: LoaderSettings) -> bool:
    """Whether a vLLM is to be able to sleep: its pool wants that, and its build can."""
    if pool.tiers.sleeping_s == 0 or SLEEP_FLAG in pool.engine_args:
        return False
    install = find_install(loaders.engine_python)
    return install is not None and install.device == "cuda"


def fork_plan(
    settings: Settings,
    environ: Mapping[str, str],
    bundles: Bundles | None = None,
    find: Callable[[str], str | None] = lambda model: None,
) -> ForkPlan | None:
    """What the fork server imports, for the first pool that has vLLM; ``None`` without one, or
    where the settings want none. Pools whose environment differs are started the plain way.
    ``find`` tells where a model with a URL is on this disk."""
    pools = [pool for pool in settings.pools if pool.engine == "vllm"]
    if not pools or not settings.loaders.fork_server:
        return None
    install = find_install(settings.loaders.engine_python)
    spec = ReplicaSpec(id="fork-server", pool=pools[0])
    placement = Placement(host="127.0.0.1", port=0)
    try:
        command = engine_command(spec, placement, settings.loaders, bundles)
    except ValueError:
        return None  # each start says so
    return ForkPlan(
        python=settings.loaders.engine_python,
        env=make_env(environ, command, spec, placement),
        device="cuda" if install is None else install.device,
        models=tuple(find(pool.model) or pool.model for pool in pools if pool.model),
        backoff_s=settings.autoscaler.backoff_initial_s,
        backoff_max_s=settings.autoscaler.backoff_max_s,
        import_timeout_s=settings.loaders.fork_import_timeout_s,
        wait_s=settings.loaders.fork_wait_s,
        timeout_s=settings.loaders.fork_timeout_s,
    )


def describe_forks(backend: ProcessBackend) -> ForkServerEntry | None:
    """How the fork server is, with the engines that stand by; ``None`` without."""
    server = backend.fork_server()
    if server is None:
        return None
    return ForkServerEntry.model_validate({**asdict(server), "standbys": backend.standbys()})


def make_bundles(settings: Settings) -> Bundles | None:
    """Where this node keeps what engines compile and measure; ``None`` where that is not wanted."""
    loaders = settings.loaders
    if not loaders.keep_compiled or not any(pool.engine == "vllm" for pool in settings.pools):
        return None
    return Bundles(
        cache_dir(settings) / "bundles",
        python=loaders.engine_python,
        quota_bytes=loaders.compiled_quota_bytes,
        gpus=_gpu_kinds,
    )


def _gpu_kinds() -> tuple[tuple[str, str], ...] | None:
    found = list_gpus()
    return None if found is None else tuple((one.name, one.driver) for one in found)


def plain_command(pool: PoolSettings, loaders: LoaderSettings) -> EngineCommand:
    """A pool's command as it is before anything is assigned: for what is the same for all its
    replicas. Raises ``ValueError`` as ``engine_command`` does."""
    gpus = tuple(range(pool.gpus_per_replica))
    spec = ReplicaSpec(id=pool.name, pool=pool)
    return engine_command(spec, Placement(host="127.0.0.1", port=0, gpus=gpus), loaders)


def start_digest(pool: PoolSettings, loaders: LoaderSettings) -> str:
    """A digest of all that a pool's replicas are started with, whatever they are assigned. Raises
    ``ValueError`` as ``engine_command`` does."""
    seen: list[object] = [pool.backend, pool.name, pool.health_path]
    if pool.backend == "static":
        seen += [pool.model, pool.max_model_len_tokens]
        seen += [pool.api_key_env, sorted(pool.headers.items())]
    else:
        gpus = tuple(range(pool.gpus_per_replica))
        spec = ReplicaSpec(id=pool.name, pool=pool)
        placement = Placement(host="127.0.0.1", port=0, gpus=gpus)
        command = engine_command(spec, placement, loaders, gpus=lambda: None)
        seen += [list(command.argv), sorted(command.env.items()), sorted(pool.env.items())]
        seen += [pool.engine, pool.gpus, pool.gpu_memory_bytes, pool.cpus_per_replica]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
