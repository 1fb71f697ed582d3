"""What this machine is asked for ``tidegate doctor``: each answer is a value, or ``None`` where it
cannot be told. Nothing is changed and nothing stays running.
"""

# ruff: noqa: D102  (the methods of Machine are described in Probes)

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from autoscaler.backends.process.gpus import list_gpus
from autoscaler.policy.placement import GpuCapacity
from gateway.compose.run_record import AGENT_NAME, Running, read_record
from gateway.datapath import compiled
from loaders.engines.vllm.command import EngineInstall, find_install
from modelcache.prepare.default_model import MANIFEST, find_damage

IMPORT_TIMEOUT_S = 180.0
CONNECT_TIMEOUT_S = 2.0
ASK_DEVICE = (
    "import vllm; from vllm.platforms import current_platform as p; "
    "print('device', p.device_type or 'none')"
)
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What lies at a model's path: its weights' size, and what is wrong with it."""

    weights_bytes: int
    damage: tuple[str, ...] = ()
    verified: bool = False


class Probes(Protocol):
    """What ``diagnose`` asks. Tests answer with values; ``Machine`` asks the machine."""

    def python(self) -> tuple[int, int, int]:
        """Version of the Python that runs this."""

    def system(self) -> tuple[str, str, str]:
        """System, its release, and the processor architecture."""

    def cores(self) -> tuple[int, float | None]:
        """CPU cores this process may use, and a container's quota of them."""

    def has_avx2(self) -> bool | None:
        """Whether an x86 processor has AVX2; ``None`` on other processors."""

    def memory_bytes(self) -> tuple[int, int]:
        """Memory in all (a container's limit counts) and what is available."""

    def disk_free_bytes(self, path: Path) -> int | None:
        """Free space on the disk that would hold ``path``."""

    def gpus(self) -> Sequence[GpuCapacity] | None:
        """NVIDIA GPUs; empty where there is no driver, ``None`` where it does not answer."""

    def install(self, python: Path) -> EngineInstall | None:
        """The vLLM beside an interpreter."""

    def engine_device(self, python: Path) -> tuple[str | None, str]:
        """The device vLLM chooses when it is imported, or ``None`` and why it cannot be."""

    def model(self, path: Path) -> Model | None:
        """The checkpoint at a path; ``None`` where no directory is."""

    def can_listen(self, host: str, port: int) -> str | None:
        """Why nothing could listen there now; ``None`` when it could."""

    def can_connect(self, host: str, port: int) -> str | None:
        """Why no connection comes about; ``None`` when one does."""

    def open_files(self) -> tuple[int, int]:
        """Open files allowed to a process: now, and the most it may ask for."""

    def can_write(self, path: Path) -> str | None:
        """Why no file can be made in a directory (or its nearest parent); ``None`` when it can."""

    def can_read(self, path: Path) -> str | None:
        """Why a file cannot be read; ``None`` when it can."""

    def shares_ports(self) -> bool:
        """Whether two sockets can listen on one port (``SO_REUSEPORT``)."""

    def is_compiled(self) -> bool:
        """Whether workers would run the compiled data path."""

    def owner(self, state_dir: Path) -> int | None:
        """Process id of the Tidegate that runs with this state directory."""

    def agent(self, state_dir: Path) -> int | None:
        """Process id of the cache agent that runs with this state directory."""


class Machine:
    """The machine itself, asked."""

    def python(self) -> tuple[int, int, int]:
        return sys.version_info[:3]

    def system(self) -> tuple[str, str, str]:
        return platform.system(), platform.release(), platform.machine()

    def cores(self) -> tuple[int, float | None]:
        return len(os.sched_getaffinity(0)), _cgroup_cores()

    def has_avx2(self) -> bool | None:
        if platform.machine() != "x86_64":
            return None
        return " avx2" in Path("/proc/cpuinfo").read_text()

    def memory_bytes(self) -> tuple[int, int]:
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        total, available = kib["MemTotal"] << 10, kib["MemAvailable"] << 10
        limit = _cgroup_memory_bytes()
        if limit is None or limit >= total:
            return total, available
        return limit, min(limit, available)

    def disk_free_bytes(self, path: Path) -> int | None:
        try:
            return shutil.disk_usage(_nearest(path)).free
        except OSError:
            return None

    def gpus(self) -> Sequence[GpuCapacity] | None:
        return list_gpus()

    def install(self, python: Path) -> EngineInstall | None:
        return find_install(python)

    def engine_device(self, python: Path) -> tuple[str | None, str]:
        env = {**os.environ, "PYTHONPATH": "", "PYTHONHOME": "", "VLLM_LOGGING_LEVEL": "ERROR"}
        try:
            asked = subprocess.run(
                [str(python), "-c", ASK_DEVICE],
                capture_output=True,
                text=True,
                timeout=IMPORT_TIMEOUT_S,
                env=env,
                check=False,
            )
        except OSError as error:
            return None, str(error.strerror)
        except subprocess.TimeoutExpired:
            return None, f"importing it took more than {IMPORT_TIMEOUT_S:g} s"
        for line in asked.stdout.splitlines():
            if asked.returncode == 0 and line.startswith("device "):
                return line.removeprefix("device "), ""
        said = asked.stderr.strip().splitlines()
        return None, said[-1] if said else f"exit code {asked.returncode}"

    def model(self, path: Path) -> Model | None:
        if not path.is_dir():
            return None
        weights = sum(f.stat().st_size for pattern in WEIGHTS for f in path.glob(pattern))
        if (path / MANIFEST).exists():
            damage = tuple(find_damage(path))
            return Model(weights_bytes=weights, damage=damage, verified=True)
        damage = () if (path / "config.json").is_file() else ("config.json is missing",)
        if not weights:
            damage += ("there are no weights in it",)
        return Model(weights_bytes=weights, damage=damage)

    def can_listen(self, host: str, port: int) -> str | None:
        try:
            family, kind, protocol, _, address = _resolve(host, port)
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
                listener.listen(1)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def can_connect(self, host: str, port: int) -> str | None:
        try:
            socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def open_files(self) -> tuple[int, int]:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = sys.maxsize
        return (
            most if soft == resource.RLIM_INFINITY else soft,
            most if hard == resource.RLIM_INFINITY else hard,
        )

    def can_write(self, path: Path) -> str | None:
        try:
            with tempfile.TemporaryFile(dir=_nearest(path)):
                return None
        except OSError as error:
            return error.strerror or str(error)

    def can_read(self, path: Path) -> str | None:
        try:
            with path.open("rb"):
                return None
        except OSError as error:
            return error.strerror or str(error)

    def shares_ports(self) -> bool:
        try:
            with socket.socket() as first, socket.socket() as second:
                for listener in (first, second):
                    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                first.bind(("127.0.0.1", 0))
                second.bind(first.getsockname())
        except (OSError, AttributeError):
            return False
        return True

    def is_compiled(self) -> bool:
        return compiled.is_available()

    def owner(self, state_dir: Path) -> int | None:
        return _pid_in(read_record(state_dir))

    def agent(self, state_dir: Path) -> int | None:
        return _pid_in(read_record(state_dir, AGENT_NAME))


def _pid_in(running: Running | None) -> int | None:
    return None if running is None else running.pid


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest parent that is there."""
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _resolve(
    host: str, port: int
) -> tuple[socket.AddressFamily, socket.SocketKind, int, str, tuple[object, ...]]:
    flags = socket.AI_PASSIVE
    return socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=flags)[0]


def _cgroup_cores() -> float | None:
    """A container's CPU quota in cores (control groups 2), ``None`` without one."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None


def _cgroup_memory_bytes() -> int | None:
    """A container's memory limit (control groups 2), ``None`` without one."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text())
    except (OSError, ValueError):
        return None
