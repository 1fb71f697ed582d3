"""Gives this node's pieces to its peers: a small HTTP server, a thread for each connection.

A client without the cluster's secret gets no answer. Pieces go from the page cache to the socket
by ``sendfile``. A piece's digest is the one noted when it was checked, not one made from what is
sent: a bit that flipped since is seen by the receiver.
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
from typing import Any
from urllib.parse import parse_qs, urlsplit

import blake3

from modelcache.peers import wire as wire
from modelcache.peers.piece_inventory import PieceInventory, check_key

log = logging.getLogger("tidegate.modelcache.peers")

MOST_CONNECTIONS = 256
MOST_SENDING = 32
"""Pieces on their way at once; a further request is answered 503."""

MOST_KEYS = 20_000
MOST_WAIT_S = 10.0
IDLE_S = 60.0
HEAD_S = 10.0
PACE_BYTES_S = 65_536
"""A peer that reads more slowly than this is cut off: it would hold a thread for hours."""

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found",
           421: "Misdirected Request", 503: "Service Unavailable"}  # fmt: skip


Verb = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Something else that nodes with the secret may ask: JSON in, JSON out. ``ValueError`` for what is
wrong with it, ``KeyError`` for what there is not."""


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
        self._connections: dict[socket.socket, threading.Thread] = {}
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
            connections = dict(self._connections)
        self._inventory.wake()
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in (self._thread, *connections.values()):
            if thread is not None and thread is not threading.current_thread():
                thread.join(MOST_WAIT_S + 5)

    def _accept(self) -> None:
        listener = self._listener
        while listener is not None:
            try:
                connection, _ = listener.accept()
            except OSError:
                if self._closing:
                    return
                time.sleep(0.1)  # out of descriptors: others will be given back
                continue
            with self._lock:
                if self._closing or len(self._connections) >= self._most:
                    connection.close()
                    continue
                thread = threading.Thread(
                    target=self._serve, args=(connection,), name="peer", daemon=True
                )
                self._connections[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while self._answer_one(connection):
                pass
        except (OSError, wire.BadMessage) as error:
            log.debug("peer connection ended: %s", error)
        finally:
            with self._lock:
                self._connections.pop(connection, None)
            connection.close()

    def _answer_one(self, connection: socket.socket) -> bool:
        """One request; whether another may follow."""
        read = read_request(connection)
        if read is None:
            return False
        head, body = read
        request = self._keyring.read_request(head, body)
        now_ms = int(self._clock() * 1000)
        if request is None or not self._admit(request, now_ms):
            send_all(connection, _plain(401), IDLE_S)
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
            asked = json.loads(request.body)
            if not isinstance(asked, dict):
                raise ValueError("send a JSON object")
            answer = verb(asked)
        except (ValueError, RecursionError) as error:
            return self._say(connection, request, 400, {"error": str(error)})
        except KeyError:
            return self._say(connection, request, 404, {"error": "there is none of that name"})
        return self._say(connection, request, 200, answer)

    def _admit(self, request: wire.PeerRequest, now_ms: int) -> bool:
        with self._lock:
            return self._nonces.admit(request.nonce, request.at_ms, now_ms)

    def _state(self, connection: socket.socket, request: wire.PeerRequest) -> bool:
        try:
            asked = json.loads(request.body)
            keys, since = list(asked["keys"]), int(asked["since"])
            wait_s = min(max(float(asked["wait_s"]), 0.0), MOST_WAIT_S)
        except (ValueError, KeyError, TypeError, RecursionError):
            return self._say(connection, request, 400, {"error": "not a question about files"})
        if len(keys) > MOST_KEYS or not all(isinstance(k, str) and check_key(k) for k in keys):
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


def read_request(connection: socket.socket) -> tuple[wire.PeerHead, bytes] | None:
    """The next request's head and body; ``None`` at the end of the connection."""
    data = b""
    connection.settimeout(IDLE_S)
    until_s = time.monotonic() + IDLE_S
    while b"\r\n\r\n" not in data:
        if len(data) > wire.MOST_HEAD_BYTES or time.monotonic() > until_s:
            raise wire.BadMessage("a head that does not end")
        more = connection.recv(65_536)
        if not more:
            return None
        if not data:
            until_s = time.monotonic() + HEAD_S
            connection.settimeout(HEAD_S)
        data += more
    text, _, body = data.partition(b"\r\n\r\n")
    head = wire.parse_head(text)
    if head.length > wire.MOST_BODY_BYTES:
        raise wire.BadMessage("a body that is too large")
    pieces = [body]
    missing = head.length - len(body)
    while missing > 0:
        if time.monotonic() > until_s:
            raise wire.BadMessage("a body that does not end")
        more = connection.recv(min(missing, 1 << 20))
        if not more:
            return None
        pieces.append(more)
        missing -= len(more)
    if missing < 0:
        raise wire.BadMessage("more than one request at once")
    return head, b"".join(pieces)


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
