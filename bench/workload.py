"""Request bodies as OpenAI clients send them, and the request files the load generator reads."""

from __future__ import annotations

import json
import random
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

MODEL = "bench-model"

Order = Literal["messages-first", "model-first"]
"""Which key comes first. The ``openai`` Python client sends ``messages`` first, so a router that
wants the model must read past the whole prompt; curl examples and other clients send ``model``
first."""

_TEXT = (
    "tide gate harbour anchor sluice current water level engine token replica prompt answer stream "
    "measure count every second the a of and to in is was for with that this from by on at as it "
    "which one two three what does not when where how much many before after under over again"
)
_WORDS = tuple(_TEXT.split())

_SYSTEM = (
    "You are a careful assistant. Answer in plain words, say what you do not know, "
    'and write numbers with their units.\nNever use the word "synergy".'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What one kind of request looks like."""

    name: str
    prompt_bytes: int
    """Bytes of the user's message; the body is some 400 more."""
    variants: int = 64
    """Different bodies, asked for in turn. They share the system message, as real ones do."""
    stream: bool = False
    tokens: int = 16
    interval_ms: int = 0
    """Between two events of a stream; without ``stream``, how long the replica thinks."""
    order: Order = "messages-first"


def prompt(size_bytes: int, seed: int) -> str:
    """Words, sentences and paragraphs, ``size_bytes`` long, the same for the same seed."""
    rng = random.Random(seed)
    parts: list[str] = [f"Question {seed}:"]
    length = len(parts[0])
    while length < size_bytes:
        word = rng.choice(_WORDS)
        end = rng.random()
        word += "." if end < 0.06 else ".\n\n" if end < 0.07 else '"' if end < 0.08 else ""
        parts.append(word)
        length += len(word) + 1
    return " ".join(parts)[:size_bytes]


def body(shape: Shape, variant: int) -> bytes:
    """One JSON body."""
    messages = [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": prompt(shape.prompt_bytes, variant)},
    ]
    document: dict[str, Any] = (
        {"messages": messages, "model": MODEL}
        if shape.order == "messages-first"
        else {"model": MODEL, "messages": messages}
    )
    document |= {"max_tokens": shape.tokens, "seed": shape.interval_ms, "temperature": 0.7}
    if shape.stream:
        document |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


Headers = Literal["openai", "minimal"]
"""``openai``: what ``openai`` 2.x on CPython sends. ``minimal``: what HTTP and JSON need."""

_MINIMAL = "Content-Type: application/json\r\n"
_OPENAI = (
    "Accept-Encoding: gzip, deflate\r\n"
    "Connection: keep-alive\r\n"
    "Accept: application/json\r\n"
    "Content-Type: application/json\r\n"
    "User-Agent: OpenAI/Python 2.8.1\r\n"
    "X-Stainless-Lang: python\r\n"
    "X-Stainless-Package-Version: 2.8.1\r\n"
    "X-Stainless-OS: Linux\r\n"
    "X-Stainless-Arch: x64\r\n"
    "X-Stainless-Runtime: CPython\r\n"
    "X-Stainless-Runtime-Version: 3.11.7\r\n"
    "Authorization: Bearer bench-key\r\n"
    "X-Stainless-Async: false\r\n"
    "x-stainless-retry-count: 0\r\n"
    "x-stainless-read-timeout: 600\r\n"
)


def http_request(payload: bytes, *, headers: Headers = "openai") -> bytes:
    """The whole request, head and body."""
    lines = _OPENAI if headers == "openai" else _MINIMAL
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        f"{lines}Content-Length: {len(payload)}\r\n\r\n"
    )
    return head.encode() + payload


def prompt_tokens(body_bytes: int) -> int:
    """What a mock replica reports for a body of this size (``wire_prompt_tokens`` in wire.h)."""
    for limit_bytes, tokens in ((4096, 128), (65536, 8000), (500000, 55000)):
        if body_bytes < limit_bytes:
            return tokens
    return 220000


def write_requests(shape: Shape, path: Path, headers: Headers = "openai") -> int:
    """Write the load generator's file for ``shape``; returns the mean body size in bytes."""
    total = 0
    with path.open("wb") as file:
        file.write(b"TGB1" + struct.pack("<I", shape.variants))
        for variant in range(shape.variants):
            payload = body(shape, variant)
            total += len(payload)
            request = http_request(payload, headers=headers)
            file.write(
                struct.pack(
                    "<4I",
                    len(request),
                    int(shape.stream),
                    shape.tokens,
                    prompt_tokens(len(payload)),
                )
            )
            file.write(request)
    return total // shape.variants
