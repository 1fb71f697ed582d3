"""Runs the admin application: uvicorn inside the control process, which owns the signals."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

KEEPALIVE_S = 5
MAX_CONNECTIONS = 256
MAX_HEAD_BYTES = 32_768


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
