"""A real admin listener in a thread, and answers of the admin API to show or to serve."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import httpx
from starlette.types import ASGIApp

from gateway.admin import schema
from gateway.admin.app import create_app
from gateway.admin.models import Models
from gateway.admin.server import serve_admin
from gateway.compose.listeners import RECORD_NAME, SOCKET_NAMES, admin_listeners, listen, url

NOW_S = 1_800_000_000.0
TOKEN = "the-token-of-the-tests"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def decision(**given: Any) -> schema.DecisionEntry:
    base = {
        "at_s": NOW_S - 12.0, "desired": 1, "supply": 1, "reason": "wake", "signal": "held",
        "detail": "3 requests are held", "bound": None, "panicking": False,
    }  # fmt: skip
    return schema.DecisionEntry(**{**base, **given})


def past_decision(**given: Any) -> schema.PastDecisionEntry:
    base = decision().model_dump()
    at = {"count": 1, "first_at_s": NOW_S - 12.0, "last_at_s": NOW_S - 12.0}
    return schema.PastDecisionEntry(**{**base, **at, **given})


def replica(**given: Any) -> schema.ReplicaEntry:
    base = {
        "id": "chat-1", "state": "starting", "url": "http://127.0.0.1:9001", "pid": 4242,
        "served_model": None, "gpus": (), "cpus": (), "inflight_requests": 0,
        "inflight_tokens": 0, "phase": "loading weights", "step": "loading", "progress": None,
        "woken_from": None, "since_s": 11.6, "error": None,
    }  # fmt: skip
    return schema.ReplicaEntry(**{**base, **given})


def pool(**given: Any) -> schema.PoolEntry:
    base = {
        "name": "chat", "aliases": (), "engine": "vllm", "backend": "process", "model": "m",
        "min_replicas": 0, "max_replicas": 1, "desired": 1, "override": None, "ready": 0,
        "starting": 1, "unhealthy": 0, "draining": 0, "sleeping": 0, "queued_requests": 3,
        "queued_tokens": 900, "inflight_requests": 0, "inflight_tokens": 0, "arrivals_total": 3,
        "recent": None, "wake_eta_s": 31.4, "tier": None, "tiers": (), "step_down_in_s": None,
        "last_decision": decision(), "failures": 0, "retry_in_s": None, "error": None,
        "replicas": (replica(),),
    }  # fmt: skip
    return schema.PoolEntry(**{**base, **given})


def worker(index: int) -> schema.WorkerEntry:
    return schema.WorkerEntry(
        kind="http",
        index=index, pid=index + 1, state="listening", restarts=0, connections=0,
        upstream_connections=0,
    )  # fmt: skip


def gateway_status(*pools: schema.PoolEntry, **given: Any) -> schema.GatewayStatus:
    base = {
        "version": "0.1.0", "endpoint": "http://127.0.0.1:8000", "admin": "http://127.0.0.1:8001",
        "uptime_s": 192.0, "workers": (worker(0), worker(1)), "pools": pools,
        "fork_server": None, "errors": {}, "last_error": None,
    }  # fmt: skip
    return schema.GatewayStatus(**{**base, **given})


class ServedApp:
    """An application, served while the ``with`` block lasts: over TCP at ``url``, asked with the
    token by ``http``, and with a ``state_dir`` at its Unix socket, asked by
    ``owner`` where its path is short."""

    def __init__(self, app: ASGIApp, state_dir: Path | None = None) -> None:
        self.url = ""
        self._app = app
        self._state_dir = state_dir
        self.owner: Any = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()

        (listener,) = listen("127.0.0.1", 0, field="gateway.admin_port")
        self.url = url(listener)
        with contextlib.ExitStack() as stack:
            listeners = [listener]
            if self._state_dir is not None:
                made = admin_listeners(listener, self._state_dir, RECORD_NAME)
                listeners = stack.enter_context(made)
            self._ready.set()
            await serve_admin(listeners, self._app, self._stop, shutdown_s=1)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(30)
        # Without TLS: loading certificates takes longer than most tests.
        self.http = httpx.Client(
            base_url=self.url, timeout=60, trust_env=False, verify=False, headers=BEARER
        )
        if self._state_dir is not None:
            path = self._state_dir / SOCKET_NAMES[RECORD_NAME]
            if len(str(path)) < 100:
                transport = httpx.HTTPTransport(uds=str(path))
                self.owner = httpx.Client(base_url="http://localhost", transport=transport)
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.owner is not None:
            self.owner.close()
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(30)


class ServedAdmin(ServedApp):
    """The admin application of a gateway. Without a control only the model cache is to be asked;
    ``options`` are those of ``create_app``, and ``state_dir``."""

    def __init__(self, control: Any = None, models: Models | None = None, **options: Any) -> None:
        state_dir = options.pop("state_dir", None)
        options = {"token": TOKEN, **options}
        app = create_app(control or SimpleNamespace(), models=models, **options)  # type: ignore[arg-type]
        super().__init__(app, state_dir)
