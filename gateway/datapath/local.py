"""What the gateway answers without an engine: models, health, CORS preflight, wrong paths."""

from __future__ import annotations

from urllib.parse import unquote

import msgspec

from gateway.datapath.context import WorkerContext
from gateway.datapath.pool import PoolDirectory, unknown_model
from gateway.datapath.protocol.errors import ApiError, Reason, api_of, render, response
from gateway.datapath.protocol.http1 import RequestHead
from gateway.datapath.protocol.openai import model_card

_READ = (b"GET", b"HEAD")
_HEALTH = (b"/health", b"/ping")


def answer(
    context: WorkerContext,
    pools: PoolDirectory,
    head: RequestHead,
    *,
    request_id: bytes,
    close: bool,
    extra: bytes,
) -> bytes:
    """The whole response to a request that does not go to an engine."""
    try:
        return _answer(context, pools, head, request_id, close, extra)
    except ApiError as error:
        context.count_rejection(error.reason, error.status)
        whole = render(
            error, request_id=request_id, close=close, extra=extra, api=api_of(head.path)
        )
        return whole[: whole.find(b"\r\n\r\n") + 4] if head.method == b"HEAD" else whole


def _answer(
    context: WorkerContext,
    pools: PoolDirectory,
    head: RequestHead,
    request_id: bytes,
    close: bool,
    extra: bytes,
) -> bytes:
    path, method = head.path, head.method
    is_local = _is_models(path) or path in _HEALTH
    if method == b"OPTIONS" and (path == b"*" or is_local or path in context.proxied):
        allowed = b"GET, HEAD, OPTIONS" if is_local else b"POST, OPTIONS"
        return _options(allowed, request_id, close, extra)
    status, body = read(context, pools, method, path)
    return response(
        status,
        body,
        request_id=request_id,
        close=close,
        extra=extra,
        head_only=method == b"HEAD",
    )


def _is_models(path: bytes) -> bool:
    return path == b"/v1/models" or path.startswith(b"/v1/models/")


def read(
    context: WorkerContext, pools: PoolDirectory, method: bytes, path: bytes
) -> tuple[int, bytes]:
    """Status and JSON of the answer to a request that no engine gets. Raises ``ApiError`` where it
    asks for nothing that there is."""
    is_models = _is_models(path)
    if path in context.proxied:
        raise ApiError(
            405,
            Reason.METHOD_NOT_ALLOWED,
            f"{path.decode('latin-1')} takes POST, not {method.decode('latin-1')}.",
            param="POST, OPTIONS",
        )
    if not is_models and path not in _HEALTH:
        raise ApiError(
            404,
            Reason.PATH_UNKNOWN,
            f"There is no {path.decode('latin-1')} here. The OpenAI API starts at /v1; metrics "
            "and administration are on the admin listener.",
        )
    if method not in _READ:
        raise ApiError(
            405,
            Reason.METHOD_NOT_ALLOWED,
            f"{path.decode('latin-1')} takes GET, not {method.decode('latin-1')}.",
            param="GET, HEAD, OPTIONS",
        )
    body = _models(context, pools, path) if is_models else _health(context)
    return 503 if context.draining and not is_models else 200, body


def _health(context: WorkerContext) -> bytes:
    return msgspec.json.encode({"status": "draining" if context.draining else "ok"})


def _models(context: WorkerContext, pools: PoolDirectory, path: bytes) -> bytes:
    cards = {name: model_card(name, pool, context.started_wall_s) for name, pool in pools.models()}
    model = unquote(path[len(b"/v1/models/") :].decode("latin-1"))
    if not model:
        return msgspec.json.encode({"object": "list", "data": list(cards.values())})
    if model not in cards:
        raise unknown_model(model)
    return msgspec.json.encode(cards[model])


def _options(allowed: bytes, request_id: bytes, close: bool, extra: bytes) -> bytes:
    lines = extra + b"allow: " + allowed + b"\r\n"
    if extra.startswith(b"access-control"):  # the origin may: say what it may
        lines += b"access-control-allow-methods: " + allowed + b"\r\n"
        lines += (
            b"access-control-allow-headers: *, authorization\r\naccess-control-max-age: 600\r\n"
        )
    head = b"HTTP/1.1 204 No Content\r\nx-request-id: " + request_id + b"\r\n" + lines
    return head + (b"connection: close\r\n\r\n" if close else b"\r\n")
