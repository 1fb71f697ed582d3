"""HTTP over plain sockets: ranges of bodies into files with as little of the machine as can be, and
bodies into memory.

A connection is a plain socket. Over ``http`` the kernel moves the body from the socket through a
pipe into the file (``splice``) and no byte passes through this process; over ``https`` it is
decrypted into one buffer per connection and written from there. Reads wait for a good part of a
megabyte (``SO_RCVLOWAT``) instead of for every packet: fewer wake-ups, less CPU.

Only what was asked for is ever taken: see ``answers``. Connections are kept and used again.
"""

from __future__ import annotations

import contextlib
import fcntl
import ipaddress
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from modelcache.ports import ANNOUNCE_BYTES, IsCancelled, OnBytes, RangeRead
from modelcache.sources import answers
from modelcache.types import FULL, CacheError, Cancelled, NoSpace, SourceError

SLICE_S = 0.25
"""How long a read waits for more before it takes what there is, and looks whether it is still
wanted."""

CONNECT_S = 10.0
IDLE_S = 20.0
"""Seconds after which an idle connection is not trusted any more."""

_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)


class Stale(Exception):
    """A kept connection turned out to be closed: nothing was answered, so asking again is safe."""


@dataclass(slots=True, kw_only=True, eq=False)
class HttpConnection:
    """One connection to one server. Used by one thread at a time."""

    origin: tuple[str, str, int]
    sock: socket.socket
    timeout_s: float
    slice_s: float = SLICE_S
    used: bool = False
    idle_since_s: float = 0.0
    _pipe: tuple[int, int] | None = None
    _buffer: memoryview | None = None
    _low_bytes: int = 1

    def ask(self, request: bytes, cancelled: IsCancelled) -> tuple[answers.SourceResponse, bytes]:
        """Send ``request``; the answer's head, and what came of its body with it."""
        try:
            self._send(request)
            data = self._read_head(cancelled)
        except (ConnectionError, ssl.SSLEOFError) as error:
            if self.used:
                raise Stale from error
            raise
        end = data.index(b"\r\n\r\n")
        return answers.parse_head(data[:end]), data[end + 4 :]

    def _send(self, request: bytes) -> None:
        self.sock.settimeout(self.timeout_s)
        self.sock.sendall(request)

    def _read_head(self, cancelled: IsCancelled) -> bytes:
        self._wait_for(1)
        data = b""
        while b"\r\n\r\n" not in data:
            if len(data) > answers.MOST_HEAD_BYTES:
                raise SourceError("the server's answer has an endless head")
            more = self._receive_some(cancelled)
            if not more:
                raise ConnectionResetError("closed before an answer")
            if cancelled():  # a head that comes byte by byte never makes a read wait
                raise Cancelled("not wanted any more")
            data += more
            if data.startswith(b"HTTP/1.1 100 ") and b"\r\n\r\n" in data:
                data = data.partition(b"\r\n\r\n")[2]
        return data

    def _receive_some(self, cancelled: IsCancelled) -> bytes:
        """Up to 4 KiB: a head and little more, so that most of the body is left to ``splice``."""
        deadline_s = time.monotonic() + self.timeout_s
        self.sock.settimeout(self.slice_s)
        while True:
            try:
                return self.sock.recv(4_096)
            except TimeoutError:
                self._still_wanted(deadline_s, cancelled)

    def _still_wanted(self, deadline_s: float, cancelled: IsCancelled) -> None:
        if cancelled():
            raise Cancelled("not wanted any more")
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"no byte for {self.timeout_s:.0f} s")

    def receive(self, want: RangeRead, first: bytes) -> None:
        """Write the body into the file: ``first``, then the rest from the socket."""
        if len(first) > want.end - want.start:
            raise SourceError(f"{want.what}: the source sent more than it said", retryable=True)
        if first:
            write_at(want.fd, memoryview(first), want.start)
            want.on_bytes(len(first))
        at = want.start + len(first)
        if isinstance(self.sock, ssl.SSLSocket):
            self._receive_tls(self.sock, want, at)
        else:
            self._receive_plain(want, at)

    def read_error(
        self, head: answers.SourceResponse, first: bytes, cancelled: IsCancelled
    ) -> bytes:
        """The beginning of an error's body, as far as it comes: the status tells enough."""
        data, most = first, min(head.length or 0, answers.MOST_ERROR_BYTES)
        with contextlib.suppress(OSError):
            while len(data) < most:
                more = self._receive_some(cancelled)
                if not more:
                    break
                data += more
        return data[: answers.MOST_ERROR_BYTES]

    def fill(
        self, into: memoryview, first: bytes, on_bytes: OnBytes, cancelled: IsCancelled
    ) -> None:
        """Read a body of exactly so many bytes into memory: ``first``, then the rest from the
        socket."""
        if len(first) > len(into):
            raise SourceError("the server sent more than it said")
        at = len(first)
        into[:at] = first
        on_bytes(at)
        self.sock.settimeout(self.slice_s)
        deadline_s = time.monotonic() + self.timeout_s
        while at < len(into):
            try:
                got = self.sock.recv_into(into[at : at + ANNOUNCE_BYTES])
            except TimeoutError:
                self._still_wanted(deadline_s, cancelled)
                continue
            if got == 0:
                raise ConnectionResetError(f"cut off, {len(into) - at:,} bytes before the end")
            at += got
            on_bytes(got)
            if cancelled():
                raise Cancelled("not wanted any more")
            deadline_s = time.monotonic() + self.timeout_s

    def _receive_plain(self, want: RangeRead, at: int) -> None:
        if self._pipe is None:
            self._pipe = os.pipe()
            with contextlib.suppress(OSError):  # more than an unprivileged user may have: 64 KiB do
                fcntl.fcntl(self._pipe[1], _F_SETPIPE_SZ, ANNOUNCE_BYTES)
        self.sock.settimeout(0.0)
        source, poll = self.sock.fileno(), select.poll()
        poll.register(source, select.POLLIN)
        deadline_s = time.monotonic() + self.timeout_s
        while at < want.end:
            most = min(want.end - at, ANNOUNCE_BYTES)
            self._wait_for(most)
            poll.poll(SLICE_S * 1_000)
            try:
                moved = os.splice(source, self._pipe[1], most)
            except BlockingIOError:
                self._still_wanted(deadline_s, want.cancelled)
                continue
            if moved == 0:
                raise ConnectionResetError(f"cut off, {want.end - at:,} bytes before the end")
            self._drain(want.fd, at, moved)
            at += moved
            want.on_bytes(moved)
            if want.cancelled():
                raise Cancelled("not wanted any more")
            deadline_s = time.monotonic() + self.timeout_s

    def _drain(self, fd: int, at: int, left: int) -> None:
        assert self._pipe is not None
        with writing():
            while left:
                moved = os.splice(self._pipe[0], fd, left, offset_dst=at)
                left -= moved
                at += moved

    def _wait_for(self, most: int) -> None:
        """Be woken when this much is there (or the connection ends), not for every packet."""
        low = 1 if most < 65_536 else most // 2
        if low != self._low_bytes:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low)
            self._low_bytes = low

    def _receive_tls(self, sock: ssl.SSLSocket, want: RangeRead, at: int) -> None:
        if self._buffer is None:
            self._buffer = memoryview(bytearray(ANNOUNCE_BYTES))
        sock.settimeout(SLICE_S)
        deadline_s = time.monotonic() + self.timeout_s
        while at < want.end:
            most, have = min(want.end - at, ANNOUNCE_BYTES), 0
            while have < most:
                try:
                    got = sock.recv_into(self._buffer[have:most])
                except TimeoutError:
                    self._still_wanted(deadline_s, want.cancelled)
                    if have:
                        break
                    continue
                if got == 0:
                    raise ConnectionResetError(f"cut off, {want.end - at:,} bytes before the end")
                have += got
                deadline_s = time.monotonic() + self.timeout_s
            write_at(want.fd, self._buffer[:have], at)
            at += have
            want.on_bytes(have)
            if want.cancelled():
                raise Cancelled("not wanted any more")

    def close(self) -> None:
        """Close it, and its pipe. May be called twice."""
        with contextlib.suppress(OSError):
            self.sock.close()
        if self._pipe is not None:
            for end in self._pipe:
                os.close(end)
            self._pipe = None
        self._buffer = None


@contextlib.contextmanager
def writing() -> Iterator[None]:
    """What fails in here is the disk's doing and not the source's: asking again would not help."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise NoSpace(f"the disk is full: {error.strerror}") from error
        raise CacheError(f"the file cannot be written: {error.strerror}") from error


def write_at(fd: int, data: memoryview, at: int) -> None:
    """Write all of ``data`` at an offset. Raises ``NoSpace`` or ``CacheError``."""
    with writing():
        while data:
            done = os.pwrite(fd, data, at)
            data, at = data[done:], at + done


def is_empty(want: RangeRead) -> bool:
    """Whether there is nothing to read. Raises ``SourceError`` where it is no range of the file,
    ``Cancelled``."""
    if not 0 <= want.start <= want.end <= want.file.size_bytes:
        raise SourceError(
            f"{want.what}: {want.start}-{want.end} is not within {want.file.size_bytes}"
        )
    if want.start < want.end and want.cancelled():
        raise Cancelled("not wanted any more")
    return want.start == want.end


def write_chunks(want: RangeRead, chunks: Iterable[bytes | memoryview]) -> None:
    """Write a body that comes in chunks into the file, and make sure that it is whole."""
    at = want.start
    for chunk in chunks:
        data = memoryview(chunk)
        if at + len(data) > want.end:
            raise SourceError(
                f"{want.what}: the source sent more than was asked for", retryable=True
            )
        for begin in range(0, len(data), ANNOUNCE_BYTES):
            part = data[begin : begin + ANNOUNCE_BYTES]
            write_at(want.fd, part, at)
            at += len(part)
            want.on_bytes(len(part))
        if want.cancelled():
            raise Cancelled("not wanted any more")
    if at != want.end:
        raise SourceError(
            f"{want.what}: cut off, {want.end - at:,} bytes before the end", retryable=True
        )


@dataclass(slots=True, kw_only=True)
class HttpConnections:
    """Kept connections to any number of servers; safe for many threads."""

    timeout_s: float
    most_idle: int
    context: Callable[[], ssl.SSLContext]
    """Makes the TLS context when the first ``https`` server is met."""
    connect_s: float = CONNECT_S
    slice_s: float = SLICE_S
    receive_bytes: int | None = None
    """Size of each socket's receive buffer, where bandwidth is limited: what the kernel takes in
    ahead of the reader is not counted by the reader."""
    _idle: list[HttpConnection] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _context: ssl.SSLContext | None = None
    _closed: bool = False

    def take(self, url: str, *, fresh: bool = False) -> HttpConnection:
        """A connection to the server of ``url``; a kept one unless ``fresh``."""
        origin = origin_of(url)
        if not fresh:
            kept = self._take_idle(origin)
            if kept is not None:
                return kept
        sock = self._connect(origin)
        return HttpConnection(
            origin=origin, sock=sock, timeout_s=self.timeout_s, slice_s=self.slice_s
        )

    def _take_idle(self, origin: tuple[str, str, int]) -> HttpConnection | None:
        now_s, old, found = time.monotonic(), [], None
        with self._lock:
            for at in range(len(self._idle) - 1, -1, -1):
                if now_s - self._idle[at].idle_since_s > IDLE_S:
                    old.append(self._idle.pop(at))
                elif found is None and self._idle[at].origin == origin:
                    found = self._idle.pop(at)
        for connection in old:
            connection.close()
        return found

    def give_back(self, connection: HttpConnection) -> None:
        """Keep a connection whose answer was read to the end."""
        connection.used = True
        connection.idle_since_s = time.monotonic()
        with self._lock:
            if not self._closed and len(self._idle) < self.most_idle:
                self._idle.append(connection)
                return
        connection.close()

    def _connect(self, origin: tuple[str, str, int]) -> socket.socket:
        scheme, host, port = origin
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        error: OSError = OSError("it has no address")
        for family, kind, protocol, _, address in found:
            sock = socket.socket(family, kind, protocol)
            try:
                if self.receive_bytes is not None:  # counts only when set before connecting
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self.receive_bytes)
                sock.settimeout(min(self.connect_s, self.timeout_s))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if scheme == "https":
                    return self._tls().wrap_socket(sock, server_hostname=host)
            except OSError as failed:
                sock.close()
                error = failed
                continue
            return sock
        raise error

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            if self._context is None:
                self._context = self.context()
            return self._context

    def close(self) -> None:
        """Close what is idle; what is in use is closed when it comes back."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()


def origin_of(url: str) -> tuple[str, str, int]:
    """Scheme, host and port of a URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceError("the source's address is neither http nor https")
    host = parts.hostname.encode("idna").decode() if not parts.hostname.isascii() else None
    return parts.scheme, host or parts.hostname, parts.port or (443, 80)[parts.scheme == "http"]


METADATA = ("100.100.100.200", "fd00:ec2::254", "168.63.129.16")
"""Addresses of clouds' services for their machines that are not link-local."""


def find_reach(host: str, port: int, *, resolve: bool = True) -> int:
    """How far from here the nearest address of a host is: 0 a cloud's metadata (link-local), 1 this
    machine, 2 a private network, 3 the internet, or not known."""
    try:
        found = [host] if not resolve else [
            str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        ]  # fmt: skip
    except (OSError, UnicodeError):
        return 3  # to connect will say so
    return min((_reach_of(address) for address in found), default=3)


def _reach_of(text: str) -> int:
    try:
        address = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return 3
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    if address.is_link_local or str(address) in METADATA:
        return 0
    if address.is_loopback or address.is_unspecified:
        return 1
    return 3 if address.is_global else 2


def may_lead(url: str, target: str, *, resolve: bool = True) -> bool:
    """Whether a server at ``url`` may send readers on to ``target``: not to a cloud's metadata, nor
    to where it is not itself, such as this machine. ``resolve``: whether names are looked up here
    (a proxy does it for its own)."""
    _, host, port = origin_of(target)
    reach = find_reach(host, port, resolve=resolve)
    if reach in (0, 3):
        return reach == 3
    _, host, port = origin_of(url)
    return reach >= find_reach(host, port)


def format_request(url: str, headers: Mapping[str, str]) -> bytes:
    """The bytes of a ``GET``."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    lines = [f"GET {target} HTTP/1.1", f"Host: {host}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if " " in target or any(not line.isascii() or not line.isprintable() for line in lines):
        raise SourceError("a request to the source would be malformed")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("ascii")
