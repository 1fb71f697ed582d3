"""Puts together what keeps models near: cache, pages, engines that stand by; and what was measured.

A part of the composition root, ``gateway.compose.up``, for whoever starts engines here.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoscaler.backends.process.backend import ProcessBackend
from autoscaler.settings import PoolSettings
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.tiers.warmth import Warmth
from autoscaler.tiers.warmth_parts import Bring
from autoscaler.tiers.warmth_places import in_place
from gateway.compose.bundles import Bundles
from gateway.compose.cache import prewarm_behind
from gateway.compose.engines import plain_command
from gateway.compose.preparation import make_transform
from gateway.settings.schema import Settings
from modelcache.pagecache import residency
from modelcache.refs import parse_ref
from modelcache.types import FileRange, NotFound, Progress

if TYPE_CHECKING:
    from gateway.compose.cache import NodeCache
    from modelcache.pagecache.holder import PageKeeper

WAKE_TIMES = "wake_times.json"


def make_warmth(
    settings: Settings,
    backend: ProcessBackend,
    node: NodeCache,
    keeper: PageKeeper | None,
    bundles: Bundles | None,
) -> Warmth:
    """What prepares the models of these pools. Nothing is read, kept or started yet."""
    pools = [pool for pool in settings.pools if pool.backend == "process"]
    return Warmth(
        pools,
        cache=node.cache,
        keeper=keeper,
        standbys=backend if settings.loaders.fork_server else None,
        prewarm=prewarm,
        prewarm_behind=prewarm_behind,
        transform=make_transform(settings, node.cache, os.environ)
        if settings.modelcache.steps
        else None,
        bring=None if bundles is None else make_bring(settings, bundles),
    )


def make_bring(settings: Settings, bundles: Bundles) -> Bring:
    """Unpacks what models bring along for their engines."""

    def bring(pool: PoolSettings, model: Path) -> None:
        with contextlib.suppress(ValueError):  # settings that cannot be run: the start says so
            here = pool.model_copy(update={"model": str(model)})
            bundles.bring(plain_command(here, settings.loaders), model, pool.env)

    return bring


def make_wake_times(settings: Settings) -> WakeTimes:
    """The wake times measured here so far."""
    times = WakeTimes(
        node=socket.gethostname(),
        path=settings.state_dir.absolute() / WAKE_TIMES,
        samples=settings.autoscaler.wake_samples,
    )
    times.load()
    return times


def prewarm(
    files: Sequence[FileRange],
    on_progress: Callable[[Progress], None],
    cancelled: Callable[[], bool],
) -> object:
    """Read files into the page cache, for somebody who waits."""
    return residency.prewarm(files, on_progress=on_progress, cancelled=cancelled)


def locate(
    pool: PoolSettings,
    settings: Settings,
    environ: Mapping[str, str],
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> str:
    """Where a pool's model is on this disk as its engines open it, after its preparation steps,
    which are run where that was not done yet; its name where it is a hub's that engines fetch
    themselves. Raises ``NotFound``."""
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
            found = in_place(Path(model).absolute())
        else:
            return model
        transform = make_transform(settings, node.cache, environ)
        with transform(model, found, "a look", on_progress, lambda: False) as made:
            return str(made.path)
    finally:
        node.close()
