"""The disk store: blobs by digest, the revisions made of them, and the room they take.

What is on disk is the state; nothing about it is remembered, so nothing remembered can be wrong
after a kill. Every change happens with the store locked, in an order whose every prefix is sound:
a revision exists from the moment its manifest has its name until that name is gone, and whatever
lies about without a revision is swept.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from modelcache.ports import IsCancelled, OnBytes
from modelcache.store import leases
from modelcache.store.capacity import Capacity
from modelcache.store.digest import (
    PieceDigests,
    count_pieces,
    digest_piece,
    piece_span,
    read_pieces,
)
from modelcache.store.files import (
    locked,
    make_private,
    put,
    remove,
    remove_empty,
    remove_tree,
    write_changed,
    write_whole,
)
from modelcache.store.layout import Layout
from modelcache.store.partial_files import (
    compare_digests,
    is_sound,
    mapped,
    note_known,
    write_pieces,
)
from modelcache.store.records import (
    FETCHING,
    MANIFEST,
    PIN,
    SPARE,
    USE,
    Fetching,
    known_blobs,
    read_manifest,
    read_record,
    read_use,
    seal,
)
from modelcache.store.snapshots import build_snapshot, show_in_hub, snapshot_is_whole
from modelcache.types import (
    FULL,
    PIECE_BYTES,
    CacheError,
    Cancelled,
    Damaged,
    FileEntry,
    Manifest,
    NoSpace,
    RemoteFile,
)

LOG = logging.getLogger("tidegate.modelcache")


THREADS = 4


class Store:
    """The cache below one directory. Any number of processes and threads may use it at once."""

    def __init__(
        self,
        root: Path,
        *,
        quota_bytes: int | None = None,
        reserve_bytes: int = 0,
        piece_bytes: int = PIECE_BYTES,
        free_bytes: Callable[[Path], int] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.layout = Layout(root)
        self.piece_bytes = piece_bytes
        self.capacity = Capacity(
            self.layout,
            quota_bytes=quota_bytes,
            reserve_bytes=reserve_bytes,
            free_bytes=free_bytes,
            clock=clock,
        )
        self._clock = clock

    @contextmanager
    def lock(self) -> Iterator[None]:
        """No other process changes the store meanwhile. Held for moments, never while fetching.

        Raises ``CacheError`` where the cache's directory is another user's or damaged, ``NoSpace``
        where the disk is full."""
        with self.disk_errors():
            make_private(self.layout.root)
            with locked(self.layout.store_lock):
                yield

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Raise ``NoSpace``, which says what can be freed, where the disk turns out to be full, and
        ``CacheError`` where a file of the cache is a directory, or the other way round."""
        try:
            yield
        except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:
            raise CacheError(f"the cache at {self.layout.root} is damaged: {error}") from error
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise NoSpace(self.capacity.explain_full(error)) from error

    # What is there

    def lookup(self, key: str, file: RemoteFile) -> str | None:
        """The blob that a remote file is known to be, if it is there and sound."""
        return next((d for d in self.known(key, file) if self.is_sound(d, file.size_bytes)), None)

    def known(self, key: str, file: RemoteFile) -> list[str]:
        """The blobs that a remote file is known to be, there or not, sound or not."""
        return known_blobs(self.layout, key, file)

    def is_sound(self, digest: str, size_bytes: int) -> bool:
        """Whether a blob is there and unchanged since it was hashed; ``partial_files.is_sound``."""
        return is_sound(self.layout, digest, size_bytes, self.piece_bytes)

    def read_pieces(self, digest: str, size_bytes: int) -> PieceDigests:
        """The digests of a blob's pieces. Raises ``Damaged``."""
        path = self.layout.pieces(digest)
        return read_pieces(path, digest, size_bytes, piece_bytes=self.piece_bytes)

    def is_whole(self, manifest: Manifest) -> bool:
        """Whether every blob of a revision is there and sound."""
        return all(self.is_sound(file.digest, file.size_bytes) for file in manifest.files)

    def open_snapshot(self, manifest: Manifest) -> Path:
        """The directory of a revision, made again where it was changed."""
        directory = self.layout.snapshot(manifest.url, manifest.revision)
        if not snapshot_is_whole(self.layout, directory, manifest.files):
            with self.lock():
                if not snapshot_is_whole(self.layout, directory, manifest.files):
                    build_snapshot(self.layout, directory, manifest.files)
        return directory

    # What changes it. Everything below is called with the store locked.

    def begin(self, fetching: Fetching) -> None:
        """Record that a revision is being fetched; what it has so far is swept no more."""
        path = self.layout.revision(fetching.url, fetching.revision) / FETCHING
        write_whole(path, seal(fetching), tmp=self.layout.tmp)

    def complete(self, manifest: Manifest, name: str | None) -> Path:
        """Make a revision whole: from here on it is there. ``name`` is what was asked for."""
        directory = self.layout.revision(manifest.url, manifest.revision)
        sealed = seal(manifest)
        write_whole(directory / SPARE, sealed, tmp=self.layout.tmp)
        view = self.layout.snapshot(manifest.url, manifest.revision)
        if not snapshot_is_whole(self.layout, view, manifest.files):
            build_snapshot(self.layout, view, manifest.files)
        write_whole(directory / MANIFEST, sealed, tmp=self.layout.tmp)
        self.note_ref(manifest, name)
        remove(directory / FETCHING)
        return view

    def note_ref(self, manifest: Manifest, name: str | None) -> None:
        """Record what ``name`` stands for now, and show it to users of Hugging Face caches."""
        ref = self.layout.ref(manifest.url, name)
        write_changed(ref, manifest.revision.encode(), tmp=self.layout.tmp)
        show_in_hub(self.layout, manifest, name)

    def note_use(self, url: str, revision: str, **changes: Any) -> None:
        """Change the record of a revision's use (the fields of ``Use``). It is advice only: a disk
        that does not take it, a full one, is no error."""
        directory = self.layout.revision(url, revision)
        try:
            if directory.is_dir():
                use = replace(read_use(directory), **changes)
                write_whole(directory / USE, seal(use), tmp=self.layout.tmp)
        except OSError as error:
            LOG.warning("%s: how it is used cannot be noted: %s", url, error)

    def set_pin(self, url: str, revision: str, *, pinned: bool) -> None:
        """Pin a revision or let it go."""
        path = self.layout.revision(url, revision) / PIN
        if pinned:
            write_whole(path, b"", tmp=self.layout.tmp)
        else:
            remove(path)

    def take_lease(
        self, url: str, revision: str, holder: str, *, ahead: bool = False
    ) -> leases.Lease | None:
        """A lease on a whole revision, ``None`` where it is not there any more.

        ``ahead``: also on one that will be made, so that it is never there without.
        """
        if not ahead and read_manifest(self.layout, url, revision) is None:
            return None

        def released() -> None:
            with self.lock():
                remove_empty(directory, directory.parent)
                self.note_use(url, revision, used_at_s=self._clock())

        directory = self.layout.leases(url, revision)
        self.note_use(url, revision, used_at_s=self._clock())
        # Last: whatever failed after it would leave a lease that could not be released.
        return leases.take(self.layout, directory, holder, released)

    def take_over(self, linked: Path, key: str, sha256: str | None, digests: PieceDigests) -> str:
        """Make a file a blob that was hashed and has a name in the store's directory already."""
        digest = digests.digest
        # A blob that is there stays: views of other models are names of it.
        stays = self.is_sound(digest, digests.size_bytes)
        if not stays:
            write_pieces(self.layout, digests, os.stat(linked).st_mtime_ns)
        note_known(self.layout, key, digest, sha256)
        if not stays:
            put(linked, self.layout.blob(digest))
        remove_tree(linked.parent)
        return digest

    def vouch(self, digests: PieceDigests) -> None:
        """Write a blob's digests again, after it was hashed again and was right."""
        mtime_ns = os.stat(self.layout.blob(digests.digest)).st_mtime_ns
        write_pieces(self.layout, digests, mtime_ns)

    def drop_blob(self, digest: str) -> None:
        """Remove a blob that is damaged. Engines that have it open keep what they have."""
        remove(self.layout.blob(digest))
        remove(self.layout.pieces(digest))


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """Something that is not as it was. ``piece`` is ``None`` where it is not a piece of a file
    but the file itself (missing, of another size) or a record about it."""

    path: str
    problem: str
    digest: str = ""
    piece: int | None = None


def hash_file(
    path: Path,
    *,
    piece_bytes: int,
    on_bytes: OnBytes = lambda count: None,
    cancelled: IsCancelled = lambda: False,
) -> PieceDigests:
    """The digests of a file's pieces, by a few threads. Raises ``Cancelled``."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size_bytes = os.fstat(fd).st_size

        def hash_piece(index: int) -> tuple[bytes, int]:
            if cancelled():
                raise Cancelled("not wanted any more")
            start, end = piece_span(index, size_bytes, piece_bytes)
            with mapped(fd, start, end) as buffer:
                return digest_piece(buffer)

        pieces = []
        with ThreadPoolExecutor(THREADS, thread_name_prefix="check") as threads:
            for index, piece in enumerate(
                threads.map(hash_piece, range(count_pieces(size_bytes, piece_bytes)))
            ):
                pieces.append(piece)
                start, end = piece_span(index, size_bytes, piece_bytes)
                on_bytes(end - start)
    finally:
        os.close(fd)
    return PieceDigests(size_bytes=size_bytes, pieces=tuple(pieces), piece_bytes=piece_bytes)


def compare_file(path: Path, tree: str, expected: Mapping[str, str]) -> str | None:
    """What is wrong with a file by the digests its source published, if anything is."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return compare_digests(fd, os.fstat(fd).st_size, tree, expected)
    finally:
        os.close(fd)


def check_manifest(layout: Layout, url: str, revision: str) -> list[Damage]:
    """What is wrong with the two copies of a manifest."""
    directory = layout.revision(url, revision)
    found = []
    for name in (MANIFEST, SPARE):
        try:
            problem = None if read_record(directory / name, Manifest) else f"{name} is missing"
        except Damaged as damage:
            problem = str(damage)
        if problem:
            found.append(Damage(path=name, problem=problem))
    return found


def check_files(
    store: Store,
    manifest: Manifest,
    *,
    on_bytes: OnBytes = lambda count: None,
    cancelled: IsCancelled = lambda: False,
) -> Iterator[Damage]:
    """Read every byte of a revision; what is not as it was."""
    checked: set[str] = set()
    for file in manifest.files:
        if file.digest not in checked:
            checked.add(file.digest)
            yield from check_blob(store, file, on_bytes=on_bytes, cancelled=cancelled)


def check_blob(
    store: Store,
    file: FileEntry,
    *,
    on_bytes: OnBytes = lambda count: None,
    cancelled: IsCancelled = lambda: False,
) -> Iterator[Damage]:
    """What is wrong with one blob and with the digests beside it."""
    blob = store.layout.blob(file.digest)

    def damage(problem: str, piece: int | None = None) -> Damage:
        return Damage(path=file.path, problem=problem, digest=file.digest, piece=piece)

    try:
        size_bytes = os.stat(blob).st_size
        if size_bytes != file.size_bytes:
            yield damage(f"it has {size_bytes} bytes instead of {file.size_bytes}")
            return
        found = hash_file(
            blob, piece_bytes=store.piece_bytes, on_bytes=on_bytes, cancelled=cancelled
        )
    except FileNotFoundError:
        yield damage("it is missing")
        return
    except OSError as error:
        yield damage(f"it cannot be read: {error.strerror}")
        return
    try:
        known = store.read_pieces(file.digest, file.size_bytes)
    except Damaged as problem:
        yield damage(str(problem))
        if found.digest != file.digest:
            yield damage("its content is not what it was, nor is the record of its pieces")
        return
    for index, (now, then) in enumerate(zip(found.pieces, known.pieces, strict=True)):
        if now[0] != then[0]:
            yield damage("its content is not what it was", index)
        elif now[1] != then[1]:
            yield damage("the record of this piece is not what it was", index)
