"""The lifecycle table: every pair of state and event, and what must hold of any path through it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.lifecycle import (
    ENDED_STATES,
    LATE_RESULTS,
    PROBED_STATES,
    PUBLIC,
    REPEATED,
    TABLE,
    Action,
    Event,
    InvalidTransition,
    State,
    is_ignored,
    step,
)
from router.types import ReplicaState

PAIRS = [(state, event) for state in State for event in Event]

REFUSED = {
    State.SCHEDULED: {"timed_out", "sleep", "keep", "drained", "wake"},
    State.PREPARING: {"due", "found", "sleep", "keep", "drained", "wake"},
    State.STARTING: {"due", "found", "sleep", "keep", "drained", "wake"},
    State.READY: {"due", "found", "timed_out", "drained"},
    State.UNHEALTHY: {"due", "found", "sleep", "keep", "drained", "wake"},
    State.DRAINING: {"due", "found", "timed_out", "sleep", "wake"},
    State.DRAINING_TO_SLEEP: {"due", "found", "timed_out", "wake"},
    State.FALLING_ASLEEP: {"due", "found", "timed_out", "keep", "drained", "wake"},
    State.SLEEPING: {"due", "found", "timed_out", "keep", "drained"},
    State.WAKING: {"due", "found", "timed_out", "sleep", "keep", "drained"},
    State.STOPPING: {"due", "found", "timed_out", "sleep", "keep", "drained", "wake"},
    State.STOPPED: {"due", "found", "timed_out", "sleep", "keep", "drained", "wake"},
    State.FAILED: {"due", "found", "timed_out", "sleep", "keep", "drained", "wake"},
}


def test_every_state_is_in_every_table() -> None:
    assert set(TABLE) == set(State)
    assert set(PUBLIC) == set(State)
    assert set(PUBLIC.values()) == set(ReplicaState)


@pytest.mark.parametrize(("state", "event"), PAIRS)
def test_every_pair_is_defined_ignored_or_refused(state: State, event: Event) -> None:
    kinds = [
        event in TABLE[state],
        is_ignored(state, event),
        event.value in REFUSED[state],
    ]
    assert kinds.count(True) == 1, f"{state} {event}: {kinds}"
    if event.value in REFUSED[state]:
        with pytest.raises(InvalidTransition, match=f"{state} cannot take the event {event}"):
            step(state, event)
    elif is_ignored(state, event):
        assert step(state, event) is None
    else:
        assert step(state, event) == TABLE[state][event]


def test_a_late_result_is_never_refused() -> None:
    for state in State:
        for event in LATE_RESULTS:
            step(state, event)


def test_a_repeated_request_is_in_no_table() -> None:
    for state, events in REPEATED.items():
        assert not events & set(TABLE[state])


def test_trap_10_no_health_check_ends_a_start() -> None:
    assert step(State.STARTING, Event.HEALTH_LOST) is None


def test_trap_11_every_way_from_ready_to_stopping_drains_unless_the_engine_is_gone() -> None:
    for state in (State.READY, State.UNHEALTHY):
        for event, found in TABLE[state].items():
            if found.state in {State.STOPPING, State.STOPPED}:
                raise AssertionError(f"{state} {event} skips the drain")
            if found.state is State.FAILED:
                assert event is Event.EXITED


def test_what_is_prepared_can_be_cancelled_and_is_let_go_of() -> None:
    for event in (Event.STOP, Event.TIMED_OUT, Event.PREPARE_FAILED):
        found = step(State.PREPARING, event)
        assert found is not None
        assert found.state in ENDED_STATES
        assert Action.CANCEL in found.actions
        assert Action.STOP not in found.actions, "nothing runs yet"
    # After a start without room it waits again, still holding what was prepared.
    waits = step(State.SCHEDULED, Event.STOP)
    assert waits is not None
    assert waits.actions == (Action.CANCEL,)


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_any_path_starts_once_and_stops_what_it_started(events: list[Event]) -> None:
    state, started, stopped = State.SCHEDULED, 0, False
    for event in events:
        before = state
        try:
            found = step(state, event)
        except InvalidTransition:
            continue
        if found is None:
            continue
        state = found.state
        if event is Event.NO_CAPACITY:
            started -= 1
        started += Action.START in found.actions
        stopped = stopped or Action.STOP in found.actions
        assert started <= 1
        if Action.STOP in found.actions:
            assert state in {State.STOPPING, State.FAILED}
        if before in ENDED_STATES:
            assert state is before, "nothing comes back from its end"
    if state in {State.STOPPED, State.FAILED, State.STOPPING} and started:
        assert stopped
    if state in PROBED_STATES:
        assert started == 1
        assert not stopped
