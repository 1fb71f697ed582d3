"""A worker process: listens, relays, and knows only what the control process publishes.

Started as ``python -m gateway.datapath LISTEN_FD SHARED_FD CHANNEL_FD NUDGE_FD...`` with the
descriptors inherited; the last are an eventfd for each worker, by which the others wake it. When
the channel closes the control process is gone: the worker drains and exits, so that nothing is
orphaned.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import resource
import socket
import ssl
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from gateway.datapath import metrics
from gateway.datapath.client import ClientConnection, ClientConnections
from gateway.datapath.context import WorkerContext
from gateway.datapath.messages import (
    Drain,
    FleetUpdate,
    Leadership,
    Listening,
    ToControl,
    ToWorker,
    Unpacker,
    WorkerConfig,
    pack,
)
from gateway.datapath.pool import PoolDirectory
from gateway.datapath.shared import Shared

_TICK_BUSY_S = 0.02
_TICK_IDLE_S = 0.05
_SWEEP_S = 0.5
_BACKLOG = 4096


class Certificate:
    """A certificate chain and its key, in the context that new connections are made with.

    Raises ``OSError`` or ``ssl.SSLError`` where they cannot be loaded at the start.
    """

    def __init__(self, certificate: Path | str, key: Path | str | None) -> None:
        self._certificate = certificate
        self._key = key
        self._stamp = self._read_stamp()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self.context.load_cert_chain(certificate, key)
        self.not_after_s = read_not_after_s(Path(certificate).read_text())

    def _read_stamp(self) -> tuple[float, ...]:
        paths = (self._certificate, self._key)
        return tuple(os.stat(path).st_mtime for path in paths if path is not None)

    def renew(self) -> None:
        """Load the files if they changed. What does not load (half written, a key that does not
        match yet) is left alone until it does, and the pair in force stays."""
        try:
            stamp = self._read_stamp()
            if stamp == self._stamp:
                return
            # Tried elsewhere first: a pair that does not match (one file is replaced before the
            # other) would leave the context in use without a key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._certificate, self._key)
            self.context.load_cert_chain(self._certificate, self._key)
            self._stamp = stamp
            self.not_after_s = read_not_after_s(Path(self._certificate).read_text())
        except (OSError, ssl.SSLError) as error:
            print(f"tidegate: the TLS certificate was not reloaded: {error}", file=sys.stderr)  # noqa: T201


def read_not_after_s(pem: str) -> int:
    """The Unix time at which the first certificate of a PEM text expires (RFC 5280, 4.1.2.5); 0
    where it cannot be read. Only for a text that OpenSSL has taken."""
    start = pem.find(ssl.PEM_HEADER)
    end = pem.find(ssl.PEM_FOOTER, start) + len(ssl.PEM_FOOTER)
    try:
        der = ssl.PEM_cert_to_DER_cert(pem[start:end])
        at = _der_value(der, 0)[1]  # Certificate
        at = _der_value(der, at)[1]  # TBSCertificate
        if der[at] == 0xA0:  # its version, where it is not 1
            at = _der_value(der, at)[2]
        for _ in range(3):  # serial number, algorithm, issuer
            at = _der_value(der, at)[2]
        at = _der_value(der, at)[1]  # Validity
        tag, start, end = _der_value(der, _der_value(der, at)[2])
        text = der[start:end].decode("ascii")
        if tag == 0x17:  # UTCTime, with two digits of the year
            text = ("20" if text < "50" else "19") + text
        return int(datetime.strptime(text, "%Y%m%d%H%M%S%z").timestamp())
    except (ValueError, IndexError):
        return 0


def _der_value(der: bytes, at: int) -> tuple[int, int, int]:
    """Of the value at this place in DER: its tag, where its content starts and where it ends."""
    length, start = der[at + 1], at + 2
    if length & 0x80:
        size = length & 0x7F
        length, start = int.from_bytes(der[start : start + size], "big"), start + size
    return der[at], start, start + length


class Worker(ABC):
    """One worker process put together: its pools, and the tasks that keep their time. How requests
    come is its subclass's. Everything here runs on its one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: WorkerConfig,
        shared: Shared,
        send: Any,
        nudge: Callable[[int], None],
    ) -> None:
        """``send`` takes messages for the control process; ``nudge`` wakes another worker, where
        there are others."""
        # Chance here only spreads load: it needs no seed that can be repeated.
        self.context = WorkerContext(loop, config, shared, send, nudge, random.Random().random)
        self.pools = PoolDirectory(self.context)
        self.leads = True

    @abstractmethod
    async def listen(self) -> None:
        """Take requests from now on. Raises ``OSError`` where that is not possible."""

    @abstractmethod
    def stop_listening(self) -> None:
        """Take no more requests."""

    @abstractmethod
    async def finish(self, limit_s: float) -> None:
        """Until the requests under way are finished, for so long at most."""

    @abstractmethod
    def sweep_requests(self, now: float) -> None:
        """End what waited too long."""

    @abstractmethod
    async def reload_tls(self) -> None:
        """Take a new certificate for new connections when its files change."""

    def lead(self, leads: bool) -> None:
        """Take it that this Tidegate leads those that share a fleet, or that another does."""
        self.leads = leads

    def configure(self, config: WorkerConfig) -> None:
        """Take other settings from now on. What a listener or a certificate was opened with stays;
        a connection that is open keeps the limits it began with."""
        is_other_router = config.router != self.context.router
        self.context.configure(config)
        self.pools.configure(learn_again=is_other_router)

    async def tick(self) -> None:
        """Held requests, suspects, and the counters that other processes read."""
        context = self.context
        while True:
            now = context.now()
            context.shared.beat(context.index, now)
            if context.ledger.shared:
                context.refresh_ledger()
            context.publish_counters()
            busy = False
            for pool in self.pools.by_name.values():
                pool.tick(now)
                busy = busy or bool(pool.queue)
            await asyncio.sleep(_TICK_BUSY_S if busy else _TICK_IDLE_S)

    async def sweep(self) -> None:
        """Every timeout there is, twice a second: no timer per request."""
        before = self.context.now()
        while True:
            await asyncio.sleep(_SWEEP_S)
            now, earlier = self.context.now(), before
            before = now
            if now - earlier > 2 * _SWEEP_S:
                continue  # this process was stopped: what came meanwhile is to be read first
            self.sweep_requests(now)
            for pool in self.pools.by_name.values():
                for endpoint in pool.endpoints.values():
                    endpoint.upstream.sweep(now)

    async def drain(self) -> None:
        """Stop accepting; finish the requests under way, for ``drain_s`` at most."""
        if self.context.draining:
            return
        self.context.draining = True
        self.stop_listening()
        await self.finish(self.context.gateway.drain_s)
        self.context.publish_counters()
        for pool in self.pools.by_name.values():
            pool.counters.flush()

    def nudged(self) -> None:
        """Another worker has left a place to a request that is held here."""
        self.context.ledger.refresh()
        for pool in self.pools.by_name.values():
            if pool.queue:
                pool.release()

    def control_lost(self) -> None:
        """The control process is gone: refuse the held requests, no engine will be woken."""
        self.context.is_orphaned = True
        for pool in self.pools.by_name.values():
            pool.refuse_held()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` or ``LedgerError`` where counts do not agree, at rest."""
        self.context.ledger.check_integrity()
        for pool in self.pools.by_name.values():
            pool.check_integrity()


class HttpWorker(Worker):
    """A worker that carries requests itself, from its clients' connections to replicas."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: WorkerConfig,
        shared: Shared,
        send: Any,
        nudge: Callable[[int], None],
        listen_fd: int = -1,
    ) -> None:
        """``listen_fd`` is the socket that ``listen`` takes connections from."""
        super().__init__(loop, config, shared, send, nudge)
        self.clients = ClientConnections(self.context, self.pools)
        self._listen_fd = listen_fd
        self._server: asyncio.Server | None = None
        self._tls: Certificate | None = None

    async def listen(self) -> None:
        """See ``Worker``."""
        gateway = self.context.gateway
        if gateway.tls_certificate is not None:
            self._tls = Certificate(gateway.tls_certificate, gateway.tls_key)
            self.context.counters[metrics.TLS_NOT_AFTER] = self._tls.not_after_s
        self._server = await self.context.loop.create_server(
            lambda: ClientConnection(self.clients),
            sock=socket.socket(fileno=self._listen_fd),
            ssl=self._tls.context if self._tls else None,
            backlog=_BACKLOG,
            ssl_handshake_timeout=gateway.head_timeout_s if self._tls else None,
        )

    async def reload_tls(self) -> None:
        """See ``Worker``."""
        while self._tls is not None:
            await asyncio.sleep(self.context.gateway.tls_reload_s)
            self._tls.renew()
            self.context.counters[metrics.TLS_NOT_AFTER] = self._tls.not_after_s

    def sweep_requests(self, now: float) -> None:
        """See ``Worker``."""
        self.clients.sweep(now)

    def stop_listening(self) -> None:
        """See ``Worker``."""
        if self._server is not None:
            self._server.close()

    async def finish(self, limit_s: float) -> None:
        """See ``Worker``."""
        await self.clients.drain(limit_s)


async def _serve(
    make: Callable[..., Worker], shared_fd: int, channel_fd: int, nudge_fds: list[int]
) -> None:
    loop = asyncio.get_running_loop()
    channel = socket.socket(fileno=channel_fd)
    reader, writer = await asyncio.open_connection(sock=channel)
    unpacker = Unpacker(ToWorker)
    shared = Shared.attach(shared_fd)

    def send(message: ToControl) -> None:
        if not writer.is_closing():
            writer.write(pack(message))

    def nudge(other: int) -> None:
        os.eventfd_write(nudge_fds[other], 1)

    worker: Worker | None = None
    tasks: list[asyncio.Task[None]] = []
    draining: asyncio.Task[None] | None = None
    while draining is None:
        data = await _read(reader)
        messages = unpacker.feed(data) if data else [Drain()]
        if not data and worker is not None:
            worker.control_lost()
        for message in messages:
            if isinstance(message, WorkerConfig):
                if worker is None:
                    worker = make(loop, message, shared, send, nudge)
                    _listen_for_nudges(loop, worker, nudge_fds[message.index])
                else:
                    worker.configure(message)
            elif isinstance(message, FleetUpdate) and worker is not None:
                worker.pools.apply(message.fleet)
                if not tasks:
                    await worker.listen()
                    jobs = (worker.tick(), worker.sweep(), worker.reload_tls())
                    tasks = [loop.create_task(job) for job in jobs]
                    for task in tasks:
                        task.add_done_callback(_ended)
                    gc.collect()
                    gc.freeze()  # what exists now lives for ever: no collection needs to visit it
                    send(Listening(pid=os.getpid()))
            elif isinstance(message, Leadership) and worker is not None:
                worker.lead(message.leads)
            elif isinstance(message, Drain) and draining is None:
                draining = loop.create_task(worker.drain() if worker else asyncio.sleep(0))
    # While it drains the fleet may still change: held requests must find the replica they wait for.
    while not draining.done():
        read = loop.create_task(_read(reader))
        await asyncio.wait({draining, read}, return_when=asyncio.FIRST_COMPLETED)
        if not read.done():
            read.cancel()
            break
        data = read.result()
        if not data:
            if worker is not None:
                worker.control_lost()
            break
        for message in unpacker.feed(data):
            if isinstance(message, FleetUpdate) and worker is not None:
                worker.pools.apply(message.fleet)
    await draining
    for task in tasks:
        task.cancel()
    writer.close()


def _listen_for_nudges(loop: asyncio.AbstractEventLoop, worker: Worker, fd: int) -> None:
    def readable() -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        worker.nudged()

    loop.add_reader(fd, readable)


async def _read(reader: asyncio.StreamReader) -> bytes:
    """Some bytes of the channel; none when the control process is gone, with messages of ours
    unread (which resets the connection) or without."""
    try:
        return await reader.read(65536)
    except ConnectionError:
        return b""


def _ended(task: asyncio.Task[None]) -> None:
    """A worker without its sweep has no timeouts, one without its tick releases no held request:
    end it, and the control process starts another."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        traceback.print_exception(error)
        os._exit(1)


def run(make: Callable[..., Worker], arguments: list[int]) -> int:
    """Run a worker process to its end: the worker that ``make`` makes of what a ``Worker`` needs,
    with the descriptors SHARED_FD CHANNEL_FD NUDGE_FD..."""
    shared_fd, channel_fd, *nudge_fds = arguments
    # A connection is two open files, one on each side; the usual soft limit of 1024 is soon met.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.set_threshold(10_000, 50, 50)
    uvloop.run(_serve(make, shared_fd, channel_fd, nudge_fds))
    return 0


def main(arguments: list[str]) -> int:
    """Entry of a worker process that carries requests."""
    listen_fd, *others = map(int, arguments)
    return run(partial(HttpWorker, listen_fd=listen_fd), others)
