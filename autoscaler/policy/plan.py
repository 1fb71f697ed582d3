"""From the number a pool shall have to what happens to which replica: a pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.policy.lifecycle import ENDED_STATES, Event, State

SURGE = 1
"""Replicas beyond ``max_replicas`` that a pool may have while outdated ones are replaced."""
LOADING = frozenset({State.PREPARING, State.STARTING, State.WAKING})
SUPPLY = LOADING | {State.SCHEDULED, State.READY, State.UNHEALTHY}
SERVING = frozenset({State.STARTING, State.WAKING, State.READY})
"""States in which an outdated replica is worth waiting for its successor."""
ENDING_STATES = ENDED_STATES | {State.DRAINING, State.STOPPING}


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """A replica as the plan sees it, oldest first in a pool.

    ``recallable``: it drains only because it was not needed, and may go on. ``inflight_requests``
    is ``None`` when unknown, which counts as the busiest. ``outdated``: it was started with other
    arguments than the pool has now, so another is to take its place. ``no_capacity``: its start was
    put off because no GPU is free. ``ordinal``: its place, where only the highest can be ended.
    """

    id: str
    state: State
    recallable: bool = False
    inflight_requests: int | None = None
    outdated: bool = False
    no_capacity: bool = False
    ordinal: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePlan:
    """Events for replicas there are, and how many new ones to schedule."""

    events: tuple[tuple[str, Event], ...] = ()
    starts: int = 0


def make_plan(
    desired: int,
    replicas: Sequence[ReplicaStatus],
    *,
    max_replicas: int | None = None,
    may_stop_loading: bool = False,
    may_stop_sleeping: bool = False,
    may_sleep: bool = False,
) -> ScalePlan:
    """What leads from the replicas there are to the desired number.

    To grow: call back what drains, wake what sleeps, start the rest; the cheapest first. To
    shrink: take what waits for its start, then what loads, the unhealthy, and the least busy. While
    none is ready, one that loads is not taken, unless an operator asked for the number: a request
    may wait for it. With ``may_sleep`` the last one that is ready goes to sleep instead of ending.

    Outdated replicas do not count as what there is: those that serve go one for each other that
    is ready, the rest at once. ``max_replicas`` bounds the starts meanwhile (``None``: nothing
    does).
    """
    outdated = [one for one in replicas if one.outdated]
    replicas = [one for one in replicas if not one.outdated]
    plan = make_current_plan(
        desired,
        replicas,
        may_stop_loading=may_stop_loading,
        may_stop_sleeping=may_stop_sleeping,
        may_sleep=may_sleep,
    )
    return replace_outdated(plan, desired, replicas, outdated, max_replicas) if outdated else plan


def make_current_plan(
    desired: int,
    replicas: Sequence[ReplicaStatus],
    *,
    may_stop_loading: bool,
    may_stop_sleeping: bool,
    may_sleep: bool,
) -> ScalePlan:
    """The plan where no replica is outdated."""
    supply = [one for one in replicas if one.state in SUPPLY]
    missing = desired - len(supply)
    may_stop_loading |= any(one.state is State.READY for one in supply)
    events = shrink(-missing, supply, may_stop_loading) if missing < 0 else []
    if may_sleep and desired == 0:
        events = sleep_last(events, supply)
    if may_stop_sleeping and desired == 0:
        events += [(one.id, Event.STOP) for one in replicas if one.state is State.SLEEPING]
    if missing <= 0:
        return ScalePlan(events=tuple(events))
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
    return ScalePlan(events=tuple(events), starts=max(0, missing))


def replace_outdated(
    plan: ScalePlan,
    desired: int,
    current: Sequence[ReplicaStatus],
    outdated: Sequence[ReplicaStatus],
    max_replicas: int | None,
) -> ScalePlan:
    """The plan with what becomes of the outdated replicas: a new one is ready before one goes.

    Where a new one finds no capacity beside the others, one of them goes first, and the next only
    when its successor is ready.
    """
    serving = [one for one in outdated if one.state in SERVING]
    ready = sum(one.state is State.READY for one in current)
    surplus = max(0, len(serving) - max(0, desired - ready))
    if not surplus and desired > 0 and waits_for_capacity(current, outdated):
        surplus = 1
    events = [
        (one.id, Event.STOP)
        for one in outdated
        if one.state not in SERVING and one.state not in ENDING_STATES
    ]
    events += shrink(surplus, serving, may_stop_loading=True)
    starts = plan.starts
    if max_replicas is not None:
        there = sum(one.state in SUPPLY for one in current)
        there += sum(one.state not in ENDED_STATES for one in outdated)
        starts = min(starts, max(0, max_replicas + SURGE - there))
    return ScalePlan(events=(*plan.events, *events), starts=starts)


def waits_for_capacity(current: Sequence[ReplicaStatus], outdated: Sequence[ReplicaStatus]) -> bool:
    """Whether a new replica finds no capacity, and none is about to become free."""
    busy = any(one.state in LOADING for one in current)
    leaving = any(one.state in ENDING_STATES - ENDED_STATES for one in outdated)
    return any(one.no_capacity for one in current) and not busy and not leaving


def shrink(
    surplus: int, supply: Sequence[ReplicaStatus], may_stop_loading: bool
) -> list[tuple[str, Event]]:
    """Whom to stop, the cheapest loss first; where their backend ends only the last, that."""
    newest = list(reversed(supply))
    if any(one.ordinal is not None for one in supply):
        if not may_stop_loading and any(one.state in LOADING for one in supply):
            return []
        last_first = sorted(newest, key=lambda one: (one.ordinal is not None, -(one.ordinal or 0)))
        return [(one.id, Event.STOP) for one in last_first[:surplus]]
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
    events: list[tuple[str, Event]], supply: Sequence[ReplicaStatus]
) -> list[tuple[str, Event]]:
    """The same, but the last ready one to be stopped is put to sleep: one is enough to wake."""
    ready = {one.id for one in supply if one.state is State.READY}
    last = next(
        (place for place in reversed(range(len(events))) if events[place][0] in ready), None
    )
    if last is None:
        return events
    return [*events[:last], (events[last][0], Event.SLEEP), *events[last + 1 :]]
