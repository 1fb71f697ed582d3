"""From the number a pool shall have to what happens to which replica: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.control.lifecycle import Event, State

LOADING = frozenset({State.PREPARING, State.STARTING, State.WAKING})
SUPPLY = LOADING | {State.SCHEDULED, State.READY, State.UNHEALTHY}


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica as the plan sees it, oldest first in a pool.

    ``recallable``: it drains only because it was not needed, and may go on. ``inflight_requests``
    is ``None`` when unknown, which counts as the busiest.
    """

    id: str
    state: State
    recallable: bool = False
    inflight_requests: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Events for replicas there are, and how many new ones to schedule."""

    events: tuple[tuple[str, Event], ...] = ()
    starts: int = 0


def make_plan(
    desired: int,
    replicas: Sequence[Candidate],
    *,
    may_stop_loading: bool = False,
    may_stop_sleeping: bool = False,
    may_sleep: bool = False,
) -> Plan:
    """What leads from the replicas there are to the desired number.

    To grow: call back what drains, wake what sleeps, start the rest; the cheapest first. To
    shrink: take what waits for its start, then the unhealthy, then the least busy. One that loads
    is not taken (and no ready one in its place), unless an operator asked for the number. With
    ``may_sleep`` the last one that is ready goes to sleep instead of ending.
    """
    supply = [one for one in replicas if one.state in SUPPLY]
    missing = desired - len(supply)
    events = shrink(-missing, supply, may_stop_loading) if missing < 0 else []
    if may_sleep and desired == 0:
        events = sleep_last(events, supply)
    if may_stop_sleeping and desired == 0:
        events += [(one.id, Event.STOP) for one in replicas if one.state is State.SLEEPING]
    if missing <= 0:
        return Plan(events=tuple(events))
    back = [
        (one.id, Event.KEEP)
        for one in reversed(replicas)
        if one.recallable and one.state in {State.DRAINING, State.DRAINING_TO_SLEEP}
    ]
    back += [(one.id, Event.WAKE) for one in replicas if one.state is State.SLEEPING]
    events += back[:missing]
    missing -= len(back[:missing])
    # One that is about to sleep is woken as soon as it does, which is sooner than a new start.
    missing -= sum(one.state is State.FALLING_ASLEEP for one in replicas)
    return Plan(events=tuple(events), starts=max(0, missing))


def shrink(
    surplus: int, supply: Sequence[Candidate], may_stop_loading: bool
) -> list[tuple[str, Event]]:
    """Whom to stop, the cheapest loss first."""
    newest = list(reversed(supply))
    order = [one for one in newest if one.state is State.SCHEDULED]
    loading = [one for one in newest if one.state in LOADING]
    if may_stop_loading:
        order += loading
    if may_stop_loading or not loading:
        order += [one for one in newest if one.state is State.UNHEALTHY]
        order += sorted(
            (one for one in newest if one.state is State.READY),
            key=lambda one: (
                float("inf") if one.inflight_requests is None else one.inflight_requests
            ),
        )
    return [(one.id, Event.STOP) for one in order[:surplus]]


def sleep_last(
    events: list[tuple[str, Event]], supply: Sequence[Candidate]
) -> list[tuple[str, Event]]:
    """The same, but the last ready one to be stopped is put to sleep: one is enough to wake."""
    ready = {one.id for one in supply if one.state is State.READY}
    last = next(
        (place for place in reversed(range(len(events))) if events[place][0] in ready), None
    )
    if last is None:
        return events
    return [*events[:last], (events[last][0], Event.SLEEP), *events[last + 1 :]]
