"""One worker's picture of its pools: who is suspect, for how long, and what a change keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from datapath_rig import DEFAULTS, ClockLoop, MemoryTransport, configure, make_worker, post

from gateway.datapath import metrics
from gateway.datapath.client import ClientConnection
from gateway.datapath.exchange import Exchange
from gateway.datapath.messages import FailureReport, WakeSignal
from gateway.datapath.pool import PoolRuntime
from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.protocol.http1 import parse_request_head
from gateway.datapath.upstream import Upstream, UpstreamConnection
from gateway.datapath.worker import HttpWorker
from router.types import Fleet, Pool, Replica, ReplicaState


@pytest.fixture
def loop() -> Iterator[ClockLoop]:
    running = ClockLoop()
    yield running
    running.close()


def make(loop: ClockLoop, **changes: Any) -> tuple[HttpWorker, list[Any]]:
    sent: list[Any] = []
    return make_worker(loop, send=sent.append, **changes), sent


def replica(slot: int = 0, **changes: Any) -> Replica:
    url = f"http://127.0.0.1:{slot}"
    made = Replica(id=f"r{slot}", pool="m", slot=slot, url=url, state=ReplicaState.READY)
    return msgspec.structs.replace(made, **changes)


def fleet(version: int, *replicas: Replica, **changes: Any) -> Fleet:
    pool = Pool(name="m", slot=0, aliases=("a",), replicas=replicas)
    return Fleet(version=version, pools=(msgspec.structs.replace(pool, **changes),))


def window(pool: PoolRuntime, replica_id: str) -> int:
    """How many requests the replica may have in flight now."""
    endpoint = pool.endpoints[replica_id]
    return endpoint.window(pool.context.ledger.opened[endpoint.slot])


def connect(upstream: Upstream) -> UpstreamConnection:
    connection = UpstreamConnection(upstream)
    connection.connection_made(MemoryTransport())
    return connection


def test_a_body_in_tiny_pieces_is_kept_in_few_parts(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    head = parse_request_head(
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 60000\r\n\r\n"
    )
    exchange = Exchange(ClientConnection(worker.clients), head, 0.0)
    for number in range(30_000):
        exchange.feed(b"%02d" % (number % 100))
    assert len(exchange.parts) < 30
    assert b"".join(exchange.parts) == b"".join(b"%02d" % (n % 100) for n in range(30_000))
    assert worker.context.buffered_bytes == exchange.body_bytes == 60_000


def test_a_replica_that_stays_dead_for_days_is_tried_every_few_seconds(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1, replica()))
    pool = worker.pools.by_name["m"]
    endpoint = pool.endpoints["r0"]
    pauses = []
    for _ in range(3000):
        pool.unreachable(endpoint)
        assert pool.ready == []
        pauses.append(endpoint.suspect_until_s - loop.now_s)
        loop.now_s = endpoint.suspect_until_s
        pool.tick(loop.now_s)
        assert pool.ready == [endpoint]
    assert pauses[:6] == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0]
    assert max(pauses) == 8.0


def test_republishing_a_suspect_clears_it(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1, replica()))
    pool = worker.pools.by_name["m"]
    pool.unreachable(pool.endpoints["r0"])
    assert pool.ready == []
    worker.pools.apply(fleet(2, replica()))
    assert len(pool.ready) == 1


def test_what_is_ejected_comes_back_with_time_and_not_because_it_was_published(
    loop: ClockLoop,
) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1, replica(), replica(1)))
    pool = worker.pools.by_name["m"]
    for _ in range(10):
        for endpoint in pool.endpoints.values():
            pool.failed(endpoint)
    assert len(pool.ready) == 1  # never all
    assert pool.counters.integers[metrics.EJECTIONS] == 2
    worker.pools.apply(fleet(2, replica(), replica(1)))  # their health checks are fine
    assert len(pool.ready) == 1
    loop.now_s += worker.context.router.ejection_s
    pool.tick(loop.now_s)
    assert len(pool.ready) == 2


def test_a_failing_replica_is_reported_at_most_twice_a_second(loop: ClockLoop) -> None:
    worker, sent = make(loop)
    for _ in range(100):
        worker.context.report_failure("r0")
        loop.now_s += 0.01
    assert sent == [FailureReport(replica="r0")] * 2


@pytest.mark.parametrize("state", ReplicaState)
def test_only_ready_replicas_are_offered(loop: ClockLoop, state: ReplicaState) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1, replica(0), replica(1, state=state)))
    assert len(worker.pools.by_name["m"].ready) == (2 if state is ReplicaState.READY else 1)


def test_an_older_picture_is_ignored(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(5, replica()))
    worker.pools.apply(fleet(4))
    assert len(worker.pools.by_name["m"].ready) == 1
    worker.pools.apply(fleet(5))
    assert len(worker.pools.by_name["m"].ready) == 1


def test_what_stays_the_same_keeps_its_window_and_its_connections(loop: ClockLoop) -> None:
    worker, _ = make(loop, release_initial=2)
    worker.pools.apply(fleet(1, replica()))
    pool = worker.pools.by_name["m"]
    first = pool.endpoints["r0"]
    pool.answered(first)
    pool.answered(first)
    worker.pools.apply(fleet(2, replica(), replica(1)))
    assert pool.endpoints["r0"] is first
    assert window(pool, "r0") == 4
    worker.pools.apply(fleet(3, replica(max_inflight_requests=3)))
    assert window(pool, "r0") == 3
    worker.pools.apply(fleet(4, replica(state=ReplicaState.SLEEPING)))
    worker.pools.apply(fleet(5, replica()))
    assert window(pool, "r0") == 2  # it wakes: it is filled slowly again


@pytest.mark.parametrize(
    "change", [{"url": "http://127.0.0.1:99"}, {"slot": 5}, {"headers": (("a", "b"),)}]
)
def test_a_replica_that_changes_place_loses_its_connections(
    loop: ClockLoop, change: dict[str, Any]
) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1, replica()))
    old = worker.pools.by_name["m"].endpoints["r0"].upstream
    idle, busy = connect(old), connect(old)
    old.release(idle)
    worker.pools.apply(fleet(2, msgspec.structs.replace(replica(), **change)))
    assert worker.pools.by_name["m"].endpoints["r0"].upstream is not old
    assert idle.transport.closed
    assert not busy.transport.closed  # its request is finished first
    old.release(busy)
    assert busy.transport.closed


def test_a_pool_in_another_slot_or_gone_is_closed(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1, replica()))
    first = worker.pools.by_name["m"]
    upstream = first.endpoints["r0"].upstream
    idle = connect(upstream)
    upstream.release(idle)
    worker.pools.apply(fleet(2, replica(), slot=1))
    assert worker.pools.by_name["m"] is not first
    assert idle.transport.closed
    worker.pools.apply(Fleet(version=3))
    with pytest.raises(ApiError):
        worker.pools.find("m")


def test_names_and_aliases_lead_to_the_pool_and_follow_it(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1))
    assert worker.pools.find("a") is worker.pools.find("m")
    assert [(name, pool.name) for name, pool in worker.pools.models()] == [("m", "m"), ("a", "m")]
    worker.pools.apply(fleet(2, aliases=("b",)))
    with pytest.raises(ApiError) as raised:
        worker.pools.find("a")
    assert raised.value.status == 404
    assert worker.pools.find("b") is worker.pools.find("m")


def test_a_draining_pool_is_unknown_to_new_requests_and_keeps_what_it_has(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    worker.pools.apply(fleet(1, replica()))
    runtime = worker.pools.by_name["m"]
    runtime.counters.integers[metrics.ARRIVALS] = 3
    worker.pools.apply(fleet(2, replica(), draining=True))
    assert worker.pools.by_name["m"] is runtime
    assert runtime.ready
    assert worker.pools.models() == []
    with pytest.raises(ApiError) as raised:
        worker.pools.find("m")
    assert (raised.value.status, raised.value.reason) == (404, Reason.MODEL_UNKNOWN)
    assert (
        worker.context.shared.pool_total(0, metrics.ARRIVALS) == 3
    )  # with the version it is applied to
    assert worker.context.shared.applied() == 2
    worker.pools.apply(fleet(3, replica()))  # it was added again
    assert worker.pools.find("m") is runtime


def test_a_slot_that_is_free_again_begins_at_zero(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    shared = worker.context.shared
    worker.pools.apply(fleet(1))
    counters = worker.pools.by_name["m"].counters
    counters.integers[metrics.ARRIVALS] = 3
    counters.observe(metrics.TTFT, 1.0)
    counters.flush()
    assert (shared.pool_total(0, metrics.ARRIVALS), shared.pool_sums(0)[metrics.TTFT]) == (3, 1.0)
    worker.pools.apply(Fleet(version=2))
    assert (shared.pool_total(0, metrics.ARRIVALS), shared.pool_sums(0)[metrics.TTFT]) == (0, 0.0)
    # A pool that is removed while its worker is dead: the next worker clears what that one left.
    shared.pool_rows(0, 3)[0][metrics.ARRIVALS] = 5
    shared.clear_worker(0)
    assert shared.applied() == 0
    successor = HttpWorker(loop, DEFAULTS, shared, lambda message: None, lambda other: None)
    successor.pools.apply(fleet(3))
    assert (shared.pool_total(3, metrics.ARRIVALS), shared.applied()) == (0, 3)


def test_other_settings_apply_to_what_is_there(loop: ClockLoop) -> None:
    worker, _ = make(loop, max_inflight_requests=4, default_output_tokens=10)
    worker.pools.apply(fleet(1, replica(), replica(1, max_inflight_requests=2)))
    runtime = worker.pools.by_name["m"]
    upstream = runtime.endpoints["r0"].upstream
    runtime.answered(runtime.endpoints["r0"])
    learned = runtime.estimator
    worker.configure(configure(max_inflight_requests=4, default_output_tokens=10, keepalive_s=7.0))
    assert runtime.estimator is learned  # the router's settings are the same
    worker.configure(
        configure(max_inflight_requests=9, default_output_tokens=20, release_initial=8)
    )
    assert [view.max_inflight_requests for view in runtime.ready] == [9, 2]
    assert window(runtime, "r0") == 8  # no more than its limit was it open before
    assert runtime.endpoints["r0"].upstream is upstream
    assert runtime.estimator.estimate(0, None) == (1, 21)


def test_retry_after_is_the_measured_wake_time_or_a_guess(loop: ClockLoop) -> None:
    worker, _ = make(loop)
    for number, (eta, expected) in enumerate([(None, 30.0), (0.2, 1.0), (17.5, 17.5)]):
        worker.pools.apply(fleet(number, wake_eta_s=eta))
        assert worker.pools.by_name["m"].retry_after_s() == expected


@pytest.mark.parametrize(
    ("phase", "states", "said"),
    [
        ("fetching 3.1 of 14.9 GB at 1.2 GB/s", (), "fetching 3.1 of 14.9 GB at 1.2 GB/s"),
        ("loading", (ReplicaState.STARTING,), "loading"),
        ("", (ReplicaState.STARTING, ReplicaState.DRAINING), "draining, starting"),
        ("", (), "at zero"),
    ],
)
def test_a_held_stream_says_what_it_waits_for(
    loop: ClockLoop, phase: str, states: tuple[ReplicaState, ...], said: str
) -> None:
    worker, sent = make(loop, keepalive_s=3.0)
    replicas = [replica(slot, state=state) for slot, state in enumerate(states)]
    worker.pools.apply(fleet(1, *replicas, phase=phase, wake_eta_s=20.0))
    client, transport = ClientConnection(worker.clients), MemoryTransport()
    client.connection_made(transport)
    client.data_received(post({"model": "m", "stream": True}))
    assert sent == [WakeSignal(pool="m")]
    loop.now_s += 3
    worker.pools.by_name["m"].tick(loop.now_s)
    text = f": tidegate: waiting for m ({said}), 3 s of about 20 s".encode()
    assert text in transport.sent
    client.connection_lost(None)
    worker.check_integrity()


def test_those_who_wait_are_told_when_the_engine_fails_again(loop: ClockLoop) -> None:
    """Not at its first failure, and not those who ask afterwards: they wait for the next try."""
    worker, _ = make(loop)
    worker.pools.apply(fleet(1))

    def ask() -> tuple[ClientConnection, MemoryTransport]:
        client, transport = ClientConnection(worker.clients), MemoryTransport()
        client.connection_made(transport)
        client.data_received(post({"model": "m"}))
        return client, transport

    first, told = ask()
    worker.pools.apply(fleet(2, failed_starts=1, cause="ValueError: no memory"))
    assert told.sent == b""
    worker.pools.apply(fleet(3, failed_starts=2, cause="ValueError: no memory"))
    assert b"503 " in told.sent
    assert b"x-tidegate-reason: engine_failed" in told.sent
    assert b"retry-after: " in told.sent
    assert b"2 times in a row" in told.sent
    assert b"ValueError: no memory" in told.sent
    second, waits = ask()
    worker.pools.apply(fleet(4, failed_starts=2, cause="ValueError: no memory", wake_eta_s=1.0))
    assert waits.sent == b""
    worker.pools.apply(fleet(5, failed_starts=3, cause="ValueError: no memory"))
    assert b"engine_failed" in waits.sent
    for client in (first, second):
        client.connection_lost(None)
    worker.check_integrity()
