"""What the APIs share: a request's body, read as strictly as vLLM does, its errors and its reply.
Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from loaders.engines.simulated.api.answers import GeneratedText, Sampling, Speaker
from loaders.engines.simulated.scheduler import Sequence
from loaders.engines.simulated.tokens import token_count

_encode = msgspec.json.Encoder().encode
_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    404: "NotFoundError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}

MAX_CHOICES = 128
"""Answers to one request, over all its prompts."""


class RequestError(Exception):
    """A request that is answered with an error; ``param`` is the field at fault, if any."""

    def __init__(self, status: int, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.type = _TYPES.get(status, "BadRequestError")

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The engine as one request sees it."""

    served_models: tuple[str, ...]
    max_model_len_tokens: int
    speaker: Speaker
    embedding_size: int
    request_id: str = ""
    created_s: int = 0

    def model(self, name: str | None) -> str:
        """The model that a request names, or the one served. Raises the 404."""
        if name and name not in self.served_models:
            served = ", ".join(self.served_models)
            message = f"The model `{name}` does not exist. Valid aliases: {served}."
            raise RequestError(404, message, param="model")
        return name or self.served_models[0]


class Reply(ABC):
    """One request that was read, and its reply as its API words it.

    ``prompts`` are answered by ``answers``, one each, which are its choices, numbered from 0;
    ``sequences`` are what the engine has of them, once they are submitted.
    """

    def __init__(
        self,
        context: Context,
        model: str,
        answers: list[tuple[bytes, GeneratedText]],
        *,
        stream: bool | None = None,
    ) -> None:
        self.context, self.model = context, model
        self.prompts = [prompt for prompt, _ in answers]
        self.answers = [answer for _, answer in answers]
        self.stream = bool(stream)
        self.sequences: list[Sequence] = []

    def begin(self) -> list[bytes]:
        """The events sent as soon as the request is accepted."""
        return []

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """The events for one token of a choice, which shows ``text``.

        ``first`` before any other, ``last`` where the choice ends with it. An answer that the
        engine ended itself has a last one without text, which is no token.
        """
        return []

    def end(self) -> list[bytes]:
        """The events that end the stream."""
        return []

    @abstractmethod
    def whole(self) -> bytes:
        """The answer in one piece, as JSON."""


def named_event(fields: dict[str, Any]) -> bytes:
    """One event, named by its ``type``."""
    return b"event: %s\ndata: %s\n\n" % (str(fields["type"]).encode(), _encode(fields))


Prepare = Callable[[dict[str, Any], Context], Reply]
"""Reads the body of one API's request. Raises ``RequestError``."""

Body = TypeVar("Body", bound=msgspec.Struct)
Positive = Annotated[int, Meta(ge=1)]
StopStrings = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(max_length=16)]
Content = str | list[Any] | None
"""The content of a message: a text, or a list of parts (see ``text_of``)."""


def read_body(body: Mapping[str, Any], kind: type[Body]) -> Body:
    """``body`` as a request of this kind; fields that it does not know are left out. Raises the 400
    that names the field at fault."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        problem, _, path = str(error).partition(" - at `$")
        place = path.strip(".`")
        param = place.partition(".")[0].partition("[")[0]
        raise bad(f"{place or 'The request'}: {problem}.", param or None) from error


class StreamOptions(msgspec.Struct):
    """What a stream has beside the text."""

    include_usage: bool | None = None


class TextRequest(msgspec.Struct, kw_only=True):
    """What requests for text have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Positive | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    n: Positive | None = None
    temperature: Annotated[float, Meta(ge=0)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    stop: Annotated[str, Meta(min_length=1)] | StopStrings | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None

    def include_usage(self) -> bool:
        """Whether a stream is to end with its usage. Raises where there is no stream."""
        if self.stream_options is not None and not self.stream:
            raise bad("Stream options can only be defined when `stream=True`.", "stream_options")
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(
        self, prompt: bytes, context_tokens: int, default_max_tokens: int | None = None
    ) -> Sampling:
        """How the answer to ``prompt`` is limited. Raises where both do not fit the context."""
        max_tokens = default_max_tokens if self.max_tokens is None else self.max_tokens
        if self.max_tokens is not None and self.max_tokens > context_tokens:
            raise bad(
                f"max_tokens={self.max_tokens} cannot be greater than "
                f"max_model_len={context_tokens}. Please request fewer output tokens.",
                "max_tokens",
            )
        prompt_tokens = token_count(prompt)
        room = context_tokens - prompt_tokens
        if room < 1:
            raise too_long(context_tokens, prompt_tokens, max_tokens or room)
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            # vLLM too gives as much as there is room for.
            max_tokens=room if max_tokens is None else min(max_tokens, room),
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            stop=tuple(stop),
            include_stop=bool(self.include_stop_str_in_output),
            seed=self.seed or 0,
        )

    def choices(self, prompts: int = 1) -> int:
        """How many answers each of ``prompts`` prompts gets."""
        n = self.n or 1
        if n * prompts > MAX_CHOICES:
            raise bad(f"At most {MAX_CHOICES} answers to a request, not {n * prompts}.", "n")
        return n


def text_of(content: Content, name: str) -> str:
    """The text of a message: a string, or the text parts of a list. Raises on anything else."""
    if content is None or isinstance(content, str):
        return content or ""
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
