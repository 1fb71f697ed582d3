"""The outlook of a pool: trusted where its forecasts turned out well, on the first day too."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from autoscaler.policy.outlook import LEVELS, OutlookMaker
from autoscaler.types import Outlook
from forecaster.cron import RecurringWindow
from forecaster.models.last_value import LastValue
from forecaster.types import Floats, History

MINUTES = 2 * 1_440
LEADS_S = (*[400.0] * 6, 430.0, 430.0, 900.0)
NONE = History(values=np.empty(0), step_s=5.0)


def steady(minutes: int, seed: int = 1) -> Floats:
    return np.random.default_rng(seed).poisson(600.0, minutes).astype(float)


def outlooks(
    values: Floats, first: int, lead_s: float = 120.0, history_least_s: float = 86_400.0
) -> list[Outlook]:
    """One a minute, from ``first`` minutes of history on."""
    maker = OutlookMaker(history_least_s)
    found = []
    for end in range(first, len(values) + 1):
        minutes = History(values=values[:end], start_s=6e8)
        found.append(maker.make(minutes, NONE, lead_s, 60.0 * end))
    return found


def test_a_pool_that_comes_with_a_past_is_trusted_within_minutes() -> None:
    found = outlooks(steady(MINUTES), MINUTES - 6)
    assert found[0].distrust
    assert not found[-1].distrust
    assert found[-1].scored >= 40
    assert found[-1].coverage == pytest.approx(0.95, abs=0.06)
    assert found[-1].loss_ratio is not None
    assert found[-1].loss_ratio < 1.0
    assert sum(found[-1].weights.values()) == pytest.approx(1.0)


def test_a_pool_without_a_past_is_not() -> None:
    (found,) = outlooks(steady(30), 30)
    assert found.distrust
    (found,) = outlooks(steady(30), 30, history_least_s=1_800.0)
    assert not found.distrust


def test_unknown_minutes_are_no_history() -> None:
    values = steady(MINUTES)
    values[: MINUTES // 2 + 30] = np.nan
    assert outlooks(values, MINUTES - 6)[-1].distrust


def test_forecasts_that_turn_out_badly_are_left_aside() -> None:
    values = steady(MINUTES + 120)
    # A pool as never before: higher each minute, so that no quantile of the past covers it.
    values[MINUTES:] = 600.0 * 1.15 ** np.minimum(np.arange(120), 60)
    found = outlooks(values, MINUTES - 6)
    assert not found[5].distrust
    assert found[60].distrust
    assert found[60].tally.scored < found[60].scored  # those of its past are not counted
    assert found[60].tally.covered < 0.5 * found[60].tally.scored


def test_the_running_minute_is_news_and_is_not_scored() -> None:
    values = steady(MINUTES)
    maker = OutlookMaker(86_400.0)
    minutes = History(values=values, start_s=6e8)
    before = maker.make(minutes, NONE, 120.0, 0.0)
    twice = maker.make(minutes, NONE, 120.0, 15.0, so_far=1_200.0)
    again = maker.make(minutes, NONE, 120.0, 30.0, so_far=600.0)
    middle = before.levels.index(0.5)
    assert twice.tokens_per_s[middle] > 1.1 * before.tokens_per_s[middle]
    assert again.tokens_per_s[middle] == pytest.approx(before.tokens_per_s[middle], rel=0.05)
    assert again.tally.scored == before.tally.scored


def test_scores_outlive_a_lead_that_changes_a_little() -> None:
    values = steady(MINUTES)
    maker = OutlookMaker(86_400.0)
    scored = []
    for end, lead_s in zip(range(MINUTES - 9, MINUTES), LEADS_S, strict=True):
        minutes = History(values=values[:end], start_s=0.0)
        scored.append(maker.make(minutes, NONE, lead_s, 60.0 * end).scored)
    assert scored[7] >= 40
    assert scored[8] < 40


def test_a_lead_below_a_minute_is_of_seconds() -> None:
    seconds = History(values=np.full(60, 10.0), step_s=5.0, start_s=0.0)
    found = OutlookMaker(0.0).make(NONE, seconds, 8.0, 300.0)
    assert found.step_s == 5.0
    assert found.tokens_per_s[0] == pytest.approx(10.0, rel=0.3)
    with pytest.raises(ValueError):
        OutlookMaker(0.0).make(NONE, seconds, 120.0, 300.0)


def test_a_burst_that_comes_too_seldom_to_be_recognised_is_expected_where_it_is_hinted() -> None:
    day, week = 1_440, 7 * 1_440
    values = steady(week + day)
    values[60:90] *= 4.0  # an hour after midnight, a week before the end of this history
    minutes = History(values=values[: week + 55], start_s=1_000 * 7 * 86_400.0)
    expected = []
    for hints in ((), (RecurringWindow.parse("0 1 * * thu", 1_800),)):
        maker = OutlookMaker()
        maker.hints = hints
        made = maker.make(minutes, NONE, 600.0, 0.0)
        expected.append(np.interp(0.95, made.levels, made.tokens_per_s))
    assert expected[0] < 1_000.0 < 2_000.0 < expected[1]


def test_a_slow_model_has_the_say_that_it_earns() -> None:
    values = steady(MINUTES)
    begin = MINUTES - 300
    start = History(values=values[:begin], start_s=6e8)
    good = LastValue().forecast(start, 360, LEVELS)
    bad = replace(good, quantiles=9 * good.quantiles, maxima=9 * good.maxima)
    maker = OutlookMaker(86_400.0)
    maker.slow = {"good": good, "bad": bad}
    said = []
    for end in range(begin, MINUTES, 3):
        made = maker.make(History(values=values[:end], start_s=6e8), NONE, 120.0, 0.0)
        said.append(made.weights)
    assert said[0]["good"] == pytest.approx(said[0]["bad"], rel=0.01)
    assert said[-1]["bad"] < 0.2 * said[-1]["good"]
    late = History(values=values, start_s=6e8 + 86_400.0)
    assert "good" not in maker.make(late, NONE, 120.0, 0.0).weights


@pytest.mark.parametrize("lead_s", [20.0, 120.0])
def test_the_same_forecast_for_further_ahead(lead_s: float) -> None:
    maker = OutlookMaker(86_400.0)
    minutes = History(values=steady(MINUTES), start_s=6e8)
    fine = History(values=steady(4_320), step_s=5.0, start_s=6e8 + 60.0 * MINUTES - 5.0 * 4_320)
    with pytest.raises(ValueError, match="no outlook"):
        maker.further(minutes)
    found = maker.make(minutes, fine, lead_s, 0.0)
    further = maker.further(minutes)
    assert [one.horizon_s for one in further] == [60.0, 300.0, 900.0]
    middle = found.levels.index(0.5)
    for one in further:
        assert list(one.tokens_per_s) == sorted(one.tokens_per_s)
        assert one.tokens_per_s[middle] == pytest.approx(600.0, rel=0.25)
    for near, far in itertools.pairwise(further):
        assert all(a <= b for a, b in zip(near.tokens_per_s, far.tokens_per_s, strict=True))
    assert maker.further(minutes) is further  # made once a minute
    values = np.append(minutes.values[1:], 6_000.0)
    risen = maker.further(History(values=values, start_s=6e8 + 60.0))
    assert risen[0].tokens_per_s[middle] > 1.2 * further[0].tokens_per_s[middle]
