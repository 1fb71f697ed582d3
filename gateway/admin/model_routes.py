"""``/models…`` of the admin listener: the verbs of ``gateway.admin.models`` over HTTP.

A verb that takes long answers 200 at once with a stream of JSON lines: ``{"progress": …}`` as it
goes and at the end one of ``{"result": …}`` and ``{"error": …}``. A client that goes away calls it
off; what was fetched by then is kept, and the same request goes on from there.
"""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from gateway.admin.answers import error, read_object
from gateway.admin.model_errors import BAD_VALUE, error_of
from gateway.admin.models import SLOW_VERBS, Models, as_json
from modelcache.types import Cancelled, Progress

log = logging.getLogger("tidegate.models")

LINES_TYPE = "application/x-ndjson"
BEAT_S = 0.25
"""Seconds between two lines of progress."""
SILENCE_S = 5.0
"""Seconds after which a line is sent although nothing moved, so that nobody gives up on it."""
MAX_SLOW = 16
"""Slow verbs at once; the next is refused. Each has a thread."""

Handler = Callable[[Request], Awaitable[Response]]


class ModelRoutes:
    """The endpoints over one ``Models``."""

    def __init__(self, models: Models, max_body_bytes: int) -> None:
        self._models = models
        self._max_body_bytes = max_body_bytes
        self._slow = 0

    def table(self) -> list[Route]:
        """Every route, in the order in which they are matched."""
        routes = [Route("/models", self.listing)]
        for verb, about in _ABOUT.items():
            inner = self._run_slow if verb in SLOW_VERBS else self._run_quick
            handler = _described(partial(inner, verb), about)
            routes.append(Route(f"/models/{verb}", handler, methods=["POST"]))
        return routes

    async def listing(self, request: Request) -> Response:
        """The models in the cache, and what they take."""
        return JSONResponse(await asyncio.to_thread(self._models.listing))

    async def _body(self, verb: str, request: Request) -> dict[str, Any] | Response:
        body = await read_object(request, None, self._max_body_bytes)
        if isinstance(body, Response):
            return body
        try:
            self._models.read(verb, body)
        except ValueError as problem:
            field = str(problem).partition(":")[0]
            param = field if field in body else "model"
            return error(400, BAD_VALUE, str(problem), param=param)
        return body

    async def _run_quick(self, verb: str, request: Request) -> Response:
        body = await self._body(verb, request)
        if isinstance(body, Response):
            return body
        try:
            return JSONResponse(await asyncio.to_thread(self._models.run, verb, body))
        except Exception as problem:
            told = error_of(problem)
            if told is None:
                raise
            return error(*told)

    async def _run_slow(self, verb: str, request: Request) -> Response:
        body = await self._body(verb, request)
        if isinstance(body, Response):
            return body
        if self._slow >= MAX_SLOW:
            text = f"{MAX_SLOW} of these run already; try again."
            return error(429, "too_many", text, retry_after="5")
        return StreamingResponse(self._lines(verb, body), media_type=LINES_TYPE)

    async def _lines(self, verb: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The verb's progress and its end, each a line."""
        last: list[Progress] = []
        left = threading.Event()
        self._slow += 1
        work = asyncio.create_task(
            asyncio.to_thread(
                self._models.run,
                verb,
                body,
                on_progress=lambda progress: last.__setitem__(slice(None), [progress]),
                cancelled=left.is_set,
            )
        )
        work.add_done_callback(self._slow_is_over)
        try:
            shown: Progress | None = None
            silent_s = 0.0
            while not (await asyncio.wait({work}, timeout=BEAT_S))[0]:
                silent_s += BEAT_S
                now = last[0] if last else Progress(phase="waiting")
                if now != shown or silent_s >= SILENCE_S:
                    shown, silent_s = now, 0.0
                    yield _line({"progress": as_json(now)})
            yield _line(await _end_of(work))
        finally:
            left.set()  # whoever asked has gone, or it is over anyway

    def _slow_is_over(self, work: asyncio.Task[Any]) -> None:
        self._slow -= 1
        if work.cancelled() or isinstance(work.exception(), Cancelled):
            return
        problem = work.exception()
        if problem is not None and error_of(problem) is None:  # type: ignore[arg-type]
            log.error("a verb of the model cache failed", exc_info=problem)


def _described(inner: Handler, about: str) -> Handler:
    """A handler with a docstring of its own, for the index of the admin listener."""

    async def answer(request: Request) -> Response:
        return await inner(request)

    answer.__doc__ = about
    return answer


async def _end_of(work: asyncio.Task[dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"result": await work}
    except Exception as problem:  # noqa: BLE001 - told to who asked, and logged above
        told = error_of(problem)
    status, reason, message = told or (
        500,
        "internal_error",
        "Tidegate failed at this; its log says how.",
    )
    return {"error": {"message": message, "code": reason, "status": status}}


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n"


_ABOUT = {
    "preload": 'Bring {"model": "URL", "revision": null} to the disk; answers in JSON lines.',
    "prewarm": 'Bring the weights of {"model": "URL"} into the page cache, of one tensor-parallel '
    'rank with {"rank": 0, "world_size": 2}; JSON lines.',
    "verify": 'Read {"model": "URL"} again and compare; {"repair": true} mends it; JSON lines.',
    "replicate": 'Have other sites preload {"model": "URL", "sites": ["eu"]}; JSON lines.',
    "pin": 'Keep {"model": "URL"} on the disk whatever happens.',
    "unpin": 'Let {"model": "URL"} be evicted again.',
    "evict": 'Take {"model": "URL", "revision": null} from the disk, the newest where none is '
    'named; {"all": true} all revisions, {"prepared": true} only what steps have made of it, '
    '{"force": true} also where it is pinned.',
}
