"""Any story, told by hypothesis, and what must hold in each: the real loop, made-up engines.

A failure prints the story, which replays it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import Any

from fake_fleet import FakeBackend, World, process_pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_time import now, run_virtual

from autoscaler.backends.base import BackendError
from autoscaler.settings import AutoscalerSettings
from autoscaler.types import NotKnown
from router.types import Replica, ReplicaState

SUPPLY = {
    ReplicaState.STARTING,
    ReplicaState.WAKING,
    ReplicaState.READY,
    ReplicaState.UNHEALTHY,
}

MAX_REPLICAS = 4
LONGEST_S = 15.0

SETTINGS = AutoscalerSettings(
    idle_to_zero_s=20.0,
    scale_down_delay_s=5.0,
    stable_window_s=10.0,
    panic_window_s=1.0,
    drain_s=2 * LONGEST_S,
    demand_stale_s=3.0,
    backoff_max_s=4.0,
    backoff_reset_s=5.0,
    unhealthy_restart_s=6.0,
    start_timeout_s=60.0,
)

QUIET_STEPS = st.one_of(
    st.tuples(st.just("burst"), st.integers(1, 12), st.floats(0.1, LONGEST_S)),
    st.tuples(st.just("visit"), st.integers(1, 3), st.floats(0.0, 0.1)),
    st.tuples(st.just("wait"), st.floats(0.0, 40.0)),
    st.tuples(st.just("blind"), st.booleans()),
    st.tuples(st.just("observe fails"), st.booleans()),
    st.tuples(st.just("publish fails"), st.booleans()),
    st.tuples(st.just("probe fails"), st.booleans()),
    st.tuples(st.just("start takes"), st.floats(0.0, 50.0)),
)
OPERATOR_STEPS = st.one_of(
    st.tuples(st.just("scale"), st.none() | st.integers(0, MAX_REPLICAS)),
    st.tuples(st.just("sleep"), st.integers(1, 2)),
    st.tuples(st.just("wake")),
    st.tuples(st.just("drain"), st.integers(0, 3)),
)
FAULTS = st.one_of(
    st.tuples(st.just("crash"), st.integers(0, 3)),
    st.tuples(st.just("ill"), st.integers(0, 3), st.booleans()),
    st.tuples(st.just("start fails"), st.booleans()),
    st.tuples(st.just("stop fails"), st.booleans()),
    st.tuples(st.just("dies young"), st.none() | st.floats(0.0, 20.0)),
    st.tuples(st.just("room"), st.integers(0, 3)),
    st.tuples(st.just("sleeps"), st.booleans()),
)


class Watched(FakeBackend):
    """A backend that notes who was stopped while loading, with none that was loaded: one that has
    become superfluous beside others goes before them."""

    def __init__(self) -> None:
        super().__init__(start_s=5.0)
        self.stopped_loading: list[str] = []

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        loaded = {
            name: now() - engine.started_at_s >= engine.start_s
            for name, engine in self.engines.items()
            if engine.alive
        }
        if loaded.get(replica_id) is False and not any(loaded.values()):
            self.stopped_loading.append(replica_id)
        await super().stop(replica_id, grace_s=grace_s)


class Story:
    """A world, and the steps that happen in it."""

    def __init__(self, min_replicas: int) -> None:
        self.backend = Watched()
        pool = process_pool(
            max_replicas=MAX_REPLICAS, min_replicas=min_replicas, target_inflight_tokens=300
        )
        self.world = World([pool], SETTINGS, self.backend)
        self.min_replicas = min_replicas
        self.requests: list[asyncio.Task[None]] = []
        self.visitors = 0
        self.stopped_loading: list[str] = []
        """Those that were stopped before the end, although they were loading and none was up."""
        self.others: list[asyncio.Task[Any]] = []

    async def tell(self, steps: Sequence[tuple[Any, ...]]) -> None:
        for name, *values in steps:
            await self.happen(name, *values)
            await asyncio.sleep(0.3)
            self.check()

    async def happen(self, name: str, *values: Any) -> None:
        world, backend = self.world, self.backend
        engines = list(backend.engines.values())
        match name, *values:
            case "burst", count, seconds:
                self.requests += world.burst(count, seconds)
            case "visit", count, seconds:
                for one in world.burst(count, 1.0):
                    asyncio.get_running_loop().call_later(seconds, one.cancel)
                    self.visitors += 1
            case "wait", seconds:
                for _ in range(int(seconds)):
                    await asyncio.sleep(1.0)
                    self.check()
            case "blind", value:
                world.blind = value
            case "observe fails", value:
                world.observe_error = OSError("no answer") if value else None
            case "publish fails", value:
                world.publish_error = OSError("no ear") if value else None
            case "probe fails", value:
                backend.probe_error = OSError("no eye") if value else None
            case "start takes", seconds:
                backend.start_s = seconds
            case "scale", value:
                world.loop.set_replicas("m", value)
            case "sleep", level:
                self.others.append(asyncio.create_task(self.ask(world.loop.sleep("m", level))))
            case ("wake",):
                await self.ask(world.loop.wake("m"))
            case "drain", index:
                await self.ask(world.loop.drain(f"m-{len(backend.started) - index}"))
            case "crash", index if engines:
                engines[index % len(engines)].alive = False
            case "ill", index, value if engines:
                engines[index % len(engines)].healthy = not value
            case "start fails", value:
                backend.start_error = RuntimeError("no start") if value else None
            case "stop fails", value:
                backend.stop_error = RuntimeError("no stop") if value else None
            case "dies young", value:
                backend.dies_after_s = value
            case "room", value:
                backend.room = value
            case "sleeps", value:
                backend.can_sleep = value

    async def ask(self, work: Any) -> None:
        """What an operator asks may be refused, in the ways that are documented."""
        with contextlib.suppress(BackendError, ValueError, NotKnown):
            await work

    def awake(self) -> list[Replica]:
        """The replicas that do not sleep: those that do were told to, and stay."""
        return [view for view in self.world.views if view.state is not ReplicaState.SLEEPING]

    def check(self) -> None:
        report = self.world.loop.status()
        (pool,) = report.pools
        supply = sum(one.state in SUPPLY for one in pool.replicas)
        assert supply <= MAX_REPLICAS, "more replicas than may be"
        assert len(pool.replicas) <= 4 * MAX_REPLICAS + SETTINGS.failed_kept
        for where in report.errors:
            assert where.split()[0] in {"observe", "publish", "start", "stop", "probe", "sleep",
                                        "wake"}, report.last_error  # fmt: skip

    async def come_to_rest(self) -> None:
        """Mend everything: then every request is answered, and the pool goes to its minimum."""
        world, backend = self.world, self.backend
        world.blind = False
        world.observe_error = world.publish_error = None
        backend.probe_error = backend.start_error = backend.stop_error = None
        backend.dies_after_s, backend.room, backend.start_s = None, 1_000, 5.0
        for engine in backend.engines.values():
            engine.healthy = True
        await asyncio.wait_for(asyncio.gather(*self.requests, *self.others), 600.0)
        assert world.answered + world.cut == len(self.requests)
        world.loop.set_replicas("m", None)
        await world.until(lambda: len(self.awake()) <= self.min_replicas, 300.0)
        await asyncio.sleep(2 * SETTINGS.tick_s)
        self.check()
        demand = world.observe().pools["m"]
        assert (demand.inflight_requests, demand.queued_requests) == (0, 0)


def play(story: Story, steps: Sequence[tuple[Any, ...]]) -> None:
    async def run() -> None:
        async with story.world:
            await story.tell(steps)
            await story.come_to_rest()
            story.stopped_loading = list(story.backend.stopped_loading)
        assert story.backend.living() == []

    run_virtual(run())


def make_story(min_replicas: int) -> Story:
    return Story(min_replicas)


EXAMPLES = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)


@EXAMPLES
@given(st.integers(0, 2), st.lists(QUIET_STEPS, max_size=12))
def test_whatever_comes_no_answer_is_cut_and_nothing_that_loads_is_stopped(
    min_replicas: int, steps: list[tuple[Any, ...]]
) -> None:
    story = make_story(min_replicas)
    play(story, steps)
    assert story.world.cut == 0
    assert story.world.answered == len(story.requests)
    assert story.stopped_loading == []


@EXAMPLES
@given(st.integers(0, 2), st.lists(st.one_of(QUIET_STEPS, OPERATOR_STEPS), max_size=14))
def test_whatever_an_operator_asks_no_answer_is_cut(
    min_replicas: int, steps: list[tuple[Any, ...]]
) -> None:
    story = make_story(min_replicas)
    play(story, steps)
    assert story.world.cut == 0
    assert story.world.answered == len(story.requests)


@EXAMPLES
@given(st.integers(0, 2), st.lists(st.one_of(QUIET_STEPS, OPERATOR_STEPS, FAULTS), max_size=16))
def test_whatever_fails_the_pool_recovers(min_replicas: int, steps: list[tuple[Any, ...]]) -> None:
    play(make_story(min_replicas), steps)


@settings(EXAMPLES, max_examples=12)
@given(st.integers(1, 3), st.floats(0.1, 50.0))
def test_burst_for_one_replica_is_one_start(count: int, start_s: float) -> None:
    async def run() -> None:
        backend = FakeBackend(start_s=start_s)
        pool = process_pool(target_inflight_tokens=300)
        async with World([pool], SETTINGS, backend) as world:
            await asyncio.gather(*world.burst(count, 1.0))
            assert backend.started == ["m-1"]

    run_virtual(run())
