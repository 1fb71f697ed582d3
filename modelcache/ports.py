"""What passes between the cache and its neighbours: what a source has to do for it (``Source``), a
model it hands out (``CachedModel``), and the functions that are passed around with models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from modelcache.types import FileRange, Listing, Manifest, ModelRef, Progress, RemoteFile

ANNOUNCE_BYTES = 1 << 20
"""Most bytes that a source reads between two calls of ``on_bytes``."""

OnBytes = Callable[[int], None]
"""Told how many bytes have just arrived. It may block: that is how bandwidth is kept."""


OnProgress = Callable[[Progress], None]
IsCancelled = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """A model as a directory that engines open.

    ``manifest`` is ``None`` for a directory that is used where it is. ``note`` says what its user
    should know: that the source could not be asked whether it is still the newest.
    """

    url: str
    revision: str
    path: Path
    manifest: Manifest | None
    note: str = ""

    @classmethod
    def in_place(cls, directory: Path) -> CachedModel:
        """A directory of this machine, used where it is."""
        path = directory.absolute()
        return cls(url=str(path), revision="in place", path=path, manifest=None)


Prewarm = Callable[[Sequence[FileRange], OnProgress, IsCancelled], object]
"""Reads files into the page cache. Blocks."""
Transform = Callable[
    [str, CachedModel, str, OnProgress, IsCancelled], AbstractContextManager[CachedModel]
]
"""The model that a pool names, after its preparation steps, from what the cache has of it; leased
for the holder that is named as long as its context is open. The same model where there are no
steps. Blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeRead:
    """Bytes ``[start, end)`` of a file in a source's own listing, to be written into ``fd`` at the
    same offsets. The position of ``fd`` is not used, so many ranges may be written at once.

    The bytes are written in order. ``on_bytes`` is called with every at most ``ANNOUNCE_BYTES``
    that have been written and may block to throttle; no more than that is read ahead of it.
    """

    file: RemoteFile
    start: int
    end: int
    fd: int
    on_bytes: OnBytes = lambda size_bytes: None
    cancelled: IsCancelled = lambda: False
    what: str = ""
    """What the source calls it in errors; never a signed URL."""
    hint: str = ""
    """Where the source's credentials would go."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retries:
    """How often a question that failed for a reason that may pass is asked again, and whether its
    answer is still wanted."""

    most: int = 0
    cancelled: IsCancelled = lambda: False


ONCE = Retries()


@runtime_checkable
class Source(Protocol):
    """One model in one source. Safe to use from many threads at once."""

    ref: ModelRef

    def list(self, retries: Retries = ONCE) -> Listing:
        """What the model consists of, as of now. ``retries`` is for each question that it takes.

        Raises ``NotFound`` where there is no such model or revision, ``SourceError`` where the
        source cannot be asked, ``Cancelled``.
        """
        ...

    def fetch(self, want: RangeRead) -> None:
        """Read a range into a local file. ``list`` comes first.

        Returns only when exactly that range was written. Raises ``SourceError`` for anything
        else: a shorter or longer answer, a source that ignores ranges, a file that changed since
        it was listed; ``NotFound`` where the file is gone; ``Cancelled`` soon after
        ``cancelled()`` says so. After ``Cancelled`` and an error that is ``retryable``, what
        ``on_bytes`` was told of is the beginning of the range; after any other it counts for
        nothing.
        """
        ...

    def close(self) -> None:
        """Let go of connections. May be called twice."""
        ...
