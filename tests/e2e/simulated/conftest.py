"""Simulated engines as processes of their own, for the tests of this folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

WAIT_S = 60.0
"""How long something that must come about may take, on a machine that does much else."""

_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")


class EngineProcess:
    """One engine on a port of its own choosing, its log read as it comes."""

    def __init__(self, root: Path, *flags: str) -> None:
        argv = [
            sys.executable,
            "-m",
            "loaders.engines.simulated",
            "--model",
            "demo",
            "--port",
            "0",
            *flags,
        ]
        self.process = subprocess.Popen(
            argv, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        self.lines: list[str] = []
        self._listening = threading.Event()
        self.port: int | None = None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.http = httpx.Client(timeout=WAIT_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := _LISTENING.search(line):
                self.port = int(found[1])
                self._listening.set()
        self._listening.set()

    def wait_until_ready(self) -> EngineProcess:
        """Wait for the port that the log names."""
        assert self._listening.wait(WAIT_S), self.lines
        assert self.port is not None, self.lines
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def get(self, path: str) -> httpx.Response:
        return self.http.get(self.url + path)

    def post(self, path: str, body: Any = None, **more: Any) -> httpx.Response:
        return self.http.post(self.url + path, json=body, **more)

    def chat(self, **fields: Any) -> httpx.Response:
        """A short chat request."""
        messages = [{"role": "user", "content": "How high is the tide?"}]
        body = {"model": "demo", "messages": messages, "max_tokens": 4, **fields}
        return self.post("/v1/chat/completions", body)

    def metric(self, name: str, **labels: str) -> float:
        """One sample of /metrics."""
        wanted = [f'{label}="{value}"' for label, value in labels.items()]
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(name + "{") and all(part in line for part in wanted):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no {name} {labels}")

    def wait_for_metric(self, name: str, value: float, **labels: str) -> None:
        """Wait until a sample has a value."""
        end = time.monotonic() + WAIT_S
        while (seen := self.metric(name, **labels)) != value:
            assert time.monotonic() < end, f"{name} stayed {seen}"
            time.sleep(0.02)

    def wait_for_load(self, value: int) -> None:
        """Wait until so many requests are under way, asking on a connection of its own."""
        end = time.monotonic() + WAIT_S
        with httpx.Client(timeout=WAIT_S) as client:
            while client.get(self.url + "/load").json() != {"server_load": value}:
                assert time.monotonic() < end, f"the load never was {value}"
                time.sleep(0.01)

    def ended(self, timeout_s: float = 60) -> int:
        """Wait for the process to end; its exit status."""
        status = self.process.wait(timeout_s)
        self._reader.join(timeout_s)
        return status

    def close(self) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()


def events_of(response: httpx.Response) -> list[Any]:
    """The data of a stream's events, ``[DONE]`` included as text."""
    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [entry if entry == "[DONE]" else json.loads(entry) for entry in data]


@pytest.fixture
def start(root: Path) -> Iterator[Callable[..., EngineProcess]]:
    """Start engines with flags; they are ended after the test."""
    engines: list[EngineProcess] = []

    def begin(*flags: str, ready: bool = True) -> EngineProcess:
        engines.append(EngineProcess(root, *flags))
        return engines[-1].wait_until_ready() if ready else engines[-1]

    yield begin
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def fast(root: Path) -> Iterator[EngineProcess]:
    """One engine for all tests of a module that leave it as it was: no token takes any time."""
    engine = EngineProcess(root, "--prefill-tokens-per-s", "inf", "--decode-tokens-per-s", "inf")
    yield engine.wait_until_ready()
    engine.close()


@pytest.fixture(scope="session")
def events() -> Callable[[httpx.Response], list[Any]]:
    """What reads the events of a stream."""
    return events_of
