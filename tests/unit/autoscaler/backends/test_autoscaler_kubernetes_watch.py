"""A list that is kept up to date, whatever the API server answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from autoscaler.backends.kubernetes.client import KubernetesError, resource
from autoscaler.backends.kubernetes.watch import Watch


class Answers:
    """An API server that gives these answers to lists, one after the other; a watch of the last
    goes on for ever."""

    def __init__(self, *answers: Exception | list[str]) -> None:
        self.answers = list(answers)

    async def read_all(
        self, kind: Any, namespace: str | None, labels: Mapping[str, str] | None = None
    ) -> tuple[list[dict[str, Any]], str]:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return [{"metadata": {"namespace": "a", "name": name}} for name in answer], "1"

    async def watch(self, *given: Any, **more: Any) -> AsyncIterator[tuple[str, Any]]:
        await asyncio.Event().wait()
        yield "", {}


def test_an_error_of_any_kind_does_not_end_it() -> None:
    async def at_once(seconds: float) -> None:
        await asyncio.sleep(0)

    async def story() -> None:
        failures = (KubernetesError("away"), ValueError("not JSON"), KubernetesError("gone", 410))
        server: Any = Answers(*failures, ["x"])
        watch = Watch(server, resource("v1", "Pod"), "a", sleep=at_once)
        task = asyncio.create_task(watch.run())
        try:
            async with asyncio.timeout(30):
                await watch.wait_read()
        finally:
            task.cancel()
        assert list(watch.objects) == [("a", "x")]
        assert watch.error is None

    asyncio.run(story())
