"""When a source is asked again: one policy for listings, heads and credentials as for bytes."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

from modelcache.ports import Retries
from modelcache.types import Cancelled, SourceError

FIRST_PAUSE_S, MOST_PAUSE_S = 0.2, 10.0
MOST_ASKED_PAUSE_S = 60.0
LOOK_S = 0.1
"""Seconds between two looks at whether it is still wanted, during a pause."""

T = TypeVar("T")


def pause(tries: int, chance: float, asked_s: float | None = None) -> float:
    """Seconds until a source is asked again: doubled with each failure and never the same on two
    nodes; as long as the source asked for where it did, within reason."""
    pause_s = min(MOST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(tries, 32)) * (0.5 + chance / 2)
    return pause_s if asked_s is None else max(pause_s, min(asked_s, MOST_ASKED_PAUSE_S))


def keep_asking(
    ask: Callable[[], T],
    retries: Retries,
    errors: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
) -> T:
    """What ``ask`` returns, asked again after each error that may pass. Raises the last error, or
    ``Cancelled``. ``errors`` makes the errors of a source's client ``SourceError``s."""
    tries = 0
    while True:
        try:
            with errors():
                return ask()
        except SourceError as error:
            if not error.retryable or tries >= retries.most:
                raise
            pause_s = pause(tries, random.random(), error.retry_after_s)
        tries += 1
        until_s = time.monotonic() + pause_s
        while (left_s := until_s - time.monotonic()) > 0:
            if retries.cancelled():
                raise Cancelled("not wanted any more")
            time.sleep(min(left_s, LOOK_S))
