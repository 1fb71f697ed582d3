"""Forecasts beside the control loop: made in a real process, and left aside when they are old."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from autoscaler.control.forecast_worker import ForecastResult
from autoscaler.control.forecasts import Forecasts
from autoscaler.types import Observation, Outlook, PoolDemand
from forecaster.cron import RecurringWindow

DAY_S = 86_400.0
START_S = 1_800_000_000.0
WAIT_S = 240.0
"""The process that forecasts gives way to all others, and a machine may be busy."""

pytestmark = pytest.mark.timeout(WAIT_S + 60)


class World:
    """Virtual time for the forecasts of one pool, that gets 60 tokens a second."""

    def __init__(self, past: Sequence[float] = (), history_least_s: float = 600.0) -> None:
        self.now_s = START_S
        self.total = 0
        self.asked: list[tuple[str, float, float]] = []
        self.past = past
        self.forecasts = Forecasts(
            history_least_s=history_least_s,
            read_past=self._read,
            clock=lambda: self.now_s,
            wall_s=lambda: self.now_s,
        )

    async def _read(self, pool: str, from_s: float, until_s: float) -> Sequence[float]:
        self.asked.append((pool, from_s, until_s))
        return self.past

    def minute(self, rate: float = 60.0, step_s: float = 60.0) -> None:
        self.now_s += step_s
        self.total += round(rate * step_s)
        self.look()

    def look(self) -> None:
        demand = PoolDemand(observed_at_s=self.now_s, arrived_tokens_total=self.total)
        self.forecasts.observe(Observation(pools={"m": demand}))

    def outlook(self, lead_s: float = 120.0) -> Outlook | None:
        return self.forecasts.outlook("m", lead_s)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 -- of another task, and of another process
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def running(world: World):  # type: ignore[no-untyped-def]
    task = asyncio.create_task(world.forecasts.run())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def begun(world: World) -> Outlook:
    """The outlook after the first minute."""
    world.look()
    world.outlook()
    world.minute()
    await until(world.outlook)
    found = world.outlook()
    assert found is not None
    return found


async def is_tried(world: World, found: Outlook | None) -> None:
    """The past is tried a little at each forecast, and trusted in the end."""
    for _ in range(10):
        assert found is not None
        made_at_s = found.made_at_s
        world.minute()
        await until(lambda: world.outlook().made_at_s > made_at_s)  # type: ignore[union-attr]  # noqa: B023
        found = world.outlook()
    assert found is not None
    assert found.distrust == ""
    assert found.scored >= 40


def children() -> set[int]:
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_a_pool_with_a_past_has_an_outlook_after_its_first_minute() -> None:
    async def scenario() -> None:
        world = World(past=[60.0] * 240)
        async with running(world):
            found = await begun(world)
            assert found.lead_s == 120.0
            assert found.tokens_per_s[found.levels.index(0.5)] == pytest.approx(60.0, rel=0.05)
            (asked,) = world.asked
            assert asked[2] <= world.now_s
            await is_tried(world, found)

    asyncio.run(scenario())


def test_a_past_that_is_filled_in_meanwhile_counts_and_is_tried() -> None:
    async def scenario() -> None:
        world = World(history_least_s=7_200.0)
        async with running(world):
            found = await begun(world)
            assert "history" in found.distrust
            world.past = [60.0] * 240
            world.forecasts.read_again("m")
            world.forecasts.read_again("gone")
            await is_tried(world, found)

    asyncio.run(scenario())


def test_a_hint_of_the_operator_reaches_the_forecast() -> None:
    week = 7 * 1_440
    past = [60.0] * (week + 60)
    past[62:72] = [600.0] * 10
    at = datetime.fromtimestamp(START_S + 120.0, UTC)
    cron = f"{at.minute} {at.hour} * * {at.isoweekday() % 7}"

    async def scenario() -> None:
        world = World(past=past)
        world.forecasts.hints = {"m": (RecurringWindow.parse(cron, 600.0),)}
        async with running(world):
            found = await begun(world)
            assert found.tokens_per_s[found.levels.index(0.5)] == pytest.approx(600.0, rel=0.2)

    asyncio.run(scenario())


@pytest.mark.timeout(300)
def test_slow_models_join_the_mix_when_they_are_there() -> None:
    async def scenario() -> None:
        world = World(past=[float(minute % 7 + 57) for minute in range(300)])
        world.forecasts.slow_models = ("holt_winters",)
        async with running(world), asyncio.timeout(WAIT_S):
            world.look()
            found = world.outlook()
            while found is None or "holt_winters" not in found.weights:
                world.minute()
                await asyncio.sleep(1.0)  # minutes that pass during the fit are extrapolated
                found = world.outlook()
            assert found.tokens_per_s[found.levels.index(0.5)] == pytest.approx(60.0, rel=0.1)

    asyncio.run(scenario())


def test_a_process_that_is_killed_is_replaced_and_ends_with_us() -> None:
    async def scenario() -> None:
        before = children()
        world = World(past=[60.0] * 20)
        async with running(world):
            world.look()
            world.outlook()
            world.minute()
            await until(world.outlook)
            (child,) = children() - before
            os.kill(child, signal.SIGKILL)
            world.minute()
            await until(lambda: (found := world.outlook()) is not None and found.distrust)
            world.now_s += 30.0
            world.minute()
            await until(lambda: (found := world.outlook()) is not None and not found.distrust)
            assert children() - before
        await until(lambda: not children() - before)

    asyncio.run(scenario())


def test_a_short_lead_is_forecast_of_seconds() -> None:
    async def scenario() -> None:
        world = World(history_least_s=0.0)
        async with running(world):
            world.look()
            world.outlook(8.0)
            for _ in range(60):
                world.minute(step_s=5.0)
            await until(lambda: world.outlook(8.0))
            found = world.outlook(8.0)
            assert found is not None
            assert found.lead_s == 8.0
            assert found.tokens_per_s[-1] < 600.0

    asyncio.run(scenario())


def test_why_there_is_none_is_said_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.look()
    assert world.outlook() is None
    world.forecasts.take("m", ForecastResult(pool="m", error="ValueError: no"))
    found = world.outlook()
    assert found is not None
    assert (found.levels, found.distrust) == ((), "ValueError: no")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    without = World()
    without.look()
    found = without.outlook()
    assert found is not None
    assert "the extra `forecast`" in found.distrust


def test_old_forecasts_are_left_aside() -> None:
    world = World()
    world.look()
    made = Outlook(
        made_at_s=world.now_s, model="m", lead_s=60.0, levels=(0.95,), tokens_per_s=(66.0,)
    )
    world.forecasts.take("m", ForecastResult(pool="m", found=made))
    found = world.outlook()
    assert found is not None
    assert not found.distrust
    world.now_s += 3_600.0
    found = world.outlook()
    assert found is not None
    assert found.distrust
