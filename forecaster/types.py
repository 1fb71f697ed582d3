"""A series of the past, a forecast of what follows it, and what makes one of the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

QUANTILES = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99)
"""The nine that are forecast unless others are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class History:
    """Demand on an even grid: ``values[i]`` is the mean rate (or the count) of the step that began
    at ``start_s + i * step_s``. NaN is unknown, which is not zero. ``start_s`` is Unix time;
    ``None`` where it is not known, and then there is no calendar."""

    values: Floats
    step_s: float = 60.0
    start_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Forecast:
    """Demand of the steps that follow a history, in its unit.

    ``quantiles[q, step]`` is the quantile ``levels[q]`` of that step, ``mean[step]`` its mean.
    ``model`` names what made it.
    """

    model: str
    step_s: float
    levels: tuple[float, ...]
    quantiles: Floats
    mean: Floats
    leads: tuple[int, ...] = ()
    maxima: Floats | None = None
    """``maxima[q, i]``: the quantile of the largest of the first ``leads[i]`` steps."""


class Forecaster(Protocol):
    """One way to forecast. It keeps nothing between two calls."""

    @property
    def name(self) -> str:
        """What it is called in reports, metrics and settings."""
        ...

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """The steps that follow ``history``. Raises ``ValueError`` where it is too short."""
        ...
