"""Every error a client can get from the gateway itself, in OpenAI's shape.

The body is what OpenAI's SDKs parse; the header ``x-tidegate-reason`` is for machines and says
that the gateway, not the engine, answered. An engine's own errors pass through untouched.
"""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus

import msgspec


class Reason(StrEnum):
    """Why the gateway answered in the engine's place. Also the label of the rejection metric."""

    BAD_REQUEST = "bad_request"
    BAD_JSON = "bad_json"
    MODEL_MISSING = "model_missing"
    MODEL_UNKNOWN = "model_unknown"
    PATH_UNKNOWN = "path_unknown"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    HEAD_TOO_LARGE = "head_too_large"
    BODY_TOO_LARGE = "body_too_large"
    HEAD_TIMEOUT = "head_timeout"
    BODY_TIMEOUT = "body_timeout"
    UPGRADE_UNSUPPORTED = "upgrade_unsupported"
    EXPECTATION_UNSUPPORTED = "expectation_unsupported"
    CONNECTIONS_FULL = "connections_full"
    BUFFER_FULL = "buffer_full"
    HOLD_QUEUE_FULL = "hold_queue_full"
    HOLD_DEADLINE = "hold_deadline"
    REPLICA_FAILED = "replica_failed"
    REPLICA_TIMEOUT = "replica_timeout"
    REPLICA_CUT = "replica_cut"
    REQUEST_TIMEOUT = "request_timeout"
    DRAINING = "draining"
    INTERNAL = "internal"


_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ApiError(Exception):
    """An answer the gateway gives itself: status, reason, message and the field it is about."""

    def __init__(
        self,
        status: int,
        reason: Reason,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    def body(self) -> bytes:
        """The JSON object that OpenAI's clients turn into their exception."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, kind),
            "param": None if self.status == 405 else self.param,
            "code": "model_not_found" if self.reason is Reason.MODEL_UNKNOWN else self.reason,
        }
        return msgspec.json.encode({"error": error})


def render(error: ApiError, *, request_id: bytes, close: bool, extra: bytes = b"") -> bytes:
    """The whole HTTP/1.1 response. ``extra`` is finished header lines, each ending in CRLF."""
    headers = b"x-tidegate-reason: " + error.reason.value.encode() + b"\r\n"
    if error.retry_after_s is not None:
        # Whole seconds, rounded up: a client that comes back early is refused again.
        headers += b"retry-after: %d\r\n" % max(1, -int(-error.retry_after_s // 1))
    if error.status == 405:
        headers += b"allow: " + (error.param or "POST").encode() + b"\r\n"
    return response(
        error.status, error.body(), request_id=request_id, close=close, extra=headers + extra
    )


def response(
    status: int,
    body: bytes,
    *,
    request_id: bytes,
    close: bool = False,
    content_type: bytes = b"application/json",
    extra: bytes = b"",
    head_only: bool = False,
) -> bytes:
    """A complete response with a body known in full. ``head_only`` answers a HEAD request."""
    phrase = HTTPStatus(status).phrase.encode()
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b%b\r\n%b" % (
        status,
        phrase,
        content_type,
        len(body),
        b"x-request-id: " + request_id + b"\r\n" if request_id else b"",
        extra,
        b"connection: close\r\n" if close else b"",
        b"" if head_only else body,
    )
