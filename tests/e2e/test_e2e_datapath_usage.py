"""What an answer cost is read from it, however the engine's writes and the network cut it up."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from datapath_rig import (
    STREAM,
    WAIT_S,
    Answer,
    Asked,
    Gateway,
    ScriptedReplica,
    chunks,
    eventually,
    gateway,
    post,
    says,
)
from prometheus_client.parser import text_string_to_metric_families

from autoscaler.types import FleetReport, PoolReport, ReplicaReport
from gateway.admin.metrics_page import render
from gateway.datapath import metrics
from router.types import ReplicaState

TOKEN = b'data: {"choices":[{"index":0,"delta":{"content":"word "},"finish_reason":null}]}\n\n'
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":31,"total_tokens":36,"completion_tokens":5},'
    b'"system_fingerprint":"vllm"}\n\n'
)
DONE = b"data: [DONE]\n\n"
LAST = b"0\r\n\r\n"
USAGE_CHUNK = chunks(USAGE)
WHOLE = (
    b'{"choices":[{"message":{"content":"a word"}}],"usage":{"prompt_tokens":31,'
    b'"total_tokens":36,"completion_tokens":5},"prompt_logprobs":null}'
)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"

STREAMED = {
    "at once": [STREAM + chunks(*[TOKEN] * 5, USAGE, DONE) + LAST],
    # As vLLM writes it: every event, and the end, in a packet of its own.
    "one by one": [STREAM, *[chunks(TOKEN)] * 5, USAGE_CHUNK, chunks(DONE), LAST],
    "usage in two": [STREAM + chunks(*[TOKEN] * 5), USAGE_CHUNK[:60], USAGE_CHUNK[60:]]
    + [chunks(DONE), LAST],
    "end in scraps": [STREAM + chunks(TOKEN), USAGE_CHUNK]
    + [bytes([byte]) for byte in chunks(DONE) + LAST],
}
PLAIN = {
    "at once": [HEAD % len(WHOLE) + WHOLE],
    "usage in the first of two": [HEAD % len(WHOLE) + WHOLE[:-20], WHOLE[-20:]],
    "usage in two": [HEAD % len(WHOLE) + WHOLE[:70], WHOLE[70:]],
}


@pytest.fixture(scope="module")
def served() -> Iterator[Gateway]:
    with gateway() as running:
        yield running


@pytest.mark.parametrize("cut", STREAMED)
def test_usage_of_a_stream_is_found_wherever_it_is_cut(served: Gateway, cut: str) -> None:
    assert_usage_is_counted(served, STREAMED[cut], stream=True)


@pytest.mark.parametrize("cut", PLAIN)
def test_usage_of_a_plain_answer_is_found_wherever_it_is_cut(served: Gateway, cut: str) -> None:
    assert_usage_is_counted(served, PLAIN[cut], stream=False)


def assert_usage_is_counted(served: Gateway, pieces: list[bytes], *, stream: bool) -> None:
    def counts() -> tuple[int, int]:
        names = (metrics.PROMPT_TOKENS, metrics.OUTPUT_TOKENS)
        prompt, output = map(served.pool_count, names)
        return prompt, output

    prompt, output = counts()
    with ScriptedReplica(says(*pieces, pause_s=0.03)) as replica:
        served.publish(replica)
        assert served.ask(post({"model": "m", "prompt": "x", "stream": stream})).status == 200

        eventually(lambda: counts() == (prompt + 31, output + 5))
        served.publish()
    served.settle()


def samples(served: Gateway, pool: str = "m") -> Callable[..., float]:
    """The page's samples, by name and labels; 0 where there is none."""
    replicas = {"r0": 0}
    replica = ReplicaReport(id="r0", pool=pool, state=ReplicaState.READY, since_s=0.0)
    report = FleetReport(
        at_s=0.0,
        pools=(
            PoolReport(
                name=pool, desired=1, override=None, ready=1, starting=0, unhealthy=0, draining=0,
                sleeping=0, wake_eta_s=None, last_decision=None, replicas=(replica,),
            ),
        ),
        decisions={},
        errors={},
    )  # fmt: skip
    page = render(
        shared=served.shared,
        pools={pool: 0},
        report=report,
        version="1",
        traffic={},
        replicas=replicas,
        workers=(),
    ).decode()
    found = {
        (one.name.removeprefix("tidegate_"), frozenset(one.labels.items())): one.value
        for family in text_string_to_metric_families(page)
        for one in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return found.get((name, frozenset(labels.items())), 0.0)

    return value


def test_what_an_answer_took_is_counted_by_endpoint_and_stream() -> None:
    finish = TOKEN.replace(b"null", b'"length"')
    pieces = [chunks(TOKEN), chunks(TOKEN, TOKEN), chunks(finish), USAGE_CHUNK]
    came = threading.Semaphore(0)

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM)
        for piece in (*pieces, chunks(DONE) + LAST):  # each comes by itself, however busy it is
            time.sleep(0.1)
            asked.send(piece)
            assert came.acquire(timeout=WAIT_S)

    with gateway() as served, ScriptedReplica(script) as at:
        served.publish(at)
        body = {"model": "m", "prompt": "x", "stream": True}
        with served.connect() as client:
            client.send(post(body, path=b"/v1/chat/completions"))
            for piece in (*pieces, LAST):
                client.until(piece)
                came.release()
        served.settle()
        eventually(lambda: served.pool_count(metrics.PROMPT_TOKENS) == 31)
        value = samples(served)
        chat = {"pool": "m", "endpoint": "chat", "stream": "true"}
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
            assert value(f"{name}_count", **chat) == 1
            for kind, stream in (("chat", "false"), ("completions", "true"), ("other", "true")):
                assert value(f"{name}_count", pool="m", endpoint=kind, stream=stream) == 0
        # Three tokens after the first: two that came together, and the last. Usage is none.
        assert value("inter_token_latency_seconds_count", pool="m") == 3
        assert 0.15 < value("inter_token_latency_seconds_sum", pool="m") < 60
        assert value("request_prompt_tokens_sum", pool="m") == 31
        assert value("request_generation_tokens_sum", pool="m") == 5
        assert value("request_success_total", pool="m", finished_reason="length") == 1
        assert value("responses_total", pool="m", code="200") == 1
        mine = {"pool": "m", "replica": "r0"}
        assert value("replica_requests_total", **mine, outcome="ok") == 1
        assert value("replica_time_to_first_token_seconds_count", **mine) == 1
        assert 0.05 < value("replica_time_to_first_token_seconds_sum", **mine) < 60


def test_errors_are_counted_by_status_pool_and_replica() -> None:
    answer = b"HTTP/1.1 500 x\r\ncontent-length: 2\r\n\r\n{}"
    with gateway(max_retries=0) as served, ScriptedReplica(says(answer)) as replica:
        served.publish(replica)
        assert served.ask(post({"model": "m", "prompt": "x"})).status == 500
        assert served.ask(post({"model": "none", "prompt": "x"})).status == 404
        assert served.ask(post(b"{", path=b"/v1/completions")).status == 400
        served.settle()
        eventually(lambda: samples(served)("responses_total", pool="", code="400") == 1)
        value = samples(served)
        assert value("responses_total", pool="m", code="500") == 1
        assert value("responses_total", pool="", code="404") == 1
        assert value("responses_total", pool="", code="400") == 1
        assert value("rejections_total", pool="", reason="model_unknown") == 1
        assert value("replica_requests_total", pool="m", replica="r0", outcome="error") == 1
        # Another replica in its slot begins at zero.
        served.publish()
        with ScriptedReplica(says(answer)) as other:
            served.publish(served.replica(other.url, id="r0", slot=0))
            eventually(lambda: served.shared.replica_counters(0, 0).tolist() == [0] * 4)


def test_the_age_of_the_oldest_held_request_is_known() -> None:
    with gateway() as served:
        served.publish()
        with served.connect() as first, served.connect() as second:
            first.send(post({"model": "m", "prompt": "x"}))
            eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 1)
            time.sleep(0.3)
            second.send(post({"model": "m", "prompt": "x"}))
            eventually(lambda: served.pool_count(metrics.QUEUED_REQUESTS) == 2)
            eventually(lambda: 0.3 < samples(served)("oldest_held_seconds", pool="m") < 60)
        eventually(lambda: samples(served)("oldest_held_seconds", pool="m") == 0)


# Streams whose client did not ask for their usage

CHAT, COMPLETIONS = b"/v1/chat/completions", b"/v1/completions"
ASKED = {"stream_options": {"include_usage": True}}
BODY = {"model": "m", "prompt": "x" * 400, "stream": True}


def counts(served: Gateway) -> tuple[int, int]:
    prompt, output = map(served.pool_count, (metrics.PROMPT_TOKENS, metrics.OUTPUT_TOKENS))
    return prompt, output


def ask_vllm(
    served: Gateway, pieces: list[bytes], request: bytes, **changes: object
) -> tuple[Answer, Answer]:
    """What vLLM was asked, and what the client was answered; the counts have settled then."""
    ended = [metrics.OK, metrics.CLIENT_ERROR]
    before = sum(map(served.pool_count, ended))
    with ScriptedReplica(says(*pieces, pause_s=0.01)) as replica:
        served.publish(served.replica(replica.url, **{"stream_usage": True, **changes}))
        answer = served.ask(request)
        eventually(lambda: sum(map(served.pool_count, ended)) == before + 1)
        served.publish()
    served.settle()
    return replica.requests[0], answer


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("cut", STREAMED)
def test_usage_that_only_the_gateway_asked_for_is_counted_and_taken_out(
    served: Gateway, cut: str, path: bytes
) -> None:
    before = counts(served)
    pieces = [piece + b"" for piece in STREAMED[cut]]
    asked, answer = ask_vllm(served, pieces, post(BODY, path=path))
    assert asked.json() == {**ASKED, **BODY}
    tokens = 1 if cut == "end in scraps" else 5
    assert answer.body == TOKEN * tokens + DONE
    assert counts(served) == (before[0] + 31, before[1] + 5)


def test_however_the_stream_is_cut_the_rest_of_it_is_exact(served: Gateway) -> None:
    body = chunks(TOKEN, TOKEN) + chunks(TOKEN + USAGE) + chunks(DONE) + LAST
    rng = random.Random(8)
    for _ in range(60):
        cuts = sorted(rng.sample(range(1, len(body)), rng.randint(0, 6)))
        pieces = [body[a:b] for a, b in zip([0, *cuts], [*cuts, len(body)], strict=True)]
        _, answer = ask_vllm(served, [STREAM, *pieces], post(BODY))
        assert answer.body == TOKEN * 3 + DONE, cuts


UNTOUCHED: dict[str, tuple[dict[str, object], dict[str, object]]] = {
    "the client asks itself": ({**BODY, **ASKED}, {}),
    "the client wants none": ({**BODY, "stream_options": {"include_usage": False}}, {}),
    "no stream": ({"model": "m"}, {}),
    "another engine": (BODY, {"stream_usage": False}),
}


@pytest.mark.parametrize("case", UNTOUCHED)
def test_a_request_that_is_not_for_the_gateway_to_change_passes_as_it_is(
    served: Gateway, case: str
) -> None:
    body, changes = UNTOUCHED[case]
    request = post(body)
    asked, answer = ask_vllm(served, STREAMED["one by one"], request, **changes)
    assert asked.body == request.partition(b"\r\n\r\n")[2]
    assert answer.body == TOKEN * 5 + USAGE + DONE


def test_the_setting_turns_it_off() -> None:
    with gateway(count_stream_usage=False) as served:
        asked, answer = ask_vllm(served, STREAMED["one by one"], post(BODY))
    assert asked.json() == BODY
    assert answer.body == TOKEN * 5 + USAGE + DONE


def test_a_client_of_http_1_0_gets_the_stream_as_it_is(served: Gateway) -> None:
    request = post(BODY).replace(b"HTTP/1.1", b"HTTP/1.0")
    asked, answer = ask_vllm(served, STREAMED["one by one"], request)
    assert asked.json() == BODY
    assert answer.body == TOKEN * 5 + USAGE + DONE


def test_an_engines_refusal_passes_untouched(served: Gateway) -> None:
    start = b"HTTP/1.1 400 Bad Request\r\n"
    for refusal in (
        start + b"content-length: %d\r\n\r\n" % len(USAGE) + USAGE,
        start + b"transfer-encoding: chunked\r\n\r\n" + USAGE_CHUNK + LAST,
    ):
        _, answer = ask_vllm(served, [refusal], post(BODY))
        assert (answer.status, answer.body) == (400, USAGE)


def test_of_a_stream_that_was_held_the_usage_is_taken_out_too() -> None:
    with (
        ScriptedReplica(says(*STREAMED["usage in two"])) as replica,
        gateway(keepalive_s=0.1) as served,
        served.connect() as client,
    ):
        client.send(post(BODY))
        client.until(b": tidegate: waiting for m")
        client.until(b"\r\n")
        served.publish(served.replica(replica.url, stream_usage=True))
        body = client.chunked()
        assert body.endswith(TOKEN * 5 + DONE)
        assert b"usage" not in body
        eventually(lambda: counts(served) == (31, 5))


@pytest.mark.parametrize(("path", "overhead"), [(CHAT, 1), (COMPLETIONS, 0)])
def test_without_usage_the_tokens_are_the_events_that_carry_one(
    served: Gateway, path: bytes, overhead: int
) -> None:
    role = [TOKEN] * overhead
    pieces = [STREAM, *map(chunks, [*role, *[TOKEN] * 7, DONE]), LAST]
    before = counts(served)
    ask_vllm(served, pieces, post(BODY, path=path), stream_usage=False)
    prompt, output = counts(served)
    assert output == before[1] + 7
    assert 0 < prompt - before[0] <= len(json.dumps(BODY))


# Streams that were whole to their client, who closed the connection

LAST_EVENTS = {
    "OpenAI": (CHAT, [DONE]),
    "the last token": (CHAT, [TOKEN.replace(b"null", b'"stop"')]),
    "the last token, spaced": (COMPLETIONS, [TOKEN.replace(b":null", b': "length"')]),
    "usage": (CHAT, [TOKEN.replace(b"null", b'"stop"'), USAGE]),
    "Anthropic": (
        b"/v1/messages",
        [b'event: message_stop\ndata: {"type":"message_stop"}\n\n'],
    ),
    "a response": (
        b"/v1/responses",
        [
            b'event: response.completed\ndata: {"response":{"output":"%b"},"sequence_number":9,'
            b'"type":"response.completed"}\n\n' % (b"x" * 400_000)
        ],
    ),
    "a response, type first": (
        b"/v1/responses",
        [b'event: response.incomplete\ndata: {"type": "response.incomplete","response":{}}\n\n'],
    ),
}
NOT_LAST = {
    "a token": (CHAT, [TOKEN]),
    "text that looks like the end": (
        CHAT,
        [
            b'data: {"choices":[{"delta":{"content":"data: [DONE] \\"finish_reason\\":\\"stop\\"'
            b'"},"finish_reason":null}]}\n\n'
        ],
    ),
    "the start of a message": (
        b"/v1/messages",
        [b'event: message_start\ndata: {"type":"message_start","stop_reason":null}\n\n'],
    ),
}


@pytest.mark.parametrize("case", [*LAST_EVENTS, *NOT_LAST])
def test_a_client_that_closes_when_it_has_all_is_not_counted_as_cancelled(
    served: Gateway, case: str
) -> None:
    path, events = (LAST_EVENTS | NOT_LAST)[case]

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(TOKEN))
        for event in events:
            asked.send(chunks(event))
        asked.cancelled()

    def outcomes() -> tuple[int, int]:
        ok, cancelled = map(served.pool_count, (metrics.OK, metrics.CANCELLED))
        return ok, cancelled

    before = outcomes()
    expected = (1, 0) if case in LAST_EVENTS else (0, 1)
    with ScriptedReplica(script) as replica:
        served.publish(replica)
        with served.connect() as client:
            client.send(post(BODY, path=path))
            client.until(events[-1][-40:] + b"\r\n")
        eventually(lambda: replica.cancels == 1)
        eventually(
            lambda: outcomes() == (before[0] + expected[0], before[1] + expected[1]),
        )
        served.publish()
    served.settle()


@pytest.mark.parametrize("then", ["usage", "nothing", "close"])
def test_of_a_client_that_closes_at_the_last_token_the_usage_is_counted_too(
    served: Gateway, then: str
) -> None:
    left = threading.Event()

    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM + chunks(TOKEN.replace(b"null", b'"stop"')))
        left.wait(WAIT_S)
        if then == "usage":
            asked.send(USAGE_CHUNK + chunks(DONE) + LAST)
        if then != "close":
            asked.cancelled()

    before = counts(served)
    ok, failed = served.pool_count(metrics.OK), served.pool_count(metrics.ENGINE_ERROR)
    with ScriptedReplica(script) as replica:
        served.publish(served.replica(replica.url, stream_usage=True))
        with served.connect() as client:
            client.send(post(BODY, path=COMPLETIONS))
            client.until(b'"stop"}]}\n\n\r\n')
            eventually(lambda: served.worker_count(metrics.CONNECTIONS) == 1)
        eventually(lambda: not served.worker_count(metrics.CONNECTIONS))
        left.set()
        eventually(lambda: served.pool_count(metrics.OK) == ok + 1)
        prompt, output = counts(served)
        if then == "usage":
            assert (prompt, output) == (before[0] + 31, before[1] + 5)
        else:
            assert output == before[1] + 1
            assert prompt > before[0]
        served.publish()
    assert served.pool_count(metrics.ENGINE_ERROR) == failed
    served.settle()


@pytest.mark.parametrize("events", [0, 4])
def test_what_the_engine_did_for_a_client_that_left_is_counted(
    served: Gateway, events: int
) -> None:
    def script(asked: Asked) -> None:
        asked.request()
        asked.send(STREAM)
        for _ in range(events):
            asked.send(chunks(TOKEN))
        asked.cancelled()

    before, cancelled = counts(served), served.pool_count(metrics.CANCELLED)
    with ScriptedReplica(script) as replica:
        served.publish(replica)
        with served.connect() as client:
            client.send(post(BODY, path=COMPLETIONS))
            client.until(b"\r\n\r\n")
            for _ in range(events):
                client.until(chunks(TOKEN))
        eventually(lambda: served.pool_count(metrics.CANCELLED) == cancelled + 1)
        assert counts(served)[1] == before[1] + events
        assert (counts(served)[0] > before[0]) == (events > 0)
        served.publish()
    served.settle()


# Usage that cannot be

LIES = [
    (b"999999999", b"999999999"),
    (b"99999999999999999999", b"99999999999999999999"),
    (b"-5", b"-7"),
    (b"1e9", b"NaN"),
    (b'"31"', b"null"),
]


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("known", [True, False])
def test_usage_that_cannot_be_is_not_believed(
    served: Gateway, lie: tuple[bytes, bytes], known: bool
) -> None:
    usage = b'{"usage":{"prompt_tokens":%b,"completion_tokens":%b}}' % lie
    before = counts(served)
    longest = 4_096 if known else None
    pieces = [HEAD % len(usage) + usage]
    ask_vllm(served, pieces, post({"model": "m"}), max_model_len_tokens=longest)
    prompt, output = counts(served)
    most = longest or 1_048_576
    assert 0 <= prompt - before[0] <= most
    assert 0 <= output - before[1] <= most
