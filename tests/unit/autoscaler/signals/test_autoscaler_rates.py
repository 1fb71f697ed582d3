"""A counter's growth on a grid: what is known, what is not, and how much is kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.signals.rates import RateGrid

NAN = float("nan")


def same(one: list[float], other: list[float]) -> bool:
    return [None if math.isnan(a) else round(a, 9) for a in one] == [
        None if math.isnan(b) else round(b, 9) for b in other
    ]


CASES = [
    # name, readings (at_s, total), values
    ("none", [], []),
    ("the first says nothing", [(100, 7)], []),
    ("whole steps", [(60, 0), (120, 30), (180, 90)], [0.5, 1.0]),
    ("readings between do not matter", [(60, 0), (90, 5), (119, 29), (120, 30)], [0.5]),
    ("late readings are spread", [(60, 0), (185, 120)], [1.0, 1.0]),
    ("too late ones are not", [(60, 0), (310, 120), (360, 180)], [NAN] * 4 + [1.0]),
    ("a counter that began again", [(60, 90), (120, 30), (180, 90)], [NAN, 1.0]),
    ("unknown at the end of a step", [(60, 0), (120, None), (180, 90), (240, 150)],
     [NAN, NAN, 1.0]),
    ("the clock was set back", [(600, 0), (60, 10), (120, 70)], [1.0]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("readings", "values"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_rates(readings: list[tuple[float, int | None]], values: list[float]) -> None:
    grid = RateGrid(60.0, 100)
    ended = sum(grid.add(at_s, total) for at_s, total in readings)
    assert ended == len(values)
    assert same(list(grid.values), values)


def test_what_was_before_is_put_in_front() -> None:
    grid = RateGrid(60.0, 4)
    for minute in range(3):
        grid.add(60.0 * minute, 60 * minute)
    grid.prepend([5.0, 6.0, 7.0])
    assert list(grid.values) == [6.0, 7.0, 1.0, 1.0]
    assert grid.end_s == 120.0


@given(st.lists(st.tuples(st.floats(0.1, 400.0), st.none() | st.integers(0, 10**6)), max_size=60))
def test_any_readings_keep_the_grid_whole(readings: list[tuple[float, int | None]]) -> None:
    grid = RateGrid(60.0, 20)
    now_s, begun_s, ended = 0.0, None, 0
    for gap_s, total in readings:
        now_s += gap_s
        if begun_s is None:
            begun_s = now_s // 60 * 60
        ended += grid.add(now_s, total)
        assert grid.end_s == now_s // 60 * 60
        assert len(grid.values) == min(20, (grid.end_s - begun_s) / 60)
        assert all(math.isnan(value) or value >= 0 for value in grid.values)
