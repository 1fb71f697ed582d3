"""``forecast``: from any series to the forecast of what follows it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from forecaster.cron import RecurringWindow
from forecaster.hints import with_hints
from forecaster.models.automatic import Automatic
from forecaster.types import MOST_HORIZON_STEPS, QUANTILES, Forecast, History


def forecast(
    history: ArrayLike,
    step_s: float = 60.0,
    horizon_steps: int = 60,
    quantiles: Sequence[float] = QUANTILES,
    *,
    start_s: float | None = None,
    hints: Sequence[RecurringWindow] = (),
) -> Forecast:
    """See ``forecaster.forecast``."""
    levels = tuple(sorted(float(level) for level in quantiles))
    if not levels or not all(0.0 < level < 1.0 for level in levels):
        raise ValueError(f"quantiles are {tuple(quantiles)}, not between 0 and 1")
    if not 1 <= horizon_steps <= MOST_HORIZON_STEPS:
        raise ValueError(f"horizon_steps is {horizon_steps}, not within 1 to {MOST_HORIZON_STEPS}")
    if not step_s > 0:
        raise ValueError(f"step_s is {step_s}, not above 0")
    values = np.array(history, dtype=np.float64)
    if values.ndim != 1:
        raise ValueError(f"the history has {values.ndim} dimensions, not 1")
    values[~np.isfinite(values) | (values < 0)] = np.nan
    series = History(values=values, step_s=float(step_s), start_s=start_s)
    if hints and start_s is None:
        raise ValueError("hints are times of day: they need start_s")
    return with_hints(Automatic().forecast(series, horizon_steps, levels), series, hints)
