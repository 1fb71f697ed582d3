"""Composes what keeps models warm: cache, page holder, standbys, and the measured wake times."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoscaler.backends.process.backend import ProcessBackend
from autoscaler.settings import PoolSettings
from autoscaler.tiers.preparer import NodePreparer, Unpack
from autoscaler.tiers.wake_times import WakeTimes
from gateway.compose.cache import prewarm_behind
from gateway.compose.engines import plain_command
from gateway.compose.preparation import make_transform
from gateway.settings.schema import Settings
from loaders.engines.vllm.compile_cache import CompileCache
from modelcache.pagecache import residency
from modelcache.ports import CachedModel, IsCancelled, OnProgress
from modelcache.refs import parse_ref
from modelcache.types import FileRange, NotFound

if TYPE_CHECKING:
    from gateway.compose.cache import NodeCache
    from modelcache.pagecache.holder import PageHolder

WAKE_TIMES = "wake_times.json"


def make_preparer(
    settings: Settings,
    backend: ProcessBackend,
    node: NodeCache,
    page_holder: PageHolder | None,
    compiled: CompileCache | None,
) -> NodePreparer:
    """The preparer of this node. Nothing is read, held or started yet."""
    return NodePreparer(
        cache=node.cache,
        page_holder=page_holder,
        standbys=backend if settings.loaders.fork_server else None,
        prewarm=prewarm,
        prewarm_behind=prewarm_behind,
        transform=make_transform(settings, node.cache, os.environ)
        if settings.modelcache.steps
        else None,
        unpack=None if compiled is None else make_unpack(settings, compiled),
    )


def make_unpack(settings: Settings, compiled: CompileCache) -> Unpack:
    """Unpacks the compiled artefacts that models bring for their engines."""

    def unpack(pool: PoolSettings, model: Path) -> None:
        with contextlib.suppress(ValueError):  # settings that cannot be run: the start says so
            here = pool.model_copy(update={"model": str(model)})
            compiled.bring(plain_command(here, settings.loaders), model, pool.env)

    return unpack


def make_wake_times(settings: Settings) -> WakeTimes:
    """The wake times measured here so far."""
    times = WakeTimes(
        node=socket.gethostname(),
        path=settings.state_dir.absolute() / WAKE_TIMES,
        samples=settings.autoscaler.wake_samples,
    )
    times.load()
    return times


def prewarm(files: Sequence[FileRange], on_progress: OnProgress, cancelled: IsCancelled) -> object:
    """Read files into the page cache for a start, at full speed."""
    return residency.prewarm(files, on_progress=on_progress, cancelled=cancelled)


def locate(
    pool: PoolSettings,
    settings: Settings,
    environ: Mapping[str, str],
    on_progress: OnProgress = lambda progress: None,
) -> str:
    """Where a pool's model is on this disk as its engines open it: after its preparation steps,
    which are run if they were not. Its name where engines fetch it themselves. Raises
    ``NotFound``."""
    from gateway.compose.cache import open_cache

    model = pool.model or pool.name
    node = open_cache(settings, environ)
    try:
        if "://" in model:
            ref = parse_ref(model)
            found = node.cache.find(ref.url, ref.revision)
            if found is None:
                raise NotFound(f"{ref.url} is not on this disk: `tidegate model preload {ref.url}`")
        elif Path(model).is_dir():
            found = CachedModel.in_place(Path(model))
        else:
            return model
        transform = make_transform(settings, node.cache, environ)
        with transform(model, found, "a look", on_progress, lambda: False) as made:
            return str(made.path)
    finally:
        node.close()
