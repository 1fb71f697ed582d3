"""The messages between the control process and a worker, over their socket pair."""

from __future__ import annotations

import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import msgspec

from router.types import Fleet

if TYPE_CHECKING:
    from gateway.datapath.settings import GatewaySettings
    from router.settings import RouterSettings
else:
    # A worker gets the values, which the control process has checked, and not pydantic, which
    # would cost it about 10 MB of memory and half of the time of its start.
    GatewaySettings = RouterSettings = SimpleNamespace

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
_LENGTH = struct.Struct("!I")


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True, tag="config"):
    """A worker's configuration: its number, and the sections of the settings that it needs."""

    index: int
    gateway: GatewaySettings
    router: RouterSettings


class FleetUpdate(msgspec.Struct, frozen=True, tag="fleet"):
    """Control → worker: the fleet as it is from now on, whole."""

    fleet: Fleet


class Drain(msgspec.Struct, frozen=True, tag="drain"):
    """Control → worker: stop accepting, finish what runs, exit."""


class Leadership(msgspec.Struct, frozen=True, tag="leadership"):
    """Control → worker: whether this Tidegate leads, of those that share a fleet. One that does not
    is asked for no replica."""

    leads: bool


class Listening(msgspec.Struct, frozen=True, tag="listening"):
    """Worker → control: the configuration is in force and connections are taken."""

    pid: int


class WakeSignal(msgspec.Struct, frozen=True, tag="wake_signal"):
    """Worker → control: a request waits for a replica of this pool."""

    pool: str


class FailureReport(msgspec.Struct, frozen=True, tag="failure"):
    """Worker → control: a replica refused or cut a connection; its health should be checked."""

    replica: str


ToWorker = WorkerConfig | FleetUpdate | Leadership | Drain
ToControl = Listening | WakeSignal | FailureReport


def _dump_section(section: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = section.model_dump(mode="json")
    return dumped


def _load_section(kind: Any, fields: dict[str, Any]) -> Any:
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, dict):
            values[name] = _load_section(kind, value)
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)


_encode = msgspec.msgpack.Encoder(enc_hook=_dump_section).encode


def pack(message: ToWorker | ToControl) -> bytes:
    """A message with its length before it."""
    payload = _encode(message)
    return _LENGTH.pack(len(payload)) + payload


class Unpacker:
    """Cuts a byte stream into messages of one direction's type."""

    def __init__(self, kind: Any) -> None:
        self._decode = msgspec.msgpack.Decoder(kind, dec_hook=_load_section).decode
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
