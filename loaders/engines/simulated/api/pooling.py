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
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loaders.engines.simulated.api.answers import GeneratedText
from loaders.engines.simulated.api.bodies import (
    Content,
    Context,
    Positive,
    Reply,
    bad,
    read_body,
    text_of,
    too_long,
)
from loaders.engines.simulated.api.completions import Messages, Prompts, encode_prompts, render
from loaders.engines.simulated.tokens import decode, encode, token_count

_NOTHING = GeneratedText(text=b"", tokens=0, finish_reason="stop")
_MAX_INPUTS = 2048


class ContentItem(msgspec.Struct):
    """A text as the parts of a message have it."""

    content: Content = None


Texts = str | ContentItem | Annotated[list[str | ContentItem], Meta(min_length=1)]


class PoolingRequest(msgspec.Struct, kw_only=True):
    """The body of a request to any of these endpoints; each reads its own fields."""

    model: str | None = None
    input: Prompts | None = None
    messages: Messages | None = None
    dimensions: Positive | None = None
    encoding_format: Literal["float", "base64"] | None = None
    query: Texts | None = None
    top_n: Annotated[int, Meta(ge=0)] | None = None
    text_1: Texts | None = None
    queries: Texts | None = None
    text_2: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    prompt: str | None = None
    tools: list[dict[str, Any]] | None = None
    return_token_strs: bool | None = None
    tokens: list[int] | None = None


class Pooled(Reply):
    """A reply that comes all at once: ``build`` makes it, of the tokens counted, when all is
    computed."""

    def __init__(
        self,
        context: Context,
        model: str,
        prompts: list[bytes],
        build: Callable[[dict[str, int]], dict[str, Any]],
    ) -> None:
        if len(prompts) > _MAX_INPUTS:
            raise bad(f"At most {_MAX_INPUTS} inputs to a request, not {len(prompts)}.", "input")
        for prompt in prompts:
            if token_count(prompt) > context.max_model_len_tokens:
                raise too_long(context.max_model_len_tokens, token_count(prompt), 0)
        super().__init__(context, model, [(prompt, _NOTHING) for prompt in prompts])
        self._build = build

    def whole(self) -> bytes:
        """The reply as one object."""
        count = sum(sequence.prompt_tokens for sequence in self.sequences)
        return msgspec.json.encode(self._build({"prompt_tokens": count, "total_tokens": count}))


def vector(text: bytes, size: int) -> list[float]:
    """A vector of length 1 that only ``text`` has."""
    rng = random.Random(zlib.crc32(text))
    values = [rng.gauss(0, 1) for _ in range(size)]
    length = math.sqrt(sum(v * v for v in values)) or 1.0
    return [round(v / length, 7) for v in values]


def embeddings(body: dict[str, Any], context: Context) -> Reply:
    """Read a request to ``/v1/embeddings``. Raises ``RequestError``."""
    request = read_body(body, PoolingRequest)
    model = context.model(request.model)
    if request.messages is not None:
        prompts = [render(request.messages)]
    elif request.input is not None:
        prompts = encode_prompts(request.input, "input")
    else:
        raise bad("Either input or messages is needed.", "input")
    size = request.dimensions or context.embedding_size
    if size > context.embedding_size:
        raise bad(f"dimensions must be at most {context.embedding_size}, got {size}.", "dimensions")

    def build(counts: dict[str, int]) -> dict[str, Any]:
        data = []
        for index, prompt in enumerate(prompts):
            value: Any = vector(prompt, size)
            if request.encoding_format == "base64":
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

    return Pooled(context, model, prompts, build)


def similarity(one: str, other: str) -> float:
    """0..1: the share of words in common, and up to 0.01 of noise."""
    words, others = set(one.lower().split()), set(other.lower().split())
    union = words | others
    share = len(words & others) / len(union) if union else 0.0
    noise = zlib.crc32(f"{one}\0{other}".encode("utf-8", "replace")) / (1 << 32)
    return round(0.99 * share + 0.01 * noise, 6)


def _read_texts(given: Texts | None, name: str) -> list[str]:
    if given is None:
        raise bad(f"{name} must be a text or a list of texts.", name)
    items = given if isinstance(given, list) else [given]
    return [i if isinstance(i, str) else text_of(i.content, name) for i in items]


def _pair_prompts(pairs: Sequence[tuple[str, str]]) -> list[bytes]:
    return [f"{one}\n{other}".encode("utf-8", "replace") for one, other in pairs]


def rerank(body: dict[str, Any], context: Context) -> Reply:
    """Read a request to ``/v1/rerank``. Raises ``RequestError``."""
    request = read_body(body, PoolingRequest)
    model = context.model(request.model)
    query = _read_texts(request.query, "query")[0]
    documents = _read_texts(request.documents, "documents")

    def build(counts: dict[str, int]) -> dict[str, Any]:
        scores = [similarity(query, document) for document in documents]
        order = sorted(range(len(documents)), key=lambda index: -scores[index])
        results = [
            {
                "index": index,
                "document": {"text": documents[index], "multi_modal": None},
                "relevance_score": scores[index],
            }
            for index in order[: request.top_n or len(documents)]
        ]
        return {
            "id": f"rerank-{context.request_id}",
            "model": model,
            "usage": counts,
            "results": results,
        }

    return Pooled(context, model, _pair_prompts([(query, one) for one in documents]), build)


def score(body: dict[str, Any], context: Context) -> Reply:
    """Read a request to ``/v1/score``: one text with one or many, or pairs."""
    request = read_body(body, PoolingRequest)
    model = context.model(request.model)
    ones = _read_texts(request.queries or request.text_1, "text_1")
    others = _read_texts(request.documents or request.items or request.text_2, "text_2")
    if len(ones) == 1:
        ones = ones * len(others)
    if len(ones) != len(others):
        raise bad("text_1 and text_2 must be one and many, or of the same length.", "text_2")
    pairs = list(zip(ones, others, strict=True))

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

    return Pooled(context, model, _pair_prompts(pairs), build)


def tokenize(body: dict[str, Any], context: Context) -> dict[str, Any]:
    """The tokens of a prompt or of a conversation. Raises ``RequestError``."""
    request = read_body(body, PoolingRequest)
    context.model(request.model)
    if request.messages is not None:
        text = render(request.messages, request.tools)
    elif request.prompt is not None:
        text = request.prompt.encode("utf-8", "surrogatepass")
    else:
        raise bad("Either prompt (a string) or messages is needed.", "prompt")
    ids = encode(text)
    pieces = [decode([token]).decode("utf-8", "replace") for token in ids]
    return {
        "count": len(ids),
        "max_model_len": context.max_model_len_tokens,
        "tokens": ids,
        "token_strs": pieces if request.return_token_strs else None,
    }


def detokenize(body: dict[str, Any], context: Context) -> dict[str, Any]:
    """The text of token ids. Raises ``RequestError``."""
    request = read_body(body, PoolingRequest)
    context.model(request.model)
    if request.tokens is None:
        raise bad("tokens (a list of integers) is needed.", "tokens")
    try:
        text = decode(request.tokens)
    except ValueError as error:
        raise bad(f"{error}.", "tokens") from error
    return {"prompt": text.replace(b"\0", b"").decode("utf-8", "replace")}
