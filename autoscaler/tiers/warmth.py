"""Brings models near for replicas, and keeps pools at zero as warm as they are told.

The work is done by others, who are passed in: the model cache fetches and leases, the page cache
and its keeper hold pages, the process backend keeps engines that stand by. What blocks runs in
threads of our own, bounded in number; what was called off is told so and ends soon.

A wake takes the revision that is on this disk, and asks no store whether there is a newer one:
somebody waits, and the store may be away. ``tidegate model preload`` brings the newer one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from autoscaler.backends.base import BackendError, ReplicaSpec, Unsupported
from autoscaler.settings import PoolSettings, make_slug
from autoscaler.tiers.preparer import Report
from autoscaler.tiers.warmth_parts import (
    Bring,
    Cache,
    Cancelled,
    Keeper,
    OnProgress,
    Prewarm,
    Standbys,
    Transform,
    list_files,
    make_teller,
    silent,
)
from autoscaler.tiers.warmth_places import Hold, Leases, Place, in_place, make_place
from modelcache.types import CacheError, Priority, Tier

LOG = logging.getLogger("tidegate.autoscaler")

THREADS = 32
"""Calls that may block at once: downloads, prewarms, look-ups."""

Result = TypeVar("Result")


class Warmth:
    """A ``Preparer`` over the parts of this node.

    ``prewarm`` is for replicas, ``prewarm_behind`` for pools at zero: nobody waits for it, so it
    stands back for others. Without a ``cache`` no URL can be fetched; without a ``keeper`` there
    is no tier ``paged``, and without ``standbys`` no tier ``forked``.
    """

    def __init__(
        self,
        pools: Sequence[PoolSettings],
        *,
        cache: Cache | None = None,
        keeper: Keeper | None = None,
        standbys: Standbys | None = None,
        prewarm: Prewarm | None = None,
        prewarm_behind: Prewarm | None = None,
        transform: Transform | None = None,
        bring: Bring | None = None,
    ) -> None:
        self._cache, self._keeper, self._standbys = cache, keeper, standbys
        self._prewarm, self._transform, self._bring = prewarm, transform, bring
        self._prewarm_behind = prewarm_behind or prewarm
        self._leases = Leases()
        self._places: dict[str, Place] = {}
        for pool in pools:
            slug = make_slug(pool.name, {one.slug for one in self._places.values()})
            self._places[pool.name] = make_place(pool, slug, self._leases.part())
        self._holds: dict[str, Hold] = {}
        self._flags: set[threading.Event] = set()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="tidegate-models")

    # -- what there is ---------------------------------------------------------------------

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        """See ``Preparer``."""
        place = self._places[pool.name]
        if place.ref is not None and place.path is None:
            return frozenset({Tier.REMOTE})
        found = {Tier.ON_DISK} if place.ref is None else {Tier.ON_DISK, Tier.REMOTE}
        if self._keeper is not None and place.path is not None:
            found.add(Tier.PAGED)
        if self._standbys is not None and pool.engine == "vllm":
            found.add(Tier.FORKED)
        return frozenset(found)

    def tier(self, pool: PoolSettings) -> Tier:
        """See ``Preparer``."""
        place = self._places[pool.name]
        if place.ref is not None and place.path is None:
            return Tier.REMOTE
        if place.standby:
            return Tier.FORKED
        return Tier.PAGED if place.kept else Tier.ON_DISK

    async def refresh(self, pool: PoolSettings) -> None:
        """See ``Preparer``."""
        place = self._places[pool.name]
        if place.standby and self._standbys is not None:
            place.standby = any(one.pool == pool.name for one in self._standbys.standbys())
        if place.ref is None:
            here = Path(pool.model) if pool.model else None
            is_there = here is not None and await self._run(lambda _: here.is_dir())
            self._found(place, in_place(here) if here is not None and is_there else None)
        elif self._cache is not None:
            cache, ref = self._cache, place.ref
            self._found(place, await self._run(lambda _: cache.find(ref.url, ref.revision)))

    def _found(self, place: Place, model: Any) -> None:
        """What is here now, ``None`` for nothing; what was kept of another place is let go."""
        before, place.model = place.path, model
        if place.path != before:
            self._drop_pages(place)
            place.made = None

    # -- for a replica ---------------------------------------------------------------------

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        """See ``Preparer``. Pages are brought in beside the engine's start, not before it: its
        first seconds need no weights."""
        place = self._places[spec.pool.name]
        hold = self._hold(spec.id)
        tell = make_teller(report)
        if place.ref is None:
            await self.refresh(spec.pool)
        else:
            await self._fetch(place, hold, spec.id, tell)
        path = await self._make_for(place, hold, spec.id, tell)
        await self._bring_compiled(place, path)
        place.standby = False  # the backend takes it for this start, or ends it
        report(None)
        if path is None:
            return spec
        if self._may_page(place):
            hold.paging = asyncio.create_task(self._page_beside(place, path, tell, report))
        return replace(spec, pool=spec.pool.model_copy(update={"model": str(path)}))

    def _hold(self, replica_id: str) -> Hold:
        if replica_id not in self._holds:
            self._holds[replica_id] = Hold(leases=self._leases.part())
        return self._holds[replica_id]

    async def _make(
        self, place: Place, leases: Leases, holder: str, tell: OnProgress
    ) -> Path | None:
        """Where the model is after its preparation steps, which are run where they were not. Their
        result is held in ``leases``: whoever reads it must not lose it to an eviction."""
        transform, model, cache, path = self._transform, place.model, self._cache, place.path
        if path is None or transform is None:
            return path
        known = place.made[1] if place.made is not None and place.made[0] == path else None
        if known is not None and known.path == path:
            return path  # there are no steps, and who wants the model has leased it
        if known is not None and cache is not None:
            with contextlib.suppress(CacheError):  # it was evicted: it is made again
                await self._run(lambda _: leases.enter(cache.lease(known, holder)))
                return Path(known.path)
        name = place.pool.model or ""
        # Entered in the thread, which may go on when this is called off.
        made = await self._run(
            lambda stop: leases.enter(transform(name, model, holder, tell, stop))
        )
        place.made = (path, made)
        return Path(made.path)

    async def _make_for(
        self, place: Place, hold: Hold, holder: str, tell: OnProgress
    ) -> Path | None:
        """The same for a replica, which lets go of an earlier result only when it has this one."""
        before, hold.made = hold.made, hold.leases.part()
        try:
            return await self._make(place, hold.made, holder, tell)
        finally:
            await self._let_go(before)

    async def _bring_compiled(self, place: Place, path: Path | None) -> None:
        """What was compiled elsewhere for these engines is theirs before they start."""
        bring = self._bring
        if bring is not None and path is not None and place.pool.engine == "vllm":
            await self._run(lambda _: bring(place.pool, path))

    async def _fetch(self, place: Place, hold: Hold, holder: str, tell: OnProgress) -> None:
        """Have the model here, and leased for a replica."""
        cache, ref = self._cache, place.ref
        if cache is None or ref is None:
            raise Unsupported(f"{place.pool.name}: a model with a URL needs the model cache")

        def fetch(cancelled: Cancelled) -> Any:
            return cache.preload(
                ref.url,
                revision=ref.revision,
                priority=Priority.WAKE,
                on_progress=tell,
                cancelled=cancelled,
            )

        model = await self._run(lambda _: cache.find(ref.url, ref.revision))
        if model is not None:
            try:
                await self._lease(hold, model, holder)
            except CacheError:
                model = None  # it was evicted between the look and the lease
        if model is None:
            model = await self._run(fetch)
            await self._lease(hold, model, holder)
        self._found(place, model)

    async def _lease(self, hold: Hold, model: Any, holder: str) -> None:
        cache = self._cache
        if cache is None or hold.leased == model.path:
            return
        before, hold.model, hold.leased = hold.model, hold.leases.part(), None
        await self._let_go(before)
        leases = hold.model
        await self._run(lambda _: leases.enter(cache.lease(model, holder)))
        hold.leased = model.path

    async def _page_beside(
        self, place: Place, path: Path, tell: OnProgress, report: Report
    ) -> None:
        try:
            await self._page(place, path, tell, self._prewarm)
        except (CacheError, OSError) as error:
            LOG.info("%s: its pages are not kept: %s", place.pool.name, error)
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
        place = self._places[pool.name]
        if tier is Tier.FORKED:
            path = await self._stand_by(place)
            if self._may_page(place):
                await self._page_quietly(place, path)
            return
        await self._end_standby(place)
        if tier is Tier.PAGED:
            path = await self._hold_for_pool(place)
            await self._page(place, path, silent, self._prewarm_behind)
            return
        self._drop_pages(place)
        await self._let_go(place.leases)
        if tier is Tier.REMOTE:
            await self._evict(place)

    async def _stand_by(self, place: Place) -> Path | None:
        if self._standbys is None:
            raise Unsupported("there is no fork server")
        path = await self._hold_for_pool(place)
        await self._bring_compiled(place, path)
        pool = place.pool
        if path is not None:
            pool = pool.model_copy(update={"model": str(path)})
        await self._standbys.standby(ReplicaSpec(id=f"{place.slug}-standby", pool=pool))
        place.standby = True
        return path

    async def _end_standby(self, place: Place) -> None:
        place.standby = False
        if self._standbys is not None:
            await self._standbys.end_standby(place.pool.name)

    async def _hold_for_pool(self, place: Place) -> Path | None:
        """Warmer than on disk, a pool's model is leased, and what steps have made of it: what is
        kept warm is not evicted. Where it is; what was leased before is let go only then."""
        cache, ref, holder = self._cache, place.ref, f"{place.slug}, at zero"
        before, place.leases = place.leases, self._leases.part()
        leases = place.leases
        try:
            if ref is not None and cache is not None:
                model = await self._run(lambda _: cache.find(ref.url, ref.revision))
                if model is None:
                    self._found(place, None)
                    raise BackendError(f"{place.pool.name}: its model is not on this disk any more")
                await self._run(lambda _: leases.enter(cache.lease(model, holder)))
                self._found(place, model)
            return await self._make(place, leases, holder, silent)
        finally:
            await self._let_go(before)

    async def _evict(self, place: Place) -> None:
        cache, ref = self._cache, place.ref
        if cache is None or ref is None:
            raise Unsupported("what lies in a directory is not removed")
        others = [one for one in self._places.values() if one is not place and one.ref == ref]
        if any(one.path is not None for one in others):
            raise BackendError(f"its model is that of {others[0].pool.name} too")
        await self._run(lambda _: cache.evict(ref.url, ref.revision))
        self._found(place, None)

    # -- pages -----------------------------------------------------------------------------

    def _may_page(self, place: Place) -> bool:
        return Tier.PAGED in self.tiers(place.pool) and place.pool.tiers.keeps_pages

    async def _page_quietly(self, place: Place, path: Path | None) -> None:
        try:
            await self._page(place, path, silent, self._prewarm_behind)
        except CacheError as error:
            LOG.info("%s: its pages are not kept: %s", place.pool.name, error)

    async def _page(
        self, place: Place, path: Path | None, tell: OnProgress, prewarm: Prewarm | None
    ) -> None:
        """Bring a model into the page cache, and have it kept there. Raises ``NoSpace`` where it
        exceeds the budget."""
        keeper = self._keeper
        if keeper is None or path is None:
            raise Unsupported("nothing is kept in the page cache")
        async with place.paging:
            if not place.kept:
                await self._page_alone(place, keeper, path, tell, prewarm)

    async def _page_alone(
        self, place: Place, keeper: Keeper, path: Path, tell: OnProgress, prewarm: Prewarm | None
    ) -> None:
        files = await self._run(lambda _: list_files(path))
        # First, so that nothing is read in vain; the keeper then finds the reading done.
        await self._run(lambda _: keeper.keep(place.slug, files))
        try:
            if prewarm is not None:
                await self._run(lambda cancelled: prewarm(files, tell, cancelled))
        except BaseException:
            keeper.drop(place.slug)
            raise
        place.kept = True

    def _drop_pages(self, place: Place) -> None:
        place.kept = False
        if self._keeper is not None:
            self._keeper.drop(place.slug)

    # -- threads ---------------------------------------------------------------------------

    async def _run(self, work: Callable[[Cancelled], Result]) -> Result:
        """Do what blocks in a thread; it is told when nobody waits for it any more."""
        flag = threading.Event()
        self._flags.add(flag)
        try:
            running = asyncio.get_running_loop()
            return await running.run_in_executor(self._threads, work, flag.is_set)
        finally:
            flag.set()
            self._flags.discard(flag)

    async def _let_go(self, leases: Leases) -> None:
        """Release these, which is done even if this is called off. Where there are none it takes
        no thread."""
        if leases.refuse():
            running = asyncio.get_running_loop()
            await asyncio.shield(running.run_in_executor(self._threads, leases.close))
        else:
            leases.close()

    async def close(self) -> None:
        """See ``Preparer``."""
        self._leases.refuse()  # whoever is called off now comes too late with a lease
        for flag in list(self._flags):
            flag.set()
        for replica_id in list(self._holds):
            await self.release(replica_id)
        await self._run(lambda _: self._end())
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _end(self) -> None:
        self._leases.close()
        if self._keeper is not None:
            self._keeper.close()
