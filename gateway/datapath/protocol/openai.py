"""What the gateway reads of the OpenAI-shaped API: paths, and the few fields that route a body.

The body itself belongs to the engine. Only ``model``, ``stream`` and the output bound are read,
by a decoder that skips everything else, and of a large body only the first bytes.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from router.types import Pool

# Paths passed to the pool that the body's ``model`` names: what vLLM serves, with the aliases it
# takes, and what servers of speech and pictures serve, in JSON or in forms.
TAKES_JSON: frozenset[bytes] = frozenset(
    {
        b"/v1/chat/completions",
        b"/v1/chat/completions/batch",
        b"/v1/chat/completions/render",
        b"/v1/chat/completions/derender",
        b"/v1/completions",
        b"/v1/completions/render",
        b"/v1/completions/derender",
        b"/v1/responses",
        b"/v1/responses/render",
        b"/v1/messages",
        b"/v1/messages/count_tokens",
        b"/v1/messages/render",
        b"/v1/embeddings",
        b"/v2/embed",
        b"/v1/rerank",
        b"/v2/rerank",
        b"/rerank",
        b"/v1/score",
        b"/score",
        b"/generative_scoring",
        b"/pooling",
        b"/classify",
        b"/tokenize",
        b"/detokenize",
        b"/inference/v1/generate",
        b"/invocations",
        b"/cohere/v2/chat",
    }
)
PROXIED: frozenset[bytes] = TAKES_JSON | {
    b"/v1/audio/speech",
    b"/v1/audio/transcriptions",
    b"/v1/audio/translations",
    b"/v1/images/generations",
    b"/v1/images/edits",
    b"/v1/images/variations",
}

_SLASHES: Final = re.compile(rb"/{2,}")


def plain_path(path: bytes) -> bytes:
    """A path without stray slashes, which base URLs that end in one lead to."""
    return _SLASHES.sub(b"/", path).rstrip(b"/") or b"/"


class _Name:
    """Stands in a ``Head`` for the model's name."""


_NAME: Final = _Name()


class Head(msgspec.Struct):
    """The routed fields of a body, as the client wrote them; the model's name is beside it."""

    model: _Name = _NAME
    stream: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    stream_options: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET  # not decoded


_names: list[Any] = []


def _keep_name(_kind: type, value: Any) -> _Name:
    """The decoder found a member ``model``, however that is spelt."""
    _names.append(value)
    return _NAME


_decode = msgspec.json.Decoder(Head, dec_hook=_keep_name).decode


def read_head(body: bytes) -> tuple[str, Head] | None:
    """Model and routed fields of a small JSON body; ``None`` where it is out of the ordinary, and
    ``bodies.read_json`` has to look at it: not valid, no model, or more than one."""
    _names.clear()
    try:
        head = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if len(_names) != 1 or type(_names[0]) is not str or not _names[0]:
        return None
    return _names[0], head


def model_card(name: str, pool: Pool, created_s: int) -> dict[str, Any]:
    """One model as OpenAI and vLLM describe it. ``root`` is the pool that an alias stands for,
    ``parent`` the one whose model an adapter was made for."""
    is_adapter = name in pool.adapters
    card: dict[str, Any] = {
        "id": name,
        "object": "model",
        "created": created_s,
        "owned_by": "tidegate",
        "root": name if is_adapter else pool.name,
        "parent": pool.name if is_adapter else None,
    }
    if pool.max_model_len_tokens is not None:
        card["max_model_len"] = pool.max_model_len_tokens
    return card
