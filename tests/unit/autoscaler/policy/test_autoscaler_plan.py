"""Which replica is started, woken, called back or stopped; and which GPUs and cores it is given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.device_assignment import GpuUse, assign_cpus, assign_gpus
from autoscaler.policy.lifecycle import Event, State
from autoscaler.policy.plan import LOADING, SUPPLY, ReplicaStatus, ScalePlan, make_plan
from autoscaler.types import GpuCapacity


def some(*states: State, recallable: bool = True) -> list[ReplicaStatus]:
    """Replicas named a, b, c... in these states, oldest first."""
    return [
        ReplicaStatus(id=chr(97 + number), state=state, recallable=recallable)
        for number, state in enumerate(states)
    ]


S = State
CASES = [
    ("nothing to do", 1, some(S.READY), ScalePlan()),
    ("from zero", 2, [], ScalePlan(starts=2)),
    ("pending ones count", 3, some(S.SCHEDULED, S.STARTING, S.WAKING), ScalePlan()),
    ("stopping ones do not", 1, some(S.STOPPING, S.FAILED), ScalePlan(starts=1)),
    (
        "call back before waking before starting",
        3,
        some(S.DRAINING, S.SLEEPING, S.DRAINING_TO_SLEEP),
        ScalePlan(events=(("c", Event.KEEP), ("a", Event.KEEP), ("b", Event.WAKE))),
    ),
    ("then start", 2, some(S.SLEEPING), ScalePlan(events=(("a", Event.WAKE),), starts=1)),
    (
        "an operator's drain is not called back",
        1,
        some(S.DRAINING, recallable=False),
        ScalePlan(starts=1),
    ),
    ("one that is falling asleep will be woken", 1, some(S.FALLING_ASLEEP), ScalePlan()),
    (
        "waiting ones go first",
        1,
        some(S.READY, S.SCHEDULED, S.SCHEDULED),
        ScalePlan(events=(("c", Event.STOP), ("b", Event.STOP))),
    ),
    (
        "unhealthy before ready",
        1,
        some(S.UNHEALTHY, S.READY),
        ScalePlan(events=(("a", Event.STOP),)),
    ),
    (
        "loading ones before ready ones",
        1,
        some(S.READY, S.STARTING, S.WAKING),
        ScalePlan(events=(("c", Event.STOP), ("b", Event.STOP))),
    ),
    (
        "loading ones stay while none is ready, and none goes instead",
        1,
        some(S.UNHEALTHY, S.STARTING),
        ScalePlan(),
    ),
    ("to zero", 0, some(S.READY, S.SLEEPING), ScalePlan(events=(("a", Event.STOP),))),
]


@pytest.mark.parametrize(
    ("desired", "replicas", "plan"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_plan(desired: int, replicas: list[ReplicaStatus], plan: ScalePlan) -> None:
    assert make_plan(desired, replicas) == plan


RESTS = [
    ("one that is idle sleeps", 0, some(S.READY), ScalePlan(events=(("a", Event.SLEEP),))),
    (
        "of several, one",
        0,
        some(S.READY, S.READY, S.UNHEALTHY),
        ScalePlan(events=(("c", Event.STOP), ("b", Event.STOP), ("a", Event.SLEEP))),
    ),
    ("what is ill does not", 0, some(S.UNHEALTHY), ScalePlan(events=(("a", Event.STOP),))),
    ("only at zero", 1, some(S.READY, S.READY), ScalePlan(events=(("b", Event.STOP),))),
    ("what sleeps goes on", 0, some(S.SLEEPING), ScalePlan()),
]


@pytest.mark.parametrize(
    ("desired", "replicas", "plan"), [pytest.param(*case[1:], id=case[0]) for case in RESTS]
)
def test_to_zero_by_way_of_sleep(
    desired: int, replicas: list[ReplicaStatus], plan: ScalePlan
) -> None:
    assert make_plan(desired, replicas, may_sleep=True) == plan


def old(*states: State, busy: int | None = None) -> list[ReplicaStatus]:
    """Outdated replicas named z, y, x..., oldest first."""
    return [
        ReplicaStatus(id=chr(122 - number), state=state, outdated=True, inflight_requests=busy)
        for number, state in enumerate(states)
    ]


NO_CAPACITY = [ReplicaStatus(id="a", state=S.SCHEDULED, no_capacity=True)]

REPLACEMENTS = [
    ("a new one is started beside it", 1, 1, old(S.READY), ScalePlan(starts=1)),
    ("the old one stays while it loads", 1, 1, old(S.READY) + some(S.STARTING), ScalePlan()),
    (
        "and goes when it is ready",
        1,
        1,
        old(S.READY) + some(S.READY),
        ScalePlan(events=(("z", Event.STOP),)),
    ),
    ("not while the new one is unhealthy", 1, 1, old(S.READY) + some(S.UNHEALTHY), ScalePlan()),
    ("one more than the most at a time", 3, 3, old(S.READY, S.READY, S.READY), ScalePlan(starts=1)),
    ("as many as there is room for", 2, 8, old(S.READY, S.READY), ScalePlan(starts=2)),
    (
        "the next when the one before has ended",
        2,
        2,
        old(S.DRAINING, S.READY) + some(S.READY),
        ScalePlan(),
    ),
    ("which has ended", 2, 2, old(S.STOPPED, S.READY) + some(S.READY), ScalePlan(starts=1)),
    (
        "what does not serve goes at once",
        1,
        2,
        old(S.SCHEDULED, S.PREPARING, S.UNHEALTHY, S.DRAINING_TO_SLEEP, S.FALLING_ASLEEP),
        ScalePlan(events=tuple((name, Event.STOP) for name in "zyxwv")),
    ),
    ("one that starts is waited for", 1, 1, old(S.STARTING), ScalePlan(starts=1)),
    (
        "what sleeps is not woken",
        1,
        1,
        old(S.SLEEPING),
        ScalePlan(events=(("z", Event.STOP),), starts=1),
    ),
    (
        "at zero all go",
        0,
        2,
        old(S.READY, S.SLEEPING),
        ScalePlan(events=(("y", Event.STOP), ("z", Event.STOP))),
    ),
    (
        "without room one goes first",
        2,
        2,
        old(S.READY, S.READY) + NO_CAPACITY,
        ScalePlan(events=(("y", Event.STOP),), starts=0),
    ),
    ("and no other until it is gone", 2, 2, old(S.READY, S.STOPPING) + NO_CAPACITY, ScalePlan()),
    (
        "nor until its successor is ready",
        2,
        2,
        old(S.READY) + some(S.STARTING) + NO_CAPACITY,
        ScalePlan(),
    ),
]


@pytest.mark.parametrize(
    ("desired", "most", "replicas", "plan"),
    [pytest.param(*case[1:], id=case[0]) for case in REPLACEMENTS],
)
def test_outdated_replicas_are_replaced(
    desired: int, most: int, replicas: list[ReplicaStatus], plan: ScalePlan
) -> None:
    assert make_plan(desired, replicas, max_replicas=most) == plan


def test_what_is_being_prepared_is_loading_and_an_operator_may_end_it() -> None:
    coming = some(S.PREPARING)
    assert make_plan(1, coming) == ScalePlan()
    assert make_plan(0, coming) == ScalePlan()
    ended = ScalePlan(events=(("a", Event.STOP),))
    assert make_plan(0, coming, may_stop_loading=True) == ended


def test_least_busy_goes_first_and_unknown_counts_as_busiest() -> None:
    loads = {"a": 3, "b": None, "c": 0, "d": 9}
    replicas = [
        ReplicaStatus(id=name, state=State.READY, inflight_requests=load)
        for name, load in loads.items()
    ]
    order = [name for name, _ in make_plan(0, replicas).events]
    assert order == ["c", "a", "d", "b"]


def test_an_operator_may_stop_one_that_loads_and_ones_that_sleep() -> None:
    replicas = some(S.READY, S.STARTING, S.SLEEPING)
    assert make_plan(1, replicas, may_stop_loading=True).events == (("b", Event.STOP),)
    plan = make_plan(0, replicas, may_stop_loading=True, may_stop_sleeping=True)
    assert [name for name, _ in plan.events] == ["b", "a", "c"]


@given(
    st.integers(0, 8),
    st.lists(
        st.builds(
            ReplicaStatus,
            id=st.uuids().map(str),
            state=st.sampled_from(State),
            recallable=st.booleans(),
            inflight_requests=st.none() | st.integers(0, 9),
        ),
        max_size=10,
        unique_by=lambda one: one.id,
    ),
    st.booleans(),
)
def test_any_plan_leads_to_the_number_or_stays_above_it(
    desired: int, replicas: list[ReplicaStatus], may_stop_loading: bool
) -> None:
    plan = make_plan(desired, replicas, may_stop_loading=may_stop_loading)
    states = {one.id: one.state for one in replicas}
    may_stop_loading |= any(state is State.READY for state in states.values())
    assert len({name for name, _ in plan.events}) == len(plan.events)
    supply = sum(state in SUPPLY for state in states.values())
    for name, event in plan.events:
        supply += -1 if event is Event.STOP else 1
        assert states[name] not in LOADING or may_stop_loading
    supply += plan.starts
    falling = sum(state is State.FALLING_ASLEEP for state in states.values())
    assert desired - falling <= supply or supply >= desired
    loading = any(state in LOADING for state in states.values())
    if not loading or may_stop_loading:
        assert supply <= max(desired, 0)


GIB = 1 << 30
FOUR = [GpuCapacity(index=index, memory_bytes=80 * GIB) for index in range(4)]


@pytest.mark.parametrize(
    ("count", "memory", "allowed", "inventory", "uses", "given_"),
    [
        pytest.param(0, None, (), FOUR, [], (), id="none asked"),
        pytest.param(1, None, (), FOUR, [], (0,), id="the lowest"),
        pytest.param(2, None, (), FOUR, [GpuUse(index=0)], (1, 2), id="the free ones"),
        pytest.param(2, None, (3, 1), FOUR, [], (1, 3), id="of those allowed"),
        pytest.param(2, None, (3,), FOUR, [], None, id="too few allowed"),
        pytest.param(1, None, (7,), FOUR, [], None, id="one that is not there"),
        pytest.param(1, None, (), [], [], None, id="no GPU at all"),
        pytest.param(1, None, (), None, [], None, id="unknown, none named"),
        pytest.param(1, None, (5,), None, [], (5,), id="unknown, one named"),
        pytest.param(1, GIB, (5,), None, [GpuUse(index=5, memory_bytes=1)], None, id="not shared"),
        pytest.param(
            1, 30 * GIB, (), FOUR, [GpuUse(index=2, memory_bytes=40 * GIB)], (2,), id="packed"
        ),
        pytest.param(
            1,
            50 * GIB,
            (),
            FOUR,
            [GpuUse(index=0, memory_bytes=40 * GIB)],
            (1,),
            id="no room there",
        ),
        pytest.param(1, 1, (0,), FOUR, [GpuUse(index=0)], None, id="taken whole"),
        pytest.param(
            1, None, (0,), FOUR, [GpuUse(index=0, memory_bytes=1)], None, id="not whole any more"
        ),
        pytest.param(1, 81 * GIB, (), FOUR, [], None, id="larger than any"),
    ],
)
def test_gpus(
    count: int,
    memory: int | None,
    allowed: tuple[int, ...],
    inventory: list[GpuCapacity] | None,
    uses: list[GpuUse],
    given_: tuple[int, ...] | None,
) -> None:
    got = assign_gpus(
        count=count, memory_bytes=memory, allowed=allowed, inventory=inventory, uses=uses
    )
    assert got == given_


@given(st.lists(st.tuples(st.integers(1, 3), st.none() | st.integers(1, 90)), max_size=12))
def test_no_gpu_is_given_more_than_it_has(asked: list[tuple[int, int | None]]) -> None:
    uses: list[GpuUse] = []
    for count, memory in asked:
        size = None if memory is None else memory * GIB
        got = assign_gpus(count=count, memory_bytes=size, allowed=(), inventory=FOUR, uses=uses)
        uses += [GpuUse(index=index, memory_bytes=size) for index in got or ()]
    for gpu in FOUR:
        here = [use.memory_bytes for use in uses if use.index == gpu.index]
        if None in here:
            assert len(here) == 1
        else:
            assert sum(size or 0 for size in here) <= 80 * GIB


@pytest.mark.parametrize(
    ("count", "available", "taken", "given_"),
    [
        (None, [0, 1], [], ()),
        (2, [0, 1, 2, 3], [], (0, 1)),
        (2, [0, 1, 2, 3], [0, 1], (2, 3)),
        (2, [0, 1, 2, 3], [0, 1, 2], (0, 3)),
        (9, [4, 5], [], (4, 5)),
    ],
)
def test_cpus(
    count: int | None, available: list[int], taken: list[int], given_: tuple[int, ...]
) -> None:
    assert assign_cpus(count=count, available=available, taken=taken) == given_
