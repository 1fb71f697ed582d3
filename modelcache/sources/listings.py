"""From what a store lists to a ``Listing``: nothing that would leave the model's directory, nothing
twice, and a revision that names exactly these bytes."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from modelcache.ports import Listing
from modelcache.refs import find_path_problem, redact
from modelcache.sources.wire import CONNECT_S
from modelcache.types import ModelRef, NotFound, RemoteFile, SourceError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, ObjectStore, RetryConfig


MOST_FILES = 100_000
ASKED_AT_ONCE = 16

T = TypeVar("T")
R = TypeVar("R")


def make_listing(
    ref: ModelRef, files: Iterable[RemoteFile], *, revision: str | None = None
) -> Listing:
    """The listing of ``ref``. ``revision`` is the store's own exact one; without it the revision is
    a digest of what is listed, and one that was asked for must be that.

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
        raise SourceError(f"{ref.url}: the store {problem}")
    if revision is None:
        revision = digest_of(ordered)
        if ref.revision is not None and ref.revision != revision:
            raise NotFound(
                f"{ref.url}: the store has revision {revision} of it now, not {ref.revision}"
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


def obstore_client(timeout_s: float) -> ClientConfig:
    """Settings of obstore's HTTP client. Limited is a read without a byte, not a whole download."""
    return {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=min(CONNECT_S, timeout_s)),
        "read_timeout": timedelta(seconds=timeout_s),
        "timeout": timedelta(days=1),
    }


def obstore_retry() -> RetryConfig:
    """Little retrying of its own: the transfer knows better what is worth waiting for."""
    return {"max_retries": 1, "retry_timeout": timedelta(seconds=10)}


def list_objects(store: ObjectStore, prefix: str) -> tuple[Sequence[Mapping[str, Any]], str]:
    """Obstore's description of each object below a prefix, or of the one that ``prefix`` names;
    and what their keys begin with before the path within the model."""
    import obstore

    below = f"{prefix}/" if prefix else ""
    found = [meta for page in obstore.list(store, prefix=prefix or None) for meta in page]
    metas = [m for m in found if m["path"].startswith(below) and not m["path"].endswith("/")]
    if not metas and prefix:
        return [obstore.head(store, prefix)], prefix[: prefix.rfind("/") + 1]
    return metas, below


@contextlib.contextmanager
def obstore_errors(what: str, hint: str, secrets: Sequence[str]) -> Iterator[None]:
    """Make obstore's errors ``SourceError``s that name ``what`` and show no secret."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.NotFoundError, FileNotFoundError):
        raise NotFound(f"{what}: the store has no such bucket or file") from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
        raise SourceError(f"{what}: the store refuses access; credentials: {hint}") from None
    except exceptions.PreconditionError:
        raise SourceError(f"{what}: it has changed since it was listed") from None
    except (exceptions.BaseError, ValueError) as error:
        text = redact(_reason(str(error)), secrets)
        raise SourceError(f"{what}: {text}", retryable=True) from None


def _reason(text: str) -> str:
    """The first lines of an error without its debug dump."""
    return " ".join(text.partition("\n\nDebug source")[0].split())[:300]
