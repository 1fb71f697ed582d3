"""What the model cache takes, for those who ask often: looked up now and then, by one thread.

A look reads the record of every model, from a disk that may be slow, broken or hung. Neither the
event loop nor its threads may wait for that, nor may a page of metrics be lost for it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("tidegate.cache")

FRESH_S = 15.0
"""A figure of this age is not looked up again: what scrapes most, scrapes so often."""

WAIT_S = 2.0
"""Longest time that a scrape waits for a reading; after that it gets the last one."""

STALE_S = 120.0
"""A figure older than this is none: unknown is not what it was."""


class UsageLook:
    """Asks ``usage`` in a thread of its own, one look at a time. For one event loop."""

    def __init__(
        self, usage: Callable[[], Any], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._usage = usage
        self._clock = clock
        self._seen: Any = None
        self._seen_s = -STALE_S
        self._looking: asyncio.Future[None] | None = None
        self.failures = 0
        """Looks that met an error."""

    async def get(self) -> Any | None:
        """The cache's ``Usage``, not older than ``STALE_S``; ``None`` where it is not known."""
        if self._clock() - self._seen_s >= FRESH_S:
            try:
                async with asyncio.timeout(WAIT_S):
                    await asyncio.shield(self._look())
            except TimeoutError:
                pass
        return self._seen if self._clock() - self._seen_s < STALE_S else None

    def _look(self) -> asyncio.Future[None]:
        """The look that is under way, or a new one."""
        if self._looking is None or self._looking.done():
            loop = asyncio.get_running_loop()
            self._looking = looking = loop.create_future()

            def look() -> None:
                seen: Any = None
                try:
                    seen = self._usage()
                except Exception as error:  # noqa: BLE001 -- a page of metrics is not worth an end
                    log.warning("what the model cache takes cannot be told: %s", error)
                try:
                    loop.call_soon_threadsafe(self._done, looking, seen)
                except RuntimeError:
                    return  # the loop has ended meanwhile

            # Not one of the loop's threads: a disk that hangs would take them one by one.
            threading.Thread(target=look, name="cache usage", daemon=True).start()
        return self._looking

    def _done(self, looking: asyncio.Future[None], seen: Any) -> None:
        if seen is None:
            self.failures += 1
        else:
            self._seen, self._seen_s = seen, self._clock()
        if not looking.done():
            looking.set_result(None)
