"""Bodies that were begun: what came of them counts, what is claimed does not, and few can wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from datapath_rig import ClockLoop, MemoryTransport, make_worker, post

from gateway.datapath import metrics
from gateway.datapath.client import ClientConnection
from router.types import Fleet, Pool, Replica, ReplicaState

MB = 1 << 20
SMALL = post({"model": "m", "prompt": "hello"})


@pytest.fixture
def loop() -> Iterator[ClockLoop]:
    running = ClockLoop()
    yield running
    running.close()


class Site:
    """A worker with one pool at zero, and clients of any address."""

    def __init__(self, loop: ClockLoop, **changes: Any) -> None:
        self.worker = make_worker(loop, **changes)
        self.clients: list[ClientConnection] = []
        self.publish()

    def publish(self, **limits: Any) -> None:
        version = self.worker.context.shared.applied() + 1
        replica = Replica(
            id="r0", pool="m", slot=0, url="http://x", state=ReplicaState.STARTING, **limits
        )
        pool = Pool(name="m", slot=0, replicas=(replica,))
        self.worker.pools.apply(Fleet(version=version, pools=(pool,)))
        self.pool = self.worker.pools.by_name["m"]

    def connect(self, address: str = "10.0.0.1") -> ClientConnection:
        client = ClientConnection(self.worker.clients)
        client.connection_made(MemoryTransport(address))
        self.clients.append(client)
        return client

    def ask(self, data: bytes, address: str = "10.0.0.1") -> ClientConnection:
        client = self.connect(address)
        client.data_received(data)
        loop = self.worker.context.loop
        for _ in range(10):  # a large body is read over some turns of the loop
            loop.call_soon(loop.stop)
            loop.run_forever()
        return client

    def begin(self, claimed: int, sent: int, address: str = "10.0.0.1") -> ClientConnection:
        """A client that claims a body of one size and sends less of it."""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % claimed
        body = b'{"model":"m","prompt":"'
        return self.ask(head + body + b"x" * (sent - len(body)), address)

    def leave(self, client: ClientConnection) -> None:
        self.clients.remove(client)
        client.connection_lost(None)

    def count(self, index: int) -> int:
        return self.pool.counters.integers[index]

    def end(self) -> None:
        """All leave: the books are at zero."""
        for client in self.clients:
            client.connection_lost(None)
        self.worker.check_integrity()
        assert self.worker.context.buffered_bytes == 0
        assert self.pool.uploads == 0
        for gauge in (metrics.QUEUED_REQUESTS, metrics.QUEUED_TOKENS, metrics.QUEUED_BYTES):
            assert self.count(gauge) == 0


def status(client: ClientConnection) -> int | None:
    sent = client.transport.sent
    return int(sent[9:12]) if sent else None


def test_bytes_claimed_fill_no_hold_queue_and_are_no_demand(loop: ClockLoop) -> None:
    site = Site(loop)
    for _ in range(2):
        site.begin(64 * MB, 70_000)
    assert site.count(metrics.QUEUED_BYTES) == 140_000
    assert site.count(metrics.QUEUED_TOKENS) < 2 * 300
    assert status(site.ask(SMALL)) is None  # it is held
    assert site.count(metrics.QUEUED_REQUESTS) == 3
    site.end()


def test_what_comes_of_a_held_body_counts_as_it_comes(loop: ClockLoop) -> None:
    site = Site(loop, max_bytes=500_000)
    client = site.begin(200_000, 100_000)
    tokens = site.count(metrics.QUEUED_TOKENS)
    client.data_received(b"x" * 99_000)
    assert site.count(metrics.QUEUED_BYTES) == 199_000
    assert site.count(metrics.QUEUED_TOKENS) == tokens
    client.data_received(b"x" * 998 + b'"}')
    assert site.count(metrics.QUEUED_TOKENS) == pytest.approx(tokens + 50_000, abs=2)
    client = site.begin(MB, 100_000)
    client.data_received(b"x" * 200_001)
    assert status(client) == 429
    site.end()


def test_no_request_is_more_demand_than_the_engine_takes(loop: ClockLoop) -> None:
    """A body of images is mostly not tokens, and no engine computes a prompt past its context."""
    site = Site(loop)
    site.publish(max_model_len_tokens=4096)
    site.ask(post({"model": "m", "prompt": "x" * MB}))
    assert site.count(metrics.QUEUED_TOKENS) == 4096
    site.end()


def test_half_of_the_places_of_a_fresh_replica_are_for_whole_bodies(loop: ClockLoop) -> None:
    site = Site(loop, release_initial=8)
    begun = [site.begin(20 * MB, 70_000) for _ in range(12)]
    assert site.count(metrics.QUEUED_REQUESTS) == 4
    site.leave(begun[0])
    site.begin(20 * MB, 70_000)
    assert site.count(metrics.QUEUED_REQUESTS) == 4
    # What gets no place before it is whole is read whole, and served as any other.
    late = site.begin(80_000, 70_000)
    assert site.count(metrics.QUEUED_REQUESTS) == 4
    late.data_received(b"x" * 9_998 + b'"}')
    assert site.count(metrics.QUEUED_REQUESTS) == 5
    site.end()


def test_a_body_that_comes_slowly_is_read_whole_first(loop: ClockLoop) -> None:
    site = Site(loop, min_body_bytes_per_s=16_384)
    client = site.begin(120_000, 30_000)
    loop.now_s += 20
    client.data_received(b"x" * 60_000)
    assert site.count(metrics.QUEUED_REQUESTS) == 0
    client.data_received(b"x" * 29_998 + b'"}')
    assert site.count(metrics.QUEUED_REQUESTS) == 1
    site.end()


def test_one_client_cannot_have_the_whole_hold_queue(loop: ClockLoop) -> None:
    site = Site(loop, max_requests=10)
    greedy = [site.ask(SMALL, "10.0.0.1") for _ in range(10)]
    assert status(site.ask(SMALL, "10.0.0.1")) == 429
    others = [site.ask(SMALL, f"10.0.1.{number}") for number in range(6)]
    assert [status(client) for client in others] == [None] * 6
    assert [status(client) for client in greedy] == [None] * 4 + [429] * 6  # the newest give way
    assert site.count(metrics.QUEUED_REQUESTS) == 10
    # The same client comes no further than the largest of the others.
    assert status(site.ask(SMALL, "10.0.0.1")) == 429
    site.end()


def test_one_client_cannot_have_all_bytes_of_the_hold_queue(loop: ClockLoop) -> None:
    site = Site(loop, max_bytes=1_000_000)
    for _ in range(10):
        site.ask(post({"model": "m", "prompt": "x" * 99_000}), "2001:db8::1")
    assert status(site.ask(post({"model": "m", "prompt": "x" * 99_000}), "2001:db8::1")) == 429
    assert status(site.ask(post({"model": "m", "prompt": "x" * 300_000}), "10.0.0.2")) is None
    assert site.count(metrics.QUEUED_BYTES) <= 1_000_000
    site.end()


def test_in_a_full_buffer_the_client_with_most_of_it_gives_way(loop: ClockLoop) -> None:
    site = Site(loop, max_buffered_bytes=MB, peek_bytes=200_000)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
    sizes = (100_000, 400_000, *[50_000] * 8)
    greedy = [site.ask(head % MB + b"{" + b" " * size) for size in sizes]
    small = site.ask(head % 200_000 + b'{"prompt":"' + b"x" * 100_000, "10.0.0.2")
    small.data_received(b"x" * 60_000)
    assert [status(client) for client in (*greedy, small)] == [None, 503, *[None] * 9]
    small.data_received(b"x" * 39_975 + b'","model":"m"}')
    assert site.count(metrics.QUEUED_REQUESTS) == 1
    loop.now_s += 1.0
    again = site.ask(head % MB + b"{" + b" " * 400_000)
    assert [status(client) for client in (*greedy, again)] == [None, 503, *[None] * 8, 503]
    site.end()


def test_tokens_arrive_with_whole_bodies(loop: ClockLoop) -> None:
    site = Site(loop)
    arrived = (metrics.ARRIVED_PROMPT_TOKENS, metrics.ARRIVED_OUTPUT_TOKENS)
    site.ask(post({"model": "m", "prompt": "x" * 4_000, "max_tokens": 7}))
    prompt, output = map(site.count, arrived)
    assert prompt + output == site.count(metrics.QUEUED_TOKENS)
    assert (prompt > 500, output) == (True, 7)
    client = site.begin(200_000, 100_000)
    assert site.count(metrics.ARRIVALS) == 2
    assert list(map(site.count, arrived)) == [prompt, output]
    client.data_received(b"x" * 99_998 + b'"}')
    total = sum(map(site.count, arrived))
    assert total == site.count(metrics.QUEUED_TOKENS) > prompt + output + 20_000
    site.end()


def test_no_more_tokens_arrive_than_a_replica_takes(loop: ClockLoop) -> None:
    site = Site(loop)
    site.publish(max_model_len_tokens=1_000)
    site.ask(post({"model": "m", "prompt": "x" * 40_000}))
    assert site.count(metrics.ARRIVED_PROMPT_TOKENS) == 1_000
    assert site.count(metrics.ARRIVED_OUTPUT_TOKENS) == 0
    site.end()
