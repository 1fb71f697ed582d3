"""When a forecast is left aside."""

from __future__ import annotations

import pytest

from autoscaler.policy.trust import SCORED_LEAST, ForecastScore, find_distrust, measure, pinball

DAY_S = 86_400.0


def scores(
    forecast: float, came: float, count: int, last_value: float = 500.0
) -> list[ForecastScore]:
    return [ForecastScore(forecast=forecast, last_value=last_value, came=came)] * count


GOOD = scores(110, 100, 90)
CASES = [
    # name, history in days, scores, trusted
    ("a day of history", 1.0, GOOD, False),
    ("two days", 2.0, GOOD, True),
    ("too few were scored", 2.0, scores(90, 100, SCORED_LEAST - 1), True),
    ("none was high enough", 2.0, scores(90, 100, SCORED_LEAST), False),
    ("one in ten was not", 2.0, [*GOOD, *scores(90, 100, 10)], True),
    ("one in three was not", 2.0, [*GOOD, *scores(90, 100, 45)], False),
    ("covered, but the last value was nearer", 2.0, scores(500, 100, 90, 110), False),
]  # fmt: skip


@pytest.mark.parametrize(
    ("days", "seen", "trusted"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_trust(days: float, seen: list[ForecastScore], trusted: bool) -> None:
    why = find_distrust(days * DAY_S, 2 * DAY_S, measure(seen))
    assert (not why) == trusted, why


def test_a_quantile_that_is_short_costs_more_than_one_that_is_over() -> None:
    assert pinball(90, 100) == pytest.approx(9.5)
    assert pinball(110, 100) == pytest.approx(0.5)
    assert pinball(100, 100) == 0.0
