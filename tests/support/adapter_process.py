"""A ``tidegate adapter`` as a child process."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tidegate_process import MARK, marked

START_S = 60.0
STOP_S = 60.0
BANNER = re.compile(r"metrics +(\S+) |keda +(\S+) ")


@dataclass
class Adapter:
    """One running adapter: where it serves the metrics APIs (``http…://host:port``) and KEDA
    (``host:port``); empty where it does not."""

    process: subprocess.Popen[bytes]
    log_path: Path
    url: str = ""
    keda: str = ""

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            status = self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it did not end in {STOP_S} s\n{self.log()}") from None
        assert status == 0, self.log()


@contextmanager
def adapter(
    config: Path, *arguments: str, environ: Mapping[str, str] | None = None
) -> Iterator[Adapter]:
    """One with these settings, on ports of its own, while the context is open; then it must end in
    good order, and have written no traceback."""
    mark = secrets.token_hex(8)
    log_path = config.parent / f"adapter-{mark}.log"
    command = [sys.executable, "-m", "gateway.cli.main", "adapter", "--config", str(config)]
    command += ["--port", "0", "--keda-port", "0", *arguments]
    with log_path.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, MARK: mark, **(environ or {})},
        )
    running = Adapter(process, log_path)
    try:
        deadline_s = time.monotonic() + START_S
        while "Ctrl-C stops it" not in running.log():
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"no adapter\n{running.log()}")
            time.sleep(0.05)
        for url, keda in BANNER.findall(running.log()):
            running.url, running.keda = url or running.url, keda or running.keda
        yield running
        running.stop()
        assert "Traceback" not in running.log(), running.log()
        assert " ERROR " not in running.log(), running.log()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(30)
        assert marked(mark) == {}
