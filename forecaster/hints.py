"""Windows of higher demand that the operator knows of: a batch job at six, office hours."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from forecaster.calibrate import filled_up_quantiles, made_forecast, usual_changes
from forecaster.cron import RecurringWindow
from forecaster.types import DAY_S, Floats, Forecast, History

_OCCURRENCES_MOST = 10
_PRIOR_WEIGHT = 1.0
_WINDOWS_MOST = 1000


def with_hints(forecast: Forecast, history: History, hints: Sequence[RecurringWindow]) -> Forecast:
    """``forecast`` raised, inside of the hinted windows, to what the last ten windows had at the
    same distance from their start. A window that the history has never had changes nothing: how
    high it would be, no one has said. Needs the history's ``start_s``."""
    if not hints or history.start_s is None or history.end_s is None:
        return forecast
    levels = np.array(forecast.levels)
    quantiles, mean, maxima = forecast.quantiles.copy(), forecast.mean.copy(), forecast.maxima
    until_s = history.end_s + forecast.horizon_steps * history.step_s
    for hint in hints:
        # From the last hundred days: more would not be recent, and a bound for each minute's cron.
        since_s = max(history.start_s, history.end_s - 100 * DAY_S)
        past = list(hint.starts(since_s, history.end_s))[-_OCCURRENCES_MOST:]
        if not past:
            continue
        length = max(1, round(hint.duration_s / history.step_s))
        seen = _windows(history, past, length)
        for start_s in list(hint.starts(history.end_s - hint.duration_s, until_s))[:_WINDOWS_MOST]:
            first = round((start_s - history.end_s) / history.step_s)
            for place in range(max(0, -first), min(length, forecast.horizon_steps - first)):
                near = seen[:, max(0, place - 1) : place + 2]
                rows = _spread(near[np.isfinite(near)], levels)
                if rows is not None:
                    step = first + place
                    quantiles[:, step] = np.maximum(quantiles[:, step], rows)
                    mean[step] = max(mean[step], float(rows.mean()))
    tops = np.maximum(maxima, np.maximum.accumulate(quantiles, axis=1))
    return made_forecast(forecast.model, history, forecast.levels, quantiles, mean, tops)


def _windows(history: History, starts_s: list[float], length: int) -> Floats:
    """``[occurrence, place]``, in square-root space; NaN where unknown or not yet over."""
    found = np.full((len(starts_s), length), np.nan)
    for row, start_s in enumerate(starts_s):
        first = round((start_s - (history.start_s or 0.0)) / history.step_s)
        part = history.values[first : first + length]
        found[row, : len(part)] = np.sqrt(np.maximum(part, 0.0))
    return found


def _spread(sample: Floats, levels: Floats) -> Floats | None:
    if not len(sample):
        return None
    prior = float(np.median(sample)) * (1.0 + usual_changes(1, 60.0))
    rows = filled_up_quantiles(sample, prior, _PRIOR_WEIGHT, levels)
    return np.asarray(np.maximum(rows, 0.0) ** 2)
