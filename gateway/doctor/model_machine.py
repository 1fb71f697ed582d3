"""What this machine is asked about models for ``tidegate doctor``: the cache, the page cache, how
engines can be started from it, and which load format is quickest.

Nothing stays running. Measuring copies at most one file into a temporary directory for a moment.
"""

# ruff: noqa: D102  (the methods of CacheMachine are described in CacheProbes)

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import resource
import socket
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gateway.admin.schema import CacheListing
from gateway.settings.schema import Settings
from modelcache.types import CacheError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "hf": ("huggingface_hub",),
    "s3": ("obstore",),
    "gs": ("obstore",),
    "oss": ("ossfs",),
}
"""What a scheme needs installed; the schemes that are not here need nothing."""
PREPARE_TIMEOUT_S = 120.0
"""Importing vLLM on a busy machine takes a minute."""
MEASURE_S = 60.0
"""Most seconds for all load formats; on a machine that does nothing else five are enough."""
PROBE_BYTES = 1 << 16


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


class CacheProbes(Protocol):
    """What ``diagnose_cache`` asks. Tests answer with values; ``CacheMachine`` asks the machine."""

    def listing(self, settings: Settings) -> CacheListing | str | None:
        """What the cache has, or why it cannot be told; ``None`` before it is made."""

    def can_write(self, path: Path) -> str | None:
        """Why no file can be made in a directory (or its nearest parent); ``None`` when it can."""

    def disk_free_bytes(self, path: Path) -> int | None:
        """Free space on the disk that would hold ``path``."""

    def is_installed(self, package: str) -> bool:
        """Whether a Python package is there."""

    def page_ways(self, path: Path) -> str:
        """How cached pages can be counted on the disk that holds ``path``; empty: not at all."""

    def lock_limit_bytes(self) -> int | None:
        """Most bytes of memory this user may lock; ``None`` for no limit."""

    def fork_ability(self, python: Path, device: str) -> ForkAbility:
        """Whether vLLM can be imported once and engines be forked from that."""

    def speeds(self, python: Path, weights: Sequence[Path]) -> list[FormatSpeed] | str:
        """How quickly each load format reads weights, or why that cannot be told."""


class CacheMachine:
    """The machine itself, asked."""

    def listing(self, settings: Settings) -> CacheListing | str | None:
        from gateway.compose.cache import cache_dir, open_models

        try:
            models = open_models(settings, os.environ)
            if not cache_dir(settings).is_dir():
                return None
            return models.listing()
        except (CacheError, OSError) as error:
            return str(error)

    def can_write(self, path: Path) -> str | None:
        from gateway.doctor.machine import Machine

        return Machine().can_write(path)

    def disk_free_bytes(self, path: Path) -> int | None:
        from gateway.doctor.machine import Machine

        return Machine().disk_free_bytes(path)

    def is_installed(self, package: str) -> bool:
        return importlib.util.find_spec(package) is not None

    def page_ways(self, path: Path) -> str:
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
        soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        return None if soft == resource.RLIM_INFINITY or os.geteuid() == 0 else soft

    def fork_ability(self, python: Path, device: str) -> ForkAbility:
        try:
            return asyncio.run(_ask_fork_server(python, device))
        except OSError as error:
            return ForkAbility(problem=error.strerror or str(error))

    def speeds(self, python: Path, weights: Sequence[Path]) -> list[FormatSpeed] | str:
        with ExitStack() as stack:
            argv = [str(python), "-m", "loaders.weights.formats", *map(str, weights)]
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
                    cwd=_root(),
                    env=_engine_environment(),
                    check=False,
                )
            except OSError as error:
                return error.strerror or str(error)
            except subprocess.TimeoutExpired:
                return f"it took more than {PREPARE_TIMEOUT_S + MEASURE_S:g} s"
        return parse_speeds(done.stdout) or _last_line(done.stderr) or "it said nothing"


def parse_speeds(text: str) -> list[FormatSpeed]:
    """The figures among what ``loaders.weights.formats`` printed."""
    found = []
    for line in text.splitlines():
        try:
            entry = json.loads(line)
            found.append(FormatSpeed(**entry))
        except (ValueError, TypeError):
            continue  # a library that prints
    return found


async def _ask_fork_server(python: Path, device: str) -> ForkAbility:
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
            env=_engine_environment(),
        )
    server = ForkServer(ours)
    try:
        async with asyncio.timeout(PREPARE_TIMEOUT_S):
            ready = await server.hello(device=device, models=())
        return ForkAbility(seconds=ready.seconds, memory_bytes=_pss_bytes(process.pid))
    except TimeoutError:
        return ForkAbility(problem=f"it was not ready in {PREPARE_TIMEOUT_S:g} s")
    except ServerLost as error:
        return ForkAbility(problem=str(error))
    finally:
        server.close()
        if process.returncode is None:
            process.kill()
        await process.wait()


def _pss_bytes(pid: int) -> int | None:
    """A process's share of the memory it uses."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError):
        return None
    return None


def _engine_environment() -> dict[str, str]:
    """Ours, without what leads another Python astray, and with vLLM quiet."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept.pop("VIRTUAL_ENV", None)
    return {**kept, "VLLM_LOGGING_LEVEL": "ERROR"}


def _root() -> Path:
    """Where our own packages lie."""
    return Path(__file__).resolve().parents[2]


def _nearest(path: Path) -> Path:
    path = path.expanduser().absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
