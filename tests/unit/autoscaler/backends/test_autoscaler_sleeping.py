"""The calls that put an engine to sleep and wake it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest

from autoscaler.backends.base import Unsupported
from autoscaler.backends.health import HealthClient
from autoscaler.backends.process import sleeping
from autoscaler.backends.process.replica import ReplicaProcess


def child(engine: str) -> ReplicaProcess:
    """As much of a child as is looked at."""
    pool = SimpleNamespace(engine=engine, name="m")
    spec = SimpleNamespace(pool=pool)
    found = SimpleNamespace(spec=spec, url="http://127.0.0.1:1", sleep_level=0, log=Path())
    return cast(ReplicaProcess, found)


def story(engine: str, level: int, status: int = 200) -> list[tuple[str, Any]]:
    """Everything that an engine is asked from its falling asleep to its waking."""
    asked: list[tuple[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        asked.append((path, json.loads(request.content) if request.content else None))
        return httpx.Response(status)

    async def run() -> None:
        client = HealthClient(timeout_s=1.0, transport=httpx.MockTransport(answer))
        one = child(engine)
        await sleeping.put_to_sleep(client, one, level, 1.0)
        await sleeping.wake(client, one, 1.0)
        assert one.sleep_level == 0

    asyncio.run(run())
    return asked


def test_from_level_1_it_just_wakes() -> None:
    assert story("vllm", 1) == [("/sleep?level=1", None), ("/wake_up", None)]


def test_from_level_2_its_weights_are_read_again_before_it_answers() -> None:
    """Waking alone leaves whatever lies in the memory the weights had."""
    assert story("vllm", 2) == [
        ("/sleep?level=2", None),
        ("/wake_up?tags=weights", None),
        ("/collective_rpc", {"method": "reload_weights"}),
        ("/wake_up?tags=kv_cache", None),
        ("/reset_prefix_cache", None),
    ]


def test_the_simulated_engine_has_no_weights_to_read() -> None:
    assert story("simulated", 2) == [("/sleep?level=2", None), ("/wake_up", None)]


def test_an_engine_without_sleep_says_so() -> None:
    with pytest.raises(Unsupported):
        story("vllm", 1, status=404)
