"""``/tokenize`` and ``/detokenize``: what the simulated tokenizer makes of a text, and back."""

from __future__ import annotations

from typing import Any

from loaders.engines.simulated.api import chat
from loaders.engines.simulated.api.bodies import flag
from loaders.engines.simulated.api.context import Context
from loaders.engines.simulated.api.errors import bad
from loaders.engines.simulated.tokens import decode, encode


def tokenize(body: dict[str, Any], context: Context) -> dict[str, Any]:
    """The tokens of a prompt or of a conversation. Raises ``ApiError``."""
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
    """The text of token ids. Raises ``ApiError``."""
    context.model(body)
    ids = body.get("tokens")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise bad("tokens must be a list of integers.", "tokens")
    try:
        return {"prompt": decode(ids).replace(b"\0", b"").decode("utf-8", "replace")}
    except ValueError as error:
        raise bad(f"{error}.", "tokens") from error
