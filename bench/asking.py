"""One chat over one fresh connection, in asyncio, noting when what arrived."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any

MAX_ANSWER_BYTES = 4 << 20


@dataclass(slots=True, kw_only=True)
class Answer:
    """What came back. Times are on the monotonic clock; ``None``: it did not happen."""

    index: int
    stream: bool
    sent_s: float = 0.0
    status: int | None = None
    first_s: float | None = None
    """First content: a token, or the document of an answer that is not streamed."""
    ended_s: float | None = None
    ids: set[str] = field(default_factory=set)
    comments: int = 0
    done_marks: int = 0
    finishes: int = 0
    tokens: int = 0
    text: str = ""
    error: str | None = None

    def whole_once(self) -> bool:
        """Answered entirely, and not twice."""
        marks = 1 if self.stream else 0
        return (
            self.error is None
            and self.status == 200
            and len(self.ids) == 1
            and self.finishes == 1
            and self.done_marks == marks
        )


def _take_event(answer: Answer, line: bytes) -> None:
    if line.startswith(b":"):
        answer.comments += 1
        return
    if not line.startswith(b"data:"):
        return
    if line[5:].strip() == b"[DONE]":
        answer.done_marks += 1
        return
    _take_document(answer, json.loads(line[5:]), "delta")


def _take_document(answer: Answer, document: dict[str, Any], part: str) -> None:
    if "error" in document:
        answer.error = str(document["error"])[:300]
        return
    answer.ids.add(str(document.get("id")))
    for choice in document.get("choices", ()):
        text = (choice.get(part) or {}).get("content")
        if text:
            answer.first_s = answer.first_s or time.monotonic()
            answer.text += text
            answer.tokens += 1
        answer.finishes += bool(choice.get("finish_reason"))


async def _body(reader: asyncio.StreamReader, head: bytes, answer: Answer) -> None:
    """Read the body in either framing, event by event; a cut body raises IncompleteReadError."""
    lowered = head.lower()
    pending, total = b"", 0
    document = bytearray()
    if b"transfer-encoding: chunked" not in lowered:
        length = int(lowered.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0])
        document += await reader.readexactly(min(length, MAX_ANSWER_BYTES))
    else:
        while size := int((await reader.readline()).split(b";")[0] or b"0", 16):
            piece = (await reader.readexactly(size + 2))[:-2]
            total += size
            if total > MAX_ANSWER_BYTES:
                raise ValueError("answer too long")
            if not answer.stream or answer.status != 200:
                document += piece
                continue
            *lines, pending = (pending + piece).split(b"\n")
            for line in lines:
                _take_event(answer, line)
        await reader.readline()
    if document:
        _take_document(answer, json.loads(document), "message")


async def ask(port: int, request: bytes, answer: Answer, *, limit_s: float) -> Answer:
    """Send ``request`` and fill ``answer``; never raises for what the server does."""
    writer = None
    try:
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answer.sent_s = time.monotonic()
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            answer.status = int(head.split(b" ", 2)[1])
            await _body(reader, head, answer)
    except (OSError, EOFError, ValueError, IndexError, asyncio.LimitOverrunError) as error:
        answer.error = f"{type(error).__name__}: {error}"[:300]
    finally:
        answer.ended_s = time.monotonic()
        if writer is not None:
            writer.close()
    if answer.status is not None and answer.status != 200 and answer.error is None:
        answer.error = f"status {answer.status}"
    return answer
