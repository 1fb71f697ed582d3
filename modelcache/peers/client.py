"""Asks one peer: over a few kept connections, signed, with a limit on every wait."""

from __future__ import annotations

import json
import secrets
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import blake3

from modelcache.peers import wire
from modelcache.ports import IsCancelled, OnBytes
from modelcache.sources.answers import SourceResponse
from modelcache.sources.wire import HttpConnections, Stale
from modelcache.types import CacheError, SourceError

CONNECT_S = 2.0
ANSWER_S = 5.0
"""Seconds until an answer begins, beyond what it was asked to wait."""

SLICE_S = 0.1
"""Seconds within which a call that is not wanted any more ends."""

MOST_IDLE = 16
MOST_REFUSAL_BYTES = 65_536


class PeerUnavailable(CacheError):
    """It could not be asked, or its answer broke off."""


class PeerBusy(CacheError):
    """It has no room for another piece just now."""


class PieceNotFound(CacheError):
    """It does not have that piece (any more)."""


class PeerRefused(CacheError):
    """It understood, and will not; the message says why."""


class PeerSlow(PeerUnavailable):
    """It takes longer than its fellows."""


class PeerIntegrityError(CacheError):
    """Its answer is not what it claims to be."""


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
    _connections: HttpConnections = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._connections = HttpConnections(
            timeout_s=self.answer_s,
            most_idle=MOST_IDLE,
            context=ssl.create_default_context,
            connect_s=CONNECT_S,
            slice_s=SLICE_S,
        )

    def hello(self, cancelled: IsCancelled) -> str:
        """Its name, asked anew. Raises ``PeerUnavailable`` or ``PeerIntegrityError``."""
        answer = self._json("GET", wire.HELLO, b"", "", self.answer_s, cancelled)
        node = answer.get("node")
        if not isinstance(node, str) or not wire.NAME.fullmatch(node):
            raise PeerIntegrityError(f"{self.url}: it says no name")
        self.node = node
        return node

    def states(
        self, keys: Sequence[str], since: int, wait_s: float, cancelled: IsCancelled
    ) -> tuple[int, dict[str, wire.PieceState]]:
        """What it has of these files, as soon as that differs from ``since`` or after ``wait_s``;
        and what to give as ``since`` next time."""
        body = json.dumps({"keys": list(keys), "since": since, "wait_s": wait_s}).encode()
        answer = self._json(
            "POST", wire.STATE, body, self._name(), wait_s + self.answer_s, cancelled
        )
        given = answer.get("files")
        try:
            if not isinstance(given, dict):
                raise wire.BadMessage("no files")
            files = {key: wire.read_state(given[key]) for key in keys if key in given}
            return wire.read_int(answer.get("sequence")), files
        except wire.BadMessage as error:
            raise PeerIntegrityError(f"{self.url}: an answer of another shape: {error}") from error

    def tell(
        self, target: str, body: Mapping[str, Any], timeout_s: float, cancelled: IsCancelled
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
        cancelled: IsCancelled,
        on_bytes: OnBytes,
    ) -> bytes:
        """Fill ``into`` with a piece whose BLAKE3, which is returned, was checked.

        Raises ``PeerUnavailable``, ``PeerBusy``, ``PieceNotFound``, ``PeerSlow``,
        ``PeerIntegrityError`` or ``Cancelled``; then what ``into`` holds is of no use.
        """

        def room(head: SourceResponse) -> memoryview:
            if head.status != 200:
                return self._room(head, MOST_REFUSAL_BYTES)
            if head.length != len(into):
                raise PeerIntegrityError(f"{self.url}: {head.length} bytes instead of {len(into)}")
            return into

        target = f"{wire.PIECE}?key={key}&index={index}"
        status, digest = self._ask(
            "GET", target, b"", self._name(), timeout_s, cancelled, room, on_bytes
        )
        if status != 200:
            raise (PeerBusy if status == 503 else PieceNotFound)(self.url)
        return bytes.fromhex(digest)

    def _room(self, head: SourceResponse, most: int) -> memoryview:
        if head.length is None or head.length > most:
            raise PeerIntegrityError(f"{self.url}: an endless answer")
        return memoryview(bytearray(head.length))

    def _name(self) -> str:
        if self.node is None:
            raise PeerUnavailable(f"{self.url}: it was never reached")
        return self.node

    def _json(
        self, method: str, target: str, body: bytes, to: str, timeout_s: float,
        cancelled: IsCancelled,
    ) -> Mapping[str, Any]:  # fmt: skip
        data = memoryview(b"")

        def room(head: SourceResponse) -> memoryview:
            nonlocal data
            data = self._room(head, wire.MOST_BODY_BYTES)
            return data

        status, _ = self._ask(method, target, body, to, timeout_s, cancelled, room)
        if status == 421:
            self.node = None
            raise PeerUnavailable(f"{self.url}: it has been started anew")
        try:
            answer = wire.read_json(bytes(data))
        except wire.BadMessage as error:
            raise PeerIntegrityError(f"{self.url}: an answer of another shape") from error
        if status == 200:
            return answer
        told = wire.read_text(str(answer.get("error", status)))
        raise (PeerRefused if status == 400 else PeerUnavailable)(f"{self.url}: {told}")

    def _ask(
        self, method: str, target: str, body: bytes, to: str, timeout_s: float,
        cancelled: IsCancelled, room: Callable[[SourceResponse], memoryview],
        on_bytes: OnBytes = lambda size_bytes: None,
    ) -> tuple[int, str]:  # fmt: skip
        """Read an answer into the ``room`` that there is for one with its head; its status and its
        BLAKE3, signed and checked."""
        until_s = time.monotonic() + timeout_s

        def over() -> bool:
            if time.monotonic() > until_s:
                raise TimeoutError("it took too long")
            return cancelled()

        try:
            connection = self._connections.take(self.url)
            try:
                connection.timeout_s = timeout_s
                try:
                    nonce, data = self._prepare(method, target, body, to)
                    head, first = connection.ask(data, over)
                except Stale:
                    connection.close()
                    connection = self._connections.take(self.url, fresh=True)
                    nonce, data = self._prepare(method, target, body, to)
                    head, first = connection.ask(data, over)
                if head.status == 401:
                    raise PeerIntegrityError(
                        f"{self.url}: it does not accept our token, or our clock"
                    )
                digest = self.keyring.check_answer(head, nonce)
                into = room(head)
                # A piece that it refuses has no bytes that count as the piece's.
                counted = on_bytes if head.status == 200 else lambda size_bytes: None
                connection.fill(into, first, counted, over)
                if blake3.blake3(into).hexdigest() != digest:
                    raise PeerIntegrityError(
                        f"{self.url}: an answer that is not what it says it is"
                    )
            except BaseException:
                connection.close()
                raise
        except TimeoutError as error:
            raise PeerSlow(f"{self.url}: no answer within {timeout_s:.1f} s") from error
        except OSError as error:
            raise PeerUnavailable(f"{self.url}: {error or type(error).__name__}") from error
        except (SourceError, wire.BadMessage) as error:
            raise PeerIntegrityError(f"{self.url}: {error}") from error
        if head.persistent:
            self._connections.give_back(connection)
        else:
            connection.close()
        return head.status, digest

    def _prepare(self, method: str, target: str, body: bytes, to: str) -> tuple[str, bytes]:
        """A request's bytes, and the number in it that was never used before."""
        request = wire.PeerRequest(
            method=method, target=target, sender=self.sender, to=to,
            at_ms=int(self.clock() * 1000), nonce=secrets.token_hex(16), body=body,
        )  # fmt: skip
        head = self.keyring.request_headers(request, urlsplit(self.url).netloc)
        return request.nonce, wire.format_head(f"{method} {target} HTTP/1.1", head) + body

    def close(self) -> None:
        """Let go of kept connections."""
        self._connections.close()
