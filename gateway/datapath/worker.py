"""A worker process: listens, relays, and knows only what the control process publishes.

Started as ``python -m gateway.datapath LISTEN_FD SHARED_FD CHANNEL_FD`` with the three
descriptors inherited. When the channel closes the control process is gone: the worker drains and
exits, so that nothing is orphaned.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import resource
import socket
import time
import traceback
from array import array
from typing import Any

import uvloop

from gateway.datapath import metrics
from gateway.datapath.client import ClientConnection
from gateway.datapath.messages import (
    Drain,
    Failing,
    FleetUpdate,
    Listening,
    Poke,
    ToControl,
    ToWorker,
    Unpacker,
    WorkerConfig,
    pack,
)
from gateway.datapath.pool import PoolRuntime
from gateway.datapath.protocol.errors import ApiError, Reason
from gateway.datapath.shared import Shared
from gateway.datapath.tls import Certificate
from router.ledger import Ledger
from router.types import Fleet

_TICK_BUSY_S = 0.02
_TICK_IDLE_S = 0.05
_SWEEP_S = 0.5
# The other workers' inflight figures may be this old when a replica is picked.
_LEDGER_AGE_S = 0.001
_BACKLOG = 4096
# At the end of a drain: for answers to those who are refused to leave.
_FLUSH_S = 1.0
_REPEAT_FAILING_S = 0.5


class Worker:
    """The state of one worker process. Everything here runs on its one event loop."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        config: WorkerConfig,
        shared: Shared,
        send: Any,
    ) -> None:
        self.loop = loop
        self.config = config
        self.shared = shared
        self.draining = False
        self.orphaned = False  # the control process is gone: nobody will wake an engine
        self.started_wall_s = int(time.time())
        self._counters_row = shared.worker_counters(config.index)
        self.counters: list[int] = list(self._counters_row)
        self.buffered_bytes = 0
        requests, tokens = shared.replica_rows(config.index)
        others = None
        if shared.workers > 1:
            others = self._read_others
        self._slots = 0
        self._ledger_read_s = 0.0
        self.ledger = Ledger(requests, tokens, others)
        self.random = random.Random().random  # chance here only spreads load
        self.pools: dict[str, PoolRuntime] = {}
        self._names: dict[str, PoolRuntime] = {}
        self._version = -1
        self._send = send
        self._clients: set[ClientConnection] = set()
        self._failing_s: dict[str, float] = {}
        self._id_prefix = os.urandom(8).hex().encode() + b"%02x" % config.index
        self._ids = 0
        self._server: asyncio.Server | None = None
        self._tls: Certificate | None = None
        self._drained = asyncio.Event()
        self._cors = frozenset(origin.encode() for origin in config.cors_allow_origins)

    # The control side

    def apply(self, fleet: Fleet) -> None:
        """A new picture of the fleet. An older one than the last is ignored."""
        if fleet.version <= self._version:
            return
        if self._version < 0:
            self._clear_free_slots(fleet)
        self._version = fleet.version
        old = self.pools
        self.pools = {}
        self._names = {}
        self._slots = 1 + max((r.slot for p in fleet.pools for r in p.replicas), default=-1)
        for pool in fleet.pools:
            runtime = old.get(pool.name)
            if runtime is not None and runtime.pool.slot == pool.slot:
                del old[pool.name]
            else:
                runtime = PoolRuntime(self, pool)
            self.pools[pool.name] = runtime
            if not pool.draining:
                for name in (pool.name, *pool.aliases):
                    self._names[name] = runtime
        for runtime in old.values():
            runtime.close()
        for pool in fleet.pools:
            self.pools[pool.name].apply(pool)
        for runtime in self.pools.values():
            runtime.counters.flush()  # whoever reads the version reads what was counted until now
        self.shared.set_applied(self.config.index, fleet.version)

    def _clear_free_slots(self, fleet: Fleet) -> None:
        """Zero the counters of pools that were removed after the worker before this one ended."""
        taken = {pool.slot for pool in fleet.pools}
        for slot in range(self.shared.max_pools):
            if slot not in taken:
                self.shared.clear_pool(self.config.index, slot)

    def configure(self, config: WorkerConfig) -> None:
        """Take other settings from now on. What a listener or a certificate was opened with stays;
        a connection that is open keeps the limits it began with."""
        self.config = config
        self._cors = frozenset(origin.encode() for origin in config.cors_allow_origins)
        for runtime in self.pools.values():
            runtime.configure()

    def poke(self, pool: str) -> None:
        """Tell the control side that a request waits."""
        self._send(Poke(pool=pool))

    def report_failing(self, replica: str) -> None:
        """Tell the control side that a replica failed a request, at most twice a second each."""
        now = self.loop.time()
        if now - self._failing_s.get(replica, -1e9) >= _REPEAT_FAILING_S:
            if len(self._failing_s) > 4096:
                self._failing_s.clear()
            self._failing_s[replica] = now
            self._send(Failing(replica=replica))

    # What exchanges and connections ask for

    def pool_of(self, model: str) -> PoolRuntime:
        """The pool a model name or alias stands for. Raises ``ApiError`` 404."""
        try:
            return self._names[model]
        except KeyError:
            raise self.unknown_model(model) from None

    def unknown_model(self, model: str) -> ApiError:
        """404 for a name that no pool has; a model at zero is not unknown."""
        return ApiError(
            404,
            Reason.MODEL_UNKNOWN,
            f"The model '{model[:200]}' does not exist here. GET /v1/models lists those that do.",
            param="model",
        )

    def model_names(self) -> list[tuple[str, str | None]]:
        """All names clients may use, with the pool that an alias stands for."""
        return [
            (name, None if name == runtime.pool.name else runtime.pool.name)
            for name, runtime in self._names.items()
        ]

    def next_request_id(self) -> bytes:
        """An id for a request that brought none, unique over workers and restarts."""
        self._ids += 1
        return b"req-%b%08x" % (self._id_prefix, self._ids)

    def refresh_ledger(self) -> None:
        """Bring in the other workers' inflight figures where ours are too old."""
        now = self.loop.time()
        if now - self._ledger_read_s >= _LEDGER_AGE_S:
            self._ledger_read_s = now
            self.ledger.refresh()

    def _read_others(self) -> tuple[list[int], list[int]]:
        return self.shared.other_rows(self.config.index, self._slots)

    def rejected(self, reason: Reason) -> None:
        """Count an answer that the gateway gave itself."""
        self.counters[metrics.REASON_INDEX[reason]] += 1

    def upstream_opened(self, change: int) -> None:
        """Count connections to replicas."""
        self.counters[metrics.UPSTREAM_CONNECTIONS] += change
        if change > 0:
            self.counters[metrics.UPSTREAM_OPENED] += change

    def client_opened(self, client: ClientConnection) -> int:
        """Register a client connection; returns by how many there are too many, or less than 1."""
        self._clients.add(client)
        self.counters[metrics.CONNECTIONS] += 1
        self.counters[metrics.ACCEPTED] += 1
        return len(self._clients) - self.config.max_connections

    def client_closed(self, client: ClientConnection) -> None:
        """Forget it."""
        if client in self._clients:
            self._clients.discard(client)
            self.counters[metrics.CONNECTIONS] -= 1
        if self.draining and not self._clients:
            self._drained.set()

    def cors_lines(self, origin: bytes) -> bytes:
        """The CORS lines for an allowed origin, else none (the browser then refuses)."""
        if not (origin in self._cors or b"*" in self._cors):
            return b""
        return (
            b"access-control-allow-origin: " + origin + b"\r\nvary: origin\r\n"
            b"access-control-expose-headers: x-request-id, x-tidegate-reason, retry-after\r\n"
        )

    # Its own life

    async def listen(self, listener: socket.socket) -> None:
        """Take connections from now on."""
        if self.config.tls_certificate is not None:
            self._tls = Certificate(self.config.tls_certificate, self.config.tls_key)
        self._server = await self.loop.create_server(
            lambda: ClientConnection(self),
            sock=listener,
            ssl=self._tls.context if self._tls else None,
            backlog=_BACKLOG,
            ssl_handshake_timeout=self.config.head_timeout_s if self._tls else None,
        )

    async def reload_tls(self) -> None:
        """Take a new certificate for new connections when its files change."""
        while self._tls is not None:
            await asyncio.sleep(self.config.tls_reload_s)
            self._tls.renew()

    async def tick(self) -> None:
        """Held requests, suspects, and the counters that others read."""
        while True:
            now = self.loop.time()
            if self.shared.workers > 1:
                self.refresh_ledger()
            self.counters[metrics.BUFFERED_BYTES] = self.buffered_bytes
            self._counters_row[:] = array("q", self.counters)
            busy = False
            for pool in self.pools.values():
                pool.tick(now)
                busy = busy or bool(pool.queue)
            await asyncio.sleep(_TICK_BUSY_S if busy else _TICK_IDLE_S)

    async def sweep(self) -> None:
        """Every timeout there is, twice a second: no timer per request."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = self.loop.time()
            for client in list(self._clients):
                client.sweep(now)
            for pool in self.pools.values():
                for target in pool.targets.values():
                    target.upstream.sweep(now)

    async def drain(self) -> None:
        """Stop accepting; finish what runs, for ``drain_s`` at most."""
        if self.draining:
            return
        self.draining = True
        if self._server is not None:
            self._server.close()
        for client in list(self._clients):
            client.drain()
        if self._clients:
            try:
                async with asyncio.timeout(self.config.drain_s):
                    await self._drained.wait()
            except TimeoutError:
                await self._drain_rest()
        self._publish_counters()

    def control_lost(self) -> None:
        """The control process is gone: who is held would wait in vain."""
        self.orphaned = True
        for pool in self.pools.values():
            pool.refuse_held()

    async def _drain_rest(self) -> None:
        """Time is up: tell those who still wait, and end every connection."""
        for client in list(self._clients):
            client.end_now()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await self._drained.wait()
        for client in list(self._clients):
            client.transport.abort()

    def _publish_counters(self) -> None:
        self.counters[metrics.BUFFERED_BYTES] = self.buffered_bytes
        self._counters_row[:] = array("q", self.counters)
        for pool in self.pools.values():
            pool.counters.flush()

    def check_integrity(self) -> None:
        """The books, at rest. Raises ``AssertionError`` where they do not balance."""
        self.ledger.check_integrity()
        for pool in self.pools.values():
            pool.check_integrity()


async def _serve(listen_fd: int, shared_fd: int, channel_fd: int) -> None:
    loop = asyncio.get_running_loop()
    channel = socket.socket(fileno=channel_fd)
    reader, writer = await asyncio.open_connection(sock=channel)
    unpacker = Unpacker(ToWorker)
    shared = Shared.attach(shared_fd)

    def send(message: ToControl) -> None:
        if not writer.is_closing():
            writer.write(pack(message))

    worker: Worker | None = None
    tasks: list[asyncio.Task[None]] = []
    draining: asyncio.Task[None] | None = None
    while draining is None:
        data = await reader.read(65536)
        messages = unpacker.feed(data) if data else [Drain()]
        if not data and worker is not None:
            worker.control_lost()
        for message in messages:
            if isinstance(message, WorkerConfig):
                if worker is None:
                    worker = Worker(loop, message, shared, send)
                else:
                    worker.configure(message)
            elif isinstance(message, FleetUpdate) and worker is not None:
                worker.apply(message.fleet)
                if not tasks:
                    await worker.listen(socket.socket(fileno=listen_fd))
                    jobs = (worker.tick(), worker.sweep(), worker.reload_tls())
                    tasks = [loop.create_task(job) for job in jobs]
                    for task in tasks:
                        task.add_done_callback(_ended)
                    gc.collect()
                    gc.freeze()  # what exists now lives for ever: no collection need look at it
                    send(Listening(pid=os.getpid()))
            elif isinstance(message, Drain) and draining is None:
                draining = loop.create_task(worker.drain() if worker else asyncio.sleep(0))
    # While it drains the fleet may still change: held requests must find the replica they wait for.
    while not draining.done():
        read = loop.create_task(reader.read(65536))
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
                worker.apply(message.fleet)
    await draining
    for task in tasks:
        task.cancel()
    writer.close()


def _ended(task: asyncio.Task[None]) -> None:
    """A worker without its sweeper has no timeouts, one without its tick releases nobody: better
    none at all, as it is started again."""
    error = None if task.cancelled() else task.exception()
    if error is not None:
        traceback.print_exception(error)
        os._exit(1)


def main(arguments: list[str]) -> int:
    """Entry of the worker process."""
    listen_fd, shared_fd, channel_fd = map(int, arguments)
    # A connection is two open files, one on each side; the usual soft limit of 1024 is soon met.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    gc.set_threshold(10_000, 50, 50)
    uvloop.run(_serve(listen_fd, shared_fd, channel_fd))
    return 0
