"""The object stores that obstore reads (``s3``, ``gs``): how one is opened, listed, and fails."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from modelcache.ports import Retries
from modelcache.refs import redact
from modelcache.sources import answers
from modelcache.sources.reader import ask_each
from modelcache.sources.retry import keep_asking
from modelcache.sources.wire import CONNECT_S
from modelcache.types import CacheError, NotFound, SourceError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Opened = TypeVar("Opened")

NO_PROXY_URL = "http://127.0.0.1:9"
ALL_DIRECT = "*,0.0.0.0/0,::/0"
ALWAYS_DIRECT = (
    "localhost,127.0.0.0/8,::1,169.254.0.0/16,fe80::/10,100.100.100.200,metadata.google.internal"
)

_STATUS = re.compile(r"status code: ([3-9]\d\d)")


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
    store: ObjectStore,
    prefix: str,
    errors: Callable[[], AbstractContextManager[None]],
    retries: Retries,
) -> tuple[Sequence[Mapping[str, Any]], str]:
    """Obstore's description of each object below a prefix, or of the one that ``prefix`` names;
    and what their keys begin with before the path within the model. ``errors`` is
    ``obstore_errors`` of the model; ``retries`` is for each question."""
    import obstore

    def list_all() -> Sequence[Mapping[str, Any]]:
        return [meta for page in obstore.list(store, prefix=prefix or None) for meta in page]

    def head(key: str) -> Mapping[str, Any]:
        return keep_asking(lambda: obstore.head(store, key), retries, errors)

    def is_file(meta: Mapping[str, Any]) -> bool:
        """Whether it is no marker of a folder: obstore leaves out the ``/`` that the name of one
        ends with, and there is no object without it."""
        if meta["size"]:
            return True
        try:
            head(meta["path"])
        except NotFound:
            return False
        return True

    below = f"{prefix}/" if prefix else ""
    found = keep_asking(list_all, retries, errors)
    metas = [meta for meta in found if meta["path"].startswith(below)]
    if not metas and prefix:
        return [head(prefix)], prefix[: prefix.rfind("/") + 1]
    files = ask_each(is_file, metas)
    return [meta for meta, wanted in zip(metas, files, strict=True) if wanted], below


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
        text = str(error).partition("\n\nDebug source")[0]
        if (found := _STATUS.search(str(error))) is not None:
            status = int(found[1])
        elif isinstance(error, exceptions.NotFoundError | FileNotFoundError):
            status = 404
        elif isinstance(error, exceptions.PermissionDeniedError | exceptions.UnauthenticatedError):
            status = 403
        elif isinstance(error, exceptions.PreconditionError):
            status = 412
        else:
            shown = redact(" ".join(text.split())[:300], secrets) or type(error).__name__
            raise SourceError(f"{what}: {shown}", retryable=True) from None
        answers.check_status(status, {}, what, hint, text=text, signed=signed)
