"""The NVIDIA GPUs of this machine, as ``nvidia-smi`` lists them."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from autoscaler.policy.device_assignment import GpuCapacity

TOOL_TIMEOUT_S = 20.0
FIELDS = "index,name,memory.total,memory.free,driver_version"


def list_gpus() -> Sequence[GpuCapacity] | None:
    """All of them; empty where there is no driver, ``None`` where it does not answer. Takes up to
    seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None if Path("/proc/driver/nvidia/version").exists() else ()
    argv = [tool, f"--query-gpu={FIELDS}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True
        )
        return parse_gpus(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def parse_gpus(text: str) -> tuple[GpuCapacity, ...]:
    """GPUs from what ``nvidia-smi`` prints for ``FIELDS``; ``ValueError`` for other text."""
    found = []
    for line in filter(str.strip, text.splitlines()):
        index, name, total, free, driver = (part.strip() for part in line.split(","))
        found.append(
            GpuCapacity(
                index=int(index),
                name=name,
                memory_bytes=int(total) << 20,
                free_bytes=int(free) << 20,
                driver=driver,
            )
        )
    return tuple(found)
