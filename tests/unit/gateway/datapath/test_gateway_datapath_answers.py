"""A stopwatch on the event loop: no answer of a replica, however it is made, holds up the others.

The time is the processor's, of the loop's own thread: what else the machine does is not counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import msgspec
import pytest
from datapath_rig import STREAM, MemoryTransport, chunks, make_worker, post

from gateway.datapath import metrics
from gateway.datapath.client import ClientConnection
from gateway.datapath.upstream import UpstreamConnection
from router.types import Fleet, Pool, Replica, ReplicaState

LIMIT_S = 0.05
BLOCK_BYTES = 256_000
"""As much as uvloop reads from a connection at a time."""

HELD = post({"model": "m", "stream": True})
NOW = post({"model": "m"})
HTTP10 = NOW.replace(b"HTTP/1.1", b"HTTP/1.0")
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
FAILED = b"HTTP/1.1 500 X\r\ntransfer-encoding: chunked\r\n\r\n"


def ask(request: bytes, answer: list[bytes]) -> tuple[float, bytes]:
    """Answer one request block by block; returns the longest callback in seconds, and what the
    client was sent."""
    loop = asyncio.SelectorEventLoop()
    try:
        worker = make_worker(loop, max_retries=0)
        url = "http://127.0.0.1:1"
        starting = Replica(id="r", pool="m", slot=0, url=url, state=ReplicaState.STARTING)
        ready = msgspec.structs.replace(starting, state=ReplicaState.READY)

        def publish(version: int, replica: Replica) -> None:
            pool = Pool(name="m", slot=0, replicas=(replica,))
            worker.pools.apply(Fleet(version=version, pools=(pool,)))

        publish(1, starting)
        runtime = worker.pools.by_name["m"]
        connection = UpstreamConnection(runtime.endpoints["r"].upstream)
        connection.connection_made(MemoryTransport())
        runtime.endpoints["r"].upstream.release(connection)
        client, transport = ClientConnection(worker.clients), MemoryTransport()
        client.connection_made(transport)
        client.data_received(request)
        if request is HELD:
            assert client.exchange is not None
            client.exchange.comment("waiting", 0.0)
        publish(2, ready)
        assert connection.request is not None
        longest_s = 0.0
        for block in answer:
            for start in range(0, len(block), BLOCK_BYTES):
                if connection.transport.closed:
                    break
                begun_s = time.thread_time()
                connection.data_received(block[start : start + BLOCK_BYTES])
                longest_s = max(longest_s, time.thread_time() - begun_s)
        client.connection_lost(None)
        connection.connection_lost(None)
        worker.check_integrity()
        assert not runtime.counters.integers[metrics.INFLIGHT_REQUESTS]
        return longest_s, transport.sent
    finally:
        loop.close()


def inputs() -> Iterator[tuple[str, bytes, list[bytes]]]:
    """Names of answers, what was asked, and the blocks."""
    ones = b"1\r\nx\r\n" * 200_000
    for asked, request in (("", NOW), (" to a 1.0 client", HTTP10), (" to a held stream", HELD)):
        yield "interim heads without end" + asked, request, [b"HTTP/1.1 100 C\r\n\r\n" * 100_000]
        yield "chunks of one byte" + asked, request, [CHUNKED, ones]
        yield "an error in chunks of one byte" + asked, request, [FAILED, ones]
    yield "interim heads one by one", NOW, [b"HTTP/1.1 103 Early Hints\r\n\r\n"] * 20_000
    yield "interim heads byte by byte", NOW, [bytes([b]) for b in b"HTTP/1.1 100 C\r\n\r\n" * 3_000]
    yield "many interim headers", NOW, [(b"HTTP/1.1 100 C\r\n" + b"a: b\r\n" * 5_000 + b"\r\n") * 9]
    yield "many headers", NOW, [HEAD + b"a: b\r\n" * 100_000]
    yield "many named headers", NOW, [HEAD + b"connection: a\r\na: b\r\n" * 1_400 + b"\r\n"]
    yield "many odd headers", NOW, [HEAD + b"te: \r\nupgrade: x\r\n" * 1_000 + b"\r\n"]
    yield "a header without end", NOW, [HEAD + b"x: " + b"a" * 1_000_000]
    yield "line ends in small chunks", NOW, [CHUNKED, chunks(b"\r\n") * 100_000]
    yield "line ends in small chunks to a 1.0 client", HTTP10, [CHUNKED, chunks(b"\r\n") * 100_000]
    yield "extensions", NOW, [CHUNKED, b"1;a=b\r\nx\r\n" * 100_000]
    yield "padded sizes", NOW, [CHUNKED, b"0001\r\nx\r\n" * 100_000]
    yield "chunks of 64 bytes", NOW, [CHUNKED, chunks(b"x" * 64) * 20_000]
    yield "a size without end", NOW, [CHUNKED, b"1" * 1_000_000]
    yield "trailers", NOW, [CHUNKED, b"0\r\n" + b"a: b\r\n" * 200_000]
    yield (
        "usage everywhere",
        NOW,
        [CHUNKED, chunks(b'{"usage":{"prompt_tokens":1,' * 9_000), b"0\r\n\r\n"],
    )
    yield "an event without end", NOW, [STREAM, *[chunks(b"data: " + b"x" * 200_000)] * 20]
    yield "a stream byte by byte", NOW, [STREAM, *[b"1\r\n", b"x", b"\r\n"] * 20_000]
    yield "an error byte by byte", HELD, [FAILED, *[b"1\r\n", b"x", b"\r\n"] * 20_000]


@pytest.mark.parametrize(
    ("request_", "answer"),
    [pytest.param(request, answer, id=name) for name, request, answer in inputs()],
)
def test_no_answer_stalls_the_loop(request_: bytes, answer: list[bytes]) -> None:
    longest_s, _ = ask(request_, answer)
    assert longest_s < LIMIT_S


def test_interim_heads_without_end_are_refused() -> None:
    _, sent = ask(NOW, [b"HTTP/1.1 100 C\r\n\r\n"] * 10_000)
    assert b"x-tidegate-reason: replica_failed" in sent


def test_some_interim_heads_are_passed_over() -> None:
    end = HEAD + b"content-length: 2\r\n\r\n{}"
    _, sent = ask(NOW, [b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 50 + end[:9], end[9:]])
    assert sent.startswith(HEAD)
    assert sent.endswith(b"\r\n\r\n{}")


@pytest.mark.parametrize("payload", [b"x", b"\r\n", b"y" * 62, b"1\r\nx\r\n"])
def test_crowded_chunks_are_passed_on_exactly(payload: bytes) -> None:
    body = chunks(payload) * 2_000 + chunks(b"z" * 100) + chunks(payload) * 2_000
    _, sent = ask(NOW, [CHUNKED, body, b"0\r\n\r\n"])
    assert sent.endswith(b"\r\n\r\n" + body + b"0\r\n\r\n")
    _, sent = ask(HTTP10, [CHUNKED, body, b"0\r\n\r\n"])
    assert sent.endswith(b"\r\n\r\n" + payload * 2_000 + b"z" * 100 + payload * 2_000)
