"""HTTP/1.1 for the simulated engine: its port, its connections, one request and its answer each.

Answers are framed as uvicorn frames them: a whole one is one ``write`` with a content-length, a
stream is chunked, one chunk per event. A keep-alive connection is closed after a few idle seconds,
5 as by vLLM's server: clients that reuse connections must live with that, so the simulation has it
too. The data path's own parser is not used: it belongs to the gateway, which engines know nothing
of, and is stricter than the server that is simulated here.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs

import httptools

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


@dataclass(slots=True, kw_only=True, eq=False)
class HttpExchange:
    """One request and its answer. The handler calls ``respond``, or ``stream`` … ``end``.

    ``on_gone`` is called when the client left before the answer was whole; ``on_drained`` when a
    slow reader has taken what was written, so that ``writable`` is true again. ``extra`` are more
    head fields of the answer, as bytes.
    """

    connection: SimulatedConnection
    method: str
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes
    keepalive: bool
    chunked: bool
    done: bool = False
    extra: bytes = b""
    on_gone: Callable[[], None] | None = None
    on_drained: Callable[[], None] | None = None

    @property
    def writable(self) -> bool:
        """Whether the client keeps up with what is written."""
        return self.connection.writable

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
        self.connection.write(head + b"\r\n" + (b"" if self.method == "HEAD" else body))
        self._finish()

    def stream(self) -> None:
        """Begin a stream of server-sent events."""
        if self.done:
            return
        head = self._head(200) + b"content-type: text/event-stream; charset=utf-8\r\n"
        if self.chunked:
            head += b"transfer-encoding: chunked\r\n"
        else:
            self.keepalive = False
        self.connection.write(head + b"\r\n")

    def send(self, events: list[bytes]) -> None:
        """Write ``events``, each a chunk of its own."""
        if self.done or not events:
            return
        if self.chunked:
            data = b"".join([b"%x\r\n%s\r\n" % (len(event), event) for event in events])
        else:
            data = b"".join(events)
        self.connection.write(data)

    def end(self) -> None:
        """The stream is whole."""
        if self.done:
            return
        if self.chunked:
            self.connection.write(b"0\r\n\r\n")
        self._finish()

    def cut(self, *, reset: bool) -> None:
        """Break the connection off, as a dying engine does: with a FIN, or with a RST."""
        self.done = True
        self.on_gone = self.on_drained = None
        self.connection.cut(reset=reset)

    def _head(self, status: int) -> bytes:
        head = self.connection.http.head(status) + self.extra
        if not self.keepalive or self.connection.closing:
            self.keepalive = False
            head += b"connection: close\r\n"
        return head

    def _finish(self) -> None:
        self.done = True
        self.on_gone = self.on_drained = None
        self.connection.finished(self)


_MAX_PIPELINED = 16
_SWEEP_S = 0.25


class HttpServer:
    """What all connections of one server share."""

    def __init__(
        self,
        handle: Callable[[HttpExchange], None],
        limits: HttpLimits,
        *,
        fixed_headers: tuple[tuple[bytes, bytes], ...] = (),
        refuse: Callable[[], str | None] = lambda: None,
    ) -> None:
        self.handle = handle
        self.limits = limits
        self._labels = b"".join(b"%s: %s\r\n" % pair for pair in fixed_headers)
        self.refuse = refuse
        """Asked of every new connection: ``"close"`` or ``"reset"`` to end it at once."""
        self.draining = False
        self._fixed = self._labels
        self.connections: set[SimulatedConnection] = set()
        self._sweeper: asyncio.TimerHandle | None = None
        self._server: asyncio.Server | None = None
        self._all_gone = asyncio.Event()

    async def listen(self, sock: socket.socket) -> None:
        """Accept connections on a bound socket."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(
            lambda: SimulatedConnection(self, loop), sock=sock, backlog=self.limits.backlog
        )
        self._sweep()

    def head(self, status: int) -> bytes:
        """The first lines of any answer."""
        return b"HTTP/1.1 %d %s\r\n%s" % (status, REASONS.get(status, b""), self._fixed)

    def gone(self, connection: SimulatedConnection) -> None:
        """A connection is closed."""
        self.connections.discard(connection)
        if not self.connections:
            self._all_gone.set()

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._fixed = b"date: %s\r\n%s" % (formatdate(usegmt=True).encode(), self._labels)
        for connection in list(self.connections):
            if connection.deadline_s is not None and connection.deadline_s <= now:
                connection.expire()
        self._sweeper = loop.call_later(_SWEEP_S, self._sweep)

    async def drain(self, limit_s: float) -> bool:
        """Stop accepting, finish what is under way. False where ``limit_s`` was not enough."""
        self.draining = True
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            connection.close_if_idle()
        loop = asyncio.get_running_loop()
        end = loop.time() + limit_s
        while self.connections and loop.time() < end:
            self._all_gone.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_gone.wait(), end - loop.time())
        clean = not self.connections
        for connection in list(self.connections):
            connection.cut(reset=False)
        if self._sweeper is not None:
            self._sweeper.cancel()
        return clean


class SimulatedConnection(asyncio.Protocol):
    """One client connection: bytes in, exchanges out, one at a time and in order."""

    def __init__(self, http: HttpServer, loop: asyncio.AbstractEventLoop) -> None:
        self.http = http
        self.writable = True
        self.deadline_s: float | None = None
        self._loop = loop
        self._transport: Any = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._current: HttpExchange | None = None
        self._pending: deque[HttpExchange] = deque()
        self._refused = 0
        self._reason = ""
        self._upgraded = False
        self._in_head = self._in_body = False
        self._head_bytes = 0
        self._target = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0

    @property
    def closing(self) -> bool:
        """Whether to hang up after the answer under way."""
        return self.http.draining or self._refused != 0 or self._upgraded

    # From the transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client connected."""
        self._transport = transport
        http = self.http
        refusal = http.refuse()
        if refusal is None and len(http.connections) >= http.limits.max_connections:
            refusal = "close"
        http.connections.add(self)
        if refusal is not None:
            self.cut(reset=refusal == "reset")
            return
        self.deadline_s = self._loop.time() + http.limits.request_timeout_s

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone, or we hung up."""
        self.http.gone(self)
        self._transport = None
        self.deadline_s = None
        exchange, self._current = self._current, None
        self._pending.clear()
        if exchange is not None:
            gone, exchange.on_gone, exchange.on_drained = exchange.on_gone, None, None
            exchange.done = True
            if gone is not None:
                gone()

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._refused or self._upgraded or self._transport is None:
            return
        if not self._in_body:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # What came is answered as it is, in HTTP/1.1; what follows is in another protocol.
            self._upgraded = True
        except httptools.HttpParserError:
            self._refuse(400, "Invalid HTTP request received.")
        if self._in_head and self._head_bytes > self.http.limits.max_head_bytes:
            self._refuse(431, "Request header fields too large.")
        self._refuse_if_free()

    def pause_writing(self) -> None:
        """The client reads too slowly."""
        self.writable = False

    def resume_writing(self) -> None:
        """The client caught up."""
        self.writable = True
        if self._current is not None and self._current.on_drained is not None:
            self._current.on_drained()

    # From the parser

    def on_message_begin(self) -> None:
        """A request begins."""
        self._in_head = True
        self._target = b""
        self._headers = {}
        self._body = []
        self._body_bytes = 0
        self.deadline_s = self._loop.time() + self.http.limits.request_timeout_s

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header field; of a repeated one the first counts."""
        self._headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._in_body = True
        size = len(self._target) + sum(len(n) + len(v) for n, v in self._headers.items())
        if size > self.http.limits.max_head_bytes:
            self._refuse(431, "Request header fields too large.")
        if self._headers.get(b"expect", b"").lower() == b"100-continue" and self._transport:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._body_bytes += len(body)
        if self._body_bytes > self.http.limits.max_body_bytes:
            self._body = []
            self._refuse(413, "Request body too large.")
        elif not self._refused:
            self._body.append(body)

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._in_body = False
        self._head_bytes = 0
        if self._refused:
            return
        path, _, query = self._target.partition(b"?")
        exchange = HttpExchange(
            connection=self,
            method=self._parser.get_method().decode("latin-1"),
            path=path.decode("latin-1"),
            query=query.decode("latin-1"),
            headers=self._headers,
            body=self._body[0] if len(self._body) == 1 else b"".join(self._body),
            keepalive=self._parser.should_keep_alive(),
            chunked=self._parser.get_http_version() != "1.0",
        )
        self._body = []
        self.deadline_s = None
        if self._current is None:
            self._begin(exchange)
        elif len(self._pending) < _MAX_PIPELINED:
            self._pending.append(exchange)
        else:
            self._refuse(400, "Too many pipelined requests.")

    # From the exchange and the sweep

    def write(self, data: bytes) -> None:
        """Send bytes, where the client is still there."""
        if self._transport is not None:
            self._transport.write(data)

    def finished(self, exchange: HttpExchange) -> None:
        """The current answer is whole: the next request, or wait for one, or hang up."""
        self._current = None
        if self._transport is None:
            return
        if not exchange.keepalive or self.http.draining or self._upgraded:
            self._transport.close()
        elif self._pending:
            self._loop.call_soon(self._next)
        elif self._refused:
            self._send_refusal()
        elif not self._in_head and not self._in_body:
            self.deadline_s = self._loop.time() + self.http.limits.keepalive_s

    def expire(self) -> None:
        """The client waited or dawdled too long."""
        self.deadline_s = None
        if self._in_head or self._in_body:
            self._refuse(408, "Request timeout.")
            self._send_refusal()
        elif self._transport is not None:
            self._transport.close()

    def close_if_idle(self) -> None:
        """Hang up unless a request is under way."""
        if self._current is None and not self._pending and self._transport is not None:
            self._transport.close()

    def cut(self, *, reset: bool) -> None:
        """Hang up now: with what is written sent and a FIN, or with a RST."""
        transport = self._transport
        if transport is None:
            return
        if reset:
            sock = transport.get_extra_info("socket")
            with contextlib.suppress(OSError):  # already closed by the other side
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()

    def _next(self) -> None:
        if self._current is None and self._pending:
            self._begin(self._pending.popleft())

    def _begin(self, exchange: HttpExchange) -> None:
        self._current = exchange
        self.http.handle(exchange)

    def _refuse_if_free(self) -> None:
        # Answers go out in the order of the requests: the refusal comes after those under way.
        if self._refused and self._current is None and not self._pending:
            self._send_refusal()

    def _refuse(self, status: int, reason: str) -> None:
        if not self._refused:
            self._refused = status
            self._reason = reason

    def _send_refusal(self) -> None:
        body = self._reason.encode()
        fields = b"content-type: text/plain; charset=utf-8\r\ncontent-length: %d" % len(body)
        head = self.http.head(self._refused) + fields + b"\r\nconnection: close\r\n\r\n"
        self.write(head + body)
        if self._transport is not None:
            self._transport.close()
