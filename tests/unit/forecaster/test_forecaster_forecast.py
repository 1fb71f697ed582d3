"""``forecaster.forecast``: any series, any length."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forecaster import forecast
from forecaster.models.automatic import Automatic
from forecaster.types import QUANTILES, History

TIDE = [50 + 40 * np.sin(2 * np.pi * minute / 1440) for minute in range(3 * 1440)]


@pytest.mark.parametrize("kind", [list, tuple, np.array, pd.Series])
def test_any_kind_of_series(kind: Any) -> None:
    made = forecast(kind(TIDE), horizon_steps=30)
    assert made.quantiles.shape == (len(QUANTILES), 30)
    assert made.maximum(30).shape == (len(QUANTILES),)


def test_quantiles_come_in_rising_order() -> None:
    assert forecast([1, 2, 3], quantiles=(0.9, 0.5)).levels == (0.5, 0.9)


def test_a_few_minutes_are_wider_than_days() -> None:
    short, long = forecast([50.0] * 5), forecast(np.full(3000, 50.0))
    assert short.maximum(15)[-1] > long.maximum(15)[-1]
    assert short.maximum(15)[-1] > 60


def test_negative_and_infinite_are_unknown() -> None:
    odd = forecast([5.0, -1.0, np.inf, 5.0, np.nan, 5.0])
    assert odd.quantiles[QUANTILES.index(0.5), 0] == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize(
    ("history", "asked"),
    [
        ([], {}),
        ([np.nan] * 9, {}),
        ([[1.0]], {}),
        ([1.0], {"horizon_steps": 0}),
        ([1.0], {"horizon_steps": 1441}),
        ([1.0], {"quantiles": ()}),
        ([1.0], {"quantiles": (0.5, 1.0)}),
        ([1.0], {"step_s": 0}),
    ],
)
def test_what_cannot_be_forecast(history: Any, asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        forecast(history, **asked)


@pytest.mark.parametrize("lead", [0, 61, -1])
def test_a_lead_is_within_the_horizon(lead: int) -> None:
    with pytest.raises(ValueError):
        forecast([1.0, 2.0]).maximum(lead)


def test_a_level_between_two() -> None:
    made = forecast([10.0, 11.0, 9.0], quantiles=(0.5, 0.9))
    low, high = made.maximum(10)
    assert made.maximum_at(10, 0.7) == pytest.approx((low + high) / 2)
    assert made.maximum_at(10, 0.99) == high


def test_importing_the_package_needs_no_numpy() -> None:
    code = "import forecaster, forecaster.cron, sys; assert 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.floats(allow_nan=True, allow_infinity=True, width=64),
            st.integers(0, 50).map(float),
            st.just(0.0),
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(1, 30),
    st.integers(1, 40),
    st.sampled_from([1.0, 60.0, 300.0, 86_400.0, 0.7]),
)
def test_odd_histories(part: list[float], repeat: int, horizon: int, step_s: float) -> None:
    """Repeated, so that some are long enough for every model and have a period."""
    history = part * repeat
    if not any(np.isfinite(value) and value >= 0 for value in history):
        return
    made = forecast(history, step_s, horizon)
    for rows in (made.quantiles, made.mean, made.maxima):
        assert np.isfinite(rows).all()
        assert (rows >= 0).all()
    assert (np.diff(made.maxima, axis=0) >= 0).all()
    assert (np.diff(made.maxima, axis=1) >= 0).all()


@pytest.mark.parametrize("lead_steps", [1, 3, 30])
def test_a_fit_forecasts_from_what_came_since(lead_steps: int) -> None:
    rng = np.random.default_rng(5)
    steps = np.arange(4 * 1_440)
    values = rng.poisson(60 + 40 * np.sin(2 * np.pi * steps / 1_440)).astype(float)
    levels = (0.1, 0.5, 0.95)
    early, late = History(values=values[:-40]), History(values=values)
    fit = Automatic().fit(early, lead_steps)
    same = fit.forecast(early, lead_steps, levels).maximum(lead_steps)
    np.testing.assert_allclose(
        same, Automatic().forecast(early, lead_steps, levels).maximum(lead_steps)
    )
    kept = fit.forecast(late, lead_steps, levels).maximum(lead_steps)
    anew = Automatic().forecast(late, lead_steps, levels).maximum(lead_steps)
    np.testing.assert_allclose(kept, anew, rtol=0.05)
    # It is of now, not of when it was fitted.
    jump = np.concatenate([values[:-40], np.full(40, 400.0)])
    risen = fit.forecast(History(values=jump), lead_steps, levels).maximum(lead_steps)
    assert risen[1] > 2 * same[1]
