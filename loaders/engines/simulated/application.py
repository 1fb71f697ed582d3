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
from loaders.engines.simulated.api import completions, messages, pooling, responses
from loaders.engines.simulated.api.answers import Speaker
from loaders.engines.simulated.api.bodies import Context, Prepare, RequestError, bad
from loaders.engines.simulated.arguments import EngineSettings
from loaders.engines.simulated.faults import KINDS, TRIGGERS, Fault, FaultPlan
from loaders.engines.simulated.generation import EngineCore, Generation
from loaders.engines.simulated.http1 import HttpExchange
from loaders.engines.simulated.metrics import Metrics
from loaders.engines.simulated.scheduler import QueueFullError, Scheduler

logger = logging.getLogger("loaders.engines.simulated")
_encode = msgspec.json.encode
_decode = msgspec.json.Decoder().decode

VERSION = "0.32.0+tidegate.simulated"
"""What ``/version`` says: the vLLM whose API this follows, and that it is not it."""

_SLEEP_MODES = ("abort", "wait", "keep")


class Application:
    """The engine's state over its life. Made inside a running event loop."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
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

    def handle(self, exchange: HttpExchange) -> None:
        """Answer one request, now or when the engine is done with it."""
        try:
            self._route(exchange)
        except RequestError as error:
            anthropic = exchange.path.startswith("/v1/messages")
            body = error.anthropic() if anthropic else error.openai()
            exchange.respond(error.status, _encode(body))
        except Exception:
            logger.exception("%s %s failed", exchange.method, exchange.path)
            exchange.respond(500, _encode(RequestError(500, "Internal server error").openai()))

    def _route(self, exchange: HttpExchange) -> None:
        path = exchange.path
        if self.settings.request_id_headers:
            named = exchange.headers.get(b"x-request-id") or os.urandom(16).hex().encode()
            exchange.extra = b"x-request-id: %s\r\n" % named
        if self.phase is not None:
            raise RequestError(503, f"The engine is starting: {self.phase} (simulated).")
        if self._keys and path.startswith("/v1"):
            given = exchange.headers.get(b"authorization")
            if given not in self._keys and exchange.method != "OPTIONS":
                exchange.respond(401, b'{"error":"Unauthorized"}')
                return
        methods, endpoint = ROUTES.get(path, ((), None))
        if endpoint is None:
            exchange.respond(404, b'{"detail":"Not Found"}')
        elif exchange.method not in methods:
            exchange.extra += b"allow: %s\r\n" % ", ".join(methods).encode()
            exchange.respond(405, b'{"detail":"Method Not Allowed"}')
        else:
            endpoint(self, exchange)

    def _generate(self, exchange: HttpExchange, prepare: Prepare, cut: Fault | None) -> None:
        named = exchange.headers.get(b"x-request-id")
        request_id = named.decode("latin-1") if named else os.urandom(16).hex()
        context = replace(self.context, request_id=request_id, created_s=int(time.time()))
        generation = Generation(
            self.engine,
            exchange,
            prepare(self.body(exchange), context),
            cut_after_chunks=None if cut is None else cut.after_chunks,
            cut_by_reset=cut is not None and cut.how == "reset",
            ended=self._ended,
        )
        self.live.add(generation)
        try:
            generation.start()
        except QueueFullError as error:
            self.live.discard(generation)
            self.engine.metrics.refused += 1
            message = f"The engine is busy: {error}. Please try again later or elsewhere."
            raise RequestError(503, message) from error

    def _ended(self, generation: Generation) -> None:
        self.live.discard(generation)
        if not self.live:
            self._idle.set()

    def body(self, exchange: HttpExchange) -> dict[str, Any]:
        """The request's body as an object. Raises ``RequestError``."""
        try:
            body = _decode(exchange.body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise bad(f"The request body is not JSON: {error}.") from error
        if not isinstance(body, dict):
            raise bad("The request body must be a JSON object.")
        return body

    # Faults

    def generate(self, exchange: HttpExchange, prepare: Prepare) -> None:
        """Answer a request for a model's work, or fail as a fault says. Raises ``RequestError``."""
        fault = None
        if self.faults:
            fault = self.faults.hit("request", self.wall_s())
            self._apply_standing()  # holds for this request where those before were enough
            self.faults.count()
        if fault is None or fault.kind == "cut":
            self._generate(exchange, prepare, fault)
        elif fault.kind == "error500":
            raise RequestError(fault.status, "This error was asked for (simulated).")
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

    def run(self, exchange: HttpExchange, work: Coroutine[Any, Any, None], answer: bytes) -> None:
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


def health(app: Application, exchange: HttpExchange) -> None:
    """200 with nothing, or 503 where a fault says so."""
    if app.faults and app.faults.standing("unhealthy", app.wall_s()):
        raise RequestError(503, "Unhealthy, because a fault says so (simulated).")
    exchange.respond(200)


def version(app: Application, exchange: HttpExchange) -> None:
    """The version, and that it is a simulation."""
    exchange.respond(200, _encode({"version": VERSION, "simulated": True}))


def load(app: Application, exchange: HttpExchange) -> None:
    """How many requests are under way."""
    exchange.respond(200, _encode({"server_load": len(app.live)}))


def metrics(app: Application, exchange: HttpExchange) -> None:
    """Prometheus text."""
    body = app.engine.metrics.render(
        app.engine.scheduler,
        model_name=app.settings.served_models[0],
        sleep_level=app.sleep_level,
    )
    exchange.respond(200, body, b"text/plain; version=0.0.4; charset=utf-8")


def models(app: Application, exchange: HttpExchange) -> None:
    """What is served, in OpenAI's shape with vLLM's additions."""
    data: list[dict[str, Any]] = [
        {
            "id": name,
            "object": "model",
            "created": app.started_s,
            "owned_by": "vllm",
            "root": app.settings.model_path,
            "parent": None,
            "max_model_len": app.settings.model.max_model_len_tokens,
            "permission": [],
        }
        for name in app.settings.served_models
    ]
    exchange.respond(200, _encode({"object": "list", "data": data}))


def sleep(app: Application, exchange: HttpExchange) -> None:
    """Go to sleep at ``level`` 1 or 2. ``mode`` is what becomes of running requests."""
    given = exchange.parameters()
    level, mode = given.get("level", "1"), given.get("mode", "abort")
    if level not in ("1", "2"):
        raise bad(f"level must be 1 or 2, got {level!r}.", "level")
    if mode not in _SLEEP_MODES:
        raise bad(f"mode must be one of {', '.join(_SLEEP_MODES)}, got {mode!r}.", "mode")
    answer = {"status": "sleeping", "level": int(level)}
    app.run(exchange, app.fall_asleep(int(level), mode), _encode(answer))


def wake_up(app: Application, exchange: HttpExchange) -> None:
    """Wake up, whole: vLLM's ``tags`` are accepted and not told apart."""
    app.run(exchange, app.wake(), _encode({"status": "awake", "tags": None}))


def is_sleeping(app: Application, exchange: HttpExchange) -> None:
    """Whether it sleeps."""
    exchange.respond(200, _encode({"is_sleeping": app.sleep_level > 0}))


def reset_prefix_cache(app: Application, exchange: HttpExchange) -> None:
    """Forget every unused cached block."""
    app.engine.scheduler.blocks.forget()
    exchange.respond(200)


def faults(app: Application, exchange: HttpExchange) -> None:
    """GET: what is set. POST ``{"faults": ["KIND:…"]}``: set these in place of all others."""
    if exchange.method == "POST":
        texts = app.body(exchange).get("faults")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise bad("faults must be a list of strings.", "faults")
        try:
            app.arm(texts)
        except ValueError as error:
            raise bad(f"{error}.", "faults") from error
    answer = {"faults": app.faults.describe(), "kinds": KINDS, "triggers": TRIGGERS}
    exchange.respond(200, _encode(answer))


Endpoint = Callable[[Application, HttpExchange], None]


def _generated(prepare: Prepare) -> tuple[tuple[str, ...], Endpoint]:
    return ("POST",), lambda app, exchange: app.generate(exchange, prepare)


def _from_body(
    answer: Callable[[dict[str, Any], Context], dict[str, Any]],
) -> tuple[tuple[str, ...], Endpoint]:
    return ("POST",), lambda app, exchange: exchange.respond(
        200, _encode(answer(app.body(exchange), app.context))
    )


ROUTES: Mapping[str, tuple[tuple[str, ...], Endpoint]] = {
    "/v1/chat/completions": _generated(completions.prepare_chat),
    "/v1/completions": _generated(completions.prepare_completion),
    "/v1/responses": _generated(responses.prepare),
    "/v1/messages": _generated(messages.prepare),
    "/v1/embeddings": _generated(pooling.embeddings),
    **dict.fromkeys(("/v1/rerank", "/v2/rerank", "/rerank"), _generated(pooling.rerank)),
    **dict.fromkeys(("/v1/score", "/score"), _generated(pooling.score)),
    "/tokenize": _from_body(pooling.tokenize),
    "/detokenize": _from_body(pooling.detokenize),
    "/v1/messages/count_tokens": _from_body(messages.count_tokens),
    "/health": (("GET", "HEAD"), health),
    "/ping": (("GET", "POST"), health),
    "/version": (("GET",), version),
    "/load": (("GET",), load),
    "/metrics": (("GET",), metrics),
    "/v1/models": (("GET",), models),
    "/sleep": (("POST",), sleep),
    "/wake_up": (("POST",), wake_up),
    "/is_sleeping": (("GET",), is_sleeping),
    "/reset_prefix_cache": (("POST",), reset_prefix_cache),
    "/simulated/faults": (("GET", "POST"), faults),
}
"""Each path's methods and what answers it."""
