"""The server of the admin API: connections, and what is done where there are too many.

uvicorn speaks HTTP, with the parser of httptools. Connections are accepted here, because a client
that opens one has shown no token yet: each has a time limit for its heads and a limit of their
size, and where there is no room for a new one the oldest on which nothing is asked makes it. So
connections that ask nothing cannot keep a probe or a scrape out, however many there are.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Callable, Iterator, Sequence

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from autoscaler.adapters.metrics_api.identity import CERTIFICATE
from gateway.admin.guard import OWNER

log = logging.getLogger("tidegate.admin")

MAX_CONNECTIONS = 256
MAX_CONNECTIONS_PER_ADDRESS = 128
MAX_HEAD_BYTES = 32_768
HEAD_TIMEOUT_S = 10.0
"""Seconds from a connection's begin, or from a head's first byte, to that head's end."""
KEEPALIVE_S = 5
UNREAD_TIMEOUT_MS = 30_000
"""Milliseconds that a client may leave unread what was sent to it."""

_ACCEPTS_PER_TURN = 64
"""Connections taken before other work of the event loop has its turn."""
_ACCEPT_PAUSE_S = 1.0
"""Seconds until it is tried again where no connection could be accepted (no file descriptors)."""
_LOG_EVERY_S = 60.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: the control process decides when to stop."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _AdminConnection(HttpToolsProtocol):
    """One connection of ``address``; ``on_lost`` is called when it is gone."""

    address = ""
    on_lost: Callable[[_AdminConnection], None]
    _head: asyncio.TimerHandle | None = None
    _is_in_head = True
    _head_bytes = 0
    """Of the head that is coming: the parser keeps whatever comes, without a limit."""

    @property
    def asks_nothing(self) -> bool:
        """Whether it is open and no request is being answered on it."""
        return self.transport is not None and (self.cycle is None or self.cycle.response_complete)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        tls = transport.get_extra_info("ssl_object")
        if tls is not None:
            self.app_state = {**self.app_state, CERTIFICATE: tls.getpeercert()}
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        self._head_bytes += len(data)
        super().data_received(data)
        if self._is_in_head and self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response(f"The head has more than {MAX_HEAD_BYTES} bytes.")
        self._watch_head()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        super().on_headers_complete()
        self._is_in_head = False

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._is_in_head, self._head_bytes = True, 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        self.on_lost(self)
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """End a connection on which what came is no HTTP."""
        if self.cycle is None or self.cycle.response_complete:
            super().send_400_response(msg)
            return
        # A request will get an answer: a second would be an error of ours.
        self.cycle.disconnected = True
        self.transport.abort()

    def _watch_head(self) -> None:
        if not self.asks_nothing:
            self._forget_head()
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _forget_head(self) -> None:
        if self._head is not None:
            self._head.cancel()
            self._head = None


class _Acceptor:
    """Takes the connections of one listening socket, ``most_per_address`` of one address."""

    def __init__(
        self,
        listener: socket.socket,
        connect: Callable[[], _AdminConnection],
        most_per_address: int,
        tls: Callable[[], ssl.SSLContext] | None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._connect = connect
        self._most_per_address = most_per_address
        self._tls = tls
        self._connections: dict[_AdminConnection, None] = {}  # the oldest first
        self._opening: set[asyncio.Task[None]] = set()
        self._paused: asyncio.TimerHandle | None = None
        self._closed = 0
        self._said_s = -_LOG_EVERY_S
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Take no more."""
        if self._paused is not None:
            self._paused.cancel()
        self._loop.remove_reader(self._listener)
        self._listener.close()

    def _listen(self) -> None:
        self._paused = None
        self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                taken, peer = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._loop.remove_reader(self._listener)
                self._paused = self._loop.call_later(_ACCEPT_PAUSE_S, self._listen)
                self._warn(f"no connection can be accepted: {error.strerror or error}")
                return
            address = peer[0] if isinstance(peer, tuple) else ""
            if self._make_room(address):
                self._open(taken, address)
            else:
                taken.close()

    def _make_room(self, address: str) -> bool:
        """Close what asks nothing where there are too many; whether there is room then."""
        crowd = [one for one in self._connections if one.address == address]
        if len(crowd) < self._most_per_address:
            crowd = list(self._connections)
            if len(crowd) < MAX_CONNECTIONS:
                return True
        self._closed += 1
        self._warn(
            f"{self._closed} connections were closed: more than {self._most_per_address} of one "
            f"address or {MAX_CONNECTIONS} in all are open"
        )
        idle = next((one for one in crowd if one.asks_nothing), None)
        if idle is None:
            return False
        self._connections.pop(idle, None)
        idle.transport.abort()
        return True

    def _open(self, taken: socket.socket, address: str) -> None:
        connection = self._connect()
        connection.address, connection.on_lost = address, self._forget
        self._connections[connection] = None
        taken.setblocking(False)
        if taken.family != socket.AF_UNIX:
            with contextlib.suppress(OSError):
                taken.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNREAD_TIMEOUT_MS)
        opening = self._loop.create_task(self._begin(taken, connection))
        self._opening.add(opening)
        opening.add_done_callback(self._opening.discard)

    async def _begin(self, taken: socket.socket, connection: _AdminConnection) -> None:
        try:
            await self._loop.connect_accepted_socket(
                lambda: connection,
                taken,
                ssl=None if self._tls is None else self._tls(),
                ssl_handshake_timeout=None if self._tls is None else HEAD_TIMEOUT_S,
            )
        except BaseException as error:
            self._forget(connection)
            taken.close()
            if not isinstance(error, OSError):
                raise

    def _forget(self, connection: _AdminConnection) -> None:
        self._connections.pop(connection, None)

    def _warn(self, text: str) -> None:
        """One line a minute, however many there are."""
        now_s = self._loop.time()
        if now_s - self._said_s >= _LOG_EVERY_S:
            self._said_s = now_s
            log.warning("admin listener: %s", text)


async def serve_admin(
    listeners: Sequence[socket.socket],
    app: ASGIApp,
    stop: asyncio.Event,
    *,
    shutdown_s: int = 3,
    keepalive_s: int = KEEPALIVE_S,
    tls: Callable[[], ssl.SSLContext] | None = None,
) -> None:
    """Serve on listening sockets until ``stop`` is set, then finish what is under way for at most
    ``shutdown_s``. The sockets are closed at the end. Requests over a Unix socket are the
    owner's. ``tls`` gives what each new connection is made with; a request's state has its
    client's certificate then."""
    config = uvicorn.Config(
        app,
        access_log=False,
        log_config=None,
        log_level="error",  # warnings are of what clients do, a line for each
        lifespan="off",
        http="httptools",
        ws="none",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=keepalive_s,
        timeout_graceful_shutdown=shutdown_s,
    )
    server = _Server(config)
    config.load()

    def accept(listener: socket.socket) -> _Acceptor:
        local = listener.family == socket.AF_UNIX
        return _Acceptor(
            listener,
            lambda: _AdminConnection(config, server.server_state, {OWNER: local}),
            MAX_CONNECTIONS if local else MAX_CONNECTIONS_PER_ADDRESS,
            tls,
        )

    serving = asyncio.create_task(server.serve(sockets=[]), name="admin server")
    stopping = asyncio.create_task(stop.wait(), name="admin stop")
    acceptors = [accept(listener) for listener in listeners]
    try:
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stopping.cancel()
        for acceptor in acceptors:
            acceptor.close()
        server.should_exit = True
        try:
            async with asyncio.timeout(shutdown_s + 2):
                await asyncio.shield(serving)
        except TimeoutError:
            serving.cancel()
