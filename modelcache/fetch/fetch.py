"""Making one revision whole: what is known already, what can be taken over, what must be fetched.

Room for all of it is made and reserved before the first byte is asked for, so a full disk is said
at once. Then each file becomes a blob as soon as its last piece is there, and the manifest comes
last. Stopped anywhere, the next attempt goes on from what is there.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from modelcache.ports import ONCE, IsCancelled, OnProgress, Retries, Source
from modelcache.store.digest import RECORD, PieceDigests, count_pieces
from modelcache.store.files import (
    copy_range,
    link,
    link_or_clone,
    make_directory,
    remove,
    remove_empty,
)
from modelcache.store.layout import file_key
from modelcache.store.partial_files import TREE, Partial
from modelcache.store.records import FETCHING, Fetching, check_listing
from modelcache.store.store import Damage, Store, compare_file, hash_file
from modelcache.types import (
    FULL,
    CacheError,
    Cancelled,
    Damaged,
    FileEntry,
    Listing,
    Made,
    Manifest,
    ModelRef,
    NoSpace,
    NotFound,
    Priority,
    Progress,
    RemoteFile,
)

LOG = logging.getLogger("tidegate.modelcache")

LINKED = "linked"
RECORD_BYTES = 4_096
"""About what the records of one file take."""

ATTEMPTS = 2


class PieceTransfer(Protocol):
    """What brings pieces (``modelcache.fetch.transfer.Transfer``)."""

    def run(
        self,
        source: Source,
        files: Sequence[tuple[RemoteFile, Partial]],
        *,
        priority: Priority = ...,
        on_progress: OnProgress | None = ...,
        cancelled: IsCancelled | None = ...,
    ) -> None:
        """Commit every missing piece of ``files``. Its progress is of all their bytes, those that
        were there before included. Raises ``Damaged`` where ``Partial.on_whole`` did."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Salvage:
    """A blob of which some pieces are damaged; the others need not be fetched again."""

    digest: str
    bad_pieces: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchRequest:
    """What is to be made whole, and how. ``find_local`` gives a file on this machine that may have
    a remote file's content; it is hashed, and checked against what the source publishes.
    ``created_at_s``: when it was made whole first, where it is mended. ``given``: its local files
    are given away to the cache, which takes their names and never copies their bytes. ``made``:
    what it was made of."""

    ref: ModelRef
    listing: Listing
    priority: Priority = Priority.PRELOAD
    find_local: Callable[[RemoteFile], Path | None] = lambda file: None
    salvage: Mapping[str, Salvage] = field(default_factory=dict)
    created_at_s: float | None = None
    given: bool = False
    made: Made | None = None
    on_progress: OnProgress = lambda progress: None
    cancelled: IsCancelled = lambda: False


@dataclass(slots=True, kw_only=True, eq=False)
class FetchedFile:
    """One file on its way: ``digest`` once it is a blob, ``local`` while it may be taken over."""

    remote: RemoteFile
    key: str
    digest: str | None = None
    local: Path | None = None
    linked: bool = False
    salvage: Salvage | None = None

    @property
    def expected(self) -> Mapping[str, str]:
        """The digests it must have."""
        if self.salvage is None:
            return self.remote.digests
        return {**self.remote.digests, TREE: self.salvage.digest}


class Fetch:
    """One revision being made whole. Used once, by the one that holds the model's fetch lock."""

    def __init__(
        self,
        store: Store,
        transfer: PieceTransfer,
        source: Source | None,
        want: FetchRequest,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        check_listing(want.listing.files)
        self.store = store
        self.layout = store.layout
        self.want = want
        self._transfer = transfer
        self._source = source
        self._clock = clock
        url, revision = want.ref.url, want.listing.revision
        self.files = [
            FetchedFile(
                remote=file,
                key=file_key(url, file, revision),
                salvage=want.salvage.get(file.path),
            )
            for file in want.listing.files
        ]
        self._checked_bytes = 0
        self._fetched_bytes = 0

    def run(self) -> Manifest:
        """Make it whole; its manifest.

        Raises ``NoSpace`` before anything is fetched; ``Cancelled``, ``SourceError``, ``Damaged``
        (not what its source says it is, twice) as they come, and what is there stays.
        """
        began_s = time.monotonic()
        self._recognise()
        self._reserve()
        for file in self.files:
            if file.linked or (file.local is not None and file.digest is None):
                self._take_over(file)
        self._download()
        took_s = time.monotonic() - began_s
        manifest = self._complete(took_s)
        if self._fetched_bytes:
            megabytes = self._fetched_bytes / 1e6
            LOG.info("%s: fetched %.1f MB in %.1f s", self.want.ref.url, megabytes, took_s)
        return manifest

    def _recognise(self) -> None:
        """Find what is here already. A blob that was touched since is hashed again first."""
        for file in self.files:
            if file.salvage is not None:
                continue
            file.digest = self.store.lookup(file.key, file.remote)
            if file.digest is None:
                file.digest = self._recover(file)
            if file.digest is None:
                file.local = self.want.find_local(file.remote)

    def _recover(self, file: FetchedFile) -> str | None:
        for digest in self.store.known(file.key, file.remote):
            blob = self.layout.blob(digest)
            if not blob.is_file():
                continue
            found = self._hash(blob)
            with self.store.lock():
                if found.digest == digest and blob.is_file():
                    self.store.vouch(found)
                    return digest
                self.store.drop_blob(digest)
        return None

    def _reserve(self) -> None:
        """Make room for what is missing, and take it, before anything is fetched."""
        url, revision = self.want.ref.url, self.want.listing.revision
        path = self.layout.revision(url, revision) / FETCHING
        with self.store.lock():
            fresh = not path.exists()
            self._begin(
                Fetching(
                    url=url,
                    revision=revision,
                    files=tuple(file.remote for file in self.files),
                    started_at_s=self._clock(),
                )
            )
            for file in self.files:
                if file.digest is not None and not self.layout.blob(file.digest).exists():
                    file.digest = None  # evicted after it was recognised, before it was held
            try:
                self._link()
                self._reserve_rest()
            except NoSpace:
                if fresh:
                    remove(path)
                    remove_empty(path.parent)
                    self.store.capacity.sweep()
                raise

    def _begin(self, fetching: Fetching) -> None:
        """Record it, also on a disk that is full of what may be evicted."""
        try:
            self.store.begin(fetching)
        except OSError as error:
            if error.errno not in FULL:
                raise
            need = RECORD_BYTES * (1 + len(self.files))
            self.store.capacity.make_room(0, need, what=fetching.url)
            self.store.begin(fetching)

    def _link(self) -> None:
        """Give files that may be taken over a name here. Costs no room, and holds them."""
        for file in self.files:
            if file.local is None:
                continue
            directory = self.layout.partial(file.key)
            make_directory(directory)
            linked = directory / LINKED
            remove(linked)
            try:
                # A clone would count twice until what was given has gone.
                given = self.want.given and not file.local.is_symlink()
                file.linked = given and link(file.local, linked)
                if not file.linked:
                    file.linked = link_or_clone(file.local.resolve(), linked)
            except OSError:
                file.local = None

    def _reserve_rest(self) -> None:
        missing = [file for file in self.files if file.digest is None]
        fetched = [file for file in missing if not file.linked]
        unreserved = sum(
            file.remote.size_bytes
            for file in fetched
            if not Partial.is_reserved(self.layout, file.key, file.remote.size_bytes)
        )
        pieces = sum(count_pieces(f.remote.size_bytes, self.store.piece_bytes) for f in missing)
        need = unreserved + pieces * RECORD.size + RECORD_BYTES * len(missing)
        name = f"{self.want.ref.url}@{self.want.listing.revision}"
        self.store.capacity.make_room(
            # What is linked counts already: its name lies in the cache.
            need,
            need if fetched else 0,
            what=self.want.ref.url,
            keep=name,
        )
        try:
            for file in fetched:
                Partial.reserve(self.layout, file.key, file.remote.size_bytes)
        except OSError as error:
            if error.errno not in FULL:
                raise
            problem = f"{self.want.ref.url} needs {need} bytes: "
            raise NoSpace(problem + self.store.capacity.explain_full(error)) from error

    def _take_over(self, file: FetchedFile) -> None:
        """Hash a file that is on this machine and make it ours, unless it is not what it should
        be: then it is fetched like any other."""
        if not file.linked:
            self._copy(file)
            return
        linked = self.layout.partial(file.key) / LINKED
        before = os.stat(linked)
        found = self._hash(linked)
        problem = compare_file(linked, found.digest, file.expected)
        after = os.stat(linked)
        changed = before.st_mtime_ns != after.st_mtime_ns or found.size_bytes != after.st_size
        with self.store.lock():
            if problem or changed or found.size_bytes != file.remote.size_bytes:
                remove(linked)
                file.linked = False
                self._reserve_rest()
            else:
                sha256 = file.remote.digests.get("sha256")
                file.digest = self.store.take_over(linked, file.key, sha256, found)

    def _copy(self, file: FetchedFile) -> None:
        """Take over a file of another file system."""
        assert file.local is not None
        try:
            with self._open(file) as partial, open(file.local, "rb") as local:
                for index in partial.missing():
                    self._check_cancelled()
                    copy_range(local.fileno(), partial.fd, *partial.span(index))
                    partial.commit(index)
                if file.digest is None:
                    self._finish(file, partial)
        except (Damaged, EOFError, OSError):
            file.local = None

    def _download(self) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            missing = [file for file in self.files if file.digest is None]
            if not missing:
                return
            try:
                self._download_once(missing, salvage=attempt == 1)
            except Damaged:
                # Perhaps a peer's fault, or memory's: once more, from the source alone.
                if attempt == ATTEMPTS:
                    raise

    def _download_once(self, missing: Sequence[FetchedFile], *, salvage: bool) -> None:
        with ExitStack() as stack:
            opened = []
            for file in missing:
                partial = stack.enter_context(self._open(file))
                if file.salvage is not None and salvage:
                    self._salvage(file.salvage, partial)
                if file.digest is None and not partial.missing():
                    self._finish(file, partial)
                if file.digest is None:
                    opened.append((file.remote, partial))
            if not opened:
                return
            if self._source is None:
                raise NotFound(f"{self.want.ref.url}: some of its files are not on this machine")
            there = sum(partial.bytes_done + partial.bytes_begun for _, partial in opened)
            total = sum(file.size_bytes for file, _ in opened)
            base = sum(file.remote.size_bytes for file in self.files) - total
            self._transfer.run(
                self._source,
                opened,
                priority=self.want.priority,
                on_progress=lambda progress: self._tell(progress, base),
                cancelled=self.want.cancelled,
            )
            self._fetched_bytes += total - there

    def _open(self, file: FetchedFile) -> Partial:
        """The file's partial; the thread that commits its last piece makes it a blob."""
        return Partial.open(
            self.layout,
            file.key,
            file.remote.size_bytes,
            piece_bytes=self.store.piece_bytes,
            on_whole=lambda partial: self._finish(file, partial),
        )

    def _finish(self, file: FetchedFile, partial: Partial) -> None:
        try:
            file.digest = partial.finish(file.expected, replace=file.salvage is not None)
        except Damaged as error:
            raise Damaged(f"{self.want.ref.url}: {file.remote.path}: {error}") from error

    def _salvage(self, salvage: Salvage, partial: Partial) -> None:
        """Take the good pieces of a damaged blob."""
        good = [index for index in partial.missing() if index not in salvage.bad_pieces]
        with (
            suppress(FileNotFoundError, EOFError),
            open(self.layout.blob(salvage.digest), "rb") as blob,
        ):
            for index in good:
                self._check_cancelled()
                copy_range(blob.fileno(), partial.fd, *partial.span(index))
                partial.commit(index)

    def _complete(self, took_s: float) -> Manifest:
        entries = tuple(
            FileEntry(
                path=file.remote.path,
                size_bytes=file.remote.size_bytes,
                digest=file.digest,
                version=file.remote.version,
            )
            for file in self.files
            if file.digest is not None
        )
        assert len(entries) == len(self.files), "every file has become a blob"
        created_at_s = self.want.created_at_s
        manifest = Manifest(
            url=self.want.ref.url,
            revision=self.want.listing.revision,
            files=entries,
            created_at_s=self._clock() if created_at_s is None else created_at_s,
            made=self.want.made,
        )
        with self.store.lock():
            self.store.complete(manifest, self.want.ref.revision)
            changes: dict[str, float | None] = {"used_at_s": self._clock()}
            if self._fetched_bytes > 0:
                changes["reload_s_per_gb"] = took_s / (self._fetched_bytes / 1e9)
            self.store.note_use(manifest.url, manifest.revision, **changes)
        return manifest

    def _hash(self, path: Path) -> PieceDigests:
        total = sum(file.remote.size_bytes for file in self.files)

        def count(bytes_more: int) -> None:
            self._checked_bytes += bytes_more
            done = min(self._checked_bytes, total)
            self.want.on_progress(
                Progress(phase="checking", bytes_done=done, bytes_total=total, detail=path.name)
            )

        return hash_file(
            path,
            piece_bytes=self.store.piece_bytes,
            on_bytes=count,
            cancelled=self.want.cancelled,
        )

    def _tell(self, progress: Progress, base: int) -> None:
        total = sum(file.remote.size_bytes for file in self.files)
        self.want.on_progress(
            replace(progress, bytes_done=base + progress.bytes_done, bytes_total=total)
        )

    def _check_cancelled(self) -> None:
        if self.want.cancelled():
            raise Cancelled(f"{self.want.ref.url} is not wanted any more")


def plan_salvage(manifest: Manifest, found: Sequence[Damage]) -> dict[str, Salvage]:
    """By path: the blobs that are damaged, and the pieces of them that are."""
    pieces: dict[str, set[int]] = {damage.digest: set() for damage in found if damage.digest}
    for damage in found:
        if damage.piece is not None:
            pieces[damage.digest].add(damage.piece)
    return {
        file.path: Salvage(digest=file.digest, bad_pieces=frozenset(pieces[file.digest]))
        for file in manifest.files
        if file.digest in pieces
    }


def list_again(
    open_source: Callable[[ModelRef], Source],
    ref: ModelRef,
    manifest: Manifest,
    retries: Retries = ONCE,
) -> tuple[ModelRef, Listing]:
    """The files of a manifest as their source lists them now, and how to ask for them.

    Some sources can be asked for that revision, others only for what they have now. Raises
    ``CacheError`` where it is history.
    """
    seen = ""
    for revision in (manifest.revision, None):
        asked = replace(ref, revision=revision)
        try:
            with closing(open_source(asked)) as source:
                listing = source.list(retries)
        except NotFound:
            continue
        if listing.revision == manifest.revision:
            wanted = {file.path for file in manifest.files}
            files = tuple(file for file in listing.files if file.path in wanted)
            return asked, replace(listing, files=files)
        seen = listing.revision
    raise CacheError(
        f"{manifest.url}: its source has {f'revision {seen}' if seen else 'nothing'} now, so "
        f"{manifest.revision} cannot be mended; evict it and preload it anew"
    )
