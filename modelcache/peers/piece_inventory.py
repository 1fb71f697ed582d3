"""What this node has for its peers: blobs that are whole, and pieces of files on their way.

Of a file that is being fetched it shows only the pieces that it has read from the source itself.
What it was given by a peer it shows when the file is whole and its digest is right: so a peer that
passes on wrong bytes is the one that made them up, and can be avoided for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from modelcache.peers.wire import PieceState
from modelcache.ports import IsCancelled
from modelcache.store.digest import PieceDigests, piece_span, read_pieces
from modelcache.store.layout import Layout
from modelcache.store.partial_files import Partial
from modelcache.types import Cancelled, Damaged

MOST_REMEMBERED = 4_096
MOST_OPEN = 64
"""Whole blobs whose pieces' digests are kept in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PieceSlice:
    """Where a piece lies, and what it must be. ``fd`` is open as long as its context."""

    fd: int
    start: int
    size_bytes: int
    digest: bytes


class FetchingFile:
    """A file that is being fetched here, as peers see it."""

    def __init__(self, inventory: PieceInventory, partial: Partial) -> None:
        self._inventory = inventory
        self.partial = partial
        self.has = 0
        self.fetching = 0
        # Its own descriptor: the partial closes its when it becomes a blob, and the number may
        # then stand for another file.
        self.fd = os.dup(partial.fd)

    def begin(self, index: int) -> None:
        """A piece is being read from the source."""
        with self._inventory.changing(self.partial.key):
            self.fetching |= 1 << index

    def end(self, index: int, *, good: bool) -> None:
        """It has been read, and is good or not."""
        with self._inventory.changing(self.partial.key):
            self.fetching &= ~(1 << index)
            self.has |= good << index

    def duplicate(self) -> int:
        """A descriptor of its file that the caller closes. Raises ``Cancelled`` once it is closed:
        a late writer must not write into what its number then stands for."""
        with self._inventory.changed:
            if self.fd < 0:
                raise Cancelled("not wanted any more")
            return os.dup(self.fd)

    def close(self) -> None:
        """Show it no more, other than as a blob if it became one. May be called twice."""
        with self._inventory.changed:
            self._inventory.forget(self)
            fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@dataclass(slots=True)
class _Whole:
    digests: PieceDigests
    path: str
    all_pieces: int = field(init=False)

    def __post_init__(self) -> None:
        self.all_pieces = (1 << len(self.digests.pieces)) - 1


class PieceInventory:
    """Everything that peers may ask of this node. Thread-safe."""

    def __init__(self, layout: Layout | None = None) -> None:
        self._layout = layout
        self.changed = threading.Condition()
        self._active: dict[str, FetchingFile] = {}
        self._sequence = 1
        self._moved: OrderedDict[str, int] = OrderedDict()
        self._whole: OrderedDict[str, _Whole] = OrderedDict()

    def open(self, partial: Partial) -> FetchingFile:
        """Show a file that is about to be fetched."""
        holding = FetchingFile(self, partial)
        with self.changed:
            self._active[partial.key] = holding
            self._note(partial.key)
        return holding

    @contextlib.contextmanager
    def changing(self, key: str) -> Iterator[None]:
        """What peers may have of a file changes; those that wait for news of it hear of it."""
        with self.changed:
            yield
            self._note(key)

    def forget(self, file: FetchingFile) -> None:
        """A file is not being fetched any more. Called with ``changed`` held."""
        if self._active.get(file.partial.key) is file:
            del self._active[file.partial.key]
            self._note(file.partial.key)

    def _note(self, key: str) -> None:
        self._sequence += 1
        self._moved[key] = self._sequence
        self._moved.move_to_end(key)
        if len(self._moved) > MOST_REMEMBERED:
            self._moved.popitem(last=False)
        self.changed.notify_all()

    def wait(self, keys: Sequence[str], since: int, wait_s: float, stopped: IsCancelled) -> int:
        """Wait until one of the files has moved on from ``since``, or so long; where it is now."""
        with self.changed:
            self.changed.wait_for(
                lambda: stopped() or any(self._moved.get(key, 0) > since for key in keys), wait_s
            )
            return self._sequence

    def wake(self) -> None:
        """Let waiting threads see whether they are to stop."""
        with self.changed:
            self.changed.notify_all()

    def states(self, keys: Sequence[str]) -> dict[str, PieceState]:
        """What there is of these files; those of which there is nothing are left out."""
        with self.changed:
            found = {
                key: PieceState(has=one.has, fetching=one.fetching, active=True)
                for key in keys
                if (one := self._active.get(key)) is not None and one.partial.fd >= 0
            }
        for key in keys:
            if key not in found and (whole := self._find_whole(key)) is not None:
                found[key] = PieceState(has=whole.all_pieces)
        return found

    @contextlib.contextmanager
    def piece(self, key: str, index: int) -> Iterator[PieceSlice | None]:
        """A piece that may be given to a peer; ``None`` where there is none."""
        found = self._active_piece(key, index) or self._whole_piece(key, index)
        try:
            yield found
        finally:
            if found is not None:
                os.close(found.fd)

    def _active_piece(self, key: str, index: int) -> PieceSlice | None:
        with self.changed:
            one = self._active.get(key)
            if one is None or not one.has >> index & 1:
                return None
            digests = one.partial.piece(index)
            if digests is None:
                return None
            start, end = one.partial.span(index)
            return PieceSlice(
                fd=os.dup(one.fd), start=start, size_bytes=end - start, digest=digests[0]
            )

    def _whole_piece(self, key: str, index: int) -> PieceSlice | None:
        whole = self._find_whole(key)
        if whole is None or not whole.all_pieces >> index & 1:
            return None
        start, end = piece_span(index, whole.digests.size_bytes)
        try:
            fd = os.open(whole.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return None
        digest = whole.digests.pieces[index][0]
        return PieceSlice(fd=fd, start=start, size_bytes=end - start, digest=digest)

    def _find_whole(self, key: str) -> _Whole | None:
        if self._layout is None:
            return None
        try:
            digest = self._layout.known(key).read_text().strip()
            blob = self._layout.blob(digest)
            size_bytes = blob.stat().st_size
        except (OSError, UnicodeDecodeError):
            return None
        with self.changed:
            found = self._whole.get(digest)
            if found is not None:
                self._whole.move_to_end(digest)
                return found
        try:
            digests = read_pieces(self._layout.pieces(digest), digest, size_bytes)
        except Damaged:
            # Shortened, or its digests are: nothing to give to others.
            return None
        found = _Whole(digests, str(blob))
        with self.changed:
            self._whole[digest] = found
            if len(self._whole) > MOST_OPEN:
                self._whole.popitem(last=False)
        return found


def check_key(text: str) -> bool:
    """Whether ``text`` could be a file's key. Keys become names of files, so nothing else may."""
    return len(text) == 40 and all(letter in "0123456789abcdef" for letter in text)
