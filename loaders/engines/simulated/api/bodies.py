"""Reading the bodies of requests for text, strictly, as vLLM does, and its errors. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from loaders.engines.simulated.api.answers import Sampling
from loaders.engines.simulated.tokens import token_count

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


class RequestError(Exception):
    """A request that is answered with an error; ``param`` is the field at fault, if any."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param

    @property
    def type(self) -> str:
        """vLLM's name for this kind of error."""
        return _TYPES.get(self.status, "BadRequestError")

    def openai(self) -> dict[str, Any]:
        """The body on OpenAI's paths."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.status,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """The body on Anthropic's paths."""
        return {"type": "error", "error": {"type": self.type, "message": self.message}}


def bad(message: str, param: str | None = None) -> RequestError:
    """A 400."""
    return RequestError(400, message, param=param)


def unknown_model(name: object, served: Sequence[str]) -> RequestError:
    """The 404 for a model that is not among those served."""
    message = f"The model `{name}` does not exist. Valid aliases: {', '.join(served)}."
    return RequestError(404, message, param="model")


MAX_CHOICES = 128
"""Answers to one request, over all its prompts."""
_MAX_STOPS = 16


def integer(body: Mapping[str, Any], name: str, *, least: int = 0) -> int | None:
    """The whole number under ``name``, or ``None`` where it is absent or null."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int):
        raise bad(f"{name} must be an integer, got {value!r}.", name)
    if value < least:
        raise bad(f"{name} must be at least {least}, got {value}.", name)
    return value


def flag(body: Mapping[str, Any], name: str) -> bool:
    """The truth under ``name``; absent is false."""
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise bad(f"{name} must be true or false, got {value!r}.", name)
    return bool(value)


def include_usage(body: Mapping[str, Any]) -> bool:
    """Whether a stream is to end with its usage."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not flag(body, "stream"):
        raise bad("Stream options can only be defined when `stream=True`.", "stream_options")
    if not isinstance(options, Mapping):
        raise bad("stream_options must be an object.", "stream_options")
    return flag(options, "include_usage")


def strings(value: Any, name: str) -> tuple[str, ...]:
    """One string or a list of them."""
    if value is None:
        return ()
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(v, str) for v in values):
        raise bad(f"{name} must be a string or a list of strings.", name)
    return tuple(values)


def text_of(content: Any, name: str) -> str:
    """The text of a message: a string, or the text parts of a list. Raises on anything else."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad(f"{name} must be a string or a list of parts.", name)
    texts = []
    for part in content:
        text = part if isinstance(part, str) else _part_text(part)
        if text is None:
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise bad(f"The simulated engine reads text only, not {kind!r} parts.", name)
        texts.append(text)
    return "\n".join(texts)


def _part_text(part: Any) -> str | None:
    if not isinstance(part, Mapping):
        return None
    for key in ("text", "refusal", "thinking", "output"):
        if isinstance(part.get(key), str):
            return str(part[key])
    if isinstance(part.get("content"), list | str):
        return text_of(part["content"], "content")
    return None


def sampling(
    body: Mapping[str, Any],
    prompt: bytes,
    *,
    max_model_len_tokens: int,
    max_names: tuple[str, ...] = ("max_tokens",),
    default_max_tokens: int | None = None,
) -> Sampling:
    """How the answer to ``prompt`` is limited. Raises where both do not fit the context."""
    asked: int | None = None
    for name in max_names:
        value = integer(body, name)
        if value == 0:
            raise bad(f"{name} must be at least 1, got 0.", name)
        asked = value if asked is None else asked
        if value is not None and value > max_model_len_tokens:
            raise bad(
                f"{name}={value} cannot be greater than max_model_len={max_model_len_tokens}. "
                "Please request fewer output tokens.",
                name,
            )
    prompt_tokens = token_count(prompt)
    room = max_model_len_tokens - prompt_tokens
    if asked is None:
        asked = room if default_max_tokens is None else default_max_tokens
    if room < 1:
        raise too_long(max_model_len_tokens, prompt_tokens, asked)
    asked = min(asked, room)  # vLLM too gives as much as there is room for
    for name, low, high in (("temperature", 0.0, None), ("top_p", 0.0, 1.0)):
        number = body.get(name)
        if number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise bad(f"{name} must be a number, got {number!r}.", name)
        if number < low or (high is not None and number > high):
            raise bad(f"{name} is out of range, got {number}.", name)
    stop = strings(body.get("stop", body.get("stop_sequences")), "stop")
    if len(stop) > _MAX_STOPS or "" in stop:
        raise bad(f"stop must be at most {_MAX_STOPS} strings, none of them empty.", "stop")
    return Sampling(
        max_tokens=asked,
        min_tokens=integer(body, "min_tokens") or 0,
        ignore_eos=flag(body, "ignore_eos"),
        stop=stop,
        include_stop=flag(body, "include_stop_str_in_output"),
        seed=integer(body, "seed", least=-(2**63)) or 0,
    )


def too_long(max_model_len_tokens: int, prompt_tokens: int, output_tokens: int) -> RequestError:
    """The 400 for a request that does not fit the context."""
    if prompt_tokens > max_model_len_tokens:
        return bad(
            f"This model's maximum context length is {max_model_len_tokens} tokens. However, your "
            f"prompt contains {prompt_tokens} input tokens, which exceeds this limit even without "
            "any output tokens. Please reduce the length of the input prompt.",
            "input_tokens",
        )
    return bad(
        f"This model's maximum context length is {max_model_len_tokens} tokens. However, you "
        f"requested {output_tokens} output tokens and your prompt contains at least "
        f"{prompt_tokens} input tokens, for a total of at least {prompt_tokens + output_tokens} "
        "tokens. Please reduce the length of the input prompt or the number of requested output "
        "tokens.",
        "input_tokens",
    )


def choices(body: Mapping[str, Any], prompts: int) -> int:
    """How many answers each prompt gets."""
    n = integer(body, "n", least=1) or 1
    if n * prompts > MAX_CHOICES:
        raise bad(f"At most {MAX_CHOICES} answers to a request, not {n * prompts}.", "n")
    return n
