"""``/v1/messages``: Anthropic's API, on top of the chat prompt."""

from __future__ import annotations

import json
import zlib
from typing import Any, Literal

import msgspec

from loaders.engines.simulated.api.bodies import (
    Content,
    Context,
    Reply,
    StopStrings,
    TextRequest,
    bad,
    named_event,
    read_body,
    text_of,
)
from loaders.engines.simulated.api.completions import ChatMessage, Messages, make_answers, render
from loaders.engines.simulated.tokens import token_count

_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageTool(msgspec.Struct):
    """A tool that the model may use."""

    name: str
    description: Any = None
    input_schema: dict[str, Any] | None = None


class MessageToolChoice(msgspec.Struct):
    """Whether a tool is used, and which."""

    type: Literal["auto", "any", "none", "tool"]
    name: str | None = None


class MessageRequest(TextRequest, kw_only=True):
    """The body of a message request, and of one to count its tokens."""

    messages: Messages
    system: Content = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    stop_sequences: StopStrings | None = None

    def __post_init__(self) -> None:
        self.stop = self.stop_sequences

    def prompt(self) -> bytes:
        """The conversation as one prompt."""
        system = text_of(self.system, "system")
        first = [ChatMessage(role="system", content=system)] if system else []
        return render([*first, *self.messages], self.tools)


def prepare(body: dict[str, Any], context: Context) -> Reply:
    """Read a message request. Raises ``RequestError``."""
    request = read_body(body, MessageRequest)
    if request.max_tokens is None:
        raise bad("max_tokens is required.", "max_tokens")
    model = context.model(request.model)
    choice = request.tool_choice
    answers = make_answers(
        request,
        request.prompt(),
        context,
        functions={tool.name: tool.input_schema for tool in request.tools or ()},
        must_call=choice is not None and choice.type in ("any", "tool"),
        function=choice.name if choice is not None and choice.type == "tool" else None,
    )
    return Message(context, model, answers, stream=request.stream)


def count_tokens(body: dict[str, Any], context: Context) -> dict[str, Any]:
    """The answer to ``/v1/messages/count_tokens``. Raises ``RequestError``."""
    request = read_body(body, MessageRequest)
    context.model(request.model)
    count = token_count(request.prompt())
    return {"input_tokens": count, "context_management": {"original_input_tokens": count}}


class Message(Reply):
    """Anthropic's message, whole or in events."""

    @property
    def _id(self) -> str:
        return f"msg_{self.context.request_id}"

    def _usage(self) -> dict[str, int]:
        sequence = self.sequences[0]
        return {"input_tokens": sequence.prompt_tokens, "output_tokens": sequence.produced}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._usage(),
        }

    def _ending(self) -> dict[str, Any]:
        answer = self.answers[0]
        if answer.stop_reason is not None:
            return {"stop_reason": "stop_sequence", "stop_sequence": answer.stop_reason}
        return {
            "stop_reason": _STOP_REASONS.get(answer.finish_reason, "end_turn"),
            "stop_sequence": None,
        }

    def _block(self, **content: Any) -> dict[str, Any]:
        tool = self.answers[0].tool
        if tool is None:
            return {"type": "text", "text": content.get("text", "")}
        identity = f"toolu_{zlib.crc32(self._id.encode()):08x}"
        given = content.get("input", {})
        return {"type": "tool_use", "id": identity, "name": tool, "input": given}

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """A delta of the text or of the tool's input; the message and its block around them.

        A message has one answer: there is no choice but 0.
        """
        events = []
        if first:
            message = self._message([])
            message["usage"] = {**self._usage(), "output_tokens": 0}
            events.append(named_event({"type": "message_start", "message": message}))
            block = {"type": "content_block_start", "index": 0, "content_block": self._block()}
            events.append(named_event(block))
        if text:
            delta = {"type": "text_delta", "text": text}
            if self.answers[0].tool is not None:
                delta = {"type": "input_json_delta", "partial_json": text}
            events.append(named_event({"type": "content_block_delta", "index": 0, "delta": delta}))
        if last:
            events.append(named_event({"type": "content_block_stop", "index": 0}))
        return events

    def end(self) -> list[bytes]:
        """Why it ended, what it cost, and that it ended."""
        delta = {"type": "message_delta", "delta": self._ending(), "usage": self._usage()}
        return [named_event(delta), named_event({"type": "message_stop"})]

    def whole(self) -> bytes:
        """The message as one object."""
        answer = self.answers[0]
        text = answer.text.decode("ascii")
        if answer.tool is None:
            block = self._block(text=text)
        elif answer.finish_reason != "tool_calls":
            block = self._block()  # cut JSON has no value
        else:
            block = self._block(input=json.loads(text))
        return msgspec.json.encode({**self._message([block]), **self._ending()})
