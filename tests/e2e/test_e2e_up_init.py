"""As process 1 of a container: orphans are reaped, signals passed on, the exit status kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

MAIN = """
import os, signal, subprocess, sys, time
from unittest.mock import patch
from gateway.cli import main

with patch("os.getpid", return_value=1):  # no right to make a namespace of processes is needed
    parent = os.getppid()
    main.be_init()
subprocess.run([sys.executable, "-c", "import subprocess; subprocess.Popen(['sleep', '0.2'])"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
print(os.getppid(), flush=True)
time.sleep(100)
"""
SUBREAPER = "import ctypes; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)"
"""As the kernel does with process 1: orphans become its children."""


def test_process_1_reaps_orphans_and_passes_signals_on(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", SUBREAPER + MAIN], stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert int(process.stdout.readline()) == process.pid
            (child,) = wait_for_one_child(process.pid)
            assert child != process.pid
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 7
        finally:
            process.kill()


def wait_for_one_child(pid: int) -> list[int]:
    """The children of a process, once there is one only; one that has ended is one too."""
    while True:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
        children = [int(word) for word in text.split()]
        if len(children) == 1 and os.path.exists(f"/proc/{children[0]}"):
            return children
