"""What operators ask of the control loop: scale, sleep, wake, drain; and static pools."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from fake_fleet import FakeBackend, World, process_pool
from fake_models import FakePreparer
from virtual_time import now, run_virtual

from autoscaler.backends.base import BackendError, Unsupported
from autoscaler.control.disabled_pools import DisabledPools
from autoscaler.policy.lifecycle import State
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.types import NotKnown, ScaleReason
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


def test_draining_replica_is_called_back_when_demand_returns() -> None:
    async def story() -> None:
        pool = process_pool(target_inflight_tokens=100, max_replicas=2)
        async with World([pool], QUICK, FakeBackend(start_s=1.0)) as world:
            tasks = world.burst(2, 30.0)
            await world.until(lambda: len(world.ready()) == 2)
            world.loop.set_replicas("m", 1)
            await world.until(lambda: len(world.ready()) == 1)
            world.loop.set_replicas("m", None)
            await world.until(lambda: len(world.ready()) == 2, 5.0)
            assert len(world.backend.started) == 2
            await asyncio.gather(*tasks)

    run_virtual(story())


def test_scale_sets_the_number_and_auto_gives_it_back() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            report = world.loop.set_replicas("m", 3)
            assert report.override == 3
            await world.until(lambda: len(world.ready()) == 3)
            await asyncio.sleep(1_000.0)
            assert len(world.ready()) == 3
            world.loop.set_replicas("m", None)
            await world.until(lambda: not world.views)

    run_virtual(story())


def test_scale_to_zero_waits_for_streams_and_requests_still_wake() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=1)], QUICK) as world:
            tasks = world.burst(1, 60.0)
            await world.until(lambda: len(world.ready()) == 1)
            await asyncio.sleep(5.0)
            world.loop.set_replicas("m", 0)
            await asyncio.sleep(40.0)
            assert len(world.ready()) == 1
            decision = world.loop.status().pools[0].last_decision
            assert decision is not None
            assert decision.reason is ScaleReason.OVERRIDE_WAITS
            await asyncio.gather(*tasks)
            await world.until(lambda: not world.views, 5.0)
            await asyncio.sleep(100.0)
            assert len(world.backend.started) == 1
            await asyncio.gather(*world.burst(1, 1.0))
            assert (world.answered, world.cut) == (2, 0)

    run_virtual(story())


@pytest.mark.parametrize(("replicas", "error"), [(-1, ValueError), (9, ValueError)])
def test_scale_refuses_what_cannot_be(replicas: int, error: type[Exception]) -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            with pytest.raises(error, match="0 to 8") as refused:
                world.loop.set_replicas("m", replicas)
            assert replicas < 0 or "`--set pools.m.max_replicas=9`" in str(refused.value)
            with pytest.raises(NotKnown):
                world.loop.set_replicas("unknown", 1)
            with pytest.raises(NotKnown):
                world.loop.decisions("unknown")
            with pytest.raises(NotKnown):
                await world.loop.drain("unknown")
            with pytest.raises(NotKnown):
                await world.loop.wake("unknown")
            world.loop.signal_wake("unknown")

    run_virtual(story())


def test_sleeping_pool_stays_asleep_and_is_woken_by_demand_not_started_anew() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=30.0, wake_s=2.0)
        async with World([process_pool(min_replicas=1)], QUICK, backend) as world:
            await world.until(lambda: len(world.ready()) == 1)
            report = await world.loop.sleep("m", 1)
            assert report.sleeping == 1
            assert backend.engines["m-1"].asleep
            await asyncio.sleep(1_000.0)
            assert world.loop.status().pools[0].sleeping == 1
            began_s = now()
            await asyncio.gather(*world.burst(10, 1.0))
            assert now() - began_s < 10.0
            assert backend.started == ["m-1"]
            assert not backend.engines["m-1"].asleep
            # Measured, the wake of a sleeping pool is known to be shorter than a start.
            await world.loop.sleep("m", 1)
            await asyncio.sleep(1.0)
            assert world.etas["m"] == pytest.approx(2.0, abs=0.2)

    run_virtual(story())


def test_sleep_drains_first_and_a_request_calls_it_off() -> None:
    async def story() -> None:
        async with World([process_pool(max_replicas=1)], QUICK) as world:
            (stream,) = world.burst(1, 10.0)
            await world.until(lambda: sum(world.inflight.values()) == 1)
            asleep = asyncio.create_task(world.loop.sleep("m", 1))
            await asyncio.sleep(3.0)
            assert not world.backend.engines["m-1"].asleep
            await stream
            await asleep
            assert world.backend.engines["m-1"].asleep
            await asyncio.gather(*world.burst(1, 1.0))
            assert (world.answered, world.cut) == (2, 0)

    run_virtual(story())


def test_sleep_is_cancelled_rather_than_an_answer_cut() -> None:
    async def story() -> None:
        async with World([process_pool(max_replicas=1)], QUICK) as world:
            (stream,) = world.burst(1, 100.0)
            await world.until(lambda: sum(world.inflight.values()) == 1)
            with pytest.raises(BackendError, match="still has requests"):
                await world.loop.sleep("m", 1)
            await stream
            assert (world.answered, world.cut) == (1, 0)
            assert world.backend.started == ["m-1"]

    run_virtual(story())


def test_sleep_that_is_not_supported_is_said_and_changes_nothing() -> None:
    async def story() -> None:
        backend = FakeBackend(can_sleep=False)
        async with World([process_pool(min_replicas=1)], QUICK, backend) as world:
            with pytest.raises(ValueError, match="no ready replica"):
                await world.loop.sleep("m")
            await world.until(lambda: len(world.ready()) == 1)
            with pytest.raises(ValueError, match="1 or 2"):
                await world.loop.sleep("m", 3)
            with pytest.raises(Unsupported):
                await world.loop.sleep("m")
            await asyncio.sleep(100.0)
            assert len(world.ready()) == 1
            assert backend.started == ["m-1"]

    run_virtual(story())


def test_wake_by_an_operator() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            await world.loop.wake("m")
            await world.until(lambda: len(world.ready()) == 1)
            await world.loop.sleep("m", 2)
            await world.loop.wake("m")
            await world.until(lambda: len(world.ready()) == 1, 10.0)
            assert world.backend.started == ["m-1"]
            world.loop.set_replicas("m", 0)
            with pytest.raises(ValueError, match="auto"):
                await world.loop.wake("m")

    run_virtual(story())


def test_drain_by_an_operator_stops_one_replica() -> None:
    async def story() -> None:
        async with World([process_pool(min_replicas=2)], QUICK) as world:
            await world.until(lambda: len(world.ready()) == 2)
            await world.loop.drain("m-1")
            assert next(v for v in world.views if v.id == "m-1").state is ReplicaState.DRAINING
            await world.until(lambda: world.backend.stopped == ["m-1"], 10.0)
            await world.until(lambda: {view.id for view in world.ready()} == {"m-2", "m-3"})

    run_virtual(story())


def static_pool(
    urls: Sequence[str] = ("http://127.0.0.1:1", "http://127.0.0.1:2"), **fields: object
) -> PoolSettings:
    given = {"name": "s", "backend": "static", "static": {"urls": tuple(urls)}, **fields}
    return PoolSettings.model_validate(given)


def test_static_servers_are_watched_never_stopped_and_keep_their_number() -> None:
    async def story() -> None:
        backend = FakeBackend(owns_replicas=False, start_s=3.0)
        async with World([static_pool()], QUICK, backend) as world:
            await asyncio.sleep(1.0)
            assert {view.state for view in world.views} == {ReplicaState.UNHEALTHY}
            await world.until(lambda: len(world.ready("s")) == 2)
            backend.engines["s-1"].healthy = False
            await asyncio.sleep(2_000.0)
            assert [view.id for view in world.ready("s")] == ["s-2"]
            assert world.ready("s")[0].url == "http://127.0.0.1:2"
            backend.engines["s-1"].healthy = True
            await world.until(lambda: len(world.ready("s")) == 2, 10.0)
            assert backend.stopped == []
            with pytest.raises(ValueError, match="static"):
                world.loop.set_replicas("s", 1)
            with pytest.raises(Unsupported):
                await world.loop.sleep("s")
            decision = world.loop.status().pools[0].last_decision
            assert decision is not None
            assert (decision.desired, decision.reason) == (2, ScaleReason.STATIC)
        urls = ["http://127.0.0.1:1"]
        async with World([static_pool(static={"urls": urls})], QUICK, backend) as world:
            await asyncio.sleep(1.0)
            decision = world.loop.status().pools[0].last_decision
            assert decision is not None
            assert (decision.desired, decision.reason) == (1, ScaleReason.STATIC)

    run_virtual(story())


def test_static_servers_models_are_not_prepared() -> None:
    """What brings models near knows only pools whose engines are ours to start."""

    async def story() -> None:
        backend = FakeBackend(owns_replicas=False, start_s=0.0)
        preparer = FakePreparer()
        async with World([static_pool()], QUICK, backend, preparer=preparer) as world:
            await world.until(lambda: len(world.ready("s")) == 2)
            await asyncio.sleep(1_000.0)
            assert len(world.ready("s")) == 2
        assert (preparer.prepared, preparer.moved, preparer.refreshes) == ([], [], 0)

    run_virtual(story())


def test_static_server_can_be_taken_out_of_use_and_back() -> None:
    async def story() -> None:
        backend = FakeBackend(owns_replicas=False, start_s=0.0)
        async with World([static_pool()], QUICK, backend) as world:
            await world.until(lambda: len(world.ready("s")) == 2)
            await world.loop.drain("s-1")
            await asyncio.sleep(1_000.0)
            assert {view.id: view.state for view in world.views} == {
                "s-1": ReplicaState.DRAINING,
                "s-2": ReplicaState.READY,
            }
            await world.loop.wake("s")
            await world.until(lambda: len(world.ready("s")) == 2, 5.0)
            assert backend.stopped == []

    run_virtual(story())


def test_failed_wake_is_replaced_by_a_start() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK) as world:
            await world.loop.wake("m")
            await world.until(lambda: len(world.ready()) == 1)
            await world.loop.sleep("m")
            world.backend.engines["m-1"].alive = True
            world.backend.can_wake = False
            await asyncio.gather(*world.burst(1, 1.0))
            assert world.answered == 1
            assert world.backend.started == ["m-1", "m-2"]
            assert State.FAILED.value in {
                one.state.value for one in world.loop.status().pools[0].replicas
            }

    run_virtual(story())


def test_a_disabled_pool_finishes_what_it_has_and_does_not_wake() -> None:
    async def story() -> None:
        kept = DisabledPools()
        pool = process_pool(min_replicas=1, aliases=("other",))
        async with World([pool], QUICK, disabled_pools=kept) as world:
            tasks = world.burst(1, 15.0)
            await world.until(lambda: len(world.ready()) == 1)
            await asyncio.sleep(1.0)
            report = await world.loop.disable("other")  # by its alias
            assert (report.name, report.disabled) == ("m", True)
            await asyncio.gather(*world.burst(3, 1.0))
            assert world.refused == 3
            await asyncio.gather(*tasks)
            assert (world.answered, world.cut) == (1, 0)
            await world.until(lambda: not world.views, 30.0)
            decision = world.loop.decisions("m")[-1].decision
            assert (decision.desired, decision.reason) == (0, ScaleReason.DISABLED)
            with pytest.raises(ValueError, match="disabled"):
                await world.loop.wake("m")
            await asyncio.gather(*world.burst(3, 1.0))
            await asyncio.sleep(100.0)
            assert not world.views
        async with World([pool], QUICK, disabled_pools=kept) as world:  # after a restart
            await asyncio.sleep(50.0)
            assert not world.views
            assert not (await world.loop.enable("m")).disabled
            await world.until(lambda: len(world.ready()) == 1, 30.0)
            await asyncio.gather(*world.burst(2, 1.0))
            assert (world.answered, world.refused) == (2, 0)
        assert "m" not in kept

    run_virtual(story())


@pytest.mark.parametrize("when", ["starting", "sleeping"])
def test_a_replica_that_is_not_serving_ends_when_its_pool_is_disabled(when: str) -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=60.0 if when == "starting" else 1.0)
        pool = process_pool(tiers={"sleeping_s": 3_000})
        async with World([pool], QUICK, backend) as world:
            (task,) = world.burst(1, 1.0)
            if when == "starting":
                await asyncio.sleep(10.0)
                task.cancel()
            else:
                await task
                await world.until(lambda: [v.state for v in world.views] == [ReplicaState.SLEEPING])
            await world.loop.disable("m")
            await world.until(lambda: not world.views, 10.0)
            assert backend.living() == []

    run_virtual(story())


def test_a_static_pool_that_is_disabled_keeps_its_servers() -> None:
    async def story() -> None:
        async with World([static_pool()], QUICK, FakeBackend(owns_replicas=False)) as world:
            await world.until(lambda: len(world.ready("s")) > 0)
            await world.loop.disable("s")
            await asyncio.sleep(30.0)
            assert world.ready("s")
            assert world.seen["s"].disabled
            await world.loop.enable("s")
            assert not world.seen["s"].disabled

    run_virtual(story())


class UnkeptPools(DisabledPools):
    async def save(self) -> None:
        raise OSError("no space left on the device")


def test_a_pool_is_disabled_where_the_disk_is_full_too() -> None:
    async def story() -> None:
        async with World([process_pool()], QUICK, disabled_pools=UnkeptPools()) as world:
            assert (await world.loop.disable("m")).disabled
            assert world.seen["m"].disabled
            assert world.loop.status().errors["disabled pools"] == 1

    run_virtual(story())


def test_verbs_take_an_alias_for_a_pool() -> None:
    async def story() -> None:
        pool = process_pool(aliases=("other",))
        async with World([pool], QUICK) as world:
            assert world.loop.set_replicas("other", 1).name == "m"
            await world.until(lambda: len(world.ready()) == 1)
            assert world.loop.decisions("other")
            assert (await world.loop.sleep("other")).sleeping == 1
            world.loop.set_replicas("other", None)
            assert (await world.loop.wake("other")).name == "m"
            for unknown in ("none", ""):
                with pytest.raises(NotKnown):
                    world.loop.set_replicas(unknown, 1)

    run_virtual(story())
