"""The replies of an endpoint picker to Envoy, as bytes: what it does with a request and its answer.

Envoy waits for one reply to each message, but for bodies in the mode ``FULL_DUPLEX_STREAMED``: of
these it takes as many chunks as there are, whenever they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from gateway.datapath.protocol.errors import Api, ApiError, error_lines, id_lines
from gateway.picker.ext_proc import OVERWRITE_IF_EXISTS_OR_ADD, ProcessingResponse

DESTINATION: Final = "x-gateway-destination-endpoint"
METADATA: Final = "envoy.lb"
REQUEST_ONLY: Final = (
    "x-gateway-model-name-rewrite",
    "x-gateway-inference-objective",
    "x-gateway-inference-fairness-id",
)
"""Headers that are for the picker and not for the engine."""

# Some Envoys take no chunk of more than 64 KiB.
CHUNK_BYTES: Final = 62_000


def _passed(kind: str) -> bytes:
    """The reply that a message goes on as it is."""
    reply = ProcessingResponse()
    getattr(reply, kind).SetInParent()
    whole: bytes = reply.SerializeToString()
    return whole


REQUEST_HEADERS: Final = _passed("request_headers")
REQUEST_TRAILERS: Final = _passed("request_trailers")
RESPONSE_HEADERS: Final = _passed("response_headers")
RESPONSE_BODY: Final = _passed("response_body")
RESPONSE_TRAILERS: Final = _passed("response_trailers")


def destination(
    addresses: Sequence[str], headers: Iterable[tuple[str, str]], *, body: bytes | None = None
) -> Any:
    """The reply that says where a request goes, to the headers, or with ``body`` to the buffered
    body, which is replaced by it if it is not empty. The first of the ``addresses`` is to be tried
    first; the others where it fails, in this order."""
    reply = ProcessingResponse()
    common = (reply.request_headers if body is None else reply.request_body).response
    common.clear_route_cache = True
    value = ",".join(addresses)
    set_headers(common.header_mutation, ((DESTINATION, value), *headers))
    common.header_mutation.remove_headers.extend(REQUEST_ONLY)
    if body:
        common.body_mutation.body = body
    reply.dynamic_metadata.update({METADATA: {DESTINATION: value}})
    return reply.SerializeToString()


def body_chunks(body: bytes, *, is_request: bool, is_end: bool) -> Iterator[bytes]:
    """Replies with a body, or some of one, in chunks; the last says whether the body ends."""
    size = len(body)
    for start in range(0, size or 1, CHUNK_BYTES):
        reply = ProcessingResponse()
        both = reply.request_body if is_request else reply.response_body
        chunk = both.response.body_mutation.streamed_response
        end = start + CHUNK_BYTES
        chunk.body = body[start:end] if size > CHUNK_BYTES else body
        chunk.end_of_stream = is_end and end >= size
        # Where there is nothing in it, it is a chunk all the same.
        chunk.SetInParent()
        yield reply.SerializeToString()


def longer_timeout(timeout_s: float) -> bytes:
    """Asks Envoy to wait so long for the next reply, in place of its own timeout."""
    reply = ProcessingResponse()
    reply.override_message_timeout.seconds = int(timeout_s)
    whole: bytes = reply.SerializeToString()
    return whole


def refusal(error: ApiError, api: Api, request_id: bytes) -> bytes:
    """The reply by which Envoy answers an error in the engine's place."""
    lines = id_lines(request_id, api) + error_lines(error)
    return immediate(error.status, error.body(api, request_id), lines, reason=error.reason.value)


def immediate(status: int, body: bytes, lines: bytes, *, reason: str) -> bytes:
    """The reply by which Envoy answers JSON itself; ``lines`` are further header lines, each ending
    in CRLF. ``reason`` is for Envoy's access log (``%RESPONSE_CODE_DETAILS%``)."""
    reply = ProcessingResponse()
    answer = reply.immediate_response
    answer.status.code = status
    answer.body = body
    answer.details = f"tidegate_{reason}"
    fields = [("content-type", "application/json")]
    for line in lines.decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(": ")
        fields.append((name, value))
    set_headers(answer.headers, fields)
    whole: bytes = reply.SerializeToString()
    return whole


def set_headers(mutation: Any, headers: Iterable[tuple[str, str]]) -> None:
    """Have Envoy set headers, whatever value they had."""
    for name, value in headers:
        added = mutation.set_headers.add(append_action=OVERWRITE_IF_EXISTS_OR_ADD)
        added.header.key = name
        added.header.raw_value = value.encode("latin-1", "replace")
