"""Models that do not fit beside each other take turns: the real loop on virtual time, a machine
with memory for one of two."""

from __future__ import annotations

import asyncio

from fake_fleet import FakeBackend, World, process_pool
from virtual_time import now, run_virtual

from autoscaler.policy.packing import Device
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.types import Bound, PoolReport, ScaleReason

HOST = (Device(name="host", memory_bytes=100),)
GIB = 1 << 30
GPU = (Device(name="gpu0", memory_bytes=80 * GIB),)
SETTINGS = AutoscalerSettings(
    idle_to_zero_s=600.0,
    scale_down_delay_s=1.0,
    stable_window_s=2.0,
    panic_window_s=1.0,
    demand_stale_s=3.0,
    drain_s=5.0,
    min_loaded_s=5.0,
    turn_s=20.0,
)


def on_host(name: str, memory_bytes: int | None = 60) -> PoolSettings:
    return process_pool(name=name, max_replicas=1, process={"memory_bytes": memory_bytes})


def on_gpu(name: str, **fields: object) -> PoolSettings:
    wanted = {"gpus_per_replica": 1, "gpu_memory_bytes": 60 * GIB}
    return process_pool(name=name, max_replicas=1, process=wanted, **fields)


def look(world: World, name: str) -> PoolReport:
    return next(one for one in world.loop.status().pools if one.name == name)


def living(world: World) -> list[str]:
    return sorted(one.spec.pool.name for one in world.backend.living())


def test_the_first_request_wakes_the_right_model_and_the_idle_one_makes_room() -> None:
    async def story() -> None:
        backend = FakeBackend(shared=HOST)
        async with World([on_host("a"), on_host("b")], SETTINGS, backend) as world:
            await world.request(1.0, "a")
            assert living(world) == ["a"]
            await asyncio.sleep(20.0)  # idle, and left loaded: there is no other use of its memory
            assert living(world) == ["a"]
            began_s = now()
            await world.request(1.0, "b")
            assert living(world) == ["b"]
            assert now() - began_s < 10.0
            made_room = look(world, "a").last_decision
            assert made_room is not None
            assert made_room.desired == 0
            await world.request(1.0, "a")
            assert living(world) == ["a"]
            assert (world.answered, world.cut) == (3, 0)

    run_virtual(story())


def test_what_fits_is_loaded_together() -> None:
    async def story() -> None:
        backend = FakeBackend(shared=HOST)
        async with World([on_host("a", 50), on_host("b", 50)], SETTINGS, backend) as world:
            await asyncio.gather(world.request(1.0, "a"), world.request(1.0, "b"))
            assert living(world) == ["a", "b"]

    run_virtual(story())


def test_both_are_served_where_neither_is_ever_idle_and_no_request_is_cut() -> None:
    async def story() -> None:
        backend = FakeBackend(shared=HOST)
        async with World([on_host("a"), on_host("b")], SETTINGS, backend) as world:
            waits_s: dict[str, list[float]] = {"a": [], "b": []}

            async def client(name: str) -> None:
                end_s = now() + 400.0
                while now() < end_s:
                    began_s = now()
                    await world.request(8.0, name)
                    waits_s[name].append(now() - began_s - 8.0)

            await asyncio.gather(*(client(name) for name in "aabb"))
            assert world.cut == 0
            for name in "ab":
                assert len(waits_s[name]) > 10
                # Its own start, and before that the other's: start, turn, and last requests.
                assert max(waits_s[name]) < 5.0 + 5.0 + SETTINGS.turn_s + 8.0 + 5.0

    run_virtual(story())


def test_an_answer_longer_than_the_drain_is_not_cut_for_another_model() -> None:
    async def story() -> None:
        backend = FakeBackend(shared=HOST)
        async with World([on_host("a"), on_host("b")], SETTINGS, backend) as world:
            long = asyncio.create_task(world.request(120.0, "a"))
            await asyncio.sleep(30.0)
            short = asyncio.create_task(world.request(1.0, "b"))
            await asyncio.sleep(30.0)
            assert not short.done()
            waits = look(world, "b").last_decision
            assert waits is not None
            assert (waits.reason, waits.bound) == (ScaleReason.NO_CAPACITY, Bound.NO_CAPACITY)
            await asyncio.gather(long, short)
            assert (world.answered, world.cut) == (2, 0)

    run_virtual(story())


def test_models_on_one_gpu_share_it_by_sleep_and_wake() -> None:
    async def story() -> None:
        backend = FakeBackend(shared=GPU, measured_bytes={"a": 3 * GIB, "b": 3 * GIB})
        tiers = {"sleeping_s": 3_600.0}
        pools = [on_gpu("a", tiers=tiers), on_gpu("b", tiers=tiers)]
        async with World(pools, SETTINGS, backend) as world:
            await world.request(1.0, "a")
            await asyncio.sleep(10.0)
            await world.request(1.0, "b")
            await asyncio.sleep(10.0)
            began_s = now()
            await world.request(1.0, "a")
            assert now() - began_s < 4.0  # a wake, not a start
            assert living(world) == ["a", "b"]
            assert [one[0] for one in backend.calls] == ["start", "sleep", "start", "sleep", "wake"]
            assert world.cut == 0

    run_virtual(story())


def test_one_of_unknown_memory_is_loaded_alone_until_it_was_measured() -> None:
    async def story() -> None:
        backend = FakeBackend(shared=HOST, measured_bytes={"a": 40})
        pools = [on_host("a", None), on_host("b", 50)]
        async with World(pools, SETTINGS, backend) as world:
            await world.request(1.0, "a")
            await asyncio.sleep(2.0)
            await world.request(1.0, "b")
            assert living(world) == ["a", "b"]

    run_virtual(story())


def test_a_model_that_cannot_start_does_not_keep_the_memory() -> None:
    async def story() -> None:
        backend = FakeBackend(shared=HOST)
        async with World([on_host("a"), on_host("b")], SETTINGS, backend) as world:
            backend.start_s = 1e9
            failing = asyncio.create_task(world.request(1.0, "a"))
            await asyncio.sleep(1.0)
            for engine in backend.living():
                engine.alive = False
            backend.start_s = 5.0
            backend.start_error = None
            await world.request(1.0, "b")
            assert "b" in living(world)
            await failing
            assert world.cut == 0

    run_virtual(story())
