"""Everything at once: clients that come and go, engines that die, hang and are scaled, workers
that are killed. Whatever happens, each request ends once and visibly, and the books balance."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, client, error_of, text_of
from tidegate_process import Tidegate, simulated, up

SECONDS = 4.0
MOST_S = 60.0
"""How long it goes on where too little has come of it, on a machine that does much else."""
CLIENTS = 24
POOLS = ("a", "b")
HONEST = {429, 500, 502, 503, 504}
"""What a client may be told when engines fail; never 404, and never silence."""


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", [20261123])
def test_each_request_ends_once_and_the_books_balance(tmp_path: Path, seed: int) -> None:
    pools = [
        simulated(
            name, "--startup-s", 0.3, "--decode-tokens-per-s", 80, "--output-tokens", 30,
            max_replicas=2, max_inflight_requests=6, idle_to_zero_s=0.5,
        )
        for name in POOLS
    ]  # fmt: skip
    with up(
        tmp_path,
        pools=pools,
        arguments=["--workers", "2"],
        gateway={"upstream_idle_timeout_s": 3, "holding": {"deadline_s": 30, "keepalive_s": 0.3}},
        autoscaler={
            "backoff_initial_s": 0.1,
            "backoff_max_s": 0.3,
            "health_interval_s": 0.2,
            "health_failures": 1,
            "health_timeout_s": 1,
            "unhealthy_restart_s": 0.5,
            "terminate_s": 1,
            "scale_down_delay_s": 0.3,
            "stable_window_s": 1,
            "panic_window_s": 0.5,
        },
    ) as tidegate:
        tidegate.expected_log += [r"worker \d ended", "asked for", "WARNING tidegate.autoscaler"]
        ends = asyncio.run(chaos(tidegate, seed))
        print(f"seed {seed}: {dict(ends)}")
        assert ends["whole"] > CLIENTS
        assert ends["left"] > 0
        tidegate.assert_at_rest()
        for pool in POOLS:  # engines without the faults that were set and not met
            tidegate.admin(f"/pools/{pool}/scale", {"replicas": 0})
            tidegate.wait_at_zero(pool)
            tidegate.admin(f"/pools/{pool}/scale", {"replicas": None})
            text_of(ask_now(tidegate, chat(pool)))


async def chaos(tidegate: Tidegate, seed: int) -> Counter[str]:
    ends: Counter[str] = Counter()
    began_s = time.monotonic()

    def is_over() -> bool:
        enough = ends["whole"] > CLIENTS and ends["left"] > 0
        return time.monotonic() > began_s + (SECONDS if enough else MOST_S)

    async with client(tidegate) as http:
        users = [
            asyncio.create_task(user(http, random.Random(seed + n), is_over, ends))
            for n in range(CLIENTS)
        ]
        gremlin = asyncio.create_task(mischief(tidegate, random.Random(seed - 1), is_over))
        await asyncio.gather(gremlin, *users)
    return ends


async def user(
    http: httpx.AsyncClient,
    rng: random.Random,
    is_over: Callable[[], bool],
    ends: Counter[str],
) -> None:
    """Asks one thing after another: whole or streamed, and leaves early now and then."""
    while not is_over():
        body = chat(rng.choice(POOLS), f"{rng.random()}", max_tokens=rng.randint(1, 60))
        leaves_after_s = rng.uniform(0.01, 0.6) if rng.random() < 0.2 else None
        one = streamed(http, body) if rng.random() < 0.5 else plain(http, body)
        try:
            end = await asyncio.wait_for(one, leaves_after_s or 120.0)
        except TimeoutError:
            assert leaves_after_s is not None, "a request was never answered"
            end = "left"
        ends[end] += 1
        if rng.random() < 0.1:
            await asyncio.sleep(rng.uniform(0.2, 1.5))


async def plain(http: httpx.AsyncClient, body: dict[str, object]) -> str:
    try:
        answer = await ask(http, body)
    except (httpx.RemoteProtocolError, httpx.NetworkError):
        return "cut"  # its worker was killed, or its engine died mid-answer
    if answer.status_code == 200:
        text_of(answer)
        return "whole"
    assert answer.status_code in HONEST, answer.text
    assert error_of(answer)["message"]
    return str(answer.status_code)


async def streamed(http: httpx.AsyncClient, body: dict[str, object]) -> str:
    events = []
    try:
        async with http.stream("POST", CHAT, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                assert answer.status_code in HONEST
                return str(answer.status_code)
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events.append(line)
    except (httpx.RemoteProtocolError, httpx.NetworkError):
        assert "data: [DONE]" not in events
        return "cut"
    # It ended in good order: so it is whole, or says what went wrong, and [DONE] comes once.
    assert events.count("data: [DONE]") == 1
    assert events[-1] == "data: [DONE]"
    if any('"error"' in event for event in events):
        assert len(events) == 2, events
        return "error event"
    ids = {event.partition('"id":"')[2].partition('"')[0] for event in events[:-1]}
    assert len(ids) == 1, ids
    return "whole"


async def mischief(tidegate: Tidegate, rng: random.Random, is_over: Callable[[], bool]) -> None:
    """Every half second something goes wrong, or an operator intervenes."""
    while not is_over():
        await asyncio.sleep(rng.uniform(0.1, 0.4))
        status = await asyncio.to_thread(tidegate.admin, "/status")
        replicas = [one for pool in status["pools"] for one in pool["replicas"]]
        pids = [one["pid"] for one in replicas if one["pid"]]
        urls = [one["url"] for one in replicas if one["state"] == "ready"]
        what = rng.choice(("kill", "fault", "fault", "fault", "scale", "worker"))
        if what == "kill" and pids:
            kill(rng.choice(pids))
        elif what == "fault" and urls:
            fault = rng.choice(
                ("cut:after_chunks=3,times=2", "error500:times=2", "reset:times=2",
                 "crash:after_requests=2", "hang:after_requests=1", "slow:factor=5,for_s=1",
                 "reset:on=connect,times=2", "accept_close:times=2", "unhealthy:for_s=0.5")
            )  # fmt: skip
            async with httpx.AsyncClient(trust_env=False, timeout=1) as engine:
                try:
                    faults = {"faults": [fault]}
                    await engine.post(rng.choice(urls) + "/simulated/faults", json=faults)
                except httpx.HTTPError:
                    continue  # it has died already
        elif what == "scale":
            number = rng.choice((0, 1, 2, None))
            path = f"/pools/{rng.choice(POOLS)}/scale"
            await asyncio.to_thread(tidegate.admin, path, {"replicas": number})
        elif what == "worker" and rng.random() < 0.3:
            kill(rng.choice(status["workers"])["pid"])


def kill(pid: int | None) -> None:
    if pid is not None:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # something else was faster
