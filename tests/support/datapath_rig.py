"""The data path under test: real worker processes, replicas that follow a script, raw clients.

Everything speaks bytes over real sockets, so a test says exactly what is on the wire. The workers
are the real ones (``gateway.compose.workers.Workers``), in processes of their own; only the control
side is played by the test, which publishes the fleet.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import socket
import ssl
import struct
import subprocess
import tempfile
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec

from gateway.compose.listeners import listen
from gateway.compose.workers import Workers
from gateway.datapath import metrics
from gateway.datapath.messages import WorkerConfig
from gateway.datapath.protocol.errors import Reason
from gateway.datapath.settings import GatewaySettings, HoldingSettings
from gateway.datapath.shared import Shared
from gateway.datapath.worker import HttpWorker
from router.settings import RouterSettings
from router.types import Fleet, Pool, Replica, ReplicaState

WAIT_S = 30.0
"""How long something that must come about may take, on a machine that does much else."""

# Every limit here is longer than WAIT_S: what a test waits for never comes about by one of them.
# A test of a limit makes that one short.
DEFAULTS = WorkerConfig(
    index=0,
    gateway=GatewaySettings(
        max_connections=1000,
        head_timeout_s=60.0,
        body_timeout_s=60.0,
        idle_timeout_s=60.0,
        request_timeout_s=100.0,
        upstream_connect_timeout_s=40.0,
        upstream_idle_timeout_s=60.0,
        upstream_keepalive_s=60.0,
        drain_s=10.0,
        tls_reload_s=0.1,
        holding=HoldingSettings(deadline_s=60.0, keepalive_s=0.0),
    ),
    router=RouterSettings(),
)


def configure(**changes: Any) -> WorkerConfig:
    """``DEFAULTS`` with other values of settings, by their names in whichever section."""

    def change(section: Any) -> Any:
        known = {name: changes.pop(name) for name in type(section).model_fields if name in changes}
        return section.model_copy(update=known)

    gateway = change(DEFAULTS.gateway)
    gateway = gateway.model_copy(update={"holding": change(gateway.holding)})
    config = WorkerConfig(index=0, gateway=gateway, router=change(DEFAULTS.router))
    assert not changes, changes
    return config


def eventually(what: Callable[[], Any], *, within_s: float = WAIT_S) -> Any:
    """The first true value of ``what``; an assertion error when it stays false."""
    deadline = time.monotonic() + within_s
    while True:
        value = what()
        if value:
            return value
        assert time.monotonic() < deadline, f"still {value!r} after {within_s} s"
        time.sleep(0.01)


class MemoryTransport:
    """The other side of a connection that is not there: it keeps what is written to it."""

    def __init__(self, address: str = "127.0.0.1") -> None:
        self.sent = b""
        self.closed = False
        self.reading = True
        self._address = address

    def get_extra_info(self, name: str) -> Any:
        return (self._address, 1) if name == "peername" else None

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True

    def can_write_eof(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed


class ClockLoop(asyncio.SelectorEventLoop):
    """A loop whose clock the test sets."""

    now_s = 100.0

    def time(self) -> float:
        return self.now_s


def make_worker(
    loop: asyncio.AbstractEventLoop,
    *,
    send: Callable[[Any], object] = lambda message: None,
    **changes: Any,
) -> HttpWorker:
    """A worker in this process, which is the only one; ``changes`` as of ``configure``."""
    shared = Shared.create(workers=1, max_replicas=8, max_pools=4)
    return HttpWorker(loop, configure(**changes), shared, send, lambda other: None)


# Clients


class Answer:
    """A response as it was on the wire: head lines lower-cased by name, the body decoded."""

    def __init__(self, head: bytes, body: bytes) -> None:
        line, *lines = head.split(b"\r\n")
        self.version, status, _ = (line + b" ").split(b" ", 2)
        self.status = int(status)
        self.lines = [tuple(part.strip() for part in item.split(b":", 1)) for item in lines]
        self.headers = {name.lower().decode(): value.decode() for name, value in self.lines}
        self.body = body

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def reason(self) -> str | None:
        return self.headers.get("x-tidegate-reason")

    def __repr__(self) -> str:
        return f"<{self.status} {self.headers} {self.body[:200]!r}>"


class Raw:
    """A connection that sends and reads bytes, and can read whole HTTP/1.1 messages."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = b""
        sock.settimeout(WAIT_S)

    def __enter__(self) -> Raw:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        """Close with a reset instead of an orderly end."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def more(self) -> bool:
        """Read something; false at the end of the stream, however it came."""
        try:
            data = self.sock.recv(1 << 18)
        except (ConnectionResetError, BrokenPipeError):
            return False
        self.buffer += data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        """Everything up to and including ``mark``."""
        while mark not in self.buffer:
            assert self.more(), f"ended before {mark!r}: {self.buffer[-500:]!r}"
        end = self.buffer.index(mark) + len(mark)
        data, self.buffer = self.buffer[:end], self.buffer[end:]
        return data

    def exactly(self, size: int) -> bytes:
        while len(self.buffer) < size:
            assert self.more(), f"ended after {len(self.buffer)} of {size}"
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def rest(self) -> bytes:
        """Everything until the other side ends the connection."""
        while self.more():
            pass
        data, self.buffer = self.buffer, b""
        return data

    def ended(self) -> bool:
        """Whether the other side ended the connection with nothing more to read."""
        return self.rest() == b""

    def chunked(self) -> bytes:
        body = b""
        while size := int(self.until(b"\r\n").split(b";")[0], 16):
            body += self.exactly(size)
            assert self.exactly(2) == b"\r\n"
        while self.until(b"\r\n") != b"\r\n":
            pass  # a trailer
        return body

    def answer(self, *, head_only: bool = False) -> Answer:
        """The next response, by its own framing."""
        answer = Answer(self.until(b"\r\n\r\n")[:-4], b"")
        while 100 <= answer.status < 200:
            answer = Answer(self.until(b"\r\n\r\n")[:-4], b"")
        if head_only or answer.status in (204, 304):
            return answer
        if answer.headers.get("transfer-encoding") == "chunked":
            answer.body = self.chunked()
        elif "content-length" in answer.headers:
            answer.body = self.exactly(int(answer.headers["content-length"]))
        else:
            answer.body = self.rest()
        return answer


def post(body: bytes | dict[str, Any], *headers: bytes, path: bytes = b"/v1/completions") -> bytes:
    """A whole POST with its length declared."""
    if isinstance(body, dict):
        body = json.dumps(body).encode()
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (
        path,
        lines,
        len(body),
        body,
    )


def get(path: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return b"%b %b HTTP/1.1\r\nHost: x\r\n%b\r\n" % (method, path, lines)


def chunks(*parts: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)


# Replicas


class Asked(Raw):
    """A replica's side of a connection."""

    def __init__(self, sock: socket.socket, replica: ScriptedReplica) -> None:
        super().__init__(sock)
        self.replica = replica

    def head(self) -> Answer | None:
        """The next request's head (``version`` holds its method), or ``None`` at the end."""
        while b"\r\n\r\n" not in self.buffer:
            if not self.more():
                return None
        request = self.until(b"\r\n\r\n")[:-4]
        line, _, lines = request.partition(b"\r\n")
        method, path, version = line.split(b" ")
        head = Answer(b"%b 0 %b\r\n%b" % (method, path, lines), b"")
        head.line = line
        head.raw = request
        assert version == b"HTTP/1.1"
        return head

    def request(self) -> Answer | None:
        """The next whole request, or ``None`` at the end."""
        head = self.head()
        if head is None:
            return None
        try:
            if head.headers.get("transfer-encoding") == "chunked":
                head.body = self.chunked()
            else:
                head.body = self.exactly(int(head.headers["content-length"]))
        except AssertionError:
            self.replica.broken += 1
            return None
        self.replica.requests.append(head)
        return head

    def cancelled(self) -> bool:
        """Wait until the gateway ends the connection; false if it does not in time."""
        try:
            self.rest()
        except TimeoutError:
            return False
        self.replica.cancels += 1
        return True


def answers(body: bytes = b'{"ok":true}', *headers: bytes) -> Callable[[Asked], None]:
    """A script: answer every request of a connection with this body."""
    lines = b"".join(header + b"\r\n" for header in headers)

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            asked.send(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
                b"%bcontent-length: %d\r\n\r\n%b" % (lines, len(body), body)
            )

    return script


def says(*pieces: bytes, pause_s: float = 0.0) -> Callable[[Asked], None]:
    """A script: answer every request with these very bytes, piece by piece."""

    def script(asked: Asked) -> None:
        while asked.request() is not None:
            for piece in pieces:
                asked.send(piece)
                time.sleep(pause_s)

    return script


STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class ScriptedReplica:
    """A server whose every connection is run by a script, in a thread of its own."""

    def __init__(
        self,
        script: Callable[[Asked], None],
        *,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.script = script
        self._tls = tls
        self.requests: list[Answer] = []
        self.connections = 0
        self.cancels = 0
        self.broken = 0  # requests that ended before they were whole
        self.errors: list[AssertionError] = []
        self._open: set[socket.socket] = set()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(256)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        if self._tls is not None:
            return f"https://localhost:{self.port}"
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> ScriptedReplica:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        if self.errors:
            raise self.errors[0]

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._open.add(sock)
            threading.Thread(target=self._run, args=(sock,), daemon=True).start()

    def _run(self, accepted: socket.socket) -> None:
        sock = accepted
        try:
            if self._tls is not None:
                sock = self._tls.wrap_socket(sock, server_side=True)
            self.script(Asked(sock, self))
        except (ConnectionError, TimeoutError, OSError):
            pass  # the gateway went away, as it may
        except AssertionError as error:
            self.errors.append(error)
        finally:
            self._open.discard(accepted)
            sock.close()

    def stop(self) -> None:
        """Refuse connections from now on and end those there are."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)


def free_port() -> int:
    """A port without a listener just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number: int = probe.getsockname()[1]
        return number


# The gateway


def _is_unread(writer: asyncio.StreamWriter) -> bool:
    """Whether a worker has not read yet everything that was written to it."""
    if writer.is_closing():
        return False
    if writer.transport.get_write_buffer_size():
        return True
    left = fcntl.ioctl(writer.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return bool(struct.unpack("i", left)[0])


class _LoggedWorkers(Workers):
    """The real thing, with what the workers write to stderr kept for the test."""

    log_file: Any = None

    def _spawn(self, command: list[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            command, pass_fds=fds, stdin=subprocess.DEVNULL, stderr=self.log_file
        )


def make_certificate(folder: Path, name: str) -> None:
    """A self-signed certificate for localhost: ``cert.pem`` and ``key.pem``, each in one step."""
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"),
            *("-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(folder / "key.new"), "-out", str(folder / "cert.new")),
        ],
        check=True,
        capture_output=True,
    )
    (folder / "key.new").replace(folder / "key.pem")
    (folder / "cert.new").replace(folder / "cert.pem")


class Gateway:
    """Worker processes on a free port, with the test as their control side."""

    def __init__(self, *, workers: int = 1, **changes: Any) -> None:
        self.config = configure(**changes)
        self.shared = Shared.create(workers=workers, max_replicas=512, max_pools=4)
        self.wake_signals: list[str] = []
        self.failures: list[str] = []
        self._count = workers
        self._version = 0
        self._slot = 0
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by stop)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self._call(self._start())

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(90)

    async def _start(self) -> None:
        self.workers = _LoggedWorkers(
            self.config,
            listen("127.0.0.1", 0, field="gateway.port", shared_by=self._count),
            self.shared,
            on_wake_signal=self.wake_signals.append,
            on_failure=self.failures.append,
        )
        self.workers.log_file = self._log
        self.port = self.workers.port
        self.workers.publish(self.fleet())
        self.workers.start()
        await self.workers.wait_listening()

    # The fleet

    def fleet(self, *replicas: Replica, **changes: Any) -> Fleet:
        self._version += 1
        pool = Pool(name="m", slot=0, aliases=("alias",), replicas=replicas)
        pool = msgspec.structs.replace(pool, **changes)
        return Fleet(version=self._version, pools=(pool,))

    def replica(self, url: str, **changes: Any) -> Replica:
        """A ready replica in a ledger slot of its own."""
        slot, self._slot = self._slot, (self._slot + 1) % 512
        replica = Replica(id=f"r{slot}", pool="m", slot=slot, url=url, state=ReplicaState.READY)
        return msgspec.structs.replace(replica, **changes)

    def publish(self, *replicas: Replica | ScriptedReplica, **changes: Any) -> list[Replica]:
        """Make these the pool's replicas; returns them as published, once they are in force."""
        known = [item if isinstance(item, Replica) else self.replica(item.url) for item in replicas]
        self.loop.call_soon_threadsafe(self.workers.publish, self.fleet(*known, **changes))
        # A worker applies what it has read before it reads anything else.
        eventually(lambda: self._call(self._all_read()))
        return known

    async def _all_read(self) -> bool:
        """Whether the workers have read all that they were told."""
        writers = [entry.writer for entry in self.workers.processes]
        return not any(writer is not None and _is_unread(writer) for writer in writers)

    # Clients

    def connect(self, **options: Any) -> Raw:
        sock = socket.socket()
        if "receive_bytes" in options:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options["receive_bytes"])
        sock.settimeout(WAIT_S)
        sock.connect(("127.0.0.1", self.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return Raw(sock)

    def connect_tls(self, context: ssl.SSLContext) -> Raw:
        sock = socket.create_connection(("127.0.0.1", self.port), WAIT_S)
        return Raw(context.wrap_socket(sock, server_hostname="localhost"))

    def ask(self, request: bytes) -> Answer:
        """One request on a connection of its own."""
        with self.connect() as client:
            client.send(request)
            return client.answer()

    # What it says of itself

    def pool_count(self, index: int) -> int:
        return self.shared.pool_total(0, index)

    def worker_count(self, index: int) -> int:
        return sum(self.shared.worker_counters(worker)[index] for worker in range(self._count))

    def rejected(self, reason: Reason) -> int:
        unpooled = self.worker_count(metrics.WORKER_REASON_INDEX[reason])
        return unpooled + self.pool_count(metrics.REASON_INDEX[reason])

    def inflight(self, slot: int) -> tuple[int, int]:
        return self.shared.replica_total(slot)

    def books(self) -> dict[str, int]:
        """Everything that must be zero when nothing runs."""
        slots = range(self.shared.max_replicas)
        ledger = [self.shared.replica_total(slot) for slot in slots]
        return {
            "ledger requests": sum(abs(requests) for requests, _ in ledger),
            "ledger tokens": sum(abs(tokens) for _, tokens in ledger),
            "inflight requests": self.pool_count(metrics.INFLIGHT_REQUESTS),
            "inflight tokens": self.pool_count(metrics.INFLIGHT_TOKENS),
            "queued requests": self.pool_count(metrics.QUEUED_REQUESTS),
            "queued tokens": self.pool_count(metrics.QUEUED_TOKENS),
            "queued bytes": self.pool_count(metrics.QUEUED_BYTES),
            "buffered bytes": self.worker_count(metrics.BUFFERED_BYTES),
        }

    def settle(self) -> None:
        """The books come back to zero, and no replica keeps a connection that none asked for."""
        eventually(lambda: not any(self.books().values()))

    def pids(self) -> list[int]:
        return [int(entry["pid"]) for entry in self.workers.status() if entry["pid"]]

    def rss_bytes(self) -> int:
        """Resident memory of all workers."""
        total = 0
        for pid in self.pids():
            with open(f"/proc/{pid}/statm") as file:
                total += int(file.read().split()[1]) * 4096
        return total

    def log(self) -> str:
        self._log.seek(0)
        return self._log.read().decode()

    # The end

    def drain_soon(self) -> Any:
        """Begin to drain; the returned future ends with the last worker."""
        return asyncio.run_coroutine_threadsafe(self.workers.drain(), self.loop)

    def stop(self) -> None:
        """Drain and end; whatever a worker printed as a crash fails the test."""
        try:
            self._call(self.workers.drain())
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self._thread.join(10)
            self.shared.close()
        log = self.log()
        self._log.close()
        assert "Traceback" not in log, log
        assert "Fatal error" not in log, log


@contextlib.contextmanager
def gateway(*, workers: int = 1, **changes: Any) -> Iterator[Gateway]:
    """A gateway for a ``with`` block; its books must balance at the end of it."""
    running = Gateway(workers=workers, **changes)
    try:
        yield running
        if not running.workers.is_draining():
            running.publish()
            running.settle()
    finally:
        running.stop()
