"""Health checks and model lists against all that servers answer; the static backend on top."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import pytest

from autoscaler.backends.base import BackendError, ReplicaSpec, Unsupported
from autoscaler.backends.health import (
    MAX_ANSWER_BYTES,
    HealthClient,
    ServedModel,
    choose_model,
    read_models,
)
from autoscaler.backends.static import StaticBackend
from autoscaler.settings import AutoscalerSettings, PoolSettings

URL = "http://server:8000"
Handler = Callable[[httpx.Request], httpx.Response]


def client(handler: Handler) -> HealthClient:
    return HealthClient(timeout_s=1.0, transport=httpx.MockTransport(handler))


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
    health = asyncio.run(client(handler).check(URL, "/health", {}))
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

    health = asyncio.run(client(fail).check(URL, "/health", {}))
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

    assert asyncio.run(client(tell).list_models(URL, {})) == models


@pytest.mark.parametrize(
    "answer", [httpx.Response(200, text="<html>"), httpx.Response(500, json={"data": []})]
)
def test_model_list_that_cannot_be_read_is_unknown(answer: httpx.Response) -> None:
    assert asyncio.run(client(lambda request: answer).list_models(URL, {})) is None


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

    assert asyncio.run(client(tell).list_models(URL, {})) is None
    assert sent <= 2 * MAX_ANSWER_BYTES


def test_which_model_is_taken() -> None:
    models = (ServedModel(name="a"), ServedModel(name="b"))
    assert choose_model(models, None, "b") == ServedModel(name="b")
    assert choose_model(models, "x", "y") == ServedModel(name="a")
    assert choose_model((), "x") is None
    assert choose_model(None, "x") is None


@pytest.mark.parametrize(
    ("status", "error"), [(200, None), (404, Unsupported), (405, Unsupported), (500, BackendError)]
)
def test_post(status: int, error: type[Exception] | None) -> None:
    posting = client(lambda request: httpx.Response(status, text="so it is"))

    async def post() -> None:
        await posting.post(f"{URL}/sleep?level=1", {}, timeout_s=1.0)

    if error is None:
        asyncio.run(post())
        return
    with pytest.raises(error, match=f"/sleep.*{status}") as raised:
        asyncio.run(post())
    assert isinstance(raised.value, Unsupported) is (error is Unsupported)


@pytest.mark.parametrize("error", [httpx.ReadTimeout("slow"), httpx.ConnectError("refused")])
def test_post_that_fails(error: Exception) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    with pytest.raises(BackendError, match="POST /wake_up"):
        asyncio.run(client(fail).post(f"{URL}/wake_up", {}, timeout_s=1.0))


def static(pool: dict[str, object], handler: Handler, **environ: str) -> StaticBackend:
    settings = AutoscalerSettings()
    return StaticBackend(settings=settings, environ=environ, client=client(handler))


def make_pool(**fields: object) -> PoolSettings:
    return PoolSettings.model_validate({"name": "m", "backend": "static", "urls": (URL,), **fields})


def test_static_sends_its_headers_and_key_and_publishes_them() -> None:
    asked: list[httpx.Headers] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request.headers)
        return httpx.Response(200, json={"data": [{"id": "org/real", "max_model_len": 9}]})

    async def story() -> None:
        backend = static({}, answer, KEY=" secret ")
        pool = make_pool(api_key_env="KEY", headers={"X-Team": "blue"})
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
    backend = static({}, routes(health=200))
    spec = ReplicaSpec(id="r", pool=make_pool(api_key_env="KEY"), url=URL)
    with pytest.raises(BackendError, match="KEY"):
        asyncio.run(backend.start(spec))


def test_static_server_that_came_back_is_asked_for_its_model_again() -> None:
    state = {"status": 200, "model": "a"}

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(state["status"], json={"data": [{"id": state["model"]}]})

    async def story() -> None:
        backend = static({}, answer)
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
        backend = static({}, answer)
        pool = make_pool(model="mine", max_model_len_tokens=5)
        await backend.start(ReplicaSpec(id="r", pool=pool, url=URL))
        probe = await backend.probe("r")
        assert (probe.served_model, probe.max_model_len_tokens) == ("mine", 5)

    asyncio.run(story())
