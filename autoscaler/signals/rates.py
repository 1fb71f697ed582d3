"""How fast a counter grows, on an even grid of time. Pure."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence

from autoscaler.signals.series import MINUTE_S
from autoscaler.types import FINE_LEAD_S

NAN = float("nan")
MINUTES_MOST = 8 * 1_440
"""Minutes that forecasts are made from: a week, and a day to compare it with."""
FINE_MOST = 4_320
"""Steps of five seconds that forecasts for short leads are made from: six hours."""
FINE_STEP_S = 5.0
NEWS_S = 15.0
"""So long into a minute its rate so far is news enough for another forecast."""
SPREAD_STEPS = 3
"""Steps without a reading that what came in them is spread over; more of them are unknown."""


class RateGrid:
    """The growth per second of a counter in each step of ``step_s``, the newest ``most`` of them;
    NaN where it is not known. ``values`` are those of before, up to the first reading."""

    def __init__(self, step_s: float, most: int, values: Iterable[float] = ()) -> None:
        self.step_s = step_s
        self._most = most
        self.values = array("d", values)
        del self.values[:-most]
        self._step: int | None = None
        self._total: float | None = None

    @property
    def end_s(self) -> float | None:
        """When the newest whole step ended; ``None`` before the first reading."""
        return None if self._step is None else self._step * self.step_s

    def add(self, now_s: float, total: float | None) -> int:
        """Take in a reading of the counter (``None``: unknown) at a time. How many steps have ended
        with it: the newest values."""
        step = int(now_s // self.step_s)
        if self._step is None or step < self._step:
            self._step, self._total = step, total  # the first, or the clock was set back
            return 0
        ended = step - self._step
        if not ended:
            if self._total is None:
                self._total = None if total is None or self.values else total
            return 0
        rate, before = NAN, self._total
        if total is not None and before is not None and ended <= SPREAD_STEPS:
            rate = (total - before) / (ended * self.step_s) if total >= before else NAN
        ended = min(ended, self._most)
        self.values.extend([rate] * ended)
        del self.values[: -self._most]
        self._step, self._total = step, total
        return ended

    def so_far(self, now_s: float, total: float | None) -> float:
        """The growth per second in the step that runs; NaN where it is not known."""
        if self._step is None or self._total is None or total is None or total < self._total:
            return NAN
        passed_s = now_s - self._step * self.step_s
        return (total - self._total) / passed_s if passed_s > 0.0 else NAN

    def fill(self, past: Sequence[float], end_s: float) -> None:
        """Take from ``past``, whose last step ended at ``end_s``, what is not known here."""
        ended = -1 if self._step is None else self._step - round(end_s / self.step_s)
        if ended < 0:
            return  # the clock was set back
        past = [*past, *[NAN] * ended]
        own = [*[NAN] * (len(past) - len(self.values)), *self.values]
        past = [*[NAN] * (len(own) - len(past)), *past]
        filled = (
            before if math.isnan(value) else value for value, before in zip(own, past, strict=True)
        )
        self.values = array("d", filled)[-self._most :]


class PoolRates:
    """The tokens per second that a pool's forecasts are made from.

    What is needed of a forecast for a lead of minutes is of whole minutes, but a replica that is
    started a minute later serves a minute later: once in each minute its rate ``so_far`` (else NaN)
    is taken for it.
    """

    def __init__(self, minutes: Iterable[float] = ()) -> None:
        self.minutes = RateGrid(MINUTE_S, MINUTES_MOST, minutes)
        self.fine = RateGrid(FINE_STEP_S, FINE_MOST)
        self.so_far = NAN
        self._told = False

    def add(self, now_s: float, total: float | None, lead_s: float | None) -> bool:
        """Take in the counter of tokens that came (``None``: unknown); whether there is news for a
        forecast with this lead."""
        minutes = self.minutes.add(now_s, total)
        fine = self.fine.add(now_s, total)
        if minutes:
            self._told, self.so_far = False, NAN
        if lead_s is not None and lead_s < FINE_LEAD_S:
            return bool(fine)
        end_s = self.minutes.end_s
        if minutes or self._told or end_s is None or now_s - end_s < NEWS_S:
            return bool(minutes)
        self._told, self.so_far = True, self.minutes.so_far(now_s, total)
        return not math.isnan(self.so_far)
