"""Windows that the operator knows of."""

from __future__ import annotations

import numpy as np
import pytest

from forecaster import forecast
from forecaster.cron import RecurringWindow

HOUR = 60
MIDNIGHT_S = 1_764_460_800.0  # 30 November 2025, a Sunday
JOB = RecurringWindow.parse("0 6 * * *", 600)
# Twenty-nine hours, with a burst of ten minutes from six on.
VALUES = np.full(29 * HOUR, 20.0)
VALUES[6 * HOUR : 6 * HOUR + 10] = 200.0


def test_a_window_is_as_high_as_the_last_one() -> None:
    made = forecast(VALUES, horizon_steps=90, start_s=MIDNIGHT_S, hints=[JOB])
    plain = forecast(VALUES, horizon_steps=90, start_s=MIDNIGHT_S)
    middle = made.quantiles[3]
    assert middle[59] < 40
    assert (middle[60:70] > 180).all()
    assert middle[71] < 40
    assert made.maximum(60)[3] == plain.maximum(60)[3] < 180 < made.maximum(61)[3]


@pytest.mark.parametrize(
    "window",
    [
        RecurringWindow.parse("0 7 * * *", 600, "Europe/Berlin"),
        RecurringWindow.parse("0 1 * * *", 600, "America/New_York"),
    ],
)
def test_a_window_has_a_time_zone(window: RecurringWindow) -> None:
    made = forecast(VALUES, horizon_steps=90, start_s=MIDNIGHT_S, hints=[window])
    assert made.quantiles[3, 65] > 180


def test_inside_of_a_window_the_rest_of_it_is_to_come() -> None:
    values = np.r_[VALUES, np.full(HOUR, 20.0), np.full(3, 200.0)]
    made = forecast(values, horizon_steps=30, start_s=MIDNIGHT_S, hints=[JOB])
    assert (made.quantiles[3, :7] > 180).all()


def test_a_window_never_seen_says_nothing() -> None:
    never = RecurringWindow.parse("0 5 1 1 *", 600)
    made, plain = (
        forecast(VALUES, horizon_steps=90, start_s=MIDNIGHT_S, hints=hints)
        for hints in ([never], [])
    )
    assert np.array_equal(made.quantiles, plain.quantiles)


def test_hints_need_the_time() -> None:
    with pytest.raises(ValueError, match="start_s"):
        forecast(VALUES, hints=[JOB])
