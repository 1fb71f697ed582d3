"""An internal error ends one request with an answer, and leaves the counts balanced."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from datapath_rig import DEFAULTS

from gateway.datapath import exchange as exchange_module
from gateway.datapath import metrics
from gateway.datapath import upstream as upstream_module
from gateway.datapath.client import ClientConnection
from gateway.datapath.protocol.errors import Reason
from gateway.datapath.shared import Shared
from gateway.datapath.upstream import UpstreamConnection
from gateway.datapath.worker import Worker
from router.types import Fleet, Pool, Replica, ReplicaState

BODY = b'{"model":"m"}'
REQUEST = (
    b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
)


class Wire:
    """A transport that remembers."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False

    def write(self, data: bytes) -> None:
        self.sent += data

    def close(self) -> None:
        self.closed = True

    abort = close

    def is_closing(self) -> bool:
        return self.closed


@pytest.fixture
def worker() -> Iterator[Worker]:
    loop = asyncio.new_event_loop()
    shared = Shared.create(workers=1, max_replicas=4, max_pools=1)
    made = Worker(loop, DEFAULTS, shared, lambda message: None)
    replica = Replica(id="r", pool="m", slot=0, url="http://127.0.0.1:1", state=ReplicaState.READY)
    made.pools.apply(Fleet(version=1, pools=(Pool(name="m", slot=0, replicas=(replica,)),)))
    yield made
    loop.close()
    shared.close()


def connect(worker: Worker) -> tuple[ClientConnection, Wire]:
    client, wire = ClientConnection(worker.clients), Wire()
    client.connection_made(wire)
    return client, wire


def fail(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("a bug")


def test_while_a_request_is_read(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange_module, "read_head", fail)
    client, wire = connect(worker)
    client.data_received(REQUEST)
    assert wire.sent.startswith(b"HTTP/1.1 500 ")
    assert b"x-tidegate-reason: internal" in wire.sent
    assert wire.closed
    assert worker.context.counters[metrics.REASON_INDEX[Reason.INTERNAL]] == 1
    worker.check_integrity()


def test_while_an_answer_is_read(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    upstream = worker.pools.pools["m"].endpoints["r"].upstream
    connection = UpstreamConnection(upstream)
    connection.connection_made(Wire())
    upstream.release(connection)
    client, _ = connect(worker)
    client.data_received(REQUEST)
    monkeypatch.setattr(upstream_module, "parse_response_head", fail)
    connection.data_received(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
    assert connection.transport.closed
    assert client.exchange is not None, "no byte was sent yet: it is tried again"
    client.connection_lost(None)
    worker.check_integrity()
