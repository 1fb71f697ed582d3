"""What the gateway reads of the OpenAI-shaped API: paths, and the few fields that route a body.

The body itself belongs to the engine. Only ``model``, ``stream`` and the output bound are read,
by a decoder that skips everything else, and of a large body only the first bytes.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from gateway.datapath.protocol.errors import ApiError, Reason

# Paths passed to the pool that the body's ``model`` names: vLLM's own, with the aliases it takes.
PROXIED: frozenset[bytes] = frozenset(
    {
        b"/v1/chat/completions",
        b"/v1/completions",
        b"/v1/embeddings",
        b"/v1/responses",
        b"/v1/messages",
        b"/v1/messages/count_tokens",
        b"/v1/rerank",
        b"/v2/rerank",
        b"/rerank",
        b"/v1/score",
        b"/score",
        b"/tokenize",
        b"/detokenize",
        b"/pooling",
        b"/classify",
    }
)

# Members of the top object that are plain values, up to "model". Anchored at the start, so a
# "model" inside a message can never match; possessive-free but linear, as members cannot overlap.
_PEEK = re.compile(
    rb'\s*\{(?:\s*"[^"\\]{0,64}"\s*:\s*(?:"[^"\\]{0,1024}"|-?[0-9][0-9.eE+-]{0,40}|true|false|null)\s*,)'
    rb'{0,64}?\s*"model"\s*:\s*("[^"\\]{0,1024}")\s*[,}]'
)

_Number = int | float | None


class Head(msgspec.Struct):
    """The routed fields of a body. ``output_bound`` is the request's own limit of output tokens."""

    model: str | None = None
    stream: bool | int | str | None = None
    max_tokens: _Number = None
    max_completion_tokens: _Number = None
    max_output_tokens: _Number = None

    def output_bound(self) -> int | None:
        """The smallest positive bound the request gives on its output, in tokens."""
        if self.max_completion_tokens is None and self.max_output_tokens is None:
            value = self.max_tokens
            return int(value) if value is not None and value > 0 else None
        values = (self.max_tokens, self.max_completion_tokens, self.max_output_tokens)
        return min(
            (int(value) for value in values if value is not None and value > 0), default=None
        )


_decode = msgspec.json.Decoder(Head).decode
_decode_raw = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_FIELD = re.compile(r"`\$\.?([^`]*)`")


def read_head(body: bytes | bytearray) -> Head:
    """The routed fields of a whole body. Raises ``ApiError`` 400 on JSON that is not an object,
    or a routed field of the wrong type, naming the field."""
    try:
        head = _decode(body)
    except msgspec.ValidationError as error:
        text = str(error)
        field = _FIELD.search(text)
        param = field[1] if field and field[1] else None
        raise ApiError(
            400, Reason.BAD_REQUEST, f"The request body is not valid: {text}.", param=param
        ) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(
            400, Reason.BAD_JSON, f"The request body is not valid JSON: {error}."
        ) from None
    if not head.model:
        raise ApiError(
            400,
            Reason.MODEL_MISSING,
            "The request body must name a model: set 'model' to one that GET /v1/models lists.",
            param="model",
        )
    return head


def peek_model(prefix: bytes | bytearray) -> tuple[str, int, int] | None:
    """The model named at the start of a body of which only a prefix is here, and where it stands.

    Returns (model, start, end) with ``prefix[start:end]`` the quoted JSON string, or ``None`` when
    it does not come before the first nested value: then the whole body must be read.
    """
    match = _PEEK.match(prefix)
    if match is None:
        return None
    try:
        model: Any = msgspec.json.decode(match[1])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return (model, match.start(1), match.end(1)) if model else None


def rewrite_model(body: bytes | bytearray, model: str) -> bytes:
    """The body with another ``model``; every other member keeps its bytes and its place.

    A body that passes ``read_head`` and still is not whole JSON (a key that is not UTF-8) is
    returned as it is: it is the engine's to refuse.
    """
    try:
        members = _decode_raw(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return bytes(body)
    members["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(members)


def quote_model(model: str) -> bytes:
    """A model name as a JSON string."""
    return msgspec.json.encode(model)


def model_list(names: list[tuple[str, str | None]], created_s: int) -> bytes:
    """``GET /v1/models``: (id, root) pairs; ``root`` is the pool an alias stands for."""
    return msgspec.json.encode(
        {"object": "list", "data": [model_card(name, root, created_s) for name, root in names]}
    )


def model_card(name: str, root: str | None, created_s: int) -> dict[str, Any]:
    """One model as OpenAI describes it."""
    return {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "tidegate",
        "root": root or name,
        "parent": None,
    }
