"""Puts together what keeps models near: cache, pages, engines that stand by; and what was measured.

A part of the composition root, ``gateway.wiring``, for whoever starts engines here.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoscaler.backends.process import ProcessBackend
from autoscaler.settings import PoolSettings
from autoscaler.waketimes import WakeTimes
from autoscaler.warmth import Warmth
from autoscaler.warmth_parts import Transform
from gateway.settings import Settings
from modelcache import memory, pagecache
from modelcache.keeper import PageKeeper
from modelcache.prepare import FolderOutputs, Preparation
from modelcache.prepare_types import input_digest
from modelcache.refs import parse_ref
from modelcache.types import FileEntry, FileRange, Progress

if TYPE_CHECKING:
    from gateway.cache import NodeCache

WAKE_TIMES = "wake_times.json"


def make_warmth(settings: Settings, backend: ProcessBackend, node: NodeCache | None) -> Warmth:
    """What prepares the models of these pools. Nothing is read, kept or started yet."""
    pools = [pool for pool in settings.pools if pool.backend == "process"]
    given = settings.modelcache
    budget_bytes = memory.page_budget_bytes(given.page_budget_bytes)
    keeper = None
    if budget_bytes:
        keeper = PageKeeper(
            budget_bytes=budget_bytes, touch_s=given.page_touch_s, lock=given.page_lock
        )
    return Warmth(
        pools,
        cache=None if node is None else node.cache,
        keeper=keeper,
        standbys=backend if settings.loaders.fork_server else None,
        prewarm=prewarm,
        transform=make_transform(settings, node, os.environ) if given.steps else None,
    )


def make_wake_times(settings: Settings) -> WakeTimes:
    """The wake times measured here so far."""
    times = WakeTimes(
        node=socket.gethostname(),
        path=settings.state_dir.absolute() / WAKE_TIMES,
        samples=settings.autoscaler.wake_samples,
    )
    times.load()
    return times


def open_node(settings: Settings, environ: Mapping[str, str]) -> NodeCache | None:
    """This node's model cache, where a pool has to fetch something. Raises ``CacheError``."""
    if not any(map(has_url, settings.pools)):
        return None
    from gateway.cache import open_cache

    return open_cache(settings, environ)


def has_url(pool: PoolSettings) -> bool:
    """Whether a pool's model has to be fetched from somewhere."""
    return pool.backend == "process" and "://" in (pool.model or "")


def prewarm(
    files: Sequence[FileRange],
    on_progress: Callable[[Progress], None],
    cancelled: Callable[[], bool],
) -> object:
    """Read files into the page cache."""
    return pagecache.prewarm(files, on_progress=on_progress, cancelled=cancelled)


def make_transform(
    settings: Settings, node: NodeCache | None, environ: Mapping[str, str]
) -> Transform:
    """The preparation steps of models, run in the engine's environment; results are kept beside
    the cache."""
    from gateway.cache import cache_dir

    directory = cache_dir(settings) / "prepared"
    preparation = Preparation(
        directory=directory,
        python=settings.loaders.engine_python.absolute(),
        outputs=FolderOutputs(directory / "outputs"),
        environ=environ,
    )

    def transform(
        model: str,
        source: Path,
        on_progress: Callable[[Progress], None],
        cancelled: Callable[[], bool],
    ) -> Path:
        steps = settings.modelcache.steps_for(model)
        if not steps:
            return source
        digest = input_digest(list_entries(model, source, node))
        prepared = preparation.prepare(
            source, digest, steps, on_progress=on_progress, cancelled=cancelled
        )
        return prepared.path

    return transform


def list_entries(model: str, source: Path, node: NodeCache | None) -> Sequence[FileEntry]:
    """What a model consists of: its manifest, or for a directory that nobody fetched its files by
    size and time of change, so that it need not be read."""
    if node is not None and "://" in model:
        ref = parse_ref(model)
        found = node.cache.find(ref.url, ref.revision)
        if found is not None and found.manifest is not None and found.path == source:
            return tuple(found.manifest.files)
    entries = []
    for path in sorted(source.rglob("*")):
        if path.is_file():
            seen = path.stat()
            name = path.relative_to(source).as_posix()
            changed = f"changed {seen.st_mtime_ns}"
            entries.append(FileEntry(path=name, size_bytes=seen.st_size, digest=changed))
    return entries
