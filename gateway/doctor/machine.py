"""What ``tidegate doctor`` asks this machine, about models too: the cache, the page cache, how
engines can be started, which load format is quickest.

Nothing is changed and nothing stays running. Measuring copies at most one file into a temporary
directory for a moment.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from autoscaler.backends.process.placement import list_gpus
from autoscaler.backends.process.procs import read_pss_bytes
from autoscaler.types import GpuCapacity
from gateway import compiled
from gateway.admin.schema import CacheListing
from gateway.compose.listeners import AGENT_NAME, Running, listen, read_record
from gateway.settings.defaults import find_bad_tls
from gateway.settings.load import ConfigError
from gateway.settings.schema import Settings
from loaders.engines.vllm.engine import EngineInstall, find_install
from modelcache.prepare.default_model import MANIFEST, find_damage
from modelcache.types import CacheError

IMPORT_TIMEOUT_S = 180.0
CONNECT_TIMEOUT_S = 2.0
ASK_DEVICE = (
    "import vllm; from vllm.platforms import current_platform as p; "
    "print('device', p.device_type or 'none')"
)
MEASURE_FORMATS = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module('loaders.weights.format_benchmark', run_name='__main__', alter_sys=True)"
)
"""Finds our packages whether or not they are installed for the engine's Python."""
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt")
PREPARE_TIMEOUT_S = 120.0
"""Importing vLLM on a busy machine takes a minute."""
MEASURE_S = 60.0
"""Most seconds for all load formats; on a machine that does nothing else five are enough."""
PROBE_BYTES = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What lies at a model's path: its weights' size, and what is wrong with it."""

    weights_bytes: int
    damage: tuple[str, ...] = ()
    verified: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpeed:
    """A load format's figures here, in bytes a second; ``problem`` is why it has none."""

    format: str
    warm_bytes_s: float | None = None
    cold_bytes_s: float | None = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForkAbility:
    """Whether engines can be forked here: after ``seconds`` of importing, in ``memory_bytes``; or
    why not."""

    problem: str = ""
    seconds: float = 0.0
    memory_bytes: int | None = None


class Machine:
    """Asks this machine. Each answer is a value, ``None`` where it cannot be told. ``environ`` is
    what the environment of an engine is made of."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = _without_python(environ)

    def python(self) -> tuple[int, int, int]:
        """Version of the Python that runs this."""
        return sys.version_info[:3]

    def system(self) -> tuple[str, str, str]:
        """System, its release, and the processor architecture."""
        return platform.system(), platform.release(), platform.machine()

    def cores(self) -> tuple[int, float | None]:
        """CPU cores this process may use, and a container's quota of them."""
        return len(os.sched_getaffinity(0)), _cgroup_cores()

    def has_avx2(self) -> bool | None:
        """Whether an x86 processor has AVX2; ``None`` on other processors."""
        if platform.machine() != "x86_64":
            return None
        return " avx2" in Path("/proc/cpuinfo").read_text()

    def memory_bytes(self) -> tuple[int, int]:
        """Memory in all (a container's limit counts) and what is available."""
        lines = Path("/proc/meminfo").read_text().splitlines()
        kib = {line.partition(":")[0]: int(line.split()[1]) for line in lines}
        total, available = kib["MemTotal"] << 10, kib["MemAvailable"] << 10
        limit = _cgroup_memory_bytes()
        if limit is None or limit >= total:
            return total, available
        return limit, min(limit, available)

    def disk_free_bytes(self, path: Path) -> int | None:
        """Free space on the disk that would hold ``path``."""
        try:
            return shutil.disk_usage(_nearest(path)).free
        except OSError:
            return None

    def gpus(self) -> Sequence[GpuCapacity] | None:
        """NVIDIA GPUs; empty where there is no driver, ``None`` where it does not answer."""
        return list_gpus()

    def install(self, python: Path) -> EngineInstall | None:
        """The vLLM beside an interpreter."""
        return find_install(python)

    def engine_device(self, python: Path) -> tuple[str | None, str]:
        """The device vLLM chooses when it is imported, or ``None`` and why it cannot be."""
        try:
            asked = subprocess.run(
                [str(python), "-c", ASK_DEVICE],
                capture_output=True,
                text=True,
                timeout=IMPORT_TIMEOUT_S,
                env=self._environ,
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
        """The checkpoint at a path; ``None`` where no directory is."""
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
        """Why nothing could listen there now; ``None`` when it could."""
        try:
            for listener in listen(host, port, field="port"):
                listener.close()
        except ConfigError as error:
            return error.problems[0].message
        return None

    def can_connect(self, host: str, port: int) -> str | None:
        """Why no connection comes about; ``None`` when one does."""
        try:
            socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
        except OSError as error:
            return error.strerror or str(error)
        return None

    def open_files(self) -> tuple[int, int]:
        """Open files allowed to a process: now, and the most it may ask for."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = sys.maxsize
        return (
            most if soft == resource.RLIM_INFINITY else soft,
            most if hard == resource.RLIM_INFINITY else hard,
        )

    def can_write(self, path: Path) -> str | None:
        """Why no file can be made in a directory (or its nearest parent); ``None`` when it can."""
        try:
            with tempfile.TemporaryFile(dir=_nearest(path)):
                return None
        except OSError as error:
            return error.strerror or str(error)

    def bad_tls(self, settings: Settings) -> list[tuple[Path, str]]:
        """Files of the API's certificate that cannot be used, and why."""
        return [(path, why) for _, path, why in find_bad_tls(settings.gateway)]

    def shares_ports(self) -> bool:
        """Whether two sockets can listen on one port (``SO_REUSEPORT``)."""
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
        """Whether workers would run the compiled data path."""
        return compiled.is_available()

    def owner(self, state_dir: Path) -> int | None:
        """Process id of the Tidegate that runs with this state directory."""
        return _pid_in(read_record(state_dir))

    def agent(self, state_dir: Path) -> int | None:
        """Process id of the cache agent that runs with this state directory."""
        return _pid_in(read_record(state_dir, AGENT_NAME))

    def listing(self, settings: Settings) -> CacheListing | str | None:
        """What the cache has, or why it cannot be told; ``None`` before it is made."""
        from gateway.compose.cache import cache_dir, open_models

        try:
            models = open_models(settings, os.environ)
            if not cache_dir(settings).is_dir():
                return None
            return models.listing()
        except (CacheError, OSError) as error:
            return str(error)

    def is_installed(self, package: str) -> bool:
        """Whether a Python package is there."""
        return importlib.util.find_spec(package) is not None

    def page_ways(self, path: Path) -> str:
        """How cached pages can be counted on the disk that holds ``path``; empty: not at all."""
        from modelcache.pagecache import residency
        from modelcache.types import FileRange

        try:
            with tempfile.NamedTemporaryFile(dir=_nearest(path)) as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
                return residency.residency([FileRange(path=file.name)]).how
        except (OSError, CacheError):
            return ""

    def lock_limit_bytes(self) -> int | None:
        """Most bytes of memory this user may lock; ``None`` for no limit."""
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft

    def fork_ability(self, python: Path, device: str) -> ForkAbility:
        """Whether vLLM can be imported once and engines be forked from that."""
        try:
            return asyncio.run(_ask_fork_server(python, device, self._environ))
        except OSError as error:
            return ForkAbility(problem=error.strerror or str(error))

    def speeds(self, python: Path, weights: Sequence[Path]) -> list[FormatSpeed] | str:
        """How quickly each load format reads weights, or why that cannot be told."""
        with ExitStack() as stack:
            argv = [str(python), "-c", MEASURE_FORMATS, str(_root()), *map(str, weights)]
            try:
                work_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="tidegate-"))
                argv += ["--work-dir", work_dir]
            except OSError:
                pass  # without a place to copy to there are no cold figures
            try:
                done = subprocess.run(
                    [*argv, "--within-s", f"{MEASURE_S:g}"],
                    capture_output=True,
                    text=True,
                    timeout=PREPARE_TIMEOUT_S + MEASURE_S,
                    env=self._environ,
                    check=False,
                )
            except OSError as error:
                return error.strerror or str(error)
            except subprocess.TimeoutExpired:
                return f"it took more than {PREPARE_TIMEOUT_S + MEASURE_S:g} s"
        return parse_speeds(done.stdout) or _last_line(done.stderr) or "it said nothing"


def _pid_in(running: Running | None) -> int | None:
    return None if running is None else running.pid


def _nearest(path: Path) -> Path:
    """The path itself, or the nearest parent that is there."""
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


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


def parse_speeds(text: str) -> list[FormatSpeed]:
    """The figures among what ``loaders.weights.format_benchmark`` printed."""
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found.append(FormatSpeed(**entry))
        except (ValueError, TypeError):
            continue  # a library that prints
    return found


async def _ask_fork_server(python: Path, device: str, environ: Mapping[str, str]) -> ForkAbility:
    """Start a fork server, wait until it has imported everything, end it."""
    from loaders.engines.vllm.forkserver.client import ForkServer, ServerLost, server_argv

    ours, theirs = socket.socketpair()
    with theirs:
        process = await asyncio.create_subprocess_exec(
            *server_argv(str(python), str(_root()), theirs.fileno()),
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environ,
        )
    server = ForkServer(ours)
    try:
        async with asyncio.timeout(PREPARE_TIMEOUT_S):
            seconds = await server.hello(device=device, models=())
        return ForkAbility(seconds=seconds, memory_bytes=read_pss_bytes(process.pid))
    except TimeoutError:
        return ForkAbility(problem=f"it was not ready in {PREPARE_TIMEOUT_S:g} s")
    except ServerLost as error:
        return ForkAbility(problem=str(error))
    finally:
        server.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


def _without_python(environ: Mapping[str, str]) -> dict[str, str]:
    """An environment without what leads another Python astray (what lies in the working directory,
    too), and with vLLM quiet."""
    kept = {name: value for name, value in environ.items() if not name.startswith("PYTHON")}
    kept.pop("VIRTUAL_ENV", None)
    return {**kept, "PYTHONSAFEPATH": "1", "VLLM_LOGGING_LEVEL": "ERROR"}


def _root() -> Path:
    """Where our own packages lie."""
    return Path(__file__).resolve().parents[2]


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
