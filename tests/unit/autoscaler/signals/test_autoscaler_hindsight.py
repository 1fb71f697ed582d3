"""What decisions cost and brought: against reaction alone, computed by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.signals.hindsight import PastMoment, judge
from autoscaler.types import ForecastTally


def moments(rows: Sequence[dict[str, Any]], every_s: float = 60.0) -> list[PastMoment]:
    """One a minute; a replica carries 100 tokens/s, and starts in two minutes."""
    usual = {
        "supply": 1, "ready": 1, "tokens_per_s": 50.0, "capacity_tokens_per_s": 100.0, "alone": 1,
        "trusted": True, "lead_s": 120.0, "scale_down_delay_s": 0.0, "min_replicas": 0,
        "max_replicas": 10,
    }  # fmt: skip
    return [
        PastMoment(at_s=every_s * at, until_s=every_s * at + 90.0, **(usual | row))
        for at, row in enumerate(rows)
    ]


def test_a_replica_started_ahead_is_dearer_and_not_short() -> None:
    # Demand doubles in the fourth minute; ours were two from the second on.
    rows = [
        {},
        {"supply": 2},
        {"supply": 2},
        {"supply": 2, "ready": 2},
        {"supply": 2, "ready": 2, "tokens_per_s": 150.0, "alone": 2},
        {"supply": 2, "ready": 2, "tokens_per_s": 150.0, "alone": 2},
        {"supply": 2, "ready": 2, "tokens_per_s": 150.0, "alone": 2},
        {"supply": 2, "ready": 2, "tokens_per_s": 150.0, "alone": 2},
    ]
    found = judge(moments(rows))
    assert (found.scored_s, found.unknown_s, found.trusted_s) == (420.0, 0.0, 420.0)
    assert found.ran.replica_s == 60.0 + 6 * 120.0
    assert found.ran.short_s == 0.0
    # Reaction asks for the second when it sees it, and has it two minutes later.
    assert found.reactive.replica_s == 4 * 60.0 + 3 * 120.0
    assert found.reactive.short_s == 120.0
    assert (found.above_replica_s, found.below_replica_s) == (180.0, 0.0)
    assert found.auto is None


def test_reaction_keeps_the_most_of_the_delay() -> None:
    rows = [
        {"alone": 3, "scale_down_delay_s": 120.0},
        *({"alone": 1, "scale_down_delay_s": 120.0} for _ in range(5)),
    ]
    found = judge(moments(rows))
    assert found.reactive.replica_s == 60.0 * (3 + 3 + 3 + 1 + 1)
    assert found.below_replica_s == 60.0 * 6


def test_reaction_keeps_within_the_bounds_of_the_time() -> None:
    rows = [{"alone": 9, "max_replicas": 4}, {"alone": 0, "min_replicas": 2}, {}]
    assert judge(moments(rows)).reactive.replica_s == 60.0 * (4 + 2)


def test_to_zero_and_back_is_the_same_for_both() -> None:
    rows = [
        {"alone": 0, "tokens_per_s": 0.0},  # not idle for long enough yet
        {"alone": 0, "supply": 0, "ready": 0, "tokens_per_s": 0.0},
        {"alone": 0, "supply": 0, "ready": 0, "tokens_per_s": 0.0},
        {"alone": 1, "supply": 1, "ready": 0},
        {"alone": 1, "supply": 1, "ready": 1},
    ]
    found = judge(moments(rows))
    assert found.reactive.replica_s == found.ran.replica_s == 120.0
    assert found.reactive.short_s == found.ran.short_s


def test_what_is_not_known_is_not_judged() -> None:
    known: list[dict[str, Any]] = [{}, {}, {}]
    for name in ("ready", "alone", "capacity_tokens_per_s"):
        assert judge(moments([{name: None}, {}, {}])).unknown_s == 60.0
    assert judge(moments([{}, {"tokens_per_s": None}, {}])).unknown_s == 60.0
    gap = moments(known)
    later = moments(known)
    away = [
        PastMoment(**{**{name: getattr(one, name) for name in PastMoment.__slots__},
                      "at_s": one.at_s + 7_200.0, "until_s": one.until_s + 7_200.0})
        for one in later
    ]  # fmt: skip
    found = judge([*gap, *away])
    assert (found.scored_s, found.unknown_s) == (240.0, 7_080.0)
    assert judge([]).scored_s == judge(moments([{}])).scored_s == 0.0


def test_where_it_was_not_to_act_that_is_computed_too() -> None:
    rows = [{"recommended": 2, "tokens_per_s": 150.0} for _ in range(5)]
    found = judge(moments(rows))
    assert found.auto is not None
    assert found.ran.short_s == 240.0
    assert (found.auto.replica_s, found.auto.short_s) == (480.0, 60.0)


def test_forecasts_are_those_that_were_scored() -> None:
    tally = ForecastTally(scored=8, covered=6, loss=3.0, last_value_loss=4.0)
    found = judge([], tally)
    assert (found.coverage, found.loss_ratio) == (0.75, 0.75)
    assert (judge([]).coverage, judge([]).loss_ratio) == (None, None)


ROW = st.fixed_dictionaries(
    {
        "supply": st.integers(0, 5),
        "ready": st.none() | st.integers(0, 5),
        "tokens_per_s": st.none() | st.floats(0, 1_000),
        "capacity_tokens_per_s": st.none() | st.floats(1, 1_000),
        "alone": st.none() | st.integers(0, 20),
        "recommended": st.none() | st.integers(0, 5),
        "lead_s": st.none() | st.floats(0, 600),
        "scale_down_delay_s": st.floats(0, 600),
        "min_replicas": st.integers(0, 3),
        "max_replicas": st.integers(0, 6),
    }
)


@given(st.lists(ROW, max_size=30), st.floats(1.0, 200.0))
def test_every_second_is_judged_or_unknown_and_differences_add_up(
    rows: list[dict[str, Any]], every_s: float
) -> None:
    found = judge(moments(rows, every_s))
    assert found.scored_s + found.unknown_s == pytest.approx(every_s * max(0, len(rows) - 1))
    more = found.ran.replica_s - found.reactive.replica_s
    assert more == pytest.approx(found.above_replica_s - found.below_replica_s, abs=1e-6)
    for cost in (found.ran, found.reactive):
        assert 0.0 <= cost.short_s <= found.scored_s + 1e-6


@given(st.lists(st.integers(0, 8), min_size=2, max_size=40))
def test_with_no_lead_and_no_delay_it_has_what_it_asks_for(numbers: list[int]) -> None:
    rows = [
        {"alone": number, "supply": number, "ready": number, "lead_s": 0.0} for number in numbers
    ]
    found = judge(moments(rows))
    assert found.reactive.replica_s == found.ran.replica_s == 60.0 * sum(numbers[:-1])
    assert found.reactive.short_s == found.ran.short_s
