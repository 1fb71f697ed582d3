"""What the adapter reads of a Tidegate."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

from admin_rig import TOKEN, ServedAdmin
from signal_rig import signals

from autoscaler.adapters.settings import AdapterSettings
from gateway.admin.schema import SignalsAnswer
from gateway.compose.adapter import SignalsSource

POOLS = 400


class ManyPools:
    """A Tidegate with many pools, which are another each time."""

    def __init__(self) -> None:
        self._turn = 0

    def signals(self) -> SignalsAnswer:
        self._turn += 1
        pools = tuple(signals(f"pool-{each}", queued_tokens=self._turn) for each in range(POOLS))
        return SignalsAnswer(version=1, at_s=0.0, pools=pools)

    async def wait_for_activity(self, after: int, wait_s: float) -> None:
        """At once."""


def test_what_was_read_before_is_not_kept_until_the_garbage_collector_comes() -> None:
    async def read(url: str) -> tuple[int, int]:
        """Bytes in use more than at the first reading after many of them, and of one answer."""
        source = SignalsSource(lambda: (url, TOKEN), AdapterSettings())
        try:
            for _ in range(3):
                found = await source.fetch(None, 0.0)
            before = tracemalloc.get_traced_memory()[0]
            for turn in range(10):
                found = await source.fetch(None, 0.0)
                assert len(found.pools) == POOLS
                assert found.pools[0].queued_tokens == turn + 4
            return tracemalloc.get_traced_memory()[0] - before, len(found.model_dump_json())
        finally:
            await source.close()

    with ServedAdmin(ManyPools()) as admin:
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            more, answer = asyncio.run(read(admin.url))
        finally:
            tracemalloc.stop()
            gc.enable()
    assert more < 5 * answer, f"{more} bytes more, of answers of {answer}"
