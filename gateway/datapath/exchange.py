"""One request's life, from its head to the last byte of its answer.

    GATHER ──▶ (HELD) ──▶ CONNECT ──▶ SENT ──▶ ANSWER ──▶ DONE
      read enough    no replica     a connection   no byte yet:    after the first byte
      to route       can take it    is opened      may be retried  there is no retry

An exchange belongs to one client connection and at any time to at most one of: a hold queue, an
upstream that connects for it, an upstream connection. Whatever happens, it leaves the ledger
exactly once (``_unreserve``) and ends exactly once (``end``).

How the answer's bytes travel is in ``answer.py``.
"""

from __future__ import annotations

from typing import Final

from gateway.datapath import metrics
from gateway.datapath.answer import Answer, Downstream, extra_lines
from gateway.datapath.pool import (
    ANSWER,
    CONNECT,
    DONE,
    GATHER,
    HELD,
    SENT,
    PoolRuntime,
    UpstreamEndpoint,
)
from gateway.datapath.protocol import sse
from gateway.datapath.protocol.bodies import (
    FormReader,
    form_boundary,
)
from gateway.datapath.protocol.errors import (
    Api,
    ApiError,
    Reason,
    api_of,
    render,
)
from gateway.datapath.protocol.http1 import KEEP_ALIVE, RequestHead, ResponseHead
from gateway.datapath.protocol.openai import TAKES_JSON
from gateway.datapath.request import SMALL_BODY_BYTES, RoutedRequest, buffer_full
from gateway.datapath.upstream import Upstream, UpstreamConnection
from router.failures import is_fault, is_pressure

_LARGE_BODY_BYTES: Final = 32768
# A body that is streamed is kept for another replica up to this size, and while all that is held of
# bodies is less than this share of what may be: no request is refused for what is kept so.
_RESEND_BYTES: Final = 1_048_576
_RESEND_SHARE: Final = 0.5
# A body that comes too slowly has its place at a replica for so long.
_SLOW_BODY_S: Final = 5.0
# Of these vLLM reports the usage only if asked to, and says it in an event of its own.
_USAGE_PATHS: Final = frozenset({b"/v1/chat/completions", b"/v1/completions"})
# The usage comes with the last token, or a moment later.
_USAGE_WAIT_S: Final = 1.0


class Exchange(RoutedRequest):
    """See the module. ``committed`` says that a head was sent."""

    client: Downstream
    committed: bool = False
    attempts: int = 0
    upstream: UpstreamConnection | None = None
    _peeked: bool = False
    _resendable: bool = True
    _uploads: bool = False
    _upload_since_s: float = 0.0
    _upload_from_bytes: int = 0
    _failed_at: tuple[UpstreamEndpoint, ...] = ()
    _adds_usage: bool = False
    _answer: Answer | None = None

    def __init__(self, client: Downstream, head: RequestHead, now: float) -> None:
        self.client = client
        self.context = client.context
        self.pools = client.pools
        self.head = head
        self.request_id = head.request_id or client.context.next_request_id()
        self.started_s = now
        self.last_s = now
        self.comment_s = now
        self.state = GATHER
        self.model = ""
        self.parts = []
        if head.path not in TAKES_JSON:
            boundary = form_boundary(head.kept)
            if boundary is not None:
                self.reader = FormReader(boundary)

    @property
    def address(self) -> str:
        """Where its client is, without the port."""
        return self.client.address

    # The request's body, from the client

    def feed(self, data: bytes) -> None:
        """Some of the body, a slice of what was received. Raises ``ApiError`` where it is too
        much, or names two models."""
        self._count_body(data)
        if self.state >= SENT:
            self._forward(data)
            return
        self._keep_part(data)
        if self.state == HELD and self.pool is not None:
            self.pool.grow_held(self, len(data))
        context = self.context
        gateway = context.gateway
        if context.buffered_bytes > gateway.max_buffered_bytes and not self.client.make_room(self):
            raise buffer_full()
        if self.body_bytes >= gateway.peek_bytes and not self._peeked:
            self._peek()

    def _peek(self) -> None:
        """A large body: route by what has come of it once that names the model, and stream the
        rest."""
        reader = self.reader
        if reader is not None and reader.model:
            self._peeked = True
            self._take_fields(reader)
            pool = self.client.pools.find(self.model)
            if pool.may_stream(self, self.client.now()):
                pool.uploads += 1
                self._uploads = True
                self._route(self.body_bytes)  # what was claimed is not there

    def complete(self) -> None:
        """The body is whole. Raises ``ApiError`` where it cannot be routed."""
        self.whole = True
        if self._uploads and self.pool is not None:
            self._end_upload(self.pool)
            self._count_tokens(self.pool)
        if self.state >= SENT:
            self._forward_end()
            return
        if self.state == CONNECT:
            return
        self._read_parts()
        if self.pool is None:
            self._route(self.body_bytes)

    def complete_at_once(self, body: bytes) -> bool:
        """The whole body came with the head: the common case, in one step. Returns false for a
        large one that is out of the ordinary: it must be fed, as one that comes in pieces."""
        size = len(body)
        read = self._read(body)
        if not read and size >= SMALL_BODY_BYTES:
            return False
        self.whole = True
        self.parts.append(body)
        self.body_bytes = size
        self.client.context.buffered_bytes += size
        if not read:
            self._take_fields(self._decode(body))
        self._route(self.body_bytes)
        return True

    def _end_upload(self, pool: PoolRuntime) -> None:
        self._uploads = False
        pool.uploads -= 1

    def _count_tokens(self, pool: PoolRuntime) -> None:
        """The body of a request that was routed by its beginning is whole: count what came, and
        know what its end says."""
        if self.reader is not None:
            self._take_fields(self.reader)
        body_bytes = self._text_bytes(self.body_bytes)
        prompt_tokens, tokens = pool.estimate(body_bytes, self.output_bound)
        more = tokens - self.routing.tokens
        integers = pool.counters.integers
        if self.endpoint is not None:
            integers[metrics.INFLIGHT_TOKENS] += more
            self.client.context.ledger.resize(self.endpoint.slot, more)
        elif self.state == HELD:
            integers[metrics.QUEUED_TOKENS] += more
        self.routing.prompt_tokens, self.routing.tokens = prompt_tokens, tokens
        integers[metrics.ARRIVED_PROMPT_TOKENS] += prompt_tokens
        integers[metrics.ARRIVED_OUTPUT_TOKENS] += tokens - prompt_tokens
        pool.counters.dirty = True

    def is_too_slow(self, now: float) -> bool:
        """Whether it has a place at a replica, and its body comes too slowly for that."""
        if self.whole or self.state not in (CONNECT, SENT):
            return False
        due_s = now - self._upload_since_s - _SLOW_BODY_S
        slowest = self.client.context.gateway.min_body_bytes_per_s
        return self.body_bytes - self._upload_from_bytes < due_s * slowest

    def _measure_upload(self) -> None:
        self._upload_since_s = self.client.now()
        self._upload_from_bytes = self.body_bytes

    # To a replica

    def send(self, endpoint: UpstreamEndpoint) -> None:
        """The router chose: reserve there and send, over a kept connection or a new one."""
        pool = self.pool
        assert pool is not None
        self.attempts += 1
        if not self.whole:
            self._measure_upload()
        self._reserve(pool, endpoint)
        connection = endpoint.upstream.acquire()
        if connection is None:
            self.state = CONNECT
            if not self.whole:
                self.client.pause()
            endpoint.upstream.connect(self)
        else:
            self._write_request(endpoint, connection)

    def connected(self, upstream: Upstream, connection: UpstreamConnection) -> bool:
        """The connection asked for is open. Returns false where it is not needed any more."""
        endpoint = self.endpoint
        if self.state != CONNECT or endpoint is None or endpoint.upstream is not upstream:
            return False
        connection.reused = False
        if not self.whole:
            self.client.resume()
        self._write_request(endpoint, connection)
        return True

    def connect_failed(self, upstream: Upstream, why: str) -> None:
        """No connection could be opened."""
        if (
            self.state == CONNECT
            and self.endpoint is not None
            and self.endpoint.upstream is upstream
        ):
            # Nothing was sent, so it does not count as an attempt: the request goes elsewhere or
            # waits, within the deadline of those that are held.
            self.attempts -= 1
            if self.pool is not None:
                self.pool.unreachable(self.endpoint)
            self.routing.exclude = self.routing.exclude | {self.endpoint.id}
            self._attempt_failed(f"no connection: {why}")

    def _write_request(self, endpoint: UpstreamEndpoint, connection: UpstreamConnection) -> None:
        pool = self.pool
        assert pool is not None
        self.upstream = connection
        connection.request = self
        if self.client.writing_paused:
            connection.transport.pause_reading()
        self.state = SENT
        counters = pool.counters
        self._observe_sent(pool, self.client.now())
        parts = self._parts_for(endpoint)
        self._adds_usage = False
        if self.stream and endpoint.replica.stream_usage and self.whole:
            parts = self._ask_usage(parts)
        size = len(parts[0]) if len(parts) == 1 else sum(map(len, parts))
        upstream = endpoint.upstream
        head = self.head
        kept = head.kept
        if upstream.overrides:
            kept = upstream.without_overridden(kept)
        if self.whole:
            framing = b"\r\ncontent-length: %d\r\n\r\n" % size
            self.body_sent = True
        elif head.chunked:
            framing = b"\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n" % size
            parts = [*parts, b"\r\n"]
        else:
            length = head.content_length - self.body_bytes + size
            framing = b"\r\ncontent-length: %d\r\n\r\n" % length
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
            write(b"".join((*first, *parts)))
        else:
            connection.transport.writelines((b"".join(first), *parts))
        counters.integers[metrics.REQUEST_BYTES] += size

    def _ask_usage(self, parts: list[bytes]) -> list[bytes]:
        """The body, with a question for the stream's usage where it has none."""
        if (
            self.head.path in _USAGE_PATHS
            and not self.head.http10
            and self.client.context.gateway.count_stream_usage
            and not self._says_usage
        ):
            asking = sse.ask_usage(parts[0])
            if asking is not None:
                self._adds_usage = True
                return [asking, *parts[1:]]
        return parts

    def _forward(self, data: bytes) -> None:
        """The tail of a large body, straight on. It is kept too while it may be sent again."""
        if self.state == SENT and self._resendable:
            context = self.context
            most = context.gateway.max_buffered_bytes * _RESEND_SHARE
            if self.body_bytes <= _RESEND_BYTES and context.buffered_bytes < most:
                self._keep_part(data)
            else:
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

    # The answer

    def answer_began(self, head: ResponseHead, body: bytes) -> None:
        """The replica's head, and what came with it. From here on there is no retry, unless it is
        an error that another replica is asked instead of."""
        if head.status < 500 and head.status != 429:
            self._answered_well()
        elif self._answered_badly(head.status):
            return
        self.state = ANSWER
        self._answer = answer = Answer(self.client, self.head, self.request_id, head)
        self.release_parts()
        if not self.whole:  # an early answer: what is still to come of the body has no reader
            self.client.keep_alive = False
        committed, self.committed = self.committed, True
        connection = self.upstream
        between_chunks = connection is None or connection.between_chunks
        try:
            answer.begin(
                body,
                between_chunks=between_chunks,
                committed=committed,
                adds_usage=self._adds_usage,
            )
        except ApiError as error:
            self.cut(error.message)
            return
        if body:
            self._count_answer_block(answer, body)

    def _answered_well(self) -> None:
        pool, endpoint = self.pool, self.endpoint
        if pool is None or endpoint is None:
            return
        pool.answered(endpoint)
        if self._failed_at:
            # Only now is it known that it was the replicas' fault, not the request's.
            for failed in self._failed_at:
                pool.failed(failed)
            self._failed_at = ()

    def _answered_badly(self, status: int) -> bool:
        """The replica answers with an error. Returns whether another is asked instead."""
        pool, endpoint = self.pool, self.endpoint
        if pool is None or endpoint is None:
            return False
        if is_pressure(status):
            pool.pressed(endpoint)
        elif is_fault(status):
            pool.context.report_failure(endpoint.id)
        other = None
        if self._may_try_again():
            self.routing.exclude = self.routing.exclude | {endpoint.id}
            other = pool.pick_other(self)
        if is_fault(status):
            if other is not None:
                self._failed_at = (*self._failed_at, endpoint)
            elif not self._failed_at:
                pool.failed(endpoint)
        if other is None:
            return False
        endpoint.count_answer(ok=status < 500)
        self.drop_upstream()
        self._begin_again(pool)
        self.send(other)
        return True

    def _may_try_again(self) -> bool:
        return self._resendable and self.attempts <= self.client.context.gateway.max_retries

    def _begin_again(self, pool: PoolRuntime) -> None:
        """Leave the replica, so that the request can be sent to another."""
        self._unreserve()
        pool.counters.integers[metrics.RETRIES] += 1
        self.state = GATHER
        self.body_sent = False
        if not self.whole:
            self.client.resume()  # reading may be paused for the connection that is gone

    def answer_block(self, data: bytes) -> None:
        """The next block. The hottest lines of a stream."""
        answer, connection = self._answer, self.upstream
        if answer is None or connection is None:
            return
        try:
            answer.write(data, between_chunks=connection.between_chunks)
        except ApiError as error:
            self.cut(error.message)
            return
        self._count_answer_block(answer, data)

    def _count_answer_block(self, answer: Answer, data: bytes) -> None:
        connection = self.upstream
        events = 0 if connection is None else connection.events
        self._count_block(answer.reading, data, events, self.client.now())

    def answer_ended(self, events: int = 0) -> None:
        """The answer is whole, in ``events`` chunks where it came in chunks: engines send one for
        each event of a stream. The connection to the replica is already released."""
        self.upstream = None
        answer, pool = self._answer, self.pool
        if answer is None or pool is None:
            return
        if answer.is_error_event:
            self._end_with_error(answer.read_error())
        else:
            answer.end()
        self._count_whole(pool, answer, events)
        self.end()

    def _count_whole(self, pool: PoolRuntime, answer: Answer, events: int) -> None:
        """Count an answer that the client has the whole of."""
        self._count_status(pool, answer.head.status)
        if not answer.is_error_event:
            self._count_answer(pool, answer.reading, events, answer.sent_bytes)

    def _end_with_error(self, error: ApiError | bytes) -> None:
        """End a stream whose head is out, and of whose answer nothing came, with an error."""
        end = sse.LAST_CHUNK
        if api_of(self.head.path) is Api.OPENAI:
            end = sse.chunk(sse.LAST_EVENT) + end
        self.client.transport.write(self._error_event(error, seen=b"") + end)

    def _error_event(self, error: ApiError | bytes, *, seen: bytes) -> bytes:
        return sse.error_event(
            error,
            api_of(self.head.path),
            request_id=self.request_id,
            model=self.model,
            created_s=self.client.context.wall_s(),
            seen=seen,
        )

    def cut(self, why: str) -> None:
        """An answer broke after its first byte: say so in the stream where the framing allows it,
        and close without the final chunk, so that no client takes it for whole."""
        pool = self.pool
        if pool is not None:
            pool.counters.integers[metrics.ENGINE_ERROR] += 1
            if self.endpoint is not None:
                self.endpoint.count_answer(ok=False)
                pool.failed(self.endpoint)
                self.client.context.report_failure(self.endpoint.id)
        self._count_rejection(Reason.REPLICA_CUT, 502)
        error = ApiError(502, Reason.REPLICA_CUT, f"The model's replica failed mid-answer ({why}).")
        answer = self._answer
        if answer is not None and answer.takes_event():
            self.client.transport.write(self._error_event(error, seen=answer.seen))
        self._break_off()

    def _break_off(self) -> None:
        """End an answer that has begun, so that no client takes what it got for the whole."""
        client, answer = self.client, self._answer
        client.keep_alive = False
        self.drop_upstream()
        if answer is not None and answer.ends_with_connection:
            client.reset()  # an orderly end of the connection would be the end of the body
        self.end()

    def drop_upstream(self) -> None:
        """Close the connection to the replica: what it still computes for us is cancelled."""
        connection, self.upstream = self.upstream, None
        if connection is not None:
            connection.request = None
            connection.abort()

    # Back-pressure, both ways

    def pause_answer(self) -> None:
        """The client reads slowly: stop reading the replica."""
        if self.upstream is not None:
            self.upstream.transport.pause_reading()

    def resume_answer(self) -> None:
        """The client reads again."""
        if self.upstream is not None:
            self.upstream.transport.resume_reading()

    def is_answer_paused(self) -> bool:
        """Whether reading the answer is paused because the client reads slowly."""
        return self.client.writing_paused

    def pause_body(self) -> None:
        """The replica reads slowly: stop reading the client."""
        self.client.pause()

    def resume_body(self) -> None:
        """The replica reads again."""
        self._measure_upload()
        self.client.resume()

    # What goes wrong

    def upstream_failed(self, why: str, stale: bool) -> None:
        """The connection to the replica broke. Before the first byte: try again; after: cut."""
        self.upstream = None
        endpoint = self.endpoint
        if self.state == SENT and endpoint is not None:
            if stale:
                # Not the replica's failure: it never read the request. Connections that were idle
                # for longer are as dead, so the next attempt opens a new one. It is an attempt all
                # the same: an engine that dies of a request looks just like this.
                endpoint.upstream.drop_idle()
            else:
                self.client.context.report_failure(endpoint.id)
                self._failed_at = (*self._failed_at, endpoint)
                self.routing.exclude = self.routing.exclude | {endpoint.id}
            self._attempt_failed(why)
        elif self._answer is not None and self._answer.is_unheard:
            self._end_unheard()
        elif self.state == ANSWER:
            self.cut(why)

    def _attempt_failed(self, why: str) -> None:
        """The replica gave no answer: try again, or give up."""
        pool = self.pool
        assert pool is not None
        if self._may_try_again():
            self._begin_again(pool)
            try:
                pool.dispatch(self)
            except ApiError as error:
                self.reject(error)
            return
        if self.attempts == 1:  # no other was tried, which would have said whose fault it was
            for endpoint in self._failed_at:
                pool.failed(endpoint)
        self._unreserve()
        if not self.whole:
            self.client.resume()
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
        self._count_rejection(error.reason, error.status)
        if self.state == ANSWER:
            # Bytes of the engine's answer are out: nothing else may follow them.
            self._break_off()
            return
        if self.committed:
            self._end_with_error(error)
        else:
            if not self.whole:
                client.keep_alive = False
            client.transport.write(
                render(
                    error,
                    request_id=self.request_id,
                    close=not client.keep_alive,
                    extra=client.context.cors_lines(client.origin)
                    + (KEEP_ALIVE if self.head.http10 and client.keep_alive else b""),
                    api=api_of(self.head.path),
                )
            )
        self.drop_upstream()
        self.end()

    def cancel(self) -> None:
        """The client is gone: the replica stops working for it at once."""
        if self.state == DONE:
            return
        pool, answer = self.pool, self._answer
        if pool is not None:
            events = 0 if self.upstream is None else self.upstream.events
            reading = None if answer is None else answer.reading
            if answer is not None and answer.reading.is_whole():
                if answer.wait_for_usage():
                    self.resume_answer()
                    self.client.context.loop.call_later(_USAGE_WAIT_S, self._end_unheard)
                    return
                self._count_whole(pool, answer, events)
            else:
                self._count_cancelled(pool, reading, events)
        self.drop_upstream()
        self.end()

    def _end_unheard(self) -> None:
        """The client left with all tokens, and no more comes of the answer."""
        pool, answer = self.pool, self._answer
        if self.state == DONE or pool is None or answer is None:
            return
        self._count_whole(pool, answer, 0 if self.upstream is None else self.upstream.events)
        self.drop_upstream()
        self.end()

    # Ends

    def end(self) -> None:
        """Leave queue and ledger, and let the connection go on."""
        pool = self.pool
        self._leave(pool)
        if self._uploads and pool is not None:
            self._end_upload(pool)
        self.client.exchange_ended(self)
        if pool is not None and (pool.queue or self.client.context.ledger.shared):
            pool.release()  # a held request of ours, or of another worker, has its turn

    def comment(self, text: str, now: float) -> None:
        """A keep-alive comment into a held stream; the first one commits the answer's head."""
        client = self.client
        frame = sse.comment(text)
        if not self.committed:
            self.committed = True
            frame = b"%bx-request-id: %b%b\r\n\r\n%b" % (
                sse.STREAM_HEAD,
                self.request_id,
                extra_lines(client, self.head, self.request_id),
                frame,
            )
        client.transport.write(frame)
        self.comment_s = now
