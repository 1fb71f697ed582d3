"""What comes again: the value of one period ago, and quantiles by the place in the period."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forecaster.calibrate import (
    MEAN_LEVELS,
    filled_up_quantiles,
    lead_grid,
    made_forecast,
    over_steps,
    targets,
    usual_changes,
)
from forecaster.models.features import trailing_mean
from forecaster.periods import day_and_week, find_periods
from forecaster.types import DAY_S, MOST_STEPS, QUANTILES, Floats, Forecast, History

_SIMILAR_LEAST = 10
_SIMILAR_SHARE = 0.125
_PRIOR_WEIGHT = 3.0


@dataclass(frozen=True, slots=True)
class SeasonalNaive:
    """What was one period ago, with the quantiles of how wrong that has been. ``period`` is in
    steps; ``None`` is a day."""

    period: int | None = None
    name: str = "seasonal_naive"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Raises ``ValueError`` where the history has less than two periods."""
        period = self.period or max(1, round(DAY_S / history.step_s))
        root = _root_of(history, period)
        ahead = root[len(root) - period + np.arange(horizon_steps) % period]
        past = np.concatenate([root[:period], root[:-period]])
        return _around(self.name, history, levels, root, past, ahead, period)


@dataclass(frozen=True, slots=True)
class PeriodicQuantile:
    """What the series has at each place of its period, moved to the recent level, with quantiles of
    how far off that has been where the level was similar. The period is recognised
    (``forecaster.periods``) unless it is given, in steps; two or three repetitions are enough.

    The idea is AHPA's (Zhou et al., 2023, Adaptive horizontal pod autoscaling systems on Alibaba
    Cloud container service for Kubernetes): decompose robustly, then forecast the periodic part by
    quantiles. How, is ours.
    """

    period: int | None = None
    name: str = "periodic_quantile"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Raises ``ValueError`` where no period is found."""
        period = self.period
        if period is None:
            known = day_and_week(history.step_s)
            found = find_periods(history.values[-MOST_STEPS:], known)
            if not found:
                raise ValueError("no period is significant")
            period = found[0]
        root = _root_of(history, period)
        # The level is the mean of a whole period, so that its shape is not part of it; that of the
        # first period is its own.
        level = trailing_mean(root, period)
        before = np.concatenate([level[period - 1].repeat(period), level[:-period]])
        shape = root - before
        places = np.arange(len(root)) % period
        counts = np.bincount(places, minlength=period)
        sums = np.bincount(places, shape, minlength=period)
        # Each past step is compared with a profile that it is not part of.
        others = (sums[places] - shape) / np.maximum(counts[places] - 1, 1)
        to_come = (len(root) + np.arange(horizon_steps)) % period
        ahead = level[-1] + sums[to_come] / counts[to_come]
        past = np.maximum(before + others, 0.0)
        return _around(self.name, history, levels, root, past, np.maximum(ahead, 0.0), 0)


def _root_of(history: History, period: int) -> Floats:
    """The square roots without gaps. Raises ``ValueError`` where there are not two periods."""
    values = history.values[-MOST_STEPS:]
    good = np.flatnonzero(np.isfinite(values))
    if len(values) < 2 * period or not len(good):
        raise ValueError(f"{len(values)} steps are less than two periods of {period}")
    return np.asarray(np.sqrt(np.interp(np.arange(len(values)), good, values[good])))


def _around(
    name: str,
    history: History,
    levels: tuple[float, ...],
    root: Floats,
    past: Floats,
    ahead: Floats,
    first: int,
) -> Forecast:
    """A forecast around ``ahead``, as wrong as ``past`` was about ``root`` from ``first`` on. What
    is near in level counts: bursts are compared with bursts."""
    horizon_steps = len(ahead)
    root, past = root[first:], past[first:]
    wanted = np.concatenate([levels, MEAN_LEVELS])
    count = len(levels)
    prior = usual_changes(1, history.step_s)
    similar = _Similar(past, root - past, prior)
    rows = np.array([similar.quantiles(guess, wanted) for guess in ahead.tolist()]).T
    leads = lead_grid(horizon_steps)
    tops = []
    for lead in leads:
        _, highest = targets(root, lead)
        _, expected = targets(past, lead)
        errors = _Similar(expected, highest - expected, prior) if len(highest) else similar
        tops.append(errors.quantiles(float(ahead[:lead].max()), np.array(levels)))
    return made_forecast(
        name,
        history,
        levels,
        rows[:count],
        rows[count:].mean(axis=0),
        over_steps(np.array(tops).T, leads, horizon_steps),
    )


class _Similar:
    """Errors by the level that was guessed, in square-root space."""

    def __init__(self, guesses: Floats, errors: Floats, prior: Floats) -> None:
        order = np.argsort(guesses, kind="stable")
        self._guesses, self._errors = guesses[order], errors[order]
        self._prior = prior
        self._count = min(len(guesses), max(_SIMILAR_LEAST, int(len(guesses) * _SIMILAR_SHARE)))

    def quantiles(self, guess: float, levels: Floats) -> Floats:
        """Of the value, where ``guess`` is expected."""
        place = int(np.searchsorted(self._guesses, guess)) - self._count // 2
        place = min(max(place, 0), len(self._guesses) - self._count)
        near = self._errors[place : place + self._count]
        errors = filled_up_quantiles(near, self._prior * guess, _PRIOR_WEIGHT, levels)
        return np.maximum(guess + errors, 0.0) ** 2
