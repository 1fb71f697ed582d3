"""The endpoints that are not for text: health, metrics, sleep and wake, faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from loaders.engines.simulated.api import messages, tokenizing
from loaders.engines.simulated.api.context import Context
from loaders.engines.simulated.api.errors import ApiError, bad
from loaders.engines.simulated.application import Application, Operations
from loaders.engines.simulated.exchange import Exchange
from loaders.engines.simulated.faults import KINDS, TRIGGERS

VERSION = "0.32.0+tidegate.simulated"
"""What ``/version`` says: the vLLM whose API this follows, and that it is not it."""

_SLEEP_MODES = ("abort", "wait", "keep")

_json = msgspec.json.encode


def health(app: Application, exchange: Exchange) -> None:
    """200 with nothing, or 503 where a fault says so."""
    if app.faults and app.faults.standing("unhealthy", app.wall_s()):
        raise ApiError(503, "Unhealthy, because a fault says so (simulated).")
    exchange.respond(200)


def version(app: Application, exchange: Exchange) -> None:
    """The version, and that it is a simulation."""
    exchange.respond(200, _json({"version": VERSION, "simulated": True}))


def load(app: Application, exchange: Exchange) -> None:
    """How many requests are under way."""
    exchange.respond(200, _json({"server_load": len(app.live)}))


def metrics(app: Application, exchange: Exchange) -> None:
    """Prometheus text."""
    body = app.engine.metrics.render(
        app.engine.scheduler,
        model_name=app.settings.served_models[0],
        sleep_level=app.sleep_level,
    )
    exchange.respond(200, body, b"text/plain; version=0.0.4; charset=utf-8")


def models(app: Application, exchange: Exchange) -> None:
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
    exchange.respond(200, _json({"object": "list", "data": data}))


def sleep(app: Application, exchange: Exchange) -> None:
    """Go to sleep at ``level`` 1 or 2. ``mode`` is what becomes of running requests."""
    given = exchange.parameters()
    level, mode = given.get("level", "1"), given.get("mode", "abort")
    if level not in ("1", "2"):
        raise bad(f"level must be 1 or 2, got {level!r}.", "level")
    if mode not in _SLEEP_MODES:
        raise bad(f"mode must be one of {', '.join(_SLEEP_MODES)}, got {mode!r}.", "mode")
    answer = {"status": "sleeping", "level": int(level)}
    app.run(exchange, app.fall_asleep(int(level), mode), _json(answer))


def wake_up(app: Application, exchange: Exchange) -> None:
    """Wake up, whole: vLLM's ``tags`` are accepted and not told apart."""
    app.run(exchange, app.wake(), _json({"status": "awake", "tags": None}))


def is_sleeping(app: Application, exchange: Exchange) -> None:
    """Whether it sleeps."""
    exchange.respond(200, _json({"is_sleeping": app.sleep_level > 0}))


def reset_prefix_cache(app: Application, exchange: Exchange) -> None:
    """Forget every unused cached block."""
    app.engine.scheduler.blocks.forget()
    exchange.respond(200)


def faults(app: Application, exchange: Exchange) -> None:
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
    exchange.respond(200, _json(answer))


def _from_body(
    answer: Callable[[dict[str, Any], Context], dict[str, Any]],
) -> Callable[[Application, Exchange], None]:
    def endpoint(app: Application, exchange: Exchange) -> None:
        exchange.respond(200, _json(answer(app.body(exchange), app.context)))

    return endpoint


ROUTES: Operations = {
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
    "/tokenize": (("POST",), _from_body(tokenizing.tokenize)),
    "/detokenize": (("POST",), _from_body(tokenizing.detokenize)),
    "/v1/messages/count_tokens": (("POST",), _from_body(messages.count_tokens)),
    "/simulated/faults": (("GET", "POST"), faults),
}
"""Each path's methods and what answers it."""
