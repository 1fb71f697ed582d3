"""Process backends with the tiny engine, for tests that start real processes."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_engine

from autoscaler.backends.base import Backend, MakeCommand, Probe, ReplicaSpec
from autoscaler.backends.process.backend import ProcessBackend
from autoscaler.settings import AutoscalerSettings, PoolSettings
from loaders.engines.base import EngineCommand, Placement

SETTINGS = AutoscalerSettings(terminate_s=5.0, health_timeout_s=5.0, call_timeout_s=20.0)


def tiny_command(spec: ReplicaSpec, placement: Placement) -> EngineCommand:
    """The command of the tiny engine, with the pool's own arguments."""
    script = tiny_engine.__file__
    argv = (sys.executable, script, "--port", str(placement.port), *spec.pool.engine_args)
    return EngineCommand(argv=argv, env={"TINY": "yes"})


def after_the_loop(loop: asyncio.AbstractEventLoop, make: MakeCommand) -> MakeCommand:
    """Makes the same commands, each once the event loop has done something meanwhile."""

    def command(spec: ReplicaSpec, placement: Placement) -> EngineCommand:
        turned = threading.Event()
        loop.call_soon_threadsafe(turned.set)
        if not turned.wait(5.0):
            raise ValueError("the event loop waits for the command")
        return make(spec, placement)

    return command


def tiny_pool(*engine_args: str, **fields: Any) -> PoolSettings:
    """A pool of tiny engines."""
    return PoolSettings.model_validate(
        {
            "name": "tiny",
            "engine": "simulated",
            "model": "tiny",
            "engine_args": engine_args,
            **fields,
        }
    )


def tiny_backend(state_dir: Path, **fields: Any) -> ProcessBackend:
    """A process backend that runs tiny engines."""
    options: dict[str, Any] = {"settings": SETTINGS, "command": tiny_command, **fields}
    return ProcessBackend(state_dir=state_dir, **options)


def record_of(state_dir: Path, replica_id: str) -> Path:
    """The file that has a replica's processes on record."""
    for path in (state_dir / "replicas").glob("*.json"):
        if json.loads(path.read_text())["replica_id"] == replica_id:
            return path
    raise FileNotFoundError(f"there is no record of {replica_id} in {state_dir}")


async def wait_for_probe(
    backend: Backend, replica_id: str, wanted: Callable[[Probe], bool]
) -> Probe:
    """Look until what is seen is wanted; the test's own time limit bounds it."""
    for _ in range(1_200):
        probe = await backend.probe(replica_id)
        if wanted(probe):
            return probe
        await asyncio.sleep(0.05)
    raise AssertionError(f"{replica_id} never came to that: {probe}")


async def wait_ready(backend: Backend, replica_id: str) -> Probe:
    """Look until a replica is ready."""
    return await wait_for_probe(backend, replica_id, lambda probe: probe.ready is True)


def ask(url: str) -> dict[str, Any]:
    """GET of JSON."""
    with urllib.request.urlopen(url, timeout=20) as answer:
        answered: dict[str, Any] = json.loads(answer.read())
        return answered


def is_alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in {"Z", "X"}


def children_of(pid: int) -> list[int]:
    """The children of a process."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = Path(f"/proc/{entry}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(stat.rsplit(")", 1)[1].split()[1]) == pid:
                found.append(int(entry))
    return found
