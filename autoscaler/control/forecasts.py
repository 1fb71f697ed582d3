"""What is expected of each pool: fed by the control loop, answered from what is there.

A pool's arrivals are kept by minute and by five seconds. At the end of each minute and once within
it (for leads below a minute, at the end of each five seconds) a job goes to one process that makes
forecasts, scores them and says whether to trust them (``autoscaler.policy.outlook``); its result is
the pool's outlook until the next. Everything is on one event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

import msgspec

from autoscaler.control.forecast_worker import ForecastJob, ForecastResult
from autoscaler.messages import LENGTH, MOST_BYTES
from autoscaler.signals.rates import MINUTES_MOST, PoolRates
from autoscaler.signals.series import MINUTE_S
from autoscaler.types import FINE_LEAD_S, ForecastTally, Observation, Outlook
from forecaster.cron import RecurringWindow

LOG = logging.getLogger("tidegate.forecast")

JOB_S = 60.0
"""Seconds one forecast may take before its process is ended."""
RESTART_S = 30.0
"""Seconds before another process is started after one has failed."""
STALE_STEPS = 5
"""Steps after which an outlook is not of now any more."""
MISSING = "forecasts need the extra `forecast` (numpy, scipy), which is not installed"

ReadPast = Callable[[str, float, float], Awaitable[Sequence[float]]]
"""A pool's past by minute, in tokens per second, from one Unix time until another; NaN where it is
unknown."""


class PoolForecast:
    """One pool's arrivals and outlook."""

    def __init__(self) -> None:
        self.rates = PoolRates()
        self.lead_s: float | None = None
        self.outlook: Outlook | None = None
        self.error = ""
        self.due = False
        self.loaded = False
        self.begins_anew = False


class Forecasts:
    """The forecasts of all pools. ``read_past`` gives what the history has of a pool, ``environ``
    is that of the process which makes them."""

    def __init__(
        self,
        *,
        history_least_s: float,
        read_past: ReadPast | None = None,
        environ: Mapping[str, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self.history_least_s = history_least_s
        self.hints: Mapping[str, Sequence[RecurringWindow]] = {}
        """By pool, windows in which the demand of earlier ones is expected."""
        self.slow_models: tuple[str, ...] = ()
        self._read_past = read_past
        self._environ = environ
        self._clock = clock
        self._wall_s = wall_s
        self._pools: dict[str, PoolForecast] = {}
        self._wake = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._restart_at_s = 0.0
        self._missing = "" if importlib.util.find_spec("scipy") else MISSING

    def observe(self, observation: Observation) -> None:
        """Take in what the control loop sees."""
        wall_s = self._wall_s()
        for gone in self._pools.keys() - observation.pools.keys():
            del self._pools[gone]
        for name, demand in observation.pools.items():
            pool = self._pools.get(name)
            if pool is None:
                pool = self._pools[name] = PoolForecast()
                self._wake.set()
            if pool.rates.add(wall_s, demand.arrived_tokens_total, pool.lead_s):
                pool.due = True
                self._wake.set()

    def read_again(self, name: str) -> None:
        """A pool's past has been filled in: its next forecast is of that, and is tried on it."""
        pool = self._pools.get(name)
        if pool is not None:
            pool.loaded, pool.begins_anew = False, True

    def outlook(self, name: str, lead_s: float | None) -> Outlook | None:
        """What is expected of a pool whose replicas take ``lead_s`` to be ready (``None``:
        unknown, as before the first start). ``None`` before the first forecast; one without
        levels where none can be made, and why."""
        pool = self._pools.get(name)
        if pool is None:
            return None
        pool.lead_s = lead_s
        outlook, why = pool.outlook, self._missing or pool.error
        if outlook is None and not why:
            return None
        if outlook is None:
            return Outlook(
                made_at_s=self._clock(), model="", lead_s=lead_s or 0.0, levels=(),
                tokens_per_s=(), distrust=why,
            )  # fmt: skip
        age_s = self._clock() - outlook.made_at_s
        if age_s > STALE_STEPS * outlook.step_s:
            why = f"the newest forecast is {age_s:.0f} s old"
        return replace(outlook, distrust=why) if why else outlook

    def tally(self, name: str) -> ForecastTally:
        """What came of a pool's forecasts since the process that makes them began."""
        pool = self._pools.get(name)
        outlook = None if pool is None else pool.outlook
        return ForecastTally() if outlook is None else outlook.tally

    async def run(self) -> None:
        """Make forecasts until it is cancelled."""
        try:
            while not self._missing:
                await self._wake.wait()
                self._wake.clear()
                for name, pool in list(self._pools.items()):
                    if not pool.loaded:
                        pool.loaded = True
                        await self._load(name, pool)
                    if pool.due and pool.lead_s is not None:
                        pool.due = False
                        await self._forecast(name, pool)
        finally:
            await self._end_process()

    async def _load(self, name: str, pool: PoolForecast) -> None:
        minutes = pool.rates.minutes
        end_s = minutes.end_s
        if self._read_past is None or end_s is None:
            return
        try:
            past = await self._read_past(name, end_s - MINUTES_MOST * MINUTE_S, end_s)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the pool begins without a past
            LOG.warning("%s: its past could not be read (%s)", name, error)
            return
        minutes.fill(past, end_s)

    async def _forecast(self, name: str, pool: PoolForecast) -> None:
        rates, lead_s = pool.rates, pool.lead_s
        end_s = rates.minutes.end_s
        if end_s is None or lead_s is None:
            return
        job = ForecastJob(
            pool=name,
            minutes=rates.minutes.values.tobytes(),
            end_s=end_s,
            so_far=rates.so_far,
            fine=rates.fine.values.tobytes() if lead_s < FINE_LEAD_S else b"",
            fine_end_s=rates.fine.end_s or end_s,
            lead_s=lead_s,
            now_s=self._clock(),
            begins_anew=pool.begins_anew,
            history_least_s=self.history_least_s,
            slow_models=self.slow_models,
            hints=tuple(
                (one.cron.text, one.duration_s, one.timezone) for one in self.hints.get(name, ())
            ),
        )
        pool.begins_anew = False
        try:
            async with asyncio.timeout(JOB_S):
                result = await self._ask(job)
        except (TimeoutError, OSError, EOFError, msgspec.MsgspecError) as error:
            await self._end_process()
            self._restart_at_s = self._clock() + RESTART_S
            what = f"{type(error).__name__} {error}".strip()
            LOG.warning("%s: no forecast (%s)", name, what)
            pool.error = f"the forecast failed ({what})"
            return
        if result is not None:
            self.take(name, result)

    def take(self, name: str, result: ForecastResult) -> None:
        """Take in the answer to a job; a pool that has gone meanwhile is ignored."""
        pool = self._pools.get(name)
        if pool is not None:
            pool.error = result.error
            pool.outlook = result.found or pool.outlook

    async def _ask(self, job: ForecastJob) -> ForecastResult | None:
        process = self._process
        if process is None:
            if self._clock() < self._restart_at_s:
                return None
            process = self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "autoscaler.control.forecast_worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                env=None if self._environ is None else dict(self._environ),
                limit=MOST_BYTES,
                process_group=0,  # Ctrl-C in a terminal ends the control process, and so this one
            )
        if process.stdin is None or process.stdout is None:
            raise EOFError("the process has no pipes")
        body = msgspec.msgpack.encode(job)
        process.stdin.write(LENGTH.pack(len(body)) + body)
        await process.stdin.drain()
        (length,) = LENGTH.unpack(await process.stdout.readexactly(LENGTH.size))
        return msgspec.msgpack.decode(await process.stdout.readexactly(length), type=ForecastResult)

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
