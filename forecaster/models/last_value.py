"""The last value stays: what any other model has to beat, and what short histories get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forecaster.calibrate import (
    lead_grid,
    made_forecast,
    over_steps,
    targets,
    usual_changes,
    weighted_quantiles,
)
from forecaster.types import QUANTILES, Floats, Forecast, History

_PRIOR_WEIGHT = 20.0
_RECENT_STEPS = 5
_MOST_STEPS = 20_160


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
        values = history.values[-_MOST_STEPS:]
        known = np.flatnonzero(np.isfinite(values))
        if not len(known):
            raise ValueError("the history has no known value")
        root = np.sqrt(values)
        last = float(root[known[-1]])
        # Where the last one is zero, the recent level says how wide others would have been.
        level = max(last, float(np.sqrt(np.mean(values[known[-_RECENT_STEPS:]]))))
        leads = lead_grid(horizon_steps)
        steps, means, tops = [], [], []
        for lead in leads:
            prior = usual_changes(lead, history.step_s) * level
            changes, highest = _changes(root, lead)
            steps.append(_spread(changes, prior, levels, last))
            tops.append(_spread(highest, np.maximum(prior, 0.0), levels, last))
            means.append(np.mean(_spread(changes, prior, tuple(np.linspace(0.02, 0.98, 49)), last)))
        return made_forecast(
            self.name,
            history,
            levels,
            over_steps(np.array(steps).T, leads, horizon_steps),
            over_steps(np.array([means]), leads, horizon_steps)[0],
            over_steps(np.array(tops).T, leads, horizon_steps),
        )


def _changes(root: Floats, lead: int) -> tuple[Floats, Floats]:
    """Of the square root: from each step to the one ``lead`` later, and to the highest until it."""
    ahead, highest = targets(root, lead)
    now = root[: len(ahead)]
    good = np.isfinite(now) & np.isfinite(ahead)
    return (ahead - now)[good], (highest - now)[good]


def _spread(changes: Floats, prior: Floats, levels: tuple[float, ...], last: float) -> Floats:
    sample = np.concatenate([changes, prior])
    weights = np.ones(len(sample))
    weights[len(changes) :] = _PRIOR_WEIGHT / len(prior)
    return np.maximum(last + weighted_quantiles(sample, weights, levels), 0.0) ** 2
