"""Requests answered from the prompt alone: embeddings, rerank, score, and the tokens of a text.

The first three pass through the engine as prompts without an answer. The vectors are noise from the
text's hash, of length 1; the scores are the share of words that two texts have in common, with a
little noise against ties.
"""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from loaders.engines.simulated.api import chat
from loaders.engines.simulated.api.answers import GeneratedText
from loaders.engines.simulated.api.bodies import MAX_CHOICES, bad, flag, integer, text_of, too_long
from loaders.engines.simulated.api.completions import prompts_of
from loaders.engines.simulated.api.context import Context, PreparedRequest
from loaders.engines.simulated.generation import Generation
from loaders.engines.simulated.tokens import decode, encode, render_chat, token_count

_NOTHING = GeneratedText(text=b"", tokens=0, finish_reason="stop")
_MAX_INPUTS = 2048


class Pooled:
    """The wording of an answer that comes all at once: ``build`` makes it when all is computed."""

    def __init__(self, build: Callable[[], dict[str, Any]]) -> None:
        self._build = build

    def begin(self) -> list[bytes]:
        """Never streamed."""
        return []

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """Never streamed."""
        return []

    def end(self) -> list[bytes]:
        """Never streamed."""
        return []

    def whole(self) -> bytes:
        """The answer as one object."""
        return msgspec.json.encode(self._build())


def _prepared(
    prompts: list[bytes],
    context: Context,
    build: Callable[[dict[str, int]], dict[str, Any]],
) -> PreparedRequest:
    if len(prompts) > _MAX_INPUTS:
        raise bad(f"At most {_MAX_INPUTS} inputs to a request, not {len(prompts)}.", "input")
    for prompt in prompts:
        if token_count(prompt) > context.max_model_len_tokens:
            raise too_long(context.max_model_len_tokens, token_count(prompt), 0)

    def wording(generation: Generation) -> Pooled:
        count = sum(sequence.prompt_tokens for sequence in generation.sequences)
        counts = {"prompt_tokens": count, "total_tokens": count}
        return Pooled(lambda: build(counts))

    return PreparedRequest(answers=[(prompt, _NOTHING) for prompt in prompts], wording=wording)


def vector(text: bytes, size: int) -> list[float]:
    """A vector of length 1 that only ``text`` has."""
    rng = random.Random(zlib.crc32(text))
    values = [rng.gauss(0, 1) for _ in range(size)]
    length = math.sqrt(sum(v * v for v in values)) or 1.0
    return [round(v / length, 7) for v in values]


def embeddings(body: dict[str, Any], context: Context) -> PreparedRequest:
    """Read a request to ``/v1/embeddings``. Raises ``RequestError``."""
    model = context.model(body)
    if body.get("messages") is not None:
        turns = body["messages"]
        if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
            raise bad("messages must be a list of objects.", "messages")
        texts = [(str(t.get("role")), text_of(t.get("content"), "messages")) for t in turns]
        prompts = [render_chat(texts)]
    else:
        prompts = prompts_of(body.get("input"), "input")
    size = integer(body, "dimensions", least=1) or context.embedding_size
    if size > context.embedding_size:
        raise bad(f"dimensions must be at most {context.embedding_size}, got {size}.", "dimensions")
    encoding = body.get("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise bad("encoding_format must be float or base64.", "encoding_format")

    def build(counts: dict[str, int]) -> dict[str, Any]:
        data = []
        for index, prompt in enumerate(prompts):
            value: Any = vector(prompt, size)
            if encoding == "base64":
                value = base64.b64encode(struct.pack(f"<{size}f", *value)).decode()
            data.append({"index": index, "object": "embedding", "embedding": value})
        return {
            "id": f"embd-{context.request_id}",
            "object": "list",
            "created": context.created_s,
            "model": model,
            "data": data,
            "usage": {**counts, "completion_tokens": 0, "prompt_tokens_details": None},
        }

    return _prepared(prompts, context, build)


def similarity(one: str, other: str) -> float:
    """0..1: the share of words in common, and up to 0.01 of noise."""
    words, others = set(one.lower().split()), set(other.lower().split())
    union = words | others
    share = len(words & others) / len(union) if union else 0.0
    noise = zlib.crc32(f"{one}\0{other}".encode("utf-8", "replace")) / (1 << 32)
    return round(0.99 * share + 0.01 * noise, 6)


def _texts(value: Any, name: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    texts = [text_of(v.get("content") if isinstance(v, Mapping) else v, name) for v in values]
    if value is None or not texts:
        raise bad(f"{name} must be a text or a list of texts.", name)
    return texts


def rerank(body: dict[str, Any], context: Context) -> PreparedRequest:
    """Read a request to ``/v1/rerank``. Raises ``RequestError``."""
    model = context.model(body)
    query = _texts(body.get("query"), "query")[0]
    documents = _texts(body.get("documents"), "documents")
    top = integer(body, "top_n") or len(documents)
    prompts = [f"{query}\n{document}".encode("utf-8", "replace") for document in documents]

    def build(counts: dict[str, int]) -> dict[str, Any]:
        results = [
            {
                "index": index,
                "document": {"text": document, "multi_modal": None},
                "relevance_score": similarity(query, document),
            }
            for index, document in enumerate(documents)
        ]
        results.sort(key=lambda result: -float(result["relevance_score"]))  # type: ignore[arg-type]
        return {
            "id": f"rerank-{context.request_id}",
            "model": model,
            "usage": counts,
            "results": results[:top],
        }

    return _prepared(prompts, context, build)


def score(body: dict[str, Any], context: Context) -> PreparedRequest:
    """Read a request to ``/v1/score``: one text with one or many, or pairs."""
    model = context.model(body)
    first = "queries" if "queries" in body else "text_1"
    second = next((n for n in ("documents", "items") if n in body), "text_2")
    ones, others = _texts(body.get(first), first), _texts(body.get(second), second)
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise bad(f"{first} and {second} must be one and many, or of the same length.", second)
    if len(ones) > MAX_CHOICES * 16:
        raise bad(f"At most {MAX_CHOICES * 16} pairs to a request.", second)
    pairs = list(zip(ones, others, strict=True))
    prompts = [f"{one}\n{other}".encode("utf-8", "replace") for one, other in pairs]

    def build(counts: dict[str, int]) -> dict[str, Any]:
        return {
            "id": f"score-{context.request_id}",
            "object": "list",
            "created": context.created_s,
            "model": model,
            "data": [
                {"index": index, "object": "score", "score": similarity(one, other)}
                for index, (one, other) in enumerate(pairs)
            ],
            "usage": counts,
        }

    return _prepared(prompts, context, build)


def tokenize(body: dict[str, Any], context: Context) -> dict[str, Any]:
    """The tokens of a prompt or of a conversation. Raises ``RequestError``."""
    context.model(body)
    if "messages" in body:
        text = chat.prompt_of(body)
    elif isinstance(body.get("prompt"), str):
        text = body["prompt"].encode("utf-8", "surrogatepass")
    else:
        raise bad("Either prompt (a string) or messages is needed.", "prompt")
    ids = encode(text)
    pieces = [decode([token]).decode("utf-8", "replace") for token in ids]
    return {
        "count": len(ids),
        "max_model_len": context.max_model_len_tokens,
        "tokens": ids,
        "token_strs": pieces if flag(body, "return_token_strs") else None,
    }


def detokenize(body: dict[str, Any], context: Context) -> dict[str, Any]:
    """The text of token ids. Raises ``RequestError``."""
    context.model(body)
    ids = body.get("tokens")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise bad("tokens must be a list of integers.", "tokens")
    try:
        return {"prompt": decode(ids).replace(b"\0", b"").decode("utf-8", "replace")}
    except ValueError as error:
        raise bad(f"{error}.", "tokens") from error
