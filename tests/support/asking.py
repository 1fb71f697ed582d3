"""Requests to a running Tidegate, many at once, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import httpx
from tidegate_process import Tidegate

Result = TypeVar("Result")

TIMEOUT_S = 120.0
CHAT = "/v1/chat/completions"


def client(tidegate: Tidegate) -> httpx.AsyncClient:
    """A client with as many connections as it is asked for, and none of the environment's ways."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(
        base_url=tidegate.url, timeout=TIMEOUT_S, limits=limits, trust_env=False
    )


def chat(model: str, text: str = "hello", **fields: Any) -> dict[str, Any]:
    """The body of a chat request; four tokens of answer unless it says otherwise."""
    messages = [{"role": "user", "content": text}]
    return {"model": model, "messages": messages, "max_tokens": 4, **fields}


async def ask(
    http: httpx.AsyncClient, body: dict[str, Any], *, request_id: str = "", path: str = CHAT
) -> httpx.Response:
    """One request, answered whole."""
    headers = {"x-request-id": request_id} if request_id else {}
    return await http.post(path, json=body, headers=headers)


def run(tidegate: Tidegate, story: Callable[[httpx.AsyncClient], Awaitable[Result]]) -> Result:
    """Run a story with a client of this Tidegate."""

    async def tell() -> Result:
        async with client(tidegate) as http:
            return await story(http)

    return asyncio.run(tell())


def ask_now(tidegate: Tidegate, body: dict[str, Any], *, path: str = CHAT) -> httpx.Response:
    """One request, where nothing else is going on."""
    return run(tidegate, lambda http: ask(http, body, path=path))


def spawn(work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    """Begin something; it is awaited by the test."""
    return asyncio.ensure_future(work)


async def held(
    tidegate: Tidegate, http: httpx.AsyncClient, pool: str, count: int, **fields: Any
) -> list[asyncio.Task[httpx.Response]]:
    """Begin ``count`` requests for a pool, one after the other in line: each is held before the
    next is sent. Their ids are ``r0``, ``r1``, …"""
    tasks = []
    before = tidegate.pool(pool)["queued_requests"]
    for number in range(count):
        body = chat(pool, f"number {number}", **fields)
        tasks.append(spawn(ask(http, body, request_id=f"r{number}")))
        await asyncio.to_thread(tidegate.wait_held, pool, before + number + 1)
    return tasks


def look_while_it_answers(tidegate: Tidegate, pool: str) -> dict[str, Any]:
    """The ready replica of a pool, as ``/status`` shows it while it answers a request of ours.

    An idle engine may sleep or go at any moment; one that answers does not.
    """

    async def story(http: httpx.AsyncClient) -> dict[str, Any]:
        body = chat(pool, stream=True, max_tokens=4_000, ignore_eos=True)
        async with http.stream("POST", CHAT, json=body) as answer:
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    break
            replicas = (await asyncio.to_thread(tidegate.pool, pool))["replicas"]
        (replica,) = [one for one in replicas if one["state"] == "ready"]
        found: dict[str, Any] = replica
        return found

    return run(tidegate, story)


def wait_told(tidegate: Tidegate, pool: str) -> None:
    """Until the data path knows what ``/status`` has shown: it is told at the end of a tick, and
    ``/status`` may be ahead of that."""

    def ticks() -> tuple[float, int]:
        decisions = tidegate.admin(f"/pools/{pool}/explain")["decisions"]
        return decisions[-1]["first_at_s"], decisions[-1]["count"]

    before = ticks()
    tidegate.wait("another tick", lambda: ticks()[1] != before[1] or ticks()[0] > before[0] + 0.01)


def text_of(answer: httpx.Response) -> str:
    """What a whole chat answer says."""
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["choices"][0]["message"]["content"]
    return said


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """The error in an answer, which must have OpenAI's shape."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    return error
