"""A replica's life as one table: (state, event) → next state and what to do.

    scheduled ─due─▶ preparing ─prepared─▶ starting ─ready─▶ ready ⇄ unhealthy
                                                              │ ▲
                                                   stop/sleep │ │ keep
                                                              ▼ │
             draining ─drained─▶ stopping ─ended─▶ stopped
    draining to sleep ─drained─▶ falling asleep ─slept─▶ sleeping ─wake─▶ waking ─woken─▶ ready

Every pair of state and event is in the table, is ignored (a late result of something the replica
has left behind), or is an invalid transition. There is no fourth case, and a test says so. The
table does nothing: the actuator, which applies it, performs the actions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from router.types import ReplicaState


class State(StrEnum):
    """Where a replica is in its life."""

    SCHEDULED = "scheduled"
    """Desired, not started: waits for the end of a backoff, or for a free GPU."""
    PREPARING = "preparing"
    """Its model is brought to this node. Nothing runs yet, so it can be cancelled at no cost."""
    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    DRAINING = "draining"
    """Given no more requests; stopped when it has none left."""
    DRAINING_TO_SLEEP = "draining_to_sleep"
    """Given no more requests; put to sleep when it has none left."""
    FALLING_ASLEEP = "falling_asleep"
    SLEEPING = "sleeping"
    WAKING = "waking"
    STOPPING = "stopping"
    STOPPED = "stopped"
    FAILED = "failed"
    """Ended by an error. Its successor is scheduled after a backoff."""


class Event(StrEnum):
    """What happens to a replica."""

    DUE = "due"
    """Its time to start has come."""
    PREPARED = "prepared"
    PREPARE_FAILED = "prepare_failed"
    FOUND = "found"
    """It is externally managed, and has been registered."""
    START_FAILED = "start_failed"
    NO_CAPACITY = "no_capacity"
    """It cannot be started now; no fault of the engine."""
    BECAME_READY = "became_ready"
    HEALTH_LOST = "health_lost"
    EXITED = "exited"
    TIMED_OUT = "timed_out"
    """It has been preparing, starting, or unhealthy, for too long."""
    STOP = "stop"
    SLEEP = "sleep"
    """It shall sleep."""
    KEEP = "keep"
    """It shall go on after all."""
    DRAINED = "drained"
    """It has no request left, or no time left."""
    SLEPT = "slept"
    SLEEP_FAILED = "sleep_failed"
    WAKE = "wake"
    WOKEN = "woken"
    WAKE_FAILED = "wake_failed"
    ENDED = "ended"
    """Its process group is gone."""
    STOP_FAILED = "stop_failed"


class Action(StrEnum):
    """What the actuator does on a transition."""

    PREPARE = "prepare"
    CANCEL = "cancel"
    """End its preparation, if it is under way, and release its model."""
    START = "start"
    STOP = "stop"
    STOP_LATER = "stop_later"
    """Try to stop it again, after a pause."""
    SLEEP = "sleep"
    WAKE = "wake"
    DRAIN = "drain"
    """Begin to watch for the end of its requests."""
    MEASURE = "measure"
    """Its start or wake has succeeded: remember how long it took."""
    COUNT_FAILURE = "count_failure"
    """Its end is a failure of the pool's engine: lengthen the backoff."""


@dataclass(frozen=True, slots=True)
class Step:
    """What an event leads to."""

    state: State
    actions: tuple[Action, ...] = ()


class InvalidTransition(Exception):
    """This may not be asked of a replica in this state."""

    def __init__(self, state: State, event: Event) -> None:
        super().__init__(f"a replica that is {state} cannot take the event {event}")
        self.state = state
        self.event = event


FAIL = Step(State.FAILED, (Action.STOP, Action.COUNT_FAILURE))
GIVE_UP = Step(State.FAILED, (Action.CANCEL, Action.COUNT_FAILURE))
STOP_NOW = Step(State.STOPPING, (Action.STOP,))

TABLE: Mapping[State, Mapping[Event, Step]] = {
    State.SCHEDULED: {
        Event.DUE: Step(State.PREPARING, (Action.PREPARE,)),
        Event.FOUND: Step(State.UNHEALTHY, (Action.START,)),
        Event.STOP: Step(State.STOPPED, (Action.CANCEL,)),
    },
    State.PREPARING: {
        Event.PREPARED: Step(State.STARTING, (Action.START,)),
        Event.PREPARE_FAILED: GIVE_UP,
        Event.TIMED_OUT: GIVE_UP,
        Event.STOP: Step(State.STOPPED, (Action.CANCEL,)),
    },
    State.STARTING: {
        Event.BECAME_READY: Step(State.READY, (Action.MEASURE,)),
        Event.START_FAILED: FAIL,
        Event.NO_CAPACITY: Step(State.SCHEDULED),
        Event.EXITED: FAIL,
        Event.TIMED_OUT: FAIL,
        Event.STOP: STOP_NOW,
    },
    State.READY: {
        Event.HEALTH_LOST: Step(State.UNHEALTHY),
        Event.EXITED: FAIL,
        Event.STOP: Step(State.DRAINING, (Action.DRAIN,)),
        Event.SLEEP: Step(State.DRAINING_TO_SLEEP, (Action.DRAIN,)),
    },
    State.UNHEALTHY: {
        Event.BECAME_READY: Step(State.READY),
        Event.EXITED: FAIL,
        Event.TIMED_OUT: Step(State.DRAINING, (Action.DRAIN, Action.COUNT_FAILURE)),
        Event.STOP: Step(State.DRAINING, (Action.DRAIN,)),
    },
    State.DRAINING: {
        Event.KEEP: Step(State.READY),
        Event.DRAINED: STOP_NOW,
        Event.EXITED: STOP_NOW,
    },
    State.DRAINING_TO_SLEEP: {
        Event.KEEP: Step(State.READY),
        Event.DRAINED: Step(State.FALLING_ASLEEP, (Action.SLEEP,)),
        Event.EXITED: FAIL,
        Event.STOP: Step(State.DRAINING),
    },
    State.FALLING_ASLEEP: {
        Event.SLEPT: Step(State.SLEEPING),
        Event.SLEEP_FAILED: Step(State.READY),
        Event.EXITED: FAIL,
        Event.STOP: STOP_NOW,
    },
    State.SLEEPING: {
        Event.WAKE: Step(State.WAKING, (Action.WAKE,)),
        Event.EXITED: Step(State.STOPPING, (Action.STOP,)),
        Event.STOP: STOP_NOW,
    },
    State.WAKING: {
        Event.WOKEN: Step(State.READY, (Action.MEASURE,)),
        Event.WAKE_FAILED: FAIL,
        Event.EXITED: FAIL,
        Event.STOP: STOP_NOW,
    },
    State.STOPPING: {
        Event.ENDED: Step(State.STOPPED),
        Event.STOP_FAILED: Step(State.STOPPING, (Action.STOP_LATER,)),
    },
    State.STOPPED: {},
    State.FAILED: {
        Event.STOP_FAILED: Step(State.FAILED, (Action.STOP_LATER,)),
    },
}

LATE_RESULTS = frozenset(
    {
        Event.PREPARED,
        Event.PREPARE_FAILED,
        Event.START_FAILED,
        Event.NO_CAPACITY,
        Event.BECAME_READY,
        Event.HEALTH_LOST,
        Event.EXITED,
        Event.SLEPT,
        Event.SLEEP_FAILED,
        Event.WOKEN,
        Event.WAKE_FAILED,
        Event.ENDED,
        Event.STOP_FAILED,
    }
)
"""Events that an earlier call set off, and that can arrive in any state. Where the table has no
place for them they change nothing: a failed health check does not end a start, for one."""

REPEATED: Mapping[State, frozenset[Event]] = {
    State.DRAINING: frozenset({Event.STOP}),
    State.STOPPING: frozenset({Event.STOP}),
    State.STOPPED: frozenset({Event.STOP}),
    State.FAILED: frozenset({Event.STOP}),
    State.DRAINING_TO_SLEEP: frozenset({Event.SLEEP}),
    State.FALLING_ASLEEP: frozenset({Event.SLEEP}),
    State.SLEEPING: frozenset({Event.SLEEP}),
    State.WAKING: frozenset({Event.WAKE}),
    State.READY: frozenset({Event.WAKE, Event.KEEP}),
}
"""Requests that ask for what is so already. They change nothing."""

PUBLIC: Mapping[State, ReplicaState] = {
    State.SCHEDULED: ReplicaState.STARTING,
    State.PREPARING: ReplicaState.STARTING,
    State.STARTING: ReplicaState.STARTING,
    State.READY: ReplicaState.READY,
    State.UNHEALTHY: ReplicaState.UNHEALTHY,
    State.DRAINING: ReplicaState.DRAINING,
    State.DRAINING_TO_SLEEP: ReplicaState.DRAINING,
    State.FALLING_ASLEEP: ReplicaState.SLEEPING,
    State.SLEEPING: ReplicaState.SLEEPING,
    State.WAKING: ReplicaState.WAKING,
    State.STOPPING: ReplicaState.STOPPING,
    State.STOPPED: ReplicaState.STOPPED,
    State.FAILED: ReplicaState.FAILED,
}
"""Each state as the rest of Tidegate sees it."""

ENDED_STATES = frozenset({State.STOPPED, State.FAILED})
PROBED_STATES = frozenset(
    {
        State.STARTING,
        State.READY,
        State.UNHEALTHY,
        State.DRAINING,
        State.DRAINING_TO_SLEEP,
        State.FALLING_ASLEEP,
        State.SLEEPING,
        State.WAKING,
    }
)


def is_ignored(state: State, event: Event) -> bool:
    """Whether the event changes nothing in this state, and may come all the same."""
    if event in TABLE[state]:
        return False
    return event in LATE_RESULTS or event in REPEATED.get(state, frozenset())


def step(state: State, event: Event) -> Step | None:
    """The next state and the actions; ``None`` if the event is ignored. Raises
    ``InvalidTransition``."""
    found = TABLE[state].get(event)
    if found is not None:
        return found
    if is_ignored(state, event):
        return None
    raise InvalidTransition(state, event)
