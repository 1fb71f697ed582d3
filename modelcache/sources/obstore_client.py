"""The object stores that obstore reads (``s3``, ``gs``): how one is opened, listed, and fails."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from modelcache.refs import redact
from modelcache.sources import answers
from modelcache.sources.reader import ask_each
from modelcache.sources.wire import CONNECT_S
from modelcache.types import CacheError, NotFound, SourceError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Opened = TypeVar("Opened")
Listed = Sequence[Mapping[str, Any]]

NO_PROXY_URL = "http://127.0.0.1:9"
ALL_DIRECT = "*,0.0.0.0/0,::/0"
ALWAYS_DIRECT = (
    "localhost,127.0.0.0/8,::1,169.254.0.0/16,fe80::/10,100.100.100.200,metadata.google.internal"
)

_STATUS = re.compile(r"status code: (\d{3})")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStoreAccess:
    """How a bucket is reached, as found in the environment and in the usual files.

    ``config`` is what obstore takes for it beside the fields here, ``secrets`` what must not be
    shown.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    anonymous: bool = False
    proxy: str | None = field(default=None, repr=False)
    endpoint: str | None = None
    region: str | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)


def open_bucket(
    make: Callable[..., Opened], bucket: str, access: ObjectStoreAccess, *, timeout_s: float
) -> Opened:
    """Obstore's store of a bucket; ``make`` is its class. Use it within ``obstore_errors``.

    It does not retry by itself: the download knows better what is worth waiting for. Limited is a
    read without a byte, not a whole download.
    """
    config = dict(access.config)
    if access.endpoint:
        config["endpoint"] = access.endpoint
    if access.region:
        config["region"] = access.region
    if access.anonymous:
        config["skip_signature"] = True
    return make(
        bucket,
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=min(CONNECT_S, timeout_s)),
            "read_timeout": timedelta(seconds=timeout_s),
            "timeout": timedelta(days=1),
            # Named in any case: it would read the environment by a rule of its own.
            "proxy_url": access.proxy or NO_PROXY_URL,
            "proxy_excludes": ALWAYS_DIRECT if access.proxy else ALL_DIRECT,
        },
        retry_config={"max_retries": 0, "retry_timeout": timedelta(seconds=10)},
        **config,
    )


def list_objects(
    store: ObjectStore, prefix: str, ask: Callable[[Callable[[], Listed]], Listed]
) -> tuple[Sequence[Mapping[str, Any]], str]:
    """Obstore's description of each object below a prefix, or of the one that ``prefix`` names;
    and what their keys begin with before the path within the model. ``ask`` asks the store, and
    again where that may help."""
    import obstore

    def list_all() -> Listed:
        return [meta for page in obstore.list(store, prefix=prefix or None) for meta in page]

    below = f"{prefix}/" if prefix else ""
    metas = [meta for meta in ask(list_all) if meta["path"].startswith(below)]
    if not metas and prefix:
        return ask(lambda: [obstore.head(store, prefix)]), prefix[: prefix.rfind("/") + 1]
    files = ask_each(lambda meta: meta["size"] or _is_object(store, meta["path"], ask), metas)
    return [meta for meta, is_file in zip(metas, files, strict=True) if is_file], below


def _is_object(store: ObjectStore, key: str, ask: Callable[[Callable[[], Listed]], Listed]) -> bool:
    """Whether an empty object has this name. Obstore leaves out the ``/`` that a name ends with, by
    which a marker of a folder is told from an empty file; there is no object without it."""
    import obstore

    try:
        ask(lambda: [obstore.head(store, key)])
    except NotFound:
        return False
    return True


@contextlib.contextmanager
def obstore_errors(
    what: str, hint: str, secrets: Sequence[str], *, signed: bool = True
) -> Iterator[None]:
    """Make obstore's errors ``SourceError``s that name ``what``, say what to do and show no
    secret."""
    from obstore import exceptions

    try:
        yield
    except CacheError:
        raise
    except (exceptions.BaseError, OSError, ValueError) as error:
        text, found = str(error), _STATUS.search(str(error))
        status = int(found[1]) if found is not None else 0
        if status >= 300:
            answers.check_status(status, {}, what, hint, body=_body_of(text), signed=signed)
        if isinstance(error, exceptions.NotFoundError | FileNotFoundError):
            answers.check_status(404, {}, what, hint, body=_body_of(text), signed=signed)
        if isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            answers.check_status(403, {}, what, hint, body=_body_of(text), signed=signed)
        if isinstance(error, exceptions.PreconditionError):
            raise SourceError(f"{what}: it has changed since it was listed") from None
        shown = redact(_reason(text), secrets) or type(error).__name__
        raise SourceError(f"{what}: {shown}", retryable=True) from None


def _body_of(text: str) -> bytes:
    """What the store itself said, in an error of obstore's."""
    return text.partition("\n\nDebug source")[0].encode("utf-8", "replace")


def _reason(text: str) -> str:
    """The first lines of an error without its debug dump."""
    return " ".join(text.partition("\n\nDebug source")[0].split())[:300]
