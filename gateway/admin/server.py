"""Runs the admin application: uvicorn inside the control process, which owns the signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from gateway.settings.errors import not_listening
from gateway.settings.load import ConfigError

KEEPALIVE_S = 5
MAX_CONNECTIONS = 256
MAX_HEAD_BYTES = 32_768
BACKLOG = 128


def listen(host: str, port: int, *, field: str = "gateway.admin_port") -> socket.socket:
    """A bound, listening TCP socket; port 0 is the system's choice.

    ``ConfigError``, naming ``field``, where the address cannot be had: in use, not of this machine,
    not permitted.
    """
    listener: socket.socket | None = None
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, proto)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host.strip("[]") == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
        return listener
    except OSError as problem:
        if listener is not None:
            listener.close()
        raise ConfigError([not_listening(field, host, port, problem)]) from problem


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the control process decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def serve_admin(
    listener: socket.socket, app: ASGIApp, stop: asyncio.Event, *, shutdown_s: int = 3
) -> None:
    """Serve on a listening socket until ``stop`` is set, then finish what is under way for at most
    ``shutdown_s``. The socket is closed at the end."""
    server = _Server(
        uvicorn.Config(
            app,
            access_log=False,
            log_config=None,
            log_level="warning",
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEPALIVE_S,
            timeout_graceful_shutdown=shutdown_s,
            limit_concurrency=MAX_CONNECTIONS,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
    )
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="admin server")
    stopping = asyncio.create_task(stop.wait(), name="admin stop")
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        server.should_exit = True
        try:
            async with asyncio.timeout(shutdown_s + 2):
                await asyncio.shield(serving)
        except TimeoutError:
            serving.cancel()
        finally:
            listener.close()


def url(listener: socket.socket, scheme: str = "http") -> str:
    """Where a listening socket is reached from this machine."""
    host, port = listener.getsockname()[:2]
    return make_url(host, port, scheme)


def make_url(host: str, port: int, scheme: str = "http") -> str:
    """Where a listener is reached from this machine; every-interface addresses become loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host).strip("[]")
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
