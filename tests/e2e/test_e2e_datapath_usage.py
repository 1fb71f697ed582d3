"""What an answer cost is read from it, however the engine's writes and the network cut it up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from datapath_rig import STREAM, Gateway, ScriptedReplica, chunks, eventually, gateway, post, says
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
    pieces = [STREAM, chunks(TOKEN), chunks(TOKEN, TOKEN), chunks(finish), USAGE_CHUNK]
    with (
        gateway() as served,
        ScriptedReplica(says(*pieces, chunks(DONE) + LAST, pause_s=0.1)) as at,
    ):
        served.publish(at)
        body = {"model": "m", "prompt": "x", "stream": True}
        assert served.ask(post(body, path=b"/v1/chat/completions")).status == 200
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
        assert 0.15 < value("inter_token_latency_seconds_sum", pool="m") < 5
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
