"""The admin application and its server, over a control that only remembers what it was told."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from admin_rig import BEARER, TOKEN, ServedApp, gateway_status, past_decision, pool
from fake_cache import FakeCache, fake_models
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from autoscaler.types import NotKnown
from gateway.admin import schema
from gateway.admin.app import create_app
from gateway.admin.control import LiveControl
from gateway.admin.operations import METRICS_TYPE, OPERATIONS
from gateway.admin.server import serve_admin
from gateway.compose.listeners import listen, url

JSON = {"content-type": "application/json"}


class RecordingControl:
    """Two pools, one of them with a name that needs quoting."""

    pools = ("chat", "org/model 1.5")

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.is_ready = True
        self.failure: Exception | None = None

    def _check(self, pool: str) -> None:
        if self.failure is not None:
            raise self.failure
        if pool not in self.pools:
            raise NotKnown("pool", pool, self.pools)

    def status(self) -> schema.GatewayStatus:
        if self.failure is not None:
            raise self.failure
        return gateway_status(*(pool(name=name) for name in self.pools))

    def ready(self) -> tuple[bool, str]:
        return (True, "accepting") if self.is_ready else (False, "not every worker is listening")

    def metrics(self) -> bytes:
        return b"# HELP tidegate_up 1\n"

    def explain(self, pool: str) -> list[schema.PastDecisionEntry]:
        self._check(pool)
        return [past_decision(desired=number) for number in range(5)]

    async def scale(self, pool: str, replicas: int | None) -> schema.ScaleAnswer:
        self._check(pool)
        if replicas is not None and replicas > 4:
            raise ValueError("replicas must be 0 to 4")
        self.calls.append(("scale", pool, replicas))
        return schema.ScaleAnswer(pool=pool, override=replicas)

    async def sleep(self, pool: str, level: int) -> schema.SleepAnswer:
        self._check(pool)
        self.calls.append(("sleep", pool, level))
        return schema.SleepAnswer(pool=pool, sleeping=1, ready=0)

    async def wake(self, pool: str) -> schema.WakeAnswer:
        self._check(pool)
        self.calls.append(("wake", pool))
        return schema.WakeAnswer(pool=pool, starting=1, ready=0)

    async def set_disabled(self, pool: str, *, disabled: bool) -> schema.ServiceAnswer:
        self._check(pool)
        self.calls.append(("set_disabled", pool, disabled))
        return schema.ServiceAnswer(pool=pool, disabled=disabled)

    async def drain(self, replica_id: str) -> schema.DrainAnswer:
        self._check(replica_id)
        self.calls.append(("drain", replica_id))
        return schema.DrainAnswer(replica=replica_id)

    async def reload(self) -> schema.ReloadAnswer:
        if self.failure is not None:
            raise self.failure
        self.calls.append(("reload",))
        return schema.ReloadAnswer(
            added=("x",), changed=(), removed=(), applied=(), needs_restart=()
        )


def call(
    app: Starlette, method: str, path: str, base: str = "http://127.0.0.1:8001", **kwargs: Any
) -> httpx.Response:
    """A request over TCP, with the token."""
    kwargs["headers"] = {**BEARER, **kwargs.get("headers", {})}

    async def run() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base, trust_env=False) as client:
            return await client.request(method, path, **kwargs)

    return asyncio.run(run())


def check_error(answer: httpx.Response, status: int, reason: str) -> dict[str, Any]:
    assert answer.status_code == status
    assert answer.headers["x-tidegate-reason"] == reason
    body = answer.json()["error"]
    assert set(body) == {"message", "type", "param", "code", "status"}
    assert (body["code"], body["status"]) == (reason, status)
    assert body["message"]
    return body


@pytest.fixture
def control() -> RecordingControl:
    return RecordingControl()


@pytest.fixture
def app(control: RecordingControl) -> Starlette:
    return create_app(control, token=TOKEN)


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def test_metrics_are_prometheus_text(app: Starlette) -> None:
    answer = call(app, "GET", "/metrics")
    assert answer.headers["content-type"] == METRICS_TYPE
    assert answer.content == b"# HELP tidegate_up 1\n"


def test_what_the_model_cache_takes_follows_the_other_metrics(
    control: RecordingControl, tmp_path: Path
) -> None:
    cache = FakeCache(tmp_path)
    cache.preload("hf://org/name")
    answer = call(create_app(control, models=fake_models(cache)), "GET", "/metrics")
    assert answer.text.startswith(
        "# HELP tidegate_up 1\n# HELP tidegate_cache_look_failures_total "
    )
    assert 'tidegate_cache_bytes{kind="models"} 3e+06' in answer.text
    assert 'tidegate_cache_bytes{kind="prepared"} 0.0' in answer.text


def test_health_status_and_index(app: Starlette) -> None:
    assert call(app, "GET", "/healthz").json() == {"status": "alive"}
    assert call(app, "HEAD", "/healthz").status_code == 200
    assert [pool["name"] for pool in call(app, "GET", "/status").json()["pools"]] == [
        "chat",
        "org/model 1.5",
    ]
    endpoints = call(app, "GET", "/").json()["endpoints"]
    assert all(endpoints.values())


def test_ready_and_not_ready(app: Starlette, control: RecordingControl) -> None:
    answer = call(app, "GET", "/readyz")
    assert (answer.status_code, answer.json()) == (200, {"ready": True, "reason": "accepting"})
    control.is_ready = False
    answer = call(app, "GET", "/readyz")
    check_error(answer, 503, "not_ready")
    assert answer.json()["error"]["message"] == "not every worker is listening"
    assert call(app, "GET", "/healthz").status_code == 200


@pytest.mark.parametrize(
    ("listening", "draining", "known", "ready", "says"),
    [
        (True, False, True, True, "accepting"),
        (True, False, False, False, "not read from the cluster"),
        (False, False, True, False, "not every worker"),
        (False, True, True, False, "Tidegate is stopping"),
    ],
)
def test_readiness_says_why_not(
    listening: bool, draining: bool, known: bool, ready: bool, says: str
) -> None:
    unused: Any = SimpleNamespace()
    workers: Any = SimpleNamespace(all_listening=listening, is_draining=lambda: draining)
    control = LiveControl(
        loop=unused, workers=workers, version="1", url="", admin_url="", clock=lambda: 0.0,
        observe=unused, pool_slots=unused, replica_slots=unused, recent=unused, traffic=unused,
        forks=unused, reload=unused, pools_known=lambda: known,
    )  # fmt: skip
    found, reason = control.ready()
    assert found is ready
    assert says in reason


@pytest.mark.parametrize("pool", ["chat", "org%2Fmodel%201.5", "org/model%201.5"])
def test_explain(app: Starlette, pool: str) -> None:
    found = call(app, "GET", f"/pools/{pool}/explain").json()
    assert found["pool"] in RecordingControl.pools
    assert [one["desired"] for one in found["decisions"]] == [0, 1, 2, 3, 4]
    newest = call(app, "GET", f"/pools/{pool}/explain?limit=2").json()["decisions"]
    assert [one["desired"] for one in newest] == [3, 4]
    assert found["current"]["name"] == found["pool"]


@pytest.mark.parametrize("limit", ["-1", "0", "x", "1e3", "99999999999", "²"])
def test_a_wrong_limit(app: Starlette, limit: str) -> None:
    check_error(call(app, "GET", "/pools/chat/explain", params={"limit": limit}), 400, "bad_value")


def test_an_unknown_parameter_is_refused_and_named(app: Starlette) -> None:
    answer = call(app, "GET", "/pools/chat/explain", params={"limit": 2, "limits": 2})
    check_error(answer, 400, "unknown_field")
    assert answer.json()["error"]["param"] == "limits"


# ── Changing ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("path", "body", "expected"),
    [
        ("/pools/chat/scale", {"replicas": 2}, ("scale", "chat", 2)),
        ("/pools/chat/scale", {"replicas": 0}, ("scale", "chat", 0)),
        ("/pools/chat/scale", {"replicas": None}, ("scale", "chat", None)),
        ("/pools/org%2Fmodel%201.5/scale", {"replicas": 1}, ("scale", "org/model 1.5", 1)),
        ("/pools/chat/sleep", {"level": 2}, ("sleep", "chat", 2)),
        ("/pools/chat/sleep", {}, ("sleep", "chat", 1)),
        ("/pools/chat/wake", {}, ("wake", "chat")),
        ("/pools/chat/disable", {}, ("set_disabled", "chat", True)),
        ("/pools/chat/enable", {}, ("set_disabled", "chat", False)),
        ("/replicas/chat/drain", {}, ("drain", "chat")),
    ],
)
def test_a_change(
    app: Starlette, control: RecordingControl, path: str, body: dict, expected: tuple
) -> None:
    assert call(app, "POST", path, json=body).status_code == 200
    assert control.calls == [expected]


def test_nothing_is_as_good_as_an_empty_object(app: Starlette, control: RecordingControl) -> None:
    assert call(app, "POST", "/pools/chat/wake", headers=JSON).status_code == 200
    assert control.calls == [("wake", "chat")]


@pytest.mark.parametrize(
    ("path", "content", "status", "reason"),
    [
        ("/pools/chat/scale", b"{}", 400, "bad_value"),
        ("/pools/chat/scale", b'{"replicas": -1}', 400, "bad_value"),
        ("/pools/chat/scale", b'{"replicas": true}', 400, "bad_value"),
        ("/pools/chat/scale", b'{"replicas": "2"}', 400, "bad_value"),
        ("/pools/chat/scale", b'{"replicas": 1.0}', 400, "bad_value"),
        ("/pools/chat/scale", b'{"replicas": 9}', 400, "bad_value"),
        ("/pools/chat/scale", b'{"replica": 1}', 400, "unknown_field"),
        ("/pools/chat/scale", b"[1]", 400, "bad_json"),
        ("/pools/chat/scale", b"{", 400, "bad_json"),
        ("/pools/chat/scale", b"[" * 60_000, 400, "bad_json"),
        ("/pools/chat/scale", b"\xff\xfe", 400, "bad_json"),
        ("/pools/chat/scale", b" " * 70_000, 413, "body_too_large"),
        ("/pools/chat/sleep", b'{"level": 3}', 400, "bad_value"),
        ("/pools/chat/sleep", b'{"level": true}', 400, "bad_value"),
        ("/pools/none/scale", b'{"replicas": 1}', 404, "pool_not_found"),
        ("/pools/none/sleep", b"{}", 404, "pool_not_found"),
        ("/pools/none/wake", b"{}", 404, "pool_not_found"),
        ("/pools/none/disable", b"{}", 404, "pool_not_found"),
        ("/pools/chat/enable", b'{"x": 1}', 400, "unknown_field"),
        ("/replicas/none/drain", b"{}", 404, "replica_not_found"),
    ],
)
def test_a_change_that_is_refused(
    app: Starlette, control: RecordingControl, path: str, content: bytes, status: int, reason: str
) -> None:
    check_error(call(app, "POST", path, content=content, headers=JSON), status, reason)
    assert control.calls == []


def test_the_message_of_a_bad_value_is_shown(app: Starlette) -> None:
    body = check_error(
        call(app, "POST", "/pools/chat/scale", json={"replicas": 9}), 400, "bad_value"
    )
    assert (body["message"], body["param"]) == ("replicas must be 0 to 4", "replicas")


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/pools/chat/sleep", "pool"),
        ("/pools/chat/wake", "pool"),
        ("/replicas/chat/drain", "replica"),
    ],
)
def test_what_cannot_be_done_now_names_what_it_is_about(
    app: Starlette, control: RecordingControl, path: str, param: str
) -> None:
    control.failure = ValueError("chat has failed; there is nothing to drain")
    body = check_error(call(app, "POST", path, headers=JSON), 400, "bad_value")
    assert body["param"] == param
    operation = next(one for one in OPERATIONS if one.name == path.rpartition("/")[2])
    assert "bad_value" in operation.errors


def test_a_body_that_never_ends_is_given_up(control: RecordingControl) -> None:
    app = create_app(control, token=TOKEN, body_timeout_s=0.05)

    async def slowly() -> AsyncIterator[bytes]:
        yield b"{"
        await asyncio.sleep(30)

    answer = call(app, "POST", "/pools/chat/wake", content=slowly(), headers=JSON)
    check_error(answer, 408, "body_timeout")


def test_a_body_of_unknown_length_is_limited_too(app: Starlette) -> None:
    async def much() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 4096

    answer = call(app, "POST", "/pools/chat/wake", content=much(), headers=JSON)
    check_error(answer, 413, "body_too_large")


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("method", "path", "status", "reason"),
    [
        ("GET", "/nothing", 404, "route_not_found"),
        ("GET", "/pools/none/explain", 404, "pool_not_found"),
        ("GET", "/pools/chat/scale", 405, "method_not_allowed"),
        ("DELETE", "/status", 405, "method_not_allowed"),
        ("OPTIONS", "/status", 405, "method_not_allowed"),
    ],
)
def test_errors_have_openais_shape(
    app: Starlette, method: str, path: str, status: int, reason: str
) -> None:
    answer = call(app, method, path, headers=JSON)
    check_error(answer, status, reason)
    assert ("allow" in answer.headers) is (status == 405)


@pytest.mark.parametrize(
    ("failure", "status", "reason"),
    [
        (TimeoutError(), 504, "timeout"),
        (RuntimeError("a secret path /x/y"), 500, "internal_error"),
    ],
)
def test_a_failing_control(
    app: Starlette,
    control: RecordingControl,
    failure: Exception,
    status: int,
    reason: str,
) -> None:
    control.failure = failure
    answer = call(app, "POST", "/pools/chat/wake", headers=JSON)
    check_error(answer, status, reason)
    assert "secret" not in answer.text
    if status == 500:
        check_error(call(app, "GET", "/status"), 500, "internal_error")


# ── What a web page could try ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("host", "bound", "allowed", "let_in"),
    [
        ("127.0.0.1:8001", "127.0.0.1", (), True),
        ("localhost:8001", "127.0.0.1", (), True),
        ("LocalHost", "127.0.0.1", (), True),
        ("[::1]:8001", "::1", (), True),
        ("10.1.2.3:8001", "127.0.0.1", (), True),
        ("evil.example:8001", "127.0.0.1", (), False),
        ("127.0.0.1.evil.example", "127.0.0.1", (), False),
        ("localhost.evil.example", "127.0.0.1", (), False),
        ("", "127.0.0.1", (), False),
        ("tide.lan:8001", "127.0.0.1", ("tide.lan",), True),
        ("other.lan", "127.0.0.1", ("tide.lan",), False),
        ("any.name", "127.0.0.1", ("*",), True),
        ("any.name", "0.0.0.0", (), False),
        ("any.name", "10.1.2.3", (), False),
        ("10.1.2.3", "0.0.0.0", (), True),
        ("[::1]evil", "::1", (), False),
        ("127.0.0.1:80@evil.example", "127.0.0.1", (), False),
        ("2130706433", "127.0.0.1", (), False),
        ("any.name", "0.0.0.0", ("tide.lan",), False),
        ("admin.lan", "admin.lan", (), True),
    ],
)
def test_which_hosts_are_answered(
    control: RecordingControl, host: str, bound: str, allowed: tuple[str, ...], let_in: bool
) -> None:
    app = create_app(control, host=bound, allowed_hosts=allowed, token=TOKEN)
    answer = call(app, "GET", "/status", headers={"host": host})
    if let_in:
        assert answer.status_code == 200
    else:
        check_error(answer, 421, "host_not_allowed")


@pytest.mark.parametrize(
    ("headers", "status", "reason"),
    [
        ({}, 415, "content_type"),
        ({"content-type": "text/plain"}, 415, "content_type"),
        ({"content-type": "application/x-www-form-urlencoded"}, 415, "content_type"),
        ({"content-type": "text/plain; application/json"}, 415, "content_type"),
        ({**JSON, "origin": "http://evil.example"}, 403, "cross_site"),
        ({**JSON, "origin": "null"}, 403, "cross_site"),
        ({**JSON, "origin": "http://127.0.0.1:3000"}, 403, "cross_site"),
        ({**JSON, "sec-fetch-site": "cross-site"}, 403, "cross_site"),
        ({**JSON, "sec-fetch-site": "same-site"}, 403, "cross_site"),
    ],
)
def test_a_page_changes_nothing(
    app: Starlette, control: RecordingControl, headers: dict, status: int, reason: str
) -> None:
    answer = call(app, "POST", "/pools/chat/scale", content=b'{"replicas": 0}', headers=headers)
    check_error(answer, status, reason)
    assert control.calls == []
    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "Application/JSON; charset=utf-8"},
        {**JSON, "origin": "http://127.0.0.1:8001"},
        {**JSON, "sec-fetch-site": "same-origin"},
        {**JSON, "sec-fetch-site": "none"},
    ],
)
def test_what_is_no_page_of_others_is_let_in(app: Starlette, headers: dict) -> None:
    answer = call(app, "POST", "/pools/chat/scale", content=b'{"replicas": 0}', headers=headers)
    assert answer.status_code == 200


def test_a_preflight_is_granted_nothing(app: Starlette) -> None:
    answer = call(
        app,
        "OPTIONS",
        "/pools/chat/scale",
        headers={"origin": "http://evil.example", "access-control-request-method": "POST"},
    )
    assert answer.status_code == 403
    assert not [name for name in answer.headers if name.startswith("access-control")]


# ── The server ────────────────────────────────────────────────────────────────────────────────────


def test_the_server_serves_and_stops(app: Starlette) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    with ServedApp(app) as served:
        answer = served.http.get("/status")
        after = [signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)]
    assert answer.status_code == 200
    assert "server" not in answer.headers
    assert after == before, "the control process owns the signals"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{served.url}/healthz", trust_env=False, verify=False)


def test_stopping_does_not_wait_for_ever_for_a_slow_answer() -> None:
    begun = asyncio.Event()

    async def slow(request: Request) -> Response:
        begun.set()
        await asyncio.sleep(60)
        return Response()

    async def run() -> float:
        loop = asyncio.get_running_loop()
        stop = asyncio.Event()
        (listener,) = listen("127.0.0.1", 0, field="gateway.admin_port")
        base = url(listener)
        serving = asyncio.create_task(
            serve_admin([listener], Starlette(routes=[Route("/", slow)]), stop, shutdown_s=1)
        )
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            asking = asyncio.create_task(client.get(base, timeout=30))
            await asyncio.wait_for(begun.wait(), 30)
            began = loop.time()
            stop.set()
            await asyncio.wait_for(serving, 50)
            took = loop.time() - began
            await asyncio.gather(asking, return_exceptions=True)
        return took

    assert asyncio.run(run()) < 30, "it would take 60 s"
