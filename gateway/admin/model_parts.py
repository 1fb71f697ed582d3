"""What the verbs over the model cache are made of, passed in by whoever puts them together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from modelcache.types import FileRange, Manifest, ModelEntry, Priority, Progress

OnProgress = Callable[[Progress], None]
IsCancelled = Callable[[], bool]


class Cached(Protocol):
    """A model revision that is on the disk."""

    @property
    def url(self) -> str:
        """Where it came from."""
        ...

    @property
    def revision(self) -> str:
        """Which one it is, exactly."""
        ...

    @property
    def path(self) -> Path:
        """The directory an engine opens."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """What it consists of; ``None`` for a directory that is used where it lies."""
        ...

    @property
    def note(self) -> str:
        """What its user should know; empty for nothing."""
        ...


class Cache(Protocol):
    """What is asked of the cache; ``modelcache.cache.ModelCache`` is one."""

    @property
    def dir(self) -> Path:
        """Its directory."""
        ...

    def preload(
        self,
        url: str,
        *,
        revision: str | None = None,
        priority: Priority = Priority.PRELOAD,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
        expected_use_at_s: float | None = None,
    ) -> Cached:
        """Bring a model to the disk."""
        ...

    def find(self, url: str, revision: str | None = None) -> Cached | None:
        """A model that is on the disk, whole."""
        ...

    def name(self, url: str, revision: str | None = None) -> tuple[str, str | None]:
        """The canonical URL and the exact revision that are meant, by what is on the disk."""
        ...

    def revisions(self, url: str) -> Sequence[str]:
        """The revisions of a model that are there, whole or not."""
        ...

    def pin(self, url: str, revision: str | None = None) -> None:
        """Keep it whatever happens."""
        ...

    def unpin(self, url: str, revision: str | None = None) -> None:
        """Let it be evicted again."""
        ...

    def evict(
        self, url: str, revision: str | None = None, force: bool = False, prepared: bool = False
    ) -> int:
        """Take it from the disk, or only what was made of it; returns the bytes that are free
        now."""
        ...

    def ls(self) -> Sequence[ModelEntry]:
        """What is there."""
        ...

    def verify(
        self,
        url: str,
        revision: str | None = None,
        *,
        repair: bool = False,
        on_progress: OnProgress | None = None,
        cancelled: IsCancelled | None = None,
    ) -> Sequence[Any]:
        """Read every byte again; returns what is not as it was."""
        ...

    def usage(self) -> Any:
        """What the cache takes, and what it may take."""
        ...


Prewarm = Callable[[Sequence[FileRange], OnProgress, IsCancelled], Any]
"""Brings files into the page cache; ``modelcache.pagecache.residency.prewarm`` does."""
Transform = Callable[[str, Any, str, OnProgress, IsCancelled], AbstractContextManager[Cached]]
"""The model of a URL after its preparation steps, from the revision that the cache gave for it
(as it gave it); held for whoever is named, as long as its context is open."""
Replicate = Callable[[str, str | None, Sequence[str], OnProgress, IsCancelled], Mapping[str, Any]]
"""Has other sites preload a model: URL, revision, site names; returns an outcome for each site."""


class Keeper(Protocol):
    """Keeps pages where they are; ``modelcache.pagecache.holder.PageKeeper`` does."""

    def keep(self, key: str, files: Sequence[FileRange]) -> None:
        """Keep these files. Raises ``CacheError`` where they are too many."""
        ...

    def drop(self, key: str) -> bool:
        """Keep them no longer."""
        ...


def nothing_read() -> Mapping[str, Any]:
    """The traffic of a process that has read nothing."""
    return {}
