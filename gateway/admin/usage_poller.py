"""What the model cache takes, read from its disk now and then by one thread.

A reading goes over the record of every model, on a disk that may be slow, broken or hung. Neither
the event loop nor its threads may wait for that, nor may a page of metrics be lost for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger("tidegate.cache")

FRESH_S = 15.0
"""A reading of this age is not repeated: Prometheus scrapes about so often."""

WAIT_S = 2.0
"""Longest time that a page waits for a reading; after that it has the last one."""

STALE_S = 120.0
"""A reading older than this is not used: unknown is not what it was."""


class UsagePoller:
    """Calls ``usage`` in a thread of its own, one at a time. For one event loop."""

    def __init__(
        self,
        usage: Callable[[], Any],
        *,
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = WAIT_S,
    ) -> None:
        self._usage = usage
        self._clock = clock
        self._wait_s = wait_s
        self._seen: Any = None
        self._seen_s = -STALE_S
        self._reading: asyncio.Future[None] | None = None
        self.failures = 0
        """Readings that met an error."""

    async def get(self) -> Any | None:
        """The cache's ``Usage``, not older than ``STALE_S``; ``None`` where it is not known."""
        if self._clock() - self._seen_s >= FRESH_S:
            if self._reading is None or self._reading.done():
                self._reading = self._read()
            await asyncio.wait({self._reading}, timeout=self._wait_s)
        return self._seen if self._clock() - self._seen_s < STALE_S else None

    def _read(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        reading = loop.create_future()

        def read() -> None:
            seen: Any = None
            try:
                seen = self._usage()
            except Exception as error:  # noqa: BLE001 -- the page of metrics goes on without it
                log.warning("the disk use of the model cache cannot be read: %s", error)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._done, reading, seen)

        # Not one of the loop's threads: a disk that hangs would take them one by one.
        threading.Thread(target=read, name="cache usage", daemon=True).start()
        return reading

    def _done(self, reading: asyncio.Future[None], seen: Any) -> None:
        if seen is None:
            self.failures += 1
        else:
            self._seen, self._seen_s = seen, self._clock()
        if not reading.done():
            reading.set_result(None)
