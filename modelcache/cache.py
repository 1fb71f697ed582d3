"""The model cache of a node: everything that is asked of it, in one place.

Blocking, and safe to use from many threads and processes at once. What is asked by URL is
answered from what is on disk; only ``preload`` (and a repair) goes to a source.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path

from modelcache.fetch.fetch import (
    Fetch,
    FetchRequest,
    PieceTransfer,
    list_again,
    plan_salvage,
)
from modelcache.fetch.selection import narrow
from modelcache.ports import ONCE, CachedModel, IsCancelled, OnProgress, Retries, Source
from modelcache.settings import ModelCacheSettings
from modelcache.sources.reader import read_file
from modelcache.store.capacity import Usage
from modelcache.store.files import make_private, open_lock, try_lock
from modelcache.store.leases import Lease
from modelcache.store.lookup import Lookup, list_entries, read_fetching
from modelcache.store.snapshots import LocalFiles
from modelcache.store.store import Damage, Store, check_files, check_manifest
from modelcache.types import (
    PIECE_BYTES,
    PREPARED,
    CacheError,
    Cancelled,
    Damaged,
    Listing,
    Made,
    Manifest,
    ModelEntry,
    ModelRef,
    NotFound,
    Priority,
    Progress,
    RemoteFile,
    SourceError,
)

LOG = logging.getLogger("tidegate.modelcache")

WAIT_S = 0.1
"""Seconds between two looks at whether another process has fetched what we want too."""


class ModelCache:
    """The cache below one directory. Making one touches nothing."""

    def __init__(
        self,
        settings: ModelCacheSettings,
        *,
        dir: Path,
        open_source: Callable[[ModelRef], Source],
        transfer: PieceTransfer,
        clock: Callable[[], float] = time.time,
        environ: Mapping[str, str] | None = None,
        piece_bytes: int = PIECE_BYTES,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self.settings = settings
        self.store = Store(
            dir,
            quota_bytes=settings.quota_bytes,
            reserve_bytes=settings.reserve_bytes,
            piece_bytes=piece_bytes,
            free_bytes=free_bytes,
            clock=clock,
        )
        self.lookup = Lookup(self.store)
        self._open_source = open_source
        self._transfer = transfer
        self._clock = clock
        self.local_files = LocalFiles(
            given=settings.hub_dirs, own=self.store.layout.hub, environ=environ
        )

    @property
    def dir(self) -> Path:
        """Its directory."""
        return self.store.layout.root

    # Getting models

    def preload(
        self,
        url: str,
        *,
        revision: str | None = None,
        priority: Priority = Priority.PRELOAD,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
        expected_use_at_s: float | None = None,
    ) -> CachedModel:
        """Bring a model to the disk, unless it is there; blocks as long as that takes.

        A name that moves (``main``, or no revision) is looked up at the source; where that cannot
        be asked, what is here is used, and ``note`` says so. Callers that want the same model
        at the same time, in any process, wait for the one that fetches it.

        Raises ``ValueError`` for a URL that is none; ``NoSpace`` before anything is fetched;
        ``NotFound``, ``SourceError``, ``Damaged``, ``Cancelled``.
        """
        ref = self.lookup.ref(url, revision)
        here = self.lookup.in_place(ref)
        if here is not None:
            return here
        if ref.scheme == PREPARED:
            return self._expecting(self.lookup.made(ref), expected_use_at_s)
        said = self.settings.files_for(ref.url)[0] or self.settings.bundles_for(ref.url)
        if ref.revision is not None and not said:
            # An exact revision never changes: no need to ask for it.
            exact = self.lookup.open(self.lookup.read(ref.url, ref.revision))
            if exact is not None:
                return self._expecting(exact, expected_use_at_s)
        tell = on_progress or (lambda progress: None)
        stopped = cancelled or (lambda: False)
        tell(Progress(phase="listing"))
        with ExitStack() as opened:
            try:
                source = opened.enter_context(closing(self._open_source(ref)))
                # With one here already, a source that cannot be asked is not waited for.
                most = 0 if self.lookup.resolve(ref) is not None else self.settings.retries
                retries = Retries(most=most, cancelled=stopped)
                listing = source.list(retries)
            except NotFound:
                raise
            except SourceError as error:
                return self._expecting(self._offline(ref, error, tell, stopped), expected_use_at_s)
            want = FetchRequest(
                ref=ref,
                listing=self._select(ref, listing, source, retries),
                priority=priority,
                find_local=lambda file: self.local_files.find(ref, file),
                on_progress=tell,
                cancelled=stopped,
            )
            return self._expecting(self._make(want, source), expected_use_at_s)

    def find(self, url: str, revision: str | None = None) -> CachedModel | None:
        """A model that is on the disk, whole; asks no source. ``None`` if it is not here.

        Without a revision: what the newest was when it was last asked for. The beginning of one
        that is here will do; raises ``Ambiguous`` where several begin so.
        """
        ref = self.lookup.ref(url, revision)
        return self.lookup.in_place(ref) or self.lookup.open(self.lookup.resolve(ref))

    def publish(
        self,
        directory: Path,
        *,
        url: str,
        revision: str,
        made: Made | None = None,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> CachedModel:
        """Make a directory of files, on the same disk, a model of the cache without copying.

        ``url`` need be no source's; ``made`` is what it was made of. The files must not be written
        to any more.
        """
        files = tuple(
            RemoteFile(path=path.relative_to(directory).as_posix(), size_bytes=path.stat().st_size)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        )
        want = FetchRequest(
            ref=ModelRef(url=url, scheme=url.partition(":")[0], location=url),
            listing=Listing(revision=revision, files=files),
            find_local=lambda file: directory / file.path,
            given=True,
            made=made,
            on_progress=on_progress or (lambda progress: None),
            cancelled=cancelled or (lambda: False),
        )
        return self._make(want, None)

    def lease(self, model: CachedModel, holder: str) -> Lease:
        """A hold on a model as long as it is used: until it is released, or this process is
        gone. Raises ``NotFound`` where the model was evicted meanwhile."""
        if model.manifest is None:
            return Lease(holder, lambda: None)
        with self.store.lock():
            lease = self.store.take_lease(model.url, model.revision, holder)
        if lease is None:
            raise NotFound(f"{model.url}@{model.revision} is not on this disk any more")
        return lease

    # Keeping models, and letting them go

    def pin(self, url: str, revision: str | None = None) -> None:
        """Keep a model whatever happens, and what steps have made of it to be used. Raises
        ``NotFound``."""
        with self.store.lock():
            wanted = self.lookup.to_pin(url, revision)
            for record in wanted:
                self.store.set_pin(record.url, record.revision, pinned=True)

    def unpin(self, url: str, revision: str | None = None) -> None:
        """Let a model be evicted again, all its revisions unless one is named, and what was made
        of it."""
        with self.store.lock():
            for record in self.lookup.records(url, revision)[0]:
                self.store.set_pin(record.url, record.revision, pinned=False)

    def evict(
        self, url: str, revision: str | None = None, force: bool = False, prepared: bool = False
    ) -> int:
        """Take a model from the disk with what was made of it, all its revisions unless one is
        named; the bytes freed.

        ``force``: although it is pinned. ``prepared``: only what was made of it. Raises ``InUse``
        where something of that is leased, being fetched or made, or pinned, and then nothing has
        gone; ``NotFound`` where nothing is here.
        """
        with self.store.lock():
            records, unfinished = self.lookup.records(url, revision, prepared=prepared)
            return self.store.capacity.evict(records, unfinished, force=force)

    def sweep(self) -> None:
        """Remove what killed processes have left behind and cannot be used."""
        with self.store.lock():
            self.store.capacity.sweep()

    # What there is

    def ls(self) -> list[ModelEntry]:
        """Every revision that is on the disk or on its way."""
        return list_entries(self.store)

    def usage(self) -> Usage:
        """What the cache takes, and what it may take."""
        return self.store.capacity.usage()

    def verify(
        self,
        url: str,
        revision: str | None = None,
        *,
        repair: bool = False,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> list[Damage]:
        """Read every byte of a model again; what is not as it was when it was fetched.

        ``repair`` fetches the damaged pieces again, and raises as ``preload`` does.
        """
        manifest = self.lookup.require(url, revision)
        tell, stopped = on_progress or (lambda progress: None), cancelled or (lambda: False)
        done = 0

        def count(bytes_more: int) -> None:
            nonlocal done
            done += bytes_more
            tell(Progress(phase="checking", bytes_done=done, bytes_total=manifest.size_bytes))

        found = check_manifest(self.store.layout, manifest.url, manifest.revision)
        found += check_files(self.store, manifest, on_bytes=count, cancelled=stopped)
        if found and repair and manifest.made is not None:
            raise CacheError(f"{url} is damaged, and was made here: evict it to have it made again")
        if found and repair:
            self._repair(manifest, found, tell, stopped)
        return found

    # How

    def _make(self, want: FetchRequest, source: Source | None) -> CachedModel:
        """The revision, fetched unless it is whole; one process at a time fetches a model."""
        with self.store.disk_errors():
            manifest = self._bring(want, source)
        model = self.lookup.open(manifest)
        if model is None:
            raise NotFound(f"{want.ref.url} was evicted as soon as it was there")
        return model

    def _bring(self, want: FetchRequest, source: Source | None) -> Manifest:
        manifest = self._have(want)
        if manifest is None:
            with self._alone(want):
                manifest = self._have(want)
                if manifest is None:
                    fetch = Fetch(self.store, self._transfer, source, want, clock=self._clock)
                    manifest = fetch.run()
        return manifest

    def _have(self, want: FetchRequest) -> Manifest | None:
        """The manifest, if the revision is whole and has every file wanted."""
        manifest = self.lookup.read(want.ref.url, want.listing.revision)
        if manifest is None or want.salvage or not self.store.is_whole(manifest):
            return None
        if not {file.path for file in want.listing.files} <= {file.path for file in manifest.files}:
            return None
        with self.store.lock():
            if self.lookup.read(want.ref.url, want.listing.revision) is None:
                return None  # evicted just now
            if not self.store.is_whole(manifest):
                return None
            self.store.note_ref(manifest, want.ref.revision)
            self.store.note_use(manifest.url, manifest.revision, used_at_s=self._clock())
        return manifest

    @contextmanager
    def _alone(self, want: FetchRequest) -> Iterator[None]:
        """Be the one that fetches this model, after any other process that does."""
        make_private(self.store.layout.root)
        with open_lock(self.store.layout.fetch_lock(want.ref.url)) as fd:
            while not try_lock(fd):
                if want.cancelled():
                    raise Cancelled(f"{want.ref.url} is not wanted any more")
                progress = read_fetching(self.store, want.ref.url)
                if progress is not None:
                    want.on_progress(replace(progress, detail="by another process"))
                time.sleep(WAIT_S)
            yield

    def _offline(
        self, ref: ModelRef, error: SourceError, tell: OnProgress, stopped: IsCancelled
    ) -> CachedModel:
        """What is here of a model whose source cannot be asked. Raises ``error`` if nothing is."""
        model = self.lookup.open(self.lookup.resolve(ref))
        if model is None:
            snapshot = self.local_files.snapshot(ref)
            if snapshot is None:
                raise error
            try:
                want = FetchRequest(
                    ref=ref,
                    listing=self._select(ref, snapshot, None),
                    find_local=lambda file: self.local_files.find(ref, file),
                    on_progress=tell,
                    cancelled=stopped,
                )
                model = self._make(want, None)
            except (NotFound, Damaged):
                raise error from None
        note = f"revision {model.revision} from this disk; its source cannot be asked: {error}"
        LOG.warning("%s: %s", ref.url, note)
        return replace(model, note=note)

    def _repair(
        self, manifest: Manifest, found: Sequence[Damage], tell: OnProgress, stopped: IsCancelled
    ) -> None:
        """Fetch what is damaged again; the rest of each file is kept."""
        salvage = plan_salvage(manifest, found)
        if not salvage:  # only its records
            with self.store.lock():
                self.store.complete(manifest, manifest.revision)
            return
        retries = Retries(most=self.settings.retries, cancelled=stopped)
        ref = self.lookup.ref(manifest.url, None)
        ref, listing = list_again(self._open_source, ref, manifest, retries)
        with closing(self._open_source(ref)) as source:
            want = FetchRequest(
                ref=ref,
                listing=listing,
                salvage=salvage,
                created_at_s=manifest.created_at_s,
                on_progress=tell,
                cancelled=stopped,
            )
            self._make(want, source)

    def _select(
        self, ref: ModelRef, listing: Listing, source: Source | None, retries: Retries = ONCE
    ) -> Listing:
        """The files wanted, with those that were wanted earlier: asking for fewer loses none."""
        earlier = self.lookup.read(ref.url, listing.revision)
        here = self.lookup.open(earlier)

        def read(file: RemoteFile) -> bytes:
            local = here.path / file.path if here is not None else None
            if local is None or not local.is_file():
                local = self.local_files.find(ref, file)
            if local is not None:
                return local.read_bytes()
            if source is None:
                raise NotFound(f"{ref.url}: {file.path} is not on this machine")
            return read_file(source, file, retries)

        steps = self.settings.steps_for(ref.url)
        return narrow(
            listing,
            ref.url,
            earlier,
            *self.settings.files_for(ref.url),
            self.settings.bundles_for(ref.url),
            read=read,
            gguf=any(step.kind == "gguf_to_safetensors" for step in steps),
        )

    def _expecting(self, model: CachedModel, at_s: float | None) -> CachedModel:
        if at_s is not None:
            with self.store.lock():
                self.store.note_use(model.url, model.revision, expected_use_at_s=at_s)
        return model
