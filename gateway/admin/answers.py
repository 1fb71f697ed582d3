"""What every part of the admin listener answers with, and how it reads what it is sent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Set
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

BODY_TIMEOUT_S = 10.0
"""Seconds a client has to send its few words."""


def error(
    status: int, reason: str, message: str, *, param: str | None = None, **headers: str
) -> JSONResponse:
    """An error as OpenAI shapes it, with its reason in a header for machines."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"error": {"message": message, "type": kind, "param": param, "code": reason}}
    extra = {name.replace("_", "-"): value for name, value in headers.items()}
    return JSONResponse(body, status, {"x-tidegate-reason": reason, **extra})


async def read_object(
    request: Request, known: Set[str] | None, max_body_bytes: int
) -> dict[str, Any] | Response:
    """A small JSON object with only ``known`` in it (``None``: anything; no body is ``{}``), or the
    answer that says what is wrong."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for piece in request.stream():
                data += piece
                if len(data) > max_body_bytes:
                    text = f"The body is larger than {max_body_bytes} bytes."
                    return error(413, "body_too_large", text, connection="close")
    except TimeoutError:
        return error(408, "body_timeout", "The body did not arrive.", connection="close")
    except ClientDisconnect:
        return error(400, "client_closed", "The client went away.", connection="close")
    try:
        body = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError):
        return error(400, "bad_json", "The body is not valid JSON.")
    if not isinstance(body, dict):
        return error(400, "bad_json", "The body must be a JSON object.")
    unknown = sorted(set(body) - known) if known is not None else []
    if unknown:
        return error(400, "unknown_field", f"Unknown field: {unknown[0]}.", param=unknown[0])
    return body
