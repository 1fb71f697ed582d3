"""The admin listener: metrics, health, status, and the few things that can be done by hand.

A small ASGI application over a ``LiveControl`` and the verbs of the model cache: each operation of
``gateway.admin.operations`` gets its handler here. It has no authentication of its own and listens
on loopback unless configured otherwise; what it does guard against is the one attacker who reaches
loopback, a web page in a local browser:

- a ``Host`` that is a foreign name is refused (DNS rebinding);
- nothing is changed by a request that a page could send without asking first: a change is a POST
  with ``content-type: application/json``, and CORS is never granted;
- a request that a browser marks as coming from another site is refused whatever it asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import uvicorn
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from gateway.admin import operations, schema
from gateway.admin.metrics_page import UsagePoller, render_cache
from gateway.admin.models import Models, error_of
from gateway.admin.operations import (
    INDEX,
    LINES_TYPE,
    METRICS_TYPE,
    OPENAPI,
    OPERATIONS,
    VERBS,
    Operation,
)
from gateway.admin.schema import FAULT, AdminError, AdminRequest
from gateway.settings.schema import LOOPBACK_NAMES, is_loopback
from modelcache.types import Cancelled, Progress

if TYPE_CHECKING:
    from gateway.admin.control import LiveControl

log = logging.getLogger("tidegate.models")

MAX_BODY_BYTES = 65_536
"""A change is a few words; more is a mistake."""
BODY_TIMEOUT_S = 10.0
"""Seconds a client has to send its few words."""

KEEPALIVE_S = 5
MAX_CONNECTIONS = 256
MAX_HEAD_BYTES = 32_768

BEAT_S = 0.25
"""Seconds between two lines of progress."""
SILENCE_S = 5.0
"""Seconds after which a line is sent although nothing moved, so that no proxy gives up on it."""
MAX_SLOW = 16
"""Slow verbs at once; the next is refused. Each has a thread."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})

Handler = Callable[..., Awaitable[BaseModel | Response]]
"""Answers an operation: called with the parts of its path by name, ``body`` where it has a request
and ``query`` where it has one. Raises ``AdminError``."""


def create_app(
    control: LiveControl,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    version: str = "",
    models: Models | None = None,
    max_slow: int = MAX_SLOW,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> Starlette:
    """The application; ``host`` is the address it is bound to, ``allowed_hosts`` further names.

    With ``models`` the model cache is shown and worked on too, below ``/models``.
    """
    handlers = _PoolRoutes(control, models).handlers()
    if models is not None:
        handlers |= ModelRoutes(models, max_slow).handlers()
    return assemble(handlers, host, allowed_hosts, version, body_timeout_s)


def assemble(
    handlers: Mapping[str, Handler],
    host: str,
    allowed_hosts: Sequence[str],
    version: str,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> Starlette:
    """An application of the operations that have a handler, with their index and their OpenAPI
    document, guarded against web pages."""
    schema.build_types()
    served = [INDEX, OPENAPI]
    served += [one for one in OPERATIONS if one.name in handlers]
    summaries = {f"{one.method} {one.path}": one.summary for one in served}

    async def index() -> schema.AdminIndex:
        return schema.AdminIndex(endpoints=summaries)

    async def describe() -> schema.ApiDocument:
        return schema.ApiDocument(await asyncio.to_thread(operations.describe, served, version))

    every = {"index": index, "openapi": describe, **handlers}
    return Starlette(
        routes=[_route(one, every[one.name], body_timeout_s) for one in served],
        middleware=[Middleware(BrowserGuard, host=host, allowed_hosts=tuple(allowed_hosts))],
        exception_handlers={
            AdminError: _refused,
            HTTPException: _http_error,
            Exception: _internal_error,
        },
    )


def _route(operation: Operation, handler: Handler, body_timeout_s: float) -> Route:
    async def answer(request: Request) -> Response:
        given: dict[str, Any] = dict(request.path_params)
        if operation.query is not None:
            kind, text = operation.query, dict(request.query_params)
            given["query"] = _validated(lambda: kind.model_validate_strings(text))
        if operation.request is not None:
            data = await _body(request, body_timeout_s)
            given["body"] = _parsed(operation.request, data)
        found = await handler(**given)
        return found if isinstance(found, Response) else as_response(found)

    # A pool's name may have slashes in it.
    path = operation.path.replace("}", ":path}")
    return Route(path, answer, methods=[operation.method], name=operation.name)


def as_response(answer: BaseModel, status: int = 200, **headers: str) -> Response:
    """An answer as JSON."""
    return Response(
        answer.model_dump_json(), status, headers or None, media_type="application/json"
    )


def _parsed(kind: type[AdminRequest], data: bytes) -> AdminRequest:
    return _validated(lambda: kind.model_validate_json(data.strip() or b"{}", strict=True))


def _validated(validate: Callable[[], AdminRequest]) -> AdminRequest:
    try:
        return validate()
    except ValidationError as problem:
        found = problem.errors(include_url=False)
        detail = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
        field = ".".join(map(str, detail["loc"]))
        if not field:
            raise AdminError("bad_json", f"The body: {detail['msg']}.") from None
        if detail["type"] == "extra_forbidden":
            raise AdminError("unknown_field", f"Unknown field: {field}.", param=field) from None
        raise AdminError("bad_value", f"{field}: {detail['msg']}.", param=field) from None


async def _body(request: Request, timeout_s: float) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                data += piece
                if len(data) > MAX_BODY_BYTES:
                    text = f"The body is larger than {MAX_BODY_BYTES} bytes."
                    raise AdminError("body_too_large", text, connection="close")
    except TimeoutError:
        text = f"The body did not arrive within {timeout_s:g} s."
        raise AdminError("body_timeout", text, connection="close") from None
    except ClientDisconnect:
        raise AdminError("client_closed", "The client went away.", connection="close") from None
    return bytes(data)


def refusal(problem: AdminError) -> Response:
    """An error as it is answered, with its code in a header too."""
    headers = {"x-tidegate-reason": problem.code, **problem.headers}
    return as_response(problem.answer(), problem.status, **headers)


async def _refused(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, AdminError)
    return refusal(problem)


async def _http_error(request: Request, problem: Exception) -> Response:
    """The framework's own refusals (404, 405), in our shape."""
    assert isinstance(problem, HTTPException)
    code = "method_not_allowed" if problem.status_code == 405 else "route_not_found"
    message = f"{request.method} {request.scope['path']}: {problem.detail}."
    return refusal(AdminError(code, message, **(problem.headers or {})))


async def _internal_error(request: Request, problem: Exception) -> Response:
    """The traceback goes to the log, never to the client."""
    return refusal(AdminError("internal_error", FAULT))


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
        if scope["type"] == "http":
            try:
                self.check(Request(scope))
            except AdminError as problem:
                await refusal(problem)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def check(self, request: Request) -> None:
        """Raise ``AdminError`` for a request that is not let in."""
        hosts = request.headers.getlist("host")
        # Without one (HTTP/1.0, a plain health check) it cannot be a browser.
        if len(hosts) > 1 or (hosts and not self.knows(hosts[0])):
            raise AdminError(
                "host_not_allowed",
                "This listener does not answer to that Host; "
                "list the name in gateway.admin_allowed_hosts.",
            )
        if request.headers.get("sec-fetch-site", "none") not in {"none", "same-origin"}:
            raise AdminError("cross_site", "Requests from other sites' pages are refused.")
        origin = request.headers.get("origin")
        if origin is not None and origin.partition("://")[2] not in hosts:
            raise AdminError("cross_site", "Requests from other origins' pages are refused.")
        if request.method not in SAFE_METHODS:
            media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if media != "application/json":
                raise AdminError(
                    "content_type", "Send it with the header content-type: application/json."
                )

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


class _PoolRoutes:
    """The handlers over one ``LiveControl``."""

    def __init__(self, control: LiveControl, models: Models | None) -> None:
        self.control = control
        self.usage = None if models is None else UsagePoller(models.cache.usage)

    def handlers(self) -> dict[str, Handler]:
        """Each operation's handler by its name."""
        return {
            "metrics": self.metrics,
            "healthz": healthz,
            "readyz": self.readyz,
            "status": self.status,
            "explain": self.explain,
            "scale": self.scale,
            "sleep": self.sleep,
            "wake": self.wake,
            "drain": self.drain,
            "reload": self.reload,
        }

    async def metrics(self) -> Response:
        page = self.control.metrics()
        if self.usage is not None:
            page += render_cache(await self.usage.get(), self.usage.failures)
        return Response(page, headers={"content-type": METRICS_TYPE})

    async def readyz(self) -> schema.Readiness:
        return readiness(*self.control.ready())

    async def status(self) -> schema.GatewayStatus:
        return self.control.status()

    async def explain(self, pool: str, query: schema.ExplainQuery) -> schema.ExplainAnswer:
        with _known("pool", pool):
            decisions = self.control.explain(pool)
        newest = decisions[-query.limit :] if query.limit else decisions
        return schema.ExplainAnswer(pool=pool, decisions=tuple(newest))

    async def scale(self, pool: str, body: schema.ScaleRequest) -> schema.ScaleAnswer:
        with _known("pool", pool, "replicas"):
            return await self.control.scale(pool, body.replicas)

    async def sleep(self, pool: str, body: schema.SleepRequest) -> schema.SleepAnswer:
        with _known("pool", pool, "level"):
            return await self.control.sleep(pool, body.level)

    async def wake(self, pool: str, body: schema.NoFields) -> schema.WakeAnswer:
        with _known("pool", pool):
            return await self.control.wake(pool)

    async def reload(self, body: schema.NoFields) -> schema.ReloadAnswer:
        return await self.control.reload()

    async def drain(self, replica: str, body: schema.NoFields) -> schema.DrainAnswer:
        with _known("replica", replica):
            return await self.control.drain(replica)


async def healthz() -> schema.Liveness:
    """The process lives."""
    return schema.Liveness()


def readiness(ready: bool, reason: str) -> schema.Readiness:
    """Whether requests are accepted. Raises ``AdminError`` where they are not."""
    if not ready:
        raise AdminError("not_ready", reason)
    return schema.Readiness(ready=True, reason=reason)


@contextlib.contextmanager
def _known(kind: str, name: str, field: str = "") -> Iterator[None]:
    """What ``LiveControl`` raises as the error that is answered; one about ``field`` of the body
    begins with its name."""
    try:
        yield
    except KeyError:
        text = f"There is no {kind} {name!r}."
        raise AdminError(f"{kind}_not_found", text, param=kind) from None
    except ValueError as problem:
        is_field = str(problem).partition(" ")[0] == field
        raise AdminError("bad_value", str(problem), param=field if is_field else kind) from None
    except TimeoutError:
        text = "It was begun and is not done yet; see /status."
        raise AdminError("timeout", text) from None


# ── Models ────────────────────────────────────────────────────────────────────────────────────────


class ModelRoutes:
    """The handlers of ``/models…``: the verbs over one ``Models``.

    A verb that takes long answers 200 at once with a stream of JSON lines: progress as it goes, and
    at the end a result or an error. A client that goes away cancels it; what was fetched by then is
    kept, and the same request goes on from there.
    """

    def __init__(self, models: Models, max_slow: int = MAX_SLOW) -> None:
        self._models = models
        self._max_slow = max_slow
        self._slow = 0

    def handlers(self) -> dict[str, Handler]:
        """Each operation's handler by its name."""
        return {
            "models": self.listing,
            **{
                verb: partial(self.run_slow if operation.lines else self.run_quick, verb)
                for verb, operation in VERBS.items()
            },
        }

    async def listing(self) -> schema.CacheListing:
        """The models in the cache, and what they take."""
        return await asyncio.to_thread(self._models.listing)

    async def run_quick(self, verb: str, body: schema.ModelRequest) -> schema.ModelAnswer:
        """The answer of a verb that is soon done."""
        try:
            return await asyncio.to_thread(self._models.run, verb, body)
        except Exception as problem:
            error = error_of(problem)
            if error is None:
                raise
            raise error from None

    async def run_slow(self, verb: str, body: schema.ModelRequest) -> Response:
        """The lines of a verb that takes long."""
        try:
            self._models.resolve(body)
        except ValueError as problem:
            raise error_of(problem) or problem from None
        if self._slow >= self._max_slow:
            text = f"{self._max_slow} of these run already; try again."
            raise AdminError("too_many", text, retry_after="5")
        return StreamingResponse(self._lines(verb, body), media_type=LINES_TYPE)

    async def _lines(self, verb: str, body: schema.ModelRequest) -> AsyncIterator[str]:
        """The verb's progress and its end, each a line."""
        latest = Progress(phase="waiting")
        left = threading.Event()

        def on_progress(progress: Progress) -> None:
            nonlocal latest
            latest = progress

        self._slow += 1
        work = asyncio.create_task(
            asyncio.to_thread(
                self._models.run, verb, body, on_progress=on_progress, cancelled=left.is_set
            )
        )
        work.add_done_callback(self._slow_is_over)
        try:
            shown: Progress | None = None
            silent_s = 0.0
            while not (await asyncio.wait({work}, timeout=BEAT_S))[0]:
                silent_s += BEAT_S
                now = latest
                if now != shown or silent_s >= SILENCE_S:
                    shown, silent_s = now, 0.0
                    yield _line(schema.ProgressLine(progress=now))
            yield _line(await _end_of(work))
        finally:
            left.set()  # the client has gone, or it is over anyway

    def _slow_is_over(self, work: asyncio.Task[Any]) -> None:
        self._slow -= 1
        if work.cancelled() or isinstance(work.exception(), Cancelled):
            return
        problem = work.exception()
        if isinstance(problem, Exception) and error_of(problem) is None:
            log.error("a verb of the model cache failed", exc_info=problem)


async def _end_of(work: asyncio.Task[schema.ModelAnswer]) -> BaseModel:
    try:
        return schema.ResultLine(result=await work)
    except Exception as problem:  # noqa: BLE001 - answered, and logged above
        return (error_of(problem) or AdminError("internal_error", FAULT)).answer()


def _line(value: BaseModel) -> str:
    return value.model_dump_json() + "\n"


# ── The server ────────────────────────────────────────────────────────────────────────────────────


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the control process decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_admin(
    listener: socket.socket, app: ASGIApp, stop: asyncio.Event, *, shutdown_s: int = 3
) -> None:
    """Serve on a listening socket until ``stop`` is set, then finish what is under way for at most
    ``shutdown_s``. The socket is closed at the end."""
    server = _Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            log_level="warning",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEPALIVE_S,
            timeout_graceful_shutdown=shutdown_s,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="admin server")
    stopping = asyncio.create_task(stop.wait(), name="admin stop")
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        server.should_exit = True
        try:
            async with asyncio.timeout(shutdown_s + 2):
                await asyncio.shield(serving)
        except TimeoutError:
            serving.cancel()
        finally:
            listener.close()
