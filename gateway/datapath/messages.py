"""The messages between the control process and a worker, over their socket pair."""

from __future__ import annotations

import struct
from typing import Any

import msgspec

from router.types import Fleet

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("!I")


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, tag="config"):
    """A worker's configuration, sent at its start. Each field is documented where the user sets
    it: ``gateway/settings/schema.py`` and ``router/settings.py``."""

    index: int
    max_connections: int
    max_head_bytes: int
    max_headers: int
    max_body_bytes: int
    max_buffered_bytes: int
    peek_bytes: int
    head_timeout_s: float
    body_timeout_s: float
    idle_timeout_s: float
    request_timeout_s: float
    upstream_connect_timeout_s: float
    upstream_idle_timeout_s: float
    upstream_max_idle_connections: int
    upstream_keepalive_s: float
    max_retries: int
    drain_s: float
    tls_certificate: str | None
    tls_key: str | None
    tls_reload_s: float
    cors_allow_origins: tuple[str, ...]
    hold_max_requests: int
    hold_max_bytes: int
    hold_deadline_s: float
    hold_keepalive_s: float
    release_initial: int
    default_bytes_per_token: float
    default_output_tokens: int
    learning_rate: float
    max_inflight_requests: int
    max_inflight_tokens: int | None


class FleetUpdate(msgspec.Struct, frozen=True, tag="fleet"):
    """Control → worker: the fleet as it is from now on, whole."""

    fleet: Fleet


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Control → worker: stop accepting, finish what runs, exit."""


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    """Worker → control: the configuration is in force and connections are taken."""

    pid: int


class WakeSignal(msgspec.Struct, frozen=True, tag="wake_signal"):
    """Worker → control: a request waits for a replica of this pool."""

    pool: str


class FailureReport(msgspec.Struct, frozen=True, tag="failure"):
    """Worker → control: a replica refused or cut a connection; its health should be checked."""

    replica: str


ToWorker = WorkerConfig | FleetUpdate | Drain
ToControl = Listening | WakeSignal | FailureReport

_encode = msgspec.msgpack.Encoder().encode


def pack(message: ToWorker | ToControl) -> bytes:
    """A message with its length before it."""
    payload = _encode(message)
    return _LENGTH.pack(len(payload)) + payload


class Unpacker:
    """Cuts a byte stream into messages of one direction's type."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(kind).decode
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are whole now. Raises ``ValueError`` on one that is too long or
        malformed."""
        self._buffer += data
        messages = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > MAX_MESSAGE_BYTES:
                raise ValueError(f"a message of {size} bytes on the control channel")
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                break
            messages.append(self._decode(bytes(self._buffer[_LENGTH.size : end])))
            del self._buffer[:end]
        return messages
