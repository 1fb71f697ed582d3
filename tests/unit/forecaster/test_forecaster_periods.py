"""Which periods are found, and that none is forced."""

from __future__ import annotations

import numpy as np
import pytest

from forecaster import forecast
from forecaster.periods import find_periods

RNG = np.random.default_rng(5)
DAY = 1440


def bursts(steps: int, period: int, width: int, height: float = 60.0) -> np.ndarray:
    rate = np.where(np.arange(steps) % period < width, height, 1.0)
    return RNG.poisson(rate).astype(float)


@pytest.mark.parametrize(
    ("period", "width", "repetitions"), [(4, 1, 3), (5, 2, 2), (10, 2, 3), (90, 5, 3), (90, 5, 30)]
)
def test_short_bursts_that_recur(period: int, width: int, repetitions: int) -> None:
    assert find_periods(bursts(period * repetitions, period, width))[:1] == (period,)


def test_a_day_and_what_is_nearly_a_day() -> None:
    tide = RNG.poisson(50 + 30 * np.sin(2 * np.pi * np.arange(5 * DAY) / DAY)).astype(float)
    assert find_periods(tide, (DAY,)) == (DAY,)


def test_two_periods_at_once() -> None:
    tide = RNG.poisson(40 + 30 * np.sin(2 * np.pi * np.arange(5 * DAY) / DAY)).astype(float)
    assert set(find_periods(tide + bursts(5 * DAY, 77, 5), (DAY,))) == {DAY, 77}


@pytest.mark.parametrize("period", [7, 30, 77, 90])
def test_multiples_explain_as_much_but_the_shortest_is_meant(period: int) -> None:
    values = np.tile(np.arange(period) % 5 + 10.0 * (np.arange(period) < 4), 40)
    known = (period * 3,)
    assert find_periods(values, known)[:1] == (period,)


@pytest.mark.parametrize("steps", [4, 10, 60, 1000, 10_080])
def test_noise_has_none(steps: int) -> None:
    assert find_periods(np.random.default_rng(steps).poisson(20.0, steps).astype(float)) == ()


@pytest.mark.parametrize(
    "values",
    [np.full(500, 7.0), np.zeros(500), np.arange(500.0), np.full(500, np.nan), np.empty(0)],
    ids=["constant", "zero", "line", "unknown", "empty"],
)
def test_what_does_not_vary_has_none(values: np.ndarray) -> None:
    assert find_periods(values) == ()


def test_a_walk_has_none() -> None:
    walk = np.abs(np.cumsum(np.random.default_rng(3).normal(size=3000)) + 100)
    assert find_periods(walk) == ()


def test_gaps_and_a_spike_do_not_hide_a_period() -> None:
    values = bursts(600, 30, 3)
    values[100:140] = np.nan
    values[300] = 1e6
    assert find_periods(values)[:1] == (30,)


@pytest.mark.parametrize(("period", "width"), [(4, 1), (7, 2), (90, 5)])
def test_the_third_burst_is_forecast(period: int, width: int) -> None:
    values = bursts(3 * period, period, width)
    just_before = forecast(values[: 2 * period + period - 1], horizon_steps=period)
    assert just_before.maximum(3)[5] > 40, "the burst begins in two steps"
    quiet = forecast(values[: 2 * period + width], horizon_steps=period)
    assert quiet.quantiles[3, 0] < 20, "and now it is over"
