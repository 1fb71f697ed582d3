"""What every API of the simulated engine is given to read a request and word its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec

from loaders.engines.simulated.api.answers import GeneratedText, Speaker
from loaders.engines.simulated.api.bodies import unknown_model
from loaders.engines.simulated.generation import Format, Generation

_encode = msgspec.json.Encoder().encode


def named_event(fields: dict[str, Any]) -> bytes:
    """One event, named by its ``type``."""
    return b"event: %s\ndata: %s\n\n" % (str(fields["type"]).encode(), _encode(fields))


SYSTEM_FINGERPRINT = "simulated"
"""The ``system_fingerprint`` of every answer: a client can see what it talks to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The engine as one request sees it."""

    served_models: tuple[str, ...]
    max_model_len_tokens: int
    speaker: Speaker
    embedding_size: int
    request_id: str = ""
    created_s: int = 0

    def model(self, body: dict[str, Any]) -> str:
        """The model that ``body`` asks for, or the one served. Raises the 404."""
        name = body.get("model")
        if name is None or name == "":
            return self.served_models[0]
        if name not in self.served_models:
            raise unknown_model(name, self.served_models)
        return str(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that was read: prompts with their answers, and who words them."""

    answers: list[tuple[bytes, GeneratedText]]
    wording: Callable[[Generation], Format]
    stream: bool = False


class Prepare(Protocol):
    """Reads the body of one API's request. Raises ``RequestError``."""

    def __call__(self, body: dict[str, Any], context: Context) -> PreparedRequest:
        """The request, ready to be submitted."""


def usage(generation: Generation, prompts: int) -> dict[str, Any]:
    """OpenAI's usage of a generation of ``prompts`` prompts, each counted once."""
    sequences = generation.sequences
    each = len(sequences) // prompts
    prompt = sum(sequence.prompt_tokens for sequence in sequences[::each])
    output = sum(sequence.produced for sequence in sequences)
    cached = sum(sequence.cached_tokens for sequence in sequences[::each])
    return {
        "prompt_tokens": prompt,
        "total_tokens": prompt + output,
        "completion_tokens": output,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
