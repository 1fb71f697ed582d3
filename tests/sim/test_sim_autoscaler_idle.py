"""An idle pool with no idle time set: the real loop on virtual time learns it from its gaps."""

from __future__ import annotations

import asyncio
from collections.abc import Set
from dataclasses import dataclass, field
from pathlib import Path

from direct_history import DirectHistory
from fake_fleet import FakeBackend, World, process_pool
from fake_models import NullPreparer
from virtual_time import now, run_virtual

from autoscaler.settings import AutoscalerSettings, PoolSettings, PriceSettings
from autoscaler.types import ScaleReason
from modelcache.types import Tier

SETTINGS = AutoscalerSettings(
    scale_down_delay_s=1.0,
    stable_window_s=2.0,
    panic_window_s=1.0,
    demand_stale_s=3.0,
    prices=PriceSettings(replica_hour=3.6, waited_second=0.01),
)
"""A start of 30 s is worth 300 s of a replica."""


def reasons(world: World) -> list[ScaleReason]:
    return [one.decision.reason for one in world.loop.decisions("m")]


def test_it_goes_after_a_wake_s_worth_first_and_sooner_as_its_gaps_are_long() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=30.0)
        async with World([process_pool(max_replicas=1)], SETTINGS, backend) as world:
            kept_s = []
            for _ in range(4):
                await world.request(1.0)
                kept_s.append(await world.until(lambda: not backend.living()))
                await asyncio.sleep(1_500.0 + 100.0 * len(kept_s))
            assert 295.0 < kept_s[0] < 310.0
            assert kept_s[1] < 160.0
            assert kept_s[3] < kept_s[2] < kept_s[1]
            idle = [
                one.decision.detail
                for one in world.loop.decisions("m")
                if one.decision.reason is ScaleReason.IDLE_TO_ZERO
            ]
            assert "of least price over" in idle[-1]

    run_virtual(story())


def test_a_request_every_quarter_of_an_hour_finds_it_ready_in_the_end() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=30.0)
        async with World([process_pool(max_replicas=1)], SETTINGS, backend) as world:
            waits_s, began_s = [], now()
            for number in range(16):
                await asyncio.sleep(max(0.0, began_s + 900.0 * number - now()))
                asked_s = now()
                await world.request(1.0)
                waits_s.append(now() - asked_s - 1.0)
            assert min(waits_s[:5]) > 25.0
            assert max(waits_s[-3:]) < 1.0
            assert ScaleReason.PREWARM in reasons(world)
            assert len(backend.started) > 10  # it was not simply kept

    run_virtual(story())


def test_its_gaps_are_remembered_over_a_restart(tmp_path: Path) -> None:
    async def first_kept_s() -> float:
        """Of one control process, for how long its first request kept the pool."""
        pool, backend = process_pool(max_replicas=1), FakeBackend(start_s=30.0)
        history = DirectHistory(tmp_path / "history.sqlite3")
        kept_s = []
        async with World([pool], SETTINGS, backend, learned_history=history) as world:
            for _ in range(4):
                await world.request(1.0)
                kept_s.append(await world.until(lambda: not backend.living()))
                await asyncio.sleep(1_500.0)
        return kept_s[0]

    async def story() -> None:
        assert await first_kept_s() > 290.0
        await asyncio.sleep(7_200.0)
        assert await first_kept_s() < 160.0

    run_virtual(story())


def test_what_the_settings_say_goes_before_what_is_learned() -> None:
    async def story() -> None:
        backend = FakeBackend(start_s=30.0)
        pool = process_pool(max_replicas=1, idle_to_zero_s=50.0)
        async with World([pool], SETTINGS, backend) as world:
            for _ in range(3):
                await world.request(1.0)
                assert 48.0 < await world.until(lambda: not backend.living()) < 56.0

    run_virtual(story())


@dataclass
class ShortOfMemory(NullPreparer):
    """A node with memory for the pages of one model of two."""

    denied: Set[str] = field(default_factory=frozenset)

    @property
    def page_budget_bytes(self) -> int | None:
        return 100

    def size_bytes(self, pool: PoolSettings) -> int | None:
        return 60

    def tiers(self, pool: PoolSettings) -> frozenset[Tier]:
        return frozenset({Tier.ON_DISK, Tier.PAGED})

    def has_pages(self, pool: PoolSettings) -> bool:
        return pool.name not in self.denied

    def deny_pages(self, pools: Set[str]) -> None:
        self.denied = frozenset(pools)


def test_memory_is_kept_for_the_model_that_is_asked_for_sooner() -> None:
    async def story() -> None:
        models, backend = ShortOfMemory(), FakeBackend(start_s=30.0)
        pools = [process_pool(name=name, max_replicas=1) for name in ("often", "rare")]
        async with World(pools, SETTINGS, backend, preparer=models) as world:
            await world.request(1.0, "rare")
            for _ in range(3):
                await world.request(1.0, "often")
                await world.until(lambda: not backend.living(), 2_000.0)
                await asyncio.sleep(300.0)
            assert models.denied == {"rare"}

    run_virtual(story())
