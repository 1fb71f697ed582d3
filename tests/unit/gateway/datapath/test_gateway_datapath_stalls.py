"""A stopwatch on the event loop: no body, however it is made, holds up the other connections.

The time is the processor's, of the loop's own thread: what else the machine does is not counted.
The modules are the plain ones, so compiled workers are several times faster than this.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
from datapath_rig import MemoryTransport, make_worker

from gateway.datapath.client import ClientConnection
from router.types import Fleet, Pool

LIMIT_S = 0.2
"""The longest here take 40 ms on a quiet machine, and twice that where the caches are shared with
others. What grows with the square of a body takes seconds."""
BLOCK_BYTES = 250_000
"""As much as uvloop reads from a connection at a time."""


class Stopwatch:
    """The longest time between two turns of the loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.longest_s = 0.0
        self.running = True
        self._loop = loop
        self._last_s = time.thread_time()
        loop.call_soon(self._look)

    def _look(self) -> None:
        now_s = time.thread_time()
        self.longest_s = max(self.longest_s, now_s - self._last_s)
        self._last_s = now_s
        if self.running:
            self._loop.call_soon(self._look)


async def send_all(bodies: list[bytes], head: bytes) -> float:
    """Send bodies over a connection each, all at once; returns the longest stall in seconds."""
    loop = asyncio.get_running_loop()
    worker = make_worker(loop, max_buffered_bytes=1 << 30, max_body_bytes=1 << 28)
    worker.pools.apply(Fleet(version=1, pools=(Pool(name="m", slot=0),)))
    left: dict[ClientConnection, Iterator[bytes]] = {}
    for body in bodies:
        client = ClientConnection(worker.clients)
        client.connection_made(MemoryTransport())
        client.data_received(head)
        left[client] = (
            body[start : start + BLOCK_BYTES] for start in range(0, len(body), BLOCK_BYTES)
        )
    clients = list(left)
    watch = Stopwatch(loop)
    while left:
        for client, blocks in list(left.items()):
            if client.transport.reading:
                block = next(blocks, None)
                if block is None or client.transport.closed:
                    del left[client]
                else:  # as one callback of the loop each
                    loop.call_soon(client.data_received, block)
        await asyncio.sleep(0)
    for _ in range(10_000):
        await asyncio.sleep(0)
        if all(client.transport.reading for client in clients):
            break
    watch.running = False
    for client in clients:
        client.connection_lost(None)
    worker.check_integrity()
    assert worker.context.buffered_bytes == 0
    return watch.longest_s


def chunked(payload: bytes) -> bytes:
    return b"".join(b"1\r\n%c\r\n" % byte for byte in payload) + b"0\r\n\r\n"


def inputs() -> Iterator[tuple[str, int, bytes]]:
    """What is sent: a name, by how many connections, and the body."""
    start = b'{"x":'
    end = b',"model":"m"}'
    yield "chunks of one byte", 8, chunked(b'{"model":"m","x":"' + b"x" * 80_000 + b'"}')
    yield "many members", 4, b"{" + b'"k":1,' * 200_000 + b'"model":"m"}'
    yield "many odd members", 4, b"{" + b'"\\k":[],' * 30_000 + b'"model":"m"}'
    yield "deep arrays", 4, start + b"[" * 100_000 + b"]" * 100_000 + end
    yield "many strings in an array", 4, start + b"[" + b'"",' * 200_000 + b"1]" + end
    yield "many escapes", 2, start + b'"' + b"\\n" * 500_000 + b'"' + end
    yield "a long number", 2, start + b"1" * 1_000_000 + end
    yield "spaces", 2, b" " * 1_000_000 + start + b"1" + end
    yield "nothing but quotes", 4, b"{" + b'"' * 600_000
    yield "a large body", 1, start + b'"' + b"x" * 30_000_000 + b'"' + end


@pytest.mark.parametrize(
    ("count", "body"), [pytest.param(count, body, id=name) for name, count, body in inputs()]
)
def test_no_body_stalls_the_loop(count: int, body: bytes) -> None:
    framing = b"Content-Length: %d" % len(body)
    if body.endswith(b"\r\n0\r\n\r\n"):
        framing = b"Transfer-Encoding: chunked"
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n%b\r\n\r\n" % framing
    assert asyncio.run(send_all([body] * count, head)) < LIMIT_S
