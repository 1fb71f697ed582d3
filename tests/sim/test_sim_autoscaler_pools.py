"""Pools that are added, changed and removed while requests are on their way, on virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_fleet import FakeBackend, World, process_pool
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from virtual_time import now, run_virtual

from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.types import Bound, Decision, NotKnown, ScaleReason
from router.types import ReplicaState

QUICK = AutoscalerSettings(
    idle_to_zero_s=30.0,
    scale_down_delay_s=10.0,
    stable_window_s=20.0,
    panic_window_s=2.0,
    drain_s=100.0,
    backoff_max_s=8.0,
)
OTHER = ("--seed", "2")


def static_pool(*urls: str, **fields: Any) -> PoolSettings:
    return PoolSettings.model_validate(
        {
            "name": "s",
            "backend": "static",
            "static": {"urls": [f"http://127.0.0.1:{one}" for one in urls]},
        }
        | fields
    )


def servers() -> FakeBackend:
    return FakeBackend(owns_replicas=False, start_s=1.0)


def decision(world: World, pool: str = "m") -> Decision:
    (found,) = [one for one in world.loop.status().pools if one.name == pool]
    assert found.last_decision is not None
    return found.last_decision


@pytest.mark.parametrize("tiers", [{}, {"sleeping_s": 1e6}])
@pytest.mark.parametrize(
    "fields", [{"idle_to_zero_s": 500.0}, {"idle_to_zero_s": 500.0, "engine_args": OTHER}]
)
def test_settings_do_not_wake_a_pool_at_zero(
    fields: dict[str, Any], tiers: dict[str, float]
) -> None:
    async def story() -> None:
        slow = QUICK.model_copy(update={"stable_window_s": 60.0, "idle_to_zero_s": 15.0})
        async with World([process_pool(tiers=tiers)], slow) as world:
            await world.request(20.0)
            await world.until(lambda: not world.ready(), 60.0)
            started = len(world.backend.started)
            world.set_pools(process_pool(tiers=tiers, **fields))
            for _ in range(80):
                await asyncio.sleep(0.5)
                assert decision(world).desired == 0, decision(world).detail
            assert len(world.backend.started) == started
            await world.request(1.0)
            assert world.answered == 2

    run_virtual(story())


def test_settings_lose_no_request_that_came_with_them() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            (held,) = world.burst(1, 1.0)
            await asyncio.sleep(0)
            world.set_pools(process_pool(idle_to_zero_s=500.0))
            await asyncio.wait_for(held, 30.0)
            assert world.answered == 1

    run_virtual(story())


def test_an_added_pool_is_served_from_zero() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            await world.request(1.0, "n")
            assert world.unknown == 1
            world.set_pools(process_pool(), process_pool(name="n", aliases=["o"]))
            await asyncio.sleep(0.02)
            assert world.seen["n"].aliases == ("o",)
            await asyncio.gather(*world.burst(20, 1.0, "n"), *world.burst(20, 1.0))
            assert world.answered == 40
            assert {id.split("-")[0] for id in world.backend.started} == {"m", "n"}

    run_virtual(story())


def test_no_id_is_used_twice_whichever_pools_come_and_go() -> None:
    alike, other = (process_pool(name=name, min_replicas=1) for name in ("a/b", "a-b"))

    async def story() -> None:
        async with World([alike], QUICK) as world:
            await world.until(lambda: len(world.ready("a/b")) == 1)
            world.set_pools(other, alike)
            await world.until(lambda: len(world.ready("a-b")) == 1)
            assert [one.name for one in world.loop.status().pools] == ["a-b", "a/b"]
            world.set_pools(other)
            await world.until(lambda: "a/b" not in world.seen)
            world.set_pools(other, alike)
            await world.until(lambda: len(world.ready("a/b")) == 1)
            assert len(set(world.backend.started)) == len(world.backend.started) == 3

    run_virtual(story())


def test_a_removed_pool_answers_what_it_holds_and_ends() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=40.0)
        async with World([process_pool(), process_pool(name="n")], QUICK, backend) as world:
            held = world.burst(20, 5.0)
            await asyncio.sleep(1.0)
            world.set_pools(process_pool(name="n"))
            await asyncio.sleep(0.02)
            await world.request(1.0)
            assert world.unknown == 1
            with pytest.raises(NotKnown):
                world.loop.set_replicas("m", 1)
            began_s = now()
            await asyncio.gather(*held)
            assert (world.answered, world.cut) == (20, 0)
            assert now() - began_s < 60.0
            await world.until(lambda: "m" not in world.seen, 10.0)
            assert backend.living() == []
            assert [pool.name for pool in world.loop.status().pools] == ["n"]
            assert all(pool != "m" for pool, _ in world.loop.status().decisions)

    run_virtual(story())


@pytest.mark.parametrize("fields", [{"min_replicas": 2}, {"tiers": {"sleeping_s": 1e6}}])
def test_a_removed_pool_without_requests_ends_at_once(fields: dict[str, Any]) -> None:
    async def story() -> None:
        async with World([process_pool(**fields)], QUICK) as world:
            await asyncio.gather(*world.burst(2, 1.0))
            await asyncio.sleep(100.0)
            assert world.backend.living()
            world.set_pools()
            await world.until(lambda: not world.seen, 5.0)
            assert world.backend.living() == []

    run_virtual(story())


def test_a_removed_pool_stays_while_its_requests_are_not_known() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            (stream,) = world.burst(1, 600.0)
            await asyncio.sleep(20.0)
            world.blind = True
            world.set_pools()
            await asyncio.sleep(300.0)
            assert decision(world).reason is ScaleReason.UNKNOWN_DEMAND
            assert len(world.ready()) == 1
            world.blind = False
            await stream
            assert world.cut == 0
            await world.until(lambda: not world.seen, 10.0)

    run_virtual(story())


def test_a_pool_that_is_added_again_while_it_ends_goes_on() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            streams = world.burst(3, 200.0)
            await asyncio.sleep(20.0)
            world.set_pools()
            await asyncio.sleep(20.0)
            world.set_pools(process_pool(idle_to_zero_s=1e5))
            await asyncio.sleep(0.02)
            await asyncio.gather(*streams, *world.burst(3, 1.0))
            assert (world.answered, world.cut, world.unknown) == (6, 0, 0)
            assert world.backend.started == ["m-1"]

    run_virtual(story())


def test_bounds_and_windows_apply_without_other_replicas() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.set_pools(process_pool(min_replicas=3, max_inflight_requests=7))
            await world.until(lambda: len(world.ready()) == 3, 30.0)
            assert {view.max_inflight_requests for view in world.views} == {7}
            faster = QUICK.model_copy(update={"idle_to_zero_s": 3.0, "scale_down_delay_s": 0.0})
            world.set_pools(process_pool(), settings=faster)
            await world.until(lambda: not world.views, 30.0)
            assert len(world.backend.started) == 3

    run_virtual(story())


def test_an_override_stays_within_the_new_bounds() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            world.loop.set_replicas("m", 5)
            await world.until(lambda: len(world.ready()) == 5)
            world.set_pools(process_pool(max_replicas=2))
            await world.until(lambda: len(world.ready()) == 2, 60.0)
            assert world.loop.status().pools[0].override == 2

    run_virtual(story())


@pytest.mark.parametrize("count", [1, 4])
def test_other_arguments_replace_every_replica_a_new_one_first(count: int) -> None:
    async def story() -> None:
        pool = process_pool(min_replicas=count, max_replicas=count)
        async with World([pool], QUICK, FakeBackend(start_s=10.0)) as world:
            await world.until(lambda: len(world.ready()) == count)
            first = set(world.backend.engines)
            streams = world.burst(3 * count, 60.0)
            world.set_pools(pool.model_copy(update={"engine_args": OTHER}))
            lowest, highest = count, count
            while any(one in world.backend.engines for one in first):
                lowest = min(lowest, len(world.ready()))
                highest = max(highest, len(world.backend.living()))
                await asyncio.sleep(0.05)
                assert now() < 3_000.0
            assert (lowest, highest) == (count, count + 1)
            await asyncio.gather(*streams)
            assert world.cut == 0
            await asyncio.sleep(100.0)
            assert len(world.backend.started) == 2 * count
            assert all(one.spec.pool.engine_args == OTHER for one in world.backend.engines.values())
            assert "earlier" not in decision(world).detail

    run_virtual(story())


def test_other_arguments_do_not_send_an_idle_pool_to_zero() -> None:
    async def story() -> None:
        async with World([process_pool(idle_to_zero_s=100.0)], QUICK) as world:
            await asyncio.gather(*world.burst(1, 1.0))
            await asyncio.sleep(50.0)  # past the stable window and the scale-down delay
            assert decision(world).reason is ScaleReason.IDLE
            world.set_pools(process_pool(idle_to_zero_s=100.0, engine_args=OTHER))
            await world.until(lambda: [view.id for view in world.ready()] == ["m-2"], 20.0)
            assert decision(world).reason is ScaleReason.IDLE

    run_virtual(story())


def test_without_room_for_one_more_they_are_replaced_one_after_the_other() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=10.0, room=2)
        pool = process_pool(min_replicas=2, max_replicas=2)
        async with World([pool], QUICK, backend) as world:
            await world.until(lambda: len(world.ready()) == 2)
            streams = world.burst(4, 30.0)
            world.set_pools(pool.model_copy(update={"engine_args": OTHER}))
            await world.until(lambda: decision(world).bound is Bound.NO_CAPACITY, 10.0)
            lowest = 2
            while {"m-1", "m-2"} & set(backend.engines):
                lowest = min(lowest, len(world.ready()))
                await asyncio.sleep(0.05)
            assert lowest == 1
            await world.until(lambda: len(world.ready()) == 2, 60.0)
            await asyncio.gather(*streams)
            assert (world.cut, set(backend.stopped)) == (0, {"m-1", "m-2"})

    run_virtual(story())


def test_the_only_replica_goes_first_where_there_is_no_room_and_requests_wait() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=10.0, room=1)
        async with World([process_pool(min_replicas=1)], QUICK, backend) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.set_pools(process_pool(min_replicas=1, engine_args=OTHER))
            await world.until(lambda: not world.ready(), 10.0)
            await asyncio.gather(*world.burst(20, 1.0))
            assert (world.answered, world.cut) == (20, 0)

    run_virtual(story())


def test_the_old_replica_serves_on_while_its_successor_cannot_be_started() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.backend.start_error = RuntimeError("no such argument")
            world.set_pools(process_pool(min_replicas=1, engine_args=OTHER))
            await asyncio.sleep(100.0)
            assert [view.id for view in world.ready()] == ["m-1"]
            pool = world.loop.status().pools[0]
            assert pool.failures > 3
            assert pool.error == "no such argument"
            await asyncio.gather(*world.burst(5, 1.0))
            world.backend.start_error = None
            world.set_pools(process_pool(min_replicas=1))  # as it was
            await asyncio.sleep(100.0)
            assert [view.id for view in world.ready()] == ["m-1"]
            pool = world.loop.status().pools[0]
            assert pool.failures == 0
            assert not any(one.outdated for one in pool.replicas)  # what has failed is history
            assert len(world.backend.living()) == 1

    run_virtual(story())


def test_a_starting_replica_with_other_arguments_is_replaced_too() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK, FakeBackend(start_s=40.0)) as world:
            held = world.burst(10, 1.0)
            await asyncio.sleep(20.0)
            world.set_pools(process_pool(engine_args=OTHER))
            began_s = now()
            await asyncio.gather(*held)
            assert now() - began_s < 30.0  # the one that was nearly there answers them
            await world.until(lambda: list(world.backend.engines) == ["m-2"], 60.0)

    run_virtual(story())


def test_a_replica_that_waits_for_its_start_gets_the_settings_of_then() -> None:
    async def story() -> None:
        backend = FakeBackend(room=0)
        async with World([process_pool(min_replicas=1)], QUICK, backend) as world:
            await world.until(lambda: len(backend.calls) > 2)
            world.set_pools(process_pool(min_replicas=1, aliases=["o"]))
            backend.room = 1
            await world.until(lambda: len(world.ready()) == 1)
            (engine,) = backend.living()
            assert (engine.spec.id, engine.spec.pool.aliases) == ("m-1", ("o",))

    run_virtual(story())


def test_other_arguments_are_tried_at_once_whatever_failed_before() -> None:
    async def story() -> None:
        patient = QUICK.model_copy(update={"backoff_max_s": 1e4})
        backend = FakeBackend(start_error=RuntimeError("no such argument"))
        async with World([process_pool(min_replicas=1)], patient, backend) as world:
            await world.until(lambda: world.loop.status().pools[0].failures > 8)
            backend.start_error = None
            world.set_pools(process_pool(min_replicas=1, engine_args=OTHER), settings=patient)
            await world.until(lambda: len(world.ready()) == 1, 20.0)

    run_virtual(story())


def test_a_server_that_was_not_well_is_back_with_its_pool() -> None:
    async def story() -> None:
        backend = servers()
        async with World([static_pool("1", "2")], QUICK, backend) as world:
            await world.until(lambda: len(world.ready("s")) == 2)
            streams = world.burst(2, 60.0, "s")
            await asyncio.sleep(1.0)
            backend.engines["s-1"].healthy = False
            await world.until(lambda: len(world.ready("s")) == 1)
            world.set_pools()
            draining = {ReplicaState.DRAINING, ReplicaState.READY}
            await world.until(lambda: {view.state for view in world.views} == draining, 20.0)
            world.set_pools(static_pool("1", "2"))
            backend.engines["s-1"].healthy = True
            await world.until(lambda: len(world.ready("s")) == 2, 20.0)
            await asyncio.gather(*streams)
            assert (world.cut, len(backend.started)) == (0, 2)

    run_virtual(story())


def test_servers_of_a_static_pool_come_and_go() -> None:
    async def story() -> None:
        backend = servers()
        async with World([static_pool("1", "2")], QUICK, backend) as world:
            await world.until(lambda: len(world.ready("s")) == 2)
            stream = world.burst(2, 30.0, "s")
            await asyncio.sleep(1.0)
            world.set_pools(static_pool("2", "3"))
            await world.until(
                lambda: [view.url[-1] for view in world.ready("s")] == ["2", "3"], 10.0
            )
            await asyncio.gather(*stream)
            await world.until(lambda: len(world.views) == 2, 10.0)
            assert (world.cut, len(backend.started)) == (0, 3)
            world.set_pools()
            await world.until(lambda: not world.seen, 10.0)

    run_virtual(story())


def test_a_pool_may_change_its_backend() -> None:
    async def story() -> None:
        outside = servers()
        world = World([process_pool(min_replicas=1)], QUICK, more_backends={"static": outside})
        async with world:
            await world.until(lambda: len(world.ready()) == 1)
            world.loop.set_replicas("m", 2)
            world.set_pools(static_pool("1", name="m"))
            assert world.loop.status().pools[0].override is None
            await world.until(lambda: [view.id for view in world.ready()] == ["m-2"], 20.0)
            await world.until(lambda: world.backend.living() == [], 20.0)
            world.set_pools(process_pool(min_replicas=1))
            await world.until(lambda: [view.id for view in world.ready()] == ["m-3"], 20.0)
            await world.until(lambda: outside.living() == [], 20.0)
            assert len(world.views) == 1

    run_virtual(story())


POOLS = st.dictionaries(
    st.sampled_from("abc"),
    st.fixed_dictionaries(
        {
            "min_replicas": st.integers(0, 2),
            "max_replicas": st.integers(2, 3),
            "engine_args": st.sampled_from([(), ("--seed", "1"), ("--seed", "2")]),
        }
    ),
)
STEPS = st.one_of(
    st.tuples(st.just("set"), POOLS),
    st.tuples(st.just("ask"), st.sampled_from("abc"), st.integers(1, 5), st.floats(0.1, 40.0)),
    st.tuples(st.just("wait"), st.floats(0.0, 60.0)),
    st.tuples(st.just("room"), st.integers(1, 9)),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(STEPS, max_size=14))
def test_whatever_the_changes_no_request_is_lost(steps: list[Any]) -> None:
    async def story() -> None:
        async with World([process_pool(name="a")], QUICK) as world:
            asked: list[asyncio.Task[None]] = []
            for kind, *given in steps:
                if kind == "set":
                    world.set_pools(
                        *(process_pool(name=name, **fields) for name, fields in given[0].items())
                    )
                elif kind == "ask":
                    asked += world.burst(given[1], given[2], given[0])
                elif kind == "wait":
                    await asyncio.sleep(given[0])
                else:
                    world.backend.room = given[0]
            world.backend.room = 1_000
            await world.until(lambda: all(one.done() for one in asked), 2_000.0)
            assert world.answered + world.unknown == len(asked)
            assert world.cut == 0
            world.set_pools()
            await world.until(lambda: not world.seen, 200.0)
            assert world.backend.living() == []
            assert not any(view.state is ReplicaState.READY for view in world.views)

    run_virtual(story())
