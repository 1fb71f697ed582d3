"""Which replicas are loaded where there is no room for all, and which make room for which."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from autoscaler.policy.packing import (
    WHOLE,
    Device,
    Eviction,
    Need,
    PackPlan,
    PackState,
    Phase,
    PoolOnDevices,
    Resident,
    pack,
)

MIN_LOADED_S, TURN_S, NOW_S = 5.0, 60.0, 1_000.0
GPU = Device(name="gpu0", memory_bytes=80)
TWO = (GPU, Device(name="gpu1", memory_bytes=80))


def on(
    name: str,
    *residents: Resident,
    wants: int = 1,
    memory_bytes: int | None = 60,
    devices: tuple[str, ...] = ("gpu0", "gpu1"),
    count: int = 1,
    asleep_bytes: int | None = None,
    kept: int = 0,
    worth: float = 1.0,
    pressing: bool | None = None,
) -> PoolOnDevices:
    need = Need(devices=devices, count=count, memory_bytes=memory_bytes, asleep_bytes=asleep_bytes)
    return PoolOnDevices(
        name=name,
        desired=wants,
        pressing=not residents if pressing is None else pressing,
        need=need,
        residents=residents,
        kept=kept,
        worth=worth,
    )


def there(
    name: str,
    *,
    device: str = "gpu0",
    phase: Phase = Phase.LOADED,
    for_s: float = 100.0,
    busy: bool = False,
    to_sleep: bool = False,
    recallable: bool = False,
) -> Resident:
    return Resident(
        id=name,
        devices=(device,),
        phase=phase,
        since_s=NOW_S - for_s,
        busy=busy,
        to_sleep=to_sleep,
        recallable=recallable,
    )


def plan(
    *pools: PoolOnDevices,
    devices: tuple[Device, ...] = (GPU,),
    waiting: dict[str, float] | None = None,
) -> PackPlan:
    state = PackState(waiting=waiting or {})
    return pack(devices, pools, state, NOW_S, min_loaded_s=MIN_LOADED_S, turn_s=TURN_S)[0]


ASLEEP, LEAVING, LOADING = Phase.ASLEEP, Phase.LEAVING, Phase.LOADING
CASES = [
    ("what fits is loaded", [on("a")], (GPU,), {"a": ["gpu0"]}, {}, {}),
    (
        "two that fit together share",
        [on("a", there("a1"), memory_bytes=40), on("b", memory_bytes=40)],
        (GPU,),
        {"b": ["gpu0"]},
        {},
        {},
    ),
    (
        "an idle one makes room",
        [on("a", there("a1")), on("b")],
        (GPU,),
        {},
        {"a1": Eviction.STOP},
        {"a": 0, "b": 0},
    ),
    (
        "it sleeps where it can",
        [on("a", there("a1"), asleep_bytes=4), on("b")],
        (GPU,),
        {},
        {"a1": Eviction.SLEEP},
        {"a": 0, "b": 0},
    ),
    (
        "and ends where what it keeps asleep is too much",
        [on("a", there("a1"), asleep_bytes=30), on("b")],
        (GPU,),
        {},
        {"a1": Eviction.STOP},
        {"a": 0, "b": 0},
    ),
    (
        "one that was just loaded stays",
        [on("a", there("a1", for_s=2.0)), on("b")],
        (GPU,),
        {},
        {},
        {"b": 0},
    ),
    (
        "a busy one stays for its turn",
        [on("a", there("a1", for_s=50.0, busy=True)), on("b")],
        (GPU,),
        {},
        {},
        {"b": 0},
    ),
    (
        "then it goes",
        [on("a", there("a1", for_s=60.0, busy=True)), on("b")],
        (GPU,),
        {},
        {"a1": Eviction.STOP},
        {"a": 0, "b": 0},
    ),
    (
        "the idle one before the busy",
        [
            on("a", there("a1", busy=True), worth=0.1),
            on("c", there("c1", device="gpu1"), worth=9.0),
            on("b"),
        ],
        TWO,
        {},
        {"c1": Eviction.STOP},
        {"c": 0, "b": 0},
    ),
    (
        "the one of least worth",
        [on("a", there("a1"), worth=3.0), on("c", there("c1", device="gpu1")), on("b")],
        TWO,
        {},
        {"c1": Eviction.STOP},
        {"c": 0, "b": 0},
    ),
    (
        "a model with much work keeps its GPU",
        [
            on("head", there("h1", busy=True, for_s=900.0), worth=9.0),
            on("c", there("c1", device="gpu1", busy=True, for_s=70.0)),
            on("b"),
        ],
        TWO,
        {},
        {"c1": Eviction.STOP},
        {"c": 0, "b": 0},
    ),
    (
        "no more goes than has to",
        [
            on("a", there("a1"), memory_bytes=10, worth=0.1),
            on("c", there("c1"), memory_bytes=50, worth=5.0),
            on("b", memory_bytes=70),
        ],
        (GPU,),
        {},
        {"c1": Eviction.STOP},
        {"c": 0, "b": 0},
    ),
    ("what is kept stays", [on("a", there("a1"), kept=1), on("b")], (GPU,), {}, {}, {"b": 0}),
    (
        "one ahead of its requests takes nothing",
        [on("a", there("a1")), on("b", pressing=False)],
        (GPU,),
        {},
        {},
        {"b": 0},
    ),
    (
        "nor does a second replica",
        [on("a", there("a1")), on("b", there("b1", device="gpu1"), wants=2)],
        TWO,
        {},
        {},
        {"b": 1},
    ),
    (
        "what leaves is waited for",
        [on("a", there("a1", phase=LEAVING), wants=0), on("b")],
        (GPU,),
        {},
        {},
        {"b": 0},
    ),
    (
        "one that sleeps is woken where it is",
        [on("a", there("a1", phase=ASLEEP, device="gpu1"), asleep_bytes=4, pressing=True)],
        TWO,
        {},
        {},
        {},
    ),
    (
        "others make room there",
        [
            on("a", there("a1", phase=ASLEEP), asleep_bytes=4, pressing=True),
            on("b", there("b1")),
        ],
        TWO,
        {"b": ["gpu1"]},
        {"b1": Eviction.STOP},
        {"a": 0, "b": 1},
    ),
    (
        "a sleeper ends for what does not fit beside it",
        [on("a", there("a1", phase=ASLEEP), asleep_bytes=30, wants=0), on("b")],
        (GPU,),
        {},
        {"a1": Eviction.STOP},
        {"b": 0},
    ),
    (
        "one that drains is called back where no other takes its place",
        [on("a", there("a1", phase=LEAVING, recallable=True), pressing=True)],
        (GPU,),
        {},
        {},
        {},
    ),
    (
        "of unknown memory one has the device alone",
        [on("a", there("a1"), memory_bytes=WHOLE, worth=2.0), on("b", memory_bytes=10)],
        (GPU,),
        {},
        {"a1": Eviction.STOP},
        {"a": 0, "b": 0},
    ),
    (
        "two GPUs at once, or none",
        [on("a", there("a1", for_s=1.0)), on("b", count=2)],
        TWO,
        {},
        {},
        {"b": 0},
    ),
    ("larger than the device", [on("a", memory_bytes=90)], (GPU,), {}, {}, {"a": 0}),
    (
        "holds up no other",
        [on("a", memory_bytes=90), on("b")],
        (GPU,),
        {"b": ["gpu0"]},
        {},
        {"a": 0},
    ),
]


@pytest.mark.parametrize(
    ("pools", "devices", "starts", "evict", "limits"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_the_plan(
    pools: list[PoolOnDevices],
    devices: tuple[Device, ...],
    starts: dict[str, list[str]],
    evict: dict[str, Eviction],
    limits: dict[str, int],
) -> None:
    made = plan(*pools, devices=devices)
    assert {name: [one for (one,) in found] for name, found in made.starts.items()} == starts
    assert (made.evict, made.limits) == (evict, limits)


def test_the_first_to_wait_is_the_first_to_get_it() -> None:
    pools = [on("a", there("a1")), on("b"), on("c")]
    made = plan(*pools, waiting={"c": 900.0, "b": 950.0})
    assert made.waits["c"].startswith("a1")
    freed = [on("a", wants=0), on("b"), on("c")]
    assert set(plan(*freed, waiting={"c": 900.0, "b": 950.0}).starts) == {"c"}


def test_what_the_first_waits_for_is_given_to_no_other() -> None:
    small = on("small", memory_bytes=10)
    pools = [on("a", there("a1", busy=True, for_s=1.0)), on("large", memory_bytes=75), small]
    made = plan(*pools, waiting={"large": 900.0})
    assert made.starts == {}
    assert set(made.waits) == {"large", "small"}


# -- over time -----------------------------------------------------------------------------

LOAD_S, WAKE_S, STOP_S, IDLE_S, LONGEST_S = 4, 1, 1, 6, 5
SHORT_MIN_S, SHORT_TURN_S = 3.0, 8.0


@dataclass
class SimReplica:
    id: str
    pool: str
    devices: tuple[str, ...]
    phase: Phase
    since_s: int
    due_s: int = 0
    to_sleep: bool = False
    slept: bool = False
    requests: list[int] = field(default_factory=list)
    """When each of its requests ends."""


class SwappingMachine(RuleBasedStateMachine):
    """Pools that come and go on devices too small for all. A second is a step; requests are held
    until a replica of their pool is loaded."""

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        sizes = data.draw(st.lists(st.sampled_from([10, 16, None]), min_size=1, max_size=3))
        self.devices = tuple(
            Device(name=f"gpu{place}", memory_bytes=size) for place, size in enumerate(sizes)
        )
        names = tuple(one.name for one in self.devices)
        needs = st.builds(
            Need,
            devices=st.just(names),
            count=st.integers(1, len(names)),
            memory_bytes=st.sampled_from([3, 6, 10, WHOLE]),
            asleep_bytes=st.sampled_from([None, 1, 2]),
        )
        found = data.draw(st.lists(needs, min_size=2, max_size=5))
        self.needs = {f"p{place}": need for place, need in enumerate(found)}
        self.worth = {
            name: data.draw(st.floats(0.0, 10.0), label=f"worth of {name}") for name in self.needs
        }
        self.held: dict[str, list[tuple[int, int]]] = {name: [] for name in self.needs}
        self.used_at_s = dict.fromkeys(self.needs, -100)
        self.replicas: dict[str, SimReplica] = {}
        self.state = PackState()
        self.now_s = self.made = 0
        self.crowded = data.draw(st.sets(st.sampled_from(sorted(self.needs))), label="never idle")

    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.needs)))
        self.held[name].append((self.now_s, data.draw(st.integers(1, LONGEST_S))))

    @rule(seconds=st.integers(1, 60))
    def pass_time(self, seconds: int) -> None:
        for _ in range(seconds):
            for name in self.crowded:
                self.held[name].append((self.now_s, LONGEST_S))
            self.step()
            self.nothing_is_taken_twice()
            self.no_request_waits_longer_than_all_others_turns()

    def of(self, pool: str) -> list[SimReplica]:
        return [one for one in self.replicas.values() if one.pool == pool]

    def look(self, name: str) -> PoolOnDevices:
        busy = bool(self.held[name]) or any(one.requests for one in self.of(name))
        return PoolOnDevices(
            name=name,
            desired=int(busy or self.now_s - self.used_at_s[name] < IDLE_S),
            pressing=bool(self.held[name]),
            need=self.needs[name],
            worth=self.worth[name],
            residents=tuple(
                Resident(
                    id=one.id,
                    devices=one.devices,
                    phase=one.phase,
                    since_s=one.since_s,
                    busy=bool(one.requests or self.held[name]),
                    to_sleep=one.to_sleep,
                    recallable=one.phase is Phase.LEAVING and not one.due_s,
                )
                for one in self.of(name)
            ),
        )

    def step(self) -> None:
        self.now_s += 1
        for one in list(self.replicas.values()):
            self.advance(one)
        pools = [self.look(name) for name in self.needs]
        plan, self.state = pack(
            self.devices,
            pools,
            self.state,
            self.now_s,
            min_loaded_s=SHORT_MIN_S,
            turn_s=SHORT_TURN_S,
        )
        for pool in pools:
            self.apply(pool, plan)
        for name, held in self.held.items():
            for one in self.of(name):
                if one.phase is Phase.LOADED and held:
                    one.requests += [self.now_s + seconds for _, seconds in held]
                    self.used_at_s[name] = self.now_s
                    held.clear()

    def advance(self, one: SimReplica) -> None:
        one.requests = [end_s for end_s in one.requests if end_s > self.now_s]
        if one.phase is Phase.LOADING and self.now_s >= one.due_s:
            self.turn(one, Phase.LOADED)
        elif one.phase is Phase.LEAVING and not one.requests:
            if not one.due_s:
                one.due_s = self.now_s + STOP_S
            elif self.now_s >= one.due_s:
                if one.to_sleep:
                    self.turn(one, Phase.ASLEEP)
                else:
                    del self.replicas[one.id]

    def turn(self, one: SimReplica, phase: Phase, due_s: int = 0) -> None:
        one.phase, one.since_s, one.due_s, one.to_sleep = phase, self.now_s, due_s, False

    def apply(self, pool: PoolOnDevices, plan: PackPlan) -> None:
        for one in self.of(pool.name):
            if one.id in plan.evict:
                self.check_eviction(one)
                if one.phase is Phase.ASLEEP:
                    self.turn(one, Phase.LEAVING, self.now_s + STOP_S)
                    one.slept = True
                else:
                    self.turn(one, Phase.LEAVING)
                    one.to_sleep = plan.evict[one.id] is Eviction.SLEEP
        loaded = [one for one in self.of(pool.name) if one.phase in {Phase.LOADED, LOADING}]
        missing = min(pool.desired, plan.limits.get(pool.name, pool.desired)) - len(loaded)
        if missing < 0:
            for one in loaded[missing:]:
                if one.phase is Phase.LOADED and one.id not in plan.evict:
                    self.turn(one, Phase.LEAVING)
                    one.to_sleep = pool.need.asleep_bytes is not None
        starts = list(plan.starts.get(pool.name, ()))
        for _ in range(missing):
            self.start(pool.name, starts)

    def start(self, name: str, starts: list[tuple[str, ...]]) -> None:
        for one in self.of(name):
            if one.phase is Phase.LEAVING and not one.due_s:
                return self.turn(one, Phase.LOADED)
        for one in self.of(name):
            if one.phase is Phase.ASLEEP:
                return self.turn(one, Phase.LOADING, self.now_s + WAKE_S)
        self.made += 1
        devices = starts.pop(0)
        self.replicas[f"r{self.made}"] = SimReplica(
            id=f"r{self.made}",
            pool=name,
            devices=devices,
            phase=Phase.LOADING,
            since_s=self.now_s,
            due_s=self.now_s + LOAD_S,
        )
        return None

    def check_eviction(self, one: SimReplica) -> None:
        assert one.phase in {Phase.LOADED, Phase.ASLEEP}
        if one.phase is Phase.LOADED:
            least_s = SHORT_TURN_S if one.requests else SHORT_MIN_S
            assert self.now_s - one.since_s >= least_s

    @invariant()
    def nothing_is_taken_twice(self) -> None:
        if not hasattr(self, "devices"):
            return
        for device in self.devices:
            here = [one for one in self.replicas.values() if device.name in one.devices]
            taken = [
                (self.needs[one.pool].asleep_bytes or 0)
                if one.phase is Phase.ASLEEP or one.slept
                else self.needs[one.pool].memory_bytes
                for one in here
            ]
            sizes = [one for one in taken if one != 0]
            if WHOLE in sizes or device.memory_bytes is None:
                assert len(sizes) <= 1, here
            else:
                assert sum(size or 0 for size in sizes) <= device.memory_bytes, here

    @invariant()
    def no_request_waits_longer_than_all_others_turns(self) -> None:
        if not hasattr(self, "devices"):
            return
        turn_s = SHORT_TURN_S + LONGEST_S + LOAD_S + 2 * STOP_S + 3
        bound_s = len(self.needs) * len(self.devices) * turn_s
        for name, held in self.held.items():
            if held and self.could_fit(self.needs[name]):
                assert self.now_s - held[0][0] <= bound_s, name

    def could_fit(self, need: Need) -> bool:
        fitting = Counter(
            need.memory_bytes is WHOLE
            or one.memory_bytes is None
            or need.memory_bytes <= one.memory_bytes
            for one in self.devices
        )
        return fitting[True] >= need.count


TestSwapping = SwappingMachine.TestCase
TestSwapping.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
