"""``kill -9`` of the control process: what becomes of its engines, and of requests under way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import httpx
import pytest
from asking import CHAT, ask, ask_now, chat, run, spawn, text_of
from tidegate_process import SHUT, Tidegate, port_of, simulated, start, up

SLOW = ("--decode-tokens-per-s", 20, "--batch-slowdown", 0, "--max-num-seqs", 200)
COUNT = 100


def wait_gone(*tidegates: Tidegate) -> None:
    """Until no process of these runs is left."""
    deadline_s = time.monotonic() + 60.0
    while left := [one.survivors() for one in tidegates if one.survivors()]:
        assert time.monotonic() < deadline_s, left
        time.sleep(0.05)


def kill(tidegate: Tidegate) -> None:
    """End the control process as nothing can prevent."""
    tidegate.process.kill()
    tidegate.process.wait()


def engines(tidegate: Tidegate, pool: str, *states: str) -> dict[str, int]:
    """The engines of a pool's replicas, by the ids of these."""
    replicas = tidegate.pool(pool)["replicas"]
    return {one["id"]: one["pid"] for one in replicas if one["state"] in (states or ("ready",))}


def scale_up(tidegate: Tidegate, pool: str, count: int) -> dict[str, int]:
    tidegate.admin(f"/pools/{pool}/scale", {"replicas": count})
    tidegate.wait_ready(pool, count)
    return engines(tidegate, pool)


def test_engines_are_taken_over_under_load_and_no_stream_is_lost(tmp_path: Path) -> None:
    pools = [simulated("busy", *SLOW, max_replicas=2), simulated("asleep", *SHUT)]
    engine_pids: dict[str, int] = {}

    async def stream(http: httpx.AsyncClient, begun: list[int]) -> list[str]:
        body = chat("busy", stream=True, max_tokens=60, ignore_eos=True)
        lines = []
        async with http.stream("POST", CHAT, json=body) as answer:
            async for line in answer.aiter_lines():
                begun.append(1) if not lines else None
                lines.append(line)
        return [line for line in lines if line]

    async def story(http: httpx.AsyncClient) -> None:
        begun: list[int] = []
        streams = [spawn(stream(http, begun)) for _ in range(COUNT)]
        waiting = [spawn(ask(http, chat("asleep"))) for _ in range(COUNT)]
        await asyncio.to_thread(first.wait_held, "asleep", COUNT)
        await asyncio.to_thread(first.wait, "streams", lambda: len(begun) == COUNT)
        await asyncio.to_thread(kill, first)
        second = await asyncio.to_thread(up_again)
        for lines in await asyncio.gather(*streams):
            assert lines[-1] == "data: [DONE]"
            assert sum('"content":"' in line for line in lines) >= 60
        for told in await asyncio.gather(*waiting):
            assert (told.status_code, told.headers["x-tidegate-reason"]) == (503, "draining")
        await asyncio.to_thread(look, second)

    def up_again() -> Tidegate:
        """On the same port: the workers of the first have given it back, and finish."""
        entered = up(tmp_path, pools=pools, gateway={"port": port_of(first.url)})
        second = entered.__enter__()
        contexts.append(entered)
        return second

    def look(second: Tidegate) -> None:
        second.expected_log.append("ended what an earlier run left: asleep-1 ")
        assert engines(second, "busy") == engine_pids
        assert second.starts("busy") == 0
        text_of(ask_now(second, chat("busy")))
        assert second.pool("busy")["desired"] == 2
        assert engines(second, "asleep", "starting", "ready") == {}

    contexts: list[object] = []
    with up(tmp_path, pools=pools) as first:
        engine_pids = scale_up(first, "busy", 2)
        run(first, story)
        (entered,) = contexts
        entered.__exit__(None, None, None)  # type: ignore[attr-defined]
        wait_gone(first)


def test_a_stream_of_the_killed_one_is_not_cut_because_the_next_sees_no_request(
    tmp_path: Path,
) -> None:
    """The workers of the first finish it, and only they know of it."""
    pools = [simulated("one", *SLOW, idle_to_zero_s=0.2)]
    settings = {"autoscaler": {"terminate_s": 0.2}}

    async def story(http: httpx.AsyncClient) -> None:
        body = chat("one", stream=True, max_tokens=200, ignore_eos=True)
        lines: list[str] = []
        async with http.stream("POST", CHAT, json=body) as answer:
            await asyncio.to_thread(kill, first)
            entered = up(tmp_path, pools=pools, **settings)
            second = await asyncio.to_thread(entered.__enter__)
            async for line in answer.aiter_lines():
                lines.append(line)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert second.starts("one") == 0
        await asyncio.to_thread(entered.__exit__, None, None, None)

    with up(tmp_path, pools=pools, **settings) as first:
        scale_up(first, "one", 1)
        run(first, story)
        wait_gone(first)


def test_new_settings_decide_which_engines_are_taken_over(tmp_path: Path) -> None:
    """By pool: the same, started otherwise, fewer replicas, gone; and ids go on where they were."""
    names = ("same", "other", "fewer", "gone")
    pools = [simulated(name, max_replicas=2) for name in names]
    with up(tmp_path, pools=pools) as first:
        before = {name: scale_up(first, name, 2) for name in names}
        kill(first)
        pools = [
            simulated("same", max_replicas=3),
            simulated("other", "--decode-tokens-per-s", 7, max_replicas=2),
            simulated("fewer", max_replicas=1),
        ]
        with up(tmp_path, pools=pools) as second:
            second.expected_log.append("ended what an earlier run left: (other|gone)-")
            assert engines(second, "same") == before["same"]
            assert engines(second, "other") == {}
            second.wait_ready("fewer", 1)
            assert engines(second, "fewer").items() <= before["fewer"].items()
            assert set(scale_up(second, "same", 3)) == {"same-1", "same-2", "same-3"}
            text_of(ask_now(second, chat("other")))
        wait_gone(first)


def test_a_sleeping_engine_is_taken_over_asleep_and_wakes(tmp_path: Path) -> None:
    pools = [simulated("one", "--enable-sleep-mode", idle_to_zero_s=0.2)]
    pools[0]["tiers"] = {"sleeping_s": 3_600}
    with up(tmp_path, pools=pools) as first:
        text_of(ask_now(first, chat("one")))
        first.wait("sleep", lambda: engines(first, "one", "sleeping"))
        asleep = engines(first, "one", "sleeping")
        kill(first)
        with up(tmp_path, pools=pools) as second:
            assert engines(second, "one", "sleeping") == asleep
            text_of(ask_now(second, chat("one")))
            assert second.starts("one") == 0
        wait_gone(first)


@pytest.mark.parametrize("keep_s", [0, 1])
def test_engines_end_by_themselves_when_nobody_comes(tmp_path: Path, keep_s: int) -> None:
    """One that hangs, and sees no SIGTERM, too."""
    settings = {"autoscaler": {"terminate_s": 1, "keep_engines_s": keep_s}}
    with up(tmp_path, pools=[simulated("one", max_replicas=2)], **settings) as first:
        hanging, *_ = scale_up(first, "one", 2).values()
        os.kill(hanging, signal.SIGSTOP)
        kill(first)
        wait_gone(first)
        assert [path.name for path in (first.state_dir / "replicas").iterdir()] == ["lock"]


def test_sigquit_finishes_what_there_is_and_leaves_the_engines(tmp_path: Path) -> None:
    pools = [simulated("one", *SLOW)]
    with up(tmp_path, pools=pools) as first:
        before = scale_up(first, "one", 1)

        async def story(http: httpx.AsyncClient) -> httpx.Response:
            asked = spawn(ask(http, chat("one", max_tokens=80, ignore_eos=True)))
            await asyncio.to_thread(
                first.wait, "a request", lambda: first.pool("one")["inflight_requests"]
            )
            first.process.send_signal(signal.SIGQUIT)
            return await asked

        text_of(run(first, story))
        assert first.process.wait(60) == 0
        assert "the engines stay for 60 s" in first.log()
        with up(tmp_path, pools=pools) as second:
            assert engines(second, "one") == before
            assert second.starts("one") == 0
        wait_gone(first)


def test_nothing_is_left_when_all_that_can_be_found_is_killed(tmp_path: Path) -> None:
    with up(tmp_path, pools=[simulated("one", max_replicas=2)]) as first:
        pids = set(scale_up(first, "one", 2).values())
        for pid in {first.pid, *first.survivors()} - pids:
            os.kill(pid, signal.SIGKILL)
        first.process.wait()
        wait_gone(first)


def test_of_two_that_start_at_once_one_takes_over(tmp_path: Path) -> None:
    pools = [simulated("one", max_replicas=2)]
    with up(tmp_path, pools=pools) as first:
        before = scale_up(first, "one", 2)
        kill(first)
        rivals = [start(tmp_path / name, pools=pools, state_dir=first.state_dir) for name in "ab"]
        try:
            deadline_s = time.monotonic() + 60
            while all(one.process.poll() is None for one in rivals):
                assert time.monotonic() < deadline_s
                time.sleep(0.05)
            (lost,) = [one for one in rivals if one.process.poll() is not None]
            (won,) = [one for one in rivals if one is not lost]
            assert lost.process.returncode == 2
            assert "belongs to another Tidegate that is running" in lost.log()
            for replica_id, pid in before.items():
                assert f"{replica_id} is taken over, with its engine (pid {pid})" in won.log()
            won.stop()
        finally:
            for one in rivals:
                one.kill_all()
        wait_gone(first)
