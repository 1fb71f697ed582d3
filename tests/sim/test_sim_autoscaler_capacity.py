"""What a replica carries is learned under load, and outlives a restart with the same settings."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from direct_history import DirectHistory
from fake_fleet import FakeBackend, World, process_pool
from virtual_time import run_virtual

from autoscaler.backends.base import Probe
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.types import (
    CapacitySource,
    GpuCapacity,
    GpuReading,
    GpuReport,
    Observation,
    RecentTraffic,
)

SETTINGS = AutoscalerSettings(demand_stale_s=3.0)
FULL = RecentTraffic(
    window_s=60.0,
    requests_per_s=2.0,
    errors_per_s=0.0,
    prompt_tokens_per_s=800.0,
    generation_tokens_per_s=200.0,
    ttft_count=120,
    ttft_mean_s=1.0,
    ttft_p50_s=1.0,
    ttft_p95_s=2.0,
    itl_count=120,
    itl_mean_s=0.02,
    itl_p50_s=0.02,
    itl_p95_s=0.03,
    e2e_mean_s=4.0,
)


async def load(world: World, minutes: int) -> None:
    """One request is answered and one waits, for so long."""
    await world.request(1.0)
    world.held["m"] += 1
    await world.request(60.0 * minutes)
    world.held["m"] -= 1


def capacity(world: World) -> tuple[float, CapacitySource] | None:
    decision = world.loop.decisions("m")[-1].decision
    found = decision.capacity
    return None if found is None else (found.tokens_per_s, found.source)


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    def start(pool: PoolSettings) -> World:
        return World(
            [pool],
            SETTINGS,
            FakeBackend(),
            learned_history=DirectHistory(tmp_path / "history.sqlite3"),
        )

    async def story() -> None:
        pool = process_pool(max_replicas=1)
        async with start(pool) as world:
            world.recent = FULL
            await load(world, 4)
            assert capacity(world) == (1_000.0, CapacitySource.SATURATED)
        async with start(pool) as world:
            await asyncio.sleep(2.0)
            assert capacity(world) == (1_000.0, CapacitySource.HISTORY)
            world.set_pools(pool.model_copy(update={"engine_args": ("--max-num-seqs", "2")}))
            await asyncio.sleep(2.0)
            assert capacity(world) is None
            world.set_pools(pool)
            await asyncio.sleep(2.0)
            assert capacity(world) == (1_000.0, CapacitySource.HISTORY)
            world.recent = FULL
            await load(world, 4)
            assert capacity(world) == (1_000.0, CapacitySource.SATURATED)

    run_virtual(story())


class OnGpus(FakeBackend):
    """A backend whose replicas have two GPUs each."""

    async def probe(self, replica_id: str) -> Probe:
        return replace(await super().probe(replica_id), gpus=(0, 1))


@dataclass
class GpuWorld(World):
    """On a node with these GPUs."""

    gpu_names: tuple[str, ...] = ()

    def observe(self) -> Observation:
        gpus = tuple(
            GpuReading(gpu=GpuCapacity(index=index, name=name))
            for index, name in enumerate(self.gpu_names)
        )
        return replace(super().observe(), gpus=GpuReport(source="nvml", gpus=gpus))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("NVIDIA H200", "NVIDIA H200"), "NVIDIA H200"),
        (("NVIDIA L4", "NVIDIA A10", "NVIDIA H200"), "NVIDIA A10, NVIDIA L4"),
        (("NVIDIA H200",), ""),
    ],
)
def test_it_is_learned_by_the_names_of_the_gpus(
    tmp_path: Path, names: tuple[str, ...], expected: str
) -> None:
    async def story() -> None:
        kept = DirectHistory(tmp_path / "history.sqlite3")
        pool = process_pool(max_replicas=1)
        world = GpuWorld([pool], SETTINGS, OnGpus(), learned_history=kept, gpu_names=names)
        async with world:
            world.recent = FULL
            await load(world, 2)
        rows = kept.store.transact(
            lambda connection: connection.execute("SELECT DISTINCT accelerator FROM loads")
        ).fetchall()
        assert rows == [(expected,)]

    run_virtual(story())
