"""What the cache takes is told from time to time, whatever its disk does."""

from __future__ import annotations

import asyncio
import threading

from gateway.admin.metrics_page import FRESH_S, STALE_S, UsagePoller, render_cache


class Disk:
    """Answers with a new number each time, unless it is broken or hangs."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.looks = 0
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def usage(self) -> int:
        self.looks += 1
        self.gate.wait(60.0)
        if self.error is not None:
            raise self.error
        return self.looks

    def poller(self, **options: float) -> UsagePoller:
        return UsagePoller(self.usage, clock=lambda: self.now_s, **options)


def test_a_figure_is_kept_for_a_while() -> None:
    async def story() -> None:
        disk = Disk()
        poller = disk.poller()
        assert await asyncio.gather(*(poller.get() for _ in range(5))) == [1] * 5
        disk.now_s = FRESH_S - 0.1
        assert await poller.get() == 1
        disk.now_s = FRESH_S
        assert await poller.get() == 2
        assert disk.looks == 2

    asyncio.run(story())


def test_an_error_is_counted_and_what_was_known_is_told_until_it_is_stale() -> None:
    async def story() -> None:
        disk = Disk()
        poller = disk.poller()
        assert await poller.get() == 1
        disk.error = OSError(5, "Input/output error")
        disk.now_s = FRESH_S
        assert await poller.get() == 1
        assert poller.failures == 1
        disk.now_s = STALE_S
        assert await poller.get() is None
        assert poller.failures == 2
        disk.error = None
        assert await poller.get() == 4

    asyncio.run(story())


def test_a_disk_that_hangs_takes_one_thread_and_no_page() -> None:
    async def story() -> None:
        disk = Disk()
        disk.gate.clear()
        poller = disk.poller(wait_s=0.05)
        for _ in range(10):
            assert await poller.get() is None
        assert disk.looks == 1
        assert await asyncio.to_thread(lambda: 7) == 7  # the loop's own threads are free
        assert poller.failures == 0
        disk.gate.set()
        while (seen := await poller.get()) is None:
            pass
        assert seen == 1

    asyncio.run(story())


def test_a_page_without_a_figure_is_a_page() -> None:
    page = render_cache(None, 3).decode()
    assert "tidegate_cache_look_failures_total 3.0" in page
    assert "tidegate_cache_bytes" not in page
