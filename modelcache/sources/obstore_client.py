"""The object stores that obstore reads (``s3``, ``gs``): how one is opened, listed, and fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from modelcache.refs import redact
from modelcache.sources.wire import CONNECT_S
from modelcache.types import NotFound, SourceError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

Opened = TypeVar("Opened")


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectStoreAccess:
    """How a bucket is reached, as found in the environment and in the usual files.

    ``config`` is what obstore takes for it beside the fields here, ``secrets`` what must not be
    shown.
    """

    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    anonymous: bool = False
    endpoint: str | None = None
    region: str | None = None
    secrets: tuple[str, ...] = field(default=(), repr=False)


def open_bucket(
    make: Callable[..., Opened], bucket: str, access: ObjectStoreAccess, *, timeout_s: float
) -> Opened:
    """Obstore's store of a bucket; ``make`` is its class. Use it within ``obstore_errors``.

    It retries little by itself: the download knows better what is worth waiting for. Limited is a
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
        },
        retry_config={"max_retries": 1, "retry_timeout": timedelta(seconds=10)},
        **config,
    )


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
        raise NotFound(f"{what}: the source has no such bucket or file") from None
    except (exceptions.PermissionDeniedError, exceptions.UnauthenticatedError):
        raise SourceError(f"{what}: the source refuses access; credentials: {hint}") from None
    except exceptions.PreconditionError:
        raise SourceError(f"{what}: it has changed since it was listed") from None
    except (exceptions.BaseError, ValueError) as error:
        text = redact(_reason(str(error)), secrets)
        raise SourceError(f"{what}: {text}", retryable=True) from None


def _reason(text: str) -> str:
    """The first lines of an error without its debug dump."""
    return " ".join(text.partition("\n\nDebug source")[0].split())[:300]
