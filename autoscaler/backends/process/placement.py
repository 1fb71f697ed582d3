"""What this machine has for the next replica: its GPUs, its cores, its port."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

from autoscaler.backends.base import NoCapacity, ReplicaSpec
from autoscaler.backends.process.replica import ReplicaProcess
from autoscaler.policy.device_assignment import GpuUse, assign_cpus, assign_gpus
from autoscaler.settings import ProcessPoolSettings
from autoscaler.types import GpuCapacity

Answer = TypeVar("Answer")
HOST = "127.0.0.1"
NVIDIA_SMI_TIMEOUT_S = 20.0
NVIDIA_SMI_FIELDS = "index,name,memory.total,memory.free,driver_version"


def list_gpus() -> Sequence[GpuCapacity] | None:
    """The NVIDIA GPUs, as ``nvidia-smi`` lists them; empty where there is no driver, ``None`` where
    it does not answer. Takes up to seconds."""
    if shutil.which("nvidia-smi") is None:
        return None if Path("/proc/driver/nvidia/version").exists() else ()
    return ask_nvidia_smi(f"--query-gpu={NVIDIA_SMI_FIELDS}", parse_gpus)


def ask_nvidia_smi(query: str, parse: Callable[[str], Answer]) -> Answer | None:
    """What is read out of its answer; ``None`` where there is none."""
    argv = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
        return parse(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def parse_gpus(text: str) -> tuple[GpuCapacity, ...]:
    """GPUs from what ``nvidia-smi`` prints for these fields; ``ValueError`` for other text."""
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


def place(
    spec: ReplicaSpec,
    children: Sequence[ReplicaProcess],
    *,
    inventory: Sequence[GpuCapacity] | None,
    cpus: Sequence[int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """GPUs and cores for a replica beside those there are. Raises ``NoCapacity`` without a GPU.

    ``inventory`` is ``None`` where the GPUs are not known.
    """
    wanted = spec.pool.process
    gpus = spec.gpus or assign_gpus(
        count=wanted.gpus_per_replica,
        memory_bytes=wanted.gpu_memory_bytes,
        allowed=wanted.gpus,
        inventory=inventory,
        uses=[
            GpuUse(index=index, memory_bytes=child.spec.pool.process.gpu_memory_bytes)
            for child in children
            for index in child.placement.gpus
        ],
    )
    if gpus is None:
        which = f"of {list(wanted.gpus)} " if wanted.gpus else ""
        known = "" if inventory is not None else " (which GPUs there are is not known)"
        raise NoCapacity(
            f"{wanted.gpus_per_replica} GPU {which}needed, not so many are free{known}"
        )
    cores = assign_cpus(
        count=wanted.cpus_per_replica,
        available=cpus,
        taken=[core for child in children for core in child.placement.cpus],
    )
    return gpus, cores


def read_gpu_memory(pids: Collection[int]) -> int | None:
    """Bytes that these processes hold of the GPU of which they hold most; ``None`` where
    ``nvidia-smi`` does not say. Takes up to seconds."""
    query = "--query-compute-apps=gpu_uuid,pid,used_memory"
    return ask_nvidia_smi(query, lambda text: sum_gpu_memory(text, pids))


def sum_gpu_memory(text: str, pids: Collection[int]) -> int | None:
    """The same of what ``nvidia-smi`` prints for these fields; ``ValueError`` for other text."""
    used: Counter[str] = Counter()
    for line in filter(str.strip, text.splitlines()):
        uuid, pid, memory = (part.strip() for part in line.split(","))
        if int(pid) in pids:
            used[uuid] += int(memory) << 20
    return max(used.values(), default=None)


def gpu_memory_fraction(
    pool: ProcessPoolSettings, inventory: Sequence[GpuCapacity] | None
) -> float | None:
    """The share of a GPU's memory that a replica may take, where its pool names bytes; ``None``
    leaves it to the engine. Of GPUs of several sizes the smallest counts."""
    sizes = [one.memory_bytes for one in inventory or () if one.memory_bytes]
    if pool.gpu_memory_bytes is None or not sizes:
        return None
    return min(1.0, pool.gpu_memory_bytes / min(sizes))


def reserve_port(port: int = 0) -> socket.socket:
    """A port that no other user can bind until this is closed; 0 for any free one.

    It is bound and does not listen. Engines bind it too (SO_REUSEPORT), which the kernel grants to
    processes of one user only, so what answers there, now or after an engine has died, is our
    user. Raises ``OSError`` where another has it.
    """
    held = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if port:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((HOST, port))
        # Only now: with it the kernel may choose a port that another process of ours shares.
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    except OSError:
        held.close()
        raise
    return held
