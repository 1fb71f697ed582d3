"""One answer on its way to the client: how its bytes travel, and what is read of them in passing.

The bytes go through as they come. First byte, usage and number of events are read from the same
blocks, and change nothing, but that usage which only the gateway asked for is taken out again.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Final

from gateway.datapath.context import WorkerContext
from gateway.datapath.pool import PoolDirectory, PooledRequest
from gateway.datapath.protocol import sse
from gateway.datapath.protocol.chunks import ChunkDecoder
from gateway.datapath.protocol.errors import ApiError, api_of, engine_error
from gateway.datapath.protocol.http1 import KEEP_ALIVE, RequestHead, ResponseHead
from gateway.datapath.request import AnswerReading

# How the body travels to the client: as it is, as chunks of our own (our head was sent with the
# first keep-alive comment), bare until close (HTTP/1.0), collected for an error event, or less the
# usage that the client did not ask for; or not at all, once it has left with all tokens.
_RAW: Final = 0
_WRAP: Final = 1
_PLAIN: Final = 2
_COLLECT: Final = 3
_LESS_USAGE: Final = 4
_UNHEARD: Final = 5
_MAX_COLLECTED_BYTES: Final = 65536
_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n")
# Its clients read the request's id from a header of their own (``errors.id_lines``).
_ANTHROPIC_PATH: Final = b"/v1/messages"
# Until a chunk is whole so much of a stream is held back, where usage is taken out of it.
_MAX_HELD_BACK_BYTES: Final = 65536


class Downstream(asyncio.Protocol, ABC):
    """The client connection, as a request and its answer see it.

    ``keep_alive`` says whether the connection takes another request after this one, ``origin`` is
    the ``Origin`` header of the current one. ``now`` is the event loop's clock.
    """

    context: WorkerContext
    pools: PoolDirectory
    now: Callable[[], float]
    transport: Any
    keep_alive: bool
    origin: bytes | None
    writing_paused: bool

    @abstractmethod
    def pause(self) -> None:
        """Stop reading the client."""

    @abstractmethod
    def resume(self) -> None:
        """Read the client again."""

    @abstractmethod
    def reset(self) -> None:
        """End the connection with a reset: where an orderly end would say that a body is whole."""

    @property
    @abstractmethod
    def address(self) -> str:
        """Where the client is, without the port."""

    @abstractmethod
    def make_room(self, request: PooledRequest) -> bool:
        """End the largest body of the client that has most bytes of bodies that are not whole, if
        that is not this request's client. Returns whether there was one."""

    @abstractmethod
    def exchange_ended(self, request: PooledRequest) -> None:
        """The request is over: go on with the next one, or close."""


class Answer:
    """See the module. ``sent_bytes`` went to the client; ``reading`` is what is read of it."""

    sent_bytes: int = 0
    _mode: int = _RAW
    _held_back: bytes = b""
    _collected: bytearray | None = None
    _decoder: ChunkDecoder | None = None

    def __init__(
        self, client: Downstream, request: RequestHead, request_id: bytes, head: ResponseHead
    ) -> None:
        self._client = client
        self._request = request
        self._request_id = request_id
        self.head = head
        self.reading = AnswerReading(request.path, head.status, is_stream=head.is_stream)

    def begin(
        self, body: bytes, *, between_chunks: bool, committed: bool, adds_usage: bool
    ) -> None:
        """Send the head, unless one of ours is out (``committed``), and what came with it.
        ``adds_usage``: only the gateway asked for its usage. Otherwise as ``write``."""
        head = self.head
        if (
            adds_usage
            or committed
            or self._request.http10
            or (head.content_length is None and not head.chunked)
        ):
            self._begin_otherwise(committed, adds_usage)
            if body:
                self.write(body, between_chunks=between_chunks)
            return
        client = self._client
        anthropic = self._request.path.startswith(_ANTHROPIC_PATH)
        if client.keep_alive and client.origin is None and not anthropic:
            end = b"\r\n\r\n"
        else:
            end = extra_lines(client, self._request, self._request_id) + b"\r\n\r\n"
        first = b"".join((head.kept, b"\r\nx-request-id: ", self._request_id, end, body))
        client.transport.write(first)
        self.sent_bytes = len(first)

    def _begin_otherwise(self, committed: bool, adds_usage: bool) -> None:
        """Our head is out already, or the client or the engine cannot frame a body."""
        client, head = self._client, self.head
        if committed:  # 200, event stream, chunked
            if not (head.status == 200 and head.is_stream):
                self._mode = _COLLECT
                self._collected = bytearray()
            elif not head.chunked:
                self._mode = _WRAP
            elif adds_usage:
                self._mode = _LESS_USAGE
        else:
            kept = head.kept
            if adds_usage and (head.chunked or head.content_length is not None):
                self._mode = _LESS_USAGE if head.chunked and head.is_stream else _RAW
            else:
                self._mode = _PLAIN
            if (
                self._mode == _PLAIN and head.content_length is None
            ):  # HTTP/1.0 has no framing for a body of unknown length
                kept = head.without_framing()
                client.keep_alive = False
                if head.chunked:
                    self._decoder = ChunkDecoder()
            extra = extra_lines(client, self._request, self._request_id)
            client.transport.write(
                b"%b\r\nx-request-id: %b%b\r\n\r\n" % (kept, self._request_id, extra)
            )

    def write(self, data: bytes, *, between_chunks: bool) -> None:
        """Send the next block. ``between_chunks``: it ends where a chunk does. Raises ``ApiError``
        on framing that cannot be read."""
        if self._mode == _RAW:
            self._client.transport.write(data)
            self.sent_bytes += len(data)
            return
        if self._collected is not None:
            if len(self._collected) < _MAX_COLLECTED_BYTES:
                self._collected += data
            return
        if self._mode == _UNHEARD:
            return
        if self._mode == _WRAP:
            data = sse.chunk(data)
        elif self._mode == _LESS_USAGE:
            data = self._less_usage(data, between_chunks)
        elif self._decoder is not None:  # it is stricter than llhttp, which let this pass
            data = b"".join(self._decoder.feed(data)[0])
        if data:
            self._client.transport.write(data)
            self.sent_bytes += len(data)

    def _less_usage(self, data: bytes, between_chunks: bool) -> bytes:
        """What of a block goes to a client that did not ask for the usage in it."""
        if self._held_back:
            data = self._held_back + data
            self._held_back = b""
        if not between_chunks:
            if len(data) <= _MAX_HELD_BACK_BYTES:
                self._held_back = data
                return b""
        elif data.find(sse.USAGE_EVENT) >= 0:
            data = sse.without_usage(data)
        return data

    # How it ends

    @property
    def is_error_event(self) -> bool:
        """Whether it is no stream, where the client was promised one: it ends as an error event."""
        return self._mode == _COLLECT

    @property
    def is_unheard(self) -> bool:
        """Whether the client has left with all tokens, and the usage is waited for."""
        return self._mode == _UNHEARD

    @property
    def ends_with_connection(self) -> bool:
        """Whether the end of the client's connection would say that it is whole."""
        return self._mode == _PLAIN and self.head.content_length is None

    @property
    def seen(self) -> bytes:
        """The last that the client has seen of it."""
        return b"" if self._mode == _COLLECT else self.reading.last_block

    def end(self) -> None:
        """It is whole."""
        if self._mode == _WRAP:
            self._client.transport.write(sse.LAST_CHUNK)

    def read_error(self) -> ApiError | bytes:
        """The error that it is, where the client was promised a stream, as the client's API says
        it."""
        body = bytes(self._collected or b"")
        if self.head.chunked:
            try:
                body = b"".join(ChunkDecoder().feed(body)[0])
            except ApiError:
                body = b""
        return engine_error(self.head.status, body, api_of(self._request.path))

    def wait_for_usage(self) -> bool:
        """The client left with all of it. Returns whether the usage is still to come: of what
        comes nothing is sent any more."""
        if self._mode != _LESS_USAGE or self.reading.end.find(sse.USAGE_EVENT) >= 0:
            return False
        self._mode = _UNHEARD
        return True

    def takes_event(self) -> bool:
        """Whether an event can be written into it now, in a chunk of its own."""
        if self._mode == _COLLECT:
            return True
        if not self.head.is_stream:
            return False
        if not self.reading.blocks:
            return self._mode == _WRAP or self.head.chunked
        last = self.reading.last_block
        if self._mode == _WRAP:
            return last.endswith(_EVENT_ENDS)
        return (
            (self._mode == _RAW or (self._mode == _LESS_USAGE and not self._held_back))
            and self.head.chunked
            and last.endswith(b"\r\n")
            and last[:-2].endswith(_EVENT_ENDS)
        )


def extra_lines(client: Downstream, request: RequestHead, request_id: bytes) -> bytes:
    """The gateway's own header lines for an answer passed on, less ``x-request-id``, each led by
    CRLF."""
    cors = client.context.cors_lines(client.origin)
    lines = b"\r\n" + cors[:-2] if cors else b""
    if request.path.startswith(_ANTHROPIC_PATH):
        lines += b"\r\nrequest-id: " + request_id
    if not client.keep_alive:
        return lines + b"\r\nconnection: close"
    return lines + b"\r\n" + KEEP_ALIVE[:-2] if request.http10 else lines
