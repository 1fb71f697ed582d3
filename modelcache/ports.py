"""What the cache asks of a store: what a model consists of, and bytes of a file into a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from modelcache.types import ModelRef, RemoteFile

ANNOUNCE_BYTES = 1 << 20
"""Most bytes that a source reads between two calls of ``on_bytes``."""

OnBytes = Callable[[int], None]
"""Told how many bytes have just arrived. It may block: that is how bandwidth is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """The files of one revision of a model. ``revision`` is exact: it names these bytes and no
    others, where what was asked for (a branch, nothing at all) may mean others tomorrow."""

    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def size_bytes(self) -> int:
        """The sum of its files."""
        return sum(file.size_bytes for file in self.files)


@runtime_checkable
class Source(Protocol):
    """One model in one store. Safe to use from many threads at once."""

    ref: ModelRef

    def list(self) -> Listing:
        """What the model consists of, as of now.

        Raises ``NotFound`` where there is no such model or revision, ``SourceError`` where the
        store cannot be asked.
        """
        ...

    def fetch(
        self,
        file: RemoteFile,
        start: int,
        end: int,
        fd: int,
        *,
        on_bytes: OnBytes,
        cancelled: Callable[[], bool],
    ) -> None:
        """Write bytes ``[start, end)`` of ``file`` into ``fd`` at the same offsets.

        ``file`` is of this source's own listing: ``list`` comes first.

        ``on_bytes`` is called with every at most ``ANNOUNCE_BYTES`` that have arrived and may
        block to throttle; no more than that is read ahead of it. The file's position is not
        used, so many ranges may be written at once.

        Returns only when exactly that range was written. Raises ``SourceError`` for anything
        else: a shorter or longer answer, a store that ignores ranges, a file that changed since
        it was listed; ``NotFound`` where the file is gone; ``Cancelled`` soon after
        ``cancelled()`` says so. What had been written until then counts for nothing.
        """
        ...

    def close(self) -> None:
        """Let go of connections. May be called twice."""
        ...
