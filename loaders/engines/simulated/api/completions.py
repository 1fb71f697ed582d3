"""``/v1/completions``: OpenAI's older API, prompts in, text out."""

from __future__ import annotations

from typing import Any

import msgspec

from loaders.engines.simulated.api.bodies import bad, choices, flag, include_usage, sampling
from loaders.engines.simulated.api.context import (
    SYSTEM_FINGERPRINT,
    Context,
    PreparedRequest,
    usage,
)
from loaders.engines.simulated.generation import Generation
from loaders.engines.simulated.tokens import decode

_encode = msgspec.json.Encoder().encode
_DEFAULT_MAX_TOKENS = 16


def prompts_of(value: Any, name: str = "prompt") -> list[bytes]:
    """Prompts as OpenAI allows them: a text, token ids, or a list of either."""
    if isinstance(value, str):
        values: list[Any] = [value]
    elif isinstance(value, list) and value and all(_is_id(v) for v in value):
        values = [value]
    elif isinstance(value, list) and value:
        values = value
    else:
        raise bad(f"{name} must be a string, a list of strings, or token ids.", name)
    prompts = []
    for entry in values:
        if entry == "":
            raise bad(f"{name} must not be empty.", name)
        if isinstance(entry, str):
            prompts.append(entry.encode("utf-8", "surrogatepass"))
        elif isinstance(entry, list) and entry and all(_is_id(v) for v in entry):
            try:
                prompts.append(decode(entry))
            except ValueError as error:
                raise bad(f"{name}: {error}.", name) from error
        else:
            raise bad(f"{name} must be a string, a list of strings, or token ids.", name)
    return prompts


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def prepare(body: dict[str, Any], context: Context) -> PreparedRequest:
    """Read a completion request. Raises ``RequestError``."""
    model = context.model(body)
    prompts = prompts_of(body.get("prompt"))
    count = choices(body, len(prompts))
    answers = []
    for prompt in prompts:
        limits = sampling(
            body,
            prompt,
            max_model_len_tokens=context.max_model_len_tokens,
            default_max_tokens=_DEFAULT_MAX_TOKENS,
        )
        answers += [
            (prompt, context.speaker.answer(prompt, limits, choice=n)) for n in range(count)
        ]
    with_usage = include_usage(body)
    echo = flag(body, "echo")
    return PreparedRequest(
        answers=answers,
        wording=lambda generation: Completion(
            generation,
            context,
            model,
            echoes=[prompt.decode("utf-8", "replace") if echo else "" for prompt, _ in answers],
            prompts=len(prompts),
            with_usage=with_usage,
        ),
        stream=flag(body, "stream"),
    )


class Completion:
    """The wording of a completion, whole or in chunks."""

    def __init__(
        self,
        generation: Generation,
        context: Context,
        model: str,
        *,
        echoes: list[str],
        prompts: int,
        with_usage: bool,
    ) -> None:
        self._generation = generation
        self._echoes = echoes
        self._prompts = prompts
        self._with_usage = with_usage
        self._head_fields = {
            "id": f"cmpl-{context.request_id}",
            "object": "text_completion",
            "created": context.created_s,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._head = b"data: " + _encode(self._head_fields)[:-1] + b',"choices":['

    def _entry(self, choice: int, text: str, *, finished: bool) -> dict[str, Any]:
        answer = self._generation.answers[choice]
        return {
            "index": choice,
            "text": text,
            "logprobs": None,
            "finish_reason": answer.finish_reason if finished else None,
            "stop_reason": answer.stop_reason if finished else None,
        }

    def begin(self) -> list[bytes]:
        """Nothing before the first token, as vLLM."""
        return []

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """A chunk of text, with the finish reason in the last."""
        if first:
            text = self._echoes[choice] + text
        if not text and not last:
            return []
        return [self._head + _encode(self._entry(choice, text, finished=last)) + b"]}\n\n"]

    def end(self) -> list[bytes]:
        """The usage, where it was asked for, and ``[DONE]``."""
        done = b"data: [DONE]\n\n"
        if not self._with_usage:
            return [done]
        counts = _encode(usage(self._generation, self._prompts))
        return [self._head + b'],"usage":' + counts + b"}\n\n", done]

    def whole(self) -> bytes:
        """The answer as one object."""
        entries = [
            self._entry(n, self._echoes[n] + answer.text.decode("ascii"), finished=True)
            for n, answer in enumerate(self._generation.answers)
        ]
        counts = usage(self._generation, self._prompts)
        return _encode({**self._head_fields, "choices": entries, "usage": counts})
