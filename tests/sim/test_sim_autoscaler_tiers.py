"""Tiers with the real loop on virtual time: down one by one, up from anywhere, and never
down while there is demand."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from fake_fleet import FakeBackend, World, process_pool
from fake_models import PLACE, FakePreparer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_time import now, run_virtual

from autoscaler.backends.base import BackendError
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import PoolReport, ScaleReason
from modelcache.types import NoSpace, Tier
from router.types import ReplicaState

QUICK = AutoscalerSettings(
    idle_to_zero_s=10.0,
    scale_down_delay_s=1.0,
    stable_window_s=2.0,
    panic_window_s=1.0,
    demand_stale_s=3.0,
    backoff_initial_s=1.0,
    backoff_max_s=8.0,
    drain_s=60.0,
)
TIERS_S = {"sleeping_s": 30, "forked_s": 40, "paged_s": 50, "on_disk_s": 60}


def warm(**seconds: float) -> PoolSettings:
    return process_pool(max_replicas=2, tiers={**TIERS_S, **seconds})


def look(world: World) -> PoolReport:
    return world.loop.status().pools[0]


def tier_of(world: World) -> Tier | None:
    return look(world).tier


async def once(world: World) -> None:
    await asyncio.gather(*world.burst(1, 1.0))


def test_down_the_tiers_one_by_one_and_the_next_request_brings_it_up() -> None:
    async def story() -> None:
        models, backend = FakePreparer(), FakeBackend()
        async with World([warm()], QUICK, backend, preparer=models) as world:
            await once(world)
            assert tier_of(world) is Tier.RUNNING
            began_s = now()
            seen: list[tuple[Tier | None, float]] = []
            while now() - began_s < 220.0:
                if not seen or seen[-1][0] is not tier_of(world):
                    seen.append((tier_of(world), now() - began_s))
                await asyncio.sleep(0.1)
            assert [tier for tier, _ in seen] == [
                Tier.RUNNING,
                Tier.SLEEPING,
                Tier.PAGED,  # for a moment: what the engine leaves when it goes
                Tier.FORKED,
                Tier.PAGED,
                Tier.ON_DISK,
                Tier.REMOTE,
            ]
            ends_s = [10.0, 40.0, 42.0, 80.0, 130.0, 190.0]
            assert [at_s for _, at_s in seen[1:]] == [pytest.approx(e, abs=3.5) for e in ends_s]
            assert backend.calls.count(("sleep", "m-1")) == 1
            assert models.moved == [Tier.FORKED, Tier.PAGED, Tier.ON_DISK, Tier.REMOTE]
            assert models.held == set()
            await once(world)
            assert (world.answered, world.cut) == (2, 0)
            assert tier_of(world) is Tier.RUNNING
            assert models.held == {"m-2"}

    run_virtual(story())


@pytest.mark.parametrize(
    ("idle_s", "tier"),
    [(20, "sleeping"), (60, "forked"), (110, "paged"), (160, "on_disk"), (260, "remote")],
)
def test_each_wake_is_measured_for_the_tier_it_began_from(idle_s: float, tier: str) -> None:
    async def story() -> None:
        models = FakePreparer(fetch_s=33.0)
        async with World([warm()], QUICK, FakeBackend(start_s=5.0), preparer=models) as world:
            await once(world)
            await asyncio.sleep(idle_s)
            assert tier_of(world) == tier
            await once(world)
            measured = {one.tier.value: one.wake_s for one in look(world).tiers if one.wakes}
            expected_s = {"sleeping": 1.0, "remote": 38.0}.get(tier, 5.0)
            assert measured.pop(tier) == pytest.approx(expected_s, abs=0.7)
            # The pool's first start was from the fork server, which begins with the pool.
            assert set(measured) <= {"on_disk", "forked"}

    run_virtual(story())


@dataclass
class NotLookedFor(FakePreparer):
    """Its model is on the disk, which it knows only when it has looked."""

    def tier(self, pool: PoolSettings) -> Tier:
        return self.here if self.refreshes else Tier.REMOTE

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        return self.possible if self.refreshes else frozenset({Tier.REMOTE})


def test_a_start_before_its_model_was_looked_for_is_not_measured_as_one_with_a_download() -> None:
    """A pool that is never at zero, and any other for a moment after a reload."""

    async def story() -> None:
        pool = warm().model_copy(update={"min_replicas": 1})
        async with World([pool], QUICK, preparer=NotLookedFor()) as world:
            await world.until(lambda: len(world.ready()) == 1)
            assert [one.woken_from for one in look(world).replicas] == [Tier.ON_DISK]
            assert [one.tier for one in look(world).tiers if one.wakes] == [Tier.ON_DISK]

    run_virtual(story())


def test_the_promise_is_that_of_the_tier_the_pool_is_in() -> None:
    async def story() -> None:
        times = WakeTimes(samples=8)
        for tier, seconds in ((Tier.SLEEPING, 1.0), (Tier.FORKED, 4.0), (Tier.REMOTE, 90.0)):
            times.add("simulated:m", tier, seconds)
        models = FakePreparer()
        async with World([warm()], QUICK, preparer=models, wake_times=times) as world:
            await asyncio.sleep(5.0)
            assert world.etas["m"] == 4.0
            await once(world)
            await world.until(lambda: tier_of(world) is Tier.SLEEPING)
            await asyncio.sleep(2.0)
            assert world.etas["m"] == 1.0
            await world.until(lambda: tier_of(world) is Tier.REMOTE)
            await asyncio.sleep(2.0)
            assert world.etas["m"] == 90.0

    run_virtual(story())


def test_a_replica_on_its_way_says_what_it_is_at() -> None:
    async def story() -> None:
        models = FakePreparer(here=Tier.REMOTE, fetch_s=20.0)
        backend = FakeBackend(start_s=5.0)
        async with World([warm()], QUICK, backend, preparer=models) as world:
            (task,) = world.burst(1, 1.0)
            seen: list[str] = []
            while not task.done():
                phase = world.phases["m"]
                if phase and (not seen or seen[-1] != phase):
                    seen.append(phase)
                report = look(world)
                for one in report.replicas:
                    if one.progress is not None:
                        assert one.step == "fetching"
                        assert one.phase.startswith("fetching ")
                await asyncio.sleep(0.25)
            assert "fetching 5.0 of 10.0 GB at 500.0 MB/s" in seen
            assert seen[-1] == "loading"
            assert world.phases["m"] == ""
            assert backend.engines["m-1"].spec.pool.model == PLACE

    run_virtual(story())


def test_time_for_the_model_does_not_count_against_the_start() -> None:
    async def story() -> None:
        limits = QUICK.model_copy(update={"start_timeout_s": 10.0, "prepare_timeout_s": 100.0})
        models = FakePreparer(here=Tier.REMOTE, fetch_s=90.0)
        async with World([warm()], limits, FakeBackend(start_s=8.0), preparer=models) as world:
            await once(world)
            assert world.backend.started == ["m-1"]

    run_virtual(story())


def test_a_model_that_does_not_come_in_time_is_a_failure_that_says_so() -> None:
    async def story() -> None:
        limits = QUICK.model_copy(update={"prepare_timeout_s": 30.0})
        models = FakePreparer(here=Tier.REMOTE, fetch_s=90.0)
        async with World([warm()], limits, preparer=models) as world:
            (task,) = world.burst(1, 1.0)
            await world.until(lambda: look(world).failures == 1)
            error = look(world).error
            assert error is not None
            assert "not here after 30 s (prepare_timeout_s)" in error
            assert "fetching 3.0 of 10.0 GB" in error
            assert models.cancelled == ["m-1"]
            assert world.backend.started == []
            models.fetch_s = 5.0
            await task
            assert "m-1" not in models.held

    run_virtual(story())


def test_a_model_that_cannot_come_is_tried_again_with_pauses() -> None:
    async def story() -> None:
        models = FakePreparer(here=Tier.REMOTE, error=NoSpace("it needs 15 GB, 3 GB are free"))
        async with World([warm()], QUICK, preparer=models) as world:
            (task,) = world.burst(1, 1.0)
            began_s = now()
            await asyncio.sleep(40.0)
            assert 4 <= len(models.prepared) <= 9, "backoff of 1, 2, 4, 8, 8 … s"
            assert look(world).error == "it needs 15 GB, 3 GB are free"
            assert world.loop.status().errors["preparation of m"] == len(models.prepared)
            models.error = None
            await task
            assert now() - began_s > 40.0
            assert world.answered == 1

    run_virtual(story())


def test_an_operator_can_cancel_a_download_and_demand_cannot() -> None:
    async def story() -> None:
        models = FakePreparer(here=Tier.REMOTE, fetch_s=100.0)
        async with World([warm()], QUICK, preparer=models) as world:
            (visitor,) = world.burst(1, 1.0)
            await asyncio.sleep(1.0)
            visitor.cancel()
            await asyncio.sleep(60.0)
            assert models.cancelled == [], "trap 1: no other signal ends what is on its way"
            world.loop.set_replicas("m", 0)
            await world.until(lambda: not look(world).replicas, 5.0)
            assert models.cancelled == ["m-1"]
            assert models.held == set()
            assert world.backend.started == []
            # And who asks afterwards is served.
            models.fetch_s = 1.0
            await once(world)

    run_virtual(story())


def test_an_engine_without_room_keeps_what_was_prepared_and_lets_go_when_it_is_given_up() -> None:
    async def story() -> None:
        models, backend = FakePreparer(), FakeBackend(room=0)
        async with World([warm()], QUICK, backend, preparer=models) as world:
            (visitor,) = world.burst(1, 1.0)
            await asyncio.sleep(20.0)
            assert models.held == {"m-1"}
            visitor.cancel()
            await world.until(lambda: not look(world).replicas)
            assert models.held == set()

    run_virtual(story())


def test_what_held_a_model_is_let_go_of_however_the_engine_ends() -> None:
    async def story() -> None:
        models = FakePreparer()
        async with World([warm(sleeping_s=0)], QUICK, preparer=models) as world:
            await once(world)
            assert models.held == {"m-1"}
            world.backend.engines["m-1"].alive = False
            world.burst(1, 1.0)
            await world.until(lambda: models.held == {"m-2"})
            world.backend.stop_s = 5.0
            world.backend.stopped.clear()
            await world.until(lambda: bool(world.backend.stopped))
            await asyncio.sleep(0.1)
            assert models.held == set()
        assert models.closed

    run_virtual(story())


def test_where_sleep_fails_the_step_is_left_out_and_says_why() -> None:
    async def story() -> None:
        models, backend = FakePreparer(), FakeBackend(can_sleep=False)
        async with World([warm()], QUICK, backend, preparer=models) as world:
            for _ in range(2):
                await once(world)
                await world.until(lambda: tier_of(world) is Tier.FORKED)
            assert [name for name, _ in backend.calls].count("sleep") == 1, "asked once, for good"
            (asleep,) = [one for one in look(world).tiers if one.tier is Tier.SLEEPING]
            assert asleep.available is False
            assert "/sleep" in asleep.why_not

    run_virtual(story())


def test_a_tier_that_failed_is_tried_again_after_a_while() -> None:
    async def story() -> None:
        models = FakePreparer(move_error=BackendError("the fork server died"))
        async with World([warm(sleeping_s=0)], QUICK, preparer=models) as world:
            await asyncio.sleep(10.0)
            (forked,) = [one for one in look(world).tiers if one.tier is Tier.FORKED]
            assert (forked.available, forked.why_not) == (False, "the fork server died")
            assert tier_of(world) is Tier.ON_DISK
            models.move_error = None
            await world.until(lambda: tier_of(world) is Tier.FORKED, 2 * QUICK.backoff_max_s)

    run_virtual(story())


def test_unsupported_tiers_are_not_asked_for_again() -> None:
    async def story() -> None:
        models = FakePreparer(unsupported=frozenset({Tier.FORKED}))
        async with World([warm(sleeping_s=0, paged_s=5)], QUICK, preparer=models) as world:
            await once(world)
            await world.until(lambda: tier_of(world) is Tier.ON_DISK, 100.0)
            await once(world)
            await world.until(lambda: tier_of(world) is Tier.ON_DISK, 100.0)
            assert Tier.FORKED not in models.moved
            assert not any(where.startswith("tier of") for where in world.loop.status().errors)

    run_virtual(story())


def test_an_operators_sleep_has_no_end_but_a_request() -> None:
    async def story() -> None:
        models = FakePreparer()
        async with World([warm(sleeping_s=0)], QUICK, preparer=models) as world:
            await once(world)
            await world.loop.sleep("m", 1)
            await asyncio.sleep(1_000.0)
            assert tier_of(world) is Tier.SLEEPING
            assert (await world.loop.sleep("m", 1)).sleeping == 1  # it does already
            assert world.backend.calls.count(("sleep", "m-1")) == 1
            await once(world)
            assert world.backend.started == ["m-1"]

    run_virtual(story())


def test_scale_brings_it_up_from_wherever_it_is() -> None:
    async def story() -> None:
        models = FakePreparer()
        async with World([warm()], QUICK, preparer=models) as world:
            await once(world)
            for tier in (Tier.SLEEPING, Tier.FORKED, Tier.REMOTE):
                await world.until(lambda tier=tier: tier_of(world) is tier)  # type: ignore[misc]
                world.loop.set_replicas("m", 1)
                await world.until(lambda: len(world.ready()) == 1)
                world.loop.set_replicas("m", None)
            assert world.backend.started == ["m-1", "m-2", "m-3"]

    run_virtual(story())


def test_unknown_is_not_idle() -> None:
    async def story() -> None:
        models = FakePreparer()
        async with World([warm()], QUICK, preparer=models) as world:
            await once(world)
            await world.until(lambda: tier_of(world) is Tier.FORKED)
            world.blind = True
            await asyncio.sleep(1_000.0)
            assert tier_of(world) is Tier.FORKED
            assert look(world).step_down_at_s is None
            world.blind = False
            await world.until(lambda: tier_of(world) is Tier.PAGED, 60.0)

    run_virtual(story())


def test_a_request_cancels_a_change_of_tier() -> None:
    async def story() -> None:
        models = FakePreparer(move_s=500.0)
        async with World([warm(sleeping_s=0)], QUICK, preparer=models) as world:
            await asyncio.sleep(20.0)
            began_s = now()
            await once(world)
            assert now() - began_s < 10.0
            assert (models.moved, models.moves_cancelled) == ([], [Tier.FORKED])

    run_virtual(story())


def test_what_was_there_and_is_gone_is_noticed_and_brought_again() -> None:
    """A standby dies, an operator evicts by hand: checked now and then, at every tier."""

    async def story() -> None:
        models = FakePreparer()
        pool = warm(sleeping_s=0, forked_s=1_000)
        async with World([pool], QUICK, preparer=models) as world:
            await world.until(lambda: models.here is Tier.FORKED, 60.0)
            await asyncio.sleep(20.0)
            looks = models.refreshes
            models.here = Tier.ON_DISK  # gone
            await world.until(lambda: models.here is Tier.FORKED, 60.0)
            await asyncio.sleep(60.0)
            assert models.refreshes > looks

    run_virtual(story())


def test_of_several_replicas_one_sleeps() -> None:
    async def story() -> None:
        pool = process_pool(max_replicas=3, target_inflight_tokens=100, tiers=TIERS_S)
        limits = QUICK.model_copy(update={"scale_down_delay_s": 100.0})
        async with World([pool], limits, preparer=FakePreparer()) as world:
            await asyncio.gather(*world.burst(3, 20.0))
            assert len(world.ready()) == 3
            await world.until(lambda: tier_of(world) is Tier.SLEEPING, 300.0)
            await asyncio.sleep(5.0)
            assert len(world.backend.engines) == 1

    run_virtual(story())


class Watched(FakePreparer):
    """A preparer that notes when a pool was taken down although there was demand."""

    def __init__(self) -> None:
        super().__init__(fetch_s=8.0)
        self.world: World | None = None
        self.wrong: list[str] = []

    async def move_to(self, pool: PoolSettings, tier: Tier) -> None:
        self.check(f"move to {tier}")
        await super().move_to(pool, tier)
        self.check(f"moved to {tier}")

    def check(self, what: str) -> None:
        assert self.world is not None
        world = self.world
        pool = look(world)
        states = {one.state for one in pool.replicas}
        busy = states - {ReplicaState.FAILED, ReplicaState.STOPPED}
        waiting = world.held.get("m", 0) + sum(world.inflight.values())
        # A request of this very moment is seen by the next tick, which cancels the move.
        decision = pool.last_decision
        assert decision is not None
        if busy or (waiting and decision.reason is not ScaleReason.AT_ZERO):
            self.wrong.append(f"{what}: {states}, {waiting} wait")


STEPS = st.one_of(
    st.tuples(st.just("burst"), st.integers(1, 4), st.floats(0.1, 15.0)),
    st.tuples(st.just("visit"), st.floats(0.0, 0.2)),
    st.tuples(st.just("wait"), st.floats(0.0, 120.0)),
    st.tuples(st.just("blind"), st.booleans()),
    st.tuples(st.just("scale"), st.none() | st.integers(0, 2)),
    st.tuples(st.just("sleeps"), st.booleans()),
    st.tuples(st.just("move takes"), st.floats(0.0, 40.0)),
    st.tuples(st.just("fetch takes"), st.floats(0.1, 40.0)),
)
SECONDS = st.sampled_from([0.0, 5.0, 20.0, 60.0])


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
@given(
    st.fixed_dictionaries(dict.fromkeys(TIERS_S, SECONDS)),
    st.sampled_from([Tier.ON_DISK, Tier.REMOTE]),
    st.lists(STEPS, max_size=14),
)
def test_whatever_comes_requests_are_answered_and_the_pool_ends_in_its_coldest_tier(
    tiers_s: dict[str, float], here: Tier, steps: list[tuple[Any, ...]]
) -> None:
    async def story() -> None:
        models, backend = Watched(), FakeBackend()
        models.here = here
        world = World([warm(**tiers_s)], QUICK, backend, preparer=models)
        models.world = world
        requests: list[asyncio.Task[None]] = []
        async with world:
            for name, *values in steps:
                match name, *values:
                    case "burst", count, seconds:
                        requests += world.burst(count, seconds)
                    case "visit", seconds:
                        (one,) = world.burst(1, 1.0)
                        asyncio.get_running_loop().call_later(seconds, one.cancel)
                    case "wait", seconds:
                        await asyncio.sleep(seconds)
                    case "blind", value:
                        world.blind = value
                    case "scale", value:
                        world.loop.set_replicas("m", value)
                    case "sleeps", value:
                        backend.can_sleep = value
                    case "move takes", seconds:
                        models.move_s = seconds
                    case "fetch takes", seconds:
                        models.fetch_s = seconds
                await asyncio.sleep(0.3)
            world.blind = False
            await asyncio.wait_for(asyncio.gather(*requests), 600.0)
            assert (world.answered, world.cut) == (len(requests), 0)
            world.loop.set_replicas("m", None)
            models.move_s = 1.0
            # However it got there, a pool without demand ends on the last step it has.
            await world.until(
                lambda: tier_of(world) is Tier.REMOTE and not look(world).replicas, 900.0
            )
            await asyncio.sleep(1.0)
            assert models.held == set()
            assert backend.living() == []
        assert models.wrong == []

    run_virtual(story())


def test_pages_that_come_after_the_engine_are_told_of_until_they_are_in() -> None:
    async def story() -> None:
        models = FakePreparer(page_s=30.0)
        async with World([warm()], QUICK, FakeBackend(), preparer=models) as world:
            world.loop.set_replicas("m", 1)
            await world.until(lambda: look(world).ready == 1)
            (replica,) = look(world).replicas
            assert replica.progress is not None
            await asyncio.sleep(31.0)
            (replica,) = look(world).replicas
            assert (replica.state, replica.progress) == ("ready", None)

    run_virtual(story())
