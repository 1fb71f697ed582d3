"""From a pool's past to the outlook that ``decide`` reads, and whether to trust it. Needs numpy.

What has to be provisioned is demand at its highest until a replica that is asked for now would
serve. A minute grid says nothing of the next ten seconds, so for a lead below a minute the forecast
is made of the finer grid of the last hours.
"""

from __future__ import annotations

import math

from autoscaler.policy.trust import LEVEL
from autoscaler.types import LeadForecast, Outlook
from forecaster import forecast
from forecaster.models.last_value import LastValue
from forecaster.types import History

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995)
"""The quantiles that are asked for: dense where costs are weighed against violations."""
FINE_STEP_S = 5.0
FINE_LEAD_S = 60.0
"""Leads below it are forecast on the fine grid."""


def make_outlook(minutes: History, fine: History, lead_s: float, now_s: float) -> LeadForecast:
    """The outlook of a pool at ``now_s``.

    ``minutes`` and ``fine`` are tokens per second by minute and by ``FINE_STEP_S``, up to now.
    Raises ``ValueError`` where the one that is needed has no known value.
    """
    history = fine if lead_s < FINE_LEAD_S else minutes
    steps = math.ceil(lead_s / history.step_s) + 1
    found = forecast(history.values, history.step_s, steps, LEVELS, start_s=history.start_s)
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
