"""Bodies and answers pass through the gateway as they are, whatever their size and framing."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections.abc import Iterator

import pytest
from datapath_rig import (
    STREAM,
    WAIT_S,
    Asked,
    Gateway,
    ScriptedReplica,
    answers,
    chunks,
    eventually,
    gateway,
    get,
    post,
    says,
)

from gateway.datapath import metrics

SMALL = post({"model": "m", "prompt": "hello"})


@pytest.fixture(scope="module")
def served() -> Iterator[Gateway]:
    with gateway() as running:
        yield running


@pytest.fixture(scope="module")
def once() -> Iterator[Gateway]:
    """A gateway that tries nothing twice."""
    with gateway(max_retries=0) as running:
        yield running


@pytest.fixture(autouse=True)
def balanced(served: Gateway) -> Iterator[None]:
    yield
    served.publish()
    served.settle()


def prompt(size: int, *, model_first: bool, model: str = "m") -> bytes:
    text = "".join(random.Random(size).choices("abcdefgh \\n", k=size)).replace("\\", "")
    messages = [{"role": "user", "content": text}]
    body = {"model": model, "messages": messages}
    if not model_first:
        body = {"messages": messages, "model": model}
    return json.dumps(body).encode()


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("size", [0, 1000, 65536, 220_000, 5_000_000])
def test_a_request_body_arrives_byte_for_byte(
    served: Gateway, size: int, model_first: bool
) -> None:
    body = prompt(size, model_first=model_first)
    with ScriptedReplica(answers()) as replica:
        served.publish(replica)
        assert served.ask(post(body)).status == 200
    assert replica.requests[0].body == body


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("piece", [7, 1000, 50_000])
def test_a_chunked_upload_arrives_byte_for_byte(
    served: Gateway, piece: int, model_first: bool
) -> None:
    size = 3000 if piece == 7 else 300_000
    body = prompt(size, model_first=model_first)
    with ScriptedReplica(answers()) as replica, served.connect() as client:
        served.publish(replica)
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for start in range(0, len(body), piece):
            client.send(chunks(body[start : start + piece]))
        client.send(b"0\r\nX-Trailer: dropped\r\n\r\n")
        assert client.answer().status == 200
        client.send(SMALL)  # and the connection goes on
        assert client.answer().status == 200
    assert replica.requests[0].body == body


@pytest.mark.parametrize("size", [20, 220_000])
@pytest.mark.parametrize("model_first", [True, False])
def test_the_replica_sees_its_own_model_name_and_nothing_else_changes(
    served: Gateway, size: int, model_first: bool
) -> None:
    body = prompt(size, model_first=model_first, model="alias")
    with ScriptedReplica(answers()) as replica:
        served.publish(served.replica(replica.url, served_model='the "real" \\ model'))
        assert served.ask(post(body)).status == 200
    seen = json.loads(replica.requests[0].body)
    assert seen.pop("model") == 'the "real" \\ model'
    assert seen == {"messages": json.loads(body)["messages"]}


def test_a_renamed_body_that_only_the_engine_can_judge_still_gets_an_answer(
    served: Gateway,
) -> None:
    bad_key = b'{"\xff": 1, "model": "alias"}'
    large = b'{"model": "alias", "prompt": "' + b"x" * 100_000 + b'", nonsense'
    with ScriptedReplica(answers()) as replica:
        served.publish(served.replica(replica.url, served_model="real"))
        assert served.ask(post(bad_key)).status in (200, 400)
        assert served.ask(post(large)).status in (200, 400)


def test_headers_travel_except_those_of_the_hop(served: Gateway) -> None:
    with ScriptedReplica(answers()) as replica:
        served.publish(
            served.replica(
                replica.url + "/base/", headers=(("Authorization", "Bearer engine"), ("X-A", "1"))
            )
        )
        served.ask(
            post(
                {"model": "m"},
                b"Authorization: Bearer client",
                b"X-Custom: kept",
                b"Keep-Alive: timeout=5",
                b"TE: trailers",
                b"Accept-Encoding: gzip",
                b"Proxy-Authorization: secret",
                b"Connection: x-named",
                b"X-Named: of this hop only",
                b"X-Request-Id: mine",
                path=b"/v1/completions?a=b",
            )
        )
    seen = replica.requests[0]
    assert seen.line == b"POST /base/v1/completions?a=b HTTP/1.1"
    assert seen.headers["authorization"] == "Bearer engine"
    assert seen.headers["x-a"] == "1"
    assert seen.headers["x-custom"] == "kept"
    assert seen.headers["x-request-id"] == "mine"
    assert seen.headers["host"] == f"127.0.0.1:{replica.port}"
    gone = {"keep-alive", "te", "accept-encoding", "proxy-authorization", "connection", "x-named"}
    assert not gone & set(seen.headers)
    assert len(seen.lines) == len(seen.headers)  # nothing twice


EVENTS = b"".join(
    b'data: {"choices":[{"delta":{"content":"%d"}}]}\n\n' % number for number in range(40)
)


def cuttings() -> list[bytes]:
    """One streamed answer, with different chunk sizes."""
    cut = random.Random(5)
    bodies = [chunks(EVENTS), chunks(*(EVENTS[i : i + 1] for i in range(200))) + chunks(EVENTS)]
    for _ in range(6):
        parts, rest = [], EVENTS
        while rest:
            size = cut.randint(1, 90)
            parts.append(rest[:size])
            rest = rest[size:]
        bodies.append(chunks(*parts))
    return [body + b"0\r\n\r\n" for body in bodies]


@pytest.mark.parametrize("write", [1, 3, 11, 64, 100_000])
def test_a_stream_is_byte_identical_however_the_replica_cuts_it(
    served: Gateway, write: int
) -> None:
    for body in cuttings()[:2] if write == 1 else cuttings():
        with ScriptedReplica(lambda asked, body=body: trickle(asked, body, write)) as replica:
            served.publish(replica)
            with served.connect() as client:
                client.send(SMALL)
                head = client.until(b"\r\n\r\n")
                assert b"transfer-encoding: chunked" in head
                assert client.exactly(len(body)) == body
                client.send(SMALL)  # the connections on both sides are usable again
                assert client.answer().status == 200
        assert replica.connections == 1


def trickle(asked: Asked, body: bytes, write: int) -> None:
    while asked.request() is not None:
        asked.send(STREAM)
        for start in range(0, len(body), write):
            asked.send(body[start : start + write])
            if write < 20 and start % 50 == 0:
                time.sleep(0.0005)


BODY = b'{"usage":{"prompt_tokens":1,"completion_tokens":2}}'
FRAMINGS = {
    "length": (b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY), BODY, b""),
    "chunked": (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
        chunks(BODY),
        b"0\r\n\r\n",
    ),
    "close": (b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n", BODY, b""),
    "1.0 close": (b"HTTP/1.0 200 OK\r\n\r\n", BODY, b""),
    "1.0 length": (b"HTTP/1.0 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY), BODY, b""),
    "interim": (
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(BODY),
        BODY,
        b"",
    ),
    "trailers": (
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n",
        chunks(BODY),
        b"0\r\nx-trailer: 1\r\n\r\n",
    ),
}


@pytest.mark.parametrize("client_version", [b"1.1", b"1.0"])
@pytest.mark.parametrize("pause_s", [0.0, 0.02])
@pytest.mark.parametrize("framing", FRAMINGS)
def test_an_answer_arrives_whole_with_any_framing(
    served: Gateway, framing: str, pause_s: float, client_version: bytes
) -> None:
    def script(asked: Asked) -> None:
        while asked.request() is not None:
            pieces = FRAMINGS[framing]
            if pause_s == 0:
                pieces = (b"".join(pieces),)
            for piece in pieces:
                asked.send(piece)
                time.sleep(pause_s)
            if "close" in framing:
                return

    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        client.send(SMALL.replace(b"HTTP/1.1", b"HTTP/" + client_version, 1))
        answer = client.answer()
        assert answer.status == 200
        assert answer.version == b"HTTP/1.1"
        if client_version == b"1.0":
            assert "transfer-encoding" not in answer.headers
            assert client.ended()
        assert answer.body == BODY


@pytest.mark.parametrize("status", [b"204 No Content", b"304 Not Modified"])
def test_an_answer_without_a_body_ends_with_its_head(served: Gateway, status: bytes) -> None:
    with ScriptedReplica(says(b"HTTP/1.1 " + status + b"\r\n\r\n")) as replica:
        served.publish(replica)
        with served.connect() as client:
            for _ in range(2):
                client.send(SMALL)
                assert client.answer().status == int(status[:3])
    assert replica.connections == 1


def test_an_engines_error_passes_untouched(served: Gateway) -> None:
    body = b'{"object":"error","message":"too long"}'
    answer = b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\nx-engine: 1\r\n\r\n" % len(body)
    with ScriptedReplica(says(answer + body)) as replica:
        served.publish(replica)
        seen = served.ask(SMALL)
    assert (seen.status, seen.body, seen.reason) == (400, body, None)
    assert seen.headers["x-engine"] == "1"


def test_a_large_model_first_body_streams_through_with_bounded_memory(served: Gateway) -> None:
    size = 48_000_000
    head = b'{"model":"m","prompt":"'
    received = hashlib.sha256()
    peak = [0]

    def script(asked: Asked) -> None:
        request = asked.head()
        assert request is not None
        left = int(request.headers["content-length"])
        while left:
            assert asked.buffer or asked.more()
            received.update(asked.buffer)
            left -= len(asked.buffer)
            asked.buffer = b""
            peak[0] = max(peak[0], served.worker_count(metrics.BUFFERED_BYTES))
        asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    sent = hashlib.sha256(head)
    before = served.rss_bytes()
    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % size + head
        )
        block = b"x" * (1 << 20)
        left = size - len(head) - 2
        while left:
            part = block[:left]
            client.send(part)
            sent.update(part)
            left -= len(part)
        sent.update(b'"}')
        client.send(b'"}')
        assert client.answer().status == 200
    assert received.digest() == sent.digest()
    assert peak[0] < 1 << 20
    assert served.rss_bytes() - before < 12 << 20


def test_the_tokens_of_a_streamed_body_are_learned_from_its_whole_size(served: Gateway) -> None:
    """The estimator must not divide a prefix by the tokens of the whole."""
    body = b'{"model":"m","max_tokens":1,"prompt":"' + b"x" * 400_000 + b'"}'
    usage = b'{"usage":{"prompt_tokens":%d,"completion_tokens":1}}' % (len(body) // 4)

    def slowly(asked: Asked) -> None:
        while (request := asked.request()) is not None:
            if len(request.body) < 1000:
                held.append(1)
                looked.wait(30)
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(usage) + usage)

    held: list[int] = []
    looked = threading.Event()
    with ScriptedReplica(slowly) as replica:
        (published,) = served.publish(replica)
        with served.connect() as client:
            for _ in range(20):
                client.send(post(body))
                assert client.answer().status == 200
            small = b'{"model":"m","max_tokens":1,"prompt":"' + b"x" * 900 + b'"}'
            client.send(post(small))
            eventually(lambda: held)
            tokens = served.inflight(published.slot)[1]
            looked.set()
            client.answer()
    # 4 bytes per token is both the default and what the engine reports.
    assert tokens == pytest.approx(len(small) / 4, rel=0.25)


def test_an_answer_before_the_upload_ends_reaches_the_client(served: Gateway) -> None:
    refusal = b'{"error":"too large"}'

    def script(asked: Asked) -> None:
        asked.head()
        asked.send(b"HTTP/1.1 413 X\r\ncontent-length: %d\r\n\r\n%b" % (len(refusal), refusal))
        asked.cancelled()

    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        body = prompt(1_000_000, model_first=True)
        client.send(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
            + body[:100_000]
        )
        answer = client.answer()
        assert (answer.status, answer.body) == (413, refusal)
        # More of the body is taken without a reset, then the connection ends.
        client.send(body[100_000:150_000])
        assert client.ended()


@pytest.mark.parametrize("garbage", [b"garbage", b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n", b"0\r\n\r\n"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("together", [True, False])
def test_garbage_after_an_answer_never_reaches_the_client(
    once: Gateway, framing: str, garbage: bytes, together: bool
) -> None:
    whole = b"".join(FRAMINGS[framing])

    closed = []
    arrived = threading.Semaphore(0)

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            if together:
                asked.send(whole + garbage)
            else:
                asked.send(whole)
                arrived.acquire(timeout=WAIT_S)
                asked.send(garbage)
        closed.append(asked)

    with ScriptedReplica(script) as replica, once.connect() as client:
        for number in range(2):
            once.publish(replica)
            client.send(SMALL)
            answer = client.answer()
            arrived.release()
            assert client.buffer == b""
            assert (answer.status, answer.body) == (200, BODY) or (
                together and answer.status == 502 and answer.reason == "replica_failed"
            )
            eventually(lambda count=number + 1: len(closed) == count)  # it saw the garbage
        client.send(get(b"/v1/models"))
        assert client.answer().json()["object"] == "list"
        assert client.buffer == b""


MALFORMED = {
    "not HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "status 099": b"HTTP/1.1 099 X\r\ncontent-length: 0\r\n\r\n",
    "four digits": b"HTTP/1.1 2000 X\r\ncontent-length: 0\r\n\r\n",
    "HTTP/2": b"HTTP/2 200 OK\r\ncontent-length: 0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab",
    "length list": b"HTTP/1.1 200 OK\r\ncontent-length: 2, 2\r\n\r\nab",
    "length not a number": b"HTTP/1.1 200 OK\r\ncontent-length: +2\r\n\r\nab",
    "length and chunked": b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n"
    b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    "gzip": b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\nab",
    "folded": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: a\r\n b\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: a\ny: b\r\n\r\n",
    "bare CR": b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nx: a\ry: b\r\n\r\n",
    "bad chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\nx: " + b"y" * 50_000,
    "too much body": b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nabc",
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_answer_is_502(once: Gateway, case: str) -> None:
    with ScriptedReplica(says(MALFORMED[case])) as replica:
        once.publish(replica)
        answer = once.ask(SMALL)
    assert (answer.status, answer.reason) == (502, "replica_failed")
    assert answer.json()["error"]["type"] == "server_error"


def test_pipelined_requests_are_answered_in_order(served: Gateway) -> None:
    def script(asked: Asked) -> None:
        while (request := asked.request()) is not None:
            time.sleep(0.01)
            asked.send(
                b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b"
                % (len(request.body), request.body)
            )

    bodies = [json.dumps({"model": "m", "prompt": str(number)}).encode() for number in range(20)]
    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        mixed = b"".join(post(body) + get(b"/v1/models/m") for body in bodies)
        client.send(mixed)
        for body in bodies:
            assert client.answer().body == body
            assert client.answer().json()["id"] == "m"


def test_a_paused_replica_connection_is_read_again_for_the_next_request(served: Gateway) -> None:
    """An answer whose last block fills the client's buffer must not leave its connection deaf."""
    size = 12_000_000
    big = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size + b"x" * size
    small = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"

    def script(asked: Asked) -> None:
        while (request := asked.request()) is not None:
            asked.send(big if b"big" in request.body else small)

    with ScriptedReplica(script) as replica:
        served.publish(replica)
        for _ in range(3):
            with served.connect(receive_bytes=8192) as slow:
                slow.send(post({"model": "m", "prompt": "big"}))
                eventually(lambda: len(replica.requests) % 2 == 1)
                time.sleep(0.02)
                assert slow.answer().status == 200
                with served.connect() as other:
                    other.send(SMALL)
                    assert other.answer().body == b"{}"
