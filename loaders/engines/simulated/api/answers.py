"""What the simulated engine says: text made from a seed, the same for the same request. Pure.

The text is words from a fixed list, four bytes a token, so that the tokenizer counts in it exactly
the tokens that were generated. Which words, and after how many the answer ends by itself, follow
from the prompt and the seed. Nothing is understood: it is filler of a known length.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loaders.engines.simulated.tokens import BYTES_PER_TOKEN, token_count

# A word and its space are one or two whole tokens: three letters or seven.
_WORDS = """
the and but now low ebb sea bay tug oar net cod eel fog sun sky red wet dry far old new how why not
current harbour channel rolling tideway sailing morning evening against through between lantern
fishing anchors beneath without another outward drifted shallow distant quietly her our who yet for
ten six one two all any can may has was its his
"""
_RING_TOKENS = 8192
_SCHEMA_DEPTH = 8


def _make_ring() -> tuple[bytes, tuple[int, ...]]:
    rng = random.Random(20_26_11)
    words = _WORDS.split()
    pieces: list[bytes] = []
    starts = []
    at = 0
    while at < _RING_TOKENS:
        word = rng.choice(words).encode() + b" "
        starts.append(at)
        pieces.append(word)
        at += len(word) // BYTES_PER_TOKEN
    return b"".join(pieces), tuple(starts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How long an answer may be and what ends it, as the request asks. Counts in tokens."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    """One whole answer, known before its first token is generated.

    ``text`` is ASCII; token ``k`` (from 0) shows ``text[4k:4k+4]``, which is empty where a stop
    string cut it. ``finish_reason`` is ``stop``, ``length`` or ``tool_calls``; ``tool`` is the
    function called, whose arguments ``text`` then is.
    """

    text: bytes
    tokens: int
    finish_reason: str
    stop_reason: str | None = None
    tool: str | None = None


class Speaker:
    """Makes answers. ``mean_tokens`` ± ``spread_fraction`` is where answers end by themselves."""

    def __init__(self, *, mean_tokens: int, spread_fraction: float, seed: int) -> None:
        self._ring, self._starts = _make_ring()
        self._mean = mean_tokens
        self._spread = spread_fraction
        self._seed = seed

    def answer(self, prompt: bytes, sampling: Sampling, *, choice: int = 0) -> GeneratedText:
        """The answer to ``prompt``; ``choice`` numbers several answers to the same one."""
        mixed = zlib.crc32(b"%d,%d,%d" % (self._seed, sampling.seed, choice), zlib.crc32(prompt))
        share = (mixed >> 8) / (1 << 24) * 2 - 1
        natural = max(1, round(self._mean * (1 + self._spread * share)), sampling.min_tokens)
        tokens = sampling.max_tokens
        if not sampling.ignore_eos:
            tokens = min(tokens, natural)
        reason = "stop" if tokens == natural and not sampling.ignore_eos else "length"
        text = self._words(self._starts[mixed % len(self._starts)], tokens)
        if reason == "stop" and text.endswith(b" "):
            text = text[:-1] + b"."
        return _cut_at_stop(text, tokens, reason, sampling)

    def _words(self, start: int, tokens: int) -> bytes:
        begin, end = start * BYTES_PER_TOKEN, (start + tokens) * BYTES_PER_TOKEN
        ring = self._ring
        if end > len(ring):
            ring = ring * (end // len(ring) + 1)
        return ring[begin:end]


def _cut_at_stop(text: bytes, tokens: int, reason: str, sampling: Sampling) -> GeneratedText:
    first, found = len(text), None
    for stop in sampling.stop:
        at = text.find(stop.encode("utf-8", "replace"), max(0, sampling.min_tokens - 1) * 4)
        if stop and 0 <= at < first:
            first, found = at, stop
    if found is None:
        return GeneratedText(text=text, tokens=tokens, finish_reason=reason)
    end = first + len(found)
    return GeneratedText(
        text=text[: end if sampling.include_stop else first],
        tokens=token_count(text[:end]),
        finish_reason="stop",
        stop_reason=found,
    )


def structured(value: Any, sampling: Sampling, *, tool: str | None = None) -> GeneratedText:
    """An answer that is the JSON of ``value``: a tool call's arguments, or structured output."""
    text = json.dumps(value, separators=(", ", ": ")).encode("ascii")
    tokens = max(1, token_count(text))
    if tokens > sampling.max_tokens:
        text, tokens = text[: sampling.max_tokens * BYTES_PER_TOKEN], sampling.max_tokens
        return GeneratedText(text=text, tokens=tokens, finish_reason="length", tool=tool)
    return GeneratedText(
        text=text, tokens=tokens, finish_reason="tool_calls" if tool else "stop", tool=tool
    )


def instance_of(schema: Any, root: Any = None, depth: int = 0) -> Any:
    """A small value that fits a JSON schema, as far as types, enums and required fields say."""
    root = schema if root is None else root
    if not isinstance(schema, Mapping) or depth > _SCHEMA_DEPTH:
        return None
    if isinstance(reference := schema.get("$ref"), str):
        return instance_of(_resolve(root, reference), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    for key in ("enum", "examples"):
        if isinstance(schema.get(key), Sequence) and schema[key]:
            return schema[key][0]
    if "default" in schema:
        return schema["default"]
    for key in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(key), Sequence) and schema[key]:
            return instance_of(schema[key][0], root, depth + 1)
    return _instance_of_type(schema, root, depth)


def _instance_of_type(schema: Mapping[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind == "object" or (kind is None and "properties" in schema):
        fields = schema.get("properties")
        fields = fields if isinstance(fields, Mapping) else {}
        wanted = schema.get("required")
        names = [n for n in wanted if n in fields] if isinstance(wanted, list) else list(fields)
        return {name: instance_of(fields[name], root, depth + 1) for name in names}
    if kind == "array":
        least = schema.get("minItems")
        count = min(least, 16) if isinstance(least, int) and least > 0 else 1
        return [instance_of(schema.get("items"), root, depth + 1)] * count
    if kind in ("integer", "number"):
        least = schema.get("minimum")
        return least if isinstance(least, int | float) else 1
    if kind == "boolean":
        return True
    if kind == "null":
        return None
    return "simulated"


def _resolve(root: Any, reference: str) -> Any:
    found = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
