"""An externally managed simulated engine: started and ended by the test, not by Tidegate."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from tidegate_process import Metrics, read_metrics

_LISTENING = re.compile(r"listening on (http://127\.0\.0\.1:\d+)")
_START_S = 60.0


class SimulatedServer:
    """One engine on a port of its own choice, or on ``port``. Use it in a ``with``."""

    def __init__(self, directory: Path, model: str, *flags: object, port: int = 0) -> None:
        self._log = directory / f"server-{model}-{time.monotonic_ns()}.log"
        self._argv = [sys.executable, "-m", "loaders.engines.simulated", "--model", model]
        self._argv += ["--port", str(port), *map(str, flags)]
        self.url = ""
        self.process: subprocess.Popen[bytes]

    def __enter__(self) -> SimulatedServer:
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                self._argv,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=Path(__file__).resolve().parents[2],
            )
        deadline_s = time.monotonic() + _START_S
        while (found := _LISTENING.search(self._log.read_text())) is None:
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline_s, self._log.read_text()
            time.sleep(0.05)
        self.url = found[1]
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As an out-of-memory killer would."""
        self.process.kill()
        self.process.wait()

    def alive(self) -> bool:
        """Whether its process runs."""
        return self.process.poll() is None

    def metrics(self) -> Metrics:
        """Its own metrics."""
        return read_metrics(self.url + "/metrics")

    def answered(self) -> int:
        """How many requests it has finished."""
        return int(self.metrics().sum("vllm:request_success_total"))

    def set_faults(self, *faults: str) -> Any:
        """Set its faults in place of those before."""
        answer = httpx.post(
            self.url + "/simulated/faults", json={"faults": faults}, trust_env=False, timeout=60
        )
        return answer.raise_for_status().json()
