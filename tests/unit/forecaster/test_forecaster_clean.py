"""A collector that was down is not an hour without demand; a real zero is."""

from __future__ import annotations

import numpy as np
import pytest

from forecaster.clean import cleaned

BUSY = np.random.default_rng(1).poisson(50.0, 2000).astype(float)


def with_zeros(values: np.ndarray, *runs: tuple[int, int]) -> np.ndarray:
    values = values.copy()
    for first, last in runs:
        values[first:last] = 0.0
    return values


def test_zeros_between_full_load_are_an_outage() -> None:
    clean = cleaned(with_zeros(BUSY, (500, 620)))
    assert np.isnan(clean[500:620]).all()
    assert np.isfinite(clean).sum() == 1880


FADING = np.maximum(np.sin(np.arange(2000) / 100.0), 0.0) * 50
BURSTS = np.tile(np.r_[np.full(3, 40.0), np.zeros(21)], 4)[:-21]
SPARSE = np.where(np.random.default_rng(2).random(2000) < 0.05, 3.0, 0.0)


@pytest.mark.parametrize(
    "values",
    [
        with_zeros(BUSY, (1900, 2000)),
        with_zeros(BUSY, (0, 100)),
        with_zeros(BUSY, (500, 502)),
        with_zeros(BUSY, *[(at, at + 60) for at in range(100, 1900, 200)]),
        FADING,
        BURSTS,
        SPARSE,
        np.zeros(500),
    ],
    ids=[
        "at the end",
        "at the beginning",
        "two steps",
        "a habit",
        "fading",
        "bursts",
        "sparse",
        "zero",
    ],
)
def test_other_zeros_are_real(values: np.ndarray) -> None:
    assert np.array_equal(cleaned(values), values)


def test_one_absurd_value_is_unknown() -> None:
    values = BUSY.copy()
    values[700] = 1e7
    clean = cleaned(values)
    assert np.flatnonzero(np.isnan(clean)).tolist() == [700]


def test_a_burst_and_the_last_value_are_demand() -> None:
    values = BUSY.copy()
    values[700:704] = 1e5
    values[-1] = 1e7
    assert np.array_equal(cleaned(values), values)


def test_what_is_no_number_of_requests_is_unknown() -> None:
    clean = cleaned(np.array([1.0, -1.0, np.inf, np.nan, 2.0]))
    assert np.isnan(clean).tolist() == [False, True, True, True, False]
