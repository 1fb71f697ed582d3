"""Trust and weights follow from how forecasts came out."""

from __future__ import annotations

import numpy as np
import pytest

from forecaster.models.last_value import LastValue
from forecaster.scoreboard import Scoreboard, mixed, rehearse
from forecaster.types import Forecast, History

LEAD = 3
LEVELS = (0.5, 0.95)


def flat(model: str, low: float, high: float, steps: int = LEAD) -> Forecast:
    rows = np.repeat([[low], [high]], steps, axis=1)
    return Forecast(
        model=model, step_s=60.0, levels=LEVELS, quantiles=rows, mean=rows[0], maxima=rows
    )


def played(high: float, baseline_high: float, values: list[float]) -> Scoreboard:
    board = Scoreboard(LEAD, 60.0, LEVELS)
    for step, value in enumerate(values):
        board.observe(step, value)
        board.expect(
            step,
            {
                "ours": flat("ours", 100.0, high),
                "last_value": flat("last_value", 100.0, baseline_high),
            },
        )
    return board


STEADY = [100.0] * 300


@pytest.mark.parametrize(
    ("high", "baseline_high", "values", "reason"),
    [
        pytest.param(101.0, 120.0, STEADY, None, id="better than the last value"),
        pytest.param(90.0, 120.0, STEADY[:30], None, id="too low, but too few were scored"),
        pytest.param(90.0, 120.0, STEADY, "coverage", id="too low"),
        pytest.param(130.0, 120.0, STEADY, "pinball", id="the last value was nearer"),
        pytest.param(99.6, 120.0, STEADY, None, id="too low by less than matters"),
        pytest.param(99.4, 112.0, STEADY, "coverage", id="too low by more than that"),
        pytest.param(99.4, 120.0, STEADY, None, id="too low, and much better than the last value"),
        pytest.param(100.4, 100.0, STEADY, None, id="the last value was nearer, as little"),
        pytest.param(100.8, 100.1, STEADY, "pinball", id="the last value was nearer, by more"),
        # What is unknown is not scored, and so does not count against it.
        pytest.param(90.0, 120.0, [100.0, np.nan] * 200, None, id="unknown"),
        pytest.param(90.0, 120.0, [90.0] * 9000 + STEADY, "coverage", id="no more"),
        pytest.param(90.0, 120.0, STEADY + [90.0] * 9000, None, id="forgiven"),
    ],
)
def test_trust(high: float, baseline_high: float, values: list[float], reason: str | None) -> None:
    assert played(high, baseline_high, values).quality("ours").reason == reason


def test_the_figures_behind_it() -> None:
    found = played(110.0, 120.0, [100.0] * 250 + [130.0] * 60).quality("ours")
    assert found.level == 0.95
    assert found.scored == 307
    # 60 windows have a 130 in them. Earlier ones count for less.
    assert 1 - 60 / 307 - 0.02 < found.coverage < 1 - 60 / 307
    # 247 windows were over by 10 and 20, and 60 short by 20 and 10.
    losses = [247 * 0.05 * over + 60 * 0.95 * short for over, short in ((10, 20), (20, 10))]
    assert found.loss_ratio == pytest.approx(losses[0] / losses[1], rel=0.05)
    nothing = Scoreboard(LEAD).quality("ours")
    assert nothing.scored == 0
    assert np.isnan(nothing.coverage)


def test_the_best_model_gets_the_say_the_longer_the_more() -> None:
    prior = {"ours": 0.5, "last_value": 0.5}
    early, late = played(101.0, 120.0, STEADY[:10]), played(101.0, 120.0, STEADY)
    assert 0.5 < early.weights(prior)["ours"] < late.weights(prior)["ours"]
    assert late.weights(prior)["ours"] > 0.95
    assert Scoreboard(LEAD).weights({"ours": 0.8, "last_value": 0.2})["ours"] == 0.8
    known = late.weights({"ours": 0.4, "last_value": 0.4, "new": 0.2})
    assert known["new"] > 0.2  # the last value lost its part


def test_a_mix_is_between() -> None:
    history = History(values=np.array([100.0]))
    both = {"a": flat("a", 100.0, 110.0), "b": flat("b", 200.0, 300.0)}
    made = mixed(history, both, {"a": 0.75, "b": 0.25})
    assert made.maximum(LEAD).tolist() == [125.0, 157.5]


def test_a_pool_with_history_is_rehearsed() -> None:
    values = np.random.default_rng(1).poisson(50.0, 3 * 288).astype(float)
    values[700] = np.nan
    history = History(values=values, step_s=300.0)
    board = Scoreboard(3, 300.0)
    anew = []

    def make(past: History, learn: bool) -> dict[str, Forecast]:
        assert np.array_equal(past.values, values[: len(past.values)], equal_nan=True)
        anew.append(learn)
        return {"last_value": LastValue().forecast(past, 3)}

    left = list(rehearse(board, history, make, first_step=1000))
    assert left == list(range(39, -1, -1))
    found = board.quality("last_value")
    assert found.scored in (39, 40)
    assert 0.8 < found.coverage <= 1.0
    assert anew.count(True) == 4
    assert not list(rehearse(board, History(values=values[:2]), make))


def test_a_lead_has_a_step() -> None:
    with pytest.raises(ValueError):
        Scoreboard(0)
