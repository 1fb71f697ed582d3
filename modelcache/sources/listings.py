"""From what a source lists to a ``Listing``: nothing that would leave the model's directory,
nothing twice, and a revision that names exactly these bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from modelcache.ports import Listing
from modelcache.refs import find_path_problem
from modelcache.types import ModelRef, NotFound, RemoteFile, SourceError

MOST_FILES = 100_000
ASKED_AT_ONCE = 16

T = TypeVar("T")
R = TypeVar("R")


def make_listing(
    ref: ModelRef, files: Iterable[RemoteFile], *, revision: str | None = None
) -> Listing:
    """The listing of ``ref``. ``revision`` is the source's own exact one; without it the revision
    is a digest of what is listed, and one that was asked for must be that.

    Raises ``NotFound`` where nothing is listed or it is another revision, ``SourceError`` where a
    path could not become a file below a directory.
    """
    ordered = sorted(files, key=lambda file: file.path)
    if not ordered:
        raise NotFound(f"{ref.url}: there is nothing there")
    if len(ordered) > MOST_FILES:
        raise SourceError(f"{ref.url}: it has more than {MOST_FILES:,} files; is it one model?")
    problem = find_path_problem([file.path for file in ordered])
    if problem is not None:
        raise SourceError(f"{ref.url}: the source {problem}")
    if revision is None:
        revision = digest_of(ordered)
        if ref.revision is not None and ref.revision != revision:
            raise NotFound(
                f"{ref.url}: the source has revision {revision} of it now, not {ref.revision}"
            )
    return Listing(revision=revision, files=tuple(ordered))


def digest_of(files: Iterable[RemoteFile]) -> str:
    """40 hexadecimal digits that change with any file's path, size, version or digest."""
    found = hashlib.sha256(b"tidegate-listing-1\n")
    for file in files:
        digests = sorted(file.digests.items())
        found.update(repr((file.path, file.size_bytes, file.version, digests)).encode())
    return found.hexdigest()[:40]


def ask_each(ask: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """``ask`` of every item, several at once, in order. The first error is raised."""
    if len(items) < 2:
        return [ask(item) for item in items]
    with ThreadPoolExecutor(min(ASKED_AT_ONCE, len(items)), "listing") as threads:
        return list(threads.map(ask, items))
