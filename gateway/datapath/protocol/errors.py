"""Every error a client can get from the gateway itself, in the shape of the API that it speaks.

The body, or the event of a stream that has begun, is what that API's SDKs raise; the header
``x-tidegate-reason`` is for machines and says that the gateway, not the engine, answered. An
engine's own errors pass through untouched, unless they must become an event.
"""

from __future__ import annotations

from enum import StrEnum
from http import HTTPStatus
from typing import Any

import msgspec


class Api(StrEnum):
    """Whose clients speak to a path: they decide how an error must look."""

    OPENAI = "openai"
    ANTHROPIC = "anthropic"
    RESPONSES = "responses"


def api_of(path: bytes) -> Api:
    """The API that a request's path belongs to."""
    if path.startswith(b"/v1/messages"):
        return Api.ANTHROPIC
    return Api.RESPONSES if path.startswith(b"/v1/responses") else Api.OPENAI


class Reason(StrEnum):
    """Why the gateway answered in the engine's place. Also the label of the rejection metric."""

    BAD_REQUEST = "bad_request"
    BAD_JSON = "bad_json"
    MODEL_MISSING = "model_missing"
    MODEL_UNKNOWN = "model_unknown"
    MODEL_DISABLED = "model_disabled"
    PATH_UNKNOWN = "path_unknown"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    HEAD_TOO_LARGE = "head_too_large"
    BODY_TOO_LARGE = "body_too_large"
    HEAD_TIMEOUT = "head_timeout"
    BODY_TIMEOUT = "body_timeout"
    UPGRADE_UNSUPPORTED = "upgrade_unsupported"
    ENCODING_UNSUPPORTED = "encoding_unsupported"
    EXPECTATION_UNSUPPORTED = "expectation_unsupported"
    CONNECTIONS_FULL = "connections_full"
    BUFFER_FULL = "buffer_full"
    HOLD_QUEUE_FULL = "hold_queue_full"
    HOLD_DEADLINE = "hold_deadline"
    SUBSET_FULL = "subset_full"
    SUBSET_UNAVAILABLE = "subset_unavailable"
    ENGINE_FAILED = "engine_failed"
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
_ANTHROPIC_TYPES = {
    **_TYPES,
    408: "timeout_error",
    413: "request_too_large",
    503: "overloaded_error",
    504: "timeout_error",
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

    def body(self, api: Api = Api.OPENAI, request_id: bytes = b"") -> bytes:
        """The JSON object that the API's clients turn into their exception. Errors of
        ``/v1/responses`` have OpenAI's shape, as long as no stream has begun."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if api is Api.ANTHROPIC:
            kind = "api_error" if self.status >= 500 else kind
            kind = _ANTHROPIC_TYPES.get(self.status, kind)
            return msgspec.json.encode(
                {
                    "type": "error",
                    "error": {"type": kind, "message": self.message},
                    "request_id": request_id.decode("latin-1"),
                }
            )
        error = {
            "message": self.message,
            "type": _TYPES.get(self.status, kind),
            "param": None if self.status == 405 else self.param,
            "code": "model_not_found" if self.reason is Reason.MODEL_UNKNOWN else self.reason,
        }
        return msgspec.json.encode({"error": error})


def encoding_unsupported(encoding: bytes) -> ApiError:
    """415 for a compressed body, which neither the engines nor the gateway decode."""
    name = encoding.decode("latin-1")[:100]
    return ApiError(
        415,
        Reason.ENCODING_UNSUPPORTED,
        f"The request body has the content encoding '{name}', which is not understood: send it "
        "as it is.",
    )


def engine_error(status: int, body: bytes, api: Api) -> ApiError | bytes:
    """What an engine's error answer becomes once the head of a stream is out: the body itself
    where the API's clients know its shape, else an error with its message."""
    try:
        answer: Any = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        answer = None
    message = None
    if isinstance(answer, dict):
        error = answer.get("error")
        if error and api is Api.OPENAI:
            return body
        if api is Api.ANTHROPIC and answer.get("type") == "error" and isinstance(error, dict):
            return body
        for place in (error, answer):
            found = place.get("message", place.get("detail")) if isinstance(place, dict) else place
            if message is None and isinstance(found, str):
                message = found
    message = message or f"The engine answered with status {status}."
    return ApiError(status, Reason.REPLICA_FAILED, message)


def failed_response(
    error: ApiError, *, request_id: bytes, model: str, created_s: int
) -> dict[str, Any]:
    """The failed response that the last event of a stream of ``/v1/responses`` carries."""
    code = "server_error" if error.status >= 500 else "invalid_prompt"
    return {
        "id": "resp_" + request_id.decode("latin-1"),
        "object": "response",
        "created_at": created_s,
        "status": "failed",
        "error": {
            "code": "rate_limit_exceeded" if error.status == 429 else code,
            "message": error.message,
        },
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": [],
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
    }


def id_lines(request_id: bytes, api: Api) -> bytes:
    """The header lines with a request's id, each ending in CRLF: Anthropic's clients read another
    one than OpenAI's."""
    lines = b"x-request-id: " + request_id + b"\r\n"
    return lines + b"request-id: " + request_id + b"\r\n" if api is Api.ANTHROPIC else lines


def error_lines(error: ApiError) -> bytes:
    """The header lines that say more of an error, each ending in CRLF."""
    lines = b"x-tidegate-reason: " + error.reason.value.encode() + b"\r\n"
    if error.retry_after_s is not None:
        # Whole seconds, rounded up: a client that comes back early is refused again.
        lines += b"retry-after: %d\r\n" % max(1, -int(-error.retry_after_s // 1))
    if error.status == 415:
        lines += b"accept-encoding: identity\r\n"  # RFC 9110 15.5.16
    if error.status == 405:
        lines += b"allow: " + (error.param or "POST").encode() + b"\r\n"
    return lines


def render(
    error: ApiError,
    *,
    request_id: bytes,
    close: bool,
    extra: bytes = b"",
    api: Api = Api.OPENAI,
) -> bytes:
    """The whole HTTP/1.1 response. ``extra`` is finished header lines, each ending in CRLF."""
    return response(
        error.status,
        error.body(api, request_id),
        request_id=request_id,
        close=close,
        extra=error_lines(error) + extra,
        api=api,
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
    api: Api = Api.OPENAI,
) -> bytes:
    """A complete response with a body known in full. ``head_only`` answers a HEAD request."""
    phrase = HTTPStatus(status).phrase.encode()
    return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b%b\r\n%b" % (
        status,
        phrase,
        content_type,
        len(body),
        id_lines(request_id, api) if request_id else b"",
        extra,
        b"connection: close\r\n" if close else b"",
        b"" if head_only else body,
    )
