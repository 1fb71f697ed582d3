"""Starts Tidegate as a user does, `tidegate up` with a configuration file, and reads its status."""

from __future__ import annotations

import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import procs

COMMAND: tuple[str, ...] = (sys.executable, "-m", "gateway.cli.main", "up", "--config")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tidegate:
    """A started gateway."""

    child: procs.Child
    port: int
    admin_port: int
    state_dir: Path

    def admin(self, path: str, body: object = None, *, timeout_s: float = 5.0) -> tuple[int, bytes]:
        """GET on the admin listener, or POST of JSON: status and body."""
        token = (self.state_dir / "admin-token").read_text().strip()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.admin_port}{path}",
            data=None if body is None else json.dumps(body).encode(),
            headers={"authorization": f"Bearer {token}", "content-type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return int(answer.status), answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def status(self) -> dict[str, Any]:
        """What `tidegate status --json` shows."""
        made: dict[str, Any] = json.loads(self.admin("/status")[1])
        return made

    def worker_pids(self) -> tuple[int, ...]:
        """Processes of the data path."""
        return tuple(int(worker["pid"]) for worker in self.status()["workers"] if worker["pid"])

    def pool(self, name: str) -> dict[str, Any]:
        """One pool's status; ``KeyError`` when it is not there."""
        for pool in self.status()["pools"]:
            if pool["name"] == name:
                found: dict[str, Any] = pool
                return found
        raise KeyError(name)


def start(
    pools: str,
    folder: Path,
    *,
    settings: str = "",
    cores: Sequence[int] = (),
    env: Mapping[str, str] | None = None,
    limit_s: float = 40,
) -> Tidegate:
    """Start with these ``[[pools]]``; returns once its admin side says it is ready.

    ``settings`` are further lines of ``[gateway]``, and sections after them. Raises
    :class:`bench.procs.NotReadyError` with the end of the log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, admin_port = procs.free_port(), procs.free_port()
    config, state_dir = folder / "tidegate.toml", folder.resolve() / "state"
    config.write_text(
        f'state_dir = "{state_dir}"\n\n[gateway]\nport = {port}\n'
        f"admin_port = {admin_port}\nworkers = 1\n{settings}\n{pools}"
    )
    child = procs.start(
        "tidegate",
        [*COMMAND, config],
        log=folder / "log",
        cores=cores,
        env={"NO_COLOR": "1", **(env or {})},
    )
    gate = Tidegate(child=child, port=port, admin_port=admin_port, state_dir=state_dir)
    probe = b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    try:
        procs.wait_ready(child, admin_port, probe, limit_s=limit_s)
    except procs.NotReadyError:
        child.stop()
        raise
    return gate


def wait_at_zero(gate: Tidegate, pool: str, *, limit_s: float) -> bool:
    """Wait until the pool has no replica of any kind; False after ``limit_s``."""
    deadline_s = time.monotonic() + limit_s
    while time.monotonic() < deadline_s:
        seen = gate.pool(pool)
        if not seen["ready"] and not seen["starting"] and not seen["draining"]:
            return True
        time.sleep(0.25)
    return False
