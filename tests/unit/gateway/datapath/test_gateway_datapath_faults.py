"""An internal error ends one request with an answer, and leaves the counts balanced."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from datapath_rig import DEFAULTS, MemoryTransport, configure, make_worker, post

from gateway.datapath import metrics
from gateway.datapath.client import ClientConnection
from gateway.datapath.protocol.errors import Reason
from gateway.datapath.upstream import UpstreamConnection
from gateway.datapath.worker import HttpWorker
from router.types import Fleet, Pool, Replica, ReplicaState

REQUEST = post({"model": "m"})


class Loop(asyncio.SelectorEventLoop):
    """A loop whose clock fails once when the test says so."""

    broken = False

    def time(self) -> float:
        if self.broken:
            self.broken = False
            raise RuntimeError("a bug")
        return 100.0


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def make(loop: Loop, *replicas: Replica, send: Any = lambda message: None) -> HttpWorker:
    worker = make_worker(loop, send=send)
    worker.pools.apply(Fleet(version=1, pools=(Pool(name="m", slot=0, replicas=replicas),)))
    return worker


def connect(worker: HttpWorker) -> tuple[ClientConnection, MemoryTransport]:
    client, transport = ClientConnection(worker.clients), MemoryTransport()
    client.connection_made(transport)
    return client, transport


def rejected(worker: HttpWorker, reason: Reason) -> int:
    integers = worker.pools.by_name["m"].counters.integers
    return integers[metrics.REASON_INDEX[reason]]


def test_while_a_request_is_read(loop: Loop) -> None:
    def fail(message: Any) -> None:
        raise RuntimeError("a bug")

    worker = make(loop, send=fail)  # of the wake signal, as no replica is there
    client, transport = connect(worker)
    client.data_received(REQUEST)
    assert transport.sent.startswith(b"HTTP/1.1 500 ")
    assert b"x-tidegate-reason: internal" in transport.sent
    assert transport.closed
    assert rejected(worker, Reason.INTERNAL) == 1
    client.connection_lost(None)
    worker.check_integrity()


def test_while_an_answer_is_passed_on(loop: Loop) -> None:
    replica = Replica(id="r", pool="m", slot=0, url="http://127.0.0.1:1", state=ReplicaState.READY)
    worker = make(loop, replica)
    upstream = worker.pools.by_name["m"].endpoints["r"].upstream
    connection = UpstreamConnection(upstream)
    connection.connection_made(MemoryTransport())
    upstream.release(connection)
    client, transport = connect(worker)
    client.data_received(REQUEST)
    loop.broken = True
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf")
    assert connection.transport.closed
    assert transport.closed, "what the client has is not the whole answer"
    assert rejected(worker, Reason.REPLICA_CUT) == 1
    client.connection_lost(None)
    worker.check_integrity()


def test_a_new_limit_of_the_head_applies_to_the_replicas_there_are(loop: Loop) -> None:
    replica = Replica(id="r", pool="m", slot=0, url="http://127.0.0.1:1", state=ReplicaState.READY)
    worker = make(loop, replica)
    upstream = worker.pools.by_name["m"].endpoints["r"].upstream
    for config, is_refused in ((DEFAULTS, False), (configure(max_head_bytes=2000), True)):
        worker.configure(config)
        connection = UpstreamConnection(upstream)
        connection.connection_made(MemoryTransport())
        upstream.release(connection)
        client, _ = connect(worker)
        client.data_received(REQUEST)
        connection.data_received(b"HTTP/1.1 200 OK\r\nx-long: " + b"x" * 4000)
        assert connection.transport.closed == is_refused
        client.connection_lost(None)
    worker.check_integrity()
