"""Locust user that speaks streaming chat to an OpenAI-compatible endpoint.

    locust -f bench/locustfile.py --headless -u 20 -r 10 -t 60s \\
           --host http://127.0.0.1:8000 --model smollm2

Locust's own statistics then carry, beside the whole answer (``chat``):

- ``TTFT``: request sent to first token, in milliseconds
- ``ITL``: every gap between two tokens, in milliseconds
- ``tokens/s``: of one answer, from its first token on; the number stands in the column that
  Locust labels milliseconds

A chat fails on a status other than 200, on a stream that ends without ``[DONE]``, and on an error
event inside a stream. With ``--figures FILE`` exact quantiles are written when the test stops
(Locust's own are rounded). Locust replaces the standard library's sockets, so this file runs in
Locust's process only.
"""

from __future__ import annotations

import http.client
import json
import random
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment

MAX_VALUES = 500_000
"""Exact values kept per figure; a run that makes more keeps the first."""
REQUEST_TIMEOUT_S = 300

_TEXT = "tide gate harbour anchor sluice water level engine token answer stream second"
_WORDS = tuple(_TEXT.split())

values: dict[str, list[float]] = {"ttft_s": [], "itl_s": [], "e2e_s": [], "tokens_per_s": []}
counts = {"answered": 0, "failed": 0, "tokens": 0, "held_comments": 0}
reasons: dict[str, int] = {}


def _options(parser: LocustArgumentParser) -> None:
    parser.add_argument("--model", default="simulated", help="what goes into `model`")
    parser.add_argument("--prompt-words", type=int, default=120, help="mean length of a prompt")
    parser.add_argument("--output-tokens", type=int, default=64, help="max_tokens of a chat")
    parser.add_argument("--think-s", type=float, default=0.5, help="mean pause of a user")
    parser.add_argument("--api-key", default="", help="sent as a bearer token, if given")
    parser.add_argument("--figures", default="", help="write exact quantiles to this JSON file")


class ChatFailedError(Exception):
    """The answer was not whole; the message says what came instead."""


def _keep(name: str, value: float) -> None:
    if len(values[name]) < MAX_VALUES:
        values[name].append(value)


class ChatUser(User):
    """Asks, reads the stream to its end, thinks, asks again on the same connection."""

    def on_start(self) -> None:
        parts = urlsplit(self.host or self.environment.host or "http://127.0.0.1:8000")
        self.connection = http.client.HTTPConnection(
            parts.hostname or "127.0.0.1", parts.port or 80, timeout=REQUEST_TIMEOUT_S
        )
        self.rng = random.Random()

    def on_stop(self) -> None:
        self.connection.close()

    def wait_time(self) -> float:
        mean_s: float = self.environment.parsed_options.think_s
        return self.rng.expovariate(1 / mean_s) if mean_s > 0 else 0.0

    def _fire(self, kind: str, value: float, length: int = 0, error: Any = None) -> None:
        self.environment.events.request.fire(
            request_type=kind, name="chat", response_time=value, response_length=length,
            exception=error, context={},
        )  # fmt: skip

    @task
    def chat(self) -> None:
        began_s = time.perf_counter()
        try:
            received = self._stream(began_s)
        except (OSError, http.client.HTTPException, ChatFailedError, ValueError) as error:
            self.connection.close()
            counts["failed"] += 1
            reason = f"{type(error).__name__}: {error}"[:200]
            reasons[reason] = reasons.get(reason, 0) + 1
            self._fire("answer", (time.perf_counter() - began_s) * 1e3, error=error)
            return
        counts["answered"] += 1
        took_s = time.perf_counter() - began_s
        _keep("e2e_s", took_s)
        self._fire("answer", took_s * 1e3, length=received)

    def _body(self) -> bytes:
        options = self.environment.parsed_options
        count = max(1, int(self.rng.expovariate(1 / options.prompt_words)))
        prompt = " ".join(self.rng.choice(_WORDS) for _ in range(min(count, 20_000)))
        return json.dumps(
            {
                "model": options.model,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": options.output_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()

    def _stream(self, began_s: float) -> int:
        """One chat; returns bytes received. Raises when it is not whole."""
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        key = self.environment.parsed_options.api_key
        if key:
            headers["authorization"] = f"Bearer {key}"
        self.connection.request("POST", "/v1/chat/completions", self._body(), headers)
        answer = self.connection.getresponse()
        if answer.status != 200:
            raise ChatFailedError(f"{answer.status} {answer.read(300).decode(errors='replace')}")
        first_s = last_s = 0.0
        tokens = received = 0
        done = False
        while line := answer.readline():
            received += len(line)
            if line.startswith(b":"):
                counts["held_comments"] += 1
            elif line.startswith(b"data: [DONE]"):
                done = True
            elif line.startswith(b"data:"):
                event = json.loads(line[5:])
                if "error" in event:
                    raise ChatFailedError(f"error event: {event['error']}"[:200])
                if not any(c.get("delta", {}).get("content") for c in event["choices"]):
                    continue
                now_s = time.perf_counter()
                if tokens:
                    _keep("itl_s", now_s - last_s)
                    self._fire("ITL", (now_s - last_s) * 1e3)
                else:
                    first_s = now_s
                    _keep("ttft_s", now_s - began_s)
                    self._fire("TTFT", (now_s - began_s) * 1e3)
                last_s = now_s
                tokens += 1
        if not done:
            raise ChatFailedError("stream ended without [DONE]")
        counts["tokens"] += tokens
        if tokens > 1 and last_s > first_s:
            rate = (tokens - 1) / (last_s - first_s)
            _keep("tokens_per_s", rate)
            self._fire("tokens/s", rate)
        return received


def _quantiles(numbers: list[float]) -> dict[str, float]:
    ordered = sorted(numbers)
    if not ordered:
        return {"count": 0}
    at = {q: ordered[min(len(ordered) - 1, int(q * len(ordered)))] for q in (0.5, 0.9, 0.99)}
    mean = sum(ordered) / len(ordered)
    return {"count": len(ordered), "mean": mean, "p50": at[0.5], "p90": at[0.9], "p99": at[0.99],
            "max": ordered[-1]}  # fmt: skip


def _write_figures(environment: Environment, **_: Any) -> None:
    path = getattr(environment.parsed_options, "figures", "")
    if path:
        made: dict[str, Any] = {name: _quantiles(numbers) for name, numbers in values.items()}
        Path(path).write_text(json.dumps(made | {"counts": counts, "failures": reasons}, indent=1))


events.init_command_line_parser.add_listener(_options)
events.test_stop.add_listener(_write_figures)
