"""The newest signals of a Tidegate, in memory: asked for again and again, answered from at once.

Everything is on one event loop. A stale answer is an error (``StaleSignals``), never an old value:
autoscalers freeze on an error, and scale by a value.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Protocol

from autoscaler.adapters.catalog import Catalog
from autoscaler.adapters.types import PoolSignals

LOG = logging.getLogger("tidegate.adapter")

RETRY_LEAST_S = 0.25
RETRY_MOST_S = 5.0
"""Between two tries while Tidegate does not answer."""
ANSWER_S = 10.0
"""Seconds that an answer may take beyond those that it was asked to wait."""


class SignalsLike(Protocol):
    """An answer of the admin API's ``GET /signals``."""

    @property
    def version(self) -> int:
        """Another where a pool has its first request, or no more."""
        ...

    @property
    def pools(self) -> Sequence[PoolSignals]:
        """What is known of each."""
        ...


Fetch = Callable[[int | None, float], Awaitable[SignalsLike]]
"""Asks for signals that are of another version than this (``None``: any), and waits for them for at
most so many seconds. Raises ``FetchError``."""


class FetchError(Exception):
    """Tidegate did not answer; the message says why."""


class StaleSignals(Exception):
    """What is known is too old to be answered with; the message says how old, and why."""


class SignalFeed:
    """``fetch`` asks Tidegate, every ``refresh_s`` and as soon as a pool has its first request.
    What is older than ``stale_s`` is not used."""

    def __init__(
        self,
        fetch: Fetch,
        *,
        refresh_s: float,
        stale_s: float,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.failures = 0
        """Answers that did not come, since the process began."""
        self._fetch = fetch
        self._refresh_s = refresh_s
        self._stale_s = stale_s
        self._clock = clock
        self._sleep = sleep
        self._catalog = Catalog()
        self._version: int | None = None
        self._received_s: float | None = None
        self._error = ""
        self._news = asyncio.Event()

    @property
    def age_s(self) -> float | None:
        """How old the newest signals are; ``None`` before the first."""
        return None if self._received_s is None else self._clock() - self._received_s

    def catalog(self) -> Catalog:
        """All pools. Raises ``StaleSignals``."""
        age_s = self.age_s
        why = f": {self._error}" if self._error else ""
        if age_s is None:
            raise StaleSignals(f"nothing is known of the pools yet{why}")
        if age_s > self._stale_s:
            raise StaleSignals(
                f"what is known of the pools is {age_s:.0f} s old, more than {self._stale_s:g} s "
                f"(adapter.stale_s){why}"
            )
        return self._catalog

    async def changes(self) -> AsyncIterator[None]:
        """Now, and each time there are new signals, or the wait for them was in vain: a turn after
        them, those in between as one."""
        while True:
            news = self._news
            yield
            await news.wait()

    async def run(self) -> None:
        """Ask until it is cancelled."""
        retry_s = RETRY_LEAST_S
        while True:
            begun_s = self._clock()
            try:
                async with asyncio.timeout(self._refresh_s + ANSWER_S):
                    found = await self._fetch(self._version, self._refresh_s)
                catalog = Catalog(found.pools)
            except Exception as error:
                if isinstance(error, FetchError | TimeoutError):
                    self._fail(str(error) or "no answer in time")
                else:
                    LOG.exception("signals could not be read")
                    self._fail("an internal error of the adapter")
                await self._sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MOST_S)
                continue
            if self._error:
                LOG.info("Tidegate answers again")
            retry_s, self._error = RETRY_LEAST_S, ""
            # One of the same version was waited for, unless too many wait; another comes at once.
            # Those of a Tidegate whose version never settles must not be asked for all the time.
            same = found.version == self._version
            least_s = min(self._refresh_s, RETRY_LEAST_S) if same else 0.02
            self._catalog, self._version = catalog, found.version
            self._received_s = self._clock()
            self._tell()
            if (left_s := least_s - (self._clock() - begun_s)) > 0.0:
                await self._sleep(left_s)

    def _fail(self, why: str) -> None:
        self.failures += 1
        if not self._error:
            LOG.warning("no signals: %s", why)
        self._error = why
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


@contextlib.asynccontextmanager
async def running(feed: SignalFeed) -> AsyncIterator[SignalFeed]:
    """The feed, kept up to date meanwhile."""
    task = asyncio.create_task(feed.run())
    try:
        yield feed
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
