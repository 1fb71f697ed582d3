"""What demand will be: quantiles per step, and of the maximum over a lead window.

    >>> from forecaster import forecast
    >>> ahead = forecast(requests_per_minute, step_s=60, horizon_steps=60)
    >>> ahead.quantiles.shape, ahead.maximum(15)

``forecasting`` from any series to a forecast · ``models`` the ways to do it · ``types`` what goes
in and comes out · ``clean`` what of a history is not demand · ``periods`` what repeats in it ·
``calibrate`` from errors to quantiles · ``backtest`` how good forecasts would have been ·
``scoreboard`` how they turned out: weights for a mix, and trust · ``hints`` windows that are known
beforehand · ``cron`` recurring windows, in a time zone (needs no numpy, and nor does importing this
package).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from forecaster.cron import RecurringWindow
    from forecaster.types import Forecast


def forecast(
    history: ArrayLike,
    step_s: float = 60.0,
    horizon_steps: int = 60,
    quantiles: Sequence[float] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99),
    *,
    start_s: float | None = None,
    hints: Sequence[RecurringWindow] = (),
) -> Forecast:
    """What follows ``history``: any sequence of numbers on an even grid of ``step_s``, the oldest
    first, NaN (or a negative number) where the value is unknown.

    ``.quantiles[quantile, step]`` and ``.mean[step]`` are of each step; ``.maximum(lead_steps)`` is
    the quantiles of the largest of the first steps, calibrated on its own. Quantiles are in rising
    order. ``start_s`` is the Unix time of the first step, where it is known. ``hints`` are
    recurring windows of higher demand (``forecaster.cron``); they need ``start_s``.

    A few values are enough: then it is the last value, with the spread that other pools have.
    Raises ``ValueError`` where no value is known, or an argument is out of range.
    """
    from forecaster import forecasting  # here: importing the package needs no numpy

    return forecasting.forecast(
        history, step_s, horizon_steps, quantiles, start_s=start_s, hints=hints
    )
