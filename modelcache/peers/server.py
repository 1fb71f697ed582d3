"""Gives this node's pieces to its peers: a small HTTP server, a thread for each connection.

A client without the cluster's secret gets no answer, and little else: its connection has a few
seconds for a signed head, no byte of a body is read before that, and such connections are bounded
apart, the oldest giving way, so that they never keep out a peer. Pieces go from the page cache to
the socket by ``sendfile``. A piece's digest is the one noted when it was checked, not one made from
what is sent: a bit that flipped since is seen by the receiver.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, urlsplit

import blake3

from modelcache.peers import wire as wire
from modelcache.peers.piece_inventory import PieceInventory, check_key

log = logging.getLogger("tidegate.modelcache.peers")

MOST_CONNECTIONS = 256
MOST_SENDING = 32
"""Pieces on their way at once; a further request is answered 503."""

MOST_UNPROVEN = 256
"""Connections that have shown no signature yet; the oldest gives way to the next."""

MOST_UNPROVEN_EACH = 64
"""Of them, from one address."""

MOST_KEYS = 20_000
MOST_WAIT_S = 10.0
IDLE_S = 60.0
HEAD_S = 5.0
"""For a head; also the whole life of a connection that shows no signature."""

LOG_S = 60.0
"""Seconds between two lines in the log about clients that are refused."""

PACE_BYTES_S = 65_536
"""A peer that reads more slowly than this is cut off: it would hold a thread for hours."""

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
           421: "Misdirected Request", 500: "Internal Server Error",
           503: "Service Unavailable"}  # fmt: skip


Verb = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Something else that nodes with the secret may ask: JSON in, JSON out. ``ValueError`` for what is
wrong with it, ``KeyError`` for what there is not."""


@dataclass(slots=True, eq=False)
class _PeerConnection:
    sock: socket.socket
    address: str
    thread: threading.Thread | None = None
    proven: bool = False
    """It has brought a request that is signed as it should be."""


class PeerServer:
    """Listens once :meth:`start` is called; :meth:`close` ends every thread of it."""

    def __init__(
        self,
        inventory: PieceInventory,
        keyring: wire.Keyring,
        *,
        node: str,
        on_heard: Callable[[str], None] | None = None,
        verbs: Mapping[str, Verb] | None = None,
        clock: Callable[[], float] = time.time,
        most_connections: int = MOST_CONNECTIONS,
        most_sending: int = MOST_SENDING,
    ) -> None:
        self.node = node
        self.sent_bytes = 0
        self._inventory = inventory
        self._keyring = keyring
        self._on_heard = on_heard
        self._verbs = dict(verbs or {})
        self._clock = clock
        self._nonces = wire.Nonces()
        self._lock = threading.Lock()
        # Oldest first.
        self._connections: dict[int, _PeerConnection] = {}
        self._refused = 0
        self._told_at_s = -LOG_S
        self._most = most_connections
        self._sending = threading.BoundedSemaphore(most_sending)
        self._listener: socket.socket | None = None
        self._thread: threading.Thread | None = None
        self._closing = False

    def start(self, host: str, port: int) -> int:
        """Listen; the port. Raises ``OSError`` where the address cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, port), family=family, backlog=128)
        self._listener = listener
        self._thread = threading.Thread(target=self._accept, name="peers", daemon=True)
        self._thread.start()
        return int(listener.getsockname()[1])

    def close(self) -> None:
        """Take no more, cut what is under way, and wait for the threads."""
        with self._lock:
            self._closing = True
            listener, self._listener = self._listener, None
            connections = list(self._connections.values())
        self._inventory.wake()
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for connection in connections:
            _cut(connection)
        for thread in (self._thread, *(connection.thread for connection in connections)):
            if thread is not None and thread is not threading.current_thread():
                thread.join(MOST_WAIT_S + 5)

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None:
            try:
                sock, address = listener.accept()
            except OSError:
                if self._closing:
                    return
                time.sleep(0.1)  # out of descriptors: others will be given back
                continue
            connection = _PeerConnection(sock, str(address[0]))
            with self._lock:
                if self._closing or self._is_full(connection.address):
                    sock.close()
                    continue
                thread = connection.thread = threading.Thread(
                    target=self._serve, args=(connection,), name="peer", daemon=True
                )
                self._connections[id(connection)] = connection
            thread.start()

    def _is_full(self, address: str) -> bool:
        """Whether there is no room for one more connection from ``address``. One that has shown no
        signature gives way. Called with the lock held."""
        unproven = [one for one in self._connections.values() if not one.proven]
        if len(self._connections) - len(unproven) >= self._most:
            return True
        from_there = [one for one in unproven if one.address == address]
        if len(from_there) >= MOST_UNPROVEN_EACH:
            self._give_way(from_there[0])
        elif len(unproven) >= MOST_UNPROVEN:
            self._give_way(unproven[0])
        return False

    def _give_way(self, connection: _PeerConnection) -> None:
        self._connections.pop(id(connection), None)
        _cut(connection)

    def _serve(self, connection: _PeerConnection) -> None:
        sock = connection.sock
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._answer_one(connection, sock):
                pass
        except (OSError, wire.BadMessage) as error:
            log.debug("peer connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.pop(id(connection), None)
            sock.close()

    def _answer_one(self, peer: _PeerConnection, connection: socket.socket) -> bool:
        """One request; whether another may follow."""
        read = read_head(connection, idle_s=IDLE_S if peer.proven else HEAD_S)
        if read is None:
            return False
        head, first = read
        request = self._keyring.read_head(head)
        now_ms = int(self._clock() * 1000)
        if request is None or not self._admit(request, now_ms):
            self._note_refused(peer.address)
            send_all(connection, _plain(401), HEAD_S)
            return False
        with self._lock:
            peer.proven = True
        body = read_body(connection, head, first)
        request = None if body is None else wire.with_body(request, head, body)
        if request is None:
            return False
        target = urlsplit(request.target)
        if request.to != self.node and not (request.to == "" and target.path == wire.HELLO):
            return self._say(connection, request, 421, {"node": self.node})
        if self._on_heard is not None:
            self._on_heard(request.sender)
        if target.path == wire.HELLO:
            return self._say(connection, request, 200, {"node": self.node})
        if target.path == wire.STATE:
            return self._state(connection, request)
        if target.path == wire.PIECE:
            return self._piece(connection, request, target.query)
        if target.path in self._verbs:
            return self._do(connection, request, self._verbs[target.path])
        return self._say(connection, request, 404, {"error": "no such thing"})

    def _do(self, connection: socket.socket, request: wire.PeerRequest, verb: Verb) -> bool:
        try:
            answer = verb(wire.read_json(request.body))
        except (ValueError, wire.BadMessage) as error:
            return self._say(connection, request, 400, {"error": str(error)})
        except KeyError:
            return self._say(connection, request, 404, {"error": "there is none of that name"})
        except Exception:
            log.exception("a peer's request failed")
            return self._say(connection, request, 500, {"error": "it failed; the log says how"})
        return self._say(connection, request, 200, answer)

    def _note_refused(self, address: str) -> None:
        """Into the log, once in a while however many come."""
        now_s = time.monotonic()
        with self._lock:
            self._refused += 1
            if now_s - self._told_at_s < LOG_S:
                return
            count, self._refused, self._told_at_s = self._refused, 0, now_s
        log.warning(
            "%d requests for pieces were refused, the last from %s: not signed with this cluster's "
            "secret, or by a clock that differs by more than %.0f s",
            count, address, wire.WINDOW_S,
        )  # fmt: skip

    def _admit(self, request: wire.PeerRequest, now_ms: int) -> bool:
        with self._lock:
            return self._nonces.admit(request.nonce, request.at_ms, now_ms)

    def _state(self, connection: socket.socket, request: wire.PeerRequest) -> bool:
        try:
            asked = wire.read_json(request.body)
            keys, since = asked.get("keys"), wire.read_int(asked.get("since"))
            wait_s = min(wire.read_seconds(asked.get("wait_s")), MOST_WAIT_S)
        except wire.BadMessage:
            return self._say(connection, request, 400, {"error": "not a question about files"})
        if (
            not isinstance(keys, list)
            or len(keys) > MOST_KEYS
            or not all(isinstance(key, str) and check_key(key) for key in keys)
        ):
            return self._say(connection, request, 400, {"error": "not keys of files"})
        sequence = self._inventory.wait(keys, since, wait_s, lambda: self._closing)
        files = {
            key: {"has": f"{s.has:x}", "fetching": f"{s.fetching:x}", "active": s.active}
            for key, s in self._inventory.states(keys).items()
        }
        return self._say(connection, request, 200, {"sequence": sequence, "files": files})

    def _piece(self, connection: socket.socket, request: wire.PeerRequest, query: str) -> bool:
        given = parse_qs(query)
        key, text = given.get("key", [""])[0], given.get("index", [""])[0]
        if not (check_key(key) and text.isascii() and text.isdigit() and len(text) < 8):
            return self._say(connection, request, 400, {"error": "not a piece of a file"})
        if not self._sending.acquire(blocking=False):
            return self._say(connection, request, 503, {"error": "busy"})
        try:
            with self._inventory.piece(key, int(text)) as found:
                if found is None:
                    return self._say(connection, request, 404, {"error": "not here"})
                head = self._head(request, 200, found.size_bytes, found.digest.hex())
                until_s = time.monotonic() + IDLE_S + found.size_bytes / PACE_BYTES_S
                send_all(connection, head, IDLE_S)
                send_file(connection, found.fd, found.start, found.size_bytes, until_s)
                with self._lock:
                    self.sent_bytes += found.size_bytes
        finally:
            self._sending.release()
        return True

    def _say(
        self, connection: socket.socket, request: wire.PeerRequest, status: int, answer: Any
    ) -> bool:
        body = json.dumps(answer).encode()
        head = self._head(request, status, len(body), blake3.blake3(body).hexdigest())
        send_all(connection, head + body, IDLE_S)
        return True

    def _head(self, request: wire.PeerRequest, status: int, length: int, digest: str) -> bytes:
        headers = self._keyring.answer_headers(request.nonce, status, length, digest)
        return wire.format_head(f"HTTP/1.1 {status} {REASONS[status]}", headers)


def _plain(status: int) -> bytes:
    headers = {"content-length": "0", "connection": "close"}
    return wire.format_head(f"HTTP/1.1 {status} {REASONS[status]}", headers)


def _cut(connection: _PeerConnection) -> None:
    """End a connection whose thread waits for it; the thread closes it."""
    with contextlib.suppress(OSError):
        connection.sock.shutdown(socket.SHUT_RDWR)


def read_head(
    connection: socket.socket, *, idle_s: float = IDLE_S
) -> tuple[wire.PeerHead, bytes] | None:
    """The next request's head, and what came of its body with it; ``None`` at the end of the
    connection. ``idle_s``: seconds until it begins. Raises ``BadMessage``, ``OSError``."""
    data = b""
    until_s = time.monotonic() + idle_s
    while b"\r\n\r\n" not in data:
        left_s = until_s - time.monotonic()
        if len(data) > wire.MOST_HEAD_BYTES or left_s <= 0:
            raise wire.BadMessage("a head that does not end")
        connection.settimeout(left_s)
        more = connection.recv(wire.MOST_HEAD_BYTES)
        if not more:
            return None
        if not data:
            until_s = min(until_s, time.monotonic() + HEAD_S)
        data += more
    text, _, first = data.partition(b"\r\n\r\n")
    head = wire.parse_head(text)
    if head.length > wire.MOST_BODY_BYTES:
        raise wire.BadMessage("a body that is too large")
    if len(first) > head.length:
        raise wire.BadMessage("more than one request at once")
    return head, first


def read_body(connection: socket.socket, head: wire.PeerHead, first: bytes) -> bytes | None:
    """The body that a head announces; ``None`` where the connection ends. Raises ``BadMessage``,
    ``OSError``."""
    pieces, missing = [first], head.length - len(first)
    until_s = time.monotonic() + HEAD_S + head.length / PACE_BYTES_S
    while missing > 0:
        left_s = until_s - time.monotonic()
        if left_s <= 0:
            raise wire.BadMessage("a body that does not end")
        connection.settimeout(left_s)
        more = connection.recv(min(missing, 1 << 20))
        if not more:
            return None
        pieces.append(more)
        missing -= len(more)
    return b"".join(pieces)


def send_all(connection: socket.socket, data: bytes, timeout_s: float) -> None:
    """Send it all, or raise ``OSError``."""
    connection.settimeout(timeout_s)
    connection.sendall(data)


def send_file(
    connection: socket.socket, fd: int, start: int, size_bytes: int, until_s: float
) -> None:
    """Send bytes of a file without copying them here. Raises ``OSError`` (``TimeoutError`` once
    it is ``until_s``, by the monotonic clock), or where the file has become shorter."""
    poller = select.poll()
    poller.register(connection, select.POLLOUT)
    at, end = start, start + size_bytes
    while at < end:
        try:
            sent = os.sendfile(connection.fileno(), fd, at, end - at)
        except BlockingIOError:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not poller.poll(min(left_s, IDLE_S) * 1000):
                raise TimeoutError("a peer reads too slowly") from None
            continue
        if sent == 0:
            raise OSError("the file has become shorter")
        at += sent
        if time.monotonic() > until_s:
            raise TimeoutError("a peer reads too slowly")
