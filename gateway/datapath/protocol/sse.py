"""Server-sent events as they pass: comments while held, errors after the head, usage seen.

Nothing that an engine sent is changed, but that usage which only the gateway asked for is taken out
again. https://html.spec.whatwg.org (event streams):
a line that starts with a colon is a comment, which every client ignores. No blank line follows
one: OpenAI's and Anthropic's Go clients take every blank line for the end of an event.
"""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from gateway.datapath.protocol.chunks import ChunkDecoder
from gateway.datapath.protocol.errors import Api, ApiError, failed_response

STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\nx-accel-buffering: no\r\ntransfer-encoding: chunked\r\n"
)
LAST_CHUNK: Final = b"0\r\n\r\n"
LAST_EVENT: Final = b"data: [DONE]\n\n"
USAGE_EVENT: Final = b'"choices":[]'
"""In the event at the end of a stream that has its usage, and no token. Inside a text the quotes
would be escaped."""

_ASKED_USAGE: Final = b'"stream_options":{"include_usage":true},'
_EVENT_OF_USAGE: Final = re.compile(
    rb'^data: ?\{(?=[^\n]*"usage":\{)[^\n]*"choices":\[\][^\n]*\n\r?\n', re.MULTILINE
)
# By these a client has all of its answer: the last event of each API, or why the answer ended.
_WHOLE: Final = re.compile(
    rb'^data: ?\[DONE\]\r?\n|"(?:finish|stop)_reason"\s*:\s*"'
    rb'|"type"\s*:\s*"(?:message_stop|response\.(?:completed|incomplete|failed))"',
    re.MULTILINE,
)

_SEQUENCE: Final = re.compile(rb'"sequence_number"\s*:\s*(\d{1,9})')
_USAGE: Final = re.compile(
    rb'"usage":\{"prompt_tokens":(\d{1,9}),(?:"total_tokens":\d{1,9},)?"completion_tokens":(\d{1,9})'
)
_PROMPT: Final = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,9})')
_OUTPUT: Final = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,9})')

# OpenAI's, Anthropic's, that of a response. vLLM has a ``stop_reason`` beside its
# ``finish_reason``, with what stopped it: so the order counts.
_FINISH_NAMES: Final = (b'"finish_reason"', b'"stop_reason"', b'"status"')
_STOPPED: Final = b'"finish_reason":"stop"'  # as vLLM writes what is most often so
_TEXT: Final = re.compile(rb'\s*:\s*"([^"\\]{1,40})"')
_FINISH_REASONS: Final = {
    b"stop": "stop",
    b"length": "length",
    b"tool_calls": "tool_calls",
    b"abort": "abort",
    b"error": "error",
    b"repetition": "repetition",
    b"end_turn": "stop",
    b"stop_sequence": "stop",
    b"max_tokens": "length",
    b"tool_use": "tool_calls",
    b"completed": "stop",
    b"incomplete": "length",
}


def chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def comment(text: str) -> bytes:
    """A comment line, as a chunk. Line ends in the text would end the comment: dropped."""
    return chunk(b": " + " ".join(text.split()).encode() + b"\n")


def error_event(
    error: ApiError | bytes, api: Api, *, request_id: bytes, model: str, created_s: int, seen: bytes
) -> bytes:
    """An error after the head of a stream is out, as chunks: the event that the API's clients
    raise. Of an engine it is the body. ``seen`` is the last of the stream that was sent, empty
    where no event was."""
    if api is not Api.RESPONSES or isinstance(error, bytes):
        body = error if isinstance(error, bytes) else error.body(api, request_id)
        start = b"event: error\n" if api is Api.ANTHROPIC else b""
        return chunk(b"%bdata: %b\n\n" % (start, b" ".join(body.splitlines())))
    failed = failed_response(error, request_id=request_id, model=model, created_s=created_s)
    numbers = _SEQUENCE.findall(seen)
    number = int(numbers[-1]) + 1 if numbers else 0
    if seen:
        return _response_event("response.failed", number, failed)
    # OpenAI's clients refuse a stream whose first event is another.
    created = {**failed, "status": "in_progress", "error": None}
    return _response_event("response.created", 0, created) + _response_event(
        "response.failed", 1, failed
    )


def _response_event(kind: str, number: int, response: dict[str, Any]) -> bytes:
    event = {"type": kind, "sequence_number": number, "response": response}
    return chunk(b"event: %b\ndata: %b\n\n" % (kind.encode(), msgspec.json.encode(event)))


def is_whole(end: bytes) -> bool:
    """Whether a stream that ended so, chunk framing included, was whole to its client."""
    return _WHOLE.search(end) is not None


def ask_usage(body: bytes) -> bytes | None:
    """The first part of a body, asking for the usage of the stream too; ``None`` where the object
    does not begin in it."""
    start = body.find(b"{") + 1
    return b"".join((body[:start], _ASKED_USAGE, body[start:])) if start else None


def without_usage(block: bytes) -> bytes:
    """Whole chunks of a stream less the event with its usage."""
    decoder = ChunkDecoder()
    try:
        stream = b"".join(decoder.feed(block)[0])
    except ApiError:
        return block
    kept, found = _EVENT_OF_USAGE.subn(b"", stream)
    if not found:
        return block
    return (chunk(kept) if kept else b"") + (LAST_CHUNK if decoder.done else b"")


def read_usage(tail: bytes) -> tuple[int | None, int | None]:
    """Prompt and output tokens from the end of an answer, ``None`` where it does not say.

    ``tail`` is the last bytes of the answer, framed or not. Engines put ``usage`` at the end, and
    the last one counts: text that quotes a usage object comes earlier.
    """
    start = tail.rfind(b'"usage"')
    if start < 0:
        return None, None
    both = _USAGE.match(tail, start)  # as vLLM writes it: one match, no search
    if both is not None:
        return int(both[1]), int(both[2])
    prompt = _PROMPT.search(tail, start)
    output = _OUTPUT.search(tail, start)
    return (int(prompt[1]) if prompt else None, int(output[1]) if output else None)


def read_finish_reason(tail: bytes) -> str | None:
    """Why the engine ended an answer, as OpenAI's APIs call it, from the answer's end; ``None``
    where it does not say. An unknown reason is ``other``."""
    if tail.find(_STOPPED) >= 0:
        return "stop"
    for name in _FINISH_NAMES:
        at = tail.rfind(name)
        while at >= 0:
            found = _TEXT.match(tail, at + len(name))
            if found is not None:
                return _FINISH_REASONS.get(found[1], "other")
            at = tail.rfind(name, 0, at)  # null, in an event before the last
    return None
