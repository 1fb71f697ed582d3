"""``/v1/completions``: OpenAI's older API, prompts in, text out."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from loaders.engines.simulated.api.bodies import TextRequest, bad, read_body
from loaders.engines.simulated.api.chat import ChoicesFormat
from loaders.engines.simulated.generation import Context, Generation, PreparedRequest
from loaders.engines.simulated.tokens import decode

_encode = msgspec.json.Encoder().encode
_DEFAULT_MAX_TOKENS = 16

Prompts = str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
"""Prompts as OpenAI allows them: a text, token ids, or a list of either."""


class CompletionRequest(TextRequest, kw_only=True):
    """The body of a completion request."""

    prompt: Prompts
    echo: bool | None = None


def encode_prompts(given: Prompts, name: str) -> list[bytes]:
    """Each prompt as bytes; ``name`` is its field."""
    entries: list[Any] = [given] if isinstance(given, str) else given
    if all(isinstance(entry, int) for entry in entries):
        entries = [entries]
    prompts = []
    for entry in entries:
        if not entry or isinstance(entry, int):
            raise bad(f"{name} must not be empty, nor mix tokens with texts.", name)
        try:
            prompts.append(entry.encode() if isinstance(entry, str) else decode(entry))
        except ValueError as error:
            raise bad(f"{name}: {error}.", name) from error
    return prompts


def prepare(body: dict[str, Any], context: Context) -> PreparedRequest:
    """Read a completion request. Raises ``RequestError``."""
    request = read_body(body, CompletionRequest)
    model = context.model(request.model)
    prompts = encode_prompts(request.prompt, "prompt")
    count = request.choices(len(prompts))
    answers = []
    for prompt in prompts:
        limits = request.sampling(prompt, context.max_model_len_tokens, _DEFAULT_MAX_TOKENS)
        answers += [
            (prompt, context.speaker.answer(prompt, limits, choice=n)) for n in range(count)
        ]
    echoes = [prompt.decode("utf-8", "replace") if request.echo else "" for prompt, _ in answers]
    with_usage = request.include_usage()

    def wording(generation: Generation) -> Completion:
        answer = Completion(generation, context, model, prompts=len(prompts), with_usage=with_usage)
        answer.echoes = echoes
        return answer

    return PreparedRequest(answers=answers, wording=wording, stream=bool(request.stream))


class Completion(ChoicesFormat):
    """The wording of a completion, whole or in chunks."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"
    echoes: list[str]

    def _entry(self, choice: int, text: str, *, finished: bool) -> dict[str, Any]:
        answer = self._generation.answers[choice]
        return {
            "index": choice,
            "text": text,
            "logprobs": None,
            "finish_reason": answer.finish_reason if finished else None,
            "stop_reason": answer.stop_reason if finished else None,
        }

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """A chunk of text, with the finish reason in the last."""
        if first:
            text = self.echoes[choice] + text
        if not text and not last:
            return []
        return [self._head + _encode(self._entry(choice, text, finished=last)) + b"]}\n\n"]

    def whole(self) -> bytes:
        """The answer as one object."""
        return self._whole(
            [
                self._entry(n, self.echoes[n] + answer.text.decode("ascii"), finished=True)
                for n, answer in enumerate(self._generation.answers)
            ]
        )
