"""The control loop's stories on virtual time: waking, crashing, sleeping, obeying, closing."""

from __future__ import annotations

import asyncio

import pytest
from fake_fleet import FakeBackend, World, process_pool
from virtual_time import now, run_virtual

from autoscaler.backends.base import Probe, StateInUse
from autoscaler.control import actuator
from autoscaler.settings import AutoscalerSettings
from autoscaler.types import ScaleReason
from router.types import ReplicaState

QUICK = AutoscalerSettings(
    idle_to_zero_s=30.0,
    scale_down_delay_s=10.0,
    stable_window_s=20.0,
    panic_window_s=2.0,
    drain_s=20.0,
    backoff_initial_s=1.0,
    backoff_max_s=8.0,
    backoff_reset_s=60.0,
    start_timeout_s=120.0,
)


def test_from_zero_to_one_happens_once_per_burst() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=40.0)
        async with World([process_pool()], QUICK, backend) as world:
            await asyncio.gather(*world.burst(200, 1.0))
            assert backend.started == ["m-1"] + backend.started[1:]
            assert world.answered == 200
        assert sum(call == ("start", "m-1") for call in backend.calls) == 1

    run_virtual(story())


def test_burst_for_one_replica_starts_one() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=40.0)
        async with World([process_pool(target_inflight_tokens=100_000)], QUICK, backend) as world:
            await asyncio.gather(*world.burst(200, 1.0))
            assert backend.started == ["m-1"]
            assert world.answered == 200

    run_virtual(story())


def test_a_held_request_is_acted_on_at_once_not_at_the_next_tick() -> None:
    async def story() -> None:
        slow = QUICK.model_copy(update={"tick_s": 60.0})
        async with World([process_pool()], slow) as world:
            await asyncio.sleep(5.0)
            began_s = now()
            world.burst(1, 0.1)
            await world.until(lambda: bool(world.backend.started))
            assert now() - began_s < 0.2

    run_virtual(story())


def test_pool_goes_to_zero_when_idle_and_comes_back() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            for round_number in (1, 2):
                await asyncio.gather(*world.burst(1, 1.0))
                idle_from_s = now()
                await world.until(lambda: not world.views)
                assert now() - idle_from_s >= QUICK.idle_to_zero_s
                assert len(world.backend.started) == round_number
                reasons = [one.decision.reason for one in world.loop.decisions("m")]
                assert ScaleReason.IDLE_TO_ZERO in reasons

    run_virtual(story())


def test_pool_never_goes_to_zero_while_a_stream_runs() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            (stream,) = world.burst(1, 3_000.0)
            await asyncio.sleep(2_900.0)
            assert len(world.ready()) == 1
            await stream
            assert world.cut == 0

    run_virtual(story())


def test_minimum_is_kept_and_maximum_not_passed() -> None:
    async def story() -> None:
        pool = process_pool(min_replicas=2, max_replicas=4, target_inflight_tokens=100)
        async with World([pool], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 2)
            tasks = world.burst(40, 30.0)
            await world.until(lambda: len(world.ready()) == 4)
            await asyncio.gather(*tasks)
            await asyncio.sleep(500.0)
            assert len(world.ready()) == 2
            assert len(world.backend.started) == 4

    run_virtual(story())


def test_wake_time_is_unknown_until_measured_then_the_longest_of_the_newest() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK, FakeBackend(start_s=7.0)) as world:
            assert world.etas == {"m": None}
            await asyncio.gather(*world.burst(1, 1.0))
            await asyncio.sleep(0.5)
            eta_s = world.etas["m"]
            assert eta_s is not None
            assert 7.0 <= eta_s < 8.0

    run_virtual(story())


def test_crash_loop_backs_off_says_why_and_goes_on_at_the_bounded_rate() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=10.0, dies_after_s=2.0)
        async with World([process_pool(min_replicas=1)], QUICK, backend) as world:
            await asyncio.sleep(600.0)
            # 2 s of life and at most 8 s of pause: about one start in ten seconds, for ever.
            assert 50 <= len(backend.started) <= 70
            pool = world.loop.status().pools[0]
            assert pool.failures == len(backend.stopped)
            assert pool.error == "it died: out of luck"
            assert pool.retry_at_s is not None
            failed = [one for one in pool.replicas if one.state is ReplicaState.FAILED]
            assert len(failed) == QUICK.failed_kept
            # Mended: it comes up by itself, and in time the failures are forgotten.
            backend.dies_after_s = None
            await world.until(lambda: len(world.ready()) == 1, 30.0)
            await asyncio.sleep(QUICK.backoff_reset_s + 2.0)
            pool = world.loop.status().pools[0]
            assert (pool.failures, pool.error) == (0, None)

    run_virtual(story())


def test_clients_are_told_how_often_an_engine_did_not_come_up_and_why() -> None:
    """Several that are started together and fail are one failure."""

    async def story() -> None:
        backend = FakeBackend(start_s=10.0, dies_after_s=2.0)
        async with World([process_pool(min_replicas=3)], QUICK, backend) as world:
            await world.until(lambda: len(backend.stopped) >= 3)
            assert (world.seen["m"].failed_starts, world.seen["m"].cause) == (
                1,
                "it died: out of luck",
            )
            await world.until(lambda: world.seen["m"].failed_starts == 3)
            backend.dies_after_s = None
            await world.until(lambda: len(world.ready()) >= 1, 60.0)
            assert (world.seen["m"].failed_starts, world.seen["m"].cause) == (0, "")

    run_virtual(story())


def test_crash_loop_of_many_replicas_starts_one_at_a_time() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=10.0, dies_after_s=2.0)
        async with World([process_pool(min_replicas=6)], QUICK, backend) as world:
            await asyncio.sleep(20.0)
            began = len(backend.started)
            await asyncio.sleep(200.0)
            assert len(backend.started) - began <= 25
            del world

    run_virtual(story())


def test_crash_loop_ends_without_requests() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=10.0, dies_after_s=2.0)
        async with World([process_pool()], QUICK, backend) as world:
            (visitor,) = world.burst(1, 1.0)
            await asyncio.sleep(20.0)
            visitor.cancel()
            await asyncio.sleep(QUICK.idle_to_zero_s + 20.0)
            quiet = len(backend.started)
            await asyncio.sleep(300.0)
            assert len(backend.started) == quiet

    run_virtual(story())


def test_replica_that_dies_is_replaced() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.backend.engines["m-1"].alive = False
            await world.until(lambda: [view.id for view in world.ready()] == ["m-2"], 30.0)

    run_virtual(story())


def test_unhealthy_replica_gets_nothing_and_comes_back() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.backend.engines["m-1"].healthy = False
            await world.until(lambda: not world.ready(), 30.0)
            assert world.views[0].state is ReplicaState.UNHEALTHY
            world.backend.engines["m-1"].healthy = True
            await world.until(lambda: len(world.ready()) == 1, 10.0)
            assert world.backend.started == ["m-1"]

    run_virtual(story())


def test_unhealthy_replica_is_replaced_in_the_end() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.backend.engines["m-1"].healthy = False
            took_s = await world.until(lambda: "m-1" in world.backend.stopped, 200.0)
            assert took_s >= QUICK.unhealthy_restart_s
            await world.until(lambda: [view.id for view in world.ready()] == ["m-2"])

    run_virtual(story())


def test_unknown_health_changes_nothing() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.backend.engines["m-1"].healthy = None
            await asyncio.sleep(300.0)
            world.backend.probe_error = OSError("no more file descriptors")
            await asyncio.sleep(300.0)
            assert len(world.ready()) == 1
            assert world.loop.status().errors["probe of m"] > 10

    run_virtual(story())


def test_starts_are_counted_by_what_became_of_them() -> None:
    def starts(world: World) -> tuple[int, int, int]:
        """(ready, failed, failed after it had been ready)."""
        pool = world.loop.status().pools[0]
        times = [one.start_times for one in pool.tiers if one.start_times is not None]
        failed = sum(one.failed_starts for one in pool.tiers)
        return sum(sum(one.counts) for one in times), failed, pool.crashes

    async def story() -> None:
        backend = FakeBackend(start_s=10.0, dies_after_s=2.0)
        async with World([process_pool(min_replicas=1)], QUICK, backend) as world:
            await asyncio.sleep(100.0)
            failures = world.loop.status().pools[0].failures
            assert failures > 3
            assert starts(world) == (0, failures, 0)
            backend.dies_after_s = None
            await world.until(lambda: len(world.ready()) == 1, 30.0)
            failures = starts(world)[1]
            assert starts(world) == (1, failures, 0)
            backend.living()[0].alive = False
            await world.until(lambda: not world.ready(), 60.0)
            await world.until(lambda: len(world.ready()) == 1, 30.0)
            assert starts(world) == (2, failures, 1)
            (times,) = [
                one.start_times
                for one in world.loop.status().pools[0].tiers
                if one.start_times is not None
            ]
            assert 20.0 <= times.sum_s < 24.0

    run_virtual(story())


def test_no_room_is_waited_for_without_counting_as_a_failure() -> None:
    async def story() -> None:
        backend = FakeBackend(room=1)
        pools = [process_pool(name="a"), process_pool(name="b")]
        async with World(pools, QUICK, backend) as world:
            await asyncio.gather(*world.burst(1, 1.0, "a"))
            task = world.burst(1, 1.0, "b")
            await asyncio.sleep(5.0)
            waiting = world.loop.status().pools[1]
            assert waiting.failures == 0
            assert waiting.replicas[0].error == "all is taken"
            await asyncio.gather(*task)
            assert world.answered == 2

    run_virtual(story())


@pytest.mark.parametrize("where", ["start", "stop", "observe", "publish"])
def test_loop_survives_any_exception(where: str) -> None:
    async def story() -> None:
        world = World([process_pool(min_replicas=1)], QUICK)
        error = RuntimeError("a bug in a backend")
        async with world:
            await asyncio.sleep(1.0)
            if where == "start":
                world.backend.start_error = error
                await world.loop.drain("m-1")
            elif where == "stop":
                await world.until(lambda: len(world.ready()) == 1)
                world.backend.stop_error = error
                await world.loop.drain("m-1")
            elif where == "observe":
                world.observe_error = error
            else:
                world.publish_error = error
            await asyncio.sleep(100.0)
            report = world.loop.status()
            assert sum(report.errors.values()) > 0
            assert report.last_error is not None
            assert "a bug in a backend" in report.last_error
            tries = len(world.backend.calls)
            assert tries < 60
            world.backend.start_error = world.backend.stop_error = None
            world.observe_error = world.publish_error = None
            await world.until(lambda: len(world.ready()) == 1, 60.0)
        assert world.backend.living() == []

    run_virtual(story())


def test_close_drains_then_stops_everything_and_starts_nothing() -> None:
    async def story() -> None:
        world = World([process_pool(min_replicas=3)], QUICK)
        running = asyncio.create_task(world.loop.run())
        await world.until(lambda: len(world.ready()) == 3)
        tasks = world.burst(3, 8.0)
        await asyncio.sleep(1.0)
        began_s = now()
        await world.loop.close()
        assert 6.0 < now() - began_s < QUICK.drain_s
        await running
        await asyncio.gather(*tasks)
        assert (world.answered, world.cut) == (3, 0)
        assert world.backend.living() == []
        assert world.backend.closed
        assert len(world.backend.started) == 3
        assert world.views == ()

    run_virtual(story())


def test_close_is_bounded_even_when_nothing_ends() -> None:
    async def story() -> None:
        backend = FakeBackend(stop_s=1e9)
        world = World([process_pool(min_replicas=2)], QUICK, backend)
        running = asyncio.create_task(world.loop.run())
        await world.until(lambda: len(world.ready()) == 2)
        world.burst(2, 1e6)
        began_s = now()
        await world.loop.close(drain_s=5.0)
        assert now() - began_s < 5.0 + 2 * (QUICK.terminate_s + QUICK.call_timeout_s) + 2.0
        await running

    run_virtual(story())


def test_close_while_starting() -> None:
    async def story() -> None:
        world = World([process_pool(min_replicas=2)], QUICK, FakeBackend(start_s=1_000.0))
        running = asyncio.create_task(world.loop.run())
        await asyncio.sleep(5.0)
        await world.loop.close()
        await running
        assert len(world.backend.stopped) == 2

    run_virtual(story())


def test_close_does_not_wait_for_a_start_that_waits() -> None:
    async def story() -> None:
        backend = FakeBackend(start_call_s=50.0)
        world = World([process_pool(min_replicas=2)], QUICK, backend)
        running = asyncio.create_task(world.loop.run())
        await asyncio.sleep(5.0)
        began_s = now()
        await world.loop.close()
        assert now() - began_s < 5.0
        await running
        assert [call for call, _ in backend.calls] == ["start", "start", "stop", "stop"]
        assert backend.engines == {}

    run_virtual(story())


def test_nothing_is_started_beside_another_tidegate_that_lives() -> None:
    async def story() -> None:
        backend = FakeBackend(adopt_error=StateInUse("it belongs to another"))
        world = World([process_pool(min_replicas=1)], QUICK, backend)
        with pytest.raises(StateInUse):
            await world.loop.run()
        assert backend.started == []
        await world.loop.close()

    run_virtual(story())


def test_pools_with_like_names_have_different_replica_ids() -> None:
    async def story() -> None:
        pools = [process_pool(name=name, min_replicas=1) for name in ("a/b", "a-b")]
        async with World(pools, QUICK) as world:
            await world.until(lambda: len(world.views) == 2)
            assert len({view.id for view in world.views}) == 2
            assert all("/" not in view.id for view in world.views)

    run_virtual(story())


def test_what_the_data_path_finds_dead_is_looked_at_now() -> None:
    async def story() -> None:
        slow = QUICK.model_copy(update={"health_interval_s": 500.0})
        async with World([process_pool(min_replicas=1)], slow) as world:
            await world.until(lambda: len(world.ready()) == 1)
            world.backend.engines["m-1"].alive = False
            world.loop.probe_now("unknown")
            world.loop.probe_now("m-1")
            world.loop.probe_now("m-1")
            assert await world.until(lambda: not world.ready(), 5.0) < 1.0
            await world.until(lambda: [view.id for view in world.ready()] == ["m-2"], 30.0)
            world.loop.probe_now("m-2")
            await asyncio.sleep(1.0)
            assert len(world.ready()) == 1

    run_virtual(story())


def test_many_replicas_are_checked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(actuator, "MAX_PROBES_PER_S", 4)
        often = QUICK.model_copy(update={"health_interval_s": 0.1})
        pool = process_pool(min_replicas=20, max_replicas=20)
        async with World([pool], often) as world:
            await world.until(lambda: len(world.ready()) == 20, 60.0)
            await asyncio.sleep(10.0)
            probe, asked = world.backend.probe, 0

            async def counted(replica_id: str) -> Probe:
                nonlocal asked
                asked += 1
                return await probe(replica_id)

            monkeypatch.setattr(world.backend, "probe", counted)
            await asyncio.sleep(50.0)
            assert 0.9 * 200 <= asked <= 1.1 * 200

    run_virtual(story())


def test_times_that_are_shown_are_on_the_loops_clock() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 1)
            await asyncio.sleep(100.0)
            report = world.loop.status()
            assert report.at_s == now()
            assert 99.0 < report.at_s - report.pools[0].replicas[0].since_s < 101.0
            past = world.loop.decisions("m")[-1]
            assert past.first_at_s <= past.last_at_s <= report.at_s
            assert report.decisions["m", past.decision.reason] >= past.count

    run_virtual(story())
