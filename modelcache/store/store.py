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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from modelcache.store import leases
from modelcache.store.capacity import Room
from modelcache.store.digest import PieceDigests, read_pieces
from modelcache.store.files import locked, remove, remove_empty, remove_tree, write_whole
from modelcache.store.hub_layout import show_in_hub
from modelcache.store.layout import Layout
from modelcache.store.manifest import Fetching, seal
from modelcache.store.partial_files import is_sound, note_known, write_pieces
from modelcache.store.revisions import (
    FETCHING,
    MANIFEST,
    PIN,
    SPARE,
    USE,
    known_blobs,
    read_manifest,
    read_use,
)
from modelcache.store.snapshots import build_view, view_is_whole, view_of
from modelcache.types import PIECE_BYTES, Manifest, RemoteFile

LOG = logging.getLogger("tidegate.modelcache")


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
        self.room = Room(
            self.layout,
            quota_bytes=quota_bytes,
            reserve_bytes=reserve_bytes,
            free_bytes=free_bytes,
            clock=clock,
        )
        self._clock = clock

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Nobody else changes the store meanwhile. Held for moments, never while fetching."""
        with locked(self.layout.store_lock):
            yield

    # What is there

    def lookup(self, key: str, file: RemoteFile) -> str | None:
        """The blob that a remote file is known to be, if it is there and sound."""
        return next((d for d in self.known(key, file) if self.is_sound(d, file.size_bytes)), None)

    def known(self, key: str, file: RemoteFile) -> list[str]:
        """The blobs that a remote file is known to be, there or not, sound or not."""
        return known_blobs(self.layout, key, file)

    def is_sound(self, digest: str, size_bytes: int) -> bool:
        """Whether a blob is there and nobody has written to it since; see ``partial.is_sound``."""
        return is_sound(self.layout, digest, size_bytes, self.piece_bytes)

    def read_pieces(self, digest: str, size_bytes: int) -> PieceDigests:
        """The digests of a blob's pieces. Raises ``Damaged``."""
        path = self.layout.pieces(digest)
        return read_pieces(path, digest, size_bytes, piece_bytes=self.piece_bytes)

    def is_whole(self, manifest: Manifest) -> bool:
        """Whether every blob of a revision is there and sound."""
        return all(self.is_sound(file.digest, file.size_bytes) for file in manifest.files)

    def open_view(self, manifest: Manifest) -> Path:
        """The directory of a revision, made again where somebody has touched it."""
        directory = view_of(self.layout, manifest)
        if not view_is_whole(self.layout, directory, manifest.files):
            with self.lock():
                if not view_is_whole(self.layout, directory, manifest.files):
                    build_view(self.layout, directory, manifest.files)
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
        view = view_of(self.layout, manifest)
        if not view_is_whole(self.layout, view, manifest.files):
            build_view(self.layout, view, manifest.files)
        write_whole(directory / MANIFEST, sealed, tmp=self.layout.tmp)
        self.note_ref(manifest, name)
        remove(directory / FETCHING)
        return view

    def note_ref(self, manifest: Manifest, name: str | None) -> None:
        """Record what ``name`` stands for now, and show it to users of Hugging Face caches."""
        ref = self.layout.ref(manifest.url, name)
        write_whole(ref, manifest.revision.encode(), tmp=self.layout.tmp)
        show_in_hub(self.layout, manifest, name)

    def note_use(self, url: str, revision: str, **changes: Any) -> None:
        """Change the record of a revision's use (the fields of ``Use``)."""
        directory = self.layout.revision(url, revision)
        if directory.is_dir():
            use = replace(read_use(directory), **changes)
            write_whole(directory / USE, seal(use), tmp=self.layout.tmp)

    def advise(self, url: str, revision: str, **changes: Any) -> None:
        """``note_use`` where the disk takes it: it is advice only, so a full disk stops nobody."""
        try:
            self.note_use(url, revision, **changes)
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
                self.advise(url, revision, used_at_s=self._clock())

        directory = self.layout.leases(url, revision)
        self.advise(url, revision, used_at_s=self._clock())
        # Last: whatever failed after it would leave a lease that nobody could release.
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
            os.rename(linked, self.layout.blob(digest))
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
