"""One simulated engine behind its port: what it answers, whether it is up, awake, and well."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from loaders.engines.base import START_PHASES
from loaders.engines.simulated.api import chat, completions, messages, pooling, responses
from loaders.engines.simulated.api.answers import Speaker
from loaders.engines.simulated.api.context import Context, Prepare
from loaders.engines.simulated.api.errors import ApiError, bad
from loaders.engines.simulated.core import EngineCore
from loaders.engines.simulated.exchange import Exchange
from loaders.engines.simulated.faults import Fault, FaultPlan
from loaders.engines.simulated.generation import Generation
from loaders.engines.simulated.metrics import Metrics
from loaders.engines.simulated.scheduler import QueueFullError, Scheduler
from loaders.engines.simulated.settings import Settings

logger = logging.getLogger("loaders.engines.simulated")
_encode = msgspec.json.encode
_decode = msgspec.json.Decoder().decode

_TEXT: dict[str, Prepare] = {
    "/v1/chat/completions": chat.prepare,
    "/v1/completions": completions.prepare,
    "/v1/responses": responses.prepare,
    "/v1/messages": messages.prepare,
    "/v1/embeddings": pooling.embeddings,
    "/v1/rerank": pooling.rerank,
    "/v2/rerank": pooling.rerank,
    "/rerank": pooling.rerank,
    "/v1/score": pooling.score,
    "/score": pooling.score,
}


Operations = Mapping[str, tuple[tuple[str, ...], Callable[["Application", Exchange], None]]]
"""Endpoints that are not for text: by path, the methods allowed and what answers."""


class Application:
    """The engine's state over its life. Made inside a running event loop."""

    def __init__(self, settings: Settings, operations: Operations) -> None:
        self.settings = settings
        self._operations = operations
        self.engine = EngineCore(
            Scheduler(settings.model), Metrics(), virtual_time=settings.virtual_time
        )
        self.faults = FaultPlan(settings.seed)
        self.phase: str | None = START_PHASES[0]
        self.sleep_level = 0
        self.started_s = int(time.time())
        self.live: set[Generation] = set()
        self.context = Context(
            served_models=settings.served_models,
            max_model_len_tokens=settings.model.max_model_len_tokens,
            embedding_size=settings.embedding_size,
            speaker=Speaker(
                mean_tokens=settings.output_tokens,
                spread_fraction=settings.output_spread_fraction,
                seed=settings.seed,
            ),
        )
        self._loop = asyncio.get_running_loop()
        self._keys = {f"Bearer {key}".encode() for key in settings.api_keys}
        self._idle = asyncio.Event()
        self._sleep_lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._fault_timer: asyncio.TimerHandle | None = None
        self.arm(settings.faults)

    def wall_s(self) -> float:
        """The clock that faults live by: real also where the engine's time is virtual."""
        return self._loop.time()

    async def start(self) -> None:
        """Go through the start-up phases; ready when it returns."""
        for phase, duration_s in zip(START_PHASES, self.settings.startup_s, strict=True):
            self.phase = phase
            if duration_s:
                logger.info("start-up: %s for %.3g s (simulated)", phase, duration_s)
            fault = self.faults.during_startup(phase)
            if fault is not None:
                await self.engine.spend(duration_s / 2)
                self._strike(fault)
                await asyncio.Event().wait()  # a hang that is not of the whole process
            await self.engine.spend(duration_s)
        self.phase = None
        logger.info("Application startup complete (simulated)")

    def arm(self, faults: Sequence[str]) -> None:
        """Set these faults in place of all others. Raises ``ValueError``, changing nothing."""
        self.faults.arm(faults, self.wall_s())
        self._apply_standing()

    def refuse(self) -> str | None:
        """What a new connection meets: ``close``, ``reset``, or nothing."""
        fault = self.faults.hit("connection", self.wall_s()) if self.faults else None
        if fault is None:
            return None
        return "close" if fault.kind == "accept_close" else "reset"

    def handle(self, exchange: Exchange) -> None:
        """Answer one request, now or when the engine is done with it."""
        try:
            self._route(exchange)
        except ApiError as error:
            anthropic = exchange.path.startswith("/v1/messages")
            body = error.anthropic() if anthropic else error.openai()
            exchange.respond(error.status, _encode(body))
        except Exception:
            logger.exception("%s %s failed", exchange.method, exchange.path)
            exchange.respond(500, _encode(ApiError(500, "Internal server error").openai()))

    def _route(self, exchange: Exchange) -> None:
        path = exchange.path
        if self.settings.request_id_headers:
            named = exchange.headers.get(b"x-request-id") or os.urandom(16).hex().encode()
            exchange.extra = b"x-request-id: %s\r\n" % named
        if self.phase is not None:
            raise ApiError(503, f"The engine is starting: {self.phase} (simulated).")
        if self._keys and path.startswith("/v1"):
            given = exchange.headers.get(b"authorization")
            if given not in self._keys and exchange.method != "OPTIONS":
                exchange.respond(401, b'{"error":"Unauthorized"}')
                return
        prepare = _TEXT.get(path)
        if prepare is not None:
            if exchange.method != "POST":
                _refuse_method(exchange, ("POST",))
                return
            if not self.faults:
                self._generate(exchange, prepare, None)
            else:
                self._generate_or_fail(exchange, prepare)
            return
        methods, endpoint = self._operations.get(path, ((), None))
        if endpoint is None:
            exchange.respond(404, b'{"detail":"Not Found"}')
        elif exchange.method not in methods:
            _refuse_method(exchange, methods)
        else:
            endpoint(self, exchange)

    def _generate(self, exchange: Exchange, prepare: Prepare, cut: Fault | None) -> None:
        named = exchange.headers.get(b"x-request-id")
        request_id = named.decode("latin-1") if named else os.urandom(16).hex()
        context = replace(self.context, request_id=request_id, created_s=int(time.time()))
        prepared = prepare(self.body(exchange), context)
        generation = Generation(
            self.engine,
            exchange,
            prepared.answers,
            stream=prepared.stream,
            cut_after_chunks=None if cut is None else cut.after_chunks,
            cut_by_reset=cut is not None and cut.how == "reset",
            ended=self._ended,
        )
        self.live.add(generation)
        try:
            generation.start(prepared.wording(generation))
        except QueueFullError as error:
            self.live.discard(generation)
            self.engine.metrics.refused += 1
            message = f"The engine is busy: {error}. Please try again later or elsewhere."
            raise ApiError(503, message) from error

    def _ended(self, generation: Generation) -> None:
        self.live.discard(generation)
        if not self.live:
            self._idle.set()

    def body(self, exchange: Exchange) -> dict[str, Any]:
        """The request's body as an object. Raises ``ApiError``."""
        try:
            body = _decode(exchange.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad(f"The request body is not JSON: {error}.") from error
        if not isinstance(body, dict):
            raise bad("The request body must be a JSON object.")
        return body

    # Faults

    def _generate_or_fail(self, exchange: Exchange, prepare: Prepare) -> None:
        now = self.wall_s()
        fault = self.faults.hit("request", now)
        self._apply_standing()  # holds for this request where those before were enough
        self.faults.count()
        if fault is None or fault.kind == "cut":
            self._generate(exchange, prepare, fault)
        elif fault.kind == "error500":
            raise ApiError(fault.status, "This error was asked for (simulated).")
        elif fault.kind == "reset":
            exchange.cut(reset=True)
        elif fault.scope == "process" or fault.kind == "crash":
            self._strike(fault)
            self._generate(exchange, prepare, None)

    def _apply_standing(self) -> None:
        now = self.wall_s()
        slow = self.faults.standing("slow", now)
        self.engine.scheduler.slow_factor = 1.0 if slow is None else slow.factor
        self.engine.set_stalled(self.faults.standing("hang", now) is not None)
        while (fault := self.faults.due(now)) is not None:
            self._strike(fault)
        if self._fault_timer is not None:
            self._fault_timer.cancel()
            self._fault_timer = None
        again = self.faults.next_s(now)
        if again is not None:
            self._fault_timer = self._loop.call_at(again, self._apply_standing)

    def _strike(self, fault: Fault) -> None:
        if fault.kind == "crash":
            logger.error("crash: a fault says so (simulated)")
            os._exit(fault.code)
        if fault.scope == "process":
            logger.error("hang: a fault says so (simulated)")
            # The whole process really stops, signal handlers included, as in a deadlock.
            end = None if fault.for_s is None else time.monotonic() + fault.for_s
            while end is None or time.monotonic() < end:
                time.sleep(0.1 if end is not None else 3600)
            self.engine.scheduler.hold(self.engine.now)

    # Sleep

    def run(self, exchange: Exchange, work: Coroutine[Any, Any, None], answer: bytes) -> None:
        """Do ``work``, then answer 200 with ``answer``."""

        async def answered() -> None:
            await work
            exchange.respond(200, answer)

        task = asyncio.ensure_future(answered())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def fall_asleep(self, level: int, mode: str) -> None:
        """Sleep at ``level``. Running requests are aborted, waited for, or kept as they are."""
        async with self._sleep_lock:
            if self.sleep_level:
                return
            if mode == "wait":
                while self.live:
                    self._idle.clear()
                    await self._idle.wait()
            elif mode == "abort":
                for generation in list(self.live):
                    generation.stop()
            self.engine.set_paused(True)
            await self.engine.spend(self.settings.sleep_s[level - 1])
            self.engine.scheduler.blocks.forget()
            self.sleep_level = level
            logger.info("asleep at level %d (simulated)", level)

    async def wake(self) -> None:
        """Wake up; what was queued meanwhile goes on."""
        async with self._sleep_lock:
            if not self.sleep_level:
                return
            await self.engine.spend(self.settings.wake_s[self.sleep_level - 1])
            self.sleep_level = 0
            self.engine.set_paused(False)
            logger.info("awake (simulated)")


def _refuse_method(exchange: Exchange, methods: tuple[str, ...]) -> None:
    exchange.extra += b"allow: %s\r\n" % ", ".join(methods).encode()
    exchange.respond(405, b'{"detail":"Method Not Allowed"}')
