"""Trust and weights follow from how forecasts came out."""

from __future__ import annotations

import numpy as np
import pytest

from forecaster.models.last_value import LastValue
from forecaster.scoreboard import Scoreboard, mixed, rehearsed
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
    ("high", "baseline_high", "days", "values", "reason"),
    [
        (101.0, 120.0, 9.0, STEADY, None),
        (101.0, 120.0, 1.9, STEADY, "short_history"),
        (101.0, 120.0, 9.0, STEADY[:30], "not_scored"),
        (90.0, 120.0, 9.0, STEADY, "coverage"),
        (130.0, 120.0, 9.0, STEADY, "pinball"),
        # What is unknown is not scored, and so does not count against it.
        (101.0, 120.0, 9.0, [100.0, np.nan] * 200, "not_scored"),
    ],
)
def test_trust(
    high: float, baseline_high: float, days: float, values: list[float], reason: str | None
) -> None:
    found = played(high, baseline_high, values).quality("ours", 0.95, days)
    assert (found.trusted, found.reason) == (reason is None, reason)


def test_the_figures_behind_it() -> None:
    found = played(110.0, 120.0, [100.0] * 250 + [130.0] * 60).quality("ours", 0.95, 9.0)
    assert found.level == 0.95
    assert found.scored == 307
    # 60 + 3 - 1 windows have a 130 in them; three of the last are not over.
    assert found.coverage == pytest.approx(1 - 60 / 307)


def test_the_best_model_gets_the_say_the_longer_the_more() -> None:
    early, late = played(101.0, 120.0, STEADY[:10]), played(101.0, 120.0, STEADY)
    models = ("ours", "last_value")
    assert 0.5 < early.weights(models)["ours"] < late.weights(models)["ours"]
    assert late.weights(models)["ours"] > 0.95
    assert Scoreboard(LEAD).weights(models) == {"ours": 0.5, "last_value": 0.5}


def test_a_mix_is_between() -> None:
    history = History(values=np.array([100.0]))
    both = {"a": flat("a", 100.0, 110.0), "b": flat("b", 200.0, 300.0)}
    made = mixed(history, both, {"a": 0.75, "b": 0.25})
    assert made.maximum(LEAD).tolist() == [125.0, 157.5]


def test_state_is_bounded() -> None:
    board = played(101.0, 120.0, STEADY * 11)
    assert board.quality("ours", 0.95, 9.0).scored == 2880


def test_a_pool_with_history_is_rehearsed() -> None:
    values = np.random.default_rng(1).poisson(50.0, 3 * 288).astype(float)
    board = rehearsed(History(values=values, step_s=300.0), [LastValue()], 3)
    found = board.quality("last_value", 0.95, 3.0)
    assert found.scored == 40
    assert 0.8 < found.coverage <= 1.0
    assert rehearsed(History(values=values[:2]), [LastValue()], 3).quality(
        "last_value", 0.95, 3.0
    ).reason == "not_scored"  # fmt: skip


def test_a_lead_has_a_step() -> None:
    with pytest.raises(ValueError):
        Scoreboard(0)
