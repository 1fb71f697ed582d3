"""The simulated engine's life: start-up, load, sleep, clients that leave, SIGTERM."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from loaders.engines.base import START_PHASES


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def _wait_for(url: str, status: int) -> httpx.Response:
    end = time.monotonic() + 60
    while True:
        try:
            reply = httpx.get(url, timeout=60)
        except httpx.ConnectError:
            assert time.monotonic() < end, "no process listens"
        else:
            if reply.status_code == status:
                return reply
            assert time.monotonic() < end, reply.text
        time.sleep(0.02)


def test_it_is_ready_at_once(start: Any) -> None:
    """Its start-up has no phase that takes any time, unless it is told to."""
    engine = start()
    assert engine.get("/health").status_code == 200
    log = "".join(engine.lines)
    assert "startup complete" in log
    assert not [phase for phase in START_PHASES if phase in log], log


def test_start_up_has_phases_and_health_says_503_until_they_are_over(start: Any) -> None:
    port = _free_port()
    engine = start("--port", str(port), "--importing-s", "3", "--warming-s", "3", ready=False)
    health = f"http://127.0.0.1:{port}/health"
    assert "importing" in _wait_for(health, 503).text
    assert httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=60).status_code == 503
    end = time.monotonic() + 60
    while "warming" not in httpx.get(health, timeout=60).text:
        assert time.monotonic() < end
        time.sleep(0.02)
    _wait_for(health, 200)
    engine.wait_until_ready()
    log = "".join(engine.lines)
    assert log.index("importing") < log.index("warming") < log.index("startup complete")


def test_a_late_port_is_closed_until_ready(start: Any) -> None:
    port = _free_port()
    engine = start("--port", str(port), "--loading-s", "3", "--late-port", ready=False)
    end = time.monotonic() + 60
    while not any("loading" in line for line in engine.lines):
        assert time.monotonic() < end, engine.lines
        time.sleep(0.02)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{port}/health")
    _wait_for(f"http://127.0.0.1:{port}/health", 200)


def test_a_port_in_use_is_said_and_ends_with_1(start: Any) -> None:
    engine = start()
    second = start("--port", str(engine.port), ready=False)
    assert second.ended() == 1
    assert f"cannot bind 127.0.0.1:{engine.port}" in "".join(second.lines)


def test_bad_flags_end_with_2(root: Path) -> None:
    argv = [sys.executable, "-m", "loaders.engines.simulated", "--model", "m", "--fault", "explode"]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "unknown fault 'explode'" in done.stderr


def test_rates_are_kept_in_real_time(start: Any) -> None:
    engine = start("--prefill-tokens-per-s", "100", "--decode-tokens-per-s", "20")
    begun = time.monotonic()
    usage = engine.chat(max_tokens=21).json()["usage"]
    took = time.monotonic() - begun
    expected = usage["prompt_tokens"] / 100 + 20 / 20
    assert expected <= took + 0.05 < expected + 30
    ttft = engine.metric("vllm:time_to_first_token_seconds_sum")
    assert ttft >= usage["prompt_tokens"] / 100 - 0.001


def test_virtual_time_waits_for_nothing_and_counts_as_if_it_had(start: Any) -> None:
    engine = start("--virtual-time", "--startup-s", "600", "--decode-tokens-per-s", "1")
    begun = time.monotonic()
    engine.chat(max_tokens=1000, ignore_eos=True)
    assert time.monotonic() - begun < 100  # 1,599 s went by
    assert engine.metric("vllm:e2e_request_latency_seconds_sum") == pytest.approx(999, rel=0.01)


def test_a_full_batch_queues_and_metrics_show_it(start: Any) -> None:
    engine = start("--max-num-seqs", "2", "--decode-tokens-per-s", "20")

    async def main() -> list[int]:
        async with httpx.AsyncClient(timeout=100) as client:
            body = {"model": "demo", "prompt": "x" * 640, "max_tokens": 60, "ignore_eos": True}
            url = engine.url + "/v1/completions"
            sent = [asyncio.ensure_future(client.post(url, json=body)) for _ in range(5)]
            await asyncio.to_thread(engine.wait_for_metric, "vllm:num_requests_running", 2)
            await asyncio.to_thread(engine.wait_for_metric, "vllm:num_requests_waiting", 3)
            assert await asyncio.to_thread(engine.metric, "vllm:kv_cache_usage_perc") > 0
            return [(await reply).status_code for reply in sent]

    assert asyncio.run(main()) == [200] * 5
    assert engine.metric("vllm:request_success_total", finished_reason="length") == 5
    assert engine.metric("vllm:request_queue_time_seconds_sum") > 0.5
    assert engine.metric("vllm:prefix_cache_hits_total") > 0
    assert engine.metric("vllm:kv_cache_usage_perc") == 0


def test_a_full_queue_is_a_503(start: Any) -> None:
    engine = start("--max-num-queued-reqs", "2", "--decode-tokens-per-s", "20")
    body = {"model": "demo", "prompt": ["a", "b", "c"], "max_tokens": 2}
    reply = engine.post("/v1/completions", body)
    assert reply.status_code == 503
    assert "engine is busy" in reply.json()["error"]["message"]
    assert engine.metric("vllm:num_requests_waiting") == 0
    assert engine.metric("vllm:admission_rejections_total") == 1
    assert engine.chat(max_tokens=1).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(start: Any, stream: bool) -> None:
    engine = start("--decode-tokens-per-s", "5")

    async def main() -> None:
        async with httpx.AsyncClient(timeout=100) as client:
            body = {"model": "demo", "prompt": "x", "max_tokens": 500, "stream": stream}
            request = asyncio.ensure_future(client.post(engine.url + "/v1/completions", json=body))
            await asyncio.to_thread(engine.wait_for_metric, "vllm:num_requests_running", 1)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)

    asyncio.run(main())
    engine.wait_for_metric("vllm:num_requests_running", 0)
    assert engine.metric("vllm:request_success_total", finished_reason="abort") == 1
    assert engine.metric("vllm:kv_cache_usage_perc") == 0
    engine.wait_for_load(0)


@pytest.mark.parametrize("level", [1, 2])
def test_asleep_it_queues_and_awake_it_answers(start: Any, level: int) -> None:
    engine = start("--sleep-s", "0.1", "0.1", "--wake-s", "0.3", "0.6")
    engine.chat()
    assert engine.post(f"/sleep?level={level}").status_code == 200
    assert engine.get("/is_sleeping").json() == {"is_sleeping": True}
    state = ("awake", "weights_offloaded", "discard_all")[level]
    assert engine.metric("vllm:engine_sleep_state", sleep_state=state) == 1
    assert engine.metric("vllm:engine_sleep_state", sleep_state="awake") == 0
    assert engine.get("/health").status_code == 200
    replies: list[int] = []
    asker = threading.Thread(
        target=lambda: replies.append(
            httpx.post(
                engine.url + "/v1/completions", json={"model": "demo", "prompt": "x"}, timeout=60
            ).status_code
        )
    )
    asker.start()
    engine.wait_for_metric("vllm:num_requests_waiting", 1)
    assert replies == []
    begun = time.monotonic()
    assert engine.post("/wake_up").status_code == 200
    assert time.monotonic() - begun >= (0.3, 0.6)[level - 1] - 0.05
    asker.join(60)
    assert replies == [200]
    assert engine.get("/is_sleeping").json() == {"is_sleeping": False}


def test_falling_asleep_ends_what_runs_with_what_there_is(start: Any, events: Any) -> None:
    engine = start("--decode-tokens-per-s", "10", "--sleep-s", "0.1", "0.1")
    replies: list[httpx.Response] = []
    asker = threading.Thread(
        target=lambda: replies.append(engine.chat(stream=True, max_tokens=500, ignore_eos=True))
    )
    asker.start()
    engine.wait_for_metric("vllm:num_requests_running", 1)
    assert httpx.post(engine.url + "/sleep?level=1", timeout=60).status_code == 200
    asker.join(60)
    (reply,) = replies
    chunks = events(reply)
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["choices"][0]["finish_reason"] == "abort"


@pytest.mark.parametrize("mode", ["wait", "keep"])
def test_falling_asleep_can_wait_for_or_keep_what_runs(start: Any, mode: str) -> None:
    engine = start("--decode-tokens-per-s", "20", "--sleep-s", "0.1", "0.1", "--wake-s", "0.1", "1")
    replies: list[int] = []

    def ask() -> None:
        body = {"model": "demo", "prompt": "x", "max_tokens": 100, "ignore_eos": True}
        reply = httpx.post(engine.url + "/v1/completions", json=body, timeout=60)
        replies.append(reply.json()["usage"]["completion_tokens"])

    asker = threading.Thread(target=ask)
    asker.start()
    engine.wait_for_metric("vllm:num_requests_running", 1)
    assert engine.post(f"/sleep?level=1&mode={mode}").status_code == 200
    if mode == "wait":
        asker.join(60)
    assert replies == ([100] if mode == "wait" else [])
    engine.post("/wake_up")
    asker.join(60)
    assert replies == [100]


def test_sigterm_finishes_what_runs_and_exits_0(start: Any) -> None:
    engine = start("--decode-tokens-per-s", "20")
    replies: list[str] = []
    asker = threading.Thread(
        target=lambda: replies.append(engine.chat(stream=True, max_tokens=60, ignore_eos=True).text)
    )
    asker.start()
    engine.wait_for_load(1)
    engine.process.send_signal(signal.SIGTERM)
    asker.join(60)
    assert replies[0].endswith("data: [DONE]\n\n")
    assert engine.ended() == 0


def test_sigterm_has_a_limit(start: Any) -> None:
    engine = start("--decode-tokens-per-s", "0.1", "--drain-s", "0.5")
    failures: list[Exception] = []

    def ask() -> None:
        try:
            engine.chat(stream=True)
        except httpx.HTTPError as error:
            failures.append(error)

    asker = threading.Thread(target=ask)
    asker.start()
    engine.wait_for_load(1)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.ended() == 0
    asker.join(60)
    assert len(failures) == 1
    assert re.search(r"cut 1 requests after 0\.5 s", "".join(engine.lines))


def test_sigterm_while_starting_exits_0(start: Any) -> None:
    port = _free_port()
    engine = start("--port", str(port), "--startup-s", "100", ready=False)
    _wait_for(f"http://127.0.0.1:{port}/health", 503)
    engine.process.send_signal(signal.SIGTERM)
    assert engine.ended() == 0
