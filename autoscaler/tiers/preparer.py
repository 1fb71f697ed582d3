"""What has to be there before an engine starts: its model, near enough, and held.

A backend starts engines; a preparer brings their models to this node, leases them while a replica
needs them, and moves pools at zero between tiers. ``NodePreparer`` does so with what it is given:
the model cache fetches and leases, the page holder keeps pages, the backend keeps standbys. What
blocks runs in threads, bounded in number; work that was cancelled ends soon.

A start takes the revision that is on this disk, and does not ask the store for a newer one: a
client waits, and the store may be away. ``tidegate model preload`` brings the newer one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from autoscaler.backends.base import BackendError, ReplicaSpec, Unsupported
from autoscaler.settings import PoolSettings, make_slug
from autoscaler.tiers.leases import Leases
from loaders.engines.base import engine_of
from modelcache.ports import CachedModel, IsCancelled, OnProgress, Prewarm, Transform
from modelcache.refs import parse_ref
from modelcache.types import CacheError, FileRange, ModelRef, Priority, Progress, Tier

if TYPE_CHECKING:
    from modelcache.cache import ModelCache
    from modelcache.pagecache.holder import PageHolder

LOG = logging.getLogger("tidegate.autoscaler")

THREADS = 32
"""Downloads, preparation steps and prewarms at once."""
QUICK_THREADS = 4
"""Look-ups, leases and the like at once: a model that is here waits for no other's download."""
REPORT_S = 0.1
KEEP_S = 5.0
"""Longest wait for a page holder to answer a request that has been cancelled."""
SMALL_BYTES = 64 * 1024 * 1024
"""Files of up to this size beside the weights (tokenizer, configuration) are kept warm too."""

Result = TypeVar("Result")
Report = Callable[[Progress | None], None]
"""Called with the progress of a preparation; ``None`` when nothing of it is under way any more.
May still be called after ``prepare`` has returned, for what goes on beside the engine's start."""
Unpack = Callable[[PoolSettings, Path], object]
"""Unpacks the compiled artefacts that the model at a path has brought for a pool's engines.
Blocks."""


class Preparer(Protocol):
    """Calls for one replica do not overlap; those for one pool may. Called on one event loop."""

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        """The tiers below ``sleeping`` that the pool can be in now. Never empty; no I/O."""
        ...

    def tier(self, pool: PoolSettings) -> Tier:
        """The warmest of them that it is in: what a start would begin from. No I/O."""
        ...

    def size_bytes(self, pool: PoolSettings) -> int | None:
        """Bytes of its model on this disk; ``None`` where that is not known. No I/O."""
        ...

    @property
    def page_budget_bytes(self) -> int | None:
        """Bytes of models that may be kept in the page cache; ``None`` where none are."""
        ...

    def has_pages(self, pool: PoolSettings) -> bool:
        """Whether its model is kept in the page cache. No I/O."""
        ...

    def deny_pages(self, pools: Set[str]) -> None:
        """Of these pools, which are at zero, keep no pages until this is called again: others need
        the memory more."""
        ...

    async def refresh(self, pool: PoolSettings) -> None:
        """See again where the pool's model is; an operator may have fetched or removed it."""
        ...

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        """Have the model on this node, and hold it for this replica until ``release``.

        Returns what to start: a URL in ``pool.model`` has become a path. May take as long as a
        download; may be cancelled. Raises whatever made it fail.
        """
        ...

    async def release(self, replica_id: str) -> None:
        """The replica is gone, or will not be started. Nothing to do for one that held nothing."""
        ...

    async def move_to(self, pool: PoolSettings, tier: Tier) -> None:
        """Bring a pool at zero to one of its tiers, colder or warmer; may be cancelled.

        Raises ``Unsupported`` where this pool cannot be in it. A lease or pin of another user may
        keep it warmer than was asked.
        """
        ...

    async def forget(self, pool: PoolSettings) -> None:
        """The pool is gone, or has another model: release what was held for it at zero."""
        ...

    async def close(self) -> None:
        """Let go of everything. It is not used afterwards."""
        ...


class Standbys(Protocol):
    """Forked engines that stand by (``autoscaler.backends.process`` has them)."""

    async def standby(self, spec: ReplicaSpec) -> None:
        """Have one engine of this pool stand by. Raises ``BackendError``."""
        ...

    async def end_standby(self, pool: str) -> None:
        """End it, if there is one."""
        ...

    def standbys(self) -> Sequence[Any]:
        """Those that live, each with the name of its ``pool``."""
        ...


@dataclass(slots=True, kw_only=True, eq=False)
class PoolModel:
    """Where one pool's model is on this node. ``ref`` is set where it has a URL. ``cached`` is
    what the cache has of it, or the directory that is used where it is; ``made`` what its
    preparation steps have made, after the path they began from."""

    pool: PoolSettings
    slug: str
    ref: ModelRef | None
    leases: Leases
    """What is held for the pool at zero."""
    cached: CachedModel | None = None
    made: tuple[Path, CachedModel] | None = None
    size_bytes: int | None = None
    paged: bool = False
    standby: bool = False
    paging: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One at a time brings its pages in: one that is cancelled releases them."""

    @property
    def path(self) -> Path | None:
        """Where the model is as it was fetched."""
        return None if self.cached is None else self.cached.path


@dataclass(slots=True, kw_only=True, eq=False)
class ReplicaHold:
    """What one replica keeps from being evicted: its model, which is at ``leased``, and what
    preparation steps have made of it. Both are parts of ``leases``."""

    leases: Leases
    model: Leases = field(init=False)
    leased: Path | None = None
    made: Leases = field(init=False)
    paging: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.model, self.made = self.leases.part(), self.leases.part()


class NodePreparer:
    """A ``Preparer`` over the parts of this node.

    ``prewarm`` reads for replicas, ``prewarm_behind`` for pools at zero: no client waits for it,
    so it gives way to other readers. Without a ``page_holder`` there is no tier ``paged``, and
    without ``standbys`` no tier ``forked``. ``threads`` run what blocks, and are shut down by
    ``close``.
    """

    def __init__(
        self,
        *,
        cache: ModelCache,
        prewarm: Prewarm,
        prewarm_behind: Prewarm,
        page_holder: PageHolder | None = None,
        standbys: Standbys | None = None,
        transform: Transform | None = None,
        unpack: Unpack | None = None,
        threads: ThreadPoolExecutor | None = None,
    ) -> None:
        self._cache, self._page_holder, self._standbys = cache, page_holder, standbys
        self._prewarm, self._prewarm_behind = prewarm, prewarm_behind
        self._transform, self._unpack = transform, unpack
        self._denied: Set[str] = frozenset()
        self._leases = Leases()
        self._models: dict[tuple[str, str], PoolModel] = {}
        self._holds: dict[str, ReplicaHold] = {}
        self._flags: set[threading.Event] = set()
        self._threads = threads or ThreadPoolExecutor(THREADS, thread_name_prefix="tidegate-models")
        self._quick = threads or ThreadPoolExecutor(
            QUICK_THREADS, thread_name_prefix="tidegate-quick"
        )

    # -- what there is ---------------------------------------------------------------------

    def _model(self, pool: PoolSettings) -> PoolModel:
        # A pool may get another model while replicas with the earlier one are still there.
        name = pool.model or ""
        model = self._models.get((pool.name, name))
        if model is None:
            model = self._models[pool.name, name] = PoolModel(
                pool=pool,
                slug=make_slug(pool.name, {one.slug for one in self._models.values()}),
                ref=parse_ref(name) if "://" in name and pool.backend == "process" else None,
                leases=self._leases.part(),
            )
        model.pool = pool
        return model

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        """See ``Preparer``."""
        model = self._model(pool)
        if model.ref is not None and model.path is None:
            return frozenset({Tier.REMOTE})
        found = {Tier.ON_DISK} if model.ref is None else {Tier.ON_DISK, Tier.REMOTE}
        denied = pool.name in self._denied
        if self._page_holder is not None and model.path is not None and not denied:
            found.add(Tier.PAGED)
        forks = pool.backend == "process" and engine_of(pool.engine).capabilities.fork
        if self._standbys is not None and forks:
            found.add(Tier.FORKED)
        return frozenset(found)

    def tier(self, pool: PoolSettings) -> Tier:
        """See ``Preparer``."""
        model = self._model(pool)
        if model.ref is not None and model.path is None:
            return Tier.REMOTE
        if model.standby:
            return Tier.FORKED
        return Tier.PAGED if model.paged else Tier.ON_DISK

    def size_bytes(self, pool: PoolSettings) -> int | None:
        """See ``Preparer``."""
        return self._model(pool).size_bytes

    @property
    def page_budget_bytes(self) -> int | None:
        """See ``Preparer``."""
        return None if self._page_holder is None else self._page_holder.budget_bytes

    def has_pages(self, pool: PoolSettings) -> bool:
        """See ``Preparer``."""
        return self._model(pool).paged

    def deny_pages(self, pools: Set[str]) -> None:
        """See ``Preparer``."""
        self._denied = frozenset(pools)
        for model in self._models.values():
            if model.pool.name in pools and model.paged:
                self._drop_pages(model)

    async def refresh(self, pool: PoolSettings) -> None:
        """See ``Preparer``."""
        model = self._model(pool)
        if model.standby and self._standbys is not None:
            model.standby = any(one.pool == pool.name for one in self._standbys.standbys())
        if model.ref is None:
            here = Path(pool.model) if pool.model else None
            is_there = here is not None and await self._run(lambda _: here.is_dir())
            self._found(model, CachedModel.in_place(here) if here and is_there else None)
            if here is not None and is_there and model.size_bytes is None:
                model.size_bytes = await self._run(lambda _: size_of(here))
        else:
            self._found(model, await self._find(model.ref))

    async def _find(self, ref: ModelRef) -> CachedModel | None:
        return await self._run(lambda _: self._cache.find(ref.url, ref.revision))

    def _found(self, model: PoolModel, cached: CachedModel | None) -> None:
        """What is here now, ``None`` for nothing; pages of another place are released."""
        before, model.cached = model.path, cached
        if model.path != before:
            self._drop_pages(model)
            model.made = model.size_bytes = None
        if cached is not None and cached.manifest is not None:
            model.size_bytes = cached.manifest.size_bytes

    # -- for a replica ---------------------------------------------------------------------

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        """See ``Preparer``. Pages are brought in beside the engine's start, not before it: its
        first seconds need no weights."""
        model = self._model(spec.pool)
        self._denied = self._denied - {spec.pool.name}
        hold = self._holds.setdefault(spec.id, ReplicaHold(leases=self._leases.part()))
        tell = make_reporter(report)
        if model.ref is None:
            await self.refresh(spec.pool)
        else:
            await self._fetch(model, model.ref, hold, spec.id, tell)
        path = await self._make_for(model, hold, spec.id, tell)
        await self._unpack_compiled(model, path)
        model.standby = False  # the backend takes it for this start, or ends it
        report(None)
        if path is None:
            return spec
        if self._may_page(model):
            hold.paging = asyncio.create_task(self._page_beside(model, path, tell, report))
        return replace(spec, pool=spec.pool.model_copy(update={"model": str(path)}))

    async def _make(
        self, model: PoolModel, leases: Leases, holder: str, tell: OnProgress
    ) -> Path | None:
        """Where the model is after its preparation steps, which are run where they were not. Their
        result is held in ``leases``: it must not be evicted under its reader."""
        transform, cached, path = self._transform, model.cached, model.path
        if cached is None or path is None or transform is None:
            return path
        known = model.made[1] if model.made is not None and model.made[0] == path else None
        if known is not None and known.path == path:
            return path  # there are no steps, and the model itself is leased
        if known is not None:
            with contextlib.suppress(CacheError):  # it was evicted: it is made again
                await self._run(lambda _: leases.enter(self._cache.lease(known, holder)))
                return known.path
        name = model.pool.model or ""
        # Entered in the thread, which may go on when this is cancelled.
        made = await self._run(
            lambda stop: leases.enter(transform(name, cached, holder, tell, stop)), slow=True
        )
        model.made = (path, made)
        return made.path

    async def _make_for(
        self, model: PoolModel, hold: ReplicaHold, holder: str, tell: OnProgress
    ) -> Path | None:
        """The same for a replica, which releases an earlier result only when it has this one."""
        before, hold.made = hold.made, hold.leases.part()
        try:
            return await self._make(model, hold.made, holder, tell)
        finally:
            await self._let_go(before)

    async def _unpack_compiled(self, model: PoolModel, path: Path | None) -> None:
        unpack = self._unpack
        compiles = engine_of(model.pool.engine).capabilities.compile_cache
        if unpack is not None and path is not None and compiles:
            await self._run(lambda _: unpack(model.pool, path), slow=True)

    async def _fetch(
        self, model: PoolModel, ref: ModelRef, hold: ReplicaHold, holder: str, tell: OnProgress
    ) -> None:
        """Have the model here, and leased for a replica."""

        def fetch(cancelled: IsCancelled) -> CachedModel:
            return self._cache.preload(
                ref.url,
                revision=ref.revision,
                priority=Priority.WAKE,
                on_progress=tell,
                cancelled=cancelled,
            )

        cached = await self._find(ref)
        if cached is not None:
            try:
                await self._lease(hold, cached, holder)
            except CacheError:
                cached = None  # it was evicted between the look-up and the lease
        if cached is None:
            cached = await self._run(fetch, slow=True)
            await self._lease(hold, cached, holder)
        self._found(model, cached)

    async def _lease(self, hold: ReplicaHold, cached: CachedModel, holder: str) -> None:
        if hold.leased == cached.path:
            return
        before, hold.model, hold.leased = hold.model, hold.leases.part(), None
        await self._let_go(before)
        leases = hold.model
        await self._run(lambda _: leases.enter(self._cache.lease(cached, holder)))
        hold.leased = cached.path

    async def _page_beside(
        self, model: PoolModel, path: Path, tell: OnProgress, report: Report
    ) -> None:
        try:
            await self._page(model, path, tell, self._prewarm)
        except (CacheError, OSError) as error:
            LOG.info("%s: its pages are not kept: %s", model.pool.name, error)
        finally:
            report(None)

    async def release(self, replica_id: str) -> None:
        """See ``Preparer``."""
        hold = self._holds.pop(replica_id, None)
        if hold is None:
            return
        if hold.paging is not None:
            hold.paging.cancel()
        await self._let_go(hold.leases)

    # -- for a pool at zero ----------------------------------------------------------------

    async def move_to(self, pool: PoolSettings, tier: Tier) -> None:
        """See ``Preparer``."""
        model = self._model(pool)
        if tier is Tier.FORKED:
            path = await self._stand_by(model)
            if self._may_page(model):
                try:
                    await self._page(model, path, ignore_progress, self._prewarm_behind)
                except CacheError as error:
                    LOG.info("%s: its pages are not kept: %s", pool.name, error)
            return
        await self._end_standby(model)
        if tier is Tier.PAGED:
            path = await self._hold_for_pool(model)
            await self._page(model, path, ignore_progress, self._prewarm_behind)
            return
        self._drop_pages(model)
        await self._let_go(model.leases)
        if tier is Tier.REMOTE:
            await self._evict(model)

    async def _stand_by(self, model: PoolModel) -> Path | None:
        if self._standbys is None:
            raise Unsupported("there is no fork server")
        path = await self._hold_for_pool(model)
        await self._unpack_compiled(model, path)
        pool = model.pool
        if path is not None:
            pool = pool.model_copy(update={"model": str(path)})
        await self._standbys.standby(ReplicaSpec(id=f"{model.slug}-standby", pool=pool))
        model.standby = True
        return path

    async def _end_standby(self, model: PoolModel) -> None:
        model.standby = False
        if self._standbys is not None:
            await self._standbys.end_standby(model.pool.name)

    async def _hold_for_pool(self, model: PoolModel) -> Path | None:
        """Warmer than on disk, a pool's model is leased, and what steps have made of it: what is
        kept warm is not evicted. Returns where it is; earlier leases are released only then."""
        holder = f"{model.slug}, at zero"
        before, model.leases = model.leases, self._leases.part()
        leases = model.leases
        try:
            if model.ref is not None:
                cached = await self._find(model.ref)
                if cached is None:
                    self._found(model, None)
                    raise BackendError(f"{model.pool.name}: its model is not on this disk any more")
                await self._run(lambda _: leases.enter(self._cache.lease(cached, holder)))
                self._found(model, cached)
            return await self._make(model, leases, holder, ignore_progress)
        finally:
            await self._let_go(before)

    async def _evict(self, model: PoolModel) -> None:
        ref = model.ref
        if ref is None:
            raise Unsupported("a model in a directory is not removed")
        others = [one for one in self._models.values() if one is not model and one.ref == ref]
        if any(one.path is not None for one in others):
            raise BackendError(f"its model is that of {others[0].pool.name} too")
        await self._run(lambda _: self._cache.evict(ref.url, ref.revision))
        self._found(model, None)

    async def forget(self, pool: PoolSettings) -> None:
        """See ``Preparer``."""
        model = self._models.pop((pool.name, pool.model or ""), None)
        if model is None:
            return
        self._drop_pages(model)
        try:
            await self._end_standby(model)
        finally:
            await self._let_go(model.leases)

    # -- pages -----------------------------------------------------------------------------

    def _may_page(self, model: PoolModel) -> bool:
        return Tier.PAGED in self.tiers(model.pool) and model.pool.tiers.keeps_pages

    async def _page(
        self, model: PoolModel, path: Path | None, tell: OnProgress, prewarm: Prewarm
    ) -> None:
        """Bring a model into the page cache, and have it held there. Raises ``NoSpace`` where it
        exceeds the budget."""
        holder = self._page_holder
        if holder is None or path is None:
            raise Unsupported("no pages are held on this node")
        async with model.paging:
            if model.paged:
                return
            files = await self._run(lambda _: list_files(path))
            # First, so that nothing is read twice; the holder then finds the reading done.
            keeping = asyncio.ensure_future(self._run(lambda _: holder.keep(model.slug, files)))
            try:
                await asyncio.shield(keeping)
                await self._run(lambda cancelled: prewarm(files, tell, cancelled), slow=True)
            except BaseException:
                # Its thread goes on when this is cancelled, and would keep them after the drop.
                await asyncio.wait({keeping}, timeout=KEEP_S)
                holder.drop(model.slug)
                raise
            model.paged = True

    def _drop_pages(self, model: PoolModel) -> None:
        model.paged = False
        if self._page_holder is not None:
            self._page_holder.drop(model.slug)

    # -- threads ---------------------------------------------------------------------------

    async def _run(self, work: Callable[[IsCancelled], Result], *, slow: bool = False) -> Result:
        """Do what blocks in a thread, which can ask whether this was cancelled. ``slow``: it waits
        for a store, a step, or weights."""
        flag = threading.Event()
        self._flags.add(flag)
        try:
            running = asyncio.get_running_loop()
            threads = self._threads if slow else self._quick
            return await running.run_in_executor(threads, work, flag.is_set)
        finally:
            flag.set()
            self._flags.discard(flag)

    async def _let_go(self, leases: Leases) -> None:
        """Release these, which is done even if this is cancelled. Where there are none it takes
        no thread."""
        if leases.refuse():
            running = asyncio.get_running_loop()
            await asyncio.shield(running.run_in_executor(self._quick, leases.close))
        else:
            leases.close()

    async def close(self) -> None:
        """See ``Preparer``."""
        self._leases.refuse()  # what is cancelled now comes too late with a lease
        for flag in list(self._flags):
            flag.set()
        for replica_id in list(self._holds):
            await self.release(replica_id)
        await self._run(lambda _: self._end())
        for threads in (self._threads, self._quick):
            threads.shutdown(wait=False, cancel_futures=True)

    def _end(self) -> None:
        self._leases.close()
        if self._page_holder is not None:
            self._page_holder.close()


def make_reporter(report: Report) -> OnProgress:
    """``report`` for threads, called on this event loop, a few times a second at most."""
    running = asyncio.get_running_loop()
    last: tuple[float, str] | None = None

    def tell(progress: Progress) -> None:
        nonlocal last
        now_s = time.monotonic()
        if last is not None and last[1] == progress.phase and now_s - last[0] < REPORT_S:
            return
        last = (now_s, progress.phase)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            running.call_soon_threadsafe(report, progress)

    return tell


def ignore_progress(progress: Progress) -> None:
    """For work that no client waits for."""


def size_of(directory: Path) -> int:
    """Bytes of what an engine reads of a model."""
    return sum(Path(one.path).stat().st_size for one in list_files(directory))


def list_files(directory: Path) -> list[FileRange]:
    """The files of a model that an engine reads: weights, and what is small beside them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    weights = weights or [path for path in files if path.suffix in {".bin", ".gguf", ".pt"}]
    small = [path for path in files if path not in weights and path.stat().st_size <= SMALL_BYTES]
    return [FileRange(path=str(path)) for path in (*weights, *small)]
