"""Keeps the series of all pools: fed by the control loop at each tick, written to the history once
a minute, asked by ``status`` for the last minute.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from autoscaler.signals.history import HistoryWriter, put_minutes
from autoscaler.signals.series import PoolSeries, PoolTotals
from autoscaler.types import Observation, RecentTraffic

CLOSE_S = 5.0
"""Seconds that the end of the process waits for a write."""


class Recorder:
    """``read`` gives a pool's counters now, ``None`` where they are not known; ``clock`` is the one
    of the observations, ``wall_s`` gives Unix time. For one event loop's thread."""

    def __init__(
        self,
        *,
        read: Callable[[str], PoolTotals | None],
        writer: HistoryWriter,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._read = read
        self._writer = writer
        self._clock = clock
        self._wall_s = wall_s
        self._series: dict[str, PoolSeries] = {}

    def observe(self, observation: Observation) -> None:
        """Take in what the control loop sees; minutes that have ended go to the history."""
        for gone in self._series.keys() - observation.pools.keys():
            del self._series[gone]  # one of the same name that comes later has other counters
        wall_s = self._wall_s()
        minutes = []
        for name, demand in observation.pools.items():
            series = self._series.get(name)
            if series is None:
                series = self._series[name] = PoolSeries(name)
            ended = series.observe(demand, wall_s, partial(self._read, name))
            if ended is not None:
                minutes.append(ended)
        if minutes:
            self._writer.put(partial(put_minutes, minutes=minutes))

    def recent(self, pool: str) -> RecentTraffic | None:
        """What the pool was asked and answered in the last minute; ``None`` where it is too new to
        say."""
        series, totals = self._series.get(pool), self._read(pool)
        if series is None or totals is None:
            return None
        return series.recent(self._clock(), totals)

    def close(self) -> None:
        """Wait for a write under way, and close the file. Blocks."""
        self._writer.close(CLOSE_S)
