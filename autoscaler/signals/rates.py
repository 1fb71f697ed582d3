"""How fast a counter grows, on an even grid of time. Pure."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

NAN = float("nan")
MINUTES_MOST = 8 * 1_440
"""Minutes that forecasts are made from: a week, and a day to compare it with."""
FINE_MOST = 4_320
"""Steps of five seconds that forecasts for short leads are made from: six hours."""
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

    def prepend(self, values: Iterable[float]) -> None:
        """Put what was before in front of what there is."""
        self.values = array("d", [*values, *self.values])[-self._most :]
