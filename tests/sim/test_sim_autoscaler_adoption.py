"""A control loop that takes over the replicas of an earlier one, on virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
from fake_fleet import FakeBackend, World, process_pool
from fake_models import FakePreparer, NullPreparer
from virtual_time import run_virtual

from autoscaler.backends.base import AdoptedReplica, ReplicaSpec
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.tiers.preparer import Report
from router.types import ReplicaState

QUICK = AutoscalerSettings(
    idle_to_zero_s=60.0, scale_down_delay_s=20.0, stable_window_s=20.0, panic_window_s=2.0
)


async def leave(pool: PoolSettings, replicas: int = 1) -> FakeBackend:
    """A backend with replicas of a pool whose control loop is gone."""
    backend = FakeBackend(start_s=5.0)
    async with World([pool], QUICK, backend) as world:
        world.loop.set_replicas(pool.name, replicas)
        await world.until(lambda: len(world.ready(pool.name)) == replicas)
        await world.loop.close(keep=True)
    assert len(backend.engines) == replicas
    return backend


@asynccontextmanager
async def adopting(
    left: FakeBackend, *pools: PoolSettings, **fields: Any
) -> AsyncIterator[tuple[World, FakeBackend]]:
    """The next control loop, with what was left."""
    backend = FakeBackend(start_s=5.0, engines=left.engines)
    async with World(list(pools), QUICK, backend, **fields) as world:
        yield world, backend


def test_replicas_are_ready_at_once_and_their_number_stays_for_the_delay() -> None:
    async def story() -> None:
        left = await leave(process_pool(), 3)
        async with adopting(left, process_pool()) as (world, backend):
            assert {one.id for one in world.ready()} == {"m-1", "m-2", "m-3"}
            await asyncio.sleep(19.0)
            assert len(world.ready()) == 3
            await world.until(lambda: len(backend.stopped) == 2)
            assert (len(world.ready()), backend.started) == (1, [])
            world.loop.set_replicas("m", 2)
            await world.until(lambda: len(world.ready()) == 2)
            assert backend.started == ["m-4"]

    run_virtual(story())


def test_a_replica_that_does_not_answer_is_unhealthy_until_it_does() -> None:
    async def story() -> None:
        left = await leave(process_pool())
        left.engines["m-1"].healthy = False
        async with adopting(left, process_pool()) as (world, backend):
            assert [one.state for one in world.views] == [ReplicaState.UNHEALTHY]
            left.engines["m-1"].healthy = True
            await world.until(lambda: len(world.ready()) == 1)
            assert (backend.started, backend.stopped) == ([], [])

    run_virtual(story())


def test_a_pool_is_not_sent_to_zero_at_once_but_after_its_time() -> None:
    async def story() -> None:
        left = await leave(process_pool())
        async with adopting(left, process_pool()) as (world, backend):
            await asyncio.sleep(59.0)
            assert len(world.ready()) == 1
            await world.until(lambda: not world.views)
            assert backend.stopped == ["m-1"]

    run_virtual(story())


@pytest.mark.parametrize("fields", [{}, {"tiers": {"sleeping_s": 600}}])
def test_a_replica_with_requests_of_the_earlier_workers_is_neither_stopped_nor_put_to_sleep(
    fields: dict[str, Any],
) -> None:
    """This loop's own workers know nothing of them, and say that it has none."""

    async def story() -> None:
        pool = process_pool(idle_to_zero_s=1.0, **fields)
        left = await leave(pool)
        async with adopting(left, pool, earlier_drain_s=30.0) as (world, backend):
            before = list(backend.calls)
            await asyncio.sleep(29.0)
            assert backend.calls == before
            await world.until(lambda: backend.calls != before, 5.0)
            assert backend.started == []

    run_virtual(story())


def test_a_request_is_answered_without_a_start() -> None:
    async def story() -> None:
        left = await leave(process_pool())
        async with adopting(left, process_pool()) as (world, backend):
            await world.request(1.0)
            assert (world.answered, backend.started) == (1, [])

    run_virtual(story())


def test_a_sleeping_replica_is_woken_not_started() -> None:
    async def story() -> None:
        pool = process_pool(tiers={"sleeping_s": 600})
        left = await leave(pool)
        left.engines["m-1"].asleep = True
        async with adopting(left, pool) as (world, backend):
            assert world.ready() == []
            await world.request(1.0)
            assert (world.answered, backend.started) == (1, [])
            assert backend.calls.count(("wake", "m-1")) == 1

    run_virtual(story())


def test_what_a_pool_would_start_otherwise_or_too_often_goes() -> None:
    async def story() -> None:
        left = await leave(process_pool(), 2)
        async with adopting(left, process_pool(engine_args=("--new",))) as (world, backend):
            assert world.views == ()
            assert backend.stopped == ["m-1", "m-2"]
        left = await leave(process_pool(), 3)
        async with adopting(left, process_pool(max_replicas=1)) as (world, backend):
            await world.until(lambda: len(backend.stopped) == 2)
            assert (len(world.ready()), backend.started) == (1, [])
        left = await leave(process_pool(name="gone"))
        async with adopting(left, process_pool()) as (world, backend):
            assert backend.stopped == ["gone-1"]

    run_virtual(story())


class OtherRevision(NullPreparer):
    """The cache has another revision of every model."""

    def __init__(self) -> None:
        self.held: list[str] = []

    async def prepare(self, spec: ReplicaSpec, report: Report) -> ReplicaSpec:
        self.held.append(spec.id)
        return replace(spec, pool=spec.pool.model_copy(update={"model": "/models/new"}))


def test_a_replica_of_another_revision_is_replaced_a_new_one_first() -> None:
    async def story() -> None:
        left = await leave(process_pool(min_replicas=1))
        preparer = OtherRevision()
        pool = process_pool(min_replicas=1)
        async with adopting(left, pool, preparer=preparer) as (world, backend):
            await world.until(lambda: "m-1" not in {one.id for one in world.ready()})
            assert [one.id for one in world.ready()] == ["m-2"]
            await world.until(lambda: backend.stopped == ["m-1"])
            assert preparer.held == ["m-1", "m-2"]

    run_virtual(story())


class SlowAdoption(FakeBackend):
    """Takes a second to take over what there is."""

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        found = await super().adopt(wanted)
        await asyncio.sleep(1.0)
        return found


def test_a_reload_during_the_adoption_replaces_what_was_adopted() -> None:
    async def story() -> None:
        pool = process_pool(min_replicas=1)
        left = await leave(pool)
        backend = SlowAdoption(start_s=5.0, engines=left.engines)
        world = World([pool], QUICK, backend)
        opening = asyncio.create_task(world.loop.open())
        await asyncio.sleep(0.5)
        world.set_pools(process_pool(min_replicas=1, engine_args=["--seed", "2"]))
        await opening
        async with world:
            assert [one.id for one in world.ready()] == ["m-1"]
            await world.until(lambda: [one.id for one in world.ready()] == ["m-2"])

    run_virtual(story())


def test_the_model_of_an_adopted_replica_is_held_though_its_pool_became_static_meanwhile() -> None:
    async def story() -> None:
        pool, preparer = process_pool(min_replicas=1), FakePreparer()
        left = await leave(pool)
        backend = SlowAdoption(start_s=5.0, engines=left.engines)
        outside = FakeBackend(owns_replicas=False, start_s=10.0)
        world = World([pool], QUICK, backend, more_backends={"static": outside}, preparer=preparer)
        opening = asyncio.create_task(world.loop.open())
        await asyncio.sleep(0.5)
        urls = {"urls": ["http://127.0.0.1:1"]}
        world.set_pools(PoolSettings(name="m", backend="static", static=urls))  # type: ignore[arg-type]
        await opening
        async with world:
            await asyncio.sleep(5.0)
            assert ("m-1" in backend.engines, preparer.held) == (True, {"m-1"})
            await world.until(lambda: backend.stopped == ["m-1"])
            assert (preparer.prepared, preparer.held) == (["m-1"], set())

    run_virtual(story())


def test_an_id_that_was_adopted_is_not_given_to_another_pools_replica() -> None:
    async def story() -> None:
        left = await leave(process_pool(name="a/b", min_replicas=1))
        pools = [process_pool(name="a-b", min_replicas=1), process_pool(name="a/b", min_replicas=1)]
        async with adopting(left, *pools) as (world, backend):
            await world.until(lambda: len(world.ready("a-b")) == 1)
            assert [one.id for one in world.ready("a/b")] == ["a-b-1"]
            assert (len(backend.started), backend.stopped) == (1, [])

    run_virtual(story())
