"""Errors in the shape of the API that was asked: answers, held streams, streams cut midway."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from datapath_rig import (
    STREAM,
    Answer,
    Asked,
    Gateway,
    ScriptedReplica,
    chunks,
    eventually,
    gateway,
    get,
    post,
)

from gateway.datapath import metrics

CHAT, MESSAGES, RESPONSES = b"/v1/chat/completions", b"/v1/messages", b"/v1/responses"
STREAMED = {"model": "m", "stream": True}


@pytest.fixture(scope="module")
def small() -> Iterator[Gateway]:
    with gateway(max_body_bytes=2_000, max_head_bytes=2_000, max_requests=0) as running:
        yield running


REFUSED: dict[str, tuple[int, str, Callable[[bytes], bytes]]] = {
    "no JSON": (400, "invalid_request_error", lambda path: post(b"{", path=path)),
    "bad head": (
        400,
        "invalid_request_error",
        lambda path: b"POST " + path + b" HTTP/1.1\r\nContent-Length: 1\r\n\r\n1",
    ),
    "unknown model": (404, "not_found_error", lambda path: post({"model": "other"}, path=path)),
    "method": (405, "invalid_request_error", get),
    "body too large": (413, "request_too_large", lambda path: post(b" " * 2_001, path=path)[:-1]),
    "hold queue full": (429, "rate_limit_error", lambda path: post({"model": "m"}, path=path)),
    "head too large": (
        431,
        "invalid_request_error",
        lambda path: post({"model": "m"}, b"X: " + b"y" * 2_000, path=path),
    ),
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, MESSAGES + b"/count_tokens", RESPONSES])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_has_the_shape_of_the_api_that_was_asked(
    small: Gateway, kind: str, path: bytes
) -> None:
    status, anthropic_type, request = REFUSED[kind]
    answer = small.ask(request(path))
    assert answer.status == status
    request_id = answer.headers["x-request-id"]
    error = answer.json()["error"]
    if path.startswith(MESSAGES):
        assert answer.json() == {
            "type": "error",
            "error": {"type": anthropic_type, "message": error["message"]},
            "request_id": request_id,
        }
        assert answer.headers["request-id"] == request_id
    else:
        assert answer.json() == {"error": error}
        assert {"message", "type", "param", "code"} == set(error)
        assert "request-id" not in answer.headers
    assert error["message"]


def test_past_the_deadline_an_anthropic_client_reads_that_we_are_overloaded() -> None:
    with gateway(deadline_s=0.2) as served:
        answer = served.ask(post({"model": "m"}, path=MESSAGES))
    assert (answer.status, answer.json()["error"]["type"]) == (503, "overloaded_error")


@pytest.mark.parametrize("path", [CHAT, MESSAGES, MESSAGES + b"/count_tokens"])
@pytest.mark.parametrize("close", [False, True])
def test_an_anthropic_client_finds_its_request_id(path: bytes, close: bool) -> None:
    def script(asked: Asked) -> None:
        asked.request()
        head = b"HTTP/1.1 200 OK\r\nrequest-id: theirs\r\ncontent-length: 2\r\n\r\n"
        asked.send(head + b"{}")

    lines = [b"X-Request-Id: mine"] + [b"Connection: close"] * close
    with ScriptedReplica(script) as replica, gateway() as served:
        served.publish(replica)
        answer = served.ask(post({"model": "m"}, *lines, path=path))
    found = [value for name, value in answer.lines if name.lower() == b"request-id"]
    assert found == ([b"mine"] if path.startswith(MESSAGES) else [])
    assert answer.headers["x-request-id"] == "mine"


def read_events(body: bytes) -> list[tuple[str, Any]]:
    """A stream's (event, data) as the Go clients of OpenAI and Anthropic read it, who take every
    blank line for the end of an event."""
    found, name, data = [], "", b""
    assert body.endswith(b"\n\n")
    for line in body[:-1].split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            found.append((name, data.decode() if data == b"[DONE]" else json.loads(data)))
            name, data = "", b""
        elif field == b"event":
            name = value.decode()
        elif field == b"data":
            data += value
    return found


def assert_error(path: bytes, events: list[tuple[str, Any]], text: str, *, kind: str) -> None:
    """Whether the stream's last events are the error of that API."""
    if path == CHAT:
        if events[-1] == ("", "[DONE]"):
            events = events[:-1]
        name, data = events[-1]
        assert name == ""
        assert text in data["error"]["message"]
    elif path == MESSAGES:
        name, data = events[-1]
        assert (name, data["type"], data["error"]["type"]) == ("error", "error", kind)
        assert text in data["error"]["message"]
    else:
        name, data = events[-1]
        assert name == data["type"] == "response.failed"
        assert data["response"]["status"] == "failed"
        assert text in data["response"]["error"]["message"]
        numbers = [event["sequence_number"] for _, event in events]
        assert numbers == list(range(len(events)))
        assert events[0][0] == "response.created"


def ask_held(served: Gateway, path: bytes, replica: ScriptedReplica | None = None) -> Answer:
    """The answer to a held stream, its keep-alive comment seen; ``replica`` comes then."""
    served.publish()
    with served.connect() as client:
        client.send(post(STREAMED, path=path))
        head = client.until(b"\r\n\r\n")
        comment = client.until(b"\r\n") + client.until(b"\r\n")
        assert b": tidegate: waiting for m" in comment
        if replica is not None:
            served.publish(replica)
        client.buffer = comment + client.buffer
        answer = Answer(head[:-4], client.chunked())
        client.send(get(b"/health"))  # the connection goes on
        assert client.answer().status == 200
    return answer


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_held_stream_that_fails_ends_with_an_error_of_its_api(path: bytes) -> None:
    with gateway(keepalive_s=0.1, deadline_s=1.0) as served:
        answer = ask_held(served, path)
    assert_error(path, read_events(answer.body), "did not become ready", kind="overloaded_error")
    assert ("request-id" in answer.headers) == (path == MESSAGES)


ENGINE_ERRORS = {
    "OpenAI's shape": b'{"error":{"message":"too\\nlong","type":"BadRequestError","code":400}}',
    "Anthropic's shape": b'{"type":"error",\r\n"error":{"type":"BadRequestError",'
    b'"message":"too\\nlong"}}',
    "an older engine's": b'{"object":"error","message":"too\\nlong","code":400}',
    "FastAPI's": b'{"detail":"too\\nlong"}',
    "none": b"too long",
}


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("shape", ENGINE_ERRORS)
def test_the_engines_error_to_a_held_stream_becomes_one_of_its_api(shape: str, path: bytes) -> None:
    body = ENGINE_ERRORS[shape]

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: %d\r\n\r\n" % len(body) + body)

    with ScriptedReplica(script) as replica, gateway(keepalive_s=0.1) as served:
        answer = ask_held(served, path, replica)
    text = "status 400" if shape == "none" else "too\nlong"
    kind = "BadRequestError" if shape == "Anthropic's shape" else "invalid_request_error"
    assert_error(path, read_events(answer.body), text, kind=kind)


def test_a_held_streams_first_event_is_the_engines() -> None:
    event = b'event: message_start\ndata: {"type":"message_start"}\n\n'

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(event) + b"0\r\n\r\n")

    with ScriptedReplica(script) as replica, gateway(keepalive_s=0.1) as served:
        answer = ask_held(served, MESSAGES, replica)
    assert read_events(answer.body) == [("message_start", {"type": "message_start"})]
    assert answer.body.endswith(event)


CREATED = b'event: response.created\ndata: {"type":"response.created","sequence_number":0}\n\n'


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"])
@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
def test_a_stream_cut_midway_ends_with_an_error_of_its_api(path: bytes, ends: bytes) -> None:
    event = CREATED.replace(b"\n", ends)

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(event))
        asked.more()

    with ScriptedReplica(script) as replica, gateway() as served, served.connect() as client:
        served.publish(replica)
        client.send(post(STREAMED, path=path))
        client.until(b"\r\n\r\n")
        assert client.exactly(len(chunks(event))) == chunks(event)
        replica.stop()
        rest = client.rest()
    assert not rest.endswith(b"0\r\n\r\n")
    size, _, said = rest.partition(b"\r\n")
    events = read_events(CREATED + said[: int(size, 16)])
    assert_error(path, events, "failed mid-answer", kind="api_error")


def test_a_stream_that_is_cut_inside_an_event_of_no_framing_is_not_written_into() -> None:
    def script(asked: Asked) -> None:
        asked.request()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 99\r\n\r\n"
        asked.send(head + b'data: {"half')

    with ScriptedReplica(script) as replica, gateway(keepalive_s=0.1) as served:
        with served.connect() as client:
            client.send(post(STREAMED, path=CHAT))
            client.until(b": tidegate: waiting for m")
            served.publish(replica)
            rest = client.rest()
        assert b'data: {"half' in rest
        assert b"error" not in rest
        eventually(lambda: served.pool_count(metrics.ENGINE_ERROR) == 1)
