"""Which models stay in memory."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.memory_shares import MemoryBid, expect_left_s, share_memory
from autoscaler.types import Gap


def bid(pool: str, size_bytes: int, saved_price_s: float, *, held: bool = False) -> MemoryBid:
    return MemoryBid(pool=pool, size_bytes=size_bytes, saved_price_s=saved_price_s, held=held)


@pytest.mark.parametrize(
    ("name", "bids", "expected"),
    [
        ("all where all fit", [bid("a", 40, 1.0), bid("b", 60, 1.0)], {"a", "b"}),
        ("most by size", [bid("a", 80, 2.0), bid("b", 40, 1.5), bid("c", 60, 1.4)], {"b", "c"}),
        ("one large that saves more than all small", [bid("a", 10, 1.0), bid("b", 95, 5.0)], {"b"}),
        ("what never fits holds up no other", [bid("a", 101, 9.0), bid("b", 50, 0.1)], {"b"}),
        ("what saves nothing has none", [bid("a", 10, 0.0)], set()),
        ("a little more takes none", [bid("a", 60, 1.0, held=True), bid("b", 60, 1.2)], {"a"}),
        ("much more does", [bid("a", 60, 1.0, held=True), bid("b", 60, 1.3)], {"b"}),
        ("nothing", [], set()),
    ],
)  # fmt: skip
def test_shares(name: str, bids: list[MemoryBid], expected: set[str]) -> None:
    assert share_memory(100, bids) == expected


BIDS = st.lists(st.tuples(st.integers(1, 120), st.floats(0.0, 10.0)), max_size=7)


@given(BIDS)
def test_it_fits_and_saves_half_of_the_most_at_least(found: list[tuple[int, float]]) -> None:
    bids = [bid(f"p{place}", *one) for place, one in enumerate(found)]
    chosen = [one for one in bids if one.pool in share_memory(100, bids)]
    assert sum(one.size_bytes for one in chosen) <= 100
    most = max(
        sum(one.saved_price_s for one in some)
        for count in range(len(bids) + 1)
        for some in combinations(bids, count)
        if sum(one.size_bytes for one in some) <= 100
    )
    assert sum(one.saved_price_s for one in chosen) >= most / 2 - 1e-9


@given(BIDS)
def test_what_was_chosen_stays_chosen(found: list[tuple[int, float]]) -> None:
    bids = [bid(f"p{place}", *one) for place, one in enumerate(found)]
    chosen = share_memory(100, bids)
    again = [
        bid(one.pool, one.size_bytes, one.saved_price_s, held=one.pool in chosen) for one in bids
    ]
    assert share_memory(100, again) == chosen


@pytest.mark.parametrize(
    ("name", "gaps", "idle_s", "expected"),
    [
        ("none is known: as long again", [], 600.0, 600.0),
        (
            "what was left of longer ones",
            [Gap(100.0), Gap(1_000.0), Gap(1_000.0)],
            400.0,
            1_600 / 3,
        ),
        ("with their weights", [Gap(1_000.0, 9.0)], 500.0, 500.0),
        ("it has just begun", [Gap(99.0)], 0.0, 50.0),
    ],
)
def test_seconds_until_the_next_request(
    name: str, gaps: list[Gap], idle_s: float, expected: float
) -> None:
    assert expect_left_s(gaps, idle_s) == pytest.approx(expected)
