"""What the sources built on obstore share: errors in plain words, and settings of its client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

from modelcache.refs import redact
from modelcache.sources.wire import CONNECT_S
from modelcache.types import NotFound, SourceError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig


def client_options(timeout_s: float) -> ClientConfig:
    """Settings of obstore's HTTP client. Limited is a read without a byte, not a whole download."""
    return {
        "allow_http": True,
        "connect_timeout": timedelta(seconds=min(CONNECT_S, timeout_s)),
        "read_timeout": timedelta(seconds=timeout_s),
        "timeout": timedelta(days=1),
    }


def retry_config() -> RetryConfig:
    """Little retrying of its own: who transfers knows better what is worth waiting for."""
    return {"max_retries": 1, "retry_timeout": timedelta(seconds=10)}


@contextlib.contextmanager
def failing(what: str, hint: str, secrets: Sequence[str]) -> Iterator[None]:
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
