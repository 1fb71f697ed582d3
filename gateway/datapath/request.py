"""A request whatever carries it: what routes it, its place at a replica, what its answer counts.

``exchange`` carries requests over HTTP, the endpoint picker has an Envoy carry them. What is the
same for both is here, so that both are the same demand to the control side: how the model is found
in a body, the estimate and the place in the ledger, what is counted of the answer.
"""

from __future__ import annotations

from typing import Final

import msgspec

from gateway.datapath import metrics
from gateway.datapath.context import WorkerContext
from gateway.datapath.pool import (
    DONE,
    HELD,
    PoolDirectory,
    PooledRequest,
    PoolRuntime,
    UpstreamEndpoint,
)
from gateway.datapath.protocol import sse
from gateway.datapath.protocol.bodies import (
    BodyReader,
    FormReader,
    JsonReader,
    read_bool,
    read_json,
    smallest_bound,
    splice,
)
from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.protocol.openai import read_head
from router.request import RoutingRequest

# A whole body of fewer bytes is decoded at once: that takes a millisecond, whatever is in it. So is
# one that was read as it came, and that the reader could not follow.
AT_ONCE_BYTES: Final = 262_144
# One that is out of the ordinary is read in Python, up to this size at once.
SMALL_BODY_BYTES: Final = 65_536
# Speech and pictures: so many bytes of a form are one byte of text to the token estimate.
_FORM_BYTES: Final = 64
_SMALL_PART_BYTES: Final = 4096
# A model whose replica does not say how long its context is has none that is longer.
_MAX_MODEL_LEN_TOKENS: Final = 1_048_576
_TAIL_BYTES: Final = 4096
# The end of an answer often comes in scraps ("[DONE]", the last chunk): they are kept with the
# block before them, so that the last two blocks hold the usage however it was cut.
_SCRAP_BYTES: Final = 64
_QUEUE_WAIT_ZERO: Final = metrics.HISTOGRAM_OFFSETS[metrics.QUEUE_WAIT]


def buffer_full() -> ApiError:
    """503 where a worker has as many bytes of bodies in memory as it may."""
    return ApiError(
        503,
        Reason.BUFFER_FULL,
        "The gateway already holds as many request bytes as it may; try again.",
        retry_after_s=1.0,
    )


class AnswerReading:
    """What is read of an answer in passing. ``blocks`` is how many have come; ``last_block`` is the
    last of them, with the scraps after it. Chunk framing may be in them or not."""

    blocks: int = 0
    last_block: bytes = b""
    _events: int = 0
    _series: int = 2 * metrics.OTHER_ENDPOINT
    _previous_block: bytes = b""

    def __init__(self, path: bytes, status: int, *, is_stream: bool) -> None:
        self._path = path
        self.status = status
        self.is_stream = is_stream

    def count_block(
        self, counters: metrics.PoolCounters, data: bytes, events: int, gap_s: float, age_s: float
    ) -> None:
        """Observe a block's time: ``events`` is how many came with it and before it, ``gap_s`` the
        time since the last, ``age_s`` that since the request."""
        if self.blocks:
            self._observe_gap(counters, data, events - self._events, gap_s)
        else:
            kind = metrics.ENDPOINT_INDEX.get(self._path, metrics.OTHER_ENDPOINT)
            self._series = 2 * kind + self.is_stream
            counters.observe(metrics.TTFT + self._series, age_s)
        self._events = events
        self.blocks += 1
        last = self.last_block
        if len(data) < _SCRAP_BYTES and len(last) < _TAIL_BYTES:
            self.last_block = last + data
        else:
            self._previous_block = last
            self.last_block = data

    def _observe_gap(
        self, counters: metrics.PoolCounters, data: bytes, tokens: int, gap_s: float
    ) -> None:
        """Observe the time before a block with so many events, each of them a token but the last
        two of a stream: its usage, and the word that it is over."""
        # Not with ``in``: bytes first try the other side as a number, which costs an error. In a
        # block that is larger than the last event, and is one event, that is not looked for.
        if (tokens > 1 or len(data) < _SCRAP_BYTES) and data.find(sse.LAST_EVENT) >= 0:
            tokens -= 1
            if tokens < 1:
                return
        if data.find(sse.USAGE_EVENT) >= 0:
            return
        if tokens <= 1:
            counters.observe(metrics.ITL, gap_s)
        else:
            counters.observe(metrics.ITL, gap_s / tokens, tokens)

    def count_end(self, counters: metrics.PoolCounters, age_s: float) -> None:
        """Observe how long it took from the request to its end."""
        counters.observe(metrics.E2E + self._series, age_s)

    def tail(self) -> bytes:
        """Its last bytes."""
        tail = self.last_block
        if len(tail) < _TAIL_BYTES and self._previous_block:
            tail = self._previous_block[-_TAIL_BYTES:] + tail
        return tail

    def count_events(self, events: int) -> int:
        """Output tokens of a stream that does not say: its events, less the one with the role and
        the one that says that it is over."""
        events = events or self.blocks
        events -= self._path == b"/v1/chat/completions"
        events -= sse.LAST_EVENT in self.last_block
        return max(events, 0)

    @property
    def end(self) -> bytes:
        """Its last two blocks."""
        return self._previous_block + self.last_block

    def is_whole(self) -> bool:
        """Whether the client has all of it, though it did not end. Clients close at the last event,
        which often comes a chunk before the end of the body, or at the last token."""
        if not self.is_stream or self.status != 200:
            return False
        return sse.is_whole(self.end)


class RoutedRequest(PooledRequest):
    """See the module. Class attributes are the values before the answer began: setting thirty
    fields per request would cost more than reading its head. ``body_bytes`` counts the request's
    body, ``whole`` says that it was received whole. ``reader`` is there for a body that is read as
    it comes; ``subset`` is the addresses of the replicas that may be sent it, ``None`` for all."""

    context: WorkerContext
    pools: PoolDirectory
    request_id: bytes
    last_s: float
    parts: list[bytes]
    whole: bool = False
    reader: BodyReader | None = None
    output_bound: int | None = None
    pool: PoolRuntime | None = None
    endpoint: UpstreamEndpoint | None = None
    subset: frozenset[str] | None = None
    tenant: str | None = None
    _says_usage: bool = False

    # Its body

    def _count_body(self, data: bytes) -> None:
        """Some of the body has come. Raises ``ApiError`` where it is too much, or names two
        models."""
        gateway = self.context.gateway
        self.body_bytes += len(data)
        if self.body_bytes > gateway.max_body_bytes:
            raise ApiError(
                413,
                Reason.BODY_TOO_LARGE,
                f"The request body is larger than {gateway.max_body_bytes} bytes.",
            )
        if self.reader is not None:
            self.reader.feed(data)

    def _keep_part(self, data: bytes) -> None:
        """Keep some of the body, as long as it may have to be sent again."""
        parts = self.parts
        if parts and len(parts[-1]) + len(data) < _SMALL_PART_BYTES:
            parts[-1] += data  # a body sent byte by byte must not cost fifty times its size
        else:
            parts.append(data)
        self.context.buffered_bytes += len(data)

    def _read_parts(self) -> None:
        """The body is whole: take what routes it. Raises ``ApiError`` where nothing does."""
        reader = self.reader
        is_small = self.body_bytes < SMALL_BODY_BYTES
        if reader is None or (is_small and isinstance(reader, JsonReader)):
            self.reader = None
            body = self._join()
            if not self._read(body):
                self._take_fields(self._decode(body))
        else:
            if reader.broken and not reader.model and self.body_bytes < AT_ONCE_BYTES:
                reader = self._decode(self._join())
            reader.check()
            self._take_fields(reader)

    def _read(self, body: bytes) -> bool:
        """Take what routes a whole body. Returns false where it is out of the ordinary."""
        read = read_head(body)
        if read is None:
            return False
        self.model, fields = read
        if fields.stream is not None:
            self.stream = read_bool(fields.stream)
            self._says_usage = fields.stream_options is not msgspec.UNSET
        bound = fields.max_tokens
        if (
            fields.max_completion_tokens is None
            and fields.max_output_tokens is None
            and (bound is None or (type(bound) is int and bound > 0))
        ):
            self.output_bound = bound  # as it mostly is
        else:
            self.output_bound = smallest_bound(
                bound, fields.max_completion_tokens, fields.max_output_tokens
            )
        return True

    def _decode(self, body: bytes) -> BodyReader:
        """Read a body that is out of the ordinary; from here on it is UTF-8."""
        self.reader, plain = read_json(body)
        self.context.buffered_bytes += len(plain) - len(body)
        self.body_bytes = len(plain)
        self.parts[:] = [plain]
        return self.reader

    def _take_fields(self, reader: BodyReader) -> None:
        self.model = reader.model or ""
        self.stream = reader.stream
        self._says_usage = reader.has_stream_options
        self.output_bound = reader.output_bound()

    def _text_bytes(self, body_bytes: int) -> int:
        """What a body counts as in the estimate of its tokens."""
        if self.reader is None or not isinstance(self.reader, FormReader):
            return body_bytes
        return body_bytes // _FORM_BYTES

    def _join(self) -> bytes:
        parts = self.parts
        if len(parts) != 1:
            parts[:] = [b"".join(parts)]
        return parts[0]

    def _parts_for(self, endpoint: UpstreamEndpoint) -> list[bytes]:
        """The body for a replica: with its own name for the model where that is another; every
        other byte as it came."""
        served = endpoint.served_model
        if served is None or served == self.model or self.model in endpoint.names:
            return self.parts
        return self._renamed(served)

    def _renamed(self, model: str) -> list[bytes]:
        """The body with another name for the model."""
        reader = self.reader
        if reader is None:
            self.reader = reader = JsonReader()
            reader.feed(self._join())
        return splice(self.parts, reader.start, reader.end, reader.quote(model))

    def release_parts(self) -> None:
        """Forget the request's body."""
        for part in self.parts:
            self.context.buffered_bytes -= len(part)
        self.parts = []

    # Its place

    def _route(self, body_bytes: int) -> None:
        """The model is known: count the arrival, and send or hold the request. Raises ``ApiError``
        where neither may be."""
        self.pool = pool = self.pools.find(self.model)
        prompt_tokens, tokens = pool.estimate(self._text_bytes(body_bytes), self.output_bound)
        counters = pool.counters
        integers = counters.integers
        integers[metrics.ARRIVALS] += 1
        if self.whole:
            integers[metrics.ARRIVED_PROMPT_TOKENS] += prompt_tokens
            integers[metrics.ARRIVED_OUTPUT_TOKENS] += tokens - prompt_tokens
        else:  # no engine works on it before, so it is no demand yet
            _, tokens = pool.estimate(0, self.output_bound)
        self.routing = RoutingRequest(prompt_tokens, tokens, tenant=self.tenant)
        self.routing.subset = self.subset
        counters.dirty = True
        pool.retries.add_request()
        pool.dispatch(self)

    def _reserve(self, pool: PoolRuntime, endpoint: UpstreamEndpoint) -> None:
        """Take a place at a replica."""
        self.endpoint = endpoint
        integers, tokens = pool.counters.integers, self.routing.tokens
        integers[metrics.INFLIGHT_REQUESTS] += 1
        integers[metrics.INFLIGHT_TOKENS] += tokens
        self.context.ledger.reserve(endpoint.slot, tokens)

    def _unreserve(self) -> None:
        """Give the place back, if there is one."""
        endpoint, pool = self.endpoint, self.pool
        if endpoint is not None and pool is not None:
            tokens = self.routing.tokens
            self.endpoint = None
            integers = pool.counters.integers
            integers[metrics.INFLIGHT_REQUESTS] -= 1
            integers[metrics.INFLIGHT_TOKENS] -= tokens
            self.context.ledger.settle(endpoint.slot, tokens)

    def _leave(self, pool: PoolRuntime | None) -> None:
        """It is over, however it ended: leave the queue and the ledger, forget the body."""
        if self.state == HELD and pool is not None:
            pool.unhold(self)
        self.state = DONE
        if self.parts:
            self.release_parts()
        if pool is not None:
            self._unreserve()
            pool.counters.dirty = True

    def _observe_sent(self, pool: PoolRuntime, now: float) -> None:
        """It goes to its replica now."""
        self.last_s = now
        if now == self.started_s:
            pool.counters.integers[_QUEUE_WAIT_ZERO] += 1
        else:
            pool.counters.observe(metrics.QUEUE_WAIT, now - self.started_s)

    # What is counted

    def _count_block(self, reading: AnswerReading, data: bytes, events: int, now: float) -> None:
        """A block of the answer has come. The hottest lines of a stream."""
        pool = self.pool
        assert pool is not None
        gap_s, self.last_s = now - self.last_s, now
        if not reading.blocks and self.endpoint is not None:
            self.endpoint.count_first_token(gap_s)
        reading.count_block(pool.counters, data, events, gap_s, now - self.started_s)

    def _count_status(self, pool: PoolRuntime, status: int) -> None:
        """Count an answer that the client has the whole of, by its status."""
        integers = pool.counters.integers
        if status < 400:
            integers[metrics.OK] += 1
        else:
            integers[metrics.CLIENT_ERROR if status < 500 else metrics.ENGINE_ERROR] += 1
        integers[metrics.OK_CODE if status == 200 else metrics.code_index(status)] += 1
        if self.endpoint is not None:
            self.endpoint.count_answer(ok=status < 500)

    def _count_answer(
        self, pool: PoolRuntime, reading: AnswerReading, events: int, answer_bytes: int
    ) -> None:
        """Count what a whole answer came to. ``events``: how many it had, 0 where that is not
        known; ``answer_bytes``: its size."""
        if reading.status < 400:
            self._learn(pool, reading, events, answer_bytes)
        reading.count_end(pool.counters, self.last_s - self.started_s)

    def _learn(
        self, pool: PoolRuntime, reading: AnswerReading, events: int, answer_bytes: int
    ) -> None:
        """Count what the answer says it cost, and size the model's next requests by it."""
        integers = pool.counters.integers
        tail = reading.tail()
        prompt, output = sse.read_usage(tail)
        if (prompt or 0) > self.body_bytes or (output or 0) > answer_bytes:
            prompt, output = self._clamp(prompt, output, answer_bytes)
        size = self.body_bytes if self.whole else self.head.content_length
        pool.estimator.learn(self._text_bytes(size), prompt, output)
        if reading.is_stream:
            if output is None:
                prompt = self.routing.prompt_tokens if prompt is None else prompt
                output = reading.count_events(events)
            integers[metrics.CHUNKS] += reading.blocks
        if prompt is not None:
            integers[metrics.PROMPT_TOKENS] += prompt
            pool.counters.observe(metrics.PROMPT_LENGTH, prompt)
        if output is not None:
            integers[metrics.OUTPUT_TOKENS] += output
            pool.counters.observe(metrics.OUTPUT_LENGTH, output)
        reason = sse.read_finish_reason(tail)
        if reason is not None:
            integers[metrics.FINISH_INDEX[reason]] += 1
        integers[metrics.RESPONSE_BYTES] += answer_bytes

    def _clamp(
        self, prompt: int | None, output: int | None, answer_bytes: int
    ) -> tuple[int | None, int | None]:
        """Usage within what can be: one lie would be in the metrics for ever. A sequence fits the
        model's context, and of several each token has a byte."""
        endpoint = self.endpoint
        longest = None if endpoint is None else endpoint.replica.max_model_len_tokens
        longest = longest or _MAX_MODEL_LEN_TOKENS
        size = max(self.body_bytes, self.head.content_length, longest)
        return (
            None if prompt is None else min(prompt, size),
            None if output is None else min(output, max(answer_bytes, longest)),
        )

    def _count_cancelled(
        self, pool: PoolRuntime, reading: AnswerReading | None, events: int
    ) -> None:
        """The client left before it had the answer."""
        integers = pool.counters.integers
        integers[metrics.CANCELLED] += 1
        if reading is not None and reading.is_stream and reading.blocks:
            # The engine worked for it until now; before its first token it counts nothing.
            integers[metrics.PROMPT_TOKENS] += self.routing.prompt_tokens
            integers[metrics.OUTPUT_TOKENS] += reading.count_events(events)

    def _count_rejection(self, reason: Reason, status: int) -> None:
        """The gateway answers in the engine's place."""
        if self.pool is None:
            self.context.count_rejection(reason, status)
        else:
            integers = self.pool.counters.integers
            integers[metrics.REASON_INDEX[reason]] += 1
            integers[metrics.code_index(status)] += 1
