"""STL with exponential smoothing, and Holt-Winters, by statsmodels: slow, and much memory,
so they run in a worker process or a command, never in the control loop.

Both work on square roots, and draw the errors of simulated paths from those that they had. The
quantiles of steps and of maxima are those of the paths.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from forecaster.calibrate import made_forecast
from forecaster.models.features import centred_mean
from forecaster.periods import day_and_week, find_periods
from forecaster.types import QUANTILES, Floats, Forecast, History

_PATHS = 300
_SEED = 9
_LEAST_STEPS = 20
_MOST_STEPS = 10_080
_SMOOTHED_STEPS = 1440
"""What exponential smoothing is fitted to: older steps have no weight left."""


@dataclass(frozen=True, slots=True)
class StlEts:
    """The season by STL (Cleveland et al., 1990; MSTL, Bandara et al., 2021, where a week shows
    too), and damped exponential smoothing of the rest. ``periods`` are in steps; ``None`` looks for
    them."""

    periods: tuple[int, ...] | None = None
    name: str = "stl_ets"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Raises ``ValueError`` where there are fewer than 20 steps."""
        from statsmodels.tsa.seasonal import MSTL, STL

        root = _root_of(history)
        periods = self.periods
        if periods is None:
            found = find_periods(np.square(root), day_and_week(history.step_s))
            day = day_and_week(history.step_s)[:1]
            # A day is the season of people: it is taken where there are two, significant or not.
            periods = found[:2] or day
        periods = tuple(period for period in periods if 2 * period < len(root))
        season = np.zeros(len(root))
        ahead = np.zeros(horizon_steps)
        if periods:
            if len(periods) == 1:
                kept = STL(
                    root,
                    period=periods[0],
                    # Longer than there are cycles: one season, not one for each day, which would
                    # fit the noise of each and take it for knowledge.
                    seasonal=2 * (len(root) // periods[0]) + 7,
                    seasonal_jump=max(1, periods[0] // 20),
                    trend_jump=max(1, periods[0] // 20),
                    low_pass_jump=max(1, periods[0] // 20),
                ).fit()
                parts = [np.asarray(kept.seasonal)]
            else:
                several = MSTL(root, periods=sorted(periods)).fit()
                parts = list(np.asarray(several.seasonal).T)
            for part, period in zip(parts, sorted(periods), strict=True):
                part = centred_mean(part, period // 192)
                season += part
                ahead += part[len(part) - period + np.arange(horizon_steps) % period]
        paths = _smoothed_paths(root - season, horizon_steps)
        return _of_paths(self.name, history, levels, paths + ahead[:, None])


@dataclass(frozen=True, slots=True)
class HoltWinters:
    """Damped additive exponential smoothing (Holt, 1957; Winters, 1960), with a season where a
    period of at most ``_SEASON_MOST`` steps is found: a longer one has too many parameters."""

    name: str = "holt_winters"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Raises ``ValueError`` where there are fewer than 20 steps."""
        root = _root_of(history)
        found = [period for period in find_periods(np.square(root)) if period <= _SEASON_MOST]
        period = found[0] if found else None
        return _of_paths(self.name, history, levels, _smoothed_paths(root, horizon_steps, period))


_SEASON_MOST = 120


def _root_of(history: History) -> Floats:
    values = history.values[-_MOST_STEPS:]
    good = np.flatnonzero(np.isfinite(values))
    if len(good) < _LEAST_STEPS:
        raise ValueError(f"{len(good)} known steps, fewer than {_LEAST_STEPS}")
    values = values[good[0] :]
    good -= good[0]
    return np.asarray(np.sqrt(np.interp(np.arange(len(values)), good, values[good])))


def _smoothed_paths(root: Floats, horizon_steps: int, period: int | None = None) -> Floats:
    """``[step, path]``."""
    from statsmodels.tsa.holtwinters import ExponentialSmoothing

    recent = root[-max(_SMOOTHED_STEPS, 4 * (period or 0)) :]
    if float(np.std(recent)) <= 1e-9 * (1.0 + float(np.abs(recent).mean())):
        return np.full((horizon_steps, _PATHS), recent[-1])
    seasonal: dict[str, Any] = {"seasonal": "add", "seasonal_periods": period} if period else {}
    unit = float(np.std(recent))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = ExponentialSmoothing(
            recent / unit, trend="add", damped_trend=True, **seasonal
        ).fit()
        paths = fitted.simulate(
            horizon_steps,
            anchor="end",
            repetitions=_PATHS,
            random_errors="bootstrap",
            rng=np.random.default_rng(_SEED),
        )
    return np.asarray(paths, dtype=np.float64).reshape(horizon_steps, _PATHS) * unit


def _of_paths(name: str, history: History, levels: tuple[float, ...], roots: Floats) -> Forecast:
    paths = np.maximum(roots, 0.0) ** 2
    tops = np.maximum.accumulate(paths, axis=0)
    return made_forecast(
        name,
        history,
        levels,
        np.quantile(paths, levels, axis=1),
        paths.mean(axis=1),
        np.quantile(tops, levels, axis=1),
    )
