"""One request's life, from its head to the last byte of its answer.

    GATHER ──▶ (HELD) ──▶ CONNECT ──▶ SENT ──▶ ANSWER ──▶ DONE
      read enough    no replica     a connection   no byte yet:    after the first byte
      to route       can take it    is opened      may be retried  there is no retry

An exchange belongs to one client connection and at any time to at most one of: a hold queue, an
upstream that connects for it, an upstream connection. Whatever happens, it leaves the ledger
exactly once (``_unreserve``) and ends exactly once (``end``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gateway.datapath import metrics
from gateway.datapath.answer import ANSWER, CONNECT, DONE, GATHER, HELD, SENT, Answer
from gateway.datapath.protocol import sse
from gateway.datapath.protocol.errors import ApiError, Reason, render
from gateway.datapath.protocol.http1 import RequestHead
from gateway.datapath.protocol.openai import peek_model, quote_model, read_head, rewrite_model

if TYPE_CHECKING:
    from gateway.datapath.client import ClientConnection
    from gateway.datapath.pool import Target
    from gateway.datapath.upstream import Upstream, UpstreamConnection

__all__ = ["ANSWER", "CONNECT", "DONE", "GATHER", "HELD", "SENT", "Exchange"]

_LARGE_BODY_BYTES: Final = 32768
_SMALL_PART_BYTES: Final = 4096
_NOBODY: Final[frozenset[str]] = frozenset()
_QUEUE_WAIT_ZERO: Final = metrics.HISTOGRAM_OFFSETS[metrics.QUEUE_WAIT]


class Exchange(Answer):
    """See the module. Times are the event loop's clock, in seconds. It is the router's
    ``Request``: ``prompt_tokens``, ``tokens`` and ``exclude``."""

    parts: list[bytes]
    body_sent: bool = False
    peek: tuple[str, int, int] | None = None
    model: str
    prompt_tokens: int
    exclude: frozenset[str]
    stream: bool = False
    output_bound: int | None = None
    attempts: int = 0
    held_s: float | None = None
    held_bytes: int = 0
    comment_s: float
    _peeked: bool = False
    _resendable: bool = True

    def __init__(self, client: ClientConnection, head: RequestHead, now: float) -> None:
        self.client = client
        self.head = head
        self.request_id = head.request_id or client.worker.next_request_id()
        self.started_s = now
        self.last_s = now
        self.comment_s = now
        self.state = GATHER
        self._mode = 0
        self.tokens = self.prompt_tokens = 0
        self.model = ""
        self.exclude = _NOBODY
        self.parts = []

    # The request's body, from the client

    def feed(self, data: bytes) -> None:
        """Some of the body. Raises ``ApiError`` where it is too much."""
        worker = self.client.worker
        config = worker.config
        self.body_bytes += len(data)
        if self.body_bytes > config.max_body_bytes:
            raise ApiError(
                413,
                Reason.BODY_TOO_LARGE,
                f"The request body is larger than {config.max_body_bytes} bytes.",
            )
        if self.state >= SENT:
            self._forward(data)
            return
        parts = self.parts
        if parts and len(parts[-1]) + len(data) < _SMALL_PART_BYTES:
            parts[-1] += data  # a body sent byte by byte must not cost fifty times its size
        else:
            parts.append(data)
        worker.buffered_bytes += len(data)
        if worker.buffered_bytes > config.max_buffered_bytes:
            raise ApiError(
                503,
                Reason.BUFFER_FULL,
                "The gateway already holds as many request bytes as it may; try again.",
                retry_after_s=1.0,
            )
        if self.body_bytes >= config.peek_bytes and not self._peeked:
            self._peek()

    def _peek(self) -> None:
        """A large body: route by its beginning where that names the model, and stream the rest."""
        self._peeked = True
        self.peek = peek_model(self._join())
        if self.peek is not None:
            self.model = self.peek[0]
            self._route(self.head.content_length or self.body_bytes)

    def complete(self) -> None:
        """The body is whole. Raises ``ApiError`` where it cannot be routed."""
        self.whole = True
        if self.state >= SENT:
            self._forward_end()
            return
        if self.state == CONNECT:
            return
        body = self._join()
        self._read(body)
        if self.pool is None:
            self._route(len(body))

    def complete_at_once(self, body: bytes) -> None:
        """The whole body came with the head: the common case, in one step."""
        self.whole = True
        self.parts.append(body)
        self.body_bytes = size = len(body)
        self.client.worker.buffered_bytes += size
        self._read(body)
        self._route(size)

    def _read(self, body: bytes) -> None:
        fields = read_head(body)
        self.stream = bool(fields.stream)
        self.output_bound = fields.output_bound()
        self.model = fields.model or ""

    def _join(self) -> bytes:
        parts = self.parts
        if len(parts) != 1:
            parts[:] = [b"".join(parts)]
        return parts[0]

    def _route(self, body_bytes: int) -> None:
        self.pool = pool = self.client.worker.pool_of(self.model)
        self.prompt_tokens, self.tokens = pool.estimator.estimate(body_bytes, self.output_bound)
        counters = pool.counters
        counters.integers[metrics.ARRIVALS] += 1
        counters.dirty = True
        pool.dispatch(self)

    # To a replica

    def send(self, target: Target) -> None:
        """The router chose: reserve there and send, over a kept connection or a new one."""
        pool = self.pool
        assert pool is not None
        self.target = target
        self.attempts += 1
        integers, tokens = pool.counters.integers, self.tokens
        integers[metrics.INFLIGHT_REQUESTS] += 1
        integers[metrics.INFLIGHT_TOKENS] += tokens
        self.client.worker.ledger.reserve(target.view.slot, tokens)
        connection = target.upstream.acquire()
        if connection is None:
            self.state = CONNECT
            if not self.whole:
                self.client.pause()
            target.upstream.connect(self)
        else:
            self._write_request(target, connection)

    def connected(self, upstream: Upstream, connection: UpstreamConnection) -> bool:
        """A connection opened for this exchange is there. False: it is not wanted any more."""
        target = self.target
        if self.state != CONNECT or target is None or target.upstream is not upstream:
            return False
        connection.reused = False
        if not self.whole:
            self.client.resume()
        self._write_request(target, connection)
        return True

    def connect_failed(self, upstream: Upstream, why: str) -> None:
        """No connection could be opened."""
        if self.state == CONNECT and self.target is not None and self.target.upstream is upstream:
            # Nothing was sent, so it does not count as an attempt: the request goes elsewhere or
            # waits, within the deadline of those that are held.
            self.attempts -= 1
            self._attempt_failed(f"no connection: {why}", stale=False)

    def _write_request(self, target: Target, connection: UpstreamConnection) -> None:
        pool = self.pool
        assert pool is not None
        self.upstream = connection
        connection.exchange = self
        if self.client.writing_paused:
            connection.transport.pause_reading()
        self.state = SENT
        counters = pool.counters
        now = self.client.worker.loop.time()
        self.last_s = now
        if now == self.started_s:
            counters.integers[_QUEUE_WAIT_ZERO] += 1
        else:
            counters.observe(metrics.QUEUE_WAIT, now - self.started_s)
        parts = self.parts
        body = parts[0] if len(parts) == 1 else self._join()
        served = target.served
        if served is not None and served != self.model:
            body = self._renamed(body, served)
        upstream = target.upstream
        head = self.head
        kept = head.kept
        if upstream.overrides:
            kept = upstream.without_overridden(kept)
        if self.whole:
            framing = b"\r\ncontent-length: %d\r\n\r\n" % len(body)
            self.body_sent = True
        elif head.chunked:
            framing = b"\r\ntransfer-encoding: chunked\r\n\r\n"
            body = sse.chunk(body)
        else:
            length = head.content_length - self.body_bytes + len(body)
            framing = b"\r\ncontent-length: %d\r\n\r\n" % length
        size = len(body)
        first = (
            upstream.request_start,
            head.path,
            head.query,
            upstream.request_tail,
            kept,
            b"\r\nx-request-id: ",
            self.request_id,
            framing,
        )
        write = connection.transport.write
        if size <= _LARGE_BODY_BYTES:
            write(b"".join((*first, body)))
        else:
            write(b"".join(first))
            write(body)
        counters.integers[metrics.REQUEST_BYTES] += size

    def _renamed(self, body: bytes, served: str) -> bytes:
        """The body as this replica must see it, with its own name for the model."""
        if self.peek is not None:
            _, start, end = self.peek
            return body[:start] + quote_model(served) + body[end:]
        return rewrite_model(body, served)

    def _forward(self, data: bytes) -> None:
        """The tail of a large body, straight on. From here it cannot be sent a second time."""
        self._resendable = False
        self.release_parts()
        connection = self.upstream
        if connection is None:
            return  # the answer is over already; the rest of the body is of no use
        connection.transport.write(sse.chunk(data) if self.head.chunked else data)
        if self.pool is not None:
            self.pool.counters.integers[metrics.REQUEST_BYTES] += len(data)

    def _forward_end(self) -> None:
        self.body_sent = True
        if self.upstream is not None and self.head.chunked:
            self.upstream.transport.write(sse.LAST_CHUNK)

    # What goes wrong

    def upstream_failed(self, why: str, stale: bool) -> None:
        """The connection to the replica broke. Before the first byte: try again; after: cut."""
        self.upstream = None
        if self.state == SENT:
            self._attempt_failed(why, stale=stale)
        elif self.state == ANSWER:
            self.cut(why)

    def _attempt_failed(self, why: str, *, stale: bool) -> None:
        pool, target = self.pool, self.target
        assert pool is not None
        assert target is not None
        self._unreserve()
        if stale:
            # Not the replica's failure, and not an attempt: it never read the request. Connections
            # that were idle for longer are as dead, so the next attempt opens a new one.
            self.attempts -= 1
            target.upstream.drop_idle()
        else:
            pool.failing(target, suspect=True)
            self.exclude = self.exclude | {target.view.replica.id}
        if not self.whole:
            self.client.resume()  # reading may be paused for the connection that is gone
        if self._resendable and self.attempts <= self.client.worker.config.max_retries:
            pool.counters.integers[metrics.RETRIES] += 1
            self.state = GATHER
            self.body_sent = False
            try:
                pool.dispatch(self)
            except ApiError as error:
                self.reject(error)
            return
        self.reject(
            ApiError(
                502,
                Reason.REPLICA_FAILED,
                f"The model's replica failed before it answered ({why}); "
                f"tried {self.attempts} time(s).",
                retry_after_s=1.0,
            )
        )

    def reject(self, error: ApiError) -> None:
        """Answer in the engine's place. Once the head is out this is an event in the stream."""
        if self.state == DONE:
            return
        client = self.client
        if self.pool is not None:
            self.pool.counters.integers[metrics.REJECTED] += 1
        client.worker.rejected(error.reason)
        if self.state == ANSWER:
            # Bytes of the engine's answer are out: nothing of ours may follow them.
            self.break_off()
            return
        if self.committed:
            client.transport.write(sse.error_event(error.body()))
        else:
            if not self.whole:
                client.keep_alive = False
            client.transport.write(
                render(
                    error,
                    request_id=self.request_id,
                    close=not client.keep_alive,
                    extra=client.cors_lines(),
                )
            )
        self.drop_upstream()
        self.end()

    def cancel(self) -> None:
        """The client is gone: the replica stops working for it at once."""
        if self.state == DONE:
            return
        if self.pool is not None:
            self.pool.counters.integers[metrics.CANCELLED] += 1
        self.drop_upstream()
        self.end()

    # Ends

    def _unreserve(self) -> None:
        target, pool, tokens = self.target, self.pool, self.tokens
        if target is not None and pool is not None:
            self.target = None
            integers = pool.counters.integers
            integers[metrics.INFLIGHT_REQUESTS] -= 1
            integers[metrics.INFLIGHT_TOKENS] -= tokens
            self.client.worker.ledger.settle(target.view.slot, tokens)

    def release_parts(self) -> None:
        """Forget the request's body."""
        for part in self.parts:
            self.client.worker.buffered_bytes -= len(part)
        self.parts = []

    def end(self) -> None:
        """Leave queue and ledger, and let the connection go on."""
        pool = self.pool
        if self.state == HELD and pool is not None:
            pool.unhold(self)
        self.state = DONE
        if self.parts:
            self.release_parts()
        if pool is not None:
            self._unreserve()
            pool.counters.dirty = True
        self.client.exchange_ended(self)
        if pool is not None and pool.queue:
            pool.release()

    def comment(self, text: str, now: float) -> None:
        """A keep-alive comment into a held stream; the first one commits the answer's head."""
        client = self.client
        frame = sse.comment(text)
        if not self.committed:
            self.committed = True
            frame = b"%bx-request-id: %b%b\r\n\r\n%b" % (
                sse.STREAM_HEAD,
                self.request_id,
                client.extra_lines(),
                frame,
            )
        client.transport.write(frame)
        self.comment_s = now
