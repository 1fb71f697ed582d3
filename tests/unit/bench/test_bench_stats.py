"""Medians, paired ratios, orders."""

from __future__ import annotations

import pytest

from bench import stats


def test_spread_of_nothing_is_unknown_not_zero() -> None:
    assert stats.spread([]) is None


def test_spread_has_median_and_extremes() -> None:
    found = stats.spread([3.0, 1.0, 2.0])
    assert found == stats.Spread(median=2.0, low=1.0, high=3.0, rounds=3)


def test_paired_ratio_is_unmoved_by_a_slow_round() -> None:
    """A round in which the machine was three times slower slows both sides of its ratio."""
    fast, slow = {0: 10.0, 1: 30.0, 2: 10.0}, {0: 20.0, 1: 60.0, 2: 20.0}
    found = stats.paired_ratio(slow, fast)
    assert found is not None
    assert (found.median, found.low, found.high) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("numerator", "denominator", "rounds"),
    [({0: 1.0}, {1: 1.0}, None), ({0: 1.0, 1: 1.0}, {1: 2.0}, 1), ({0: 1.0}, {0: 0.0}, None)],
)
def test_paired_ratio_uses_only_shared_rounds_that_cost_something(
    numerator: dict[int, float], denominator: dict[int, float], rounds: int | None
) -> None:
    found = stats.paired_ratio(numerator, denominator)
    assert (found.rounds if found else None) == rounds


@pytest.mark.parametrize(
    ("values", "fraction", "expected"),
    [([], 0.5, None), ([5.0], 0.99, 5.0), ([1.0, 2.0, 3.0, 4.0], 0.5, 3.0),
     (list(range(100)), 0.99, 99), ([2.0, 1.0], 1.0, 2.0)],
)  # fmt: skip
def test_percentile(values: list[float], fraction: float, expected: float | None) -> None:
    assert stats.percentile(values, fraction) == expected


def test_best_is_the_cheapest_that_was_measured() -> None:
    cheap, dear = stats.spread([1.0]), stats.spread([2.0])
    assert stats.best({"a": dear, "b": cheap, "c": None}) == "b"
    assert stats.best({"c": None}) is None


@pytest.mark.parametrize(
    ("order", "expected"),
    [([], 0.0), ([7], 0.0), ([0, 1, 2, 3], 0.0), ([3, 2, 1, 0], 1.0), ([0, 2, 1], 1 / 3)],
)
def test_inversions(order: list[int], expected: float) -> None:
    assert stats.inversions(order) == pytest.approx(expected)
