"""Scale from zero as clients meet it: held, woken once, released in order and with care."""

from __future__ import annotations

import asyncio
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, error_of, held, run, spawn, text_of
from tidegate_process import SHUT, Metrics, Tidegate, let_go, read_metrics, simulated, up

RELEASE_INITIAL = 2
BURST = 40

POOLS = [
    simulated("burst", *SHUT),
    simulated("line", *SHUT, "--decode-tokens-per-s", 40, max_inflight_requests=1),
    simulated("stream", *SHUT),
    simulated("plain", *SHUT),
    simulated("leave", *SHUT),
    simulated("paced", *SHUT, "--decode-tokens-per-s", 10, "--batch-slowdown", 0),
    simulated("idle", aliases=["other-name"], idle_to_zero_s=0.5),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    holding = {
        "keepalive_s": 0.2,
        "max_requests": BURST,
        "deadline_s": 60,
        "release_initial": RELEASE_INITIAL,
    }
    place = tmp_path_factory.mktemp("holding")
    with up(place, pools=POOLS, gateway={"holding": holding}) as tidegate:
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


def test_burst_wakes_one_engine_and_each_is_answered_once(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> list[httpx.Response]:
        asks = [
            spawn(ask(http, chat("burst", f"number {n}"), request_id=f"burst-{n}"))
            for n in range(BURST)
        ]
        await asyncio.to_thread(tidegate.wait_held, "burst", BURST)
        over = await ask(http, chat("burst"))
        assert over.status_code == 429
        await asyncio.to_thread(tidegate.open_gate, "burst")
        return await asyncio.gather(*asks)

    answers = run(tidegate, story)
    ids = [f"chatcmpl-burst-{n}" for n in range(BURST)]
    assert [answer.json()["id"] for answer in answers] == ids
    assert [answer.headers["x-request-id"] for answer in answers] == [i[9:] for i in ids]
    assert len({text_of(answer) for answer in answers}) > BURST / 2  # each its own, by its prompt
    engine = tidegate.engine_metrics("burst")
    assert engine.sum("vllm:request_success_total") == BURST
    assert tidegate.starts("burst") == 1
    assert [log.name for log in tidegate.engine_logs("burst")] == ["burst-1.log"]
    tidegate.wait_count(BURST, "tidegate_requests_total", pool="burst", outcome="ok")
    metrics = tidegate.metrics()
    assert metrics.sum("tidegate_held_total", pool="burst") == BURST
    assert metrics.sum("tidegate_held_seconds_count", pool="burst") == BURST
    assert metrics.sum("tidegate_retries_total", pool="burst") == 0


def test_held_requests_are_answered_in_the_order_they_came(tidegate: Tidegate) -> None:
    """The engine has one at a time, and each goes on until its client leaves: only then the next
    can begin."""
    order: list[int] = []

    async def stream(http: httpx.AsyncClient, number: int) -> None:
        body = chat("line", f"number {number}", stream=True, max_tokens=4_000, ignore_eos=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    order.append(number)
                    return

    async def story(http: httpx.AsyncClient) -> None:
        tasks = []
        for number in range(8):
            tasks.append(spawn(stream(http, number)))
            await asyncio.to_thread(tidegate.wait_held, "line", number + 1)
        await asyncio.to_thread(tidegate.open_gate, "line")
        await asyncio.gather(*tasks)

    run(tidegate, story)
    assert order == list(range(8))


def test_trap_9_held_stream_is_kept_alive_by_comments_and_then_streams(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> tuple[list[str], httpx.Headers]:
        body = chat("stream", stream=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            assert answer.status_code == 200
            # The head is here, and nothing can have answered yet.
            assert tidegate.pool("stream")["ready"] == 0
            lines = []
            async for line in answer.aiter_lines():
                lines += [line] if line else []
                if len(lines) == 2 and line:
                    await asyncio.to_thread(tidegate.open_gate, "stream")
            return lines, answer.headers

    lines, headers = run(tidegate, story)
    assert headers["content-type"].startswith("text/event-stream")
    assert "x-request-id" in headers
    comments = [line for line in lines if line.startswith(":")]
    assert len(comments) >= 2
    assert all("waiting for stream" in comment for comment in comments)
    # All of them come before the first event, and the events are whole.
    assert lines[: len(comments)] == comments
    events = lines[len(comments) :]
    assert all(event.startswith("data: ") for event in events)
    assert events[-1] == "data: [DONE]"
    assert sum('"content":' in event for event in events) >= 4


def test_held_request_that_is_no_stream_gets_its_plain_answer(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        (waiting,) = await held(tidegate, http, "plain", 1)
        await asyncio.to_thread(tidegate.open_gate, "plain")
        answer = await waiting
        assert answer.headers["content-type"] == "application/json"
        text_of(answer)

    run(tidegate, story)


def test_client_that_leaves_is_not_sent_to_the_engine(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        first, leaving, last = await held(tidegate, http, "leave", 3)
        leaving.cancel()
        await asyncio.to_thread(tidegate.wait_held, "leave", 2)
        await asyncio.to_thread(tidegate.open_gate, "leave")
        for answer in await asyncio.gather(first, last):
            text_of(answer)

    run(tidegate, story)
    assert finished(tidegate.engine_metrics("leave")) == {"stop": 0, "length": 2, "abort": 0}
    tidegate.wait_count(1, "tidegate_requests_total", pool="leave", outcome="cancelled")
    tidegate.wait_count(2, "tidegate_requests_total", pool="leave", outcome="ok")


def test_trap_5_held_requests_are_not_released_all_at_once(tidegate: Tidegate) -> None:
    """At every moment the engine has at most the first few, and one more for each that it has
    answered: read from its own page, so no moment in between can be missed."""
    count, pages = 16, []

    async def story(http: httpx.AsyncClient) -> None:
        tasks = await held(tidegate, http, "paced", count, max_tokens=8, ignore_eos=True)
        url = await asyncio.to_thread(tidegate.starting_url, "paced")
        await asyncio.to_thread(tidegate.wait, "its gate to open", lambda: let_go(url))
        page = url + "/metrics"  # from the first moment on
        while not all(task.done() for task in tasks):
            pages.append(await asyncio.to_thread(read_metrics, page))
            await asyncio.sleep(0.02)
        for answer in await asyncio.gather(*tasks):
            text_of(answer)

    run(tidegate, story)
    busiest = 0
    for page in pages:
        inside = page.sum("vllm:num_requests_running") + page.sum("vllm:num_requests_waiting")
        answered = page.sum("vllm:request_success_total")
        assert inside <= RELEASE_INITIAL + answered
        busiest = max(busiest, int(inside))
    assert busiest > RELEASE_INITIAL  # it grew as the answers came
    assert tidegate.engine_metrics("paced").sum("vllm:request_success_total") == count


def test_trap_2_model_at_zero_is_listed_and_never_404(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        for _ in range(2):  # never seen alive; seen alive, and seen to go
            await asyncio.to_thread(tidegate.wait_at_zero, "idle")
            listed = (await http.get("/v1/models")).json()["data"]
            assert {"idle", "burst", "other-name"} <= {model["id"] for model in listed}
            assert (await http.get("/v1/models/idle")).status_code == 200
            answer = await ask(http, chat("idle"))
            text_of(answer)
            assert answer.json()["model"] == "idle"
        unknown = await ask(http, chat("nobody"))
        assert unknown.status_code == 404
        assert error_of(unknown)["code"] == "model_not_found"
        assert unknown.headers["x-tidegate-reason"] == "model_unknown"
        assert (await http.get("/v1/models/nobody")).status_code == 404

    run(tidegate, story)
    assert tidegate.starts("idle") == 2


def test_alias_reaches_the_pool(tidegate: Tidegate) -> None:
    text_of(ask_now(tidegate, chat("other-name")))


def finished(engine: Metrics) -> dict[str, float]:
    """Requests an engine is done with, by reason."""
    return {
        reason: engine.sum("vllm:request_success_total", finished_reason=reason)
        for reason in ("stop", "length", "abort")
    }


# Small bounds, no keep-alive comments


@pytest.fixture(scope="module")
def bounded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    holding = {"keepalive_s": 0, "max_requests": 2, "max_bytes": 5_000, "deadline_s": 60}
    pools = [simulated("count", *SHUT), simulated("bytes", *SHUT), simulated("quiet")]
    place = tmp_path_factory.mktemp("bounded")
    with up(place, pools=pools, gateway={"holding": holding}) as tidegate:
        yield tidegate


def test_past_the_bound_is_429_with_retry_after_from_the_measured_wake(bounded: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> tuple[httpx.Response, float]:
        tasks = await held(bounded, http, "count", 2)
        # The measured time begins with the start, which comes a moment after the first is held.
        await asyncio.to_thread(bounded.starting_url, "count")
        began_s = time.monotonic()
        over = await ask(http, chat("count"))
        await asyncio.sleep(1.1)
        shut_s = time.monotonic() - began_s
        await asyncio.to_thread(bounded.open_gate, "count")
        for answer in await asyncio.gather(*tasks):
            text_of(answer)
        return over, shut_s

    unmeasured, shut_s = run(bounded, story)
    assert unmeasured.status_code == 429
    assert unmeasured.headers["x-tidegate-reason"] == "hold_queue_full"
    assert error_of(unmeasured)["type"] == "rate_limit_error"
    assert unmeasured.headers["retry-after"] == "30"  # a guess: nothing was measured yet
    measured_s = bounded.pool("count")["wake_eta_s"]
    assert measured_s >= shut_s
    bounded.admin("/pools/count/scale", {"replicas": 0})
    bounded.wait_at_zero("count")
    bounded.admin("/pools/count/scale", {"replicas": None})
    over, _ = run(bounded, story)
    assert over.status_code == 429
    assert over.headers["retry-after"] == str(math.ceil(measured_s))
    bounded.assert_at_rest()


def test_bytes_are_bounded_too(bounded: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        (large,) = await held(bounded, http, "bytes", 1, user="x" * 3_000)
        over = await ask(http, chat("bytes", "y" * 3_000))
        assert over.status_code == 429
        assert over.headers["x-tidegate-reason"] == "hold_queue_full"
        small = spawn(ask(http, chat("bytes")))
        await asyncio.to_thread(bounded.wait_held, "bytes", 2)
        await asyncio.to_thread(bounded.open_gate, "bytes")
        for answer in await asyncio.gather(large, small):
            text_of(answer)

    run(bounded, story)
    bounded.assert_at_rest()


def test_comments_can_be_turned_off(bounded: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        async with http.stream("POST", CHAT, json=chat("quiet", stream=True)) as answer:
            # Without comments the head comes from the engine, so it is ready by now.
            assert answer.headers["x-tidegate-simulated"] == "true"
            lines = [line async for line in answer.aiter_lines() if line]
        assert not [line for line in lines if line.startswith(":")]
        assert lines[-1] == "data: [DONE]"

    run(bounded, story)
    bounded.assert_at_rest()


def test_who_waits_is_told_why_an_engine_fails_long_before_the_deadline(tmp_path: Path) -> None:
    pools = [simulated("broken", "--fault", "crash:during=startup,phase=loading")]
    quick = {"backoff_initial_s": 0.2, "backoff_max_s": 1, "terminate_s": 1}
    with up(tmp_path, pools=pools, autoscaler=quick) as tidegate:
        answer = ask_now(tidegate, chat("broken"))
        assert (answer.status_code, answer.headers["x-tidegate-reason"]) == (503, "engine_failed")
        assert "a fault says so" in error_of(answer)["message"]
        assert re.search(
            r"WARNING tidegate\.autoscaler: broken-\d+ failed: the engine exited with status 1: "
            r".*a fault says so.* \(log: .*/broken-\d+\.log\)",
            tidegate.log(),
        )


# Engines that never become ready, and a short deadline


@pytest.fixture(scope="module")
def hopeless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    pools = [
        simulated("broken", "--startup-s", 0.2, "--fault", "crash:during=startup,phase=loading"),
        simulated("stuck", "--fault", "hang:during=startup", start_timeout_s=0.5),
        simulated("forever", "--startup-s", 600),
    ]
    with up(
        tmp_path_factory.mktemp("hopeless"),
        pools=pools,
        gateway={"holding": {"deadline_s": 1.5, "keepalive_s": 0.3}},
        autoscaler={"backoff_initial_s": 0.2, "backoff_max_s": 1, "terminate_s": 1},
    ) as tidegate:
        yield tidegate


def test_engine_that_never_comes_up_is_503_and_status_says_why(hopeless: Tidegate) -> None:
    causes = {
        "broken": ["exited with status 1", "crash: a fault says so (simulated)"],
        "stuck": ["not ready after 0.5 s"],
    }

    async def story(http: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(ask(http, chat(pool)) for pool in causes))

    for answer in run(hopeless, story):
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
        error = error_of(answer)
        assert error["type"] == "server_error"
        reason = answer.headers["x-tidegate-reason"]  # whichever comes first
        assert {"hold_deadline": "1.5 s", "engine_failed": "in a row"}[reason] in error["message"]
    for pool, words in causes.items():

        def is_said(pool: str = pool, words: list[str] = words) -> bool:
            shown = hopeless.pool(pool)
            told = all(word in (shown["error"] or "") for word in words)
            return told and shown["failures"] >= 1 and shown["retry_in_s"] is not None

        hopeless.wait(f"why {pool} does not start", is_said)
    hopeless.assert_at_rest()


def test_deadline_of_a_held_stream_is_an_error_event_in_it(hopeless: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> list[str]:
        async with http.stream("POST", CHAT, json=chat("forever", stream=True)) as answer:
            assert answer.status_code == 200
            return [line async for line in answer.aiter_lines() if line]

    *comments, failed, done = run(hopeless, story)
    assert comments
    assert all(line.startswith(":") for line in comments)
    error = json.loads(failed.removeprefix("data: "))["error"]
    assert done == "data: [DONE]"
    assert error["code"] == "hold_deadline"
    # Who asked has gone: the engine is not stopped while it loads (it would be for nothing).
    hopeless.wait("it starting", lambda: hopeless.pool("forever")["starting"] == 1)
    hopeless.assert_at_rest()
