"""Asks one peer: over a few kept connections, signed, with a limit on every wait."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import blake3

from modelcache.peers import wire as wire
from modelcache.peers.piece_inventory import PieceState
from modelcache.types import CacheError, Cancelled

CONNECT_S = 2.0
ANSWER_S = 5.0
"""Seconds until an answer begins, beyond what it was asked to wait."""

SLICE_S = 0.1
"""Seconds within which a call that is not wanted any more ends."""

MOST_IDLE = 16


class PeerUnavailable(CacheError):
    """It could not be asked, or its answer broke off."""


class PeerBusy(CacheError):
    """It has no room for another piece just now."""


class PieceNotFound(CacheError):
    """It does not have that piece (any more)."""


class PeerRefused(CacheError):
    """It understood, and will not; the message says why."""


class PeerSlow(CacheError):
    """It takes longer than its fellows."""


class PeerIntegrityError(CacheError):
    """Its answer is not what it claims to be."""


@dataclass(slots=True)
class Call:
    """One question's limits: until when, and whether it is still wanted."""

    until_s: float
    cancelled: Callable[[], bool]
    answer_s: float

    def check(self) -> float:
        """Seconds to wait at most before the next look. Raises when it is over."""
        if self.cancelled():
            raise Cancelled("not wanted any more")
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it took too long")
        return min(left_s, SLICE_S)


@dataclass(slots=True)
class PeerClient:
    """Another node's server, at ``url``. Safe for several threads at once."""

    url: str
    keyring: wire.Keyring = field(repr=False)
    sender: str
    clock: Callable[[], float] = time.time
    answer_s: float = ANSWER_S
    node: str | None = None
    """Its name, once it was asked; a new one whenever it starts anew."""
    _idle: list[socket.socket] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def hello(self, cancelled: Callable[[], bool]) -> str:
        """Its name, asked anew. Raises ``PeerUnavailable`` or ``PeerIntegrityError``."""
        answer = self._json("GET", wire.HELLO, b"", "", self.answer_s, cancelled)
        node = answer.get("node")
        if not isinstance(node, str) or not wire.NAME.fullmatch(node):
            raise PeerIntegrityError(f"{self.url}: it says no name")
        self.node = node
        return node

    def states(
        self, keys: Sequence[str], since: int, wait_s: float, cancelled: Callable[[], bool]
    ) -> tuple[int, dict[str, PieceState]]:
        """What it has of these files, as soon as that differs from ``since`` or after ``wait_s``;
        and what to give as ``since`` next time."""
        body = json.dumps({"keys": list(keys), "since": since, "wait_s": wait_s}).encode()
        answer = self._json(
            "POST", wire.STATE, body, self._name(), wait_s + self.answer_s, cancelled
        )
        try:
            files = {
                str(key): PieceState(
                    has=int(one["has"], 16),
                    fetching=int(one["fetching"], 16),
                    active=one["active"] is True,
                )
                for key, one in answer["files"].items()
            }
            return int(answer["sequence"]), files
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise PeerIntegrityError(f"{self.url}: an answer of another shape") from error

    def tell(
        self, target: str, body: Mapping[str, Any], timeout_s: float, cancelled: Callable[[], bool]
    ) -> Mapping[str, Any]:
        """Ask something else of it. Raises ``PeerRefused``, ``PeerUnavailable`` or
        ``PeerIntegrityError``."""
        data = json.dumps(body).encode()
        return self._json("POST", target, data, self._name(), timeout_s, cancelled)

    def piece(
        self,
        key: str,
        index: int,
        into: memoryview,
        *,
        timeout_s: float,
        cancelled: Callable[[], bool],
        on_bytes: Callable[[int], None],
    ) -> bytes:
        """Fill ``into`` with a piece whose BLAKE3, which is returned, was checked.

        Raises ``PeerUnavailable``, ``PeerBusy``, ``PieceNotFound``, ``PeerSlow``,
        ``PeerIntegrityError`` or ``Cancelled``; then what ``into`` holds is of no use.
        """
        call = Call(time.monotonic() + timeout_s, cancelled, self.answer_s)
        target = f"{wire.PIECE}?key={key}&index={index}"
        try:
            with self._asking("GET", target, b"", self._name(), call) as (head, digest, line):
                if head.status != 200:
                    line.skip(head.length)
                    raise PeerBusy(self.url) if head.status == 503 else PieceNotFound(self.url)
                if head.length != len(into):
                    raise PeerIntegrityError(
                        f"{self.url}: {head.length} bytes instead of {len(into)}"
                    )
                line.fill(into, on_bytes)
        except TimeoutError as error:
            raise PeerSlow(f"{self.url}: more than {timeout_s:.1f} s for a piece") from error
        except (OSError, wire.BadMessage) as error:
            raise _failed(self.url, error) from error
        found: bytes = blake3.blake3(into).digest()
        if found.hex() != digest:
            raise PeerIntegrityError(f"{self.url}: piece {index} is not what it says it is")
        return found

    def _name(self) -> str:
        if self.node is None:
            raise PeerUnavailable(f"{self.url}: it was never reached")
        return self.node

    def _json(
        self, method: str, target: str, body: bytes, to: str, timeout_s: float,
        cancelled: Callable[[], bool],
    ) -> Mapping[str, Any]:  # fmt: skip
        call = Call(time.monotonic() + timeout_s, cancelled, self.answer_s)
        try:
            with self._asking(method, target, body, to, call) as (head, digest, line):
                if head.length > wire.MOST_BODY_BYTES:
                    raise PeerIntegrityError(f"{self.url}: an endless answer")
                data = bytearray(head.length)
                line.fill(memoryview(data), lambda n: None)
        except (OSError, wire.BadMessage) as error:
            raise _failed(self.url, error) from error
        if blake3.blake3(data).hexdigest() != digest:
            raise PeerIntegrityError(f"{self.url}: an answer that is not what it says it is")
        if head.status == 421:
            self.node = None
            raise PeerUnavailable(f"{self.url}: it has been started anew")
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise PeerIntegrityError(f"{self.url}: an answer of another shape") from error
        if not isinstance(answer, dict):
            raise PeerIntegrityError(f"{self.url}: an answer of another shape")
        if head.status == 200:
            return answer
        told = str(answer.get("error", head.status))[:500]
        raise (PeerRefused if head.status == 400 else PeerUnavailable)(f"{self.url}: {told}")

    @contextlib.contextmanager
    def _asking(self, method: str, target: str, body: bytes, to: str, call: Call) -> Any:
        """The answer's head, the digest its body must have, and the line to read that from. The
        connection is kept for the next question if all of the body was read."""
        connection, kept = self._take(call)
        try:
            nonce, data = self._prepare(method, target, body, to)
            line = Line(connection, call)
            try:
                answer = line.ask(data)
            except (ConnectionError, EOFError):
                if not kept:
                    raise
                # It was closed while it lay idle.
                connection.close()
                connection = self._connect(call)
                line = Line(connection, call)
                nonce, data = self._prepare(method, target, body, to)
                answer = line.ask(data)
            if answer.status == 401:
                raise PeerIntegrityError(f"{self.url}: it does not accept our token, or our clock")
            digest = self.keyring.check_answer(answer, nonce)
            line.left = answer.length
            yield answer, digest, line
        except EOFError as error:
            connection.close()
            raise ConnectionError(str(error)) from error
        except BaseException:
            connection.close()
            raise
        if line.left == 0:
            self._give_back(connection)
        else:
            connection.close()

    def _prepare(self, method: str, target: str, body: bytes, to: str) -> tuple[str, bytes]:
        """A request's bytes, and the number in it that was never used before."""
        request = wire.PeerRequest(
            method=method, target=target, sender=self.sender, to=to,
            at_ms=int(self.clock() * 1000), nonce=secrets.token_hex(16), body=body,
        )  # fmt: skip
        head = self.keyring.request_headers(request, urlsplit(self.url).netloc)
        return request.nonce, wire.format_head(f"{method} {target} HTTP/1.1", head) + body

    def _take(self, call: Call) -> tuple[socket.socket, bool]:
        with self._lock:
            if self._idle:
                return self._idle.pop(), True
        return self._connect(call), False

    def _give_back(self, connection: socket.socket) -> None:
        with self._lock:
            if len(self._idle) < MOST_IDLE:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self, call: Call) -> socket.socket:
        parts = urlsplit(self.url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        call.check()
        connection = socket.create_connection((parts.hostname or "", port), CONNECT_S)
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if parts.scheme == "https":
                context = ssl.create_default_context()
                return context.wrap_socket(connection, server_hostname=parts.hostname)
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        """Let go of kept connections."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


class Line:
    """One connection, read within a call's limits."""

    def __init__(self, connection: socket.socket, call: Call) -> None:
        self.connection = connection
        self.call = call
        self.left = 0
        self._ahead = b""

    def ask(self, data: bytes) -> wire.PeerHead:
        """Send a request and read the head of its answer."""
        self.connection.settimeout(self.call.answer_s)
        self.connection.sendall(data)
        while b"\r\n\r\n" not in self._ahead:
            if len(self._ahead) > wire.MOST_HEAD_BYTES:
                raise wire.BadMessage("a head that does not end")
            more = bytearray(65_536)
            count = self._receive(memoryview(more))
            self._ahead += more[:count]
        text, _, self._ahead = self._ahead.partition(b"\r\n\r\n")
        return wire.parse_head(text)

    def fill(self, into: memoryview, on_bytes: Callable[[int], None]) -> None:
        """Read exactly so many bytes of the body."""
        first = self._ahead[: len(into)]
        self._ahead = self._ahead[len(first) :]
        into[: len(first)] = first
        at = len(first)
        if at:
            on_bytes(at)
        while at < len(into):
            count = self._receive(into[at:])
            at += count
            on_bytes(count)
        self.left -= len(into)

    def skip(self, size_bytes: int) -> None:
        """Read a small body that is not wanted; a large one closes the connection instead."""
        if size_bytes <= 65_536:
            self.fill(memoryview(bytearray(size_bytes)), lambda n: None)

    def _receive(self, into: memoryview) -> int:
        while True:
            self.connection.settimeout(self.call.check())
            try:
                count = self.connection.recv_into(into)
            except TimeoutError:
                continue
            if count == 0:
                raise EOFError("the connection was closed")
            return count


def _failed(url: str, error: Exception) -> CacheError:
    if isinstance(error, wire.BadMessage):
        return PeerIntegrityError(f"{url}: {error}")
    return PeerUnavailable(f"{url}: {error or type(error).__name__}")
