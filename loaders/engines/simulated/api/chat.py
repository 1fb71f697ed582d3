"""``/v1/chat/completions``: OpenAI's chat API, with tools and structured output."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

import msgspec

from loaders.engines.simulated.api.answers import GeneratedText, instance_of, structured
from loaders.engines.simulated.api.bodies import (
    bad,
    choices,
    flag,
    include_usage,
    sampling,
    text_of,
)
from loaders.engines.simulated.api.context import (
    SYSTEM_FINGERPRINT,
    Context,
    PreparedRequest,
    usage,
)
from loaders.engines.simulated.generation import Generation
from loaders.engines.simulated.tokens import render_chat

_encode = msgspec.json.Encoder().encode


def prompt_of(body: Mapping[str, Any]) -> bytes:
    """The conversation of ``body``, with its tools, as one prompt."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad("messages must be a list with at least one message.", "messages")
    turns = []
    for index, message in enumerate(messages):
        role = message.get("role") if isinstance(message, Mapping) else None
        if not isinstance(role, str):
            raise bad(f"messages[{index}] must be an object with a role.", "messages")
        text = text_of(message.get("content"), f"messages[{index}].content")
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise bad(f"messages[{index}].tool_calls must be a list.", "messages")
        for call in calls:
            called = call.get("function") if isinstance(call, Mapping) else None
            if isinstance(called, Mapping):
                text += str(called.get("arguments", ""))
        turns.append((role, text))
    tools = body.get("tools")
    return render_chat(turns, tools=json.dumps(tools).encode() if tools else b"")


def prepare(body: dict[str, Any], context: Context) -> PreparedRequest:
    """Read a chat request. Raises ``RequestError``."""
    model = context.model(body)
    prompt = prompt_of(body)
    limits = sampling(
        body,
        prompt,
        max_model_len_tokens=context.max_model_len_tokens,
        max_names=("max_completion_tokens", "max_tokens"),
    )
    tool = _tool_to_call(body)
    fixed: GeneratedText | None = None
    if tool is not None:
        name, schema = tool
        fixed = structured(instance_of(schema) or {}, limits, tool=name)
    elif (schema := _answer_schema(body)) is not None:
        fixed = structured(instance_of(schema), limits)
    count = choices(body, 1)
    answers = [
        (prompt, fixed or context.speaker.answer(prompt, limits, choice=n)) for n in range(count)
    ]
    with_usage = include_usage(body)
    return PreparedRequest(
        answers=answers,
        wording=lambda generation: Chat(generation, context, model, with_usage=with_usage),
        stream=flag(body, "stream"),
    )


def _tool_to_call(body: Mapping[str, Any]) -> tuple[str, Any] | None:
    """The function that the answer has to call, and its parameters; ``None`` where it may talk."""
    tools, choice = body.get("tools"), body.get("tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise bad("When using `tool_choice`, `tools` must be set.", "tool_choice")
        return None
    if not isinstance(tools, list):
        raise bad("tools must be a list.", "tools")
    functions: dict[str, Any] = {}
    for tool in tools:
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise bad("Every tool must be a function with a name.", "tools")
        functions[function["name"]] = function.get("parameters") or {}
    if choice in (None, "none", "auto"):
        return None
    if choice == "required":
        return next(iter(functions.items()))
    named = choice.get("function") if isinstance(choice, Mapping) else None
    name = named.get("name") if isinstance(named, Mapping) else None
    if name not in functions:
        raise bad(f"tool_choice names {name!r}, which is not among the tools.", "tool_choice")
    return name, functions[name]


def _answer_schema(body: Mapping[str, Any]) -> Any:
    wanted = body.get("response_format")
    if wanted is None or not isinstance(wanted, Mapping) or wanted.get("type") == "text":
        return None
    if wanted.get("type") == "json_object":
        return {"const": {"simulated": True}}
    spec = wanted.get("json_schema")
    if wanted.get("type") != "json_schema" or not isinstance(spec, Mapping):
        raise bad("response_format must be text, json_object or json_schema.", "response_format")
    return spec.get("schema") or {}


class Chat:
    """The wording of a chat answer, whole or in chunks."""

    def __init__(
        self, generation: Generation, context: Context, model: str, *, with_usage: bool
    ) -> None:
        self._generation = generation
        self._id = f"chatcmpl-{context.request_id}"
        self._created = context.created_s
        self._model = model
        self._with_usage = with_usage
        head = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": model,
            "system_fingerprint": SYSTEM_FINGERPRINT,
        }
        self._head = b"data: " + _encode(head)[:-1] + b',"choices":['
        self._delta = [
            self._head + b'{"index":%d,"delta":{"content":' % n
            for n in range(len(generation.answers))
        ]

    def _chunk(self, choice: int, delta: dict[str, Any], finish: str | None = None) -> bytes:
        entry = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish}
        if finish is not None:
            entry["stop_reason"] = self._generation.answers[choice].stop_reason
        return self._head + _encode(entry) + b"]}\n\n"

    def _call_id(self, choice: int) -> str:
        return f"chatcmpl-tool-{zlib.crc32(f'{self._id}/{choice}'.encode()):08x}"

    def begin(self) -> list[bytes]:
        """Nothing before the first token, as vLLM."""
        return []

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """A content delta, or a piece of a tool call's arguments; the role before the first."""
        answer = self._generation.answers[choice]
        events = []
        if first:
            events.append(self._chunk(choice, {"role": "assistant", "content": ""}))
        if answer.tool is not None:
            call: dict[str, Any] = {"index": 0, "function": {"arguments": text}}
            if first:
                call = {
                    "index": 0,
                    "id": self._call_id(choice),
                    "type": "function",
                    "function": {"name": answer.tool, "arguments": text},
                }
            events.append(self._chunk(choice, {"tool_calls": [call]}))
            if last:
                events.append(self._chunk(choice, {}, answer.finish_reason))
        elif last:
            events.append(self._chunk(choice, {"content": text}, answer.finish_reason))
        elif text:
            tail = b'},"logprobs":null,"finish_reason":null}]}\n\n'
            events.append(self._delta[choice] + _encode(text) + tail)
        return events

    def end(self) -> list[bytes]:
        """The usage, where it was asked for, and ``[DONE]``."""
        done = b"data: [DONE]\n\n"
        if not self._with_usage:
            return [done]
        return [self._head + b'],"usage":' + _encode(usage(self._generation, 1)) + b"}\n\n", done]

    def whole(self) -> bytes:
        """The answer as one object."""
        entries = []
        for index, answer in enumerate(self._generation.answers):
            text = answer.text.decode("ascii")
            message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
            message["tool_calls"] = []
            if answer.tool is not None:
                message["content"] = None
                message["tool_calls"] = [
                    {
                        "id": self._call_id(index),
                        "type": "function",
                        "function": {"name": answer.tool, "arguments": text},
                    }
                ]
            entries.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": None,
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
            )
        return _encode(
            {
                "id": self._id,
                "object": "chat.completion",
                "created": self._created,
                "model": self._model,
                "choices": entries,
                "service_tier": None,
                "system_fingerprint": SYSTEM_FINGERPRINT,
                "usage": usage(self._generation, 1),
                "prompt_logprobs": None,
            }
        )
