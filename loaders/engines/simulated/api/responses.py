"""``/v1/responses``: OpenAI's newer API. Nothing is stored: each request carries its history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from loaders.engines.simulated.api import chat
from loaders.engines.simulated.api.answers import GeneratedText
from loaders.engines.simulated.api.bodies import RequestError, bad, flag
from loaders.engines.simulated.api.context import Context, PreparedRequest, named_event
from loaders.engines.simulated.generation import Generation

_WHOLE = ("stop", "tool_calls")


def prepare(body: dict[str, Any], context: Context) -> PreparedRequest:
    """Read a request for a response. Raises ``RequestError``."""
    model = context.model(body)
    if body.get("previous_response_id") is not None:
        raise RequestError(
            404,
            f"Response with id {body['previous_response_id']!r} not found: the simulated engine "
            "stores none.",
            param="response_id",
        )
    if flag(body, "background"):
        raise bad("The simulated engine does not run responses in the background.", "background")
    prepared = chat.prepare(_as_chat(body), context)
    return PreparedRequest(
        answers=prepared.answers,
        wording=lambda generation: Response(generation, context, model, body),
        stream=flag(body, "stream"),
    )


def _as_chat(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("input")
    turns: list[Any] = []
    if isinstance(instructions := body.get("instructions"), str):
        turns.append({"role": "system", "content": instructions})
    if isinstance(given, str):
        turns.append({"role": "user", "content": given})
    elif isinstance(given, list) and given:
        turns += [_turn(item, index) for index, item in enumerate(given)]
    else:
        raise bad("input must be a string or a list of items.", "input")
    converted = {k: v for k, v in body.items() if k not in ("tools", "tool_choice", "stream")}
    converted.pop("stream_options", None)
    converted["messages"] = turns
    converted["max_tokens"] = body.get("max_output_tokens")
    tools = body.get("tools") or []
    if not isinstance(tools, list):
        raise bad("tools must be a list.", "tools")
    if not all(isinstance(tool, Mapping) and tool.get("type") == "function" for tool in tools):
        raise bad("The simulated engine knows function tools only.", "tools")
    converted["tools"] = [{"type": "function", "function": tool} for tool in tools]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "function":
        choice = {"type": "function", "function": {"name": choice.get("name")}}
    converted["tool_choice"] = choice if tools else None
    text = body.get("text")
    wanted = text.get("format") if isinstance(text, Mapping) else None
    if isinstance(wanted, Mapping):
        converted["response_format"] = {**wanted, "json_schema": wanted}
    return converted


def _turn(item: Any, index: int) -> dict[str, Any]:
    if not isinstance(item, Mapping):
        raise bad(f"input[{index}] must be an object.", "input")
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": item.get("content")}
    if kind == "function_call":
        return {"role": "assistant", "content": str(item.get("arguments", ""))}
    if kind == "function_call_output":
        return {"role": "tool", "content": item.get("output")}
    raise bad(f"input[{index}]: the simulated engine does not know {kind!r} items.", "input")


class Response:
    """The wording of a response: one item, a message or a function call, whole or in events."""

    def __init__(
        self, generation: Generation, context: Context, model: str, body: Mapping[str, Any]
    ) -> None:
        self._generation = generation
        self._id = f"resp_{context.request_id}"
        kind = "msg" if self._answer.tool is None else "fc"
        self._item_id = f"{kind}_{context.request_id}"
        self._created = context.created_s
        self._model = model
        self._body = body
        self._number = -1

    @property
    def _answer(self) -> GeneratedText:
        return self._generation.answers[0]

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
            "created_at": self._created,
            "status": status,
            "model": self._model,
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
        sequence = self._generation.sequences[0]
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
