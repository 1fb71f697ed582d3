"""Clients that leave, clients and replicas that are slow: nothing is kept for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator

import pytest
from datapath_rig import (
    STREAM,
    WAIT_S,
    Asked,
    Gateway,
    Raw,
    ScriptedReplica,
    answers,
    chunks,
    eventually,
    gateway,
    get,
    post,
)

from gateway.datapath import metrics

SMALL = post({"model": "m", "prompt": "hello"})
STREAMED = post({"model": "m", "stream": True})
EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
MB = 1 << 20


@pytest.fixture(scope="module")
def served() -> Iterator[Gateway]:
    with gateway() as running:
        yield running


@pytest.fixture(autouse=True)
def balanced(served: Gateway) -> Iterator[None]:
    yield
    served.publish()
    served.settle()


def leave(client: Raw, how: str) -> None:
    client.reset() if how == "reset" else client.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("when", ["before the answer", "in a stream", "in a body with length"])
def test_a_client_that_leaves_cancels_its_request_at_once(
    served: Gateway, when: str, how: str
) -> None:
    def script(asked: Asked) -> None:
        asked.request()
        if when == "in a stream":
            asked.send(STREAM + chunks(EVENT))
        elif when == "in a body with length":
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        asked.cancelled()

    before = served.pool_count(metrics.CANCELLED)
    with ScriptedReplica(script) as replica:
        (published,) = served.publish(replica)
        client = served.connect()
        client.send(STREAMED)
        eventually(lambda: len(replica.requests) == 1)
        assert served.inflight(published.slot)[0] == 1
        if when != "before the answer":
            client.until(b"x" if when == "in a stream" else b"half")
        leave(client, how)
        eventually(lambda: replica.cancels == 1)  # long before any time-out
        eventually(lambda: served.pool_count(metrics.CANCELLED) == before + 1)
        assert served.inflight(published.slot) == (0, 0)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_leaves_while_held_leaves_the_queue(served: Gateway, how: str) -> None:
    served.publish()
    client = served.connect()
    client.send(STREAMED)
    eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
    leave(client, how)
    eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 0)
    with ScriptedReplica(answers()) as replica:
        served.publish(replica)
        assert served.ask(SMALL).status == 200
    assert len(replica.requests) == 1


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("routed", [True, False])
def test_a_client_that_leaves_while_it_uploads_cancels(
    served: Gateway, routed: bool, how: str
) -> None:
    def script(asked: Asked) -> None:
        asked.head()
        asked.cancelled()

    with ScriptedReplica(script) as replica:
        served.publish(replica)
        client = served.connect()
        start = b'{"model":"m","p":"' if routed else b'{"p":"'
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
            + start
            + b"x" * 100_000
        )
        if routed:
            eventually(lambda: replica.connections == 1)
        else:
            eventually(lambda: served.worker_count(metrics.BUFFERED_BYTES) > 100_000)
        leave(client, how)
        if routed:
            eventually(lambda: replica.cancels == 1)
        eventually(lambda: served.worker_count(metrics.BUFFERED_BYTES) == 0)
    assert replica.connections == int(routed)


def test_a_slow_client_stalls_its_replica_and_not_the_gateways_memory(served: Gateway) -> None:
    sent = [0]
    block = chunks(b"data: " + b"x" * 65536 + b"\n\n")
    total = 64 * MB

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM)
        while sent[0] < total:
            asked.send(block)
            sent[0] += len(block)
        asked.send(b"0\r\n\r\n")

    before = served.rss_bytes()
    with ScriptedReplica(script) as replica, served.connect(receive_bytes=65536) as client:
        served.publish(replica)
        client.send(STREAMED)
        client.until(b"\r\n\r\n")
        eventually(lambda: sent[0])
        stalled = 0
        while stalled != sent[0]:
            stalled = sent[0]
            time.sleep(0.4)
        assert 0 < stalled < 24 * MB  # socket buffers of the kernel; nothing of the gateway's
        assert served.rss_bytes() - before < 12 * MB
        assert served.ask(get(b"/health")).status == 200
        read = len(client.buffer)
        while read < sent[0] or sent[0] < total:
            assert client.more()
            read += len(client.buffer)
            client.buffer = client.buffer[-5:]
            read -= len(client.buffer)
        assert served.rss_bytes() - before < 12 * MB


def test_a_slow_replica_stalls_the_upload_and_not_the_gateways_memory(served: Gateway) -> None:
    go = threading.Event()

    def script(asked: Asked) -> None:
        head = asked.head()
        assert head is not None
        left = int(head.headers["content-length"])
        go.wait(60)
        while left:
            assert asked.buffer or asked.more()
            left -= len(asked.buffer)
            asked.buffer = b""
        asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    size = 60 * MB
    sent = [0]
    before = served.rss_bytes()
    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)

        def upload() -> None:
            client.send(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size
                + b'{"model":"m","p":"'
            )
            sent[0] = 18
            block = b"x" * 65536
            while sent[0] < size:
                part = block[: size - sent[0]]
                client.send(part)
                sent[0] += len(part)

        thread = threading.Thread(target=upload)
        thread.start()
        eventually(lambda: sent[0] > MB)
        stalled = 0
        while stalled != sent[0]:
            stalled = sent[0]
            time.sleep(0.4)
        assert stalled < 24 * MB
        assert served.rss_bytes() - before < 12 * MB
        go.set()
        assert client.answer().status == 200
        thread.join()


def test_a_client_that_asks_without_reading_is_given_no_more_answers(served: Gateway) -> None:
    """Pipelining must not make the gateway store answers without end."""
    request = get(b"/v1/models")
    before = served.rss_bytes()
    client = served.connect(receive_bytes=8192)
    client.sock.settimeout(3.0)
    asked, stalled = 0, False
    while asked < 200 * MB // len(request) and not stalled:
        try:
            client.send(request * 1000)
        except TimeoutError:
            stalled = True
        asked += 1000
    assert stalled
    assert served.rss_bytes() - before < 12 * MB
    client.sock.settimeout(WAIT_S)
    for _ in range(2000):  # it goes on as soon as it reads
        assert client.answer().status == 200
    client.close()


def test_pipelined_requests_wait_for_a_client_that_does_not_read(served: Gateway) -> None:
    size = 2 * MB
    big = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(big)

    before = served.rss_bytes()
    with ScriptedReplica(script) as replica, served.connect(receive_bytes=65536) as client:
        served.publish(replica)
        client.send(SMALL * 40)
        seen = -1
        while seen != len(replica.requests):
            seen = len(replica.requests)
            time.sleep(0.5)
        assert seen < 10
        assert served.rss_bytes() - before < 16 * MB
        for _ in range(40):
            assert len(client.answer().body) == size
    assert len(replica.requests) == 40


def test_a_replica_that_stops_reading_the_upload_is_504() -> None:
    answered = threading.Event()

    def script(asked: Asked) -> None:
        asked.head()
        answered.wait(60)
        asked.cancelled()

    with ScriptedReplica(script) as replica, gateway(upstream_idle_timeout_s=1.0) as quick:
        quick.publish(replica)
        client = quick.connect()
        client.sock.settimeout(2.0)
        with contextlib.suppress(TimeoutError, ConnectionError):
            client.send(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 40000000\r\n\r\n"
                b'{"model":"m","p":"' + b"x" * 39_000_000
            )
        client.sock.settimeout(WAIT_S)
        answer = client.answer()
        answered.set()
        client.close()
    assert (answer.status, answer.reason) == (504, "replica_timeout")


def test_clients_that_begin_bodies_and_drip_take_no_place_from_whole_requests() -> None:
    def script(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with ScriptedReplica(script) as replica, gateway() as served:
        (published,) = served.publish(replica)
        slow = [served.connect() for _ in range(12)]
        for client in slow:
            client.send(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 20000000\r\n\r\n"
                b'{"model":"m","prompt":"' + b"x" * 66_000
            )
        eventually(lambda: served.inflight(published.slot)[0] == 4)
        for _ in range(20):
            assert served.ask(SMALL).status == 200
        # Those with a place lose it, since nothing more comes.
        eventually(lambda: served.inflight(published.slot)[0] == 0)
        eventually(lambda: served.pool_count(metrics.REJECTED) == 4)
        for client in slow:
            client.close()
        served.settle()


def test_an_upload_whose_connection_failed_goes_on_over_a_kept_one() -> None:
    """Reading is paused while a connection is opened; the next one may be there already."""
    go = threading.Event()

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            go.wait(WAIT_S)
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    body = b'{"model":"m","p":"' + b"x" * 400_000 + b'"}'
    with ScriptedReplica(answers()) as dead, ScriptedReplica(script) as good, gateway() as served:
        dead.stop()
        (busy,) = served.publish(served.replica(good.url, max_inflight_requests=1))
        first, client = served.connect(), served.connect()
        first.send(SMALL)
        eventually(lambda: len(good.requests) == 1)
        served.publish(busy, dead)
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body[:100_000]
        )
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
        go.set()
        assert first.answer().status == 200
        client.send(body[100_000:])
        assert client.answer().status == 200
        assert good.connections == 1
        first.close()
        client.close()
    assert good.requests[-1].body == body


def test_a_request_whose_replica_vanishes_while_it_uploads_goes_on_elsewhere() -> None:
    """Reading is paused while a connection is opened, and must not stay so when that fails."""
    with ScriptedReplica(answers()) as dead, ScriptedReplica(answers()) as good:
        dead.stop()
        with gateway() as served, served.connect() as client:
            served.publish(dead)
            body = b'{"model":"m","p":"' + b"x" * 400_000 + b'"}'
            client.send(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
                % len(body)
                + body[:100_000]
            )
            eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
            served.publish(dead, good)
            assert served.ask(SMALL).status == 200
            client.send(body[100_000:])
            assert client.answer().status == 200
    assert good.requests[-1].body == body
