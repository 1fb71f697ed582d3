"""Messages between the control process and those that make forecasts: a length (four bytes, big
endian), and as many bytes of msgpack."""

from __future__ import annotations

import struct
from typing import IO

MOST_BYTES = 64 * 1024 * 1024
LENGTH = struct.Struct(">I")


def write_message(stream: IO[bytes], body: bytes) -> None:
    """Write one message, and flush."""
    stream.write(LENGTH.pack(len(body)) + body)
    stream.flush()


def read_message(stream: IO[bytes]) -> bytes | None:
    """The next message; ``None`` at the end."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    if length > MOST_BYTES:
        return None
    body = stream.read(length)
    return body if len(body) == length else None
