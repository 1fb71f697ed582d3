"""Slots of pools and replicas while both come and go."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from autoscaler.signals.series import quantile
from gateway.compose.fleet import FleetBook
from gateway.datapath import metrics
from gateway.datapath.metrics import PoolCounters
from gateway.datapath.shared import Shared
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


def test_what_a_pools_counters_have_come_to_over_its_workers() -> None:
    book, shared = make()
    assert book.totals("a") is None
    apply(shared, book.publish((Pool(name="b"), Pool(name="a"))).version)
    for worker in range(WORKERS):
        one = PoolCounters(*shared.pool_rows(worker, 1))
        counts = {metrics.ARRIVALS: 9, metrics.PROMPT_TOKENS: 50, metrics.OUTPUT_TOKENS: 60}
        counts |= {metrics.ARRIVED_PROMPT_TOKENS: 70, metrics.ARRIVED_OUTPUT_TOKENS: 80}
        counts |= {metrics.OK: 1, metrics.CLIENT_ERROR: 1, metrics.CANCELLED: 1}
        for index, number in (counts | {metrics.ENGINE_ERROR: 1, metrics.REJECTED: 1}).items():
            one.integers[index] += number
        for endpoint in (0, 2):
            one.observe(metrics.TTFT + 2 * endpoint + 1, 0.04)  # a stream
            one.observe(metrics.TTFT + 2 * endpoint, 500.0)  # a plain answer: all came at once
            one.observe(metrics.E2E + 2 * endpoint + 1, 3.0)
            one.observe(metrics.E2E + 2 * endpoint, 4.0)
        one.observe(metrics.ITL, 0.022, 30)
        one.observe(metrics.QUEUE_WAIT, 0.3)
        one.flush()
    seen = book.totals("a")
    assert seen is not None
    assert (seen.arrivals, seen.input_tokens, seen.predicted_output_tokens) == (18, 140, 160)
    assert (seen.prompt_tokens, seen.output_tokens) == (100, 120)
    assert (seen.ended, seen.errors) == (10, 4)
    for histogram, count, total in (
        (seen.ttft, 4, 0.16),
        (seen.e2e, 8, 28.0),
        (seen.itl, 60, 1.32),
        (seen.queue_wait, 2, 0.6),
    ):
        assert sum(histogram.counts) == count
        assert histogram.sum_s == pytest.approx(total)
        assert len(histogram.counts) == len(histogram.bounds_s) + 1
    assert quantile(seen.ttft, 0.5) == pytest.approx(0.035)
    assert book.totals("b").arrivals == 0  # type: ignore[union-attr]
