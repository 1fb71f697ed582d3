"""The history of a pool's decisions."""

from __future__ import annotations

from dataclasses import replace

from autoscaler.control.replicas import DecisionHistory
from autoscaler.types import Bound, Decision, ScaleReason

ONE = Decision(pool="m", at_s=1.0, desired=1, supply=1, reason=ScaleReason.STEADY, detail="first")


def test_equal_decisions_in_a_row_count_as_one() -> None:
    history = DecisionHistory(10)
    for second in range(5):
        history.add(replace(ONE, at_s=float(second), detail=f"number {second}"))
    (past,) = history.past
    assert (past.count, past.first_at_s, past.last_at_s) == (5, 0.0, 4.0)
    assert past.decision.detail == "number 4"
    history.add(replace(ONE, at_s=5.0, bound=Bound.MIN_REPLICAS))
    history.add(replace(ONE, at_s=6.0))
    assert [past.count for past in history.past] == [5, 1, 1]


def test_history_is_bounded_and_counts_are_not_lost() -> None:
    history = DecisionHistory(3)
    for number in range(100):
        history.add(replace(ONE, desired=number, at_s=float(number)))
    assert [past.decision.desired for past in history.past] == [97, 98, 99]
    assert history.counts == {ScaleReason.STEADY: 100}


def test_the_last_change_is_kept_while_decisions_repeat() -> None:
    history = DecisionHistory(2)
    wake = replace(ONE, reason=ScaleReason.WAKE, detail="a request is held")
    history.add(replace(ONE, desired=0))
    history.add(wake)
    for second in range(5):
        history.add(replace(ONE, at_s=float(second), bound=Bound(list(Bound)[second % 2])))
    assert history.change == wake
    advised = replace(ONE, recommended=3)
    history.add(advised)
    assert history.change == advised
