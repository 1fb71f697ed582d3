"""What is run for a replica: an engine's command line, its environment, and what is kept for it."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from autoscaler.backends.base import ReplicaSpec
from autoscaler.backends.process.backend import ProcessBackend
from autoscaler.backends.process.fork_server import ForkPlan, identity
from autoscaler.backends.process.placement import gpu_memory_fraction, list_gpus
from autoscaler.backends.process.replica import make_env
from autoscaler.settings import PoolSettings
from autoscaler.tiers.preparer import Unpack
from gateway.compose.cache import cache_dir
from gateway.compose.process import child_environ
from gateway.settings.schema import Settings
from loaders.engines.base import EngineCommand, EngineOptions, Placement, engine_of
from loaders.engines.vllm.compile_cache import CompileCache
from loaders.engines.vllm.engine import find_install
from loaders.settings import LoaderSettings

if TYPE_CHECKING:
    from gateway.admin.schema import ForkServerEntry


def engine_command(
    spec: ReplicaSpec,
    placement: Placement,
    loaders: LoaderSettings,
    compiled: CompileCache | None = None,
) -> EngineCommand:
    """The command line of a replica, without its pool's ``env``. Raises ``ValueError`` for settings
    that cannot be run."""
    pool, engine = spec.pool, engine_of(spec.pool.engine)
    options = EngineOptions(
        model=pool.model or pool.name,
        served_model=pool.name,
        args=pool.engine_args,
        max_model_len_tokens=pool.max_model_len_tokens,
        sleep=pool.tiers.sleeps,
    )
    command = engine.command(options, placement, loaders)
    if compiled is not None and engine.capabilities.compile_cache:
        command.env.update(compiled.env(command, options.model, pool.env))
    return command


def fork_plan(
    settings: Settings,
    environ: Mapping[str, str],
    compiled: CompileCache | None,
    find: Callable[[str], str | None],
) -> ForkPlan | None:
    """What the fork server imports, for the first pool of this machine whose engine can be forked;
    ``None`` without one, or where the settings want none. Pools whose environment differs are
    started the plain way. ``find`` tells where a model with a URL is on this disk."""
    pools = [
        pool
        for pool in settings.pools
        if pool.backend == "process" and engine_of(pool.engine).capabilities.fork
    ]
    if not pools or not settings.loaders.fork_server:
        return None
    install = find_install(settings.loaders.engine_python)
    spec = ReplicaSpec(id="fork-server", pool=pools[0])
    placement = Placement(host="127.0.0.1", port=0)
    try:
        command = engine_command(spec, placement, settings.loaders, compiled)
    except ValueError:
        return None  # each start says so
    return ForkPlan(
        python=settings.loaders.engine_python,
        env=make_env(child_environ(settings, environ), command, spec, placement),
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
    from gateway.admin.schema import ForkServerEntry

    server = backend.fork_server()
    if server is None:
        return None
    return ForkServerEntry.model_validate({**asdict(server), "standbys": backend.standbys()})


def make_compile_cache(settings: Settings) -> CompileCache | None:
    """Where this node keeps what engines compile and measure; ``None`` where that is not wanted."""
    loaders = settings.loaders
    if not loaders.keep_compiled:
        return None
    return CompileCache(
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
    fraction = None
    if pool.process.gpu_memory_bytes is not None:
        fraction = gpu_memory_fraction(pool.process, list_gpus())
    placement = Placement(
        host="127.0.0.1",
        port=0,
        gpus=tuple(range(pool.process.gpus_per_replica)),
        gpu_memory_fraction=fraction,
    )
    return engine_command(ReplicaSpec(id=pool.name, pool=pool), placement, loaders)


def make_unpack(settings: Settings, compiled: CompileCache) -> Unpack:
    """Unpacks the compiled artefacts that models bring for their engines, where the settings name
    them."""

    def unpack(pool: PoolSettings, model: Path) -> None:
        with contextlib.suppress(ValueError):  # settings that cannot be run: the start says so
            here = pool.model_copy(update={"model": str(model)})
            trusted = settings.modelcache.bundles_for(pool.model or pool.name)
            command = plain_command(here, settings.loaders)
            compiled.bring(command, model, pool.env, trusted=trusted)

    return unpack


def start_digest(pool: PoolSettings, loaders: LoaderSettings) -> str:
    """A digest of all that a pool's replicas are started with, whatever they are assigned. Raises
    ``ValueError`` as ``engine_command`` does."""
    seen: list[object] = [pool.backend, pool.name]
    if pool.backend == "static":
        seen += [pool.model, pool.max_model_len_tokens]
        seen.append(pool.static.model_dump(mode="json", exclude={"urls"}))
    elif pool.backend == "kubernetes":
        # Which pods there are is the workload's own: it replaces them when its template changes.
        given = pool.kubernetes
        seen += [pool.backend_key, given.namespace, given.api_version, given.kind, given.name]
        seen.append(given.worker_group)
        if given.scaled_by != "tidegate":  # servers that are only watched, from now on so
            seen += [given.model_dump(mode="json"), pool.max_model_len_tokens]
    else:
        gpus = tuple(range(pool.process.gpus_per_replica))
        spec = ReplicaSpec(id=pool.name, pool=pool)
        placement = Placement(host="127.0.0.1", port=0, gpus=gpus)
        command = engine_command(spec, placement, loaders)
        seen += [list(command.argv), sorted(command.env.items()), sorted(pool.env.items())]
        packages = identity(Path(command.argv[0]))
        seen += [pool.engine, packages, pool.process.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()
