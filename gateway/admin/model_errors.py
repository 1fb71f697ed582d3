"""What is told of an error of the verbs over the model cache, by console and admin listener."""

from __future__ import annotations

from modelcache.types import (
    CacheError,
    Cancelled,
    Damaged,
    InUse,
    NoSpace,
    NotFound,
    SourceError,
)

BAD_VALUE = "bad_value"
"""The reason of a request that says something wrong, rather than wants what cannot be done."""

_ERRORS: tuple[tuple[type[Exception], int, str], ...] = (
    (NotFound, 404, "model_not_found"),
    (SourceError, 502, "source_failed"),
    (InUse, 409, "model_in_use"),
    (NoSpace, 507, "no_space"),
    (Damaged, 500, "model_damaged"),
    (Cancelled, 499, "cancelled"),
    (CacheError, 500, "cache_failed"),
    (OSError, 500, "cache_failed"),
)
"""Error classes, the more special ones first, with the status and the reason they are told by."""


def error_of(problem: Exception) -> tuple[int, str, str] | None:
    """Status, reason and message of an error that is told; ``None`` for a fault of ours."""
    if isinstance(problem, ValueError):
        return 400, BAD_VALUE, str(problem)
    for kind, status, reason in _ERRORS:
        if isinstance(problem, kind):
            return status, reason, str(problem)
    return None
