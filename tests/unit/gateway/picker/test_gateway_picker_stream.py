"""One ext_proc stream without I/O: what Envoy sends, what it is sent, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from datapath_rig import ClockLoop, make_worker
from ext_proc_rig import (
    BUFFERED,
    DUPLEX,
    NONE,
    STREAMED,
    chat,
    destination,
    joined,
    mutated,
    request_body,
    request_headers,
    request_trailers,
    response_body,
    response_headers,
    response_trailers,
    sent,
)
from hypothesis import given
from hypothesis import strategies as st

from gateway.datapath import metrics
from gateway.datapath.messages import FailureReport, WakeSignal
from gateway.datapath.protocol.errors import Reason
from gateway.picker.stream import ExtProcError, PickerStream
from router.types import Fleet, Pool, Replica, ReplicaState

SSE = b'data: {"choices":[{"index":0,"delta":{"content":"a"}}]}\n\n'
LAST = (
    b'data: {"choices":[{"index":0,"delta":{"content":"b"},"finish_reason":"stop"}]}\n\n'
    b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
    b"data: [DONE]\n\n"
)
WHOLE = json.dumps(
    {
        "choices": [{"finish_reason": "length"}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 5},
    },
    separators=(",", ":"),
).encode()


class Picker:
    """A worker in this process, and the streams of an Envoy that is played by the test."""

    def __init__(self, loop: ClockLoop, **changes: Any) -> None:
        self.loop = loop
        self.messages: list[Any] = []
        self.worker = make_worker(loop, send=self.messages.append, **changes)
        self.notified = 0
        self.version = 0

    def publish(self, *replicas: Replica, **changes: Any) -> None:
        """A fleet of one pool, ``m``, with an alias and an adapter."""
        self.version += 1
        pool = Pool(name="m", slot=0, aliases=("alias",), adapters=("lora",), replicas=replicas)
        changed = msgspec.structs.replace(pool, **changes)
        self.worker.pools.apply(Fleet(version=self.version, pools=(changed,)))

    def stream(self) -> PickerStream:
        def notify() -> None:
            self.notified += 1

        return PickerStream(self.worker.context, self.worker.pools, notify)

    def tell(self, stream: PickerStream, *messages: Any) -> list[Any]:
        """Give a stream these messages; returns all replies so far, and forgets them."""
        for message in messages:
            is_more = stream.receive(message)
            while is_more:
                is_more = stream.read_on()
        replies = [sent(one) for one in stream.replies]
        stream.replies.clear()
        return replies

    def ask(self, stream: PickerStream, body: bytes = chat(), **headers: Any) -> list[Any]:
        return self.tell(stream, request_headers(**headers), request_body(body))

    def count(self, index: int) -> int:
        return int(self.worker.pools.by_name["m"].counters.integers[index])

    def observed(self, histogram: int) -> int:
        start = metrics.HISTOGRAM_OFFSETS[histogram]
        end = start + len(metrics.POOL_HISTOGRAMS[histogram].bounds) + 1
        return sum(self.worker.pools.by_name["m"].counters.integers[start:end])

    def inflight(self) -> list[int]:
        return self.worker.context.ledger.requests[:4]

    def assert_at_rest(self) -> None:
        self.worker.check_integrity()
        ledger, context = self.worker.context.ledger, self.worker.context
        assert not any(ledger.requests)
        assert not any(ledger.tokens)
        assert context.buffered_bytes == 0
        for index in (metrics.INFLIGHT_REQUESTS, metrics.INFLIGHT_TOKENS, metrics.QUEUED_REQUESTS):
            assert self.count(index) == 0


@pytest.fixture
def loop() -> Iterator[ClockLoop]:
    running = ClockLoop()
    yield running
    running.close()


@pytest.fixture
def picker(loop: ClockLoop) -> Picker:
    return Picker(loop)


def replica(slot: int = 0, **changes: Any) -> Replica:
    made = Replica(
        id=f"r{slot}",
        pool="m",
        slot=slot,
        url=f"http://10.0.0.{slot}:8000",
        state=ReplicaState.READY,
    )
    return msgspec.structs.replace(made, **changes)


def refusal(replies: list[Any]) -> tuple[int, dict[str, str], Any]:
    """The status, headers and body of the only reply, which is an immediate response."""
    (reply,) = replies
    assert reply.WhichOneof("response") == "immediate_response"
    answer = reply.immediate_response
    return answer.status.code, mutated(answer.headers), json.loads(answer.body)


# Requests


def test_a_duplex_request_is_answered_when_its_body_is_whole(picker: Picker) -> None:
    picker.publish(replica())
    stream, body = picker.stream(), chat()
    assert picker.tell(stream, request_headers()) == []
    assert picker.tell(stream, request_body(body[:20], end=False)) == []
    head, *chunks = picker.tell(stream, request_body(body[20:], end=False), request_body(b""))
    assert destination(head) == ["10.0.0.0:8000"]
    assert head.request_headers.response.clear_route_cache
    headers = mutated(head.request_headers.response.header_mutation)
    assert headers["content-length"] == str(len(body))
    assert joined(chunks, "request_body") == body
    assert picker.inflight()[0] == 1
    assert picker.count(metrics.ARRIVALS) == 1
    assert picker.count(metrics.REQUEST_BYTES) == len(body)


def test_a_large_body_goes_back_in_small_chunks(picker: Picker) -> None:
    picker.publish(replica())
    stream, body = picker.stream(), chat(extra="é" * 300_000)
    parts = [body[start : start + 65_536] for start in range(0, len(body), 65_536)]
    messages = [request_body(part, end=part is parts[-1]) for part in parts]
    _, *chunks = picker.tell(stream, request_headers(), *messages)
    assert joined(chunks, "request_body") == body
    assert picker.worker.context.buffered_bytes == 0


def test_a_buffered_request_is_answered_twice_and_its_body_left_alone(picker: Picker) -> None:
    picker.publish(replica())
    stream = picker.stream()
    (first,) = picker.tell(stream, request_headers(request_mode=BUFFERED))
    assert first.WhichOneof("response") == "request_headers"
    assert not first.request_headers.response.header_mutation.set_headers
    (second,) = picker.tell(stream, request_body(chat(), end=False))
    assert destination(second) == ["10.0.0.0:8000"]
    assert second.request_body.response.body_mutation.WhichOneof("mutation") is None
    (third,) = picker.tell(stream, request_trailers())
    assert third.WhichOneof("response") == "request_trailers"


def test_trailers_end_a_duplex_body(picker: Picker) -> None:
    picker.publish(replica())
    stream = picker.stream()
    messages = (request_headers(), request_body(chat(), end=False), request_trailers())
    head, chunk, trailers = picker.tell(stream, *messages)
    assert destination(head) == ["10.0.0.0:8000"]
    streamed = chunk.request_body.response.body_mutation.streamed_response
    assert (streamed.body, streamed.end_of_stream) == (chat(), False)
    assert trailers.WhichOneof("response") == "request_trailers"


@pytest.mark.parametrize("mode", [DUPLEX, BUFFERED])
def test_an_alias_is_rewritten_to_the_replica_s_name(picker: Picker, mode: int) -> None:
    picker.publish(replica(served_model="org/theirs"))
    replies = picker.ask(picker.stream(), chat("alias"), request_mode=mode)
    expected = chat("org/theirs")
    if mode == BUFFERED:
        common = replies[1].request_body.response
        assert common.body_mutation.body == expected
    else:
        common = replies[0].request_headers.response
        assert joined(replies[1:], "request_body") == expected
    assert mutated(common.header_mutation)["content-length"] == str(len(expected))


def test_a_rewrite_header_names_the_model_and_does_not_travel(picker: Picker) -> None:
    picker.publish(replica(names=("lora",), served_model="m"))
    stream = picker.stream()
    headers = request_headers(x_gateway_model_name_rewrite="lora")
    head, *chunks = picker.tell(stream, headers, request_body(chat("whatever")))
    assert joined(chunks, "request_body") == chat("lora")
    removed = head.request_headers.response.header_mutation.remove_headers
    assert "x-gateway-model-name-rewrite" in removed


def test_a_replica_s_headers_and_path_are_added(picker: Picker) -> None:
    url = "http://10.0.0.9:8000/openai"
    picker.publish(replica(url=url, headers=(("authorization", "Bearer key"),)))
    head, *_ = picker.ask(picker.stream(), path="/v1/chat/completions?x=1")
    headers = mutated(head.request_headers.response.header_mutation)
    assert headers["authorization"] == "Bearer key"
    assert headers[":path"] == "/openai/v1/chat/completions?x=1"
    assert destination(head) == ["10.0.0.9:8000"]


def test_without_a_body_the_model_is_what_another_filter_says(picker: Picker) -> None:
    picker.publish(replica())
    headers = request_headers(request_mode=NONE, content_length="400", x_gateway_model_name="m")
    (head,) = picker.tell(picker.stream(), headers)
    assert destination(head) == ["10.0.0.0:8000"]
    assert picker.count(metrics.ARRIVED_PROMPT_TOKENS) > 90


@pytest.mark.parametrize(
    ("names", "more"),
    [({"served_model": "org/theirs"}, {}), ({}, {"x_gateway_model_name_rewrite": "lora"})],
)
def test_without_a_body_no_name_is_changed_and_no_length(
    picker: Picker, names: dict[str, str], more: dict[str, str]
) -> None:
    picker.publish(replica(**names))
    headers = request_headers(
        request_mode=NONE, content_length="400", x_gateway_model_name="alias", **more
    )
    status, _, body = refusal(picker.tell(picker.stream(), headers))
    assert status == 500
    assert "request_body_mode" in body["error"]["message"]
    picker.assert_at_rest()


def test_without_a_body_a_name_that_the_replica_knows_goes_as_it_is(picker: Picker) -> None:
    picker.publish(replica(served_model="org/theirs", names=("lora",)))
    headers = request_headers(request_mode=NONE, content_length="400", x_gateway_model_name="lora")
    (head,) = picker.tell(picker.stream(), headers)
    assert destination(head) == ["10.0.0.0:8000"]
    assert "content-length" not in mutated(head.request_headers.response.header_mutation)


@pytest.mark.parametrize("mode", [NONE, STREAMED])
def test_a_filter_that_sends_no_body_is_told_so(picker: Picker, mode: int) -> None:
    picker.publish(replica())
    status, headers, body = refusal(
        picker.tell(picker.stream(), request_headers(request_mode=mode))
    )
    assert (status, headers["x-tidegate-reason"]) == (500, "internal")
    assert "request_body_mode" in body["error"]["message"]


REFUSED: list[tuple[str, dict[str, Any], bytes, int, Reason]] = [
    ("unknown model", {}, chat("nobody"), 404, Reason.MODEL_UNKNOWN),
    ("no model", {}, b'{"messages":[]}', 400, Reason.MODEL_MISSING),
    ("no JSON", {}, b"hello", 400, Reason.BAD_JSON),
    ("two models", {}, b'{"model":"m","model":"n"}', 400, Reason.BAD_REQUEST),
    ("compressed", {"content_encoding": "br"}, chat(), 415, Reason.ENCODING_UNSUPPORTED),
    ("unknown path", {"path": "/v1/nothing"}, chat(), 404, Reason.PATH_UNKNOWN),
    ("method", {"method": "PUT"}, chat(), 405, Reason.METHOD_NOT_ALLOWED),
    ("declared too large", {"content_length": "5000"}, chat(), 413, Reason.BODY_TOO_LARGE),
    ("too large", {}, chat(extra="x" * 5000), 413, Reason.BODY_TOO_LARGE),
    ("subset", {"subset": ["1.2.3.4:80"]}, chat(), 503, Reason.SUBSET_UNAVAILABLE),
    ("empty subset", {"subset": []}, chat(), 503, Reason.SUBSET_UNAVAILABLE),
]


@pytest.mark.parametrize(
    ("headers", "body", "status", "reason"),
    [case[1:] for case in REFUSED],
    ids=[case[0] for case in REFUSED],
)
def test_what_is_refused(
    loop: ClockLoop, headers: dict[str, Any], body: bytes, status: int, reason: Reason
) -> None:
    picker = Picker(loop, max_body_bytes=4096)
    picker.publish(replica())
    stream = picker.stream()
    shown = refusal(picker.ask(stream, body, **headers))
    assert (shown[0], shown[1]["x-tidegate-reason"]) == (status, reason)
    assert shown[1]["content-type"] == "application/json"
    assert "message" in shown[2]["error"]
    assert stream.is_over
    assert picker.tell(stream, request_body(b"more")) == []
    picker.assert_at_rest()


def test_errors_have_the_shape_of_the_api_that_was_asked(picker: Picker) -> None:
    picker.publish(replica())
    headers = {"path": "/v1/messages", "x_request_id": "mine"}
    _, shown, body = refusal(picker.ask(picker.stream(), chat("nobody"), **headers))
    assert body["type"] == "error"
    assert body["request_id"] == shown["request-id"] == "mine"


def test_models_and_health_are_answered_without_a_replica(picker: Picker) -> None:
    picker.publish()
    for path, found in (("/v1/models", "data"), ("/health", "status")):
        headers = request_headers(path=path, method="GET", end=True)
        status, _, body = refusal(picker.tell(picker.stream(), headers))
        assert status == 200
        assert found in body
    picker.assert_at_rest()


# Which replica


def give_lists(picker: Picker, most: int) -> None:
    gateway = picker.worker.context.gateway
    changed = gateway.picker.model_copy(update={"max_endpoints": most})
    picker.worker.context.gateway = gateway.model_copy(update={"picker": changed})


def test_a_list_has_the_pick_and_then_others_that_take_the_same_request(picker: Picker) -> None:
    give_lists(picker, 3)
    picker.publish(replica(0), replica(1), replica(2, state=ReplicaState.DRAINING))
    busy = destination(picker.ask(picker.stream())[0])
    assert sorted(busy) == ["10.0.0.0:8000", "10.0.0.1:8000"]
    # The first of them has a request now.
    assert destination(picker.ask(picker.stream())[0]) == busy[::-1]
    picker.publish(replica(0), replica(3, served_model="another"))
    assert len(destination(picker.ask(picker.stream())[0])) == 1
    give_lists(picker, 1)
    picker.publish(replica(0), replica(1))
    assert len(destination(picker.ask(picker.stream())[0])) == 1


@pytest.mark.parametrize("subset", [["10.0.0.1:8000", "9.9.9.9:1"], "9.9.9.9:1, 10.0.0.1:8000"])
def test_only_replicas_of_the_subset_are_chosen(picker: Picker, subset: Any) -> None:
    picker.publish(replica(0), replica(1), replica(2))
    for _ in range(5):
        assert destination(picker.ask(picker.stream(), subset=subset)[0]) == ["10.0.0.1:8000"]
    assert picker.inflight() == [0, 5, 0, 0]


def test_a_full_subset_is_429_and_is_not_held(picker: Picker) -> None:
    picker.publish(replica(0, max_inflight_requests=1), replica(1))
    subset = ["10.0.0.0:8000"]
    assert destination(picker.ask(picker.stream(), subset=subset)[0]) == subset
    status, headers, _ = refusal(picker.ask(picker.stream(), subset=subset))
    assert (status, headers["retry-after"]) == (429, "1")
    assert headers["x-tidegate-reason"] == "subset_full"
    assert picker.count(metrics.QUEUED_REQUESTS) == 0


def test_a_subset_of_a_pool_at_zero_wakes_it(picker: Picker) -> None:
    picker.publish(wake_eta_s=12.0)
    status, headers, _ = refusal(picker.ask(picker.stream(), subset=["10.0.0.0:8000"]))
    assert (status, headers["retry-after"]) == (503, "12")
    assert picker.messages == [WakeSignal(pool="m")]


# Holding


def test_a_request_is_held_at_zero_and_answered_when_a_replica_is_ready(picker: Picker) -> None:
    picker.publish()
    stream = picker.stream()
    (reply,) = picker.ask(stream)
    assert reply.WhichOneof("response") is None
    assert reply.override_message_timeout.seconds > 60
    assert picker.messages == [WakeSignal(pool="m")]
    assert picker.count(metrics.QUEUED_REQUESTS) == 1
    assert picker.notified == 0
    picker.publish(replica())
    assert picker.notified == 1
    head, *chunks = picker.tell(stream)
    assert destination(head) == ["10.0.0.0:8000"]
    assert joined(chunks, "request_body") == chat()
    assert picker.count(metrics.HELD) == 1


def test_the_queue_is_bounded_and_a_wait_ends(loop: ClockLoop) -> None:
    picker = Picker(loop, max_requests=1, deadline_s=30.0)
    picker.publish()
    waiting = picker.stream()
    picker.ask(waiting)
    status, headers, _ = refusal(picker.ask(picker.stream()))
    assert (status, headers["x-tidegate-reason"]) == (429, "hold_queue_full")
    assert "retry-after" in headers
    loop.now_s += 31.0
    picker.worker.pools.by_name["m"].tick(loop.now_s)
    status, headers, _ = refusal(picker.tell(waiting))
    assert (status, headers["x-tidegate-reason"]) == (503, "hold_deadline")
    picker.assert_at_rest()


def test_envoy_may_give_up_a_held_request(picker: Picker) -> None:
    picker.publish()
    stream = picker.stream()
    picker.ask(stream)
    stream.cancel()
    picker.assert_at_rest()
    assert picker.count(metrics.CANCELLED) == 1
    picker.publish(replica())
    assert picker.tell(stream) == []
    # Or it answers itself, and has its own answer looked at.
    picker.publish()
    other = picker.stream()
    picker.ask(other)
    replies = picker.tell(other, response_headers(504), response_body(b"timeout", end=True))
    assert [one.WhichOneof("response") for one in replies] == ["response_headers", "response_body"]
    picker.assert_at_rest()
    assert picker.count(metrics.CANCELLED) == 2


# Answers


@pytest.mark.parametrize("mode", [DUPLEX, STREAMED])
def test_a_stream_is_passed_on_and_counted(picker: Picker, mode: int) -> None:
    picker.publish(replica())
    stream = picker.stream()
    picker.ask(stream, chat(stream=True), response_mode=mode)
    events = response_headers(content_type="text/event-stream; charset=utf-8")
    (head,) = picker.tell(stream, events)
    assert head.WhichOneof("response") == "response_headers"
    picker.loop.now_s += 0.5
    first = picker.tell(stream, response_body(SSE))
    picker.loop.now_s += 0.2
    last = picker.tell(stream, response_body(LAST, end=True))
    if mode == DUPLEX:
        assert joined(first + last, "response_body") == SSE + LAST
    else:
        assert not any(one.response_body.response.HasField("body_mutation") for one in first + last)
    picker.assert_at_rest()
    assert picker.count(metrics.OK) == 1
    assert picker.count(metrics.PROMPT_TOKENS) == 7
    assert picker.count(metrics.OUTPUT_TOKENS) == 2
    assert picker.count(metrics.RESPONSE_BYTES) == len(SSE + LAST)
    assert picker.count(metrics.FINISH_INDEX["stop"]) == 1
    assert picker.observed(metrics.TTFT + 1) == picker.observed(metrics.E2E + 1) == 1


def test_a_whole_answer_is_counted_with_its_usage(picker: Picker) -> None:
    picker.publish(replica())
    stream = picker.stream()
    picker.ask(stream)
    picker.tell(stream, response_headers(), response_body(WHOLE[:30]), response_body(WHOLE[30:]))
    assert picker.count(metrics.OK) == 0
    (trailers,) = picker.tell(stream, response_trailers())
    assert trailers.WhichOneof("response") == "response_trailers"
    assert picker.count(metrics.OK) == 1
    assert picker.count(metrics.OUTPUT_TOKENS) == 5
    picker.assert_at_rest()


def test_usage_is_counted_in_events_where_the_stream_does_not_say(picker: Picker) -> None:
    picker.publish(replica())
    stream = picker.stream()
    picker.ask(stream, chat(stream=True))
    body = b"data: {}\n\n" + SSE * 4 + b"data: [DONE]\n\n"
    events = response_headers(content_type="text/event-stream")
    picker.tell(stream, events, response_body(body, end=True))
    assert picker.count(metrics.OUTPUT_TOKENS) == 4


RESET = "upstream_reset_before_response_started"
JUDGED: list[tuple[int, dict[str, str], bool, int]] = [
    (200, {}, True, metrics.OK),
    (404, {}, True, metrics.CLIENT_ERROR),
    (500, {"response.code_details": "via_upstream"}, True, metrics.ENGINE_ERROR),
    (429, {}, False, metrics.CLIENT_ERROR),
    (503, {}, False, metrics.ENGINE_ERROR),
    (503, {"response.code_details": f"{RESET}{{connection_failure}}"}, False, metrics.ENGINE_ERROR),
    (503, {"response.code_details": f"{RESET}{{remote_connection_failure|delayed}}"}, False,
     metrics.ENGINE_ERROR),
    (502, {"response.code_details": f"{RESET}{{remote_reset}}"}, True, metrics.ENGINE_ERROR),
    (503, {"response.code_details": f"{RESET}{{overflow}}"}, True, metrics.ENGINE_ERROR),
    (504, {"response.code_details": "upstream_response_timeout"}, True, metrics.ENGINE_ERROR),
]  # fmt: skip


@pytest.mark.parametrize(("status", "attributes", "is_ready", "counter"), JUDGED)
def test_the_status_is_laid_to_the_replica(
    picker: Picker, status: int, attributes: dict[str, str], is_ready: bool, counter: int
) -> None:
    """A replica that is full, or that Envoy cannot reach, is spared for a moment."""
    picker.publish(replica(0), replica(1))
    stream = picker.stream()
    (address,) = destination(picker.ask(stream)[0])
    picker.tell(stream, response_headers(status, end=True, attributes=attributes))
    ready = [one.address for one in picker.worker.pools.by_name["m"].ready]
    assert (address in ready) is is_ready
    assert picker.count(counter) == 1
    picker.assert_at_rest()


@pytest.mark.parametrize(
    ("details", "is_failure"),
    [
        (f"{RESET}{{remote_reset}}", True),
        ("upstream_response_timeout", True),
        (f"{RESET}{{overflow}}", False),
        ("route_not_found", False),
    ],
)
def test_what_envoy_answers_itself_is_looked_into_where_it_may_be_the_replica_s_fault(
    picker: Picker, details: str, is_failure: bool
) -> None:
    picker.publish(replica())
    stream = picker.stream()
    picker.ask(stream)
    attributes = {"response.code_details": details}
    picker.tell(stream, response_headers(503, end=True, attributes=attributes))
    assert any(isinstance(one, FailureReport) for one in picker.messages) is is_failure


@pytest.mark.parametrize("by_attribute", [False, True])
def test_the_place_is_where_the_request_was_served(picker: Picker, by_attribute: bool) -> None:
    give_lists(picker, 2)
    picker.publish(replica(0), replica(1))
    stream = picker.stream()
    first, second = destination(picker.ask(stream)[0])
    slot = int(second.split(":")[0][-1])
    given = {"attributes": {"upstream.address": second}} if by_attribute else {"served": second}
    picker.tell(stream, response_headers(**given))  # type: ignore[arg-type]
    assert picker.inflight()[slot] == 1
    assert sum(picker.inflight()) == 1
    assert picker.count(metrics.RETRIES) == 1
    assert picker.messages == [FailureReport(replica=f"r{1 - slot}")]
    assert [one.address for one in picker.worker.pools.by_name["m"].ready] == [second]
    picker.tell(stream, response_body(WHOLE, end=True))
    picker.assert_at_rest()
    assert first != second


def test_a_client_may_leave_with_as_many_bytes_as_it_was_promised(picker: Picker) -> None:
    picker.publish(replica())
    for missing, counter in ((0, metrics.OK), (1, metrics.CANCELLED)):
        stream = picker.stream()
        picker.ask(stream)
        length = str(len(WHOLE) + missing)
        picker.tell(stream, response_headers(content_length=length), response_body(WHOLE))
        stream.cancel()
        assert picker.count(counter) == 1
    assert picker.count(metrics.OUTPUT_TOKENS) == 5
    picker.assert_at_rest()


def test_a_client_that_leaves_gives_its_place_back(picker: Picker) -> None:
    picker.publish(replica())
    stream = picker.stream()
    picker.ask(stream, chat(stream=True))
    picker.tell(stream, response_headers(content_type="text/event-stream"), response_body(SSE))
    stream.cancel()
    picker.assert_at_rest()
    assert picker.count(metrics.CANCELLED) == 1
    done = picker.stream()
    picker.ask(done, chat(stream=True))
    picker.tell(done, response_headers(content_type="text/event-stream"), response_body(LAST))
    done.cancel()  # it has seen the last event, which is all there is
    assert picker.count(metrics.OK) == 1
    assert picker.count(metrics.CANCELLED) == 1


# Limits


def test_memory_for_bodies_is_bounded(loop: ClockLoop) -> None:
    picker = Picker(loop, max_buffered_bytes=65_536)
    picker.publish()
    held = picker.stream()
    picker.ask(held, chat(extra="x" * 60_000))
    status, headers, _ = refusal(picker.ask(picker.stream(), chat(extra="x" * 60_000)))
    assert (status, headers["x-tidegate-reason"]) == (503, "buffer_full")
    held.cancel()
    picker.assert_at_rest()


def test_a_body_of_many_parts_is_read_in_turns(picker: Picker) -> None:
    picker.publish(replica())
    stream, body = picker.stream(), b'{"a":[' + b"[]," * 100_000 + b'[]],"model":"m"}'
    stream.receive(request_headers())
    assert stream.receive(request_body(body))
    turns = 1
    while stream.read_on():
        turns += 1
    assert turns > 10
    _, *chunks = picker.tell(stream)
    assert joined(chunks, "request_body") == body


def test_what_waits_too_long_ends(loop: ClockLoop) -> None:
    picker = Picker(loop, body_timeout_s=5.0, upstream_idle_timeout_s=20.0)
    picker.publish(replica())
    slow, silent = picker.stream(), picker.stream()
    picker.tell(slow, request_headers())
    picker.ask(silent)
    loop.now_s += 6.0
    slow.sweep(loop.now_s)
    silent.sweep(loop.now_s)
    assert refusal(picker.tell(slow))[0] == 408
    assert not silent.is_over
    loop.now_s += 20.0
    silent.sweep(loop.now_s)
    assert (silent.is_over, silent.is_broken) == (True, True)
    picker.assert_at_rest()


@pytest.mark.parametrize(("mode", "ends"), [(NONE, False), (BUFFERED, False), (DUPLEX, True)])
def test_only_an_answer_that_is_seen_here_can_be_idle(
    loop: ClockLoop, mode: int, ends: bool
) -> None:
    picker = Picker(loop, upstream_idle_timeout_s=20.0)
    picker.publish(replica())
    stream = picker.stream()
    picker.tell(stream, request_headers(response_mode=mode), request_body(chat()))
    picker.tell(stream, response_headers(200, content_type="text/event-stream"))
    loop.now_s += 21.0
    stream.sweep(loop.now_s)
    assert stream.is_broken is ends
    stream.cancel()
    picker.assert_at_rest()


ORDERS: list[tuple[str, Callable[[], Any]]] = [
    ("a body first", lambda: request_body(b"")),
    ("trailers first", request_trailers),
    ("an answer's body first", lambda: response_body(b"")),
    ("nothing", lambda: request_headers().__class__()),
]


@pytest.mark.parametrize("make", [order[1] for order in ORDERS], ids=[order[0] for order in ORDERS])
def test_messages_out_of_order_are_refused(picker: Picker, make: Callable[[], Any]) -> None:
    picker.publish(replica())
    with pytest.raises(ExtProcError):
        picker.stream().receive(make())


ANY_MESSAGE = st.one_of(
    st.builds(
        request_headers,
        request_mode=st.sampled_from([DUPLEX, BUFFERED, STREAMED, NONE]),
        response_mode=st.sampled_from([DUPLEX, STREAMED, NONE]),
        subset=st.sampled_from([None, None, ["10.0.0.0:8000"], ["9.9.9.9:1"]]),
        end=st.sampled_from([False, False, True]),
    ),
    st.builds(request_body, st.sampled_from([chat(), chat("nobody"), b"{"]), end=st.booleans()),
    st.builds(request_trailers),
    st.builds(
        response_headers,
        st.sampled_from([200, 404, 429, 500, 503]),
        st.sampled_from(["application/json", "text/event-stream"]),
        end=st.booleans(),
        served=st.sampled_from([None, "10.0.0.0:8000", "10.0.0.1:8000", "5.5.5.5:5"]),
    ),
    st.builds(response_body, st.sampled_from([SSE, LAST, WHOLE, b""]), end=st.booleans()),
    st.builds(response_trailers),
)
STEPS = st.lists(
    st.one_of(
        ANY_MESSAGE,
        st.sampled_from(["zero", "one", "two", "full", "disabled", "sweep", "cancel", "later"]),
    ),
    max_size=14,
)
USUAL = st.builds(
    lambda middle, end: [request_headers(), request_body(chat()), *middle, *end], STEPS, STEPS
)


@given(st.lists(st.one_of(STEPS, USUAL), min_size=1, max_size=4))
def test_whatever_happens_a_request_is_released_exactly_once(scripts: list[list[Any]]) -> None:
    """Streams beside each other, any messages in any order, and a fleet that changes meanwhile."""
    loop = ClockLoop()
    try:
        picker = Picker(loop, max_requests=2, request_timeout_s=50.0, deadline_s=40.0)
        picker.publish(replica(0), replica(1))
        streams = [picker.stream() for _ in scripts]
        for turn in range(max(map(len, scripts))):
            for stream, script in zip(streams, scripts, strict=True):
                if turn < len(script):
                    _take(picker, stream, script[turn])
                    picker.worker.check_integrity()
        for stream in streams:
            stream.cancel()
            stream.cancel()
        picker.publish(replica(0), replica(1))
        picker.assert_at_rest()
    finally:
        loop.close()


def _take(picker: Picker, stream: PickerStream, step: Any) -> None:
    if step == "zero":
        picker.publish()
    elif step in ("one", "two"):
        picker.publish(*[replica(slot) for slot in range(1 + (step == "two"))])
    elif step == "full":
        picker.publish(replica(0, max_inflight_requests=1))
    elif step == "disabled":
        picker.publish(replica(0), disabled=True)
    elif step == "later":
        picker.loop.now_s += 15.0
        picker.worker.pools.by_name["m"].tick(picker.loop.now_s)
    elif step == "sweep":
        stream.sweep(picker.loop.now_s)
    elif step == "cancel":
        stream.cancel()
    else:
        try:
            picker.tell(stream, step)
        except ExtProcError:
            stream.cancel()  # as the server does
