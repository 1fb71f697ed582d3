"""Which decisions are kept: one a minute and each change, bounded, whatever clocks and disks do."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from decision_rig import decision
from direct_writer import DirectWriter

from autoscaler.control.decision_log import MOST_CHANGES, DecisionLog
from autoscaler.signals.decisions import DecisionRecord, read_between
from autoscaler.types import ForecastTally, ScaleReason, Signal

WALL_S = 1_700_000_000.0


class Rig:
    """A log on a clock of its own. ``ahead_s``: by how much the wall clock is wrong."""

    def __init__(self, path: Path) -> None:
        self.now_s = 1_000.0
        self.ahead_s = 0.0
        self.tally = ForecastTally()
        self.writer = DirectWriter(path, lambda: WALL_S)
        self.log = DecisionLog(
            writer=self.writer,  # type: ignore[arg-type]
            tally=lambda pool: self.tally,
            wall_s=lambda: WALL_S + self.now_s + self.ahead_s,
        )

    def decide(self, seconds: float = 1.0, **fields: Any) -> None:
        self.log.add(decision(self.now_s, **fields))
        self.now_s += seconds

    def kept(self, pool: str = "chat") -> list[DecisionRecord]:
        self.log.flush()
        found = self.writer.store.transact(
            lambda connection: read_between(connection, pool, 0.0, 2 * WALL_S, 100_000)
        )
        return sorted(found, key=lambda one: one.at_s)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path / "history.sqlite3")


def test_one_a_minute_and_each_change(rig: Rig) -> None:
    for second in range(300):
        rig.decide(detail=f"{second} tokens")  # other figures are no change
    assert len(rig.kept()) == 5
    rig.decide(desired=4)
    rig.decide(desired=4, supply=4)
    rig.decide(desired=4, supply=4, ready=3)
    rig.decide(desired=4, supply=4, ready=3, reason=ScaleReason.STEADY)
    rig.decide(desired=4, supply=4, ready=3, reason=ScaleReason.STEADY, signal=Signal.BACKLOG)
    found = rig.kept()
    assert len(found) == 9
    assert sum(one.count + one.before for one in found) == 304  # the last is counted with the next
    assert [one.before for one in found[-3:]] == [0, 0, 0]


def test_changes_are_bounded_and_counted(rig: Rig) -> None:
    for second in range(600):
        rig.decide(desired=second % 7)
    found = rig.kept()
    assert len(found) <= 10 * (MOST_CHANGES + 1) + 1
    assert sum(one.count + one.before for one in found) > 600 - 60


def test_what_says_the_same_for_long_is_a_row_an_hour(rig: Rig) -> None:
    at_zero = {"desired": 0, "supply": 0, "reason": ScaleReason.AT_ZERO, "rate": 0.0}
    for _ in range(3 * 360):
        rig.decide(10.0, **at_zero)
    found = rig.kept()
    assert len(found) in {3, 4}
    assert found[0].until_s - found[0].at_s == pytest.approx(3_600, abs=120)
    assert all(later.at_s >= one.until_s for one, later in pairwise(found))


def test_what_came_of_forecasts_is_added_once(rig: Rig) -> None:
    one = ForecastTally(scored=1, covered=1, loss=2.0, last_value_loss=3.0)
    rig.decide()
    for minute in range(1, 6):
        rig.tally = replace(one, scored=minute, covered=minute, loss=2.0 * minute)
        for _ in range(60):
            rig.decide()
    assert sum(one.tally.scored for one in rig.kept()) == 5
    assert sum(one.tally.loss for one in rig.kept()) == 10.0


@pytest.mark.parametrize("jump_s", [-86_400.0, -30.0, -0.5, 30.0, 86_400.0, 1e9])
def test_a_wall_clock_that_jumps_loses_and_doubles_nothing(rig: Rig, jump_s: float) -> None:
    for second in range(600):
        rig.ahead_s = jump_s if (second // 100) % 2 else 0.0
        rig.decide(desired=second // 300, detail=str(second))
    found = rig.kept()
    assert len(found) in {10, 11}
    assert sum(one.count + one.before for one in found) > 600 - 60


def test_decisions_of_one_moment_are_told_apart(rig: Rig) -> None:
    for number in range(4):
        rig.decide(0.0, desired=number)
    found = rig.kept()
    assert [one.figures.desired for one in found] == [0, 1, 2, 3]


def test_while_nothing_can_be_written_the_newest_wait(rig: Rig) -> None:
    rig.writer.error = "the disk is full"
    for second in range(180):
        rig.decide(desired=second // 60)
    assert rig.writer.writes == 0
    assert [one.figures.desired for one in rig.log.waiting("chat")][-1] == 2
    rig.writer.error = None
    assert [one.figures.desired for one in rig.kept()][-1] == 2
    assert rig.writer.writes == 1


def test_those_that_wait_are_of_the_pool_asked_for(rig: Rig) -> None:
    rig.decide(pool="a")
    rig.decide(pool="b")
    assert [one.pool for one in rig.log.waiting("b")] == ["b"]
    rig.log.flush()
    assert [one.pool for one in rig.log.waiting("b")] == ["b"]  # it may be under way


def test_a_write_a_minute_for_all_pools(rig: Rig) -> None:
    for _ in range(600):
        for pool in "abcdefgh":
            rig.decide(0.0, pool=pool, detail=str(rig.now_s))
        rig.now_s += 1.0
    assert rig.writer.writes in {9, 10}


def test_static_and_closing_pools_have_decisions_without_inputs(rig: Rig) -> None:
    rig.decide(inputs=None, capacity=None, reason=ScaleReason.STATIC)
    (found,) = rig.kept()
    assert (found.figures.ready, found.figures.alone) == (None, None)
