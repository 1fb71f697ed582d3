"""Two worker processes on one port: one queue's worth of bounds, one ledger, one control side."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator

import httpx
import pytest
from asking import CHAT, ask, chat, run, spawn, text_of
from tidegate_process import SHUT, Tidegate, simulated, up

MAX_HELD = 30
SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    pools = [
        simulated("held", *SHUT),
        simulated("spread", *SLOW, max_replicas=2),
        simulated("dies", *SLOW, idle_to_zero_s=6),
    ]
    holding = {"max_requests": MAX_HELD, "keepalive_s": 0.3, "release_initial": 64}
    with up(
        tmp_path_factory.mktemp("workers"),
        pools=pools,
        arguments=["--workers", "2"],
        gateway={"holding": holding},
    ) as tidegate:
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


def served_by(tidegate: Tidegate) -> Counter[str]:
    """Connections accepted so far, by worker."""
    name = "tidegate_connections_accepted_total"
    metrics = tidegate.metrics()
    return Counter({worker: int(metrics.sum(name, worker=worker)) for worker in ("0", "1")})


def test_requests_held_by_both_workers_are_all_answered_by_one_engine(tidegate: Tidegate) -> None:
    count = MAX_HELD - 4

    async def story(http: httpx.AsyncClient) -> list[httpx.Response]:
        asks = [
            spawn(ask(http, chat("held", f"number {n}"), request_id=f"w{n}")) for n in range(count)
        ]
        await asyncio.to_thread(tidegate.wait_held, "held", count)
        await asyncio.to_thread(tidegate.open_gate, "held")
        return await asyncio.gather(*asks)

    answers = run(tidegate, story)
    assert [answer.json()["id"] for answer in answers] == [f"chatcmpl-w{n}" for n in range(count)]
    assert min(served_by(tidegate).values()) > 0, "one worker got every connection"
    assert tidegate.starts("held") == 1
    assert tidegate.engine_metrics("held").sum("vllm:request_success_total") == count


def test_the_bound_of_held_requests_is_over_both_workers(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> list[httpx.Response]:
        await asyncio.to_thread(tidegate.admin, "/pools/held/scale", {"replicas": 0})
        await asyncio.to_thread(tidegate.wait_at_zero, "held")
        await asyncio.to_thread(tidegate.admin, "/pools/held/scale", {"replicas": None})
        asks = [spawn(ask(http, chat("held"))) for _ in range(MAX_HELD)]
        await asyncio.to_thread(tidegate.wait_held, "held", MAX_HELD)
        over = await asyncio.gather(*(ask(http, chat("held")) for _ in range(6)))
        await asyncio.to_thread(tidegate.open_gate, "held")
        for answer in await asyncio.gather(*asks):
            text_of(answer)
        return over

    assert [answer.status_code for answer in run(tidegate, story)] == [429] * 6


def test_workers_see_each_others_load(tidegate: Tidegate) -> None:
    """Long answers over two replicas, asked of two workers: half of them each, which only a worker
    can do that knows what the other has sent."""
    count = 24  # the kernel spreads them by chance: both workers get some, but once in 8 million

    async def story(http: httpx.AsyncClient) -> list[int]:
        await asyncio.to_thread(tidegate.admin, "/pools/spread/scale", {"replicas": 2})
        await asyncio.to_thread(tidegate.wait_ready, "spread", 2)
        asks = []
        for number in range(count):
            body = chat("spread", f"number {number:02}", max_tokens=4_000, ignore_eos=True)
            asks.append(spawn(ask(http, body)))
            await asyncio.to_thread(
                tidegate.wait,
                f"{number + 1} in flight",
                lambda count=number + 1: tidegate.pool("spread")["inflight_requests"] == count,
            )
        replicas = (await asyncio.to_thread(tidegate.pool, "spread"))["replicas"]
        for task in asks:
            task.cancel()
        return [replica["inflight_requests"] for replica in replicas]

    before = served_by(tidegate)
    assert run(tidegate, story) == [count // 2, count // 2]
    both = served_by(tidegate) - before
    assert len(both) == 2


def test_trap_6_worker_that_dies_takes_no_count_with_it_and_ends_no_stream_of_the_other(
    tidegate: Tidegate,
) -> None:
    """What it had in flight is taken off, what the other has stays: the pool is not idle, though
    the streams go on for more than its idle time."""
    workers = tidegate.admin("/status")["workers"]
    count = 32  # by chance all would be one worker's once in two billion times

    async def story(http: httpx.AsyncClient) -> tuple[int, int]:
        await ask(http, chat("dies"))
        body = chat("dies", stream=True, max_tokens=200, ignore_eos=True)
        asks = [spawn(read(http, body)) for _ in range(count)]
        await asyncio.to_thread(
            tidegate.wait,
            "all streams",
            lambda: tidegate.pool("dies")["inflight_requests"] == count,
        )
        os.kill(workers[0]["pid"], signal.SIGKILL)
        ended = await asyncio.gather(*asks)
        assert tidegate.pool("dies")["ready"] == 1
        return ended.count("whole"), ended.count("cut")

    async def read(http: httpx.AsyncClient, body: object) -> str:
        last = ""
        try:
            async with http.stream("POST", CHAT, json=body) as answer:
                async for line in answer.aiter_lines():
                    last = line or last
        except httpx.HTTPError:
            return "cut"
        return "whole" if last == "data: [DONE]" else last

    tidegate.expected_log.append("worker 0 ended; starting it again")
    whole, cut = run(tidegate, story)
    assert whole + cut == count
    assert whole > 0, "no stream was the other worker's"
    assert cut > 0, "no stream was the dead worker's"
    tidegate.assert_at_rest()
    assert tidegate.starts("dies") == 1

    def is_back() -> bool:
        worker = tidegate.admin("/status")["workers"][0]
        return worker["state"] == "listening" and worker["pid"] != workers[0]["pid"]

    tidegate.wait("worker 0 again", is_back)
    assert tidegate.admin("/readyz")["ready"] is True
    tidegate.wait_at_zero("dies")  # known to be idle now, so it goes
