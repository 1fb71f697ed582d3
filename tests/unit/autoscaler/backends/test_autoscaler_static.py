"""The static backend: servers that are watched, with their own headers, keys and models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import httpx
import pytest

from autoscaler.backends.base import BackendError, ReplicaSpec
from autoscaler.backends.static import StaticBackend
from autoscaler.settings import AutoscalerSettings, PoolSettings
from loaders.engines.client import EngineClient

URL = "http://server:8000"
Handler = Callable[[httpx.Request], httpx.Response]


def static(handler: Handler, **environ: str) -> StaticBackend:
    client = EngineClient(timeout_s=1.0, transport=httpx.MockTransport(handler))
    return StaticBackend(settings=AutoscalerSettings(), environ=environ, client=client)


def make_pool(static: Mapping[str, object] | None = None, **fields: object) -> PoolSettings:
    return PoolSettings.model_validate(
        {"name": "m", "backend": "static", "static": {"urls": (URL,), **(static or {})}, **fields}
    )


def test_static_sends_its_headers_and_key_and_publishes_them() -> None:
    asked: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers)
        return httpx.Response(200, json={"data": [{"id": "org/real", "max_model_len": 9}]})

    async def story() -> None:
        backend = static(answer, KEY=" secret ")
        pool = make_pool({"api_key_env": "KEY", "headers": {"X-Team": "blue"}})
        await backend.start(ReplicaSpec(id="r", pool=pool, url=URL))
        probe = await backend.probe("r")
        assert (probe.served_model, probe.max_model_len_tokens) == ("org/real", 9)
        assert probe.headers == (("X-Team", "blue"), ("Authorization", "Bearer secret"))
        assert len(asked) == 2
        assert all(one["authorization"] == "Bearer secret" for one in asked)
        assert all(one["x-team"] == "blue" for one in asked)
        await backend.probe("r")
        assert len(asked) == 3  # The list of models is asked for once, until it fails.

    asyncio.run(story())


def test_static_without_its_key_says_so() -> None:
    backend = static(lambda request: httpx.Response(200))
    spec = ReplicaSpec(id="r", pool=make_pool({"api_key_env": "KEY"}), url=URL)
    with pytest.raises(BackendError, match="KEY"):
        asyncio.run(backend.start(spec))


def test_static_server_that_came_back_is_asked_for_its_model_again() -> None:
    state = {"status": 200, "model": "a"}

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(state["status"], json={"data": [{"id": state["model"]}]})

    async def story() -> None:
        backend = static(answer)
        await backend.start(ReplicaSpec(id="r", pool=make_pool(), url=URL))
        assert (await backend.probe("r")).served_model == "a"
        state.update(status=503, model="b")
        assert (await backend.probe("r")).ready is False
        state.update(status=200)
        assert (await backend.probe("r")).served_model == "b"

    asyncio.run(story())


def test_static_pools_own_values_win() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json={"data": [{"id": "a", "max_model_len": 9}]})

    async def story() -> None:
        backend = static(answer)
        pool = make_pool(model="mine", max_model_len_tokens=5)
        await backend.start(ReplicaSpec(id="r", pool=pool, url=URL))
        probe = await backend.probe("r")
        assert (probe.served_model, probe.max_model_len_tokens) == ("mine", 5)

    asyncio.run(story())
