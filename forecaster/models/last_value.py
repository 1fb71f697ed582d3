"""The last value stays: what any other model has to beat, and what short histories get."""

from __future__ import annotations

from collections.abc import Mapping
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
from forecaster.types import MOST_STEPS, QUANTILES, Floats, Forecast, History

_PRIOR_WEIGHT = 20.0
_RECENT_STEPS = 5


@dataclass(frozen=True, slots=True)
class LastValue:
    """The last known value, with the quantiles of the changes that the history had over each lead
    (in square-root space, where the spread of counts does not depend on their level). Short
    histories are filled up with the changes of other pools."""

    name: str = "last_value"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Any history with one known value will do; raises ``ValueError`` where there is none."""
        return self.fit(history, horizon_steps).forecast(history, horizon_steps, levels)

    def fit(self, history: History, horizon_steps: int) -> LastValueFit:
        """The changes that the history had, to forecast from it or from later ends of it."""
        root = np.sqrt(history.values[-MOST_STEPS:])
        return LastValueFit(
            name=self.name,
            changes={lead: _changes(root, lead) for lead in lead_grid(horizon_steps)},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LastValueFit:
    """Changes of the square root by lead: to the value there, and to the highest until it. They
    rise."""

    name: str
    changes: Mapping[int, tuple[Floats, Floats]]

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """What follows ``history``, which is that of the fit, or that with more at its end."""
        known = history.values[np.isfinite(history.values)][-_RECENT_STEPS:]
        if not len(known):
            raise ValueError("the history has no known value")
        last = float(np.sqrt(known[-1]))
        # Where the last one is zero, the recent level says how wide others would have been.
        level = max(last, float(np.sqrt(np.mean(known))))
        places = (*levels, *MEAN_LEVELS.tolist())
        steps, tops = [], []
        for lead, (changes, highest) in self.changes.items():
            prior = usual_changes(lead, history.step_s) * level
            steps.append(_spread(changes, prior, places, last))
            tops.append(_spread(highest, np.maximum(prior, 0.0), levels, last))
        rows = over_steps(np.array(steps).T, tuple(self.changes), horizon_steps)
        return made_forecast(
            self.name,
            history,
            levels,
            rows[: len(levels)],
            rows[len(levels) :].mean(axis=0),
            over_steps(np.array(tops).T, tuple(self.changes), horizon_steps),
        )


def _changes(root: Floats, lead: int) -> tuple[Floats, Floats]:
    """Of the square root: from each step to the one ``lead`` later, and to the highest until it;
    sorted, so that quantiles of them and a few others take no sorting."""
    ahead, highest = targets(root, lead)
    now = root[: len(ahead)]
    good = np.isfinite(now) & np.isfinite(ahead)
    return np.sort((ahead - now)[good]), np.sort((highest - now)[good])


def _spread(changes: Floats, prior: Floats, levels: tuple[float, ...], last: float) -> Floats:
    moves = filled_up_quantiles(changes, prior, _PRIOR_WEIGHT, levels)
    return np.maximum(last + moves, 0.0) ** 2
