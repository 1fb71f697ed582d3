"""``/v1/responses``: OpenAI's newer API. Nothing is stored: each request carries its history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from loaders.engines.simulated.api.answers import GeneratedText
from loaders.engines.simulated.api.bodies import (
    Content,
    Context,
    Positive,
    Reply,
    RequestError,
    TextRequest,
    bad,
    named_event,
    read_body,
)
from loaders.engines.simulated.api.completions import (
    AnswerFormat,
    ChatMessage,
    Function,
    make_answers,
    render,
)

_WHOLE = ("stop", "tool_calls")


class Item(msgspec.Struct):
    """One item of the input."""

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: str | None = None
    content: Content = None
    arguments: Any = ""
    output: Content = None

    def turn(self) -> ChatMessage:
        """What it is in a conversation."""
        if self.type == "function_call":
            return ChatMessage(role="assistant", content=str(self.arguments))
        if self.type == "function_call_output":
            return ChatMessage(role="tool", content=self.output)
        if self.role is None:
            raise bad("A message of the input needs a role.", "input")
        return ChatMessage(role=self.role, content=self.content)


class ResponseTool(Function, kw_only=True):
    """A function that may be called: the simulated engine knows no other tools."""

    type: Literal["function"]


class ResponseText(msgspec.Struct):
    """What is asked of the text."""

    format: AnswerFormat | None = None


class ResponseRequest(TextRequest, kw_only=True):
    """The body of a request for a response."""

    input: str | Annotated[list[Item], Meta(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Positive | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | Function | None = None
    text: ResponseText | None = None
    previous_response_id: str | None = None
    background: bool | None = None

    def __post_init__(self) -> None:
        self.max_tokens = self.max_output_tokens

    def turns(self) -> list[ChatMessage]:
        """The conversation."""
        system = self.instructions
        first = [] if system is None else [ChatMessage(role="system", content=system)]
        if isinstance(self.input, str):
            return [*first, ChatMessage(role="user", content=self.input)]
        return [*first, *(item.turn() for item in self.input)]


def prepare(body: dict[str, Any], context: Context) -> Reply:
    """Read a request for a response. Raises ``RequestError``."""
    request = read_body(body, ResponseRequest)
    model = context.model(request.model)
    if request.previous_response_id is not None:
        raise RequestError(
            404,
            f"Response with id {request.previous_response_id!r} not found: the simulated engine "
            "stores none.",
            param="response_id",
        )
    if request.background:
        raise bad("The simulated engine does not run responses in the background.", "background")
    choice = request.tool_choice
    answers = make_answers(
        request,
        render(request.turns(), request.tools),
        context,
        functions={tool.name: tool.parameters for tool in request.tools or ()},
        must_call=choice == "required" or isinstance(choice, Function),
        function=choice.name if isinstance(choice, Function) else None,
        answer_format=None if request.text is None else request.text.format,
    )
    return Response(context, model, answers, body, stream=request.stream)


class Response(Reply):
    """A response: one item, a message or a function call, whole or in events."""

    def __init__(
        self,
        context: Context,
        model: str,
        answers: list[tuple[bytes, GeneratedText]],
        body: Mapping[str, Any],
        *,
        stream: bool | None,
    ) -> None:
        super().__init__(context, model, answers, stream=stream)
        self._id = f"resp_{context.request_id}"
        kind = "msg" if self._answer.tool is None else "fc"
        self._item_id = f"{kind}_{context.request_id}"
        self._body = body
        self._number = -1

    @property
    def _answer(self) -> GeneratedText:
        return self.answers[0]

    def _event(self, kind: str, **fields: Any) -> bytes:
        self._number += 1
        return named_event({"type": kind, "sequence_number": self._number, **fields})

    def _part(self, text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        if self._answer.tool is not None:
            return {
                "type": "function_call",
                "id": self._item_id,
                "call_id": f"call_{self._item_id[3:]}",
                "name": self._answer.tool,
                "arguments": text or "",
                "status": status,
            }
        return {
            "type": "message",
            "id": self._item_id,
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [self._part(text)],
        }

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        body = self._body
        cut = status == "incomplete"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self.context.created_s,
            "status": status,
            "model": self.model,
            "output": output,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata") or {"simulated": "true"},
            "parallel_tool_calls": bool(body.get("parallel_tool_calls", True)),
            "previous_response_id": None,
            "temperature": body.get("temperature"),
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.get("tools") or [],
            "top_p": body.get("top_p"),
            "truncation": body.get("truncation") or "disabled",
            "background": False,
            "service_tier": "auto",
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        sequence = self.sequences[0]
        return {
            "input_tokens": sequence.prompt_tokens,
            "input_tokens_details": {"cached_tokens": sequence.cached_tokens},
            "output_tokens": sequence.produced,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": sequence.prompt_tokens + sequence.produced,
        }

    def _status(self) -> str:
        return "completed" if self._answer.finish_reason in _WHOLE else "incomplete"

    def begin(self) -> list[bytes]:
        """The response exists and is under way."""
        response = self._response("in_progress", [])
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
        ]

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """A delta of the text or of the arguments; the item around them. No choice but 0."""
        place: dict[str, Any] = {"item_id": self._item_id, "output_index": 0}
        events = []
        if first:
            item = self._item("in_progress", None)
            events.append(self._event("response.output_item.added", output_index=0, item=item))
            if self._answer.tool is None:
                part = self._part("")
                added = "response.content_part.added"
                events.append(self._event(added, **place, content_index=0, part=part))
        if text and self._answer.tool is not None:
            delta = "response.function_call_arguments.delta"
            events.append(self._event(delta, **place, delta=text))
        elif text:
            delta = "response.output_text.delta"
            events.append(self._event(delta, **place, content_index=0, delta=text, logprobs=[]))
        return events + self._finished() if last else events

    def _finished(self) -> list[bytes]:
        text = self._answer.text.decode("ascii")
        place: dict[str, Any] = {"item_id": self._item_id, "output_index": 0}
        item = self._item(self._status(), text)
        if self._answer.tool is not None:
            done = "response.function_call_arguments.done"
            events = [self._event(done, **place, name=self._answer.tool, arguments=text)]
        else:
            place["content_index"] = 0
            events = [
                self._event("response.output_text.done", **place, text=text, logprobs=[]),
                self._event("response.content_part.done", **place, part=self._part(text)),
            ]
        events.append(self._event("response.output_item.done", output_index=0, item=item))
        return events

    def end(self) -> list[bytes]:
        """The whole response once more: as vLLM, ``completed`` also where its status is not."""
        return [self._event("response.completed", response=self._whole())]

    def _whole(self) -> dict[str, Any]:
        item = self._item(self._status(), self._answer.text.decode("ascii"))
        return self._response(self._status(), [item])

    def whole(self) -> bytes:
        """The response as one object."""
        return msgspec.json.encode(self._whole())
