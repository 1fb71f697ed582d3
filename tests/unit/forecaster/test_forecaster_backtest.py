"""Scores of forecasts of the past."""

from __future__ import annotations

import numpy as np
import pytest

from forecaster.backtest import backtest
from forecaster.models.direct import Direct
from forecaster.models.last_value import LastValue
from forecaster.types import QUANTILES, Forecast, History

RISING = History(values=np.arange(1.0, 101.0))


class Oracle:
    """Knows that the series rises by one a step; its upper quantile is two above."""

    name = "oracle"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        if len(history.values) < 50:
            raise ValueError("too short")
        ahead = history.values[-1] + np.arange(1.0, horizon_steps + 1)
        rows = np.array([ahead + (2.0 if level > 0.5 else 0.0) for level in levels])
        return Forecast(
            model="oracle", step_s=60.0, levels=levels, quantiles=rows, mean=ahead, maxima=rows
        )


def test_figures() -> None:
    (score,) = backtest(RISING, [Oracle()], leads=(5,), levels=(0.5, 0.9), first_step=40, origins=8)
    assert score.wape == 0.0
    assert score.coverage == score.maximum_coverage == {0.5: 1.0, 0.9: 1.0}
    assert score.pinball[0.5] == 0.0
    assert 0.2 / 100 < score.pinball[0.9] < 0.2 / 50, "two too high, at a tenth each"
    assert score.refit_s is None


def test_an_origin_that_is_too_short_is_counted() -> None:
    (score,) = backtest(RISING, [Oracle()], leads=(1,), first_step=40, origins=1000)
    assert (score.failed, score.origins) == (10, 50)


def test_a_model_sees_only_the_past() -> None:
    seen: list[tuple[int, float | None]] = []

    class Spy(LastValue):
        def forecast(
            self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
        ) -> Forecast:
            seen.append((len(history.values), history.start_s))
            return super().forecast(history, horizon_steps, levels)

    history = History(values=RISING.values, step_s=60.0, start_s=0.0)
    backtest(history, [Spy()], leads=(10,), first_step=50, origins=3, train_steps=20)
    assert seen == [(20, 30 * 60.0), (20, 50 * 60.0), (20, 70 * 60.0)]


def test_unknown_is_not_scored() -> None:
    values = RISING.values.copy()
    values[60:70] = np.nan
    (score,) = backtest(
        History(values=values), [LastValue()], leads=(1,), first_step=50, origins=1000
    )
    assert score.origins == 40
    values[50:] = np.nan
    (score,) = backtest(History(values=values), [LastValue()], leads=(1,), first_step=50)
    assert score.origins == 0
    assert np.isnan(score.wape)


def test_the_clock_is_the_callers() -> None:
    ticks = iter(range(1000))
    (score,) = backtest(RISING, [LastValue()], leads=(1,), clock=lambda: float(next(ticks)))
    assert score.refit_s == 1.0


def test_no_origin_left() -> None:
    with pytest.raises(ValueError):
        backtest(RISING, [LastValue()], leads=(99,))


def test_the_direct_model_knows_tides_and_waves() -> None:
    """Held to noise of a known kind: near what is possible, and covered as it says."""
    steps = np.arange(5 * 288)
    tide = 60 + 40 * np.sin(2 * np.pi * steps / 288) + 10 * np.sin(2 * np.pi * steps / 17)
    values = np.random.default_rng(2).poisson(tide).astype(float)
    direct, last = backtest(
        History(values=values, step_s=300.0),
        [Direct(), LastValue()],
        leads=(6,),
        first_step=4 * 288,
        origins=120,
    )
    assert direct.pinball[0.95] < 0.85 * last.pinball[0.95]
    assert direct.maximum_pinball[0.95] < 0.85 * last.maximum_pinball[0.95]
    assert 0.9 < direct.coverage[0.95] < 0.99
    assert 0.9 < direct.maximum_coverage[0.95] < 0.995


def test_silent_nights_do_not_make_the_days_look_sure() -> None:
    """Two thirds of the errors are of nights in which nothing comes, and as small as they get."""
    hours = np.arange(6 * 288) % 288 / 12
    rate = np.where((hours > 8) & (hours < 16), 60.0, 0.0)
    found = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        values = rng.poisson(rate * rng.gamma(8.0, 1 / 8.0, len(rate))).astype(float)
        for origin in range(5 * 288 + 9 * 12, 5 * 288 + 15 * 12, 3):
            past = History(values=values[:origin], step_s=300.0)
            upper = Direct().forecast(past, 2, (0.95,)).maximum(2)[0]
            found.append(values[origin : origin + 2].max() <= upper)
    assert 0.92 < np.mean(found) < 0.99
