"""Connections to replicas: kept alive, one request at a time, bytes relayed as they come.

A connection tracks exactly where the answer ends (by count, or chunk by chunk), so that it
can be used again and so that nothing after the end is ever taken for an answer. It does not
interpret the bytes; the request does.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from typing import Any
from urllib.parse import urlsplit

from gateway.datapath import metrics
from gateway.datapath.context import WorkerContext
from gateway.datapath.protocol.chunks import ChunkTracker
from gateway.datapath.protocol.http1 import ResponseHead, parse_response_head

log = logging.getLogger("tidegate.datapath")


class UpstreamRequest:
    """The request that a connection works for. A class and not a protocol: compiled code calls its
    methods directly. One that is given no connection, as it is not carried by this process, has
    none of them.

    ``body_sent`` says that the request's body was sent whole, so that the connection can be kept.
    """

    body_sent: bool = False

    def connected(self, upstream: Upstream, connection: UpstreamConnection) -> bool:
        """The connection asked for is open. Returns false where it is not needed any more."""
        raise NotImplementedError

    def connect_failed(self, upstream: Upstream, why: str) -> None:
        """No connection could be opened."""
        raise NotImplementedError

    def answer_began(self, head: ResponseHead, body: bytes) -> None:
        """The replica's head arrived, and ``body`` with it."""
        raise NotImplementedError

    def answer_block(self, data: bytes) -> None:
        """The next block of the answer's body, as it was received."""
        raise NotImplementedError

    def answer_ended(self, events: int = 0) -> None:
        """The answer is whole; ``events`` is the number of its chunks. The connection is already
        released."""
        raise NotImplementedError

    def upstream_failed(self, why: str, stale: bool) -> None:
        """The connection broke. ``stale``: it was kept alive and closed before any answer."""
        raise NotImplementedError

    def pause_body(self) -> None:
        """The replica reads slowly: stop reading the request's body."""
        raise NotImplementedError

    def resume_body(self) -> None:
        """The replica reads again."""
        raise NotImplementedError

    def is_answer_paused(self) -> bool:
        """Whether reading the answer is paused because the client reads slowly."""
        raise NotImplementedError


class UpstreamConnection(asyncio.Protocol):
    """One connection to a replica. ``request`` is ``None`` while it is idle."""

    __slots__ = (
        "_buffer",
        "_ended",
        "_head",
        "_interim_bytes",
        "_left",
        "_replica",
        "_tracker",
        "idle_since_s",
        "request",
        "reused",
        "transport",
    )

    def __init__(self, replica: Upstream) -> None:
        self._replica = replica
        self.transport: Any = None
        self.request: UpstreamRequest | None = None
        self.idle_since_s = 0.0
        self.reused = False
        self._reset()

    def _reset(self) -> None:
        self._buffer = b""
        self._head: ResponseHead | None = None
        self._interim_bytes = 0
        self._tracker: ChunkTracker | None = None
        self._left = 0
        self._ended = False

    # asyncio's side

    def connection_made(self, transport: Any) -> None:
        """The transport is there."""
        self.transport = transport
        self._replica.opened(self)

    def data_received(self, data: bytes) -> None:
        """The hot path: one block from the replica."""
        request = self.request
        if request is None:
            self.abort()  # an answer to no request: the framing can no longer be trusted
            return
        try:
            if self._head is not None:
                self._relay(request, data)
                return
            if self._buffer:
                data = self._buffer + data
                self._buffer = b""
            self._first(request, data)
        except ValueError as error:
            self.fail(f"not a valid HTTP answer: {error}")
        except Exception:
            log.exception("internal error of the gateway while it passed an answer on")
            self.fail("internal error of the gateway")

    def _first(self, request: UpstreamRequest, data: bytes) -> None:
        """Bytes up to and just after the head."""
        most = self._replica.context.gateway.max_head_bytes - self._interim_bytes
        start, end = 0, data.find(b"\r\n\r\n")
        while 0 <= end <= most:
            head = parse_response_head(data[start:end])
            if head.status >= 200:
                break
            start = end + 4  # 1xx: interim, not the answer, but the limit is for all of them
            end = data.find(b"\r\n\r\n", start)
        if end > most or (end < 0 and len(data) > most):
            limit = self._replica.context.gateway.max_head_bytes
            raise ValueError(f"head longer than {limit} bytes")
        if end < 0:
            self._interim_bytes += start
            self._buffer = data[start:]
            return
        self._head = head
        body = data[end + 4 :]
        if head.chunked:
            self._tracker = tracker = ChunkTracker()
            tracker.feed(body)
            self._ended = tracker.done
        elif head.content_length is not None:
            self._left = head.content_length - len(body)
            if self._left < 0:
                raise ValueError("more body than Content-Length says")
            self._ended = self._left == 0
        ended = self._ended
        request.answer_began(head, body)
        if ended and self.request is request:
            self._finish(request)

    def _relay(self, request: UpstreamRequest, data: bytes) -> None:
        """Body bytes after the first block."""
        tracker = self._tracker
        if tracker is not None:
            try:
                tracker.feed(data)
            except ValueError as error:
                self.fail(f"bad chunk framing: {error}")
                return
            self._ended = tracker.done
        elif self._head is not None and self._head.content_length is not None:
            self._left -= len(data)
            if self._left < 0:
                self.fail("more body than Content-Length says")
                return
            self._ended = self._left == 0
        ended = self._ended
        request.answer_block(data)
        if ended and self.request is request:
            self._finish(request)

    @property
    def events(self) -> int:
        """Chunks of the answer that have come; 0 where it does not come in chunks."""
        return 0 if self._tracker is None else self._tracker.chunks

    @property
    def between_chunks(self) -> bool:
        """Whether what has come of the answer ends where a chunk does."""
        return self._tracker is None or self._tracker.between_chunks

    def _finish(self, request: UpstreamRequest) -> None:
        head = self._head
        keep = head is not None and head.keep_alive and request.body_sent
        self.request = None
        self._head = None
        self._interim_bytes = 0
        self._ended = False
        events, self._tracker = self.events, None
        if request.is_answer_paused():
            self.transport.resume_reading()  # the next request's client may be a fast one
        if keep:
            self._replica.release(self)
        else:
            self.abort()
        request.answer_ended(events)

    def fail(self, why: str) -> None:
        """The connection cannot be trusted any more: close it, then report to the request."""
        request, self.request = self.request, None
        self.abort()
        if request is not None:
            request.upstream_failed(why, stale=False)

    def connection_lost(self, exc: Exception | None) -> None:
        """Closed by the replica, by us, or by the network."""
        self._replica.closed(self)
        request, self.request = self.request, None
        if request is None:
            return
        head = self._head
        if head is not None and not head.chunked and head.content_length is None and exc is None:
            request.answer_ended()  # a body that ends with its connection
            return
        # A kept-alive connection that closes before it answers was most likely idle too long.
        stale = self.reused and head is None and not self._buffer
        request.upstream_failed(str(exc) if exc else "the replica closed the connection", stale)

    def pause_writing(self) -> None:
        """The replica reads slowly: stop reading the client's body."""
        if self.request is not None:
            self.request.pause_body()

    def resume_writing(self) -> None:
        """The replica reads again."""
        if self.request is not None:
            self.request.resume_body()

    # The request's side

    def abort(self) -> None:
        """Close at once: what the engine still computes for it is cancelled by the close."""
        if self.transport is not None:
            self.transport.abort()

    def __repr__(self) -> str:
        state = "idle" if self.request is None else "busy"
        return f"<to {self._replica.host}:{self._replica.port} {state}>"


class Upstream:
    """All of one worker's connections to one replica."""

    def __init__(
        self, context: WorkerContext, url: str, headers: tuple[tuple[str, str], ...]
    ) -> None:
        parts = urlsplit(url)
        self.context = context
        self.url = url
        self.headers = headers
        self.tls = parts.scheme == "https"
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or (443 if self.tls else 80)
        self.request_start = b"POST " + parts.path.rstrip("/").encode()
        lines = b"\r\nhost: " + parts.netloc.rpartition("@")[2].encode()
        for name, value in headers:
            lines += b"\r\n" + name.encode() + b": " + value.encode()
        self.request_tail = b" HTTP/1.1" + lines
        self.overrides = frozenset(name.lower().encode() for name, _ in headers)
        self.idle: list[UpstreamConnection] = []
        self.open: set[UpstreamConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._tls_context: ssl.SSLContext | None = None

    def without_overridden(self, kept: bytes) -> bytes:
        """Header lines less those that the replica's own ``headers`` setting replaces."""
        lines = kept.split(b"\r\n")
        return b"\r\n".join(
            line for line in lines if line.partition(b":")[0].lower() not in self.overrides
        )

    def acquire(self) -> UpstreamConnection | None:
        """An idle connection, the most recently used first, or ``None``: then ``connect``."""
        idle = self.idle
        while idle:
            connection = idle.pop()
            if not connection.transport.is_closing():
                connection.reused = True
                return connection
        return None

    def connect(self, request: UpstreamRequest) -> None:
        """Open a connection for a request; ``connected`` or ``connect_failed`` of it is called."""
        task = self.context.loop.create_task(self._connect(request))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, request: UpstreamRequest) -> None:
        if self.tls and self._tls_context is None:
            self._tls_context = ssl.create_default_context()
        try:
            async with asyncio.timeout(self.context.gateway.upstream_connect_timeout_s):
                _, connection = await self.context.loop.create_connection(
                    lambda: UpstreamConnection(self),
                    self.host,
                    self.port,
                    ssl=self._tls_context,
                )
        except (OSError, TimeoutError) as error:
            request.connect_failed(self, str(error) or "timed out")
            return
        if not request.connected(self, connection):
            self.release(connection)

    def release(self, connection: UpstreamConnection) -> None:
        """A connection is free again: keep it, or close it where enough are kept."""
        if connection.transport.is_closing():
            return
        if self._closed or len(self.idle) >= self.context.gateway.upstream_max_idle_connections:
            connection.abort()
            return
        connection.idle_since_s = self.context.now()
        self.idle.append(connection)

    def opened(self, connection: UpstreamConnection) -> None:
        """Count an open connection."""
        self.open.add(connection)
        counters = self.context.counters
        counters[metrics.UPSTREAM_CONNECTIONS] += 1
        counters[metrics.UPSTREAM_OPENED] += 1

    def closed(self, connection: UpstreamConnection) -> None:
        """Forget a closed connection."""
        if connection in self.open:
            self.open.discard(connection)
            self.context.counters[metrics.UPSTREAM_CONNECTIONS] -= 1
        if connection in self.idle:
            self.idle.remove(connection)

    def sweep(self, now: float) -> None:
        """Close connections idle longer than the engines themselves keep them."""
        limit = now - self.context.gateway.upstream_keepalive_s
        kept = []
        for connection in self.idle:
            if connection.idle_since_s < limit:
                connection.abort()
            else:
                kept.append(connection)
        self.idle[:] = kept

    def close(self) -> None:
        """The replica is gone from the fleet: drop what is idle; what is busy finishes."""
        self._closed = True
        self.drop_idle()

    def drop_idle(self) -> None:
        """Close the connections that are idle."""
        idle, self.idle = self.idle, []
        for connection in idle:
            connection.abort()

    def __repr__(self) -> str:
        return f"<upstream {self.url} open={len(self.open)} idle={len(self.idle)}>"
