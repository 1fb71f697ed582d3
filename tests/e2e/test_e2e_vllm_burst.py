"""A burst that recurs, on the real vLLM: by its third time the engine is up before it comes."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from asking import ask, chat, client, spawn
from tidegate_process import Tidegate, up

PATIENCE_S = 120.0
PERIOD_S = 70.0
BURSTS = 3
SCHEDULE_S = tuple(1.2 * place for place in range(7))
"""When the requests of a burst come, from its beginning; the same each time. So few are sent to an
engine that is up at once, even while it has answered none."""
STEP_S = 5.0
"""Of forecasts for short leads; a burst begins in the second half of one."""
QUIET_S = 15.0
"""At least, before the first."""
STANDS_BY = "the fork server is ready"

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.timeout(3 * PATIENCE_S + QUIET_S + BURSTS * PERIOD_S),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Burst:
    """What became of one. ``zero_s`` is how long before it the pool was seen at zero (``None`` for
    the first, which finds it so), ``ready`` the replicas that it found, ``held`` how many of its
    requests waited for one, ``first_s`` how long its first took. ``at_s`` is Unix time."""

    at_s: float
    zero_s: float | None
    ready: int
    held: float
    first_s: float


def test_third_burst_finds_an_engine_that_is_up(
    engine_python: Path, model_dir: Path, tmp_path: Path
) -> None:
    pool = {
        "name": "small",
        "engine": "vllm",
        "model": model_dir,
        "max_model_len_tokens": 512,
        "idle_to_zero_s": 10,
        # Cheap enough that running for seconds in vain costs less than a wait, also where vLLM is
        # up in less than one.
        "replica_hour_price": 2.0,
    }
    with up(
        tmp_path,
        pools=[pool],
        loaders={"engine_python": engine_python},
        autoscaler={"forecast": {"history_least_s": 60}},
    ) as tidegate:
        tidegate.expected_log.append("the fork server is importing")  # a busy machine is slow
        tidegate.wait("an engine that stands by", lambda: STANDS_BY in tidegate.log(), PATIENCE_S)
        bursts = asyncio.run(play(tidegate))
        print(timeline(tidegate, bursts))
        decisions = tidegate.admin("/pools/small/explain")["decisions"]

    first, second, third = bursts
    assert (first.ready, first.held > 0) == (0, True)  # nothing was known of it
    assert second.zero_s is not None
    assert third.zero_s is not None
    assert (third.ready, third.held) == (1, 0)
    assert "prewarm" in {one["reason"] for one in decisions}


async def play(tidegate: Tidegate) -> list[Burst]:
    """The bursts, at their times."""
    found = []
    begin_s = (time.time() + QUIET_S) // STEP_S * STEP_S + 1.7 * STEP_S
    async with client(tidegate) as http:
        http.timeout = httpx.Timeout(PATIENCE_S)
        for number in range(BURSTS):
            at_s, zero_s = begin_s + number * PERIOD_S, None
            if number:
                await asyncio.to_thread(tidegate.wait_at_zero, "small", at_s - time.time())
                zero_s = round(at_s - time.time(), 1)
            await asyncio.sleep(max(0.0, at_s - time.time()))
            before = await asyncio.to_thread(tidegate.pool, "small")
            held = (await asyncio.to_thread(tidegate.metrics)).sum("tidegate_held_total")
            asked = [spawn(ask_at(http, at_s + after_s)) for after_s in SCHEDULE_S]
            took_s = await asyncio.gather(*asked)
            now_held = (await asyncio.to_thread(tidegate.metrics)).sum("tidegate_held_total")
            found.append(
                Burst(
                    at_s=at_s,
                    zero_s=zero_s,
                    ready=before["ready"],
                    held=now_held - held,
                    first_s=round(took_s[0], 2),
                )
            )
    return found


async def ask_at(http: httpx.AsyncClient, at_s: float) -> float:
    """One request at that time; how long it took."""
    await asyncio.sleep(max(0.0, at_s - time.time()))
    begun_s = time.monotonic()
    answer = await ask(http, chat("small"))
    assert answer.status_code == 200
    return time.monotonic() - begun_s


def timeline(tidegate: Tidegate, bursts: list[Burst]) -> str:
    """The bursts, and what the control loop says it did, by seconds from the first burst."""
    begin_s = bursts[0].at_s
    lines = [
        (
            one.at_s - begin_s,
            f"burst: {one.ready} ready, {one.held:g} held, the first answer after {one.first_s} s",
        )
        for one in bursts
    ]
    told = re.compile(r"^(\S+ \S+),(\d+) INFO \S+: small.*?( desired .*|: \S+ -> \S+ .*)$", re.M)
    for when, thousandths, what in told.findall(tidegate.log()):
        at_s = time.mktime(time.strptime(when, "%Y-%m-%d %H:%M:%S")) + int(thousandths) / 1e3
        lines.append((at_s - begin_s, what.removeprefix(":").strip()))
    return "\n".join(f"{at_s:7.1f}  {what}" for at_s, what in sorted(lines))
