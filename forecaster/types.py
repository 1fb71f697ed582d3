"""A series of the past, a forecast of what follows it, and what makes one of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99)
"""The nine that are forecast unless others are asked for."""

MOST_HORIZON_STEPS = 1440
MOST_STEPS = 20_160
"""Of a history that models look at: two weeks of minutes."""

DAY_S = 86_400


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class History:
    """Demand on an even grid: ``values[i]`` is the mean rate (or the count) of the step that began
    at ``start_s + i * step_s``. NaN is unknown, which is not zero. ``start_s`` is Unix time;
    ``None`` where it is not known, and then there is no calendar."""

    values: Floats
    step_s: float = 60.0
    start_s: float | None = None

    @property
    def end_s(self) -> float | None:
        """When the last step ended, which is when the first forecast step begins."""
        return None if self.start_s is None else self.start_s + len(self.values) * self.step_s


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """Demand of the steps that follow a history, in its unit: never negative, never NaN.

    ``levels`` rise. ``quantiles[q, step]`` is the quantile ``levels[q]`` of that step,
    ``mean[step]`` its mean; ``maxima[q, step]`` is the quantile of the largest of the steps up to
    and with ``step``. ``model`` names what made it. ``start_s`` is when the first step begins.
    """

    model: str
    step_s: float
    levels: tuple[float, ...]
    quantiles: Floats
    mean: Floats
    maxima: Floats
    start_s: float | None = None

    @property
    def horizon_steps(self) -> int:
        """How many steps there are."""
        return int(self.quantiles.shape[1])

    def maximum(self, lead_steps: int) -> Floats:
        """The quantiles ``[quantile]`` of the largest of the first ``lead_steps`` steps. They rise
        with the level and with the lead. Raises ``ValueError`` outside of 1 to the horizon."""
        if not 1 <= lead_steps <= self.horizon_steps:
            raise ValueError(f"lead_steps is {lead_steps}, not within 1 to {self.horizon_steps}")
        return self.maxima[:, lead_steps - 1].copy()

    def maximum_at(self, lead_steps: int, level: float) -> float:
        """One quantile of that maximum, at a level between those that were forecast; beyond them
        the outermost."""
        return float(np.interp(level, self.levels, self.maximum(lead_steps)))


def pinball(actual: Floats, quantiles: Floats, level: float | Floats) -> Floats:
    """The loss of a quantile: ``level`` for each unit that it was too low, ``1 - level`` for each
    that it was too high (Koenker and Bassett, 1978)."""
    short = actual - quantiles
    return np.asarray(np.maximum(level * short, (level - 1.0) * short))


class Forecaster(Protocol):
    """One way to forecast. It keeps nothing between two calls."""

    @property
    def name(self) -> str:
        """What it is called in reports, metrics and settings."""
        ...

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """The steps that follow ``history``; ``levels`` rise. Raises ``ValueError`` where it is
        too short."""
        ...
