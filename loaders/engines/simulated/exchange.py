"""One HTTP request and its answer, framed as uvicorn frames it.

An answer is one ``write`` with a content-length; a stream is chunked, one chunk per event.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol
from urllib.parse import parse_qs

REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}
"""The phrase of each status."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What a client may send and for how long it may take."""

    max_head_bytes: int = 65_536
    max_body_bytes: int = 64 * 1024 * 1024
    max_connections: int = 10_000
    keepalive_s: float = 5.0
    request_timeout_s: float = 60.0
    backlog: int = 2048


class Link(Protocol):
    """What an exchange needs of its connection."""

    writable: bool

    @property
    def fixed_headers(self) -> bytes:
        """The head fields of every answer, ``date`` included."""

    @property
    def closing(self) -> bool:
        """Whether the connection is to be closed after the answer under way."""

    def write(self, data: bytes) -> None:
        """Send bytes, where the client is still there."""

    def finished(self, exchange: Exchange) -> None:
        """The answer is whole."""

    def cut(self, *, reset: bool) -> None:
        """Hang up."""


class Exchange:
    """One request and its answer. The handler calls ``respond``, or ``stream`` … ``end``.

    ``on_gone`` is called when the client left before the answer was whole; ``on_drained`` when a
    slow reader has taken what was written, so that ``writable`` is true again. ``extra`` are more
    head fields of the answer, as bytes.
    """

    __slots__ = (
        "_chunked",
        "_connection",
        "body",
        "done",
        "extra",
        "headers",
        "keepalive",
        "method",
        "on_drained",
        "on_gone",
        "path",
        "query",
        "streaming",
    )

    def __init__(
        self,
        connection: Link,
        *,
        method: str,
        path: str,
        query: str,
        headers: dict[bytes, bytes],
        body: bytes,
        keepalive: bool,
        chunked: bool,
    ) -> None:
        self._connection = connection
        self._chunked = chunked
        self.method = method
        self.path = path
        self.query = query
        self.headers = headers
        self.body = body
        self.keepalive = keepalive
        self.streaming = False
        self.done = False
        self.extra = b""
        self.on_gone: Callable[[], None] | None = None
        self.on_drained: Callable[[], None] | None = None

    @property
    def writable(self) -> bool:
        """Whether the client keeps up with what is written."""
        return self._connection.writable

    def parameters(self) -> Mapping[str, str]:
        """The last value of each query parameter."""
        return {name: values[-1] for name, values in parse_qs(self.query).items()}

    def respond(
        self,
        status: int,
        body: bytes = b"",
        content_type: bytes = b"application/json",
    ) -> None:
        """The whole answer at once. Nothing where it is answered or the client is gone."""
        if self.done:
            return
        head = self._head(status)
        head += b"content-length: %d\r\n" % len(body)
        if body:
            head += b"content-type: %s\r\n" % content_type
        self._connection.write(head + b"\r\n" + (b"" if self.method == "HEAD" else body))
        self._finish()

    def stream(self) -> None:
        """Begin a stream of server-sent events."""
        if self.done:
            return
        self.streaming = True
        head = self._head(200) + b"content-type: text/event-stream; charset=utf-8\r\n"
        if self._chunked:
            head += b"transfer-encoding: chunked\r\n"
        else:
            self.keepalive = False
        self._connection.write(head + b"\r\n")

    def send(self, events: list[bytes]) -> None:
        """Write ``events``, each a chunk of its own."""
        if self.done or not events:
            return
        if self._chunked:
            data = b"".join([b"%x\r\n%s\r\n" % (len(event), event) for event in events])
        else:
            data = b"".join(events)
        self._connection.write(data)

    def end(self) -> None:
        """The stream is whole."""
        if self.done:
            return
        if self._chunked:
            self._connection.write(b"0\r\n\r\n")
        self._finish()

    def cut(self, *, reset: bool) -> None:
        """Break the connection off, as a dying engine does: with a FIN, or with a RST."""
        self.done = True
        self.on_gone = self.on_drained = None
        self._connection.cut(reset=reset)

    def _head(self, status: int) -> bytes:
        phrase = REASONS.get(status, b"")
        head = b"HTTP/1.1 %d %s\r\n%s" % (status, phrase, self._connection.fixed_headers)
        head += self.extra
        if not self.keepalive or self._connection.closing:
            self.keepalive = False
            head += b"connection: close\r\n"
        return head

    def _finish(self) -> None:
        self.done = True
        self.on_gone = self.on_drained = None
        self._connection.finished(self)
