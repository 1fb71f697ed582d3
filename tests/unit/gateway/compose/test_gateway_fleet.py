"""Slots of pools and replicas while both come and go."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gateway.compose.fleet import FleetBook
from gateway.datapath import metrics
from gateway.datapath.metrics import PoolCounters
from gateway.datapath.shared import Shared, buckets_of
from router.types import Pool, Replica, ReplicaState

WORKERS = 2


def make(max_pools: int = 3, clock: Callable[[], float] = lambda: 5.0) -> tuple[FleetBook, Shared]:
    shared = Shared.create(workers=WORKERS, max_replicas=4, max_pools=max_pools)
    return FleetBook(shared, clock), shared


def apply(shared: Shared, version: int, *workers: int) -> None:
    for worker in workers or range(WORKERS):
        shared.set_applied(worker, version)


def test_a_fleet_carries_the_pools_with_what_is_published_of_them() -> None:
    book, _ = make()
    replica = Replica(id="b-1", pool="b", url="http://x", state=ReplicaState.READY)
    known = Pool(name="b", aliases=("c",), replicas=(replica,), draining=True)
    fleet = book.publish((Pool(name="a"), known))
    first, second = fleet.pools
    assert (first.name, first.slot, first.replicas, first.draining) == ("a", 0, (), False)
    assert (second.aliases, second.draining) == (("c",), True)
    assert [replica.id for replica in second.replicas] == ["b-1"]
    assert second.replicas[0].slot == 0
    assert book.pool_slots() == {"a": 0, "b": 1}


def test_a_slot_is_given_again_only_when_every_worker_has_let_go_of_it() -> None:
    book, shared = make(max_pools=1)
    gone = book.publish((Pool(name="a"),)).version + 1
    assert book.publish((Pool(name="b"),)).pools == ()  # the block is full: b waits
    apply(shared, gone, 0)
    assert book.publish((Pool(name="b"),)).pools == ()
    apply(shared, gone, 1)
    (pool,) = book.publish((Pool(name="b"),)).pools
    assert (pool.name, pool.slot) == ("b", 0)
    book.check_integrity()


def test_what_a_removed_pool_has_is_unknown_until_no_worker_gives_it_more() -> None:
    book, shared = make()
    apply(shared, book.publish((Pool(name="a"),)).version)
    assert book.observe().pools["a"].inflight_requests == 0
    version = book.publish((Pool(name="a", draining=True),)).version
    book.publish((Pool(name="a", draining=True, phase="still"),))
    assert book.observe().pools["a"].inflight_requests is None
    apply(shared, version)
    shared.pool_rows(1, 0)[0][metrics.INFLIGHT_REQUESTS] = 2
    assert book.observe().pools["a"].inflight_requests == 2
    shared.clear_worker(1)  # its successor may not know yet
    assert book.observe().pools["a"].inflight_requests is None
    book.publish((Pool(name="a"),))  # it was added again
    assert book.observe().pools["a"].inflight_requests == 0


def test_arrived_tokens_are_those_of_prompts_and_of_answers_expected() -> None:
    book, shared = make()
    apply(shared, book.publish((Pool(name="a"),)).version)
    for worker in range(WORKERS):
        row = shared.pool_rows(worker, 0)[0]
        row[metrics.ARRIVED_PROMPT_TOKENS] = 100
        row[metrics.ARRIVED_OUTPUT_TOKENS] = 20
    assert book.observe().pools["a"].arrived_tokens_total == 240


def test_what_a_pool_answered_in_the_last_minute() -> None:
    now = 1000.0
    book, shared = make(clock=lambda: now)
    apply(shared, book.publish((Pool(name="a"),)).version)
    workers = [PoolCounters(*shared.pool_rows(worker, 0)) for worker in range(WORKERS)]

    def answer(number: int, *, failed: bool = False) -> None:
        for one in workers:
            one.integers[metrics.ENGINE_ERROR if failed else metrics.OK] += number
            one.integers[metrics.PROMPT_TOKENS] += 10 * number
            one.integers[metrics.OUTPUT_TOKENS] += 30 * number
            one.observe(metrics.TTFT + 1, 0.04, number)  # a stream
            one.observe(metrics.TTFT, 500.0, number)  # a plain answer: its first byte is its last
            one.observe(metrics.ITL, 0.022, 30 * number)
            one.flush()

    book.observe()
    assert book.recent_traffic("a") is None
    answer(1000)  # an hour ago
    for _ in range(3600):
        now += 1.0
        book.observe()
    seen = book.recent_traffic("a")
    assert seen is not None
    assert seen.requests_per_s == 0
    assert (seen.ttft_p50_s, seen.ttft_mean_s, seen.ttft_count) == (None, None, 0)
    answer(27)
    answer(3, failed=True)
    now += 1.0
    seen = book.recent_traffic("a")
    assert seen is not None
    assert 60 <= seen.window_s <= 66
    assert seen.requests_per_s * seen.window_s == pytest.approx(60, abs=0.1)
    assert seen.errors_per_s * seen.window_s == pytest.approx(6, abs=0.1)
    assert seen.prompt_tokens_per_s * seen.window_s == pytest.approx(600, abs=0.1)
    assert seen.generation_tokens_per_s * seen.window_s == pytest.approx(1800, abs=0.1)
    assert seen.ttft_p50_s == pytest.approx(0.035)
    assert seen.ttft_p95_s == pytest.approx(0.02 + 0.95 * 0.03)
    assert seen.itl_p50_s == pytest.approx(0.0225)
    assert (seen.ttft_count, seen.itl_count) == (60, 1800)
    assert seen.ttft_mean_s == pytest.approx(0.04)
    assert seen.itl_mean_s == pytest.approx(0.022)
    assert book.recent_traffic("b") is None


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([], 0.5, None),
        ([0.007], 0.5, 0.0075),  # halfway from 0.005 to 0.01
        ([0.001] * 3 + [5000.0], 0.5, 0.005 * 2 / 3),
        ([0.001, 5000.0], 0.95, 640.0),
    ],
)
def test_a_quantile_by_buckets(values: list[float], q: float, expected: float | None) -> None:
    _, shared = make()
    counters = PoolCounters(*shared.pool_rows(0, 0))
    for value in values:
        counters.observe(metrics.TTFT, value)
    found = metrics.quantile(metrics.TTFT, counters.integers[buckets_of(metrics.TTFT)], q)
    assert found == (None if expected is None else pytest.approx(expected))
