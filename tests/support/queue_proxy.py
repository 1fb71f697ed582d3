"""Knative's queue-proxy, as far as what it counts: it stands in front of the engine in each pod."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pod_network
from cluster_engines import PORT, simulated_engines
from fake_kubelet import OnPod
from lightkube.resources.core_v1 import Pod

QUEUE_PORT = 8012


@dataclass
class QueueProxies:
    """The paths of the requests that were passed on: those that the KPA would see, and those that
    it would not."""

    counted: list[str] = field(default_factory=list)
    uncounted: list[str] = field(default_factory=list)

    def engines(self) -> OnPod:
        """What runs in each pod: a simulated engine, and one of these."""
        on_pod = simulated_engines()

        @asynccontextmanager
        async def both(pod: Pod) -> AsyncIterator[None]:
            assert pod.status is not None
            host = pod_network.loopback(pod.status.podIP)

            async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await self._pass_on(host, reader, writer)
                writer.close()

            async with on_pod(pod), await asyncio.start_server(take, host, QUEUE_PORT):
                yield

        return both

    async def _pass_on(
        self, host: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One request of a connection, which is closed after it."""
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = re.search(r"(?im)^content-length: *(\d+)", head)
        body = await reader.readexactly(int(length[1]) if length else 0)
        is_probe = re.search(r"(?im)^k-kubelet-probe: *\S", head)
        (self.uncounted if is_probe else self.counted).append(head.split()[1])
        engine, to_engine = await asyncio.open_connection(host, PORT)
        head = re.sub(r"(?im)^connection:.*\r\n", "", head)
        to_engine.write(head[:-2].encode() + b"connection: close\r\n\r\n" + body)
        while piece := await engine.read(65_536):
            writer.write(piece)
            await writer.drain()
        to_engine.close()
