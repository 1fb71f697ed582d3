"""Strict framing at the wire: what is ambiguous is refused and the connection closed."""

from __future__ import annotations

import contextlib
import json
import random
import select
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from datapath_rig import Gateway, ScriptedReplica, answers, chunks, gateway, get, post
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

H = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
BODY = b'{"model":"m"}'
SMUGGLED = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = H + b"Transfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(scope="module")
def replica() -> Iterator[ScriptedReplica]:
    with ScriptedReplica(answers()) as running:
        yield running


@pytest.fixture(scope="module")
def served(replica: ScriptedReplica) -> Iterator[Gateway]:
    with gateway() as running:
        running.publish(replica)
        yield running


REFUSED = {
    "CL and TE": H + b"Content-Length: 13\r\nTransfer-Encoding: chunked\r\n\r\n" + BODY,
    "TE and CL": H + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "two CL": H + b"Content-Length: 13\r\nContent-Length: 13\r\n\r\n" + BODY,
    "two different CL": H + b"Content-Length: 13\r\nContent-Length: 0\r\n\r\n" + BODY,
    "CL list": H + b"Content-Length: 13, 13\r\n\r\n" + BODY,
    "CL empty": H + b"Content-Length:\r\n\r\n",
    "CL plus": H + b"Content-Length: +13\r\n\r\n" + BODY,
    "CL minus": H + b"Content-Length: -1\r\n\r\n" + BODY,
    "CL underscore": H + b"Content-Length: 1_3\r\n\r\n" + BODY,
    "CL hex": H + b"Content-Length: 0xd\r\n\r\n" + BODY,
    "CL inner space": H + b"Content-Length: 1 3\r\n\r\n" + BODY,
    "CL overflow": H + b"Content-Length: 18446744073709551629\r\n\r\n" + BODY,
    "CL folded": H + b"Content-Length:\r\n 13\r\n\r\n" + BODY,
    "TE identity": H + b"Transfer-Encoding: identity\r\n\r\n",
    "TE gzip, chunked": H + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "TE chunked, chunked": H + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "TE twice": H + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "TE x": H + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "TE vertical tab": H + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "TE quoted": H + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "TE parameter": H + b"Transfer-Encoding: chunked;q=1\r\n\r\n0\r\n\r\n",
    "TE space colon": H + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "TE folded": H + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "TE in 1.0": CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0") + b"0\r\n\r\n",
    "two Hosts": H + b"Host: y\r\nContent-Length: 13\r\n\r\n" + BODY,
    "no Host": b"GET /v1/models HTTP/1.1\r\n\r\n",
    "bare LF line": b"GET /v1/models HTTP/1.1\nHost: x\r\n\r\n",
    "bare LF head": b"GET /v1/models HTTP/1.1\nHost: x\n\n",
    "bare LF header": H + b"X: y\nContent-Length: 13\r\n\r\n" + BODY,
    "bare LF end": H + b"X: y\n\n" + SMUGGLED,
    "bare CR": H + b"X: y\rContent-Length: 13\r\n\r\n" + BODY,
    "CR CR LF": H + b"X: y\r\r\n\r\n",
    "obs-fold": H + b"X: a\r\n b\r\nContent-Length: 13\r\n\r\n" + BODY,
    "obs-fold tab": H + b"X: a\r\n\tb\r\nContent-Length: 13\r\n\r\n" + BODY,
    "space first": b"GET /v1/models HTTP/1.1\r\n Host: x\r\n\r\n",
    "space colon": H + b"X : a\r\n\r\n",
    "no colon": H + b"X\r\n\r\n",
    "empty name": H + b": x\r\n\r\n",
    "NUL in value": H + b"X: a\0b\r\n\r\n",
    "NUL in name": H + b"X\0: a\r\n\r\n",
    "control in target": b"GET /v1/\x01 HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/0.9": b"GET /v1/models\r\n\r\n",
    "HTTP/1.2": b"GET /v1/models HTTP/1.2\r\nHost: x\r\n\r\n",
    "HTTP/2.0": b"GET /v1/models HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "two spaces": b"GET  /v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "two spaces after": b"GET /v1/models  HTTP/1.1\r\nHost: x\r\n\r\n",
    "space at the end": b"GET /v1/models HTTP/1.1 \r\nHost: x\r\n\r\n",
    "tab": b"GET\t/v1/models\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "not a path": b"GET v1/models HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "RTSP": b"DESCRIBE / RTSP/1.0\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "websocket": b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\n"
    b"Upgrade: websocket\r\n\r\n",
    "chunk size not hex": CHUNKED + b"g\r\n",
    "chunk size empty": CHUNKED + b"\r\n",
    "chunk size sign": CHUNKED + b"+1\r\na\r\n0\r\n\r\n",
    "chunk size 0x": CHUNKED + b"0x1\r\na\r\n0\r\n\r\n",
    "chunk size space": CHUNKED + b"1 \r\na\r\n0\r\n\r\n",
    "chunk size leading space": CHUNKED + b" 1\r\na\r\n0\r\n\r\n",
    "chunk size huge": CHUNKED + b"10000000000000000\r\n",
    "chunk size bare LF": CHUNKED + b"1\na\r\n0\r\n\r\n",
    "chunk size bare CR": CHUNKED + b"1\ra\r\n0\r\n\r\n",
    "chunk end missing": CHUNKED + b"1\r\naX0\r\n\r\n",
    "chunk end bare LF": CHUNKED + b"1\r\na\n0\r\n\r\n",
    "chunk extension NUL": CHUNKED + b"1;a\0\r\na\r\n0\r\n\r\n",
    "chunk extension long": CHUNKED + b"1;" + b"a" * 400,
    "trailer bare LF": CHUNKED + b"0\r\nX: y\n\r\n\r\n",
    "trailer no colon": CHUNKED + b"0\r\nnothing\r\n\r\n",
    "trailer folded": CHUNKED + b"0\r\nX: y\r\n z\r\n\r\n",
    "trailer endless": CHUNKED + b"0\r\nX: " + b"y" * 8000,
}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_an_ambiguous_message_is_400_and_the_connection_closes(
    served: Gateway, replica: ScriptedReplica, case: str, split: bool
) -> None:
    seen = len(replica.requests)
    data = REFUSED[case] + SMUGGLED
    with served.connect() as client:
        with contextlib.suppress(ConnectionError):
            for piece in (data[:50], data[50:]) if split else (data,):
                client.send(piece)
                time.sleep(0.005 if split else 0)
        answer = client.answer()
        assert answer.status == 400
        assert answer.reason in ("bad_request", "upgrade_unsupported")
        assert answer.headers["connection"] == "close"
        assert answer.json()["error"]["type"] == "invalid_request_error"
        assert client.ended()  # so what was smuggled behind it gets no answer
    assert len(replica.requests) == seen


ACCEPTED = {
    "plain": post(BODY),
    "absolute-form": post(BODY).replace(b"POST /v1", b"POST http://somewhere:80/v1"),
    "lower case": H.lower().replace(b"post", b"POST").replace(b"http/", b"HTTP/")
    + b"content-length: 13\r\n\r\n"
    + BODY,
    "chunked": CHUNKED + chunks(BODY) + b"0\r\n\r\n",
    "chunked, odd case": H + b"tRANSFER-eNCODING: CHUNKED\r\n\r\n" + chunks(BODY) + b"0\r\n\r\n",
    "chunk extensions": CHUNKED + b'd;name="value"\r\n' + BODY + b"\r\n0;x\r\n\r\n",
    "chunk zeros": CHUNKED + b"000d\r\n" + BODY + b"\r\n000\r\n\r\n",
    "trailers": CHUNKED + chunks(BODY) + b"0\r\nX: y\r\nContent-Length: 5\r\n\r\n",
    "empty lines before": b"\r\n\r\n" + post(BODY),
    "h2c offered": post(
        BODY,
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    ),
    "h2c offered, chunked": H
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
    + b"HTTP2-Settings: AAE\r\nTransfer-Encoding: chunked\r\n\r\n"
    + chunks(BODY)
    + b"0\r\n\r\n",
    "1.0": post(BODY).replace(b"HTTP/1.1", b"HTTP/1.0"),
    "1.0 without Host": b"POST /v1/completions HTTP/1.0\r\nContent-Length: 13\r\n\r\n" + BODY,
}


@pytest.mark.parametrize("step", [1, 17, 100_000])
@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_well_formed_is_answered_however_it_is_cut(
    served: Gateway, replica: ScriptedReplica, case: str, step: int
) -> None:
    data = ACCEPTED[case]
    with served.connect() as client:
        for start in range(0, len(data), step):
            client.send(data[start : start + step])
        assert client.answer().status == 200
        if "1.0" not in case:
            client.send(SMUGGLED)
            assert client.answer().json()["object"] == "list"
    assert replica.requests[-1].body == BODY
    assert replica.requests[-1].line == b"POST /v1/completions HTTP/1.1"
    assert "upgrade" not in replica.requests[-1].headers
    assert "http2-settings" not in replica.requests[-1].headers


def test_expect_100_continue_is_met_before_the_body_comes(served: Gateway) -> None:
    with served.connect() as client:
        client.send(H + b"Expect: 100-continue\r\nContent-Length: 13\r\n\r\n")
        assert client.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.send(BODY)
        assert client.answer().status == 200


def test_another_expectation_is_417(served: Gateway) -> None:
    answer = served.ask(post(BODY, b"Expect: miracles"))
    assert (answer.status, answer.reason) == (417, "expectation_unsupported")


def test_http_1_0_keeps_the_connection_only_if_asked(served: Gateway) -> None:
    with served.connect() as client:
        for _ in range(2):
            client.send(b"GET /health HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            assert client.answer().status == 200
        client.send(b"GET /health HTTP/1.0\r\n\r\n")
        assert client.answer().status == 200
        assert client.ended()


def test_connection_close_is_obeyed_and_said(served: Gateway) -> None:
    with served.connect() as client:
        client.send(post(BODY, b"Connection: close"))
        answer = client.answer()
        assert answer.headers["connection"] == "close"
        assert client.ended()


def test_endless_empty_lines_cost_nothing(served: Gateway) -> None:
    (worker,) = map(psutil.Process, served.pids())
    before = worker.cpu_times()
    with served.connect() as client:
        for _ in range(40):
            client.send(b"\r\n" * 50_000)
        client.send(SMUGGLED)
        assert client.answer().status == 200
    after = worker.cpu_times()
    assert after.user - before.user < 2  # of its own work, whatever else the machine does


def mutated(data: bytes, seed: int) -> bytes:
    """The data with a few bytes changed, dropped, doubled or moved."""
    chance = random.Random(seed)
    result = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(result))
        kind = chance.randrange(4)
        if kind == 0:
            result[at] = chance.choice(b"\r\n \t\0:,;0aF\xff%/?")
        elif kind == 1:
            del result[at : at + chance.randint(1, 3)]
        elif kind == 2:
            result[at:at] = chance.choice([b"\r\n", b"\n", b"\r", b" ", b"0\r\n\r\n", SMUGGLED])
        else:
            result[at:at] = result[at : at + chance.randint(1, 20)]
        result = result or bytearray(b"x")
    return bytes(result)


WELL_FORMED = sorted(ACCEPTED)


@settings(
    max_examples=250,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    st.one_of(
        st.binary(max_size=300),
        st.tuples(st.sampled_from(WELL_FORMED), st.integers(0, 1 << 32)),
    ),
    st.lists(st.integers(1, 40), max_size=6),
)
def test_fuzz_a_worker_answers_or_closes_and_serves_the_next(
    served: Gateway, what: bytes | tuple[str, int], cuts: list[int]
) -> None:
    data = what if isinstance(what, bytes) else mutated(ACCEPTED[what[0]], what[1])
    with served.connect() as client:
        try:
            for size in cuts:
                client.send(data[:size])
                data = data[size:]
            client.send(data)
            select.select([client.sock], [], [], 0.02)
            with contextlib.suppress(OSError):  # it is closed already
                client.sock.shutdown(socket.SHUT_WR)
            reply = client.rest()
        except ConnectionError:
            reply = b""
        # It is over long before any time-out, and what came is HTTP.
        assert reply == b"" or reply.startswith(b"HTTP/1.1 ")
        statuses = [line[9:12] for line in reply.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
        assert all(status[:1] in b"1234" for status in statuses), reply


def test_after_the_fuzzing_the_worker_is_the_same_and_its_books_balance(served: Gateway) -> None:
    assert served.workers.status()[0]["restarts"] == 0
    assert served.ask(post(json.loads(BODY))).status == 200
    assert served.ask(get(b"/health")).status == 200
    served.settle()
    assert "Traceback" not in served.log()
    assert "Fatal error" not in served.log()
