"""The calls to engines, against all that servers answer: health, models, sleep and wake."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from loaders.engines.base import (
    EngineHealth,
    ServedModel,
    choose_model,
    engine_of,
)
from loaders.engines.client import MAX_ANSWER_BYTES, EngineClient, EngineError, EngineUnsupported
from loaders.engines.openai_compatible import read_models

ANY = engine_of(None)
URL = "http://server:8000"
Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> EngineClient:
    return EngineClient(timeout_s=1.0, transport=httpx.MockTransport(handler))


def check(handler: Handler) -> EngineHealth:
    return asyncio.run(ANY.health(client(handler), URL, {}, "/health"))


def routes(**statuses: int) -> Handler:
    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(statuses.get(request.url.path.strip("/").replace("/", "_"), 404))

    return answer


@pytest.mark.parametrize(
    ("handler", "ready", "said"),
    [
        (routes(health=200), True, ""),
        (routes(health=204), True, ""),
        (routes(health=503), False, "GET /health was answered 503"),
        (routes(v1_models=200), True, ""),
        (routes(health=405, v1_models=200), True, ""),
        (routes(), False, "GET /v1/models was answered 404"),
        (routes(v1_models=401), False, "is the API key right?"),
        (routes(health=500, v1_models=200), False, "500"),
        (routes(health=302), False, "302"),
    ],
)
def test_health(handler: Handler, ready: bool, said: str) -> None:
    health = check(handler)
    assert health.ready is ready
    assert said in health.detail


@pytest.mark.parametrize(
    ("error", "ready", "said"),
    [
        (httpx.ConnectError("refused"), False, "GET /health failed: refused"),
        (httpx.ReadTimeout("slow"), False, "no answer to GET /health in 1 s"),
        (httpx.RemoteProtocolError("nonsense"), False, "nonsense"),
        (httpx.ReadError(""), False, "ReadError"),
        (httpx.PoolTimeout("full"), None, "too many"),
    ],
)
def test_health_of_what_does_not_answer(error: Exception, ready: bool | None, said: str) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    health = check(fail)
    assert health.ready is ready
    assert said in health.detail


@pytest.mark.parametrize(
    ("answer", "models"),
    [
        (
            {"data": [{"id": "a", "max_model_len": 10}]},
            (ServedModel(name="a", max_model_len_tokens=10),),
        ),
        ({"data": [{"id": "a"}, {"id": "b"}]}, (ServedModel(name="a"), ServedModel(name="b"))),
        ({"data": [{"id": "a", "max_model_len": True}]}, (ServedModel(name="a"),)),
        ({"data": [{"id": "a", "max_model_len": 0}]}, (ServedModel(name="a"),)),
        ({"data": [{"id": 7}, "x", None]}, ()),
        ({"data": None}, None),
        ({"error": "no"}, None),
        ([], None),
        ("text", None),
        (None, None),
    ],
)
def test_model_lists_of_all_shapes(answer: object, models: object) -> None:
    assert read_models(answer) == models

    def tell(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=answer)

    assert asyncio.run(ANY.list_models(client(tell), URL, {})) == models


@pytest.mark.parametrize(
    "answer", [httpx.Response(200, text="<html>"), httpx.Response(500, json={"data": []})]
)
def test_model_list_that_cannot_be_read_is_unknown(answer: httpx.Response) -> None:
    assert asyncio.run(ANY.list_models(client(lambda request: answer), URL, {})) is None


def test_a_model_list_without_end_is_not_read_without_end() -> None:
    sent = 0

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self):  # type: ignore[no-untyped-def]
            nonlocal sent
            while True:
                sent += 65_536
                yield b"[" * 65_536

    def tell(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, stream=Endless())

    assert asyncio.run(ANY.list_models(client(tell), URL, {})) is None
    assert sent <= 2 * MAX_ANSWER_BYTES


def test_which_model_is_taken() -> None:
    models = (ServedModel(name="a"), ServedModel(name="b"))
    assert choose_model(models, None, "b") == ServedModel(name="b")
    assert choose_model(models, "x", "y") == ServedModel(name="a")
    assert choose_model((), "x") is None
    assert choose_model(None, "x") is None


def called(engine: str, level: int, status: int = 200) -> list[tuple[str, Any]]:
    """Everything that an engine is asked from its falling asleep to its waking."""
    asked: list[tuple[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        path = request.url.raw_path.decode()
        asked.append((path, json.loads(request.content) if request.content else None))
        return httpx.Response(status, text="so it is")

    async def story() -> None:
        asking = client(answer)
        await engine_of(engine).sleep(asking, URL, level, timeout_s=1.0)
        await engine_of(engine).wake(asking, URL, level, timeout_s=1.0)

    asyncio.run(story())
    return asked


def test_from_level_1_it_just_wakes() -> None:
    assert called("vllm", 1) == [("/sleep?level=1", None), ("/wake_up", None)]


def test_from_level_2_its_weights_are_read_again_before_it_answers() -> None:
    """Waking alone leaves whatever lies in the memory the weights had."""
    assert called("vllm", 2) == [
        ("/sleep?level=2", None),
        ("/wake_up?tags=weights", None),
        ("/collective_rpc", {"method": "reload_weights"}),
        ("/wake_up?tags=kv_cache", None),
        ("/reset_prefix_cache", None),
    ]


def test_the_simulated_engine_has_no_weights_to_read() -> None:
    assert called("simulated", 2) == [("/sleep?level=2", None), ("/wake_up", None)]


@pytest.mark.parametrize(("status", "unsupported"), [(404, True), (405, True), (500, False)])
def test_a_call_that_is_refused(status: int, unsupported: bool) -> None:
    with pytest.raises(EngineError, match=f"/sleep.*{status}") as raised:
        called("vllm", 1, status)
    assert isinstance(raised.value, EngineUnsupported) is unsupported


@pytest.mark.parametrize("error", [httpx.ReadTimeout("slow"), httpx.ConnectError("refused")])
def test_a_call_that_fails(error: Exception) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    waking = engine_of("vllm").wake(client(fail), URL, 1, timeout_s=1.0)
    with pytest.raises(EngineError, match="POST /wake_up"):
        asyncio.run(waking)
