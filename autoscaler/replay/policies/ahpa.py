"""Our re-implementation of AHPA (Alibaba Cloud) as published.

Seven days of history, a forecast per minute for the next 24 hours, refitted daily: the 95 %
quantile of each minute of the day over the days, where the day is a period of the history; else
none. Desired = max(proactive, reactive), the proactive number looked up ``scaleUpForward`` ahead
and both at the target utilisation; down after HPA's stabilization.
"""

from __future__ import annotations

import numpy as np

from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.kubernetes import TARGET, HpaUtilization
from autoscaler.replay.policies.windows import MinuteSeries, replicas_for
from autoscaler.replay.types import PoolObservation
from forecaster.types import Floats

DAY_MINUTES = 1440
DAYS = 7
SMOOTH_MINUTES = 5
FORWARD_S = 180.0
PERIODIC = 0.3
"""Least correlation of a day with the day before that counts as a daily period."""


class Ahpa:
    """See the module. ``scaleUpForward`` is the cold start, or its usual 180 s if that is more."""

    def __init__(self, facts: PoolFacts, *, quantile: float = 0.95, target: float = TARGET) -> None:
        self.name = "ahpa"
        self.interval_s = 15.0
        self._quantile = quantile
        self._each = target * facts.capacity_tokens_per_s
        self._forward = int(max(FORWARD_S, facts.cold_start_s) // 60) + 1
        self._reactive = HpaUtilization(facts, target)
        self._minutes = MinuteSeries(facts.history, DAYS * DAY_MINUTES)
        self._fit()

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        reactive = self._reactive.step(now_s, seen)
        self._at += self._minutes.add(now_s, seen.arrived_tokens_total)
        if self._at >= DAY_MINUTES:
            self._fit()
        if self._forecast is None:
            return reactive
        ahead = range(self._at, self._at + self._forward + 1)
        coming = np.take(self._forecast[1], ahead, mode="wrap")
        return max(reactive, replicas_for(float(coming.max()), self._each))

    def band(self) -> tuple[float, float] | None:
        """The median and the quantile of this minute."""
        if self._forecast is None:
            return None
        middle, upper = self._forecast[:, self._at % DAY_MINUTES]
        return float(middle), float(upper)

    def _fit(self) -> None:
        self._forecast = daily_quantiles(self._minutes.values(), (0.5, self._quantile))
        self._at = 0


def daily_quantiles(values: Floats, levels: tuple[float, ...]) -> Floats | None:
    """The quantiles of each minute of a day, from the minute after the last on (shape [level,
    minute]); ``None`` where the values are of under two days, or no day is like the day before."""
    days = len(values) // DAY_MINUTES
    if days < 2:
        return None
    table = values[-days * DAY_MINUTES :].reshape(days, DAY_MINUTES)
    smooth = np.apply_along_axis(moving_mean, 1, table, 60)
    one, before = smooth[1:].ravel(), smooth[:-1].ravel()
    if one.std() == 0.0 or before.std() == 0.0:
        return None
    if float(np.corrcoef(one, before)[0, 1]) < PERIODIC:
        return None
    beside = [np.roll(table, shift, axis=1) for shift in range(-SMOOTH_MINUTES, SMOOTH_MINUTES + 1)]
    pooled = np.concatenate(beside, axis=0)
    result: Floats = np.quantile(pooled, levels, axis=0)
    return result


def moving_mean(values: Floats, width: int) -> Floats:
    """The mean around each value, over the end into the beginning."""
    padded = np.concatenate([values[-width // 2 :], values, values[: width // 2]])
    return np.convolve(padded, np.ones(width) / width, mode="same")[width // 2 : -(width // 2)]
