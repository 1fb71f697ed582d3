"""This node's model cache put together from the settings, and the preparation steps of its models.

What only some settings ask for (peers, preparation steps, the page cache) is imported where it is
used: a start that adopts engines must not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoscaler.settings import PoolSettings
from gateway.compose.process import child_environ
from gateway.settings.schema import Settings
from modelcache.ports import CachedModel, IsCancelled, OnProgress, Transform
from modelcache.refs import parse_ref
from modelcache.settings import PreparationStep
from modelcache.types import CacheError, FileEntry, FileRange, ModelRef, NotFound

if TYPE_CHECKING:
    from gateway.admin.models import Models
    from modelcache.cache import ModelCache
    from modelcache.fetch.transfer import Transfer
    from modelcache.pagecache.holder import PageHolder
    from modelcache.peers.group import PeerGroup
    from modelcache.ports import Source
    from modelcache.prepare.run import LeasedModel


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
    from modelcache.peers.replicate import make_replicator
    from modelcache.serving import describe

    return Models(
        cache=node.cache,
        prewarm=prewarm_behind,
        replicate=make_replicator(settings.modelcache, environ),
        sites=tuple(settings.modelcache.sites),
        page_holder=page_holder,
        traffic=lambda: describe(node.peers, node.transfer),
        transform=make_transform(settings, node.cache, environ),
        pools=pools or (lambda: settings.pools),
        allowed=settings.gateway.admin_allowed_models,
    )


def open_models(settings: Settings, environ: Mapping[str, str]) -> Models:
    """The verbs over the cache of this node, for a process that has nothing else to do with it."""
    return make_models(open_cache(settings, environ), settings, environ)


def prewarm(files: Sequence[FileRange], on_progress: OnProgress, cancelled: IsCancelled) -> object:
    """Read files into the page cache for a start, at full speed."""
    from modelcache.pagecache import residency

    return residency.prewarm(files, on_progress=on_progress, cancelled=cancelled)


def prewarm_behind(
    files: Sequence[FileRange], on_progress: OnProgress, cancelled: IsCancelled
) -> Any:
    """Read files into the page cache, behind other readers of the same disk."""
    from modelcache.pagecache import residency
    from modelcache.pagecache.pressure import ForegroundReads

    others = ForegroundReads([file.path for file in files])
    return residency.prewarm(files, on_progress=on_progress, cancelled=cancelled, yield_to=others)


def make_transform(
    settings: Settings, cache: ModelCache, environ: Mapping[str, str]
) -> Transform | None:
    """The preparation steps of models, run in the engine's environment; ``None`` where the settings
    have none. Results are kept in the cache, each leased for its user as long as the context is
    open. What steps begin with is given as the cache has it: found by its URL again it might be
    another revision by now."""
    if not settings.modelcache.steps:
        return None
    from modelcache.prepare.run import Preparation, input_digest

    preparation = Preparation(
        cache=cache,
        python=settings.loaders.engine_python.absolute(),
        environ=child_environ(settings, environ),
    )

    def hold(
        source: CachedModel,
        steps: Sequence[PreparationStep],
        holder: str,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> LeasedModel:
        """The last step's result, leased; made with its source leased, unless it is there."""
        digest = input_digest(_files_of(source))
        held = preparation.results.hold(preparation.keys(digest, steps)[-1], holder, final=True)
        if held is not None:
            return held
        with ExitStack() as leases:
            with cache.lease(source, f"preparation for {holder}"):
                made = preparation.prepare(
                    source.path,
                    digest,
                    steps,
                    model=source.url,
                    revision=source.revision,
                    holder=holder,
                    on_progress=on_progress,
                    cancelled=cancelled,
                )
                leases.enter_context(made.lease)
            leases.pop_all()  # its user has it from here on
        return made

    @contextmanager
    def transform(
        model: str,
        source: CachedModel,
        holder: str,
        on_progress: OnProgress,
        cancelled: IsCancelled,
    ) -> Iterator[CachedModel]:
        steps = settings.modelcache.steps_for(model)
        if not steps:
            yield source
            return
        held = hold(source, steps, holder, on_progress, cancelled)
        with held.lease:
            yield held.model

    return transform


def _files_of(model: CachedModel) -> Sequence[FileEntry]:
    """What a model consists of: its manifest, or for a directory that was not fetched its files by
    size and time of change, so that it need not be read."""
    if model.manifest is not None:
        return tuple(model.manifest.files)
    entries = []
    for path in sorted(model.path.rglob("*")):
        if path.is_file():
            seen = path.stat()
            name = path.relative_to(model.path).as_posix()
            changed = f"changed {seen.st_mtime_ns}"
            entries.append(FileEntry(path=name, size_bytes=seen.st_size, digest=changed))
    return entries


def locate(
    pool: PoolSettings,
    settings: Settings,
    environ: Mapping[str, str],
    on_progress: OnProgress = lambda progress: None,
) -> str:
    """Where a pool's model is on this disk as its engines open it: after its preparation steps,
    which are run if they were not. Its name where engines fetch it themselves. Raises
    ``NotFound``."""
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
        if transform is None:
            return str(found.path)
        with transform(model, found, "a look", on_progress, lambda: False) as made:
            return str(made.path)
    finally:
        node.close()
