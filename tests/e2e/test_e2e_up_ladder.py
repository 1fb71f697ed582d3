"""The ladder of a whole Tidegate with simulated engines, in real time: down, up from each step,
and what it says of itself."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from asking import CHAT, ask_now, chat, look_while_it_answers, run, text_of
from tidegate_process import SHUT, Tidegate, fetch, simulated, up

BRISK = ("--sleep-s", 0.1, 0.1, "--wake-s", 0.2, 0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that an engine could load."""
    place = tmp_path_factory.mktemp("model")
    (place / "model.safetensors").write_bytes(bytes(3_000_000))
    (place / "config.json").write_text("{}")
    return place


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Tidegate]:
    quick = {"model": str(model), "idle_to_zero_s": 2}
    pools = [
        simulated("steps", *BRISK, **quick, tiers={"sleeping_s": 1}),
        simulated("deep", *BRISK, **quick, tiers={"sleeping_s": 0.5, "paged_s": 0.5}),
        simulated("rests", *BRISK, **quick, tiers={"sleeping_s": 3_600}),
        simulated("cool", **quick, tiers={"paged_s": 0, "forked_s": 0}),
        simulated("never", model=str(model), min_replicas=1),
        simulated("slow", *SHUT, model=str(model)),
    ]
    autoscaler = {"scale_down_delay_s": 0, "stable_window_s": 1, "panic_window_s": 0.5}
    gateway = {"holding": {"keepalive_s": 0.2}}
    place = tmp_path_factory.mktemp("ladder")
    with up(place, pools=pools, autoscaler=autoscaler, gateway=gateway) as tidegate:
        yield tidegate


@pytest.fixture
def tidegate(running: Tidegate) -> Iterator[Tidegate]:
    yield running
    running.assert_at_rest()


def wait_tier(tidegate: Tidegate, pool: str, tier: str) -> None:
    tidegate.wait(f"{pool} {tier}", lambda: tidegate.pool(pool)["tier"] == tier)


@pytest.mark.parametrize(("pool", "last"), [("steps", "paged"), ("deep", "on_disk")])
def test_down_step_by_step_and_up_from_there(tidegate: Tidegate, pool: str, last: str) -> None:
    text_of(ask_now(tidegate, chat(pool)))
    tidegate.wait_at_zero(pool)
    wait_tier(tidegate, pool, last)
    assert f"{pool}-1: falling_asleep -> sleeping" in tidegate.log()
    left_s = tidegate.pool(pool)["step_down_in_s"]
    assert left_s is None or left_s > 3_600  # memory for so small a model costs next to nothing
    assert look_while_it_answers(tidegate, pool)["woken_from"] == last
    assert tidegate.starts(pool) == 2
    tiers = {one["tier"]: one for one in tidegate.pool(pool)["tiers"]}
    assert list(tiers) == ["sleeping", "paged", "on_disk"]
    assert all(one["available"] for one in tiers.values())
    assert tiers[last]["wake_s"] > 0

    def kept() -> bool:
        path = tidegate.state_dir / "wake_times.json"  # written beside the loop
        entries = json.loads(path.read_text())["wakes"] if path.exists() else []
        return any(one["tier"] == last and one["seconds"] for one in entries)

    tidegate.wait("a wake on disk", kept)


def test_metrics_tell_tiers_and_their_wake_times(tidegate: Tidegate) -> None:
    text_of(ask_now(tidegate, chat("never")))
    metrics = tidegate.metrics()
    for known in ("running", "sleeping", "forked", "paged", "on_disk", "remote"):
        assert metrics.sum("tidegate_tier", pool="never", tier=known) == (known == "running")
    assert metrics.sum("tidegate_starting_replicas", pool="never", step="fetching") == 0
    tiers = [one for one in tidegate.pool("never")["tiers"] if one["wakes"]]
    assert tiers
    for one in tiers:
        seconds = metrics.sum("tidegate_tier_wake_seconds", pool="never", tier=one["tier"])
        assert seconds == pytest.approx(one["wake_s"], abs=0.001)


def test_idle_engine_sleeps_by_itself_and_is_woken_not_started(tidegate: Tidegate) -> None:
    url = look_while_it_answers(tidegate, "rests")["url"]
    wait_tier(tidegate, "rests", "sleeping")
    tidegate.wait("sleep", lambda: json.loads(fetch(url + "/is_sleeping"))["is_sleeping"])
    replica = look_while_it_answers(tidegate, "rests")
    assert (replica["url"], replica["woken_from"]) == (url, "sleeping")
    wait_tier(tidegate, "rests", "sleeping")
    # An operator's number wakes it too.
    tidegate.admin("/pools/rests/scale", {"replicas": 1})
    tidegate.wait_ready("rests")
    assert tidegate.engine_url("rests") == url
    tidegate.admin("/pools/rests/scale", {"replicas": None})
    assert tidegate.starts("rests") == 1


def test_steps_that_are_given_no_time_are_left_out(tidegate: Tidegate) -> None:
    text_of(ask_now(tidegate, chat("cool")))
    tidegate.wait_at_zero("cool")
    wait_tier(tidegate, "cool", "on_disk")
    log = tidegate.log()
    assert "cool-1: ready -> draining" in log
    assert "cool-1: ready -> draining_to_sleep" not in log


def test_held_stream_is_told_what_the_replica_is_at(tidegate: Tidegate) -> None:
    async def story(http: httpx.AsyncClient) -> list[str]:
        async with http.stream("POST", CHAT, json=chat("slow", stream=True)) as answer:
            lines = []
            async for line in answer.aiter_lines():
                lines.append(line)
                on_its_way = any(
                    f"({step}" in line for step in ("starting", "importing", "loading")
                )
                if line.startswith(":") and on_its_way and "opened" not in lines:
                    lines.append("opened")
                    await asyncio.to_thread(tidegate.open_gate, "slow")
            return lines

    lines = run(tidegate, story)
    assert "opened" in lines
    assert "data: [DONE]" in lines
    comments = [line for line in lines if line.startswith(": tidegate: waiting for slow (")]
    steps = {line.partition("(")[2].partition(")")[0].partition(",")[0] for line in comments}
    known = {"at zero", "scheduled", "preparing", "starting", "importing", "loading", "warming"}
    assert steps <= known
