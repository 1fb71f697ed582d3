"""Which pools have a request: known at once where one is held, and unknown is not none."""

from __future__ import annotations

import asyncio
import itertools

import pytest

from autoscaler.signals.activity import LATCH_S, MAX_WAITING, Activity, has_request
from autoscaler.types import PoolDemand


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def demand(queued: int | None, inflight: int | None) -> PoolDemand:
    return PoolDemand(observed_at_s=0.0, queued_requests=queued, inflight_requests=inflight)


@pytest.mark.parametrize(
    ("queued", "inflight", "expected"),
    [
        (0, 0, False),
        (1, 0, True),
        (0, 1, True),
        (None, 2, True),
        (3, None, True),
        (None, 0, None),
        (0, None, None),
        (None, None, None),
    ],
)
def test_a_pool_has_a_request(
    queued: int | None, inflight: int | None, expected: bool | None
) -> None:
    assert has_request(demand(queued, inflight)) is expected


def test_the_version_changes_with_what_is_known_of_a_pool_only() -> None:
    activity = Activity(Clock())
    versions = [activity.version]
    for queued in (0, 0, 1, 2, 0, None, None):
        activity.observe({"chat": demand(queued, queued)})
        versions.append(activity.version)
    changed = [new != old for old, new in itertools.pairwise(versions)]
    assert changed == [True, False, True, False, True, True, False]
    activity.observe({})
    assert activity.is_active("chat") is None


def test_a_held_request_counts_before_the_counters_have_it() -> None:
    clock = Clock()
    activity = Activity(clock)
    activity.observe({"chat": demand(0, 0)})
    before = activity.version
    activity.hold("chat")
    assert activity.is_active("chat") is True
    assert activity.version == before + 1
    activity.observe({"chat": demand(0, 0)})  # of a moment before
    assert activity.is_active("chat") is True
    clock.now_s += LATCH_S
    activity.observe({"chat": demand(0, 0)})
    assert activity.is_active("chat") is False


def test_those_who_wait_are_woken_by_a_change() -> None:
    async def run() -> None:
        activity = Activity()
        waiting = [asyncio.create_task(activity.wait(activity.version, 60.0)) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(one.done() for one in waiting)
        activity.hold("chat")
        async with asyncio.timeout(30):
            await asyncio.gather(*waiting)

    asyncio.run(run())


def test_a_wait_ends_by_itself_and_of_another_version_at_once() -> None:
    async def run() -> None:
        activity = Activity()
        async with asyncio.timeout(30):
            await activity.wait(activity.version, 0.01)
            await activity.wait(activity.version - 1, 1e6)

    asyncio.run(run())


def test_there_is_a_limit_of_those_who_wait() -> None:
    async def run() -> None:
        activity = Activity()
        version = activity.version
        waiting = [asyncio.create_task(activity.wait(version, 1e6)) for _ in range(MAX_WAITING)]
        await asyncio.sleep(0)
        async with asyncio.timeout(30):
            await activity.wait(version, 1e6)
        for one in waiting:
            one.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        over = asyncio.create_task(activity.wait(version, 1e6))
        await asyncio.sleep(0)
        assert not over.done()  # their places are free again
        over.cancel()

    asyncio.run(run())
