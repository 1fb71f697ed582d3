"""What the control process, the fork server and its engines tell each other.

Messages to and from the fork server are JSON with file descriptors beside it. One is one packet of
a ``SOCK_SEQPACKET`` socket, so there is no framing, and a peer that dies shows as an empty packet.
An engine writes marks to a pipe: what it is at, a short line each. Standard library only: both
Pythons import this.
"""

from __future__ import annotations

import array
import json
import os
import socket
import time
from collections.abc import Sequence
from typing import Any

IMPORTING, LOADING, WARMING, SERVING = "importing", "loading", "warming", "serving"
PARKED = "parked"
"""What an engine may be at."""

MAX_BYTES = 1 << 20
MAX_FDS = 8
ENGINE = "{engine}"
"""In the command of a guard: the pid of its engine."""


class Closed(Exception):
    """The other side has gone."""


def send(channel: socket.socket, message: dict[str, Any], fds: Sequence[int] = ()) -> None:
    """Send one message, with copies of ``fds``. Raises ``OSError`` when it is too large for the
    socket or the other side has gone."""
    data = json.dumps(message, ensure_ascii=False).encode(errors="surrogateescape")
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    channel.sendmsg([data], rights)


def receive(channel: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """The next message and the file descriptors that came with it, which are now ours.

    Raises ``Closed`` at the end, ``ValueError`` for what is no message, ``BlockingIOError`` when
    there is none yet on a socket that does not wait.
    """
    space = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
    data, rights, flags, _ = channel.recvmsg(MAX_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, content in rights:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    try:
        if not data:
            raise Closed("the other side has gone")
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise ValueError("a message was cut short")
        message = json.loads(data.decode(errors="surrogateescape"))
        if not isinstance(message, dict):
            raise ValueError("a message must be a JSON object")
    except (Closed, ValueError):
        for fd in fds:
            os.close(fd)
        raise
    return message, list(fds)


class Marks:
    """Writes what the engine is at to a pipe, with the monotonic time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __call__(self, at: str) -> None:
        """Tell. A reader that has gone, or does not read, does not block the writer."""
        try:
            os.write(self._fd, f"{time.monotonic():.4f} {os.getpid()} {at}\n".encode())
        except OSError:
            self._fd = -1


def read_marks(data: bytes) -> list[tuple[float, int, str]]:
    """Whole lines of marks as (monotonic seconds, pid, what); what is not one is left out."""
    found = []
    for line in data.decode(errors="replace").splitlines():
        parts = line.split(" ", 2)
        try:
            found.append((float(parts[0]), int(parts[1]), parts[2]))
        except (ValueError, IndexError):
            continue
    return found
