"""Server-sent events as they pass: comments while held, errors after the head, usage seen.

Nothing here changes a byte that an engine sent. https://html.spec.whatwg.org (event streams):
a line that starts with a colon is a comment, which every client ignores.
"""

from __future__ import annotations

import re
from typing import Final

STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"cache-control: no-cache\r\nx-accel-buffering: no\r\ntransfer-encoding: chunked\r\n"
)
LAST_CHUNK: Final = b"0\r\n\r\n"
LAST_EVENT: Final = b"data: [DONE]\n\n"

_USAGE: Final = re.compile(
    rb'"usage":\{"prompt_tokens":(\d{1,9}),(?:"total_tokens":\d{1,9},)?"completion_tokens":(\d{1,9})'
)
_PROMPT: Final = re.compile(rb'"(?:prompt|input)_tokens"\s*:\s*(\d{1,9})')
_OUTPUT: Final = re.compile(rb'"(?:completion|output)_tokens"\s*:\s*(\d{1,9})')


def chunk(payload: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def comment(text: str) -> bytes:
    """A comment frame, as a chunk. Line ends in the text would end the comment: dropped."""
    return chunk(b": " + " ".join(text.split()).encode() + b"\n\n")


def error_event(body: bytes) -> bytes:
    """An error after the response head is out: an event the OpenAI clients raise, then the end."""
    return chunk(b"data: " + body + b"\n\n") + chunk(LAST_EVENT) + LAST_CHUNK


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
