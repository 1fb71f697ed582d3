"""From what was seen to quantiles: of a weighted sample, and over the steps of a forecast."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.ndimage import maximum_filter1d

from forecaster.types import Floats, Forecast, History

MEAN_LEVELS = np.linspace(0.02, 0.98, 49)
"""Quantiles whose mean is about that of the distribution."""

_MOST = 1e300
"""Beyond it a quantile is cut: infinity helps no one."""


def weighted_quantiles(
    values: Floats, weights: Floats, levels: Floats | tuple[float, ...]
) -> Floats:
    """The quantiles ``[level]`` of a sample, interpolated between its points."""
    order = np.argsort(values, kind="stable")
    heaped = np.cumsum(weights[order])
    places = (heaped - 0.5 * weights[order]) / heaped[-1]
    return np.interp(levels, places, values[order])


def filled_up_quantiles(
    sample: Floats, prior: Floats, prior_weight: float, levels: Floats | tuple[float, ...]
) -> Floats:
    """The same of a sample whose values weigh 1 each, and of a ``prior`` that weighs as much as so
    many of them: of a short history more is known than what was seen."""
    weights = np.ones(len(sample) + len(prior))
    weights[len(sample) :] = prior_weight / len(prior)
    return weighted_quantiles(np.concatenate([sample, prior]), weights, levels)


def targets(values: Floats, lead: int) -> tuple[Floats, Floats]:
    """For each step ``t`` that has them: the value of step ``t + lead``, and the largest known one
    of the steps ``t + 1`` to ``t + lead``."""
    if len(values) <= lead:
        return np.empty(0), np.empty(0)
    ahead = values[lead:]
    known = np.where(np.isfinite(values), values, -np.inf)
    highest: Floats = maximum_filter1d(known, lead, origin=(lead - 1) // 2, mode="nearest")
    return ahead, highest[lead:]


def usual_changes(lead: int, step_s: float) -> Floats:
    """Changes of the square root, as a share of it, that other pools had over this lead: the
    spread of LLM and web traffic grows from 6 % after a minute to 20 % after an hour, with heavy
    tails (a Student's t of 4 degrees, by its quantiles)."""
    minutes = max(lead * step_s / 60.0, 0.5)
    spread = 0.06 * minutes**0.3
    places = (np.linspace(-0.97, 0.97, 41) + 1) / 2
    alpha = 4 * places * (1 - places)
    bent = np.cos(np.arccos(np.sqrt(alpha)) / 3) / np.sqrt(alpha) - 1
    return np.asarray(np.sign(places - 0.5) * 2 * np.sqrt(bent) * spread)


def lead_grid(horizon_steps: int) -> tuple[int, ...]:
    """The leads for which a model is fitted; between them quantiles are interpolated."""
    marks = (1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 960, 1440)
    return tuple(mark for mark in marks if mark < horizon_steps) + (horizon_steps,)


def over_steps(at_leads: Floats, leads: tuple[int, ...], horizon_steps: int) -> Floats:
    """Rows ``[row, lead]`` interpolated to ``[row, step]``."""
    steps = np.arange(1, horizon_steps + 1)
    return np.array([np.interp(steps, leads, row) for row in at_leads])


def made_forecast(
    model: str,
    history: History,
    levels: tuple[float, ...],
    quantiles: Floats,
    mean: Floats,
    maxima: Floats,
) -> Forecast:
    """A forecast that keeps its promises: quantiles ``[level, step]`` that rise with the level,
    maxima that rise with the lead too. The quantile of a maximum is never below the same quantile
    of any step it covers, which holds for every distribution."""

    def clean(rows: Floats) -> Floats:
        return np.clip(np.nan_to_num(rows, nan=0.0, posinf=_MOST), 0.0, _MOST)

    quantiles = np.maximum.accumulate(clean(quantiles), axis=0)
    maxima = np.maximum.accumulate(np.maximum(clean(maxima), quantiles), axis=0)
    return Forecast(
        model=model,
        step_s=history.step_s,
        levels=levels,
        quantiles=quantiles,
        mean=clean(mean),
        maxima=np.maximum.accumulate(maxima, axis=1),
        start_s=history.end_s,
    )


def blended(model: str, history: History, parts: Sequence[tuple[float, Forecast]]) -> Forecast:
    """Forecasts mixed by their weights, quantile by quantile (Vincentization): the shape stays that
    of one distribution, where a mixture of distributions would be wider than each."""
    whole = sum(weight for weight, _ in parts)
    first = parts[0][1]

    def mixed(rows: Callable[[Forecast], Floats]) -> Floats:
        return np.asarray(sum(weight / whole * rows(one) for weight, one in parts))

    return made_forecast(
        model,
        history,
        first.levels,
        mixed(lambda one: one.quantiles),
        mixed(lambda one: one.mean),
        mixed(lambda one: one.maxima),
    )


def later(forecast: Forecast, history: History, horizon_steps: int) -> Forecast | None:
    """An earlier forecast, seen from the end of ``history``: of the steps from there on. How much
    the highest of several steps is above the highest of their quantiles is taken to be as at its
    beginning. ``None`` where it is of another grid, or does not reach as far."""
    if forecast.start_s is None or history.end_s is None or forecast.step_s != history.step_s:
        return None
    first = round((history.end_s - forecast.start_s) / history.step_s)
    if first < 0 or first + horizon_steps > forecast.horizon_steps:
        return None
    rows = slice(first, first + horizon_steps)
    highest = np.maximum.accumulate(forecast.quantiles[:, :horizon_steps], axis=1)
    above = forecast.maxima[:, :horizon_steps] / np.maximum(highest, 1e-300)
    quantiles = forecast.quantiles[:, rows]
    return made_forecast(
        forecast.model,
        history,
        forecast.levels,
        quantiles,
        forecast.mean[rows],
        np.maximum.accumulate(quantiles, axis=1) * above,
    )
