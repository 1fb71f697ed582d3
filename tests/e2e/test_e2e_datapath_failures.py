"""Replicas that are dead, cut, hang or come back: what the client sees of it, and what it costs."""

from __future__ import annotations

import json
import random
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

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
    free_port,
    gateway,
    get,
    make_certificate,
    post,
)

from gateway.datapath import metrics
from gateway.datapath.protocol.errors import Reason

SMALL = post({"model": "m", "prompt": "hello"})
LONG = json.dumps({"model": "m", "prompt": "x" * 300_000}).encode()
STREAMED = post({"model": "m", "stream": True})


@pytest.fixture(scope="module")
def served() -> Iterator[Gateway]:
    with gateway() as running:
        yield running


@pytest.fixture(autouse=True)
def balanced(served: Gateway) -> Iterator[None]:
    yield
    served.publish()
    served.settle()


def closes_at_once(asked: Asked) -> None:
    pass


def closes_after_request(asked: Asked) -> None:
    asked.request()


def resets(asked: Asked) -> None:
    asked.request()
    asked.reset()


def half_a_head(asked: Asked) -> None:
    asked.request()
    asked.send(b"HTTP/1.1 200 OK\r\ncontent-le")


BAD: dict[str, Callable[[Asked], None] | None] = {
    "dead": None,
    "accepts and closes": closes_at_once,
    "closes after the request": closes_after_request,
    "resets": resets,
    "half a head": half_a_head,
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_replica_costs_no_client_an_error_while_another_is_healthy(
    served: Gateway, kind: str
) -> None:
    script = BAD[kind]
    with ScriptedReplica(answers()) as good, ScriptedReplica(script or closes_at_once) as bad:
        if script is None:
            bad.stop()
        known = served.publish(bad, good)
        for _ in range(12):
            assert served.ask(SMALL).status == 200
        assert served.ask(post(LONG)).status == 200
        eventually(lambda: known[0].id in served.failures)
    assert len(good.requests) >= 12
    assert len({request.headers["x-request-id"] for request in good.requests}) == len(good.requests)


@pytest.mark.parametrize("kind", BAD)
def test_with_a_single_replica_the_request_waits_until_it_is_back(
    served: Gateway, kind: str
) -> None:
    port = free_port()
    script = BAD[kind]
    failures = []

    def once(asked: Asked) -> None:
        if failures or script is None:
            answers()(asked)
        else:
            failures.append(1)
            script(asked)

    if script is None:
        served.publish(served.replica(f"http://127.0.0.1:{port}"))
        with served.connect() as client:
            client.send(SMALL)
            eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
            time.sleep(0.7)
            with ScriptedReplica(once, port=port):
                assert client.answer().status == 200
        return
    with ScriptedReplica(once) as replica:
        served.publish(replica)
        assert served.ask(SMALL).status == 200
        assert failures


@pytest.mark.parametrize("kind", ["closes after the request", "resets", "half a head"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_was_streamed_is_sent_again(served: Gateway, kind: str, chunked: bool) -> None:
    fails = BAD[kind]
    failed: list[int] = []

    def once(asked: Asked) -> None:
        if failed:
            answers()(asked)
        else:
            failed.append(1)
            assert fails is not None
            fails(asked)

    request = post(LONG)
    if chunked:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        request = head + chunks(LONG[:100_000], LONG[100_000:]) + b"0\r\n\r\n"
    with ScriptedReplica(once) as replica:
        served.publish(replica)
        assert served.ask(request).status == 200
    assert [asked.body for asked in replica.requests] == [LONG, LONG]


def test_what_a_streamed_body_says_last_is_known_when_it_is_sent_again(served: Gateway) -> None:
    """That it asks for the stream's usage itself: it is not asked for again, nor taken away."""
    body = {"model": "m", "stream": True, "prompt": "x" * 300_000}
    body["stream_options"] = {"include_usage": True}
    asked_for = json.dumps(body).encode()
    usage = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n'
    failed: list[int] = []

    def once(asked: Asked) -> None:
        asked.request()
        if not failed:
            failed.append(1)
            return
        asked.send(STREAM + chunks(EVENT, usage, b"data: [DONE]\n\n") + b"0\r\n\r\n")

    with ScriptedReplica(once) as replica:
        served.publish(served.replica(replica.url, stream_usage=True))
        answer = served.ask(post(asked_for, path=b"/v1/chat/completions"))
    assert [asked.body for asked in replica.requests] == [asked_for, asked_for]
    assert usage in answer.body


def test_a_body_that_is_too_large_to_keep_is_sent_once(served: Gateway) -> None:
    large = json.dumps({"model": "m", "prompt": "x" * 3_000_000}).encode()
    with ScriptedReplica(closes_after_request) as replica:
        served.publish(replica)
        answer = served.ask(post(large))
    assert (answer.status, answer.reason) == (502, "replica_failed")
    assert len(replica.requests) == 1


def test_a_replica_that_always_fails_is_given_up_after_the_retries(served: Gateway) -> None:
    with ScriptedReplica(closes_after_request) as replica:
        served.publish(replica)
        answer = served.ask(SMALL)
    assert (answer.status, answer.reason) == (502, "replica_failed")
    assert int(answer.headers["retry-after"]) >= 1
    assert len(replica.requests) == 3  # the first attempt and max_retries = 2


def test_stale_kept_connections_cost_the_client_nothing(served: Gateway) -> None:
    """More kept connections than there are retries, each closed the moment it is used again."""
    gate = threading.Barrier(8, timeout=30)

    def script(asked: Asked) -> None:
        kept = replica.connections <= 8
        if asked.request() is None:
            return
        if kept:
            gate.wait()
        asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        if kept:
            asked.head()  # and cut without an answer
        else:
            answers()(asked)

    with ScriptedReplica(script) as replica:
        served.publish(replica)
        clients = [served.connect() for _ in range(8)]
        for client in clients:
            client.send(SMALL)
        for client in clients:
            assert client.answer().status == 200
            client.close()
        assert replica.connections == 8
        for _ in range(3):
            assert served.ask(SMALL).status == 200
        assert replica.connections == 9


@pytest.mark.parametrize("between", [6, 1])
def test_a_request_that_engines_die_of_is_sent_three_times_and_harms_no_other(
    served: Gateway, between: int
) -> None:
    """Over kept connections, which looks like connections that were idle for too long, and over
    new ones; ``between``: requests that go well in the meantime."""
    poison = post({"model": "m", "prompt": "poison"})
    died = []

    def script(asked: Asked) -> None:
        while (request := asked.request()) is not None:
            if b"poison" in request.body:
                died.append(request)
                return
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    before = served.pool_count(metrics.EJECTIONS)
    with (
        ScriptedReplica(script) as one,
        ScriptedReplica(script) as two,
        ScriptedReplica(script) as three,
    ):
        served.publish(one, two, three)
        for _ in range(12):
            for _ in range(between):
                assert served.ask(SMALL).status == 200
            died.clear()
            answer = served.ask(poison)
            assert (answer.status, answer.reason) == (502, "replica_failed")
            assert len(died) <= 3  # the first attempt and max_retries = 2
        # None of the three is out: a request that fails wherever it goes is the one at fault.
        for replica in (one, two, three):
            replica.requests.clear()
        for _ in range(60):
            assert served.ask(SMALL).status == 200
        assert all(replica.requests for replica in (one, two, three))
    assert served.pool_count(metrics.EJECTIONS) == before


def says_status(status: int) -> Callable[[Asked], None]:
    def script(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(b'HTTP/1.1 %d X\r\ncontent-length: 9\r\n\r\n{"no": 1}' % status)

    return script


@pytest.mark.parametrize("status", [500, 502, 503, 429])
def test_an_error_answer_is_asked_of_another_replica(served: Gateway, status: int) -> None:
    with ScriptedReplica(says_status(status)) as bad, ScriptedReplica(answers()) as good:
        known = served.publish(bad, good)
        for _ in range(100):
            assert served.ask(SMALL).status == 200
        if status in (500, 502):
            assert len(bad.requests) == 6  # ejected then
            eventually(lambda: known[0].id in served.failures)
        else:
            assert len(bad.requests) < 20  # spared each time, for a moment
        tried = len(bad.requests)
        counted = [0, tried, 0, 0] if status >= 500 else [tried, 0, 0, 0]
        eventually(lambda: served.shared.replica_counters(0, known[0].slot).tolist() == counted)
    assert len(good.requests) == 100
    assert len({request.headers["x-request-id"] for request in good.requests}) == 100


def test_error_answers_of_all_replicas_are_passed_on_as_they_are(served: Gateway) -> None:
    with (
        ScriptedReplica(says_status(500)) as one,
        ScriptedReplica(says_status(500)) as two,
        gateway() as fresh,
    ):
        fresh.publish(one, two)
        for _ in range(100):
            answer = fresh.ask(SMALL)
            assert (answer.status, answer.reason, answer.body) == (500, None, b'{"no": 1}')
        # Not twice as many requests because each of them fails: ten, and a fifth.
        assert 100 < len(one.requests) + len(two.requests) <= 131


@pytest.mark.parametrize("status", [500, 503, 429, 501, 400])
def test_error_answers_of_a_single_replica_never_take_it_out(served: Gateway, status: int) -> None:
    with ScriptedReplica(says_status(status)) as replica:
        served.publish(replica)
        for _ in range(20):
            assert served.ask(SMALL).status == status
    assert len(replica.requests) == 20


def test_an_error_answer_to_a_held_stream_is_asked_of_another_replica() -> None:
    def stream(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(STREAM + chunks(EVENT) + b"0\r\n\r\n")

    with (
        ScriptedReplica(says_status(500)) as bad,
        ScriptedReplica(stream) as good,
        gateway(keepalive_s=0.1) as served,
    ):
        for _ in range(4):
            with holding(served, STREAMED) as client:
                client.until(b": tidegate: waiting for m")
                served.publish(bad, good)
                body = client.until(b"\r\n0\r\n\r\n")
            assert body.count(EVENT) == 1
            assert b"error" not in body


def test_a_restarted_replica_is_reached_through_its_dead_connections(served: Gateway) -> None:
    first = ScriptedReplica(answers())
    served.publish(served.replica(first.url))
    assert served.ask(SMALL).status == 200
    first.stop()
    with ScriptedReplica(answers(), port=first.port) as second:
        assert served.ask(SMALL).status == 200
    assert len(second.requests) == 1


EVENT = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'


@pytest.mark.parametrize("how", ["close", "reset", "bad chunk"])
def test_a_stream_cut_midway_says_so_and_does_not_end_well(served: Gateway, how: str) -> None:
    seen = threading.Semaphore(0)  # what is cut is behind the client then, however busy all are

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(EVENT))
        seen.acquire(timeout=WAIT_S)
        asked.send(chunks(EVENT))
        seen.acquire(timeout=WAIT_S)
        if how == "reset":
            asked.reset()
        elif how == "bad chunk":
            asked.send(b"zzz\r\n")

    before = served.rejected(Reason.REPLICA_CUT)
    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        client.send(STREAMED)
        assert b" 200 " in client.until(b"\r\n\r\n")
        for _ in range(2):
            assert client.exactly(len(chunks(EVENT))) == chunks(EVENT)
            seen.release()
        rest = client.rest()
    assert b'"code":"replica_cut"' in rest
    assert not rest.endswith(b"0\r\n\r\n")
    assert len(replica.requests) == 1  # after the first byte there is no retry
    eventually(lambda: served.rejected(Reason.REPLICA_CUT) == before + 1)


def test_a_stream_cut_inside_an_event_is_only_closed(served: Gateway) -> None:
    half = b"data: {" + b"x" * 30

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + b"100\r\n" + half)

    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        client.send(STREAMED)
        client.until(b"\r\n\r\n")
        assert client.rest() == b"100\r\n" + half


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
def test_no_client_takes_a_cut_answer_for_whole(
    served: Gateway, framing: str, version: bytes
) -> None:
    heads = {
        "length": b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\n\r\nhalf",
        "chunked": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n",
        "close": b"HTTP/1.1 200 OK\r\n\r\nhalf",
    }

    begun = threading.Event()

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(heads[framing])
        begun.wait(WAIT_S)
        asked.reset()

    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        client.send(SMALL.replace(b"HTTP/1.1", b"HTTP/" + version, 1))
        head = client.until(b"\r\n\r\n")
        begun.set()
        whole = True
        if b"content-length" in head or b"transfer-encoding" in head:
            body = client.rest()
            whole = body.endswith(b"0\r\n\r\n") or len(body) >= 50
        else:
            try:
                while client.sock.recv(1000):
                    pass
            except ConnectionResetError:
                whole = False
        assert not whole
    assert len(replica.requests) == 1


@pytest.mark.parametrize("done", [False, True])
def test_a_client_that_leaves_after_the_last_event_has_its_answer(
    served: Gateway, done: bool
) -> None:
    """OpenAI's clients close at ``[DONE]``, which often comes before the end of the body."""

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(EVENT, *([b"data: [DONE]\n\n"] if done else [])))
        asked.cancelled()

    def ended() -> Counter[int]:
        return Counter({one: served.pool_count(one) for one in (metrics.OK, metrics.CANCELLED)})

    before = ended()
    with ScriptedReplica(script) as replica:
        served.publish(replica)
        with served.connect() as client:
            client.send(STREAMED)
            client.until(b"[DONE]\n\n\r\n" if done else EVENT)
        eventually(lambda: replica.cancels == 1)
    outcome = metrics.OK if done else metrics.CANCELLED
    eventually(lambda: ended() - before == Counter({outcome: 1}))


def test_a_replica_that_says_nothing_is_504(served: Gateway) -> None:
    def script(asked: Asked) -> None:
        asked.request()
        asked.cancelled()

    with (
        ScriptedReplica(script) as replica,
        gateway(upstream_idle_timeout_s=0.6) as quick,
        quick.connect() as client,
    ):
        quick.publish(replica)
        client.send(SMALL)
        answer = client.answer()
        eventually(lambda: replica.cancels == 1)
    assert (answer.status, answer.reason) == (504, "replica_timeout")


def test_a_stream_that_stalls_is_cut(served: Gateway) -> None:
    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(EVENT))
        asked.cancelled()

    with (
        ScriptedReplica(script) as replica,
        gateway(upstream_idle_timeout_s=5.0) as quick,  # its first bytes must come sooner
        quick.connect() as client,
    ):
        quick.publish(replica)
        client.send(STREAMED)
        rest = client.rest()
        eventually(lambda: replica.cancels == 1)
    assert b'"code":"replica_cut"' in rest
    assert not rest.endswith(b"0\r\n\r\n")


def holding(served: Gateway, request: bytes) -> Raw:
    """A client whose request is held, its first keep-alive comment seen."""
    served.publish()
    client = served.connect()
    client.send(request)
    eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
    return client


def test_a_replica_behind_tls_is_asked_if_its_certificate_is_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_certificate(tmp_path, "engine")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    body = b"y" * 1_000_000
    with ScriptedReplica(answers(body), tls=context) as replica:
        with gateway(deadline_s=3.0) as strange:
            strange.publish(replica)
            answer = strange.ask(SMALL)
            assert (answer.status, answer.reason) == (503, "hold_deadline")
            eventually(lambda: strange.failures)
        assert replica.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        with gateway() as served, served.connect() as client:
            served.publish(replica)
            for _ in range(3):
                client.send(post(b'{"model":"m","p":"' + b"x" * 300_000 + b'"}'))
                assert client.answer().body == body
            eventually(lambda: served.worker_count(metrics.UPSTREAM_OPENED) == 1)


WELL_FORMED = [
    b'HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{"text":"abc"}',
    STREAM + chunks(EVENT, EVENT) + b"0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
]


def mutated(data: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    result = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(result) + 1)
        kind = chance.randrange(3)
        if kind == 0:
            result[at : at + 1] = bytes([chance.choice(b"\r\n \t\0:;,0aF9\xff")])
        elif kind == 1:
            del result[at : at + chance.randint(1, 20)]
        else:
            result[at:at] = chance.choice([b"\r\n", b"\n", b"\r", b"0\r\n\r\n", b"1", bytes(99)])
    return bytes(result)


def test_fuzz_no_answer_of_a_replica_harms_a_worker_or_the_next_client() -> None:
    """Whatever an engine says, a client reads HTTP that ends, well or visibly not."""
    wire = [b""]

    def script(asked: Asked) -> None:
        if asked.request() is not None:
            asked.send(wire[0][: len(wire[0]) // 2])
            time.sleep(0.001)
            asked.send(wire[0][len(wire[0]) // 2 :])

    with ScriptedReplica(script) as replica, gateway(max_retries=0) as served:
        published = served.replica(replica.url)
        for seed in range(100):
            good = WELL_FORMED[seed % 3]
            wire[0] = mutated(good, seed)
            served.publish(published)  # it is not to be suspect for long
            with served.connect() as client:
                client.send(STREAMED.replace(b"Host: x", b"Host: x\r\nConnection: close"))
                reply = client.rest()
            assert reply == b"" or reply.startswith(b"HTTP/1.1 "), (seed, wire[0], reply)
        wire[0] = WELL_FORMED[1]
        served.publish(published)
        assert served.ask(STREAMED).body == EVENT + EVENT
        assert served.workers.status()[0]["restarts"] == 0


OUTCOMES: dict[str, tuple[bytes, bytes]] = {
    "stream": (STREAM + chunks(EVENT) + b"0\r\n\r\n", EVENT),
    "stream with length": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: %d\r\n\r\n%b"
        % (len(EVENT), EVENT),
        EVENT,
    ),
    "engine error": (
        b'HTTP/1.1 400 Bad Request\r\ncontent-length: 19\r\n\r\n{"error":{"a":\r\n1}}',
        b'data: {"error":{"a": 1}}\n\ndata: [DONE]\n\n',
    ),
    "engine error in chunks": (
        b"HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n"
        + chunks(b'{"error":', b"1}")
        + b"0\r\n\r\n",
        b'data: {"error":1}\n\ndata: [DONE]\n\n',
    ),
}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_held_stream_gets_comments_and_then_the_answer(kind: str) -> None:
    answer, expected = OUTCOMES[kind]

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(answer)

    with ScriptedReplica(script) as replica, gateway(keepalive_s=0.1) as served:
        with holding(served, STREAMED) as client:
            client.until(b": tidegate: waiting for m")
            client.until(b"\r\n")
            served.publish(replica)
            body = client.chunked()
            while body.startswith(b":"):
                body = body[body.index(b"\n") + 1 :]
            assert body == expected
            client.send(SMALL)  # the connection goes on
            assert client.answer().status in (200, 400, 500)
        assert len(served.wake_signals) >= 1


def test_a_held_stream_whose_replica_fails_keeps_waiting_and_is_answered(served: Gateway) -> None:
    tries = []

    def script(asked: Asked) -> None:
        tries.append(1)
        if len(tries) < 3:
            asked.request()
            return
        while asked.request() is not None:
            asked.send(STREAM + chunks(EVENT) + b"0\r\n\r\n")

    with ScriptedReplica(script) as replica, gateway(keepalive_s=0.1) as quick:
        with holding(quick, STREAMED) as client:
            client.until(b": tidegate: waiting for m")
            quick.publish(replica)
            rest = client.until(b"\r\n0\r\n\r\n")
        assert rest.count(EVENT) == 1
    assert len(tries) == 3


def test_a_held_request_past_its_deadline_is_503_with_the_measured_wake_time() -> None:
    with gateway(deadline_s=0.4) as served:
        served.publish(wake_eta_s=41.2)
        answer = served.ask(SMALL)
    assert (answer.status, answer.reason) == (503, "hold_deadline")
    assert answer.headers["retry-after"] == "42"


@pytest.mark.parametrize("limit", ["requests", "bytes"])
def test_what_the_hold_queue_cannot_take_is_429(limit: str) -> None:
    limits = {"requests": {"max_requests": 2}, "bytes": {"max_bytes": 2 * len(SMALL)}}
    with ScriptedReplica(answers()) as replica, gateway(**limits[limit]) as served:
        clients = [served.connect() for _ in range(2)]
        for client in clients:
            client.send(SMALL)
        eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 2)
        refused = served.ask(
            SMALL if limit == "requests" else post({"model": "m", "prompt": "x" * 200})
        )
        assert (refused.status, refused.reason) == (429, "hold_queue_full")
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert int(refused.headers["retry-after"]) == 30
        served.publish(replica)
        for client in clients:
            assert client.answer().status == 200
            client.close()


def test_held_requests_are_released_in_order_and_no_faster_than_they_are_answered() -> None:
    """The replica answers one at a time, when the test says so: each answer releases two more, for
    the place that is free and for the trust that has grown."""
    most, answers_due = 12, threading.Semaphore(0)

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            assert answers_due.acquire(timeout=60)
            asked.send(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")

    with ScriptedReplica(script) as replica, gateway(release_initial=2) as served:
        clients = []
        for number in range(most):
            client = served.connect()
            client.send(post({"model": "m", "prompt": f"{number:02}"}))
            clients.append(client)
            eventually(lambda n=number: served.pool_count(metrics.QUEUED_REQUESTS) == n + 1)
        served.publish(replica)
        for answered in range(most):
            released = min(most, 2 + 2 * answered)
            eventually(lambda count=released: len(replica.requests) >= count)
            time.sleep(0.02)  # for what should not come
            assert len(replica.requests) == released
            answers_due.release()
        for client in clients:
            assert client.answer().status == 200
            client.close()
        order = [int(json.loads(request.body)["prompt"]) for request in replica.requests]
    assert sorted(order) == list(range(most))  # each exactly once
    # The two of a pair may overtake each other on their two connections; none is left behind.
    assert all(abs(place - number) <= 1 for place, number in enumerate(order)), order


def test_a_replica_that_leaves_finishes_its_streams_and_its_connections_close(
    served: Gateway,
) -> None:
    go = threading.Event()

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(STREAM + chunks(EVENT))
            go.wait(WAIT_S)
            asked.send(chunks(EVENT) + b"0\r\n\r\n")

    with ScriptedReplica(script) as replica, served.connect() as client:
        served.publish(replica)
        client.send(STREAMED)
        client.until(EVENT)
        served.publish()
        go.set()
        assert EVENT in client.until(b"0\r\n\r\n")
        eventually(lambda: served.worker_count(metrics.UPSTREAM_CONNECTIONS) == 0)


def test_a_replica_in_a_new_place_is_asked_there_and_the_old_connections_close(
    served: Gateway,
) -> None:
    with ScriptedReplica(answers()) as old, ScriptedReplica(answers()) as new:
        (first,) = served.publish(old)
        assert served.ask(SMALL).status == 200
        served.publish(served.replica(new.url, id=first.id))
        eventually(lambda: served.worker_count(metrics.UPSTREAM_CONNECTIONS) == 0)
        assert served.ask(SMALL).status == 200
    assert (len(old.requests), len(new.requests)) == (1, 1)


def test_a_model_out_of_service_is_refused_held_or_new_and_not_listed() -> None:
    with gateway() as served, ScriptedReplica(answers()) as replica:
        served.publish()
        with served.connect() as held:
            held.send(post({"model": "m", "prompt": "x"}))
            eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
            served.publish(replica, disabled=True)
            answer = held.answer()
            assert (answer.status, answer.reason) == (503, "model_disabled")
        for name in ("m", "alias"):
            answer = served.ask(post({"model": name, "prompt": "x"}))
            assert (answer.status, answer.reason) == (503, "model_disabled")
            assert answer.headers["retry-after"]
        assert served.ask(get(b"/v1/models")).json()["data"] == []
        assert replica.requests == []
        served.publish(replica)
        assert len(served.ask(get(b"/v1/models")).json()["data"]) == 2
        served.settle()
