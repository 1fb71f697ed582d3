"""The GPUs of this node, read again and again: by NVML, or of a DCGM exporter where one is named.

NVML can hang, so it is asked in a thread that nothing waits for longer than a time limit; while it
hangs, no other is started, and the GPUs are unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable

import httpx

from autoscaler.signals.gpus.dcgm import DcgmXids, read_dcgm
from autoscaler.signals.gpus.nvml import NvmlReader, NvmlUnavailable
from autoscaler.types import GpuReading, GpuReport
from loaders.engines.client import EngineClient, describe

LOG = logging.getLogger("tidegate.signals")

MAX_PAGE_BYTES = 4 << 20
RETRY_S = 60.0
"""After a failure the next reading waits so long: a machine without GPUs gets none in a second."""

Gpus = tuple[GpuReading, ...]


class GpuReader:
    """Reads the GPUs of this node. For one event loop."""

    def __init__(
        self,
        *,
        interval_s: float,
        timeout_s: float,
        dcgm_url: str | None = None,
        read_nvml: Callable[[], Gpus] | None = None,
        client: EngineClient | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``dcgm_url`` is the page of a DCGM exporter; unset, NVML is asked by ``read_nvml``, in a
        thread. ``timeout_s`` bounds one reading."""
        self.interval_s = interval_s
        self._timeout_s = timeout_s
        if dcgm_url is not None and not httpx.URL(dcgm_url).path.strip("/"):
            dcgm_url = f"{dcgm_url.rstrip('/')}/metrics"
        self._dcgm_url = dcgm_url
        self._read_nvml = read_nvml or NvmlReader(clock).read
        self._client = client or EngineClient(timeout_s=timeout_s)
        self._clock = clock
        self._sleep = sleep
        self._xids: dict[str, DcgmXids] = {}
        self._reading: asyncio.Future[Gpus | str] | None = None
        self._report = GpuReport(
            source="nvml" if dcgm_url is None else "dcgm", why_not="they have not been read yet"
        )

    def report(self) -> GpuReport:
        """The GPUs as they were read last; unknown where that is more than two readings ago."""
        seen = self._report
        oldest_s = self._clock() - 2 * self.interval_s - self._timeout_s
        if seen.observed_at_s is None or seen.observed_at_s >= oldest_s:
            return seen
        return GpuReport(source=seen.source, why_not="they have not been read for a while")

    async def run(self) -> None:
        """Read again and again, until it is cancelled."""
        while True:
            answered = await self._read()
            before = self._report
            if isinstance(answered, str):
                self._report = GpuReport(source=before.source, why_not=answered)
                wanted = self._dcgm_url is not None or before.gpus is not None
                if before.why_not != answered:
                    level = logging.WARNING if wanted else logging.DEBUG
                    LOG.log(level, "the GPUs cannot be read: %s", answered)
            else:
                self._report = GpuReport(
                    source=before.source, gpus=answered, observed_at_s=self._clock()
                )
            failed = isinstance(answered, str)
            await self._sleep(max(RETRY_S, self.interval_s) if failed else self.interval_s)

    async def _read(self) -> Gpus | str:
        """The GPUs, or why they cannot be read."""
        try:
            async with asyncio.timeout(self._timeout_s):
                if self._dcgm_url is not None:
                    return await self._ask_exporter(self._dcgm_url)
                if self._reading is None or self._reading.done():
                    self._reading = self._ask_nvml()
                return await asyncio.shield(self._reading)
        except TimeoutError:
            return f"no answer in {self._timeout_s:g} s"

    async def _ask_exporter(self, url: str) -> Gpus | str:
        try:
            status, page = await self._client.request("GET", url, {}, max_bytes=MAX_PAGE_BYTES)
        except httpx.TimeoutException:
            return f"no answer in {self._timeout_s:g} s"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            return f"GET {url} failed: {describe(error)}"
        if status != 200:
            return f"GET {url} was answered {status}"
        gpus = read_dcgm(page, self._xids, self._clock()) if len(page) <= MAX_PAGE_BYTES else None
        return gpus or f"GET {url} was answered by no DCGM exporter"

    def _ask_nvml(self) -> asyncio.Future[Gpus | str]:
        loop = asyncio.get_running_loop()
        reading: asyncio.Future[Gpus | str] = loop.create_future()

        def done(answer: Gpus | str) -> None:
            if not reading.done():
                reading.set_result(answer)

        def read() -> None:
            answer: Gpus | str
            try:
                answer = self._read_nvml()
            except NvmlUnavailable as error:
                answer = str(error)
            except Exception as error:
                LOG.exception("GPUs cannot be read")
                answer = describe(error)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(done, answer)

        # Not one of the loop's threads: a driver that hangs would keep it.
        threading.Thread(target=read, name="nvml", daemon=True).start()
        return reading

    async def close(self) -> None:
        """Close connections. A thread that hangs ends with the process."""
        await self._client.close()
