"""The real vLLM, forked: right answers, soon; and nothing lost or left when the fork server dies.

The tests share one Tidegate and run in order. vLLM is imported three times in all: by the fork
server, by the one that replaces it, and by the one engine that must be started the plain way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from asking import ask, chat, client, run
from tidegate_process import Tidegate, up

START_S = 300.0
QUESTION = "What is the capital of France?"

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(START_S + 120)]


@pytest.fixture(scope="module")
def tidegate(
    engine_python: Path, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Tidegate]:
    pool = {
        "engine": "vllm",
        "model": model_dir,
        "max_model_len_tokens": 1024,
        "max_replicas": 2,
        "idle_to_zero_s": 3600,
    }
    other = {"name": "other", "env": {"TORCH_SHOW_CPP_STACKTRACES": "0"}}
    with up(
        tmp_path_factory.mktemp("forked"),
        pools=[
            {**pool, "name": "small"},
            {**pool, **other},
            {**pool, "name": "fetched", "model": f"file://{model_dir}"},
        ],
        loaders={"engine_python": engine_python, "cpu_bind": "nobind"},
        autoscaler={"scale_down_delay_s": 0, "backoff_initial_s": 0.1},
    ) as running:
        running.expected_log.append(r"the fork server is waiting \(it ended with status -9\)")
        yield running


def wait_forks(tidegate: Tidegate, *, other_than: int = 0) -> int:
    """Until a fork server has imported vLLM; its pid. A start does not wait for that for ever."""

    def ready() -> int:
        shown = tidegate.admin("/status")["fork_server"]
        is_it = shown["state"] == "ready" and shown["pid"] != other_than
        return int(shown["pid"]) if is_it else 0

    return tidegate.wait("a fork server", ready, START_S)


def answer(tidegate: Tidegate, pool: str) -> str:
    """What a pool answers, chosen greedily."""

    async def story(http: httpx.AsyncClient) -> httpx.Response:
        http.timeout = httpx.Timeout(START_S)
        return await ask(http, {**chat(pool, QUESTION), "max_tokens": 24, "temperature": 0})

    told = run(tidegate, story)
    assert told.status_code == 200, told.text
    text: str = told.json()["choices"][0]["message"]["content"]
    return text


def scale(tidegate: Tidegate, pool: str, replicas: int) -> list[dict[str, Any]]:
    """Have so many replicas, all ready; returns them."""
    tidegate.admin(f"/pools/{pool}/scale", {"replicas": replicas})

    def ready() -> list[dict[str, Any]]:
        found = tidegate.pool(pool)["replicas"]
        well = [one for one in found if one["state"] == "ready"]
        return well if len(well) == len(found) == replicas else []

    if not replicas:
        tidegate.wait(f"no {pool}", lambda: not tidegate.pool(pool)["replicas"], START_S)
        return []
    return tidegate.wait(f"{replicas} of {pool}", ready, START_S)


def is_forked(pid: int) -> bool:
    """Whether an engine shares its command line with the fork server."""
    return "forkserver" in " ".join(psutil.Process(pid).cmdline())


def test_two_engines_forked_at_once_answer(tidegate: Tidegate) -> None:
    wait_forks(tidegate)
    replicas = scale(tidegate, "small", 2)
    assert all(is_forked(one["pid"]) for one in replicas)
    guards = [psutil.Process(one["pid"]).parent() for one in replicas]
    assert len({guard.pid for guard in guards if guard is not None}) == 2
    assert all(guard is not None and guard.ppid() == tidegate.pid for guard in guards)
    environs = [Path(f"/proc/{one['pid']}/environ").read_bytes() for one in replicas]
    marks = {part for one in environs for part in one.split(b"\0") if b"REPLICA_MARK=" in part}
    assert len(marks) == 2

    async def story() -> list[str]:
        async with client(tidegate) as http:
            body = {**chat("small", QUESTION), "temperature": 0, "max_tokens": 24}
            told = await asyncio.gather(*(ask(http, body) for _ in range(8)))
        return [one.json()["choices"][0]["message"]["content"] for one in told]

    assert all("Paris" in text for text in asyncio.run(story()))
    scale(tidegate, "small", 1)


def test_a_model_that_is_fetched_first_is_forked_too(tidegate: Tidegate) -> None:
    assert tidegate.pool("fetched")["tier"] == "remote"
    text = answer(tidegate, "fetched")
    (replica,) = tidegate.pool("fetched")["replicas"]
    assert replica["woken_from"] == "remote"
    assert is_forked(replica["pid"])
    assert "Paris" in text
    scale(tidegate, "fetched", 0)


def test_one_that_cannot_be_forked_is_started_plainly_and_says_the_same(
    tidegate: Tidegate,
) -> None:
    text = answer(tidegate, "other")
    (replica,) = tidegate.pool("other")["replicas"]
    assert not is_forked(replica["pid"])
    assert "its environment differs in TORCH_SHOW_CPP_STACKTRACES" in tidegate.log()
    assert text == answer(tidegate, "small")
    assert "Paris" in text
    scale(tidegate, "other", 0)


def test_engines_outlive_the_fork_server_and_the_next_one_forks_again(tidegate: Tidegate) -> None:
    (before,) = scale(tidegate, "small", 1)
    killed = wait_forks(tidegate)
    os.kill(killed, signal.SIGKILL)
    assert "Paris" in answer(tidegate, "small")
    wait_forks(tidegate, other_than=killed)
    after = {one["pid"] for one in scale(tidegate, "small", 2)}
    assert before["pid"] in after
    assert all(is_forked(pid) for pid in after)
    assert "Paris" in answer(tidegate, "small")


def test_nothing_is_left_after_kill_9_of_tidegate(tidegate: Tidegate) -> None:
    assert len(tidegate.survivors()) > 6
    tidegate.process.kill()
    tidegate.process.wait()
    deadline_s = time.monotonic() + 90.0
    while left := tidegate.survivors():
        assert time.monotonic() < deadline_s, f"they run still: {left}"
        time.sleep(0.1)
