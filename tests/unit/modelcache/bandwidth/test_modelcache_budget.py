"""The budget's edge: threads that wait for their turn, and leave at once when called off."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from modelcache.bandwidth.budget import Budget, Meter, Slots
from modelcache.ports import ANNOUNCE_BYTES
from modelcache.settings import ModelCacheSettings
from modelcache.types import Cancelled, Priority

MIB = 1 << 20


def never() -> bool:
    return False


def read(meter: Meter, size_bytes: int, arrived: Callable[[int], None]) -> None:
    """As a source reads: at most ``ANNOUNCE_BYTES`` ahead of what it tells."""
    with meter:
        while size_bytes:
            chunk = min(size_bytes, ANNOUNCE_BYTES)
            arrived(chunk)
            meter.count(chunk)
            size_bytes -= chunk


def start_readers(
    budget: Budget, count: int, size_bytes: int, arrived: Callable[[int], None]
) -> list[threading.Thread]:
    share = budget.share("s3://b/m", "m", Priority.PRELOAD)
    threads = [
        threading.Thread(target=read, args=(share.meter(size_bytes, never), size_bytes, arrived))
        for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads


def test_threads_together_stay_below_the_cap_over_every_window() -> None:
    """Time stands still while any thread does not wait for its turn: so what is read is read at
    the time at which it was let in, however late a busy machine lets the thread run."""
    rate = 160 * MIB
    now_s = 0.0
    budget = Budget(ModelCacheSettings(bandwidth_bytes_s=rate), clock=lambda: now_s)
    seen: list[tuple[float, int]] = []
    threads = start_readers(budget, 8, 6 * MIB, lambda size: seen.append((now_s, size)))
    while (alive := sum(thread.is_alive() for thread in threads)) > 0:
        if budget.waiting == alive:
            now_s += 0.002
        time.sleep(0.002)
    assert sum(size for _, size in seen) == 48 * MIB
    burst = ANNOUNCE_BYTES + 0.1 * rate
    for first in range(len(seen)):
        total = 0
        for last in range(first, len(seen)):
            total += seen[last][1]
            assert total <= rate * (seen[last][0] - seen[first][0]) + burst


def test_without_a_cap_nothing_waits() -> None:
    seen: list[int] = []
    budget = Budget(ModelCacheSettings(), clock=lambda: 0.0)
    for thread in start_readers(budget, 4, 64 * MIB, seen.append):
        thread.join(100)
    assert sum(seen) == 256 * MIB


def test_a_thread_that_waits_leaves_when_it_is_called_off() -> None:
    budget = Budget(ModelCacheSettings(bandwidth_bytes_s=65_536), clock=lambda: 0.0)
    share = budget.share("s3://b/m", "m", Priority.PRELOAD)
    called_off = threading.Event()
    meter = share.meter(10 * MIB, called_off.is_set)
    ended: list[str] = []

    def run() -> None:
        try:
            read(meter, 10 * MIB, lambda n: None)
        except Cancelled:
            ended.append("called off")

    thread = threading.Thread(target=run)
    thread.start()
    called_off.set()
    thread.join(60)
    assert ended == ["called off"]
    assert not budget.waiting


def test_what_an_unfinished_range_had_paid_for_is_returned() -> None:
    budget = Budget(ModelCacheSettings(bandwidth_bytes_s=10 * MIB), clock=lambda: 0.0)
    share = budget.share("s3://b/m", "m", Priority.PRELOAD)
    for _ in range(100):
        # The clock stands still: each pass would fail to be granted if it kept what it took.
        with share.meter(8 * MIB, never):
            pass


def test_the_longest_prefix_applies_and_the_node_always() -> None:
    budget = Budget(
        ModelCacheSettings(
            bandwidth_bytes_s=MIB,
            source_bandwidth_bytes_s={"oss://": MIB, "oss://models": MIB, "s3://x/y": MIB},
        )
    )
    caps = {
        url: budget.share(url, "m", Priority.WAKE).caps
        for url in ("oss://models/a", "oss://models-old/a", "s3://x/yz", "s3://x/y", "hf://a/b")
    }
    assert caps == {
        "oss://models/a": ("node", "oss://models"),
        "oss://models-old/a": ("node", "oss://"),
        "s3://x/yz": ("node",),
        "s3://x/y": ("node", "s3://x/y"),
        "hf://a/b": ("node",),
    }


def test_slots_are_never_more_than_there_are_and_a_newcomer_is_next() -> None:
    slots = Slots(4)
    for _ in range(4):
        slots.take("big", Priority.WAKE, 1, never)
    order: list[str] = []

    def want(model: str, priority: Priority) -> None:
        slots.take(model, priority, 1, never)
        order.append(model)

    waiting = []
    for model, priority in [
        ("big", Priority.WAKE),
        ("big", Priority.WAKE),
        ("new", Priority.REPLICATE),
    ]:
        thread = threading.Thread(target=want, args=(model, priority))
        thread.start()
        waiting.append(thread)
        while slots.waiting < len(waiting):
            threading.Event().wait(0.001)
    assert slots.free == 0
    slots.give_back("big", 1)
    waiting[2].join(60)
    assert order == ["new"]
    slots.give_back("big", 1)
    slots.give_back("big", 1)
    for thread in waiting:
        thread.join(60)
    assert order == ["new", "big", "big"]


def test_a_wait_for_a_slot_ends_when_it_is_called_off() -> None:
    slots = Slots(1)
    slots.take("a", Priority.WAKE, 1, never)
    with pytest.raises(Cancelled):
        slots.take("b", Priority.WAKE, 1, lambda: True)
    slots.give_back("a", 1)
    assert slots.free == 1
    slots.take("b", Priority.WAKE, 1, never)


def test_an_amount_beyond_the_limit_is_the_limit() -> None:
    slots = Slots(8)
    slots.take("a", Priority.WAKE, 100, never)
    assert slots.free == 0
    slots.give_back("a", 100)
    assert slots.free == 8
