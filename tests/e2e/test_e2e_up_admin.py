"""The admin listener of a whole Tidegate: what it does is done, what it says is so."""

from __future__ import annotations

import asyncio
import json
import urllib.error
from collections.abc import Iterator

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, run, spawn, text_of
from tidegate_process import Tidegate, fetch, let_go, simulated, up

SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    pools = [
        simulated("scaled", max_replicas=3),
        simulated("rests", "--sleep-s", 0.1, 0.1, "--wake-s", 0.3, 0.3),
        simulated("drained", *SLOW),
        simulated("counted"),
        simulated("Qwen/Qwen3-8B", aliases=["qwen"]),
    ]
    autoscaler = {"scale_down_delay_s": 0, "stable_window_s": 1, "panic_window_s": 0.5}
    place = tmp_path_factory.mktemp("admin")
    with up(place, pools=pools, autoscaler=autoscaler) as tidegate:
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


def test_scale_to_a_number_and_back(tidegate: Tidegate) -> None:
    assert tidegate.admin("/pools/scaled/scale", {"replicas": 2})["override"] == 2
    tidegate.wait_ready("scaled", 2)
    assert tidegate.pool("scaled")["override"] == 2
    urls = {one["url"] for one in tidegate.pool("scaled")["replicas"]}
    assert len(urls) == 2
    for url in urls:
        assert json.loads(fetch(url + "/version"))["simulated"] is True
    text_of(ask_now(tidegate, chat("scaled")))
    tidegate.admin("/pools/scaled/scale", {"replicas": 0})
    tidegate.wait_at_zero("scaled")
    for url in urls:
        with pytest.raises(urllib.error.URLError):
            fetch(url + "/health")
    # At zero by an operator's word is still not gone: who asks is answered.
    text_of(ask_now(tidegate, chat("scaled")))
    assert tidegate.admin("/pools/scaled/scale", {"replicas": None})["override"] is None
    with pytest.raises(urllib.error.HTTPError) as refused:
        tidegate.admin("/pools/scaled/scale", {"replicas": 4})
    assert refused.value.code == 400


def test_sleep_and_the_next_request_wakes_the_same_engine(tidegate: Tidegate) -> None:
    text_of(ask_now(tidegate, chat("rests")))
    url = tidegate.engine_url("rests")
    assert tidegate.admin("/pools/rests/sleep", {"level": 1})["sleeping"] == 1
    assert json.loads(fetch(url + "/is_sleeping")) == {"is_sleeping": True}
    assert tidegate.pool("rests")["replicas"][0]["state"] == "sleeping"
    text_of(ask_now(tidegate, chat("rests")))
    assert tidegate.starts("rests") == 1
    assert tidegate.engine_url("rests") == url
    tidegate.admin("/pools/rests/sleep", {"level": 2})
    tidegate.admin("/pools/rests/wake", {})
    tidegate.wait_ready("rests")
    assert json.loads(fetch(url + "/is_sleeping")) == {"is_sleeping": False}


def test_drained_replica_finishes_and_goes(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        await ask(http, chat("drained"))
        url = tidegate.engine_url("drained")
        tidegate.set_faults("drained", "slow:factor=100")  # five seconds a token, until it may end
        task = spawn(ask(http, chat("drained", max_tokens=30, ignore_eos=True)))
        await asyncio.to_thread(
            tidegate.wait, "in flight", lambda: tidegate.pool("drained")["inflight_requests"]
        )
        (replica,) = tidegate.pool("drained")["replicas"]
        answer = await asyncio.to_thread(tidegate.admin, f"/replicas/{replica['id']}/drain", {})
        assert answer == {"replica": replica["id"], "state": "draining"}
        assert tidegate.pool("drained")["draining"] == 1
        assert let_go(url)
        text_of(await task)

        def is_gone() -> bool:
            replicas = tidegate.pool("drained")["replicas"]
            return replica["id"] not in {one["id"] for one in replicas}

        await asyncio.to_thread(tidegate.wait, "it gone", is_gone)

    run(tidegate, story)


def test_metrics_agree_with_what_was_sent(tidegate: Tidegate) -> None:
    plain, streamed, refused, tokens = 5, 3, 2, 6

    async def story(http: httpx.AsyncClient) -> None:
        body = chat("counted", max_tokens=tokens, ignore_eos=True)
        stream = {**body, "stream": True, "stream_options": {"include_usage": True}}
        for number in range(plain):
            text_of(await ask(http, {**body, "user": str(number)}))
        for _ in range(streamed):
            async with http.stream("POST", CHAT, json=stream) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
        for _ in range(refused):
            assert (await ask(http, {**body, "messages": "none"})).status_code == 400

    run(tidegate, story)
    good, every = plain + streamed, plain + streamed + refused
    tidegate.wait_count(good, "tidegate_requests_total", pool="counted", outcome="ok")
    tidegate.wait_count(refused, "tidegate_requests_total", pool="counted", outcome="client_error")
    metrics = tidegate.metrics()
    count = {
        name: metrics.sum(f"tidegate_{name}", pool="counted")
        for name in (
            "requests_total",
            "arrivals_total",
            "time_to_first_token_seconds_count",
            "e2e_request_latency_seconds_count",
            "request_queue_time_seconds_count",
            "held_total",
            "generation_tokens_total",
            "prompt_tokens_total",
        )
    }
    engine = tidegate.engine_metrics("counted")
    assert count == {
        "requests_total": every,
        "arrivals_total": every,
        "time_to_first_token_seconds_count": every,
        "e2e_request_latency_seconds_count": every,
        "request_queue_time_seconds_count": every,
        "held_total": 1,
        "generation_tokens_total": good * tokens,
        "prompt_tokens_total": engine.sum("vllm:prompt_tokens_total"),
    }
    assert engine.sum("vllm:generation_tokens_total") == good * tokens
    assert metrics.sum("tidegate_inter_token_latency_seconds_count", pool="counted") >= streamed
    assert metrics.sum("tidegate_replicas", pool="counted", state="ready") == 1
    assert metrics.sum("tidegate_desired_replicas", pool="counted") == 1
    assert metrics.sum("tidegate_decisions_total", pool="counted", reason="wake") == 1
    status = tidegate.pool("counted")
    assert status["arrivals_total"] == every
    assert metrics.sum("tidegate_wake_eta_seconds", pool="counted") == status["wake_eta_s"]


def test_explain_says_why(tidegate: Tidegate) -> None:
    name = "Qwen/Qwen3-8B"  # pools may have slashes in their names
    text_of(ask_now(tidegate, chat("qwen")))
    decisions = tidegate.admin(f"/pools/{name}/explain")["decisions"]
    reasons = [one["reason"] for one in decisions]
    assert reasons[0] == "at_zero"
    wake = decisions[reasons.index("wake")]
    assert (wake["desired"], wake["supply"], wake["signal"]) == (1, 0, "held")
    assert "held" in wake["detail"]
    last = tidegate.pool(name)["last_decision"]
    assert last["desired"] == 1
    assert last["detail"]


def test_status_is_whole(tidegate: Tidegate) -> None:
    status = tidegate.admin("/status")
    assert status["endpoint"] == tidegate.url
    assert status["admin"] == tidegate.admin_url
    assert status["uptime_s"] > 0
    (worker,) = status["workers"]
    assert worker["state"] == "listening"
    assert worker["pid"] in tidegate.survivors()
    assert [pool["name"] for pool in status["pools"]][:2] == ["scaled", "rests"]
    assert status["errors"] == {}
    assert tidegate.admin("/healthz") == {"status": "alive"}
    assert tidegate.admin("/readyz")["ready"] is True
    # The API's own listener gives none of this away.
    for path in ("/metrics", "/status", "/pools/scaled/explain"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            fetch(tidegate.url + path)
        assert refused.value.code == 404
