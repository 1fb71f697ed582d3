"""The scale-to-zero traps that others fell into, each run against the real control loop."""

from __future__ import annotations

import asyncio

import pytest
from fake_fleet import FakeBackend, World, process_pool
from virtual_time import now, run_virtual

from autoscaler.settings import AutoscalerSettings
from autoscaler.types import ScaleReason
from router.types import ReplicaState

TOKENS_EACH = 100
QUICK = AutoscalerSettings(
    idle_to_zero_s=30.0,
    scale_down_delay_s=10.0,
    stable_window_s=20.0,
    panic_window_s=2.0,
    drain_s=20.0,
)


def test_trap_1_replica_is_not_removed_while_still_loading() -> None:
    async def story() -> None:
        # Loading takes ten times the cooldown, and the one who asked goes away at once.
        backend = FakeBackend(start_s=300.0)
        async with World([process_pool()], QUICK, backend) as world:
            (visitor,) = world.burst(1, 1.0)
            await asyncio.sleep(1.0)
            visitor.cancel()
            for _ in range(295):
                await asyncio.sleep(1.0)
                assert backend.stopped == []
                assert len(backend.started) == 1
            await world.until(lambda: len(world.ready()) == 1, 10.0)
            ready_at_s = now()
            await world.until(lambda: not world.views)
            # Its idle time began when it became ready, not when it was asked for.
            assert now() - ready_at_s >= QUICK.idle_to_zero_s

    run_virtual(story())


@pytest.mark.parametrize("signalled", [True, False])
def test_trap_3_request_that_came_and_went_between_two_ticks_still_wakes(signalled: bool) -> None:
    async def story() -> None:
        backend = FakeBackend()
        async with World([process_pool()], QUICK, backend) as world:
            await asyncio.sleep(0.5)
            if signalled:
                # Held and gone again before the loop runs: only the wake signal tells of it.
                world.loop.signal_wake("m")
            else:
                world.arrivals["m"] = 1
            await world.until(lambda: len(backend.started) == 1, 2.0)
            assert any(one.decision.reason is ScaleReason.WAKE for one in world.loop.decisions("m"))

    run_virtual(story())


def test_trap_3_request_that_came_and_went_between_two_ticks_keeps_the_replica() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=0.5)
        async with World([process_pool()], QUICK, backend) as world:
            world.loop.signal_wake("m")
            await world.until(lambda: len(world.ready()) == 1, 5.0)
            for number in range(10):
                await asyncio.sleep(QUICK.idle_to_zero_s - 2.0)
                world.arrivals["m"] = number + 1
            assert backend.stopped == []
            assert len(backend.started) == 1

    run_virtual(story())


def test_trap_4_there_is_one_writer_of_the_replica_count() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            with pytest.raises(RuntimeError, match="one writer"):
                await world.loop.run()
            # Operator, wake signal and tick at once still make one decision, and one start.
            world.loop.set_replicas("m", 1)
            world.loop.signal_wake("m")
            tasks = world.burst(50, 0.5)
            await asyncio.gather(*tasks)
            assert len(world.backend.started) == 1

    run_virtual(story())


@pytest.mark.parametrize("failure", ["silence", "nothing", "error"])
def test_trap_6_unknown_demand_is_not_zero_and_removes_nothing(failure: str) -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=1.0)
        async with World([process_pool(target_inflight_tokens=TOKENS_EACH)], QUICK, backend) as w:
            tasks = w.burst(3, 5.0)
            await asyncio.gather(*tasks)
            fleet = len(w.ready())
            assert fleet >= 2
            if failure == "error":
                w.observe_error = OSError("the workers do not answer")
            elif failure == "silence":
                w.blind = True
            else:
                w.silent = True
            await asyncio.sleep(3_600.0)
            assert len(w.ready()) == fleet
            assert backend.stopped == []
            assert w.loop.status().pools[0].last_decision.reason is ScaleReason.UNKNOWN_DEMAND

    run_virtual(story())


def test_trap_6_zero_traffic_is_known_and_does_not_block_scale_down() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=1.0)
        async with World([process_pool()], QUICK, backend) as world:
            # Demand was unknown for a while before: that does not count as activity later.
            await asyncio.gather(*world.burst(1, 1.0))
            world.blind = True
            await asyncio.sleep(100.0)
            world.blind = False
            await world.until(lambda: not world.views, 5.0)

    run_virtual(story())


def test_trap_7_fleet_does_not_collapse_when_panic_ends() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=2.0)
        pool = process_pool(target_inflight_tokens=TOKENS_EACH)
        async with World([pool], QUICK, backend) as world:
            stop = asyncio.Event()

            async def keep_busy() -> None:
                while not stop.is_set():
                    await world.request(1.0)

            users = [asyncio.create_task(keep_busy()) for _ in range(6)]
            await world.until(lambda: len(world.ready()) >= 6, 60.0)
            panicking = world.loop.status().pools[0].last_decision.panicking
            assert panicking
            for _ in range(200):
                await asyncio.sleep(1.0)
                assert len(world.ready()) >= 6
            assert not world.loop.status().pools[0].last_decision.panicking
            stop.set()
            await asyncio.gather(*users)
            assert world.cut == 0

    run_virtual(story())


def test_trap_8_pending_replicas_count_and_no_cascade_is_started() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=120.0)
        pool = process_pool(target_inflight_tokens=TOKENS_EACH * 10, max_replicas=50)
        async with World([pool], QUICK, backend) as world:
            tasks = world.burst(30, 1.0)
            await world.until(lambda: world.answered == 30, 300.0)
            await asyncio.gather(*tasks)
            assert len(backend.started) == 3

    run_virtual(story())


def test_trap_10_slow_starter_is_not_killed_by_health_checks() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=580.0)
        async with World([process_pool()], QUICK, backend) as world:
            tasks = world.burst(1, 1.0)
            await world.until(lambda: world.answered == 1, 700.0)
            await asyncio.gather(*tasks)
            assert len(backend.started) == 1
            assert backend.stopped == []

    run_virtual(story())


def test_trap_10_only_the_start_timeout_ends_a_start() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=10_000.0)
        async with World([process_pool(start_timeout_s=50.0)], QUICK, backend) as world:
            world.burst(1, 1.0)
            took_s = await world.until(lambda: len(backend.stopped) == 1, 100.0)
            assert took_s >= 50.0
            pool = world.loop.status().pools[0]
            assert pool.error is not None
            assert "not ready after 50 s" in pool.error
            assert "loading weights" in pool.error

    run_virtual(story())


def test_trap_11_replica_is_drained_before_it_is_stopped() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=1.0)
        pool = process_pool(target_inflight_tokens=TOKENS_EACH)
        async with World([pool], QUICK, backend) as world:
            long = world.burst(2, 15.0)
            await world.until(lambda: len(world.ready()) == 2, 30.0)
            extra = world.burst(2, 15.0)
            await asyncio.sleep(1.0)
            world.loop.set_replicas("m", 1)
            await world.until(lambda: any(v.state is ReplicaState.DRAINING for v in world.views))
            assert backend.stopped == []
            await asyncio.gather(*long, *extra)
            assert world.cut == 0
            assert world.answered == 4
            await world.until(lambda: len(backend.stopped) == 1, 5.0)

    run_virtual(story())


def test_trap_11_unknown_load_counts_as_not_drained_until_the_limit() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=1.0)
        async with World([process_pool()], QUICK, backend) as world:
            world.loop.signal_wake("m")
            await world.until(lambda: len(world.ready()) == 1, 5.0)
            (replica,) = world.ready()
            world.observe_error = OSError("the workers do not answer")
            await world.loop.drain(replica.id)
            took_s = await world.until(lambda: replica.id in backend.stopped, 60.0)
            assert took_s >= QUICK.drain_s

    run_virtual(story())
