"""Every limit a client can meet: what it gets, and that the worker has nothing left of it."""

from __future__ import annotations

import contextlib
import select
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
from gateway.datapath.protocol.errors import Reason

H = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"model":"m"}'


@pytest.fixture(scope="module")
def replica() -> Iterator[ScriptedReplica]:
    with ScriptedReplica(answers()) as running:
        yield running


@pytest.fixture(scope="module")
def small(replica: ScriptedReplica) -> Iterator[Gateway]:
    """A gateway whose sizes are small."""
    with gateway(
        max_head_bytes=2000,
        max_headers=10,
        max_body_bytes=100_000,
        max_buffered_bytes=60_000,
        peek_bytes=1000,
    ) as running:
        running.publish(replica)
        yield running


@contextlib.contextmanager
def short(replica: ScriptedReplica, **limit: float) -> Iterator[Gateway]:
    """A gateway with one short time: on a busy machine another would be met before it."""
    with gateway(**limit) as running:
        running.publish(replica)
        yield running


@pytest.fixture(scope="module")
def short_head(replica: ScriptedReplica) -> Iterator[Gateway]:
    with short(replica, head_timeout_s=0.6) as running:
        yield running


@pytest.fixture(scope="module")
def short_idle(replica: ScriptedReplica) -> Iterator[Gateway]:
    with short(replica, idle_timeout_s=0.6) as running:
        yield running


@pytest.fixture(scope="module")
def short_body(replica: ScriptedReplica) -> Iterator[Gateway]:
    with short(replica, body_timeout_s=0.6) as running:
        yield running


@pytest.fixture(scope="module")
def short_request(replica: ScriptedReplica) -> Iterator[Gateway]:
    with short(replica, request_timeout_s=1.3) as running:
        yield running


def drip(client: Raw, byte: bytes) -> None:
    """Send byte by byte until the other side says something."""
    deadline = time.monotonic() + WAIT_S
    with contextlib.suppress(ConnectionError):
        while not select.select([client.sock], [], [], 0.05)[0]:
            assert time.monotonic() < deadline, "it may drip for ever"
            client.send(byte)


@pytest.mark.parametrize("end", [b"\r\n\r\n", b""])
def test_a_head_too_large_is_431(small: Gateway, end: bytes) -> None:
    with small.connect() as client:
        client.send(H + b"X: " + b"y" * 3000 + end)
        answer = client.answer()
        assert client.ended()
    assert (answer.status, answer.reason) == (431, "head_too_large")


def test_too_many_headers_are_431(small: Gateway) -> None:
    lines = [b"X: y"] * 9
    assert small.ask(get(b"/health", *lines)).status == 200
    answer = small.ask(get(b"/health", *lines, b"X: y"))
    assert (answer.status, answer.reason) == (431, "head_too_large")


MODEL_FIRST = b'{"model":"m","p":"'
MODEL_LAST = b'{"p":"'


@pytest.mark.parametrize("start", [MODEL_FIRST, MODEL_LAST])
def test_a_declared_body_too_large_is_413_before_it_is_read(small: Gateway, start: bytes) -> None:
    with small.connect() as client:
        client.send(H + b"Content-Length: 100001\r\n\r\n" + start)
        answer = client.answer()
        assert client.ended()
    assert (answer.status, answer.reason) == (413, "body_too_large")


@pytest.mark.parametrize("start", [MODEL_FIRST, MODEL_LAST])
def test_a_chunked_body_is_413_where_it_passes_the_limit(small: Gateway, start: bytes) -> None:
    with small.connect() as client:
        client.send(H + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(start))
        with contextlib.suppress(ConnectionError):
            for _ in range(60):
                client.send(chunks(b"x" * 2000))
                time.sleep(0.002)
        answer = client.answer()
    if start == MODEL_FIRST:
        assert (answer.status, answer.reason) == (413, "body_too_large")
    else:  # it must be held in memory whole, and that limit is met first
        assert (answer.status, answer.reason) == (503, "buffer_full")
    small.settle()


def test_more_buffered_bytes_than_allowed_are_503(small: Gateway) -> None:
    clients = [small.connect() for _ in range(3)]
    for client in clients[:2]:
        client.send(H + b"Content-Length: 50000\r\n\r\n" + MODEL_LAST + b"x" * 25_000)
    eventually(lambda: small.worker_count(metrics.BUFFERED_BYTES) > 50_000)
    clients[2].send(H + b"Content-Length: 20000\r\n\r\n" + MODEL_LAST + b"x" * 15_000)
    answer = clients[2].answer()
    assert (answer.status, answer.reason) == (503, "buffer_full")
    assert answer.headers["retry-after"] == "1"
    for client in clients:
        client.close()
    small.settle()


def test_a_body_in_tiny_pieces_costs_no_more_memory_than_it_has_bytes() -> None:
    with gateway() as served, served.connect() as client:
        before = served.rss_bytes()
        client.send(H + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(MODEL_LAST))
        tiny = b"2\r\nxx\r\n" * 20_000
        for _ in range(20):
            client.send(tiny)
        eventually(lambda: served.worker_count(metrics.BUFFERED_BYTES) == 800_000 + 6)
        # Measured: 8 MiB, of which little is the body; 20.5 where no layer joins the pieces.
        assert served.rss_bytes() - before < 14 << 20


def test_a_refusal_is_read_by_a_client_that_is_still_sending(small: Gateway) -> None:
    """Closing with unread bytes would reset the connection and lose the answer."""
    for head in (
        b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 3000000\r\n\r\n",
        H + b"Content-Length: 3000000\r\n\r\n",
        H + b"Bad Header\r\nContent-Length: 3000000\r\n\r\n",
    ):
        with small.connect() as client:
            client.send(head)
            assert select.select([client.sock], [], [], WAIT_S)[0]  # the refusal is on its way
            for _ in range(10):
                client.send(b"x" * 100_000)
            answer = client.answer()
            assert answer.status in (404, 413, 400)
            assert answer.headers["connection"] == "close"


def test_more_connections_than_allowed_are_503(replica: ScriptedReplica) -> None:
    with gateway(max_connections=3) as served:
        served.publish(replica)
        kept = [served.connect() for _ in range(3)]
        for client in kept:
            client.send(post(BODY))
            assert client.answer().status == 200
        with served.connect() as beyond:
            beyond.send(post(BODY))
            answer = beyond.answer()
            assert beyond.ended()
        assert (answer.status, answer.reason) == (503, "connections_full")
        kept.pop().close()
        eventually(lambda: served.ask(post(BODY)).status == 200)
        for client in kept:
            client.close()


def test_a_slow_head_is_408(short_head: Gateway) -> None:
    """However slowly it comes: a byte now and then does not buy time."""
    with short_head.connect() as client:
        client.send(b"GET /v1/")
        drip(client, b"x")
        answer = client.answer()
        assert client.ended()
    assert (answer.status, answer.reason) == (408, "head_timeout")


def test_a_connection_that_never_asks_is_closed(short_head: Gateway) -> None:
    with short_head.connect() as client:
        assert client.ended()


def test_an_idle_connection_is_closed(short_idle: Gateway) -> None:
    with short_idle.connect() as client:
        client.send(get(b"/health"))
        assert client.answer().status == 200
        assert client.ended()


@pytest.mark.parametrize("start", [MODEL_FIRST + b"x" * 70_000, MODEL_LAST])
@pytest.mark.parametrize("framing", [b"Content-Length: 200000", b"Transfer-Encoding: chunked"])
def test_a_slow_body_is_408(short_body: Gateway, framing: bytes, start: bytes) -> None:
    with short_body.connect() as client:
        client.send(H + framing + b"\r\n\r\n")
        client.send(chunks(start) if framing.startswith(b"T") else start)
        answer = client.answer()
        assert client.ended()
    assert (answer.status, answer.reason) == (408, "body_timeout")
    short_body.settle()


def test_a_body_that_drips_for_ever_is_ended_by_the_request_timeout(
    short_request: Gateway,
) -> None:
    with short_request.connect() as client:
        client.send(H + b"Content-Length: 1000\r\n\r\n")
        drip(client, b" ")
        answer = client.answer()
    assert (answer.status, answer.reason) == (504, "request_timeout")


def test_an_answer_that_takes_too_long_is_504(short_request: Gateway) -> None:
    def script(asked: Asked) -> None:
        asked.request()
        asked.cancelled()

    with ScriptedReplica(script) as slow, short_request.connect() as client:
        short_request.publish(slow)
        client.send(post(BODY))
        answer = client.answer()
        eventually(lambda: slow.cancels == 1)
    assert (answer.status, answer.reason) == (504, "request_timeout")


def test_a_stream_that_takes_too_long_is_cut() -> None:
    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM)
        while True:
            asked.send(chunks(b"data: {}\n\n"))
            time.sleep(0.1)

    with (
        ScriptedReplica(script) as slow,
        gateway(request_timeout_s=5.0) as quick,  # its first bytes must come sooner
        quick.connect() as client,
    ):
        quick.publish(slow)
        client.send(post({"model": "m", "stream": True}))
        rest = client.rest()
    assert b'"code":"replica_cut"' in rest
    assert not rest.endswith(b"0\r\n\r\n")


def test_a_held_request_is_ended_by_the_request_timeout(short_request: Gateway) -> None:
    short_request.publish()
    answer = short_request.ask(post(BODY))
    assert (answer.status, answer.reason) == (504, "request_timeout")
    short_request.settle()


def test_a_slow_body_after_an_early_answer_began_does_not_write_into_it(
    short_body: Gateway,
) -> None:
    """The engine answers while the client still uploads, and the client then stalls."""

    def script(asked: Asked) -> None:
        asked.head()
        asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nfirst")
        asked.cancelled()

    with ScriptedReplica(script) as early, short_body.connect() as client:
        short_body.publish(early)
        client.send(H + b"Content-Length: 200000\r\n\r\n" + MODEL_FIRST + b"x" * 70_000)
        drip(client, b"x")  # it stalls only now: however long the answer took to begin
        assert b"connection: close" in client.until(b"\r\n\r\n")
        assert client.rest() == b"first"


def test_a_bad_chunk_after_an_early_answer_began_does_not_write_into_it(
    short_idle: Gateway,
) -> None:
    def script(asked: Asked) -> None:
        asked.head()
        asked.send(STREAM + chunks(b"data: 1\n\n"))
        asked.cancelled()

    with ScriptedReplica(script) as early, short_idle.connect() as client:
        short_idle.publish(early)
        client.send(H + b"Transfer-Encoding: chunked\r\n\r\n" + chunks(MODEL_FIRST + b"x" * 70_000))
        client.until(b"data: 1\n\n\r\n")
        client.send(b"no chunk\r\n")
        assert client.rest() == b""
        assert not client.buffer


def test_every_refusal_is_counted_by_reason(small: Gateway) -> None:
    before = small.rejected(Reason.HEAD_TOO_LARGE)
    small.ask(get(b"/health", *[b"X: y"] * 20))
    eventually(lambda: small.rejected(Reason.HEAD_TOO_LARGE) == before + 1)
