"""Puts this node's model cache together from the settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoscaler.settings import PoolSettings
from gateway.settings.schema import Settings
from modelcache.ports import IsCancelled, OnProgress
from modelcache.types import CacheError, FileRange, ModelRef

if TYPE_CHECKING:
    from gateway.admin.models import Models
    from modelcache.cache import ModelCache
    from modelcache.fetch.transfer import Transfer
    from modelcache.pagecache.holder import PageHolder
    from modelcache.peers.group import PeerGroup
    from modelcache.ports import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCache:
    """The cache of this node with what it fetches by. One process needs one."""

    cache: ModelCache
    transfer: Transfer
    peers: PeerGroup | None

    def close(self) -> None:
        """Serve peers no more, and let go of connections."""
        if self.peers is not None:
            self.peers.close()


def cache_dir(settings: Settings) -> Path:
    """Where the cache lies: ``modelcache.dir``, else ``cache`` in ``state_dir``."""
    return (settings.modelcache.dir or settings.state_dir / "cache").expanduser().absolute()


def open_cache(settings: Settings, environ: Mapping[str, str]) -> NodeCache:
    """The cache of this node; nothing is made, listened on or connected to yet.

    Raises ``CacheError`` where the peers' secret is missing.
    """
    from modelcache.cache import ModelCache
    from modelcache.fetch.transfer import Transfer
    from modelcache.peers.group import make_peers
    from modelcache.peers.piece_inventory import PieceInventory
    from modelcache.sources.opening import open_source
    from modelcache.store.layout import Layout

    given = settings.modelcache
    directory = cache_dir(settings)
    try:
        peers = make_peers(given, environ, PieceInventory(Layout(directory)))
    except ValueError as error:
        raise CacheError(str(error)) from None
    transfer = Transfer(given, peers=peers)

    def source_of(ref: ModelRef) -> Source:
        return open_source(ref, settings=given, environ=environ)

    cache = ModelCache(given, dir=directory, open_source=source_of, transfer=transfer)
    return NodeCache(cache=cache, transfer=transfer, peers=peers)


def make_page_holder(settings: Settings) -> PageHolder | None:
    """What keeps pages cached for this process; ``None`` where the settings say so. It starts
    nothing before there are pages to keep."""
    from modelcache.pagecache import pressure
    from modelcache.pagecache.holder import PageHolder

    given = settings.modelcache
    budget_bytes = pressure.page_budget_bytes(given.page_budget_bytes)
    if not budget_bytes:
        return None
    return PageHolder(budget_bytes=budget_bytes, touch_s=given.page_touch_s, lock=given.page_lock)


def make_models(
    node: NodeCache,
    settings: Settings,
    environ: Mapping[str, str],
    page_holder: PageHolder | None = None,
    pools: Callable[[], Sequence[PoolSettings]] | None = None,
) -> Models:
    """The verbs over a node's cache; what is prewarmed is kept by ``page_holder``. ``pools`` are
    those served now, where they may be others later."""
    from gateway.admin.models import Models
    from gateway.compose.preparation import make_transform
    from modelcache.peers.replicate import make_replicator
    from modelcache.serving import describe

    return Models(
        cache=node.cache,
        prewarm=prewarm_behind,
        replicate=make_replicator(settings.modelcache, environ),
        sites=tuple(settings.modelcache.sites),
        page_holder=page_holder,
        traffic=lambda: describe(node.peers, node.transfer),
        transform=make_transform(settings, node.cache, environ)
        if settings.modelcache.steps
        else None,
        pools=pools or (lambda: settings.pools),
    )


def open_models(settings: Settings, environ: Mapping[str, str]) -> Models:
    """The verbs over the cache of this node, for a process that has nothing else to do with it."""
    return make_models(open_cache(settings, environ), settings, environ)


def prewarm_behind(
    files: Sequence[FileRange], on_progress: OnProgress, cancelled: IsCancelled
) -> Any:
    """Read files into the page cache, behind other readers of the same disk."""
    from modelcache.pagecache import residency
    from modelcache.pagecache.pressure import ForegroundReads

    others = ForegroundReads([file.path for file in files])
    return residency.prewarm(files, on_progress=on_progress, cancelled=cancelled, yield_to=others)
