"""One ext_proc stream, which is one request that an Envoy carries: messages in, replies out.

    GATHER ──▶ (HELD) ──▶ SENT ──▶ ANSWER ──▶ DONE
      the body    no replica   Envoy knows   the answer's    whole, refused,
      is read     can take it  the replica   headers came    or given up by Envoy

There is no I/O here: ``receive`` takes what Envoy sends, and ``replies`` collects what it is to be
sent. The pool may add a reply at any time (a place becomes free, a deadline passes) and says so by
``notify``. However the stream ends, the request leaves queue and ledger exactly once (``end``).

In the mode ``FULL_DUPLEX_STREAMED`` Envoy sends the headers and the body at once and waits for
neither reply, so the reply to the headers is held until the body has named the model, and both
bodies are sent back to it. In the mode ``BUFFERED`` it waits for the reply to the headers, sends
the whole body then, and keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from gateway.datapath import local, metrics
from gateway.datapath.context import WorkerContext
from gateway.datapath.pool import (
    ANSWER,
    DONE,
    GATHER,
    HELD,
    SENT,
    PoolDirectory,
    PoolRuntime,
    UpstreamEndpoint,
)
from gateway.datapath.protocol.bodies import FormReader, JsonReader, form_boundary
from gateway.datapath.protocol.errors import (
    ApiError,
    Reason,
    api_of,
    encoding_unsupported,
    id_lines,
)
from gateway.datapath.protocol.http1 import RequestHead
from gateway.datapath.protocol.openai import TAKES_JSON, plain_path
from gateway.datapath.request import AT_ONCE_BYTES, AnswerReading, RoutedRequest, buffer_full
from gateway.picker import ext_proc, replies
from router.failures import is_fault, is_pressure

# A body is read a slice at a time, until so many parts of it were seen: it may be made so that each
# of its bytes is one, and other streams wait meanwhile.
_SLICE_BYTES: Final = 16_384
_PARTS_PER_TURN: Final = 4_096
# Envoy waits so much longer for a reply than the request may be held.
_TIMEOUT_SLACK_S: Final = 5.0
_EVENT_END: Final = b"\n\n"

_SUBSET_METADATA: Final = "envoy.lb.subset_hint"
_SUBSET: Final = "x-gateway-destination-endpoint-subset"
_SERVED: Final = "x-gateway-destination-endpoint-served"
_ATTRIBUTES: Final = "envoy.filters.http.ext_proc"
# In Envoy's response code details: ``connection_failure``, ``connection_timeout`` and the like.
_NO_CONNECTION: Final = "connection"
_BROKEN: Final = ("remote_reset", "protocol_error")
_TIMEOUT: Final = "timeout"
_WAITS_FOR_BODY: Final = (ext_proc.FULL_DUPLEX_STREAMED, ext_proc.BUFFERED)


class ExtProcError(Exception):
    """Envoy sent what it may not send now; the message is one line."""


class PickerStream(RoutedRequest):
    """See the module. ``replies`` are whole messages. ``is_over`` says that after them the stream
    ends; ``is_broken`` that it ends with an error, so that Envoy cuts the answer."""

    is_over: bool = False
    is_broken: bool = False
    heard_s: float
    _began: bool = False
    _is_last: bool = False
    _unread: bytes = b""
    _unread_at: int = 0
    _has_trailers: bool = False
    _request_mode: int = ext_proc.FULL_DUPLEX_STREAMED
    _response_mode: int = ext_proc.FULL_DUPLEX_STREAMED
    _rewrite: str | None = None
    _prefixed: str = ""
    _tried: tuple[UpstreamEndpoint, ...] = ()
    _reading: AnswerReading | None = None
    _events: int = 0
    _answer_bytes: int = 0
    _answer_length: int | None = None

    def __init__(
        self, context: WorkerContext, pools: PoolDirectory, notify: Callable[[], None]
    ) -> None:
        now = context.now()
        self.context = context
        self.pools = pools
        self.replies: list[bytes] = []
        self.head = RequestHead()
        self.head.path = b""
        self.request_id = b""
        self.started_s = now
        self.last_s = now
        self.comment_s = now
        self.heard_s = now
        self.state = GATHER
        self.model = ""
        self.parts = []
        self._notify = notify
        self._address = ""

    @property
    def address(self) -> str:
        """Where its client is, as far as Envoy says it; empty where it does not."""
        return self._address

    # What Envoy sends

    def receive(self, message: Any) -> bool:
        """Take a ``ProcessingRequest``. Returns whether some of it is still to be read: then call
        ``read_on`` before the next. Raises ``ExtProcError`` for one that is out of order."""
        kind = message.WhichOneof("request")
        if self.state == DONE:
            return False  # it was on its way when the request was refused
        self.heard_s = self.context.now()
        try:
            if kind == "request_headers" and not self._began:
                self._take_head(message)
            elif kind == "request_body" and self.state == GATHER and self._began:
                self._unread, self._unread_at = message.request_body.body, 0
                # Of a buffered body there is one message, whether trailers follow it or not.
                is_last = message.request_body.end_of_stream
                self._is_last = is_last or self._request_mode == ext_proc.BUFFERED
                return self.read_on()
            elif kind == "request_trailers" and self._began:
                self._take_trailers()
            elif kind == "response_headers" and self.state != ANSWER:
                self._take_response(message)
            elif kind == "response_body" and self.state == ANSWER:
                self._take_block(message.response_body)
            elif kind == "response_trailers" and self.state == ANSWER:
                self.replies.append(replies.RESPONSE_TRAILERS)
                self._end_answer()
            else:
                raise ExtProcError(f"{kind or 'an empty message'} is out of order")
        except ApiError as error:
            self.reject(error)
        return False

    def read_on(self) -> bool:
        """Read more of the body that was received. Returns as ``receive``."""
        if self.state != GATHER:
            return False
        try:
            if self._read_slices():
                return True
            if self._is_last:
                self._complete()
        except ApiError as error:
            self.reject(error)
        return False

    def _read_slices(self) -> bool:
        data, reader = self._unread, self.reader
        if reader is None:
            self._unread = b""
            if data:
                self._feed(data)
            return False
        before = reader.parts
        while self._unread_at < len(data):
            end = self._unread_at + _SLICE_BYTES
            self._feed(data[self._unread_at : end])
            self._unread_at = end
            if reader.parts - before > _PARTS_PER_TURN:
                return end < len(data)
        self._unread = b""
        return False

    def _feed(self, data: bytes) -> None:
        self._count_body(data)
        self._keep_part(data)
        if self.context.buffered_bytes > self.context.gateway.max_buffered_bytes:
            raise buffer_full()

    def _take_head(self, message: Any) -> None:
        self._began = True
        headers = message.request_headers
        fields = _read_headers(headers)
        if message.HasField("protocol_config"):
            self._request_mode = message.protocol_config.request_body_mode
            self._response_mode = message.protocol_config.response_body_mode
        self._take_fields_of_head(fields)
        self.subset = _read_subset(message)
        head = self.head
        if head.method != b"POST" or head.path not in self.context.proxied:
            self._answer_locally()
            return
        if head.content_encoding is not None:
            raise encoding_unsupported(head.content_encoding)
        limit = self.context.gateway.max_body_bytes
        if head.content_length > limit:
            raise ApiError(
                413, Reason.BODY_TOO_LARGE, f"The request body is larger than {limit} bytes."
            )
        if headers.end_of_stream:
            self._complete()
        elif self._request_mode == ext_proc.NONE and "x-gateway-model-name" in fields:
            # Another filter has read the body, and says what is in it.
            self.model = fields["x-gateway-model-name"].decode("latin-1")
            if self._rewrite not in (None, self.model):
                raise _body_needed()
            self.body_bytes = head.content_length
            self.whole = True
            self._route(self.body_bytes)
            self._extend_timeout()
        elif self._request_mode not in _WAITS_FOR_BODY:
            raise _body_needed()
        elif self._request_mode == ext_proc.BUFFERED:
            self.replies.append(replies.REQUEST_HEADERS)

    def _take_fields_of_head(self, fields: dict[str, bytes]) -> None:
        head = self.head
        head.method = fields.get(":method", b"")
        raw_path = fields.get(":path", b"")
        path, mark, query = raw_path.partition(b"?")
        head.path = path if path in self.context.proxied else plain_path(path)
        head.query = mark + query
        self._prefixed = raw_path.decode("latin-1")
        length = fields.get("content-length", b"")
        head.content_length = int(length) if length.isdigit() and len(length) < 16 else 0
        encoding = fields.get("content-encoding", b"")
        if encoding.lower() not in (b"", b"identity"):
            head.content_encoding = encoding
        self.request_id = fields.get("x-request-id") or self.context.next_request_id()
        forwarded = fields.get("x-forwarded-for", b"").rpartition(b",")[2].strip()
        self._address = fields.get("x-envoy-external-address", forwarded).decode("latin-1")
        rewrite = fields.get("x-gateway-model-name-rewrite", b"")
        self._rewrite = rewrite.decode("utf-8", "replace") or None
        tenant = fields.get("x-gateway-inference-fairness-id", b"")
        self.tenant = tenant.decode("latin-1") or None
        boundary = None
        if head.path not in TAKES_JSON:
            boundary = form_boundary(b"\r\ncontent-type: " + fields.get("content-type", b""))
        if boundary is not None:
            self.reader = FormReader(boundary)
        elif not 0 < head.content_length < AT_ONCE_BYTES:
            self.reader = JsonReader()

    def _answer_locally(self) -> None:
        head = self.head
        status, body = local.read(self.context, self.pools, head.method, head.path)
        lines = id_lines(self.request_id, api_of(head.path))
        if head.method == b"HEAD":
            body = b""
        self.replies.append(replies.immediate(status, body, lines, reason="answered"))
        self.is_over = True
        self.end()

    def _take_trailers(self) -> None:
        if self.state == GATHER and self._request_mode != ext_proc.BUFFERED:
            self._has_trailers = True
            self._complete()
        elif self.state in (SENT, ANSWER):
            self.replies.append(replies.REQUEST_TRAILERS)

    def _complete(self) -> None:
        """The body is whole."""
        self.whole = True
        self._read_parts()
        if self._rewrite is not None:
            self.model = self._rewrite
        self._route(self.body_bytes)
        self._extend_timeout()

    def _extend_timeout(self) -> None:
        if self.state == HELD:
            deadline_s = self.context.gateway.holding.deadline_s
            self.replies.append(replies.longer_timeout(deadline_s + _TIMEOUT_SLACK_S))

    # The pool's side

    def send(self, endpoint: UpstreamEndpoint) -> None:
        """The router chose: reserve there, and tell Envoy."""
        pool = self.pool
        assert pool is not None
        served = endpoint.served_model
        is_known = served in (None, self.model) or self.model in endpoint.names
        if self._request_mode == ext_proc.NONE and not is_known:
            self.reject(_body_needed())  # its name for the model is another
            return
        self._reserve(pool, endpoint)
        self.state = SENT
        self._observe_sent(pool, self.context.now())
        others = pool.find_others(self, endpoint, self.context.gateway.picker.max_endpoints - 1)
        self._tried = (endpoint, *[one for one in others if _is_like(one, endpoint)])
        addresses = [one.address for one in self._tried]
        headers = list(endpoint.replica.headers)
        prefix = endpoint.upstream.request_start[5:].decode()
        if prefix:
            headers.append((":path", prefix + self._prefixed))
        sent = self._parts_sent(endpoint)
        is_changed = sent is not self.parts
        size = sum(map(len, sent))
        pool.counters.integers[metrics.REQUEST_BYTES] += size
        if is_changed or self._request_mode == ext_proc.FULL_DUPLEX_STREAMED:
            # Envoy takes the length off where the body comes back from here, in chunks of its own.
            headers.append(("content-length", str(size)))
        if self._request_mode == ext_proc.BUFFERED:
            body = b"".join(sent) if is_changed else b""
            self.replies.append(replies.destination(addresses, headers, body=body))
        else:
            self.replies.append(replies.destination(addresses, headers))
            if self._request_mode == ext_proc.FULL_DUPLEX_STREAMED:
                is_end = not self._has_trailers
                chunks = replies.body_chunks(b"".join(sent), is_request=True, is_end=is_end)
                self.replies += chunks
                if self._has_trailers:
                    self.replies.append(replies.REQUEST_TRAILERS)
        self.release_parts()
        self._notify()

    def _parts_sent(self, endpoint: UpstreamEndpoint) -> list[bytes]:
        if self._rewrite is None or not self.parts:
            return self._parts_for(endpoint)
        served = endpoint.served_model
        is_known = served is None or self.model in endpoint.names
        return self._renamed(self.model if served is None or is_known else served)

    def reject(self, error: ApiError) -> None:
        """Answer in the engine's place."""
        if self.state == DONE:
            return
        if self.pool is not None:
            self.pool.counters.integers[metrics.REJECTED] += 1
        self._count_rejection(error.reason, error.status)
        if self.state in (SENT, ANSWER):
            # Envoy waits for nothing from here: it cannot be told more than that it is over.
            self.is_broken = True
        else:
            self.replies.append(replies.refusal(error, api_of(self.head.path), self.request_id))
        self.is_over = True
        self.end()
        self._notify()

    def comment(self, text: str, now: float) -> None:
        """Nothing can be written before Envoy has the whole reply: its own timeouts must be longer
        than the holding."""
        self.comment_s = now

    # The answer

    def _take_response(self, message: Any) -> None:
        pool = self.pool
        state, self.state = self.state, ANSWER
        if state == HELD and pool is not None:
            pool.unhold(self)
        headers = message.response_headers
        fields = _read_headers(headers)
        code = fields.get(":status", b"")
        status = int(code) if code.isdigit() and len(code) == 3 else 500
        self.replies.append(replies.RESPONSE_HEADERS)
        if state == SENT and pool is not None:
            is_stream = fields.get("content-type", b"").startswith(b"text/event-stream")
            self._reading = AnswerReading(self.head.path, status, is_stream=is_stream)
            length = fields.get("content-length", b"")
            self._answer_length = int(length) if length.isdigit() and len(length) < 16 else None
            self._take_served(pool, _read_served(message))
            self._judge(pool, status, _read_details(message))
        elif pool is not None:
            # Envoy gave up (a timeout of its own) before a replica was known.
            self._count_cancelled(pool, None, 0)
        self.release_parts()
        if headers.end_of_stream:
            self._end_answer()

    def _take_served(self, pool: PoolRuntime, served: str | None) -> None:
        """Another replica than the first has answered: the request's place is there, and those
        before it in the list did not take it."""
        first = self.endpoint
        if served is None or first is None or served == first.address:
            return
        other = pool.find_at(served)
        if other is None:
            return
        self._unreserve()
        self._reserve(pool, other)
        pool.counters.integers[metrics.RETRIES] += 1
        for one in self._tried:
            if one is other:
                break
            pool.unreachable(one)

    def _judge(self, pool: PoolRuntime, status: int, details: str) -> None:
        """What the status says of the replica."""
        endpoint = self.endpoint
        if endpoint is None:
            return
        if details and details != "via_upstream" and status >= 500:
            self._judge_failure(pool, endpoint, details)
        elif status < 500 and status != 429:
            pool.answered(endpoint)
        elif is_pressure(status):
            pool.pressed(endpoint)
        elif is_fault(status):
            pool.context.report_failure(endpoint.id)
            pool.failed(endpoint)

    def _judge_failure(self, pool: PoolRuntime, endpoint: UpstreamEndpoint, details: str) -> None:
        """What an answer of Envoy's own says of the replica, by its response code details. Others
        (too many requests at once, no route) say nothing."""
        if _NO_CONNECTION in details:
            pool.unreachable(endpoint)
        elif any(one in details for one in _BROKEN):
            self.context.report_failure(endpoint.id)
            pool.failed(endpoint)
        elif _TIMEOUT in details:
            self.context.report_failure(endpoint.id)  # it is slow, or the limit is too low

    def _take_block(self, body: Any) -> None:
        data, is_end = body.body, body.end_of_stream
        reading = self._reading
        if reading is not None and data:
            self._answer_bytes += len(data)
            self._events += data.count(_EVENT_END)
            self._count_block(reading, data, self._events, self.context.now())
        if self._response_mode == ext_proc.FULL_DUPLEX_STREAMED:
            self.replies += replies.body_chunks(data, is_request=False, is_end=is_end)
        else:
            self.replies.append(replies.RESPONSE_BODY)
        if is_end:
            self._end_answer()

    def _end_answer(self) -> None:
        pool, reading = self.pool, self._reading
        if pool is not None and reading is not None:
            self._count_status(pool, reading.status)
            self._count_answer(pool, reading, self._events, self._answer_bytes)
        self.end()

    # Ends

    def cancel(self) -> None:
        """Envoy ended the stream: the client is gone, or the replica broke off."""
        if self.state == DONE:
            return
        pool, reading = self.pool, self._reading
        # A client that has as many bytes as it was promised may leave before Envoy says the end.
        has_all = self._answer_bytes == self._answer_length or self._response_mode == ext_proc.NONE
        if reading is not None and (has_all or reading.is_whole()):
            self._end_answer()
            return
        if pool is not None and (reading is not None or self.state != ANSWER):
            self._count_cancelled(pool, reading, self._events)
            if self.endpoint is not None:
                self.context.report_failure(self.endpoint.id)  # it may be the one that is gone
        self.end()

    def sweep(self, now: float) -> None:
        """End what waited too long."""
        gateway = self.context.gateway
        if self.state == DONE:
            return
        if now - self.started_s >= gateway.request_timeout_s:
            limit_s = gateway.request_timeout_s
            text = f"The request took longer than {limit_s:g} s."
            self.reject(ApiError(504, Reason.REQUEST_TIMEOUT, text))
        elif self.state == GATHER and now - self.heard_s >= gateway.body_timeout_s:
            self.reject(ApiError(408, Reason.BODY_TIMEOUT, "The request body took too long."))
        elif self._hears_replica() and now - self.last_s >= gateway.upstream_idle_timeout_s:
            limit_s = gateway.upstream_idle_timeout_s
            text = f"The model's replica sent nothing for {limit_s:g} s."
            self.reject(ApiError(504, Reason.REPLICA_TIMEOUT, text))

    def _hears_replica(self) -> bool:
        """Whether the replica's next word is waited for, and would be seen here: Envoy may keep the
        answer's body to itself, or until it is whole."""
        streamed = (ext_proc.STREAMED, ext_proc.FULL_DUPLEX_STREAMED)
        return self.state == SENT or (self.state == ANSWER and self._response_mode in streamed)

    def end(self) -> None:
        """Leave queue and ledger."""
        pool = self.pool
        self._leave(pool)
        if pool is not None and (pool.queue or self.context.ledger.shared):
            pool.release()  # a held request of ours, or of another worker, has its turn


def _body_needed() -> ApiError:
    return ApiError(
        500,
        Reason.INTERNAL,
        "The endpoint picker is not sent the request's body: the proxy's ext_proc filter needs the "
        "request_body_mode FULL_DUPLEX_STREAMED or BUFFERED.",
    )


def _is_like(one: UpstreamEndpoint, other: UpstreamEndpoint) -> bool:
    """Whether a request that was made for one replica can go to the other as it is."""
    return (
        one.replica.headers == other.replica.headers
        and one.served_model == other.served_model
        and one.names == other.names
        and one.upstream.request_start == other.upstream.request_start
    )


def _read_headers(headers: Any) -> dict[str, bytes]:
    return {one.key: one.raw_value or one.value.encode("utf-8") for one in headers.headers.headers}


def _read_subset(message: Any) -> frozenset[str] | None:
    """The addresses that the proxy allows, as a list or with commas between; ``None`` for all."""
    given = message.metadata_context.filter_metadata
    if _SUBSET_METADATA not in given or _SUBSET not in given[_SUBSET_METADATA].fields:
        return None
    value = given[_SUBSET_METADATA].fields[_SUBSET]
    if value.WhichOneof("kind") == "list_value":
        texts = [one.string_value for one in value.list_value.values]
    else:
        texts = value.string_value.split(",")
    return frozenset([text.strip() for text in texts if text.strip()])


def _read_served(message: Any) -> str | None:
    """The address of the replica that has answered, where the proxy says it."""
    given = message.metadata_context.filter_metadata
    if replies.METADATA in given and _SERVED in given[replies.METADATA].fields:
        return str(given[replies.METADATA].fields[_SERVED].string_value) or None
    return _read_attribute(message, "upstream.address") or None


def _read_details(message: Any) -> str:
    return _read_attribute(message, "response.code_details")


def _read_attribute(message: Any, name: str) -> str:
    attributes = message.attributes
    if _ATTRIBUTES not in attributes or name not in attributes[_ATTRIBUTES].fields:
        return ""
    return str(attributes[_ATTRIBUTES].fields[name].string_value)
