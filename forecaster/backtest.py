"""How good forecasts would have been: each model is asked at points of the past, with what was
known then, and compared with what came (rolling origins)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from forecaster.types import QUANTILES, Floats, Forecast, Forecaster, History, pinball


@dataclass(frozen=True, slots=True, kw_only=True)
class BacktestScore:
    """One model at one lead. Losses are shares of the mean of what came, NaN where that is zero.

    ``wape`` is the mean absolute error of the median. ``pinball[level]`` and ``coverage[level]``
    are of the value at the lead, ``maximum_pinball`` and ``maximum_coverage`` of the largest value
    until it. ``refit_s`` is the median time of one forecast, where a clock was given; ``failed``
    counts the origins at which the model raised ``ValueError``: they are in no other figure.
    """

    model: str
    lead_steps: int
    origins: int
    failed: int
    wape: float
    pinball: dict[float, float]
    coverage: dict[float, float]
    maximum_pinball: dict[float, float]
    maximum_coverage: dict[float, float]
    refit_s: float | None = None


def backtest(
    history: History,
    forecasters: Sequence[Forecaster],
    *,
    leads: Sequence[int] = (1, 5, 15, 60),
    levels: Sequence[float] = QUANTILES,
    origins: int = 100,
    first_step: int | None = None,
    train_steps: int | None = None,
    clock: Callable[[], float] | None = None,
) -> list[BacktestScore]:
    """Scores by model and lead, over ``origins`` points spread evenly from ``first_step`` (a
    quarter of the history) on. A model sees ``train_steps`` before each (all). Steps whose value
    is not known are not scored. Raises ``ValueError`` where no origin is left."""
    values = history.values
    horizon = max(leads)
    first = len(values) // 4 if first_step is None else first_step
    last = len(values) - horizon
    if not 1 <= first <= last:
        raise ValueError(f"{len(values)} steps leave no origin with {horizon} steps after it")
    starts = np.unique(np.linspace(first, last, origins).astype(int))
    levels = tuple(sorted(levels))
    scores: list[BacktestScore] = []
    for forecaster in forecasters:
        made: list[tuple[int, Forecast]] = []
        times: list[float] = []
        for start in starts.tolist():
            begin = 0 if train_steps is None else max(0, start - train_steps)
            past = History(
                values=values[begin:start],
                step_s=history.step_s,
                start_s=None
                if history.start_s is None
                else history.start_s + begin * history.step_s,
            )
            began_s = clock() if clock else 0.0
            try:
                made.append((start, forecaster.forecast(past, horizon, levels)))
            except ValueError:
                continue
            if clock:
                times.append(clock() - began_s)
        scores += [
            _score(forecaster.name, values, made, len(starts) - len(made), lead, times)
            for lead in leads
        ]
    return scores


def _score(
    model: str,
    values: Floats,
    made: list[tuple[int, Forecast]],
    failed: int,
    lead: int,
    times: list[float],
) -> BacktestScore:
    kept = [(at, one) for at, one in made if np.isfinite(values[at : at + lead]).all()]
    if not kept:
        nothing: dict[float, float] = {}
        return BacktestScore(
            model=model,
            lead_steps=lead,
            origins=0,
            failed=failed,
            wape=float("nan"),
            pinball=nothing,
            coverage=nothing,
            maximum_pinball=nothing,
            maximum_coverage=nothing,
        )
    then = np.array([values[at + lead - 1] for at, _ in kept])
    top = np.array([values[at : at + lead].max() for at, _ in kept])
    mean = float(then.mean()) or math.nan
    steps = np.array([one.quantiles[:, lead - 1] for _, one in kept])
    maxima = np.array([one.maximum(lead) for _, one in kept])
    middle = np.array([np.interp(0.5, one.levels, one.quantiles[:, lead - 1]) for _, one in kept])
    levels = kept[0][1].levels

    def losses(actual: Floats, rows: Floats) -> dict[float, float]:
        return {
            level: float(pinball(actual, rows[:, i], level).mean()) / mean
            for i, level in enumerate(levels)
        }

    def shares(actual: Floats, rows: Floats) -> dict[float, float]:
        return {level: float((actual <= rows[:, i]).mean()) for i, level in enumerate(levels)}

    return BacktestScore(
        model=model,
        lead_steps=lead,
        origins=len(kept),
        failed=failed,
        wape=float(np.abs(then - middle).mean()) / mean,
        pinball=losses(then, steps),
        coverage=shares(then, steps),
        maximum_pinball=losses(top, maxima),
        maximum_coverage=shares(top, maxima),
        refit_s=float(np.median(times)) if times else None,
    )
