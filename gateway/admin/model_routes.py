"""``/models…`` of the admin listener: the verbs of ``gateway.admin.models`` over HTTP.

A verb that takes long answers 200 at once with a stream of JSON lines: progress as it goes, and at
the end a result or an error. A client that goes away cancels it; what was fetched by then is kept,
and the same request goes on from there.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response, StreamingResponse

from gateway.admin.models import Models, error_of
from gateway.admin.openapi import LINES_TYPE
from gateway.admin.operations import VERBS
from gateway.admin.schema import (
    FAULT,
    AdminError,
    CacheListing,
    ModelAnswer,
    ModelRequest,
    ProgressLine,
    ResultLine,
)
from modelcache.types import Cancelled, Progress

log = logging.getLogger("tidegate.models")

BEAT_S = 0.25
"""Seconds between two lines of progress."""
SILENCE_S = 5.0
"""Seconds after which a line is sent although nothing moved, so that no proxy gives up on it."""
MAX_SLOW = 16
"""Slow verbs at once; the next is refused. Each has a thread."""


class ModelRoutes:
    """The handlers over one ``Models``."""

    def __init__(self, models: Models, max_slow: int = MAX_SLOW) -> None:
        self._models = models
        self._max_slow = max_slow
        self._slow = 0

    def handlers(self) -> dict[str, Callable[..., Awaitable[BaseModel | Response]]]:
        """Each operation's handler by its name."""
        return {
            "models": self.listing,
            **{
                verb: partial(self.run_slow if operation.lines else self.run_quick, verb)
                for verb, operation in VERBS.items()
            },
        }

    async def listing(self) -> CacheListing:
        """The models in the cache, and what they take."""
        return await asyncio.to_thread(self._models.listing)

    async def run_quick(self, verb: str, body: ModelRequest) -> ModelAnswer:
        """The answer of a verb that is soon done."""
        try:
            return await asyncio.to_thread(self._models.run, verb, body)
        except Exception as problem:
            error = error_of(problem)
            if error is None:
                raise
            raise error from None

    async def run_slow(self, verb: str, body: ModelRequest) -> Response:
        """The lines of a verb that takes long."""
        try:
            self._models.resolve(body)
        except ValueError as problem:
            raise error_of(problem) or problem from None
        if self._slow >= self._max_slow:
            text = f"{self._max_slow} of these run already; try again."
            raise AdminError("too_many", text, retry_after="5")
        return StreamingResponse(self._lines(verb, body), media_type=LINES_TYPE)

    async def _lines(self, verb: str, body: ModelRequest) -> AsyncIterator[str]:
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
                    yield _line(ProgressLine(progress=now))
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


async def _end_of(work: asyncio.Task[ModelAnswer]) -> BaseModel:
    try:
        return ResultLine(result=await work)
    except Exception as problem:  # noqa: BLE001 - answered, and logged above
        return (error_of(problem) or AdminError("internal_error", FAULT)).answer()


def _line(value: BaseModel) -> str:
    return value.model_dump_json() + "\n"
