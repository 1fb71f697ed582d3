"""The second half of an exchange: an engine's answer on its way to the client.

Bytes go through as they come. What is looked at in passing (first byte, usage, number of events)
is read from the same blocks and changes nothing. The half that gets a request to an engine, and
all that can go wrong, is ``exchange.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Final

from gateway.datapath import metrics
from gateway.datapath.protocol import sse
from gateway.datapath.protocol.chunks import ChunkDecoder
from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.protocol.http1 import RequestHead, ResponseHead

if TYPE_CHECKING:
    from gateway.datapath.client import ClientConnection
    from gateway.datapath.pool import PoolRuntime, Target
    from gateway.datapath.upstream import UpstreamConnection

GATHER: Final = 0
HELD: Final = 1
CONNECT: Final = 2
SENT: Final = 3
ANSWER: Final = 4
DONE: Final = 5

# How an answer's body travels to the client: as it is, as chunks of our own (our head was sent
# with the first keep-alive comment), bare until close (HTTP/1.0), or collected for an error event.
_RAW: Final = 0
_WRAP: Final = 1
_PLAIN: Final = 2
_COLLECT: Final = 3
_MAX_COLLECTED_BYTES: Final = 65536
_TAIL_BYTES: Final = 4096
# The end of an answer often comes in scraps ("[DONE]", the last chunk): they are kept with the
# block before them, so that the last two blocks hold the usage however it was cut.
_SCRAP_BYTES: Final = 64


class Answer(ABC):
    """State and steps of the answer. Class attributes are the values before it began: setting
    thirty fields per request would cost more than reading its head."""

    client: ClientConnection
    head: RequestHead
    request_id: bytes
    started_s: float
    last_s: float
    state: int
    tokens: int
    _mode: int
    body_bytes: int = 0
    whole: bool = False
    committed: bool = False
    pool: PoolRuntime | None = None
    target: Target | None = None
    upstream: UpstreamConnection | None = None
    _answer: ResponseHead | None = None
    _blocks: int = 0
    _sent_bytes: int = 0
    _last_block: bytes = b""
    _previous_block: bytes = b""
    _collected: list[bytes] | None = None
    _decoder: ChunkDecoder | None = None

    def answer_began(self, head: ResponseHead, body: bytes) -> None:
        """The replica's head, and what came with it. From here on there is no retry."""
        self.state = ANSWER
        self._answer = head
        self.release_parts()
        if not self.whole:  # an early answer: what is still to come of the body has no reader
            self.client.keep_alive = False
        if self.committed or self.head.http10 or (head.content_length is None and not head.chunked):
            self._begin_otherwise(head, body)
        else:
            client = self.client
            if client.keep_alive and client.origin is None:
                end = b"\r\n\r\n"
            else:
                end = client.extra_lines() + b"\r\n\r\n"
            first = b"".join((head.kept, b"\r\nx-request-id: ", self.request_id, end, body))
            client.transport.write(first)
            self._sent_bytes = len(first)
            self.committed = True
        if body:
            self._count_block(body)

    def _begin_otherwise(self, head: ResponseHead, body: bytes) -> None:
        """Our head is out already, or the client or the engine cannot frame a body."""
        client = self.client
        if self.committed:  # 200, event stream, chunked
            if not (head.status == 200 and head.is_stream):
                self._mode = _COLLECT
                self._collected = []
            elif not head.chunked:
                self._mode = _WRAP
        else:
            self._mode = _PLAIN
            kept = head.kept
            if head.content_length is None:  # this client cannot be told where the body ends
                kept = head.without_framing()
                client.keep_alive = False
                if head.chunked:
                    self._decoder = ChunkDecoder()
            client.transport.write(
                b"%b\r\nx-request-id: %b%b\r\n\r\n" % (kept, self.request_id, client.extra_lines())
            )
            self.committed = True
        if body:
            self._write_block(body)

    def answer_block(self, data: bytes) -> None:
        """The next block. The hottest lines of a stream."""
        if self._mode == _RAW:
            self.client.transport.write(data)
            self._sent_bytes += len(data)
        else:
            self._write_block(data)
        self._count_block(data)

    def _write_block(self, data: bytes) -> None:
        if self._collected is not None:
            if sum(map(len, self._collected)) < _MAX_COLLECTED_BYTES:
                self._collected.append(data)
            return
        if self._mode == _WRAP:
            data = sse.chunk(data)
        elif self._decoder is not None:
            try:
                payload, _ = self._decoder.feed(data)
            except ApiError as error:  # we are stricter than llhttp, which let it pass
                self.cut(error.message)
                return
            data = b"".join(payload)
        if data:
            self.client.transport.write(data)
            self._sent_bytes += len(data)

    def _count_block(self, data: bytes) -> None:
        pool = self.pool
        assert pool is not None
        now = self.client.now()
        if self._blocks:
            pool.counters.observe(metrics.ITL, now - self.last_s)
        else:
            pool.counters.observe(metrics.TTFT, now - self.started_s)
            target = self.target
            if target is not None:
                target.failures = 0
                view = target.view
                if view.window < view.max_inflight_requests:
                    view.answered()
        self.last_s = now
        self._blocks += 1
        last = self._last_block
        if len(data) < _SCRAP_BYTES and len(last) < _TAIL_BYTES:
            self._last_block = last + data
        else:
            self._previous_block = last
            self._last_block = data

    def answer_ended(self, events: int = 0) -> None:
        """The answer is whole, in ``events`` chunks where it came in chunks: engines send one for
        each event of a stream. The connection to the replica is already released."""
        self.upstream = None
        answer, pool = self._answer, self.pool
        if answer is None or pool is None:
            return
        integers = pool.counters.integers
        status = answer.status
        if status < 400:
            integers[metrics.OK] += 1
        else:
            integers[metrics.CLIENT_ERROR if status < 500 else metrics.ENGINE_ERROR] += 1
        if self._mode == _COLLECT:
            self._end_collected(status)
        else:
            if self._mode == _WRAP:
                self.client.transport.write(sse.LAST_CHUNK)
            if status < 400:
                self._learn(pool, answer, events)
            pool.counters.observe(metrics.E2E, self.last_s - self.started_s)
        self.end()

    def _learn(self, pool: PoolRuntime, answer: ResponseHead, events: int) -> None:
        """Count what the answer says it cost, and size the model's next requests by it."""
        integers = pool.counters.integers
        tail = self._last_block
        if len(tail) < _TAIL_BYTES and self._previous_block:
            tail = self._previous_block[-_TAIL_BYTES:] + tail
        prompt, output = sse.read_usage(tail)
        if answer.is_stream:
            if output is None:
                output = events or self._blocks
            integers[metrics.CHUNKS] += self._blocks
        if prompt is not None:
            integers[metrics.PROMPT_TOKENS] += prompt
        if output is not None:
            integers[metrics.OUTPUT_TOKENS] += output
        integers[metrics.RESPONSE_BYTES] += self._sent_bytes
        size = self.body_bytes if self.whole else self.head.content_length
        pool.estimator.learn(size, prompt, output)

    def _end_collected(self, status: int) -> None:
        body = b"".join(self._collected or ())
        if self._answer is not None and self._answer.chunked:
            try:
                body = b"".join(ChunkDecoder().feed(body)[0])
            except ApiError:
                body = b""
        if not body.startswith(b"{"):
            body = ApiError(
                status, Reason.REPLICA_FAILED, f"The engine answered with status {status}."
            ).body()
        self.client.transport.write(sse.error_event(b" ".join(body.splitlines())))

    def cut(self, why: str) -> None:
        """An answer broke after its first byte: say so in the stream where the framing allows it,
        and close without the final chunk, so that no client takes it for whole."""
        client, pool, answer = self.client, self.pool, self._answer
        if pool is not None:
            pool.counters.integers[metrics.ENGINE_ERROR] += 1
            if self.target is not None:
                pool.failing(self.target, suspect=False)
        client.worker.rejected(Reason.REPLICA_CUT)
        if answer is not None and answer.is_stream and self._at_chunk_boundary(answer):
            error = ApiError(
                502, Reason.REPLICA_CUT, f"The model's replica failed mid-answer ({why})."
            )
            client.transport.write(sse.chunk(b"data: " + error.body() + b"\n\n"))
        self.break_off()

    def break_off(self) -> None:
        """End an answer that has begun, so that no client takes what it got for the whole."""
        client, answer = self.client, self._answer
        client.keep_alive = False
        self.drop_upstream()
        if self._mode == _PLAIN and (answer is None or answer.content_length is None):
            client.reset()  # an orderly end of the connection would be the end of the body
        self.end()

    def _at_chunk_boundary(self, answer: ResponseHead) -> bool:
        if self._mode == _WRAP:
            return True
        whole_events = not self._blocks or self._last_block.endswith(b"\n\n\r\n")
        return self._mode == _RAW and answer.chunked and whole_events

    def drop_upstream(self) -> None:
        """Close the connection to the replica: what it still computes for us is cancelled."""
        connection, self.upstream = self.upstream, None
        if connection is not None:
            connection.exchange = None
            connection.abort()

    # The transports' side

    def pause_answer(self) -> None:
        """The client reads slowly: stop reading the replica."""
        if self.upstream is not None:
            self.upstream.transport.pause_reading()

    def resume_answer(self) -> None:
        """The client reads again."""
        if self.upstream is not None:
            self.upstream.transport.resume_reading()

    # The request's half, in exchange.py

    @abstractmethod
    def release_parts(self) -> None:
        """Forget the request's body."""

    @abstractmethod
    def end(self) -> None:
        """The exchange is over."""
