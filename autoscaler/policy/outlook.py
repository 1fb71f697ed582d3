"""From a pool's past to the outlook that ``decide`` reads, and whether to trust it. Needs numpy.

What has to be provisioned is demand at its highest until a replica that is asked for now would
serve. A minute grid says nothing of the next ten seconds, so for a lead below a minute the forecast
is made of the finer grid of the last hours.
"""

from __future__ import annotations

import math

import numpy as np

from autoscaler.policy.trust import LEVEL
from autoscaler.types import LeadForecast, Outlook
from forecaster.models.automatic import Automatic, AutomaticFit
from forecaster.models.last_value import LastValue
from forecaster.types import Forecast, History

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995)
"""The quantiles that are asked for: dense where costs are weighed against violations."""
REFIT_STEPS = 60
REFIT_PART = 24
"""A fit is kept for this part of the history that it was made of, at most."""
FINE_STEP_S = 5.0
FINE_LEAD_S = 60.0
"""Leads below it are forecast on the fine grid."""


class OutlookMaker:
    """Makes the outlooks of one pool, and keeps what was learned of its past for ``REFIT_STEPS``
    steps: regressions change slowly, and cost several times what a forecast does."""

    def __init__(self) -> None:
        self._fit: AutomaticFit | None = None
        self._key: tuple[float, int] | None = None
        self._age = 0

    def _forecast(self, history: History, steps: int) -> Forecast:
        key = (history.step_s, steps)
        known = int(np.isfinite(history.values).sum())
        # A short history is learned of anew each time: each step of it is news.
        due = self._age >= min(REFIT_STEPS, known // REFIT_PART)
        if self._fit is None or key != self._key or due:
            self._fit, self._key, self._age = Automatic().fit(history, steps), key, 0
        self._age += 1
        return self._fit.forecast(history, steps, LEVELS)

    def make(self, minutes: History, fine: History, lead_s: float, now_s: float) -> LeadForecast:
        """The outlook of the pool at ``now_s``.

        ``minutes`` and ``fine`` are tokens per second by minute and by ``FINE_STEP_S``, up to now.
        Raises ``ValueError`` where the one that is needed has no known value.
        """
        history = fine if lead_s < FINE_LEAD_S else minutes
        steps = math.ceil(lead_s / history.step_s) + 1
        return make_lead_forecast(history, self._forecast(history, steps), steps, lead_s, now_s)


def make_lead_forecast(
    history: History, found: Forecast, steps: int, lead_s: float, now_s: float
) -> LeadForecast:
    """A forecast as an outlook, with what it is judged by."""
    simple = LastValue().forecast(history, steps, (LEVEL,))
    return LeadForecast(
        outlook=Outlook(
            made_at_s=now_s,
            model=found.model,
            lead_s=lead_s,
            levels=found.levels,
            tokens_per_s=tuple(float(rate) for rate in found.maximum(steps)),
        ),
        steps=steps,
        step_s=history.step_s,
        forecast=found.maximum_at(steps, LEVEL),
        last_value=float(simple.maximum(steps)[0]),
    )
