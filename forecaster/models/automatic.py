"""The forecaster for a pool of which nothing is known yet but its history."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from forecaster.calibrate import blended
from forecaster.clean import cleaned
from forecaster.models.direct import Direct, DirectFit
from forecaster.models.last_value import LastValue, LastValueFit
from forecaster.models.seasonal import PeriodicQuantile
from forecaster.periods import day_and_week, find_periods
from forecaster.types import DAY_S, MOST_STEPS, QUANTILES, Forecast, Forecaster, History

_DAYS_FOR_DAY = 3
_DAYS_FOR_DIRECT = 2.0
_REPETITIONS_FOR_DIRECT = 10
_DIRECT_MOST = 0.85
"""The last value keeps a say: it is wrong at other times, and bounds what a regression can do."""


@dataclass(frozen=True, slots=True)
class Automatic:
    """The direct model, with the periods that are in the history, and a little of the last value
    or, where a schedule of minutes or hours is recognised, of the periodic quantiles. As long as
    the history is short, these have more of the say: all of it at first, 0.15 from 1.7 days on."""

    name: str = "automatic"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Any history with one known value will do; raises ``ValueError`` where there is none."""
        return self.fit(history, horizon_steps).forecast(history, horizon_steps, levels)

    def fit(self, history: History, horizon_steps: int) -> AutomaticFit:
        """What is learned of a history, to forecast from it, or from it with more at its end, at a
        fraction of the cost. Raises ``ValueError`` where it has no known value."""
        history = replace(history, values=cleaned(history.values))
        known = np.flatnonzero(np.isfinite(history.values))
        if not len(known):
            raise ValueError("the history has no known value")
        values = history.values[known[0] :]
        days = len(values) * history.step_s / DAY_S
        day = DAY_S / history.step_s
        found = find_periods(values[-MOST_STEPS:], day_and_week(history.step_s))
        short = [period for period in found if period < 0.9 * day]
        periods = tuple(short[:1])
        if days >= _DAYS_FOR_DAY and day == round(day):
            periods += (round(day),)
        share = min(_DIRECT_MOST, days / _DAYS_FOR_DIRECT)
        if short:
            share = min(share, len(values) / short[0] / _REPETITIONS_FOR_DIRECT)
        direct = None
        try:
            direct = Direct(periods=periods).fit(history, horizon_steps)
        except ValueError:
            share = 0.0
        other: Forecaster | LastValueFit = LastValue().fit(history, horizon_steps)
        if short:
            other = PeriodicQuantile(period=short[0])
        return AutomaticFit(name=self.name, share=share, direct=direct, other=other, periods=found)


@dataclass(frozen=True, slots=True, kw_only=True)
class AutomaticFit:
    """What was learned of a history. ``share`` is the direct model's part of the say, the rest is
    the ``other``'s. ``periods``, in steps, are those that were found, the strongest first."""

    name: str
    share: float
    direct: DirectFit | None
    other: Forecaster | LastValueFit
    periods: tuple[int, ...] = ()

    @property
    def shares(self) -> dict[str, float]:
        """The say of each part, by its name."""
        direct = {} if self.direct is None else {self.direct.name: self.share}
        return direct | {self.other.name: 1.0 - self.share}

    def parts(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> dict[str, Forecast]:
        """What each part says of what follows ``history``, which is that of the fit, or that with
        more at its end."""
        history = replace(history, values=cleaned(history.values))
        found = {}
        if self.direct is not None and self.share > 0.0:
            found[self.direct.name] = self.direct.forecast(history, horizon_steps, levels)
        found[self.other.name] = self.other.forecast(history, horizon_steps, levels)
        return found

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """The same as one forecast."""
        parts = self.parts(history, horizon_steps, levels)
        shares = self.shares
        return blended(self.name, history, [(shares[name], one) for name, one in parts.items()])
