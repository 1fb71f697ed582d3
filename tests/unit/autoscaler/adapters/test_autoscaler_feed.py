"""The newest signals in memory: answered while they are fresh, an error when they are not."""

from __future__ import annotations

import asyncio

import pytest
from signal_rig import Answer, Clock, Source, make_feed, signals, until, within

from autoscaler.adapters.feed import SignalFeed, SignalsLike, StaleSignals, running
from autoscaler.adapters.types import PoolSignals


def test_nothing_is_answered_before_the_first_and_after_the_last() -> None:
    async def run() -> None:
        source, clock = Source(signals()), Clock()
        source.error = "it is not there"
        feed = make_feed(source, clock)
        with pytest.raises(StaleSignals):
            feed.catalog()
        async with running(feed):
            await until(lambda: feed.failures)
            with pytest.raises(StaleSignals, match="it is not there"):
                feed.catalog()
            source.error = ""
            await until(lambda: feed.age_s is not None)
            assert [one.pool for one in feed.catalog().pools] == ["chat"]
            source.error = "it has gone"
            failures = feed.failures
            await until(lambda: feed.failures > failures)
            assert feed.catalog().pools  # still fresh
            clock.now_s += 15.5
            with pytest.raises(StaleSignals, match=r"stale_s.*it has gone"):
                feed.catalog()
            source.error = ""
            await until(lambda: feed.age_s == 0.0)
            assert feed.catalog().pools

    asyncio.run(run())


def test_a_change_is_heard_of_long_before_the_next_reading() -> None:
    async def run() -> None:
        source = Source(signals(active=False))
        feed = make_feed(source, Clock(), refresh_s=1e4, stale_s=1e6)
        seen: list[bool | None] = []

        async def watch() -> None:
            async for _ in feed.changes():
                if feed.age_s is not None:
                    seen.append(feed.catalog().pools[0].active)

        async with running(feed):
            watching = asyncio.create_task(watch())
            await until(lambda: seen)
            source.set(signals(active=True))
            await until(lambda: True in seen)
            watching.cancel()
        assert source.asked[0] is None
        assert source.asked[1] == 1  # the version that it had

    asyncio.run(run())


def test_those_who_watch_hear_of_failures_too() -> None:
    async def run() -> None:
        source = Source()
        source.error = "no"
        feed = make_feed(source, Clock())
        turns = feed.changes()
        await within(anext(turns))
        async with running(feed):
            await within(anext(turns))
        assert feed.failures

    asyncio.run(run())


def test_an_answer_that_cannot_be_read_is_logged_and_another_asked_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Broken:
        version = 1

        @property
        def pools(self) -> list[PoolSignals]:
            raise RuntimeError("not what was expected")

    async def run() -> None:
        source, answers = Source(signals()), [Broken()]

        async def fetch(after: int | None, wait_s: float) -> SignalsLike:
            return answers.pop() if answers else await source.fetch(after, wait_s)

        feed = SignalFeed(fetch, refresh_s=0.05, stale_s=15.0)
        async with running(feed):
            await until(lambda: feed.failures)
            with pytest.raises(StaleSignals, match="internal error"):
                feed.catalog()
            await until(lambda: feed.age_s is not None)
            assert feed.catalog().pools

    asyncio.run(run())
    assert "not what was expected" in caplog.text


def test_a_tidegate_that_does_not_wait_is_not_asked_all_the_time() -> None:
    async def run() -> None:
        asked, slept, clock = 0, list[float](), Clock()

        async def fetch(after: int | None, wait_s: float) -> SignalsLike:
            nonlocal asked
            asked += 1
            clock.now_s += 0.001
            return Answer(1, (signals(),))

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            clock.now_s += seconds
            await asyncio.sleep(0)

        feed = SignalFeed(fetch, refresh_s=1.0, stale_s=15.0, clock=clock, sleep=sleep)
        async with running(feed):
            await until(lambda: asked > 20)
        assert len(slept) >= 20
        assert clock.now_s - 1_000.0 > 0.2 * 19

    asyncio.run(run())
