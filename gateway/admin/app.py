"""The admin API: metrics, health, status, and the few things that can be done by hand.

A small ASGI application over a ``LiveControl`` and the verbs of the model cache: each operation of
``gateway.admin.operations`` gets its handler here. ``gateway.admin.guard`` says who is let in,
``gateway.admin.server`` serves it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from autoscaler.types import NotKnown
from gateway.admin import operations, schema
from gateway.admin.guard import Guard, is_owner
from gateway.admin.history import Histories
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
from modelcache.types import Cancelled, Progress

if TYPE_CHECKING:
    from gateway.admin.control import LiveControl

log = logging.getLogger("tidegate.models")

BODY_TIMEOUT_S = 10.0
"""Seconds a client has to send its few words."""

BEAT_S = 0.25
"""Seconds between two lines of progress."""
SILENCE_S = 5.0
"""Seconds after which a line is sent although nothing moved, so that no proxy gives up on it."""
MAX_SLOW = 16
"""Slow verbs at once; the next is refused. Each has a thread."""
MAX_QUICK = 4
"""Threads of the quick verbs; more of them wait for one."""

Result = TypeVar("Result")

Handler = Callable[..., Awaitable[BaseModel | Response]]
"""Answers an operation: called with the parts of its path by name, ``body`` where it has a request
and ``query`` where it has one; where the body names a model, ``owner`` says whether it came from
the user who started Tidegate. Raises ``AdminError``."""


def create_app(
    control: LiveControl,
    *,
    host: str = "127.0.0.1",
    allowed_hosts: Sequence[str] = (),
    token: str | None = None,
    version: str = "",
    models: Models | None = None,
    histories: Histories | None = None,
    max_slow: int = MAX_SLOW,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> Starlette:
    """The application; ``host`` is the address it is bound to, ``allowed_hosts`` further names.
    Over TCP it wants ``token``; without one it answers only health and metrics there.

    With ``models`` the model cache is shown and worked on too, below ``/models``, and with
    ``histories`` the past of pools.
    """
    handlers = _PoolRoutes(control, models).handlers()
    if histories is not None:
        handlers |= HistoryRoutes(histories).handlers()
    if models is not None:
        handlers |= ModelRoutes(models, max_slow).handlers()
    return assemble(handlers, host, allowed_hosts, token, version, body_timeout_s)


def assemble(
    handlers: Mapping[str, Handler],
    host: str,
    allowed_hosts: Sequence[str],
    token: str | None,
    version: str,
    body_timeout_s: float = BODY_TIMEOUT_S,
) -> Starlette:
    """An application of the operations that have a handler, with their index and their OpenAPI
    document, behind the guard."""
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
        middleware=[
            Middleware(_Guarded, guard=Guard(host=host, allowed_hosts=allowed_hosts, token=token))
        ],
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
            data = await _body(request, operation.max_body_bytes, body_timeout_s)
            given["body"] = body = _parsed(operation.request, data)
            if isinstance(body, schema.ModelRequest):
                given["owner"] = is_owner(request.scope)
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


async def _body(request: Request, most: int, timeout_s: float) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for piece in request.stream():
                data += piece
                if len(data) > most:
                    text = f"The body is larger than {most} bytes."
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


class _Guarded:
    """A middleware: requests that the guard lets in go on, the others are answered here."""

    def __init__(self, app: ASGIApp, *, guard: Guard) -> None:
        self._app = app
        self._guard = guard

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                self._guard.check(Request(scope))
            except AdminError as problem:
                await refusal(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


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
            "signals": self.signals,
            "explain": self.explain,
            "scale": self.scale,
            "sleep": self.sleep,
            "wake": self.wake,
            "disable": partial(self.set_disabled, disabled=True),
            "enable": partial(self.set_disabled, disabled=False),
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

    async def signals(self, query: schema.SignalsQuery) -> schema.SignalsAnswer:
        if query.after is not None:
            await self.control.wait_for_activity(query.after, query.wait_s)
        return self.control.signals()

    async def explain(self, pool: str, query: schema.ExplainQuery) -> schema.ExplainAnswer:
        with _known("pool"):
            decisions = self.control.explain(pool)
        newest = decisions[-query.limit :] if query.limit else decisions
        pools = self.control.status().pools
        current = next((one for one in pools if pool in (one.name, *one.aliases)), None)
        return schema.ExplainAnswer(pool=pool, decisions=tuple(newest), current=current)

    async def scale(self, pool: str, body: schema.ScaleRequest) -> schema.ScaleAnswer:
        with _known("pool", "replicas"):
            return await self.control.scale(pool, body.replicas)

    async def sleep(self, pool: str, body: schema.SleepRequest) -> schema.SleepAnswer:
        with _known("pool", "level"):
            return await self.control.sleep(pool, body.level)

    async def wake(self, pool: str, body: schema.NoFields) -> schema.WakeAnswer:
        with _known("pool"):
            return await self.control.wake(pool)

    async def set_disabled(
        self, pool: str, body: schema.NoFields, *, disabled: bool
    ) -> schema.ServiceAnswer:
        with _known("pool"):
            return await self.control.set_disabled(pool, disabled=disabled)

    async def reload(self, body: schema.NoFields) -> schema.ReloadAnswer:
        return await self.control.reload()

    async def drain(self, replica: str, body: schema.NoFields) -> schema.DrainAnswer:
        with _known("replica"):
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
def _known(kind: str, field: str = "") -> Iterator[None]:
    """What ``LiveControl`` raises as the error that is answered; one about ``field`` of the body
    begins with its name."""
    try:
        yield
    except NotKnown as problem:
        raise AdminError(f"{kind}_not_found", str(problem), param=kind) from None
    except ValueError as problem:
        is_field = str(problem).partition(" ")[0] == field
        raise AdminError("bad_value", str(problem), param=field if is_field else kind) from None
    except TimeoutError:
        text = "It was begun and is not done yet; see /status."
        raise AdminError("timeout", text) from None


# ── History ───────────────────────────────────────────────────────────────────────────────────────


class HistoryRoutes:
    """The handlers of the past, over one ``Histories``."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories
        # A thread of their own: a disk that hangs must hold up nothing but these.
        self._threads = ThreadPoolExecutor(1, "history")

    def handlers(self) -> dict[str, Handler]:
        """Each operation's handler by its name."""
        return {
            "history": self.listing,
            "pool_history": self.read,
            "fill_history": self.fill,
            "decisions": self.decisions,
            "score": self.score,
        }

    async def listing(self) -> schema.HistoryListing:
        """What there is."""
        return await self._do(self._histories.listing)

    async def read(self, pool: str, query: schema.HistoryQuery) -> Response:
        """A part of a pool's past."""
        return await self._do(lambda: as_response(self._histories.read(pool, query)))

    async def fill(self, pool: str, body: schema.FillRequest) -> schema.FillAnswer:
        """Add to it."""
        answer = await self._do(partial(self._histories.fill, pool, body))
        self._histories.filled(answer.pool)
        return answer

    async def decisions(self, pool: str, query: schema.DecisionsQuery) -> Response:
        """Past decisions of a pool."""
        waiting = self._histories.waiting(pool)
        return await self._do(lambda: as_response(self._histories.decisions(pool, query, waiting)))

    async def score(self, pool: str, query: schema.ScoreQuery) -> schema.ScoreAnswer:
        """What they cost and brought."""
        waiting = self._histories.waiting(pool)
        return await self._do(partial(self._histories.score, pool, query, waiting))

    async def _do(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


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
        # Threads of their own: a store that does not answer must hold up nothing but these verbs.
        self._slow_threads = ThreadPoolExecutor(max_slow, "slow-verb")
        self._quick_threads = ThreadPoolExecutor(MAX_QUICK, "quick-verb")

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
        return await self._quickly(self._models.listing)

    async def run_quick(
        self, verb: str, body: schema.ModelRequest, owner: bool
    ) -> schema.ModelAnswer:
        """The answer of a verb that is soon done."""
        self._check_name(body, owner)
        try:
            return await self._quickly(partial(self._models.run, verb, body))
        except Exception as problem:
            error = error_of(problem)
            if error is None:
                raise
            raise error from None

    async def run_slow(self, verb: str, body: schema.ModelRequest, owner: bool) -> Response:
        """The lines of a verb that takes long. It begins now; closing the connection cancels it."""
        self._check_name(body, owner)
        if self._slow >= self._max_slow:
            text = f"{self._max_slow} of these run already; try again."
            raise AdminError("too_many", text, retry_after="5")
        self._slow += 1
        answer = _SlowAnswer(partial(self._models.run, verb, body), self._slow_threads)
        answer.ends.add_done_callback(self._slow_is_over)
        return answer

    def _check_name(self, body: schema.ModelRequest, owner: bool) -> None:
        """Raise ``AdminError`` for a name that is none, or may not be named by this client."""
        try:
            url, _ = self._models.resolve(body)
        except ValueError as problem:
            raise error_of(problem) or problem from None
        if not owner and not self._models.is_named(url):
            raise AdminError(
                "model_not_allowed",
                "Over TCP a model must be a configured pool's, or below one of "
                "gateway.admin_allowed_models; `tidegate model` on the machine itself takes any.",
                param="model",
            )

    async def _quickly(self, call: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._quick_threads, call)

    def _slow_is_over(self, ends: asyncio.Future[Any]) -> None:
        self._slow -= 1
        if ends.cancelled() or isinstance(ends.exception(), Cancelled):
            return
        problem = ends.exception()
        if isinstance(problem, Exception) and error_of(problem) is None:
            log.error("a verb of the model cache failed", exc_info=problem)


class _SlowAnswer(StreamingResponse):
    """The answer of a slow verb: ``run`` in one of the ``threads``, its progress and its end a line
    each. It is cancelled where they are not read to the end."""

    def __init__(self, run: Callable[..., schema.ModelAnswer], threads: Executor) -> None:
        self._left = threading.Event()
        self._latest = Progress(phase="waiting")
        work = partial(run, on_progress=self._progressed, cancelled=self._left.is_set)
        self.ends = asyncio.get_running_loop().run_in_executor(threads, work)
        super().__init__(self._lines(), media_type=LINES_TYPE)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._left.set()  # the client has gone, or it is over anyway

    def _progressed(self, progress: Progress) -> None:
        """It is there now; called from its thread."""
        self._latest = progress

    async def _lines(self) -> AsyncIterator[str]:
        shown: Progress | None = None
        silent_s = 0.0
        while not (await asyncio.wait({self.ends}, timeout=BEAT_S))[0]:
            silent_s += BEAT_S
            now = self._latest
            if now != shown or silent_s >= SILENCE_S:
                shown, silent_s = now, 0.0
                yield _line(schema.ProgressLine(progress=now))
        yield _line(await _end_of(self.ends))


async def _end_of(work: asyncio.Future[schema.ModelAnswer]) -> BaseModel:
    try:
        return schema.ResultLine(result=await work)
    except Exception as problem:  # noqa: BLE001 - answered, and logged above
        return (error_of(problem) or AdminError("internal_error", FAULT)).answer()


def _line(value: BaseModel) -> str:
    return value.model_dump_json() + "\n"
