"""What an Envoy sends an endpoint picker, and reads of it, in Envoy's own published protos."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from envoy.extensions.filters.http.ext_proc.v3.processing_mode_pb2 import ProcessingMode
from envoy.service.ext_proc.v3 import external_processor_pb2 as published

from gateway.picker import ext_proc
from gateway.picker.replies import DESTINATION, METADATA

DUPLEX = ProcessingMode.FULL_DUPLEX_STREAMED
BUFFERED = ProcessingMode.BUFFERED
STREAMED = ProcessingMode.STREAMED
NONE = ProcessingMode.NONE


def received(message: published.ProcessingRequest) -> Any:
    """A message as the picker's own protos read it."""
    return ext_proc.ProcessingRequest.FromString(message.SerializeToString())


def sent(reply: bytes) -> published.ProcessingResponse:
    """A reply as Envoy reads it."""
    return published.ProcessingResponse.FromString(reply)


def chat(model: str = "m", **fields: Any) -> bytes:
    """The body of a chat completion."""
    messages = [{"role": "user", "content": "Hello"}]
    return json.dumps({"model": model, "messages": messages, **fields}).encode()


def request_headers(
    path: str = "/v1/chat/completions",
    method: str = "POST",
    *,
    request_mode: int = DUPLEX,
    response_mode: int | None = None,
    subset: Sequence[str] | str | None = None,
    end: bool = False,
    **headers: str,
) -> Any:
    """The first message. Underscores in the names of headers are hyphens."""
    message = published.ProcessingRequest()
    _add_headers(message.request_headers, {":method": method, ":path": path, **headers})
    message.request_headers.end_of_stream = end
    message.protocol_config.request_body_mode = request_mode
    mode = request_mode if response_mode is None else response_mode
    message.protocol_config.response_body_mode = mode
    if subset is not None:
        listed = subset if isinstance(subset, str) else list(subset)
        given = message.metadata_context.filter_metadata["envoy.lb.subset_hint"]
        given.update({"x-gateway-destination-endpoint-subset": listed})
    return received(message)


def request_body(body: bytes, *, end: bool = True) -> Any:
    message = published.ProcessingRequest()
    message.request_body.body = body
    message.request_body.end_of_stream = end
    return received(message)


def request_trailers() -> Any:
    message = published.ProcessingRequest()
    message.request_trailers.SetInParent()
    return received(message)


def response_headers(
    status: int = 200,
    content_type: str = "application/json",
    *,
    end: bool = False,
    served: str | None = None,
    attributes: Mapping[str, str] | None = None,
    **headers: str,
) -> Any:
    message = published.ProcessingRequest()
    fields = {":status": str(status), "content-type": content_type, **headers}
    _add_headers(message.response_headers, fields)
    message.response_headers.end_of_stream = end
    if served is not None:
        lb = message.metadata_context.filter_metadata["envoy.lb"]
        lb.update({"x-gateway-destination-endpoint-served": served})
    if attributes:
        message.attributes["envoy.filters.http.ext_proc"].update(dict(attributes))
    return received(message)


def response_body(body: bytes, *, end: bool = False) -> Any:
    message = published.ProcessingRequest()
    message.response_body.body = body
    message.response_body.end_of_stream = end
    return received(message)


def response_trailers() -> Any:
    message = published.ProcessingRequest()
    message.response_trailers.SetInParent()
    return received(message)


def _add_headers(headers: Any, fields: Mapping[str, str]) -> None:
    for name, value in fields.items():
        key = name.replace("_", "-")
        headers.headers.headers.add(key=key, raw_value=value.encode())


def mutated(mutation: Any) -> dict[str, str]:
    """The headers that a reply sets."""
    return {one.header.key: one.header.raw_value.decode() for one in mutation.set_headers}


def destination(reply: published.ProcessingResponse) -> list[str]:
    """Where a request is to go, the same in header and metadata."""
    kind = reply.WhichOneof("response")
    assert kind in ("request_headers", "request_body")
    header = mutated(getattr(reply, kind).response.header_mutation)[DESTINATION]
    assert reply.dynamic_metadata[METADATA][DESTINATION] == header
    return header.split(",")


def joined(replies: Sequence[published.ProcessingResponse], kind: str) -> bytes:
    """The body in a row of chunks, of which the last ends it."""
    chunks = [getattr(one, kind).response.body_mutation.streamed_response for one in replies]
    assert [chunk.end_of_stream for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all(len(chunk.body) <= 62_000 for chunk in chunks)
    return b"".join(chunk.body for chunk in chunks)
