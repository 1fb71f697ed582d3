"""The websocket of Knative's autoscaler, as far as senders of statistics see it."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import compiled_protos
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed


@dataclass(frozen=True)
class Stat:
    """What was reported of one revision."""

    revision: str
    concurrency: float
    requests: float
    at_s: int


class StatServer:
    """Keeps what it is sent, decoded by the protocol's own file."""

    def __init__(self) -> None:
        self.stats: list[Stat] = []
        self.hosts: list[str] = []
        self.port = 0
        self._connections: set[ServerConnection] = set()
        self._messages, _ = compiled_protos.compiled("knative_stat")
        self._server: Any = None

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Listen, at the same port as before."""
        self._server = await serve(self._take, "127.0.0.1", self.port)
        self.port = next(iter(self._server.sockets)).getsockname()[1]

    async def stop(self) -> None:
        """As the autoscaler does when it restarts: clients are told so."""
        self._server.close(code=1012, reason="Restarting")
        await self._server.wait_closed()

    async def _take(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        self.hosts.append(connection.request.headers["Host"])
        with contextlib.suppress(ConnectionClosed):
            async for message in connection:
                assert isinstance(message, bytes), "the autoscaler drops text"
                for one in self._messages.WireStatMessages.FromString(message).messages:
                    stat = one.stat
                    self.stats.append(
                        Stat(
                            f"{one.namespace}/{one.name}",
                            stat.average_concurrent_requests,
                            stat.request_count,
                            stat.timestamp,
                        )
                    )


@contextlib.contextmanager
def in_thread() -> Iterator[StatServer]:
    """One that listens on 127.0.0.1 in a thread of its own."""
    server, loop = StatServer(), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(server.start(), loop).result(30)
        yield server
        asyncio.run_coroutine_threadsafe(server.stop(), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
