"""One client connection: heads read strictly, bodies handed on, one exchange at a time.

A request that arrives before the answer to the last one is whole (pipelining) stays unread in a
bounded buffer. While an exchange runs the connection keeps reading, so that a client that goes
away is noticed at once, held requests included.
"""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, Final

from gateway.datapath import local
from gateway.datapath.answer import ANSWER, SENT
from gateway.datapath.connection import Connection
from gateway.datapath.exchange import Exchange
from gateway.datapath.protocol.chunks import ChunkDecoder
from gateway.datapath.protocol.errors import ApiError, Reason, render
from gateway.datapath.protocol.http1 import RequestHead, has_bare_line_end, parse_request_head
from gateway.datapath.protocol.openai import PROXIED

if TYPE_CHECKING:
    from gateway.datapath.worker import Worker

log = logging.getLogger("tidegate.datapath")

_MAX_PIPELINED_BYTES: Final = 65536
# Refused connections beyond the limit that are closed gently at one time.
_MAX_LINGERING: Final = 256
_EMPTY_LINES: Final = re.compile(rb"(?:\r\n)+")


class ClientConnection(Connection):
    """See the module. ``deadline_s`` (loop clock) is when the sweeper looks at it again."""

    __slots__ = (
        "_body_left",
        "_buffer",
        "_chunks",
        "_reading_body",
        "_scanned",
        "exchange",
    )

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker, worker.loop.time() + worker.config.head_timeout_s)
        self.exchange: Exchange | None = None
        self._buffer = b""
        self._scanned = 0  # so much of the buffer holds no end of a head
        self._body_left = 0
        self._chunks: ChunkDecoder | None = None
        self._reading_body = False

    # asyncio's side

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        self.transport = transport
        beyond = self.worker.client_opened(self)
        if beyond > 0:
            self._refuse(
                ApiError(
                    503,
                    Reason.CONNECTIONS_FULL,
                    "The gateway has as many connections as it may have.",
                    retry_after_s=1.0,
                )
            )
            if beyond > _MAX_LINGERING:
                self._close()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or we closed it."""
        self._closing = True
        self.worker.client_closed(self)
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.cancel()

    def eof_received(self) -> bool:
        """The client closed its sending side. Nothing more can come: with no request running
        that ends the connection; with one, only a client that is gone does so."""
        return False

    def data_received(self, data: bytes) -> None:
        """Bytes from the client."""
        if self._closing:
            return
        try:
            if self._reading_body:
                self._body(data)
            elif self.exchange is not None:
                self._buffer += data
                if len(self._buffer) > _MAX_PIPELINED_BYTES:
                    self.pause()
            else:
                self._head(data)
        except Exception:  # noqa: BLE001 -- a fault of ours ends one request, with an answer
            self._fault()

    def _fault(self) -> None:
        log.exception("a fault of the gateway's own, met while reading a request")
        exchange = self.exchange
        error = ApiError(500, Reason.INTERNAL, "The gateway met a fault of its own.")
        self.keep_alive = False
        if exchange is None:
            self._refuse(error)
        elif exchange.state == ANSWER:
            exchange.cut("the gateway met a fault of its own")
        else:
            exchange.reject(error)

    def pause_writing(self) -> None:
        """The client reads slowly."""
        self.writing_paused = True
        if self.exchange is not None:
            self.exchange.pause_answer()

    def resume_writing(self) -> None:
        """The client reads again."""
        self.writing_paused = False
        if self.exchange is not None:
            self.exchange.resume_answer()
        elif not self._closing:
            self.resume()
            self.worker.loop.call_soon(self._go_on)

    # Reading

    def _head(self, data: bytes) -> None:
        seen, self._scanned = self._scanned, 0
        if self._buffer:
            data = self._buffer + data
        if data.startswith(b"\r\n"):  # RFC 9112 2.2: empty lines before a request are skipped
            data = _EMPTY_LINES.sub(b"", data, count=1)
            seen = 0
        config = self.worker.config
        end = data.find(b"\r\n\r\n", seen - 3 if seen > 3 else 0)
        try:
            if end < 0:
                if len(data) > config.max_head_bytes:
                    raise self._head_too_large()
                if has_bare_line_end(data, seen - 1 if seen else 0):
                    raise ApiError(400, Reason.BAD_REQUEST, "Header lines must end in CRLF.")
                if data and not self._buffer:
                    self.deadline_s = self.worker.loop.time() + config.head_timeout_s
                self._buffer = data
                self._scanned = len(data)
                return
            if end > config.max_head_bytes:
                raise self._head_too_large()
            raw = data[: end + 4]
            if raw.count(b"\r\n") - 2 > config.max_headers:
                raise ApiError(
                    431,
                    Reason.HEAD_TOO_LARGE,
                    f"The request has more than {config.max_headers} header lines.",
                )
            head = parse_request_head(raw)
        except ApiError as error:
            self._refuse(error)
            return
        self._buffer = b""
        self._request(head, data[end + 4 :])

    def _head_too_large(self) -> ApiError:
        limit = self.worker.config.max_head_bytes
        return ApiError(
            431, Reason.HEAD_TOO_LARGE, f"The request head is larger than {limit} bytes."
        )

    def _request(self, head: RequestHead, rest: bytes) -> None:
        worker = self.worker
        self.keep_alive = head.keep_alive and not worker.draining
        self.origin = head.origin
        if head.method != b"POST" or head.path not in PROXIED:
            self._local(head, rest)
            return
        now = worker.loop.time()
        exchange = Exchange(self, head, now)
        self.exchange = exchange
        self.deadline_s = now + worker.config.request_timeout_s
        length = head.content_length
        try:
            if not head.chunked and length == len(rest):
                exchange.complete_at_once(rest)
                return
            if length > worker.config.max_body_bytes:
                self._reading_body = True  # it is still on its way: linger, or a reset ends it
                raise ApiError(
                    413,
                    Reason.BODY_TOO_LARGE,
                    f"The request body is larger than {worker.config.max_body_bytes} bytes.",
                )
        except ApiError as error:
            exchange.reject(error)
            return
        self._reading_body = True
        self._chunks = ChunkDecoder() if head.chunked else None
        self._body_left = length
        if head.expect_continue and not rest:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body(rest)

    def _body(self, data: bytes) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        config = self.worker.config
        self.deadline_s = min(
            self.worker.loop.time() + config.body_timeout_s,
            exchange.started_s + config.request_timeout_s,
        )
        rest: bytes | None = None
        try:
            if self._chunks is not None:
                payload, rest = self._chunks.feed(data)
                if payload:
                    exchange.feed(payload[0] if len(payload) == 1 else b"".join(payload))
            else:
                left = self._body_left
                if len(data) >= left:
                    data, rest = data[:left], data[left:]
                self._body_left = left - len(data)
                if data:
                    exchange.feed(data)
            if rest is not None and self.exchange is exchange:
                self._reading_body = False
                self._buffer = rest
                self.deadline_s = exchange.started_s + self.worker.config.request_timeout_s
                exchange.complete()
        except ApiError as error:
            if self._reading_body:
                self.keep_alive = False
            exchange.reject(error)

    def _local(self, head: RequestHead, rest: bytes) -> None:
        """What the gateway answers itself. Its body, if any, was never wanted: not read either,
        unless it is here already."""
        if head.chunked or head.content_length > len(rest):
            self.keep_alive = False
        request_id = head.request_id or self.worker.next_request_id()
        self.transport.write(
            local.answer(
                self.worker,
                head,
                request_id=request_id,
                close=not self.keep_alive,
                extra=self.cors_lines(),
            )
        )
        if len(rest) < head.content_length or head.chunked:
            self._linger()
        else:
            self._next(rest[head.content_length :])

    # Ends

    def exchange_ended(self, exchange: Exchange) -> None:
        """The exchange is over; go on with the next request, or close."""
        if self.exchange is not exchange:
            return
        self.exchange = None
        if self._reading_body:
            # The answer came before the body was whole: the rest of it has no meaning any more.
            self._reading_body = False
            self.keep_alive = False
            self._linger()
            return
        self._next(self._buffer)

    def _next(self, rest: bytes) -> None:
        self._buffer = b""
        if not self.keep_alive or self._closing or self.worker.draining:
            self._close()
            return
        self.deadline_s = self.worker.loop.time() + self.worker.config.idle_timeout_s
        self._buffer = rest
        if self.writing_paused or len(rest) > _MAX_PIPELINED_BYTES:
            self.pause()
        elif self._paused:
            self.resume()
        # A client that asks without reading the answers gets not one more before it does.
        if rest and not self.writing_paused:
            # Not from here: an answer made at once would otherwise recurse once per request.
            self.worker.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        idle = self.exchange is None and not self._closing and not self.writing_paused
        if idle and self._buffer:
            data, self._buffer = self._buffer, b""
            self._head(data)

    def _refuse(self, error: ApiError) -> None:
        """Answer an error outside any exchange and close: what follows cannot be trusted."""
        self.worker.rejected(error.reason)
        self.transport.write(render(error, request_id=self.worker.next_request_id(), close=True))
        self._linger()

    def sweep(self, now: float) -> None:
        """The deadline passed, or an answer may have stalled."""
        exchange, config = self.exchange, self.worker.config
        if exchange is None:
            if now >= self.deadline_s:
                if self._closing or self.writing_paused:
                    self.transport.abort()
                elif self._buffer:
                    self._refuse(
                        ApiError(408, Reason.HEAD_TIMEOUT, "The request head took too long.")
                    )
                else:
                    self._close()
            return
        if now >= self.deadline_s:
            end_s = exchange.started_s + config.request_timeout_s
            if now < end_s and self._paused:  # the replica is slow, not the client
                self.deadline_s = end_s
            elif now < end_s:
                exchange.reject(
                    ApiError(408, Reason.BODY_TIMEOUT, "The request body took too long.")
                )
            elif exchange.state == ANSWER:
                exchange.cut("it took longer than request_timeout_s")
            else:
                exchange.reject(
                    ApiError(
                        504,
                        Reason.REQUEST_TIMEOUT,
                        f"The request took longer than {config.request_timeout_s:g} s.",
                    )
                )
        elif self._stalled(exchange, now):
            if exchange.state == ANSWER and self.writing_paused:
                self.transport.abort()  # it is the client that takes no more: nobody to tell
                return
            if exchange.state == ANSWER:
                exchange.cut("no byte from it for upstream_idle_timeout_s")
                return
            exchange.reject(
                ApiError(
                    504,
                    Reason.REPLICA_TIMEOUT,
                    f"The model's replica sent nothing for {config.upstream_idle_timeout_s:g} s.",
                )
            )

    def _stalled(self, exchange: Exchange, now: float) -> bool:
        if exchange.state not in (SENT, ANSWER):
            return False
        since_s = exchange.last_s
        if self._reading_body:  # then it is the replica's turn only while it takes no more
            since_s = max(since_s, self._paused_s if self._paused else now)
        return now - since_s >= self.worker.config.upstream_idle_timeout_s

    def drain(self) -> None:
        """No further request on this connection; one that runs is finished."""
        if self.exchange is None and not self._buffer:
            self._close()
        else:
            self.keep_alive = False

    def end_now(self) -> None:
        """The drain's time is up."""
        exchange = self.exchange
        self.keep_alive = False
        if exchange is None:
            self._close()
        else:
            exchange.reject(
                ApiError(
                    503,
                    Reason.DRAINING,
                    "The gateway stops and can wait no longer for this answer; ask again.",
                    retry_after_s=1.0,
                )
            )

    def __repr__(self) -> str:
        return f"<client {self.exchange!r} buffered={len(self._buffer)}>"
