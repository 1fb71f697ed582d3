"""Simulated engines in the pods of a cluster without machines."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pod_network
from fake_kubelet import OnPod
from lightkube.resources.core_v1 import Pod

ROOT = Path(__file__).resolve().parents[2]
PORT = 8000


def simulated_engines(*flags: object, port: int = PORT) -> OnPod:
    """What runs in each pod: one engine, from when its containers start until they end."""

    @asynccontextmanager
    async def on_pod(pod: Pod) -> AsyncIterator[None]:
        host = pod_network.loopback(pod.status.podIP)
        argv = ["--model", "llama", "--host", host, "--port", str(port), *map(str, flags)]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loaders.engines.simulated",
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            cwd=ROOT,
        )
        try:
            yield
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    return on_pod
