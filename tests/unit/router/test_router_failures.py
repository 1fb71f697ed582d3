"""Failure rates, ejections and the retry budget: as tables, and against what must always hold."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from router.endpoint import Endpoint
from router.failures import (
    PRESSURE_S,
    RetryBudget,
    add_answer,
    add_fault,
    add_pressure,
    is_fault,
    is_pressure,
    most_ejected,
    without_ejected,
)
from router.types import Replica, ReplicaState

READY = ReplicaState.READY
BASE_S, MAX_S = 5.0, 300.0


def replica(slot: int, state: ReplicaState = READY) -> Replica:
    return Replica(id=f"r{slot}", pool="m", slot=slot, url="http://x", state=state)


def endpoint(slot: int = 0) -> Endpoint:
    return Endpoint(
        replica(slot), initial_window=8, max_inflight_requests=256, max_inflight_tokens=None
    )


def fail(one: Endpoint, now_s: float = 0.0) -> bool:
    return add_fault(one, now_s, base_s=BASE_S, max_s=MAX_S)


def eject(one: Endpoint, now_s: float = 0.0) -> float:
    """Fail until it is ejected; returns for how long it is."""
    while not fail(one, now_s):
        pass
    return one.ejected_until_s - now_s


@pytest.mark.parametrize(
    ("status", "fault", "pressure"),
    [
        (200, False, False),
        (400, False, False),
        (404, False, False),
        (429, False, True),
        (499, False, False),
        (500, True, False),
        (501, False, False),
        (502, True, False),
        (503, False, True),
        (504, True, False),
        (599, True, False),
    ],
)
def test_which_answers_are_faults_and_which_are_pressure(
    status: int, fault: bool, pressure: bool
) -> None:
    assert (is_fault(status), is_pressure(status)) == (fault, pressure)


@pytest.mark.parametrize(
    ("answers", "ejected"),
    [
        ("fffff", False),
        ("ffffff", True),  # six in a row
        ("." * 100 + "ffffff", True),  # however good it was before
        ("f.......f......." * 50, False),  # an eighth of all
        ("fff.fff.fff.fff.", True),  # most of them
        ("f." * 100, True),  # half of them
        ("", False),
    ],
)
def test_a_replica_that_fails_more_than_it_answers_is_an_outlier(
    answers: str, ejected: bool
) -> None:
    one = endpoint()
    seen = False
    for answer in answers:
        if answer == "f":
            seen = fail(one) or seen
        else:
            add_answer(one)
    assert seen is ejected


def test_each_ejection_in_a_row_lasts_twice_as_long_up_to_the_longest() -> None:
    one, now_s, lasted = endpoint(), 1000.0, []
    for _ in range(40):
        lasted.append(eject(one, now_s))
        now_s = one.ejected_until_s
    assert lasted[:8] == [5, 10, 20, 40, 80, 160, 300, 300]
    assert max(lasted) == 300
    for _ in range(50):
        add_answer(one)
    assert eject(one, now_s) == 5  # it was well since: from the start


def test_a_replica_that_comes_back_is_out_again_with_its_first_fault() -> None:
    one = endpoint()
    eject(one)
    assert fail(one, one.ejected_until_s)


def test_faults_of_what_is_ejected_lengthen_nothing() -> None:
    one = endpoint()
    eject(one)
    for _ in range(100):
        assert not fail(one, 1.0)
    assert one.ejected_until_s == BASE_S


def test_a_replica_that_starts_again_begins_without() -> None:
    one = endpoint()
    eject(one)
    limits = {"initial_window": 8, "max_inflight_requests": 256, "max_inflight_tokens": None}
    one.update(replica(0), **limits)
    assert without_ejected([one, endpoint(1)], 1.0, 0.5)[0].id == "r1"  # its health check is fine
    one.update(replica(0, ReplicaState.STARTING), **limits)
    one.update(replica(0), **limits)
    assert without_ejected([one, endpoint(1)], 1.0, 0.5)[0] is one
    assert (one.failure_rate, one.ejections) == (0.0, 0)


def test_pressure_spares_a_replica_for_a_moment_and_is_no_fault() -> None:
    ready = [endpoint(0), endpoint(1)]
    for _ in range(100):
        add_pressure(ready[0], 10.0)
    assert ready[0].failure_rate == 0.0
    assert without_ejected(ready, 10.0, 0.5) == [ready[1]]
    assert without_ejected(ready, 10.0 + PRESSURE_S, 0.5) == ready


@pytest.mark.parametrize(
    ("replicas", "fraction", "most"),
    [
        (0, 0.5, 0),
        (1, 0.5, 0),
        (1, 1.0, 0),
        (2, 0.5, 1),
        (3, 0.5, 1),
        (4, 0.5, 2),
        (10, 0.1, 1),
        (9, 0.1, 0),
        (5, 1.0, 4),
        (5, 0.0, 0),
    ],
)
def test_never_all_are_ejected(replicas: int, fraction: float, most: int) -> None:
    assert most_ejected(replicas, fraction) == most


def test_of_too_many_the_most_failing_stay_ejected() -> None:
    ready = [endpoint(slot) for slot in range(4)]
    for one in ready:
        eject(one)
    for _ in range(5):
        fail(ready[2], 1.0)
        fail(ready[0], 1.0)
    assert without_ejected(ready, 1.0, 0.5) == [ready[1], ready[3]]
    assert without_ejected(ready[:1], 1.0, 0.5) == ready[:1]


def test_retries_are_a_part_of_the_requests() -> None:
    budget = RetryBudget(0.2)
    assert sum(budget.take() for _ in range(1000)) == 10
    taken = 0
    for _ in range(1000):
        budget.add_request()
        taken += budget.take()
    assert taken == pytest.approx(200, abs=1)
    for _ in range(1000):
        budget.add_request()
    assert sum(budget.take() for _ in range(1000)) == 10  # no more is ever saved up


class Pool(RuleBasedStateMachine):
    """Replicas that answer and fail in any order, while the time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.replicas: list[Endpoint] = [endpoint(0)]
        self.made = 1

    @rule()
    def add(self) -> None:
        if len(self.replicas) < 8:
            self.replicas.append(endpoint(self.made))
            self.made += 1

    @rule(which=st.integers(0, 7))
    def remove(self, which: int) -> None:
        if len(self.replicas) > 1:
            self.replicas.pop(which % len(self.replicas))

    @rule(which=st.integers(0, 7), times=st.integers(1, 12), answer=st.sampled_from("aafffp"))
    def answer(self, which: int, times: int, answer: str) -> None:
        one = self.replicas[which % len(self.replicas)]
        for _ in range(times):
            if answer == "a":
                add_answer(one)
            elif answer == "f":
                fail(one, self.now_s)
            else:
                add_pressure(one, self.now_s)

    @rule(seconds=st.sampled_from([0.1, 1.0, 5.0, 100.0, 1000.0]))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def enough_are_left(self) -> None:
        for fraction in (0.0, 0.3, 0.5, 1.0):
            left = without_ejected(self.replicas, self.now_s, fraction)
            assert len(left) >= len(self.replicas) - most_ejected(len(self.replicas), fraction)
            assert len(left) >= 1
            assert [one for one in self.replicas if one in left] == left  # in their order
            well = [one for one in self.replicas if one.ejected_until_s <= self.now_s]
            assert set(well) <= set(left)

    @invariant()
    def everything_is_bounded(self) -> None:
        for one in self.replicas:
            assert 0.0 <= one.failure_rate <= 1.0
            assert one.ejected_until_s <= self.now_s + MAX_S
            assert one.ejections or one.ejected_until_s <= self.now_s + BASE_S

    @rule()
    def all_come_back(self) -> None:
        assert without_ejected(self.replicas, self.now_s + MAX_S, 0.5) == self.replicas


TestPool = Pool.TestCase
