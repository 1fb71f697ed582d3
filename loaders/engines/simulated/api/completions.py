"""``/v1/chat/completions``, with tools and structured output, and ``/v1/completions``: prompts in,
text out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loaders.engines.simulated.api.answers import GeneratedText, instance_of, structured
from loaders.engines.simulated.api.bodies import (
    Content,
    Context,
    Positive,
    Reply,
    TextRequest,
    bad,
    read_body,
    text_of,
)
from loaders.engines.simulated.tokens import decode, render_chat

_encode = msgspec.json.Encoder().encode
_DEFAULT_MAX_TOKENS = 16

Prompts = str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
"""Prompts as OpenAI allows them: a text, token ids, or a list of either."""


class ChatMessage(msgspec.Struct):
    """One turn of a conversation."""

    role: str
    content: Content = None
    tool_calls: list[Any] | None = None


Messages = Annotated[list[ChatMessage], Meta(min_length=1)]


class Function(msgspec.Struct):
    """A function that an answer may call; by its name alone, the one that it has to call."""

    name: str
    description: Any = None
    parameters: dict[str, Any] | None = None


class Tool(msgspec.Struct):
    """A function as the chat API has it."""

    function: Function


class AnswerFormat(msgspec.Struct):
    """What an answer has to be. Its schema lies in ``json_schema``, in the responses API beside."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: dict[str, Any] | None = None
    schema: dict[str, Any] | None = None

    def wanted(self) -> Any:
        """The schema that an answer has to fit; ``None`` for a text."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return {"const": {"simulated": True}}
        if self.schema is None and self.json_schema is None:
            raise bad("A response format of type json_schema needs one.", "response_format")
        return self.schema or (self.json_schema or {}).get("schema") or {}


class ChatRequest(TextRequest, kw_only=True):
    """The body of a chat request."""

    messages: Messages
    max_completion_tokens: Positive | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Tool | None = None
    response_format: AnswerFormat | None = None

    def __post_init__(self) -> None:
        self.max_tokens = self.max_completion_tokens or self.max_tokens


def render(messages: Sequence[ChatMessage], tools: object = None) -> bytes:
    """A conversation, with its tools, as one prompt."""
    turns = []
    for index, message in enumerate(messages):
        text = text_of(message.content, f"messages[{index}].content")
        if message.tool_calls:
            text += _encode(message.tool_calls).decode()
        turns.append((message.role, text))
    return render_chat(turns, tools=_encode(tools) if tools else b"")


def make_answers(
    request: TextRequest,
    prompt: bytes,
    context: Context,
    *,
    functions: Mapping[str, Any],
    must_call: bool,
    function: str | None,
    answer_format: AnswerFormat | None = None,
) -> list[tuple[bytes, GeneratedText]]:
    """The answers to a conversation: ``functions`` are the schemas of what it offers; where one
    must be called it is ``function``, or any."""
    limits = request.sampling(prompt, context.max_model_len_tokens)
    fixed: GeneratedText | None = None
    if must_call:
        if not functions:
            raise bad("When using `tool_choice`, `tools` must be set.", "tool_choice")
        name = next(iter(functions)) if function is None else function
        if name not in functions:
            raise bad(f"tool_choice names {name!r}, which is not among the tools.", "tool_choice")
        fixed = structured(instance_of(functions[name]) or {}, limits, tool=name)
    elif answer_format is not None and (schema := answer_format.wanted()) is not None:
        fixed = structured(instance_of(schema), limits)
    return [
        (prompt, fixed or context.speaker.answer(prompt, limits, choice=n))
        for n in range(request.choices())
    ]


def prepare_chat(body: dict[str, Any], context: Context) -> Reply:
    """Read a chat request. Raises ``RequestError``."""
    request = read_body(body, ChatRequest)
    model = context.model(request.model)
    choice = request.tool_choice
    answers = make_answers(
        request,
        render(request.messages, request.tools),
        context,
        functions={tool.function.name: tool.function.parameters for tool in request.tools or ()},
        must_call=choice == "required" or isinstance(choice, Tool),
        function=choice.function.name if isinstance(choice, Tool) else None,
        answer_format=request.response_format,
    )
    return Chat(context, model, request, answers)


class Choices(Reply):
    """What OpenAI's two older APIs have in common: a reply is a list of choices."""

    prefix = ""
    kind = ""
    chunk_kind = ""

    def __init__(
        self,
        context: Context,
        model: str,
        request: TextRequest,
        answers: list[tuple[bytes, GeneratedText]],
    ) -> None:
        super().__init__(context, model, answers, stream=request.stream)
        self._each = request.n or 1
        self._with_usage = request.include_usage()
        self._fields = {
            "id": f"{self.prefix}-{context.request_id}",
            "object": self.kind,
            "created": context.created_s,
            "model": model,
            # A client can see what it talks to.
            "system_fingerprint": "simulated",
        }
        chunk = _encode({**self._fields, "object": self.chunk_kind})
        self._head = b"data: " + chunk[:-1] + b',"choices":['

    def _usage(self) -> dict[str, Any]:
        """Each prompt is counted once."""
        sequences, each = self.sequences, self._each
        prompt = sum(sequence.prompt_tokens for sequence in sequences[::each])
        output = sum(sequence.produced for sequence in sequences)
        cached = sum(sequence.cached_tokens for sequence in sequences[::each])
        return {
            "prompt_tokens": prompt,
            "total_tokens": prompt + output,
            "completion_tokens": output,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def end(self) -> list[bytes]:
        """The usage, where it was asked for, and ``[DONE]``."""
        done = b"data: [DONE]\n\n"
        if not self._with_usage:
            return [done]
        return [self._head + b'],"usage":' + _encode(self._usage()) + b"}\n\n", done]

    def _whole(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return _encode({**self._fields, "choices": choices, "usage": self._usage(), **more})


class Chat(Choices):
    """The wording of a chat answer, whole or in chunks."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def _chunk(self, choice: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        entry = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}
        if finish is not None:
            entry["stop_reason"] = self.answers[choice].stop_reason
        return self._head + _encode(entry) + b"]}\n\n"

    def _call(self, choice: int, arguments: str) -> dict[str, Any]:
        identity = zlib.crc32(f"{self._fields['id']}/{choice}".encode())
        return {
            "id": f"chatcmpl-tool-{identity:08x}",
            "type": "function",
            "function": {"name": self.answers[choice].tool, "arguments": arguments},
        }

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """A content delta, or a piece of a tool call's arguments; the role before the first."""
        answer = self.answers[choice]
        events = []
        if first:
            events.append(self._chunk(choice, {"role": "assistant", "content": ""}))
        if answer.tool is not None:
            call = self._call(choice, text) if first else {"function": {"arguments": text}}
            events.append(self._chunk(choice, {"tool_calls": [{"index": 0, **call}]}))
            if last:
                events.append(self._chunk(choice, {}, answer.finish_reason))
        elif last:
            events.append(self._chunk(choice, {"content": text}, answer.finish_reason))
        elif text:
            # As ``_chunk`` would have it: a load test is made of these.
            delta = b'{"index":%d,"delta":{"content":%s}' % (choice, _encode(text))
            events.append(self._head + delta + b',"logprobs":null,"finish_reason":null}]}\n\n')
        return events

    def whole(self) -> bytes:
        """The answer as one object."""
        choices = []
        for index, answer in enumerate(self.answers):
            text = answer.text.decode("ascii")
            called = answer.tool is not None
            message = {
                "role": "assistant",
                "content": None if called else text,
                "refusal": None,
                "tool_calls": [self._call(index, text)] if called else [],
            }
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
            )
        return self._whole(choices, service_tier=None, prompt_logprobs=None)


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


def prepare_completion(body: dict[str, Any], context: Context) -> Reply:
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
    return Completion(context, model, request, answers)


class Completion(Choices):
    """The wording of a completion, whole or in chunks."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        context: Context,
        model: str,
        request: CompletionRequest,
        answers: list[tuple[bytes, GeneratedText]],
    ) -> None:
        super().__init__(context, model, request, answers)
        self._echoes = [
            one.decode("utf-8", "replace") if request.echo else "" for one in self.prompts
        ]

    def _entry(self, choice: int, text: str, *, finished: bool) -> dict[str, Any]:
        answer = self.answers[choice]
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
            text = self._echoes[choice] + text
        if not text and not last:
            return []
        return [self._head + _encode(self._entry(choice, text, finished=last)) + b"]}\n\n"]

    def whole(self) -> bytes:
        """The answer as one object."""
        return self._whole(
            [
                self._entry(n, self._echoes[n] + answer.text.decode("ascii"), finished=True)
                for n, answer in enumerate(self.answers)
            ]
        )
