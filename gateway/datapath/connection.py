"""A client's connection as a transport: when it is read, what every answer says, how it ends."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from gateway.datapath.worker import Worker

_LINGER_S: Final = 5.0
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class Connection(asyncio.Protocol):
    """The half of ``ClientConnection`` that knows no HTTP message. ``deadline_s`` (loop clock) is
    when the sweeper looks at it again."""

    __slots__ = (
        "_closing",
        "_paused",
        "_paused_s",
        "deadline_s",
        "keep_alive",
        "now",
        "origin",
        "transport",
        "worker",
        "writing_paused",
    )

    def __init__(self, worker: Worker, deadline_s: float) -> None:
        self.worker = worker
        self.transport: Any = None
        self.now: Callable[[], float] = worker.loop.time
        self.keep_alive = True
        self.origin: bytes | None = None
        self.writing_paused = False
        self.deadline_s = deadline_s
        self._paused = False
        self._paused_s = 0.0
        self._closing = False

    def pause(self) -> None:
        """Stop reading the client."""
        if not self._paused and not self._closing:
            self._paused = True
            self._paused_s = self.worker.loop.time()
            self.transport.pause_reading()

    def resume(self) -> None:
        """Read the client again."""
        if self._paused and not self._closing:
            self._paused = False
            self.transport.resume_reading()

    def cors_lines(self) -> bytes:
        """CORS header lines for this request, each ending in CRLF; empty where none apply."""
        origin = self.origin
        return b"" if origin is None else self.worker.cors_lines(origin)

    def extra_lines(self) -> bytes:
        """Header lines of ours for a passed answer, each led by CRLF."""
        lines = b"" if self.origin is None else b"\r\n" + self.cors_lines()[:-2]
        if lines == b"\r\n":
            lines = b""
        return lines if self.keep_alive else lines + b"\r\nconnection: close"

    # Ends

    def _close(self) -> None:
        self._closing = True
        self.deadline_s = self.worker.loop.time() + self.worker.config.idle_timeout_s
        self.transport.close()

    def reset(self) -> None:
        """End the connection with a reset: where an orderly end would say that a body is whole."""
        self._closing = True
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()

    def _linger(self) -> None:
        """Close after an early answer. Closing with unread bytes would reset the connection, and
        the client would lose the answer: so say that we are done, and read on for a moment."""
        self._closing = True
        if self._paused:
            self._paused = False
            self.transport.resume_reading()
        self.deadline_s = self.worker.loop.time() + _LINGER_S
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            self.transport.close()
