"""A counter's growth on a grid: what is known, what is not, and how much is kept."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.signals.rates import NEWS_S, PoolRates, RateGrid

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


def test_what_is_not_known_is_filled_in() -> None:
    grid = RateGrid(60.0, 4)
    for minute in range(3):
        grid.add(60.0 * minute, 60 * minute)
    grid.fill([5.0, 6.0, 7.0], 60.0)  # the last is of the first minute of the grid
    assert same(list(grid.values), [5.0, 6.0, 1.0, 1.0])
    assert grid.end_s == 120.0
    grid.add(180.0, None)
    grid.fill([8.0, 9.0], 240.0)  # of a clock that was ahead
    assert same(list(grid.values), [6.0, 1.0, 1.0, NAN])
    grid.fill([8.0, 9.0], 180.0)
    assert same(list(grid.values), [6.0, 1.0, 1.0, 9.0])


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


SO_FAR = [
    # name, readings (at_s, total), the last of them asked for; rate
    ("the first says nothing", [(60, 7)], NAN),
    ("of the step that runs", [(60, 0), (80, 40)], 2.0),
    ("not of those before", [(60, 0), (120, 600), (150, 630)], 1.0),
    ("unknown when it began", [(60, 0), (120, None), (150, 630)], NAN),
    ("unknown now", [(60, 0), (80, None)], NAN),
    ("a counter that began again", [(60, 90), (80, 30)], NAN),
]


@pytest.mark.parametrize(
    ("readings", "rate"), [pytest.param(*case[1:], id=case[0]) for case in SO_FAR]
)
def test_the_rate_of_the_step_that_runs(
    readings: list[tuple[float, int | None]], rate: float
) -> None:
    grid = RateGrid(60.0, 100)
    for at_s, total in readings:
        grid.add(at_s, total)
    assert same([grid.so_far(*readings[-1])], [rate])


def told(lead_s: float | None, totals: dict[int, int | None]) -> list[tuple[int, bool]]:
    """When there was news for a forecast, and whether the running minute's rate was among it."""
    rates = PoolRates()
    return [
        (at_s, not math.isnan(rates.so_far))
        for at_s, total in totals.items()
        if rates.add(at_s, total, lead_s)
    ]


def test_there_is_news_at_the_end_of_a_minute_and_once_within_it() -> None:
    each_second = {at_s: 10 * at_s for at_s in range(60, 200)}
    soon = round(NEWS_S)
    expected = [(60 + soon, True), (120, False), (120 + soon, True), (180, False)]
    assert told(90.0, each_second)[:4] == expected
    assert told(None, each_second)[:4] == expected
    assert [at_s for at_s, _ in told(10.0, each_second)] == list(range(65, 200, 5))


def test_an_unknown_count_is_no_news() -> None:
    assert told(90.0, dict.fromkeys(range(61, 119))) == []
