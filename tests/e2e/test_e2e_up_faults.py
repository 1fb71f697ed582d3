"""Engines that crash, hang and answer wrongly under a whole Tidegate, and the traps of zero."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, error_of, held, run, spawn, text_of
from tidegate_process import SHUT, Tidegate, port_of, simulated, up

SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0)

POOLS = [
    simulated("loading", "--startup-s", 2, idle_to_zero_s=0.2),
    simulated("killed", *SHUT),
    simulated("crash"),
    simulated("cut", *SLOW),
    simulated("fails"),
    simulated("never"),
    simulated("long", *SLOW, idle_to_zero_s=0.2),
    simulated("back", *SLOW),
    simulated("drain", *SLOW, max_replicas=2),
    simulated("fan", "--startup-s", 1, *SLOW, max_replicas=6, max_inflight_requests=4),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    with up(
        tmp_path_factory.mktemp("faults"),
        pools=POOLS,
        gateway={"holding": {"keepalive_s": 0.3}},
        autoscaler={
            "health_interval_s": 0.2,
            "health_timeout_s": 30,
            "health_failures": 1,
            "unhealthy_restart_s": 0.5,
            "backoff_initial_s": 0.1,
            "backoff_max_s": 0.5,
            "terminate_s": 1,
            "stable_window_s": 1,
            "panic_window_s": 0.5,
            "scale_down_delay_s": 0.5,
        },
    ) as tidegate:
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


def test_trap_1_and_10_replica_is_not_removed_while_it_loads(tidegate: Tidegate) -> None:
    """Its idle time is a tenth of its start, health checks fail all the while, and no client waits
    any more: it becomes ready all the same, and goes only then."""

    async def story(http: httpx.AsyncClient) -> None:
        (visitor,) = await held(tidegate, http, "loading", 1)
        visitor.cancel()
        await asyncio.to_thread(tidegate.wait_held, "loading", 0)

    run(tidegate, story)
    tidegate.wait("a start measured", lambda: tidegate.pool("loading")["wake_eta_s"])
    tidegate.wait_at_zero("loading")
    assert tidegate.starts("loading") == 1
    assert tidegate.pool("loading")["failures"] == 0
    (log,) = tidegate.engine_logs("loading")
    assert "startup complete" in log.read_text()


def test_trap_3_request_that_comes_and_goes_at_once_still_wakes(tidegate: Tidegate) -> None:
    before = tidegate.starts("loading")

    async def story() -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", port_of(tidegate.url))
        body = json.dumps(chat("loading")).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()
        writer.close()

    tidegate.wait_at_zero("loading")
    asyncio.run(story())
    tidegate.wait("another start", lambda: tidegate.starts("loading") == before + 1)
    tidegate.wait_held("loading", 0)
    reasons = [one["reason"] for one in tidegate.admin("/pools/loading/explain")["decisions"]]
    assert "wake" in reasons


def test_pool_does_not_go_to_zero_while_a_stream_runs(tidegate: Tidegate) -> None:
    """The stream takes seven times the idle time, and there is no other request."""

    async def story(http: httpx.AsyncClient) -> list[str]:
        lines: list[str] = []
        body = chat("long", stream=True, max_tokens=30, ignore_eos=True)
        await read_lines(http, body, lines)
        return lines

    assert run(tidegate, story)[-1] == "data: [DONE]"
    tidegate.wait_at_zero("long")
    assert tidegate.starts("long") == 1


def test_pool_that_is_given_back_at_zero_stays_there(tidegate: Tidegate) -> None:
    """What was asked of it before is no reason to start an engine without demand."""
    text_of(ask_now(tidegate, chat("back", max_tokens=10)))
    tidegate.admin("/pools/back/scale", {"replicas": 0})
    tidegate.wait_at_zero("back")
    tidegate.admin("/pools/back/scale", {"replicas": None})
    time.sleep(1.0)
    assert tidegate.starts("back") == 1


def test_engine_that_dies_while_it_starts_is_started_again(tidegate: Tidegate) -> None:
    def pid_of(pool: str) -> int:
        """The process of its only replica; 0 until it has been looked at once."""
        return sum(one["pid"] or 0 for one in tidegate.pool(pool)["replicas"])

    async def story(http: httpx.AsyncClient) -> list[httpx.Response]:
        tasks = await held(tidegate, http, "killed", 3)
        pid = await asyncio.to_thread(tidegate.wait, "its process", lambda: pid_of("killed"))
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(
            tidegate.wait, "another start", lambda: tidegate.starts("killed") == 2
        )
        await asyncio.to_thread(tidegate.open_gate, "killed")
        return await asyncio.gather(*tasks)

    for answer in run(tidegate, story):
        text_of(answer)
    assert tidegate.starts("killed") == 2
    assert tidegate.engine_metrics("killed").sum("vllm:request_success_total") == 3
    assert "SIGKILL" in tidegate.pool("killed")["error"]


def test_engine_that_dies_before_it_answers_is_replaced_and_the_request_kept(
    tidegate: Tidegate,
) -> None:
    text_of(ask_now(tidegate, chat("crash")))
    tidegate.set_faults("crash", "crash:after_requests=0")
    answer = ask_now(tidegate, chat("crash"))
    assert text_of(answer)
    assert tidegate.starts("crash") == 2
    # The new engine has seen it once; the client noticed nothing.
    assert tidegate.engine_metrics("crash").sum("vllm:request_success_total") == 1
    tidegate.wait(
        "retry counted", lambda: tidegate.metrics().sum("tidegate_retries_total", pool="crash")
    )


def test_stream_that_is_cut_ends_as_an_error_and_is_not_asked_again(tidegate: Tidegate) -> None:
    text_of(ask_now(tidegate, chat("cut")))
    tidegate.set_faults("cut", "cut:after_chunks=3")

    async def story(http: httpx.AsyncClient) -> list[str]:
        lines: list[str] = []
        body = chat("cut", stream=True, max_tokens=20, ignore_eos=True)
        with pytest.raises(httpx.RemoteProtocolError):
            await read_lines(http, body, lines)
        return lines

    lines = run(tidegate, story)
    assert len(lines) == 4
    assert "data: [DONE]" not in lines
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "replica_cut"
    tidegate.wait_count(1, "tidegate_requests_total", pool="cut", outcome="engine_error")
    tidegate.wait_count(0, "tidegate_retries_total", pool="cut")


def test_engine_that_hangs_is_504_then_replaced(tmp_path: Path) -> None:
    with up(
        tmp_path,
        pools=[simulated("hang")],
        gateway={"upstream_idle_timeout_s": 6},
        autoscaler={
            "health_interval_s": 0.2,
            "health_timeout_s": 6,
            "health_failures": 1,
            "unhealthy_restart_s": 1.5,
            "terminate_s": 1,
        },
    ) as tidegate:
        text_of(ask_now(tidegate, chat("hang")))
        tidegate.set_faults("hang", "hang")
        answer = ask_now(tidegate, chat("hang"))
        assert answer.status_code == 504
        assert answer.headers["x-tidegate-reason"] == "replica_timeout"
        assert error_of(answer)["type"] == "server_error"
        # The health check fails about when the request does; a request between the two goes there.
        tidegate.wait(
            "the first out of service",
            lambda: all(
                one["id"] != "hang-1" or one["state"] != "ready"
                for one in tidegate.pool("hang")["replicas"]
            ),
        )
        # It does not heed SIGTERM either; the next request is answered by its successor.
        text_of(ask_now(tidegate, chat("hang")))
        assert tidegate.starts("hang") == 2


def test_engine_s_own_errors_pass_untouched(tidegate: Tidegate) -> None:
    text_of(ask_now(tidegate, chat("fails")))
    tidegate.set_faults("fails", "error500:times=1")
    answer = ask_now(tidegate, chat("fails"))
    assert answer.status_code == 500
    assert "asked for" in answer.json()["error"]["message"]
    assert "x-tidegate-reason" not in answer.headers
    refused = ask_now(tidegate, chat("fails", temperature="warm"))
    assert refused.status_code == 400
    assert "x-tidegate-reason" not in refused.headers
    text_of(ask_now(tidegate, chat("fails")))
    assert tidegate.starts("fails") == 1


def test_trap_11_stream_is_finished_before_its_replica_goes(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> None:
        body = chat("drain", stream=True, max_tokens=40, ignore_eos=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            lines = answer.aiter_lines()
            while not (await anext(lines)).startswith("data: "):
                pass  # comments, while it starts
            (replica,) = tidegate.pool("drain")["replicas"]
            await asyncio.to_thread(tidegate.admin, f"/replicas/{replica['id']}/drain", {})
            # A request that comes now is another replica's.
            other = spawn(ask(http, chat("drain")))
            rest = [line async for line in lines if line]
            text_of(await other)
        assert rest[-1] == "data: [DONE]"
        assert sum('"content":"' in line for line in rest) >= 40

    run(tidegate, story)
    assert tidegate.starts("drain") == 2
    tidegate.wait("the drained one gone", lambda: len(tidegate.pool("drain")["replicas"]) == 1)


def test_trap_7_and_8_burst_starts_what_it_needs_and_the_fleet_does_not_collapse(
    tidegate: Tidegate,
) -> None:
    """Twelve streams at four to a replica want three; while these load nothing more is started,
    and when the panic is over nothing goes while they are busy: for longer than the stable window
    and the scale-down delay together."""
    streams = 12
    calm_s = 2.0

    async def story(http: httpx.AsyncClient) -> None:
        body = chat("fan", stream=True, max_tokens=4000, ignore_eos=True)
        tasks = [spawn(ask(http, body, request_id=f"f{n}")) for n in range(streams)]
        await asyncio.to_thread(tidegate.wait_ready, "fan", 3)
        await asyncio.to_thread(
            tidegate.wait,
            "the panic over",
            lambda: not tidegate.pool("fan")["last_decision"]["panicking"],
        )
        until = time.monotonic() + calm_s
        while time.monotonic() < until:
            page = await asyncio.to_thread(tidegate.pool, "fan")
            assert page["ready"] == 3
            assert page["inflight_requests"] == streams
            await asyncio.sleep(0.05)
        for task in tasks:  # they would run for minutes
            assert not task.done()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run(tidegate, story)
    assert tidegate.starts("fan") == 3


def test_trap_6_what_was_not_measured_is_absent_and_nothing_is_nan(tidegate: Tidegate) -> None:
    text_of(ask_now(tidegate, chat("fails")))
    metrics = tidegate.metrics()
    assert [name for (name, _), value in metrics.samples.items() if math.isnan(value)] == []
    assert metrics.sum("tidegate_wake_eta_seconds", pool="fails") > 0
    assert not metrics.has("tidegate_wake_eta_seconds", pool="never")
    assert metrics.has("tidegate_inflight_requests", pool="never")
    assert tidegate.pool("never")["wake_eta_s"] is None


async def read_lines(http: httpx.AsyncClient, body: dict[str, Any], lines: list[str]) -> None:
    """Add the lines of a stream as they come, empty ones left out."""
    async with http.stream("POST", CHAT, json=body) as answer:
        async for line in answer.aiter_lines():
            if line:
                lines.append(line)
