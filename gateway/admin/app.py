"""The admin listener: metrics, health, status, and the few things that can be done by hand.

A small ASGI application over a ``Control``, which ``gateway.compose.up`` implements. It has no
authentication of its own and listens on loopback unless told otherwise; what it does guard against
is the one attacker who reaches loopback, a web page in a local browser:

- a ``Host`` that is a foreign name is refused (DNS rebinding);
- nothing is changed by a request that a page could send without asking first: a change is a POST
  with ``content-type: application/json``, and CORS is never granted;
- a request that a browser marks as coming from another site is refused whatever it asks.

Every error has OpenAI's shape and names its reason in ``x-tidegate-reason``.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admin.answers import error, read_object
from gateway.admin.metrics_page import render_cache
from gateway.admin.model_routes import ModelRoutes
from gateway.admin.models import Models
from gateway.admin.usage_poller import UsageLook
from gateway.settings.schema import LOOPBACK_NAMES, is_loopback

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MAX_BODY_BYTES = 65_536
"""A change is a few words; more is a mistake."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


class Control(Protocol):
    """What the admin listener shows and changes. Moments (``at_s``) are Unix time; ``since_s`` of
    a replica is how long it has been in its state.

    ``KeyError`` means an unknown pool or replica, ``ValueError`` a value that is not allowed (its
    message is shown), ``TimeoutError`` that it is still under way.
    """

    def status(self) -> dict[str, Any]:
        """Everything, as JSON: workers, pools, replicas, last decisions."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether requests are accepted, and why (not)."""
        ...

    def metrics(self) -> bytes:
        """Prometheus text, version 0.0.4."""
        ...

    def explain(self, pool: str) -> list[dict[str, Any]]:
        """The pool's decisions with their reasons, newest last."""
        ...

    async def scale(self, pool: str, replicas: int | None) -> dict[str, Any]:
        """Hold the pool at this many replicas; ``None`` gives it back to the autoscaler."""
        ...

    async def sleep(self, pool: str, level: int) -> dict[str, Any]:
        """Put the pool's replicas to sleep: level 1 keeps weights in host memory, 2 drops them."""
        ...

    async def wake(self, pool: str) -> dict[str, Any]:
        """Wake the pool's sleeping replicas, or start one."""
        ...

    async def drain(self, replica_id: str) -> dict[str, Any]:
        """Give a replica no more requests and stop it when it has finished."""
        ...


def create_app(
    control: Control,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    models: Models | None = None,
) -> Starlette:
    """The application; ``host`` is the address it is bound to, ``allowed_hosts`` further names.

    With ``models`` the model cache is shown and worked on too, below ``/models``.
    """
    return assemble(_Routes(control, max_body_bytes, models).table(), host, allowed_hosts)


def assemble(routes: Sequence[Route], host: str, allowed_hosts: Sequence[str]) -> Starlette:
    """An application of these routes and of an index of them, guarded against web pages."""
    return Starlette(
        routes=[_index(routes), *routes],
        middleware=[Middleware(BrowserGuard, host=host, allowed_hosts=tuple(allowed_hosts))],
        exception_handlers={HTTPException: _http_error, Exception: _internal_error},
    )


class BrowserGuard:
    """Refuses what only a web page would send: a foreign ``Host``, ``Origin`` or site."""

    def __init__(self, app: ASGIApp, *, host: str, allowed_hosts: tuple[str, ...]) -> None:
        self.app = app
        names = {name.lower() for name in allowed_hosts}
        # Bound to more than loopback and told no names, it cannot know how it is called.
        self.any_host = "*" in names or (not names and not is_loopback(host))
        self.names = names | {host.lower().strip("[]")} | LOOPBACK_NAMES

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it here."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self.refuse(Request(scope))
        await (refusal or self.app)(scope, receive, send)

    def refuse(self, request: Request) -> Response | None:
        """The answer to a request that is not let in, ``None`` for one that is."""
        hosts = request.headers.getlist("host")
        # Without one (HTTP/1.0, a plain health check) it cannot be a browser.
        if len(hosts) > 1 or (hosts and not self.knows(hosts[0])):
            return error(
                421,
                "host_not_allowed",
                "This listener does not answer to that Host; "
                "list the name in gateway.admin_allowed_hosts.",
            )
        if request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
            return error(403, "cross_site", "Requests from other sites' pages are refused.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] not in hosts:
            return error(403, "cross_site", "Requests from other origins' pages are refused.")
        if request.method not in SAFE_METHODS:
            media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media != "application/json":
                return error(
                    415, "content_type", "Send it with the header content-type: application/json."
                )
        return None

    def knows(self, host: str) -> bool:
        """Whether a ``Host`` is ours. An address always is: rebinding takes a name."""
        name = host.lower()
        if name.startswith("["):
            name = name[1:].partition("]")[0]
        elif name.count(":") <= 1:
            name = name.partition(":")[0]
        if self.any_host or name.rstrip(".") in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class _Routes:
    """The endpoints, bound to one ``Control``."""

    def __init__(self, control: Control, max_body_bytes: int, models: Models | None) -> None:
        self.control = control
        self.max_body_bytes = max_body_bytes
        self.usage = None if models is None else UsageLook(models.cache.usage)
        self.models = [] if models is None else ModelRoutes(models, max_body_bytes).table()

    def table(self) -> list[Route]:
        """Every route. Pools' names may have slashes in them."""
        return [
            Route("/metrics", self.metrics),
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/status", self.status),
            Route("/pools/{pool:path}/explain", self.explain),
            Route("/pools/{pool:path}/scale", self.scale, methods=["POST"]),
            Route("/pools/{pool:path}/sleep", self.sleep, methods=["POST"]),
            Route("/pools/{pool:path}/wake", self.wake, methods=["POST"]),
            Route("/replicas/{replica:path}/drain", self.drain, methods=["POST"]),
            *self.models,
        ]

    async def metrics(self, request: Request) -> Response:
        """Prometheus text."""
        page = self.control.metrics()
        if self.usage is not None:
            page += render_cache(await self.usage.get(), self.usage.failures)
        return Response(page, headers={"content-type": METRICS_TYPE})

    async def healthz(self, request: Request) -> Response:
        """200 as long as the process lives."""
        return JSONResponse({"status": "alive"})

    async def readyz(self, request: Request) -> Response:
        """200 while requests are accepted, else 503 with the reason."""
        ready, reason = self.control.ready()
        body = {"ready": ready, "reason": reason}
        if ready:
            return JSONResponse(body)
        refusal = {"message": reason, "type": "server_error", "param": None, "code": "not_ready"}
        return JSONResponse(
            {**body, "error": refusal}, 503, headers={"x-tidegate-reason": "not_ready"}
        )

    async def status(self, request: Request) -> Response:
        """Workers, pools, replicas and last decisions."""
        return JSONResponse(self.control.status())

    async def explain(self, request: Request) -> Response:
        """The pool's decisions with their reasons, newest last; ?limit=N for the newest N."""
        limit = _limit(request)
        if isinstance(limit, Response):
            return limit
        pool = request.path_params["pool"]
        try:
            decisions = self.control.explain(pool)
        except KeyError:
            return _unknown("pool", pool)
        return JSONResponse({"pool": pool, "decisions": decisions[-limit:] if limit else decisions})

    async def scale(self, request: Request) -> Response:
        """Hold a pool at {"replicas": N}; null gives it back to the autoscaler."""
        body = await self.body(request, {"replicas"})
        if isinstance(body, Response):
            return body
        if "replicas" not in body:
            return error(400, "bad_value", 'Send {"replicas": N} or null.', param="replicas")
        replicas = body["replicas"]
        if replicas is not None and not _whole(replicas):
            return error(
                400, "bad_value", "replicas must be null or an integer from 0.", param="replicas"
            )
        pool = request.path_params["pool"]
        return await _act("pool", pool, lambda: self.control.scale(pool, replicas))

    async def sleep(self, request: Request) -> Response:
        """Put a pool's replicas to sleep at {"level": 1 or 2}."""
        body = await self.body(request, {"level"})
        if isinstance(body, Response):
            return body
        level = body.get("level", 1)
        if not _whole(level) or level not in {1, 2}:
            return error(400, "bad_value", "level must be 1 or 2.", param="level")
        pool = request.path_params["pool"]
        return await _act("pool", pool, lambda: self.control.sleep(pool, level))

    async def wake(self, request: Request) -> Response:
        """Wake a pool, as a request for it would."""
        body = await self.body(request, set())
        if isinstance(body, Response):
            return body
        pool = request.path_params["pool"]
        return await _act("pool", pool, lambda: self.control.wake(pool))

    async def drain(self, request: Request) -> Response:
        """Give a replica no more requests, and stop it when it has finished."""
        body = await self.body(request, set())
        if isinstance(body, Response):
            return body
        replica = request.path_params["replica"]
        return await _act("replica", replica, lambda: self.control.drain(replica))

    async def body(self, request: Request, known: set[str]) -> dict[str, Any] | Response:
        """A small JSON object with only ``known`` in it (nothing is ``{}``), or what is wrong."""
        return await read_object(request, known, self.max_body_bytes)


def _index(routes: Sequence[Route]) -> Route:
    async def index(request: Request) -> Response:
        """What there is here."""
        return JSONResponse({"tidegate": "admin", "endpoints": paths})

    own = Route("/", index)
    paths = {
        f"{method} {route.path.replace(':path', '')}": (route.endpoint.__doc__ or "").strip()
        for route in (own, *routes)
        for method in sorted((route.methods or set()) - {"HEAD"})
    }
    return own


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _limit(request: Request) -> int | Response:
    text = request.query_params.get("limit", "0")
    if text.isascii() and text.isdigit() and len(text) < 10:
        return int(text)
    return error(400, "bad_value", "limit must be an integer from 0.", param="limit")


async def _act(kind: str, name: str, action: Callable[[], Awaitable[dict[str, Any]]]) -> Response:
    try:
        return JSONResponse(await action())
    except KeyError:
        return _unknown(kind, name)
    except ValueError as problem:
        return error(400, "bad_value", str(problem))
    except TimeoutError:
        return error(504, "timeout", "It was begun and is not done yet; see /status.")


def _unknown(kind: str, name: str) -> Response:
    return error(404, f"{kind}_not_found", f"There is no {kind} {name!r}.", param=kind)


async def _http_error(request: Request, problem: Exception) -> Response:
    """The framework's own refusals (404, 405), in our shape."""
    if not isinstance(problem, HTTPException):
        raise problem
    reasons = {404: "route_not_found", 405: "method_not_allowed"}
    reason = reasons.get(problem.status_code, "http_error")
    message = f"{request.method} {request.scope['path']}: {problem.detail}."
    response = error(problem.status_code, reason, message)
    response.headers.update(problem.headers or {})
    return response


async def _internal_error(request: Request, problem: Exception) -> Response:
    """A fault of ours: the traceback goes to the log, never to the client."""
    return error(500, "internal_error", "Tidegate failed at this; its log says how.")
