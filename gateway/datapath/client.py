"""One client connection: heads read strictly, bodies handed on, one exchange at a time.

A request that arrives before the answer to the last one is whole (pipelining) stays unread in a
bounded buffer. While an exchange runs the connection keeps reading, so that a client that goes
away is noticed at once, held requests included.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import struct
from collections import deque
from typing import Any, Final

from gateway.datapath import local, metrics
from gateway.datapath.answer import Downstream
from gateway.datapath.context import WorkerContext
from gateway.datapath.exchange import Exchange
from gateway.datapath.pool import ANSWER, SENT, PoolDirectory, PooledRequest
from gateway.datapath.protocol.bodies import JsonReader
from gateway.datapath.protocol.chunks import ChunkDecoder
from gateway.datapath.protocol.errors import (
    ApiError,
    Reason,
    api_of,
    encoding_unsupported,
    render,
)
from gateway.datapath.protocol.http1 import (
    KEEP_ALIVE,
    RequestHead,
    has_bare_line_end,
    parse_request_head,
)
from gateway.datapath.protocol.openai import plain_path
from gateway.datapath.request import AT_ONCE_BYTES, SMALL_BODY_BYTES, buffer_full

log = logging.getLogger("tidegate.datapath")

_MAX_PIPELINED_BYTES: Final = 65536
# Large bodies and chunked ones are read a slice at a time, those of all connections in turns, until
# one turn of the event loop has seen so many parts of them (chunks, brackets, strings): a body may
# be made so that each of its bytes is one.
_SLICE_BYTES: Final = 16384
_PARTS_PER_TURN: Final = 4096
_PARTS_PER_SLICE: Final = 32
# Refused connections beyond the limit that are closed gently at one time.
_MAX_LINGERING: Final = 256
_LINGER_S: Final = 5.0
# Where no body could give way, none is looked for again for so long.
_NO_ROOM_S: Final = 0.1
_NO_LINGER: Final = struct.pack("ii", 1, 0)
# At the end of a drain: time for the last error answers to be sent.
_FLUSH_S: Final = 1.0
# Of a head that is refused: enough of its first line to tell whose API was asked.
_TARGET_BYTES: Final = 64
_EMPTY_LINES: Final = re.compile(rb"(?:\r\n)+")


class ClientConnection(Downstream):
    """See the module. ``deadline_s`` (loop clock) is when ``sweep`` ends a wait."""

    def __init__(self, clients: ClientConnections) -> None:
        context = clients.context
        self.clients = clients
        self.context = context
        self.pools = clients.pools
        self.now = context.now
        self.transport = None
        self.keep_alive = True
        self.origin = None
        self.writing_paused = False
        self.deadline_s: float = context.now() + context.gateway.head_timeout_s
        self.exchange: Exchange | None = None
        self._address: str | None = None
        self._buffer = b""
        self._scanned = 0  # so much of the buffer holds no end of a head
        self._body_left = 0
        self._chunks: ChunkDecoder | None = None
        self._waiting = b""  # received of a body, and read up to the position that follows
        self._waiting_at = 0
        self._waits = False  # nothing is read from it meanwhile
        self._reading_body = False
        self._paused = False
        self._paused_s: float = 0.0
        self._closing = False

    # asyncio's side

    def connection_made(self, transport: Any) -> None:
        """A client connected."""
        self.transport = transport
        beyond = self.clients.opened(self)
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
        self.clients.closed(self)
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
            if self._waiting:
                self._waiting += data
            elif self._reading_body:
                self._body(data)
            elif self.exchange is not None:
                self._buffer += data
                if len(self._buffer) > _MAX_PIPELINED_BYTES:
                    self.pause()
            else:
                self._head(data)
        except Exception:  # noqa: BLE001 -- an internal error ends one request, with an answer
            self._internal_error()

    def _internal_error(self) -> None:
        log.exception("internal error of the gateway while it read a request")
        exchange = self.exchange
        error = ApiError(500, Reason.INTERNAL, "Internal error of the gateway.")
        self.keep_alive = False
        if exchange is None:
            self._refuse(error)
        elif exchange.state == ANSWER:
            exchange.cut("internal error of the gateway")
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
            self.context.loop.call_soon(self._go_on)

    # The exchange's side

    @property
    def address(self) -> str:
        """Where the client is, without the port: an IPv6 network of 64 bits is one client's."""
        if self._address is None:
            peer = self.transport.get_extra_info("peername")
            host = str(peer[0]) if peer else ""
            self._address = ":".join(host.split(":")[:4]) if ":" in host else host
        return self._address

    def make_room(self, request: PooledRequest) -> bool:
        """End the largest body of the client that has most bytes of bodies that are not whole, if
        that is not this request's client. Returns whether there was one."""
        return self.clients.make_room(request)

    def pause(self) -> None:
        """Stop reading the client."""
        if not self._paused and not self._closing:
            self._paused = True
            self._paused_s = self.now()
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read the client again."""
        if self._paused and not self._closing:
            self._paused = False
            if self._waiting:
                # Not from here: the exchange that asks is in the middle of something.
                self.context.loop.call_soon(self.clients.take_turn, self)
            else:
                self.transport.resume_reading()

    # Reading

    def _head(self, data: bytes) -> None:
        seen, self._scanned = self._scanned, 0
        if self._buffer:
            data = self._buffer + data
        if data.startswith(b"\r\n"):  # RFC 9112 2.2: empty lines before a request are skipped
            data = _EMPTY_LINES.sub(b"", data, count=1)
            seen = 0
        gateway = self.context.gateway
        end = data.find(b"\r\n\r\n", seen - 3 if seen > 3 else 0)
        try:
            if end < 0:
                if len(data) > gateway.max_head_bytes:
                    raise self._head_too_large()
                if has_bare_line_end(data, seen - 1 if seen else 0):
                    raise ApiError(400, Reason.BAD_REQUEST, "Header lines must end in CRLF.")
                if data and not self._buffer:
                    self.deadline_s = self.now() + gateway.head_timeout_s
                self._buffer = data
                self._scanned = len(data)
                return
            if end > gateway.max_head_bytes:
                raise self._head_too_large()
            raw = data[: end + 4]
            if raw.count(b"\r\n") - 2 > gateway.max_headers:
                raise ApiError(
                    431,
                    Reason.HEAD_TOO_LARGE,
                    f"The request has more than {gateway.max_headers} header lines.",
                )
            head = parse_request_head(raw)
        except ApiError as error:
            self._buffer = data
            self._refuse(error)
            return
        self._buffer = b""
        self._request(head, data[end + 4 :])

    def _head_too_large(self) -> ApiError:
        limit = self.context.gateway.max_head_bytes
        return ApiError(
            431, Reason.HEAD_TOO_LARGE, f"The request head is larger than {limit} bytes."
        )

    def _request(self, head: RequestHead, rest: bytes) -> None:
        context = self.context
        self.keep_alive = head.keep_alive and not context.draining
        self.origin = head.origin
        if head.path not in context.proxied:
            head.path = plain_path(head.path)
        if head.method != b"POST" or head.path not in context.proxied:
            self._local(head, rest)
            return
        now = context.now()
        exchange = Exchange(self, head, now)
        self.exchange = exchange
        self.deadline_s = now + context.gateway.request_timeout_s
        length = head.content_length
        try:
            if head.content_encoding is not None:
                self._reading_body = True
                raise encoding_unsupported(head.content_encoding)
            if (
                length == len(rest) < AT_ONCE_BYTES
                and not head.chunked
                and exchange.reader is None
                and exchange.complete_at_once(rest)
            ):
                return
            if length > context.gateway.max_body_bytes:
                self._reading_body = True  # it is still on its way: linger, or a reset ends it
                raise ApiError(
                    413,
                    Reason.BODY_TOO_LARGE,
                    f"The request body is larger than {context.gateway.max_body_bytes} bytes.",
                )
        except ApiError as error:
            exchange.reject(error)
            return
        self._reading_body = True
        self._chunks = ChunkDecoder() if head.chunked else None
        self._body_left = length
        from_bytes = min(context.gateway.peek_bytes, SMALL_BODY_BYTES)
        if exchange.reader is None and (head.chunked or length >= from_bytes):
            exchange.reader = JsonReader()
        if head.expect_continue and not rest:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._body(rest)

    def _body(self, data: bytes) -> None:
        """Some of a body: read it at once, or wait for a turn where that may take a while."""
        exchange = self.exchange
        if exchange is not None and exchange.reader is not None and data:
            self._waiting, self._waiting_at = data, 0
            if not self._paused:
                self.clients.take_turn(self)
            if self._waiting and not self._closing:
                self._waits = True
                self.transport.pause_reading()
        else:
            self._read_body(data, b"")

    def read_on(self) -> int:
        """It is this connection's turn: read the next slice of what was received. Returns how many
        parts it had."""
        if self._paused or self._closing or not self._waiting:
            return 0  # ``resume`` asks for another turn
        start, exchange = self._waiting_at, self.exchange
        reader = None if exchange is None else exchange.reader
        before = 0 if reader is None else reader.parts
        data = self._waiting[start : start + _SLICE_BYTES]
        later = b""
        if start + len(data) < len(self._waiting):
            self._waiting_at = start + len(data)
            if self._chunks is not None or self._body_left <= len(data):
                later = self._waiting[self._waiting_at :]
        else:
            self._waiting = b""
        parts = 0
        try:
            parts = self._read_body(data, later)
        except Exception:  # noqa: BLE001 -- as in ``data_received``
            self._internal_error()
        if self._waiting:
            if not self._paused:
                self.clients.take_turn(self)
        elif self._waits and not self._closing:
            self._waits = False
            if not self._paused:
                self.transport.resume_reading()
        return _PARTS_PER_SLICE + parts + (0 if reader is None else reader.parts - before)

    def _read_body(self, data: bytes, later: bytes) -> int:
        """Read some of the body, of which ``later`` was received as well. Returns the number of
        chunks that it had."""
        exchange = self.exchange
        if exchange is None:
            return 0
        gateway = self.context.gateway
        self.deadline_s = min(
            self.now() + gateway.body_timeout_s,
            exchange.started_s + gateway.request_timeout_s,
        )
        rest: bytes | None = None
        chunks = 0
        try:
            if self._chunks is not None:
                payload, rest = self._chunks.feed(data)
                chunks = len(payload)
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
                self._buffer = rest + later
                self._waiting = b""
                self.deadline_s = exchange.started_s + self.context.gateway.request_timeout_s
                exchange.complete()
        except ApiError as error:
            if self._reading_body:
                self.keep_alive = False
            exchange.reject(error)
        return chunks

    def _local(self, head: RequestHead, rest: bytes) -> None:
        """What the gateway answers itself. Its body, if any, has no meaning and is not read,
        unless it was received already."""
        if head.chunked or head.content_length > len(rest):
            self.keep_alive = False
        request_id = head.request_id or self.context.next_request_id()
        self.transport.write(
            local.answer(
                self.context,
                self.pools,
                head,
                request_id=request_id,
                close=not self.keep_alive,
                extra=self.context.cors_lines(self.origin)
                + (KEEP_ALIVE if head.http10 and self.keep_alive else b""),
            )
        )
        if len(rest) < head.content_length or head.chunked:
            self._linger()
        else:
            self._next(rest[head.content_length :])

    # Ends

    def exchange_ended(self, request: PooledRequest) -> None:
        """The request is over: go on with the next one, or close."""
        if self.exchange is not request:
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
        if not self.keep_alive or self._closing or self.context.draining:
            self._close()
            return
        self.deadline_s = self.now() + self.context.gateway.idle_timeout_s
        self._buffer = rest
        if self.writing_paused or len(rest) > _MAX_PIPELINED_BYTES:
            self.pause()
        elif self._paused:
            self.resume()
        # A client that asks without reading the answers gets not one more before it does.
        if rest and not self.writing_paused:
            # Not from here: an answer made at once would otherwise recurse once per request.
            self.context.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        idle = self.exchange is None and not self._closing and not self.writing_paused
        if idle and self._buffer:
            data, self._buffer = self._buffer, b""
            self._head(data)

    def _refuse(self, error: ApiError) -> None:
        """Answer an error outside any exchange and close: what follows cannot be trusted. Of the
        head in the buffer nothing is believed but whose client sent it."""
        self.context.count_rejection(error.reason, error.status)
        target = self._buffer[:_TARGET_BYTES].split(b" ", 2)[1:2]
        self._buffer = b""
        self.transport.write(
            render(
                error,
                request_id=self.context.next_request_id(),
                close=True,
                api=api_of(target[0] if target else b""),
            )
        )
        self._linger()

    def _close(self) -> None:
        self._closing = True
        self.deadline_s = self.now() + self.context.gateway.idle_timeout_s
        self.transport.close()

    def reset(self) -> None:
        """End the connection with a reset: where an orderly end would say that a body is whole."""
        self._closing = True
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def _linger(self) -> None:
        """Close after an early answer. Closing with unread bytes would reset the connection, and
        the client would lose the answer: so end the sending side, and read on for a moment."""
        self._closing = True
        self._waiting = b""
        if self._paused or self._waits:
            self._paused = self._waits = False
            self.transport.resume_reading()
        self.deadline_s = self.now() + _LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()

    def sweep(self, now: float) -> None:
        """The deadline passed, or an answer may have stalled."""
        exchange, gateway = self.exchange, self.context.gateway
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
            end_s = exchange.started_s + gateway.request_timeout_s
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
                        f"The request took longer than {gateway.request_timeout_s:g} s.",
                    )
                )
        elif self._reading_body and not self._paused and exchange.is_too_slow(now):
            slowest = gateway.min_body_bytes_per_s
            exchange.reject(
                ApiError(
                    408,
                    Reason.BODY_TIMEOUT,
                    f"The request body came more slowly than {slowest} bytes a second.",
                )
            )
        elif self._stalled(exchange, now):
            if exchange.state == ANSWER and self.writing_paused:
                self.transport.abort()  # the client takes no more: no error would reach it
                return
            if exchange.state == ANSWER:
                exchange.cut("no byte from it for upstream_idle_timeout_s")
                return
            exchange.reject(
                ApiError(
                    504,
                    Reason.REPLICA_TIMEOUT,
                    f"The model's replica sent nothing for {gateway.upstream_idle_timeout_s:g} s.",
                )
            )

    def _stalled(self, exchange: Exchange, now: float) -> bool:
        if exchange.state not in (SENT, ANSWER):
            return False
        since_s = exchange.last_s
        if self._reading_body:  # then it is the replica's turn only while it takes no more
            since_s = max(since_s, self._paused_s if self._paused else now)
        return now - since_s >= self.context.gateway.upstream_idle_timeout_s

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


class ClientConnections:
    """All client connections of this worker: counted, swept for timeouts, drained at the end."""

    def __init__(self, context: WorkerContext, pools: PoolDirectory) -> None:
        self.context = context
        self.pools = pools
        self._open: set[ClientConnection] = set()
        self._turns: deque[ClientConnection] = deque()
        self._parts_left: int = _PARTS_PER_TURN
        self._is_giving = False
        self._is_next_due = False
        self._all_closed = asyncio.Event()
        self._no_room_until_s: float = 0.0

    def opened(self, client: ClientConnection) -> int:
        """Count a connection. Returns how many there are beyond ``max_connections``."""
        counters = self.context.counters
        self._open.add(client)
        counters[metrics.CONNECTIONS] += 1
        counters[metrics.ACCEPTED] += 1
        return len(self._open) - self.context.gateway.max_connections

    def closed(self, client: ClientConnection) -> None:
        """Forget a connection."""
        if client in self._open:
            self._open.discard(client)
            self.context.counters[metrics.CONNECTIONS] -= 1
        if self.context.draining and not self._open:
            self._all_closed.set()

    def make_room(self, request: PooledRequest) -> bool:
        """See ``ClientConnection.make_room``."""
        now = self.context.now()
        if now < self._no_room_until_s:
            return False
        unfinished: dict[str, list[Exchange]] = {}
        for client in self._open:
            other = client.exchange
            if other is not None and not other.whole and other.parts:
                unfinished.setdefault(client.address, []).append(other)
        sizes = {
            address: sum([other.body_bytes for other in others])
            for address, others in unfinished.items()
        }
        heaviest = max(sizes, key=sizes.__getitem__, default="")
        if sizes.get(heaviest, 0) <= sizes.get(request.address, 0):
            self._no_room_until_s = now + _NO_ROOM_S
            return False
        largest = unfinished[heaviest][0]
        for other in unfinished[heaviest]:
            if other.body_bytes > largest.body_bytes:
                largest = other
        largest.reject(buffer_full())
        return True

    def take_turn(self, client: ClientConnection) -> None:
        """Have a connection read on, after those that asked before it."""
        self._turns.append(client)
        if not self._is_giving:
            self._give_turns()

    def _give_turns(self) -> None:
        self._is_giving = True
        try:
            while self._turns and self._parts_left > 0:
                self._parts_left -= self._turns.popleft().read_on()
        finally:
            self._is_giving = False
        if not self._is_next_due:
            self._is_next_due = True
            self.context.loop.call_soon(self._next_turn)

    def _next_turn(self) -> None:
        """The event loop has seen to the others: so many parts may be read again."""
        self._is_next_due = False
        self._parts_left = _PARTS_PER_TURN
        if self._turns:
            self._give_turns()

    def sweep(self, now: float) -> None:
        """End what waited too long."""
        for client in list(self._open):
            client.sweep(now)

    async def drain(self, limit_s: float) -> None:
        """Finish the requests under way, then close. After ``limit_s`` those that are left are
        answered with an error, and every connection is ended."""
        for client in list(self._open):
            client.drain()
        if await self._wait_closed(limit_s):
            return
        for client in list(self._open):
            client.end_now()
        await self._wait_closed(_FLUSH_S)
        for client in list(self._open):
            client.transport.abort()

    async def _wait_closed(self, limit_s: float) -> bool:
        if not self._open:
            return True
        try:
            await asyncio.wait_for(self._all_closed.wait(), limit_s)
        except TimeoutError:
            return False
        return True
