"""vLLM's command line: what is run, with which flags and environment, to serve one replica.

Nothing is started here. The command is worked out from what is installed beside the engine's
interpreter, read from the file system: importing vLLM to ask its version would take ten seconds.

Three traps are met here. The ``vllm`` console script of the CPU build fails, because it looks up
the version of a package called ``vllm``; and the server's module has moved between versions, so a
launcher of a few lines tries the newer place first. And an engine must not see the gateway's
environment (``PYTHONPATH``, ``VIRTUAL_ENV``), nor import what lies in the working directory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loaders.engines.base import EngineCommand, EngineOptions, Placement
from loaders.engines.vllm.load_format import ENTRY_POINT, LOAD_FORMAT
from loaders.settings import LoaderSettings

LAUNCHER = """\
import runpy
try:
    from vllm.entrypoints.launchers.api_server.entry import main
except ModuleNotFoundError as missing:
    if not (missing.name or "").startswith("vllm.entrypoints."):
        raise
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
else:
    main()
"""
"""Starts vLLM's server: from its present place, or from the one it had until 0.2x."""

Device = Literal["cpu", "cuda"]

DIST_INFO = re.compile(r"(?P<name>vllm(?:[_-]cpu)?)-(?P<version>[^-]+)\.dist-info")

ALIASES: Mapping[str, str] = {
    "-tp": "--tensor-parallel-size",
    "--tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
}
"""Short forms of flags that we set too, so that a user's short form is seen to replace ours."""

NEGATABLE = frozenset({"--enforce-eager", "--disable-uvicorn-access-log"})

SLEEP_FLAG = "--enable-sleep-mode"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInstall:
    """A vLLM found in an environment: the name it was installed under, its version, its device."""

    distribution: str
    version: str
    device: Device


def vllm_command(
    options: EngineOptions, placement: Placement, settings: LoaderSettings
) -> EngineCommand:
    """The command that serves a model with the vLLM installed for ``settings.engine_python``.

    GPUs are numbered in PCI order; without GPUs or cores the engine chooses. The user's arguments
    replace any flag of ours.
    """
    python, args = settings.engine_python, options.args
    install = find_install(python)
    on_cpu = install is not None and install.device == "cpu"
    sleeps = options.sleep and install is not None and not on_cpu and SLEEP_FLAG not in args
    flags: list[tuple[str, str | None]] = [
        ("--model", options.model),
        ("--served-model-name", options.served_model),
        ("--host", placement.host),
        ("--port", str(placement.port)),
        ("--disable-uvicorn-access-log", None),
        ("--uvicorn-log-level", "warning"),
    ]
    if settings.load_format != LOAD_FORMAT or has_plugin(python):
        flags.append(("--load-format", settings.load_format))
    if options.max_model_len_tokens is not None:
        flags.append(("--max-model-len", str(options.max_model_len_tokens)))
    if on_cpu and settings.cpu_enforce_eager:
        flags.append(("--enforce-eager", None))
    if len(placement.gpus) > 1 and not (_flags_in(args) & {"--data-parallel-size"}):
        flags.append(("--tensor-parallel-size", str(len(placement.gpus))))
    if placement.gpu_memory_fraction is not None and not on_cpu:
        flags.append(("--gpu-memory-utilization", f"{placement.gpu_memory_fraction:.4f}"))
    if sleeps:
        flags.append((SLEEP_FLAG, None))
    env = _environment(python, options.model, settings)
    if placement.gpus:
        env["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, placement.gpus))
    if on_cpu:
        env["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_kv_cache_gib)
        env["VLLM_CPU_OMP_THREADS_BIND"] = _thread_binding(placement.cpus, settings)
        # What vLLM 0.32 compiles ahead of time on a CPU it cannot load again, and then compiles
        # anew; what Inductor keeps by itself it can: 12 s instead of 35 here.
        env["VLLM_USE_AOT_COMPILE"] = "0"
    if sleeps:
        env["VLLM_SERVER_DEV_MODE"] = "1"  # without it there is no /sleep
    return EngineCommand(
        argv=(str(python.absolute()), "-c", LAUNCHER, *merge_flags(flags, args)), env=env
    )


def merge_flags(ours: Iterable[tuple[str, str | None]], theirs: Sequence[str]) -> tuple[str, ...]:
    """Our flags without those that ``theirs`` sets too, then theirs as they are.

    ``--no-x`` replaces ``--x``, ``--x=1`` and ``--x 1`` are the same flag, and vLLM takes ``_``
    for ``-`` in names.
    """
    taken = _flags_in(theirs)
    kept: list[str] = []
    for name, value in ours:
        negation = "--no-" + name.removeprefix("--") if name in NEGATABLE else None
        if name in taken or negation in taken:
            continue
        kept += [name] if value is None else [name, value]
    return (*kept, *theirs)


def find_install(python: Path) -> EngineInstall | None:
    """The vLLM beside ``python``, or ``None`` where none is found (or it is no environment)."""
    for site in site_packages(python):
        for entry in sorted(site.glob("vllm*.dist-info")):
            match = DIST_INFO.fullmatch(entry.name)
            if match is None:
                continue
            name, version = match["name"].replace("_", "-"), match["version"]
            cpu = name == "vllm-cpu" or version.partition("+")[2].startswith("cpu")
            return EngineInstall(
                distribution=name, version=version, device="cpu" if cpu else "cuda"
            )
    return None


def has_plugin(python: Path) -> bool:
    """Whether vLLM, run by ``python``, will find our load format: Tidegate is installed there."""
    for site in site_packages(python):
        for entry in site.glob("tidegate-*.dist-info/entry_points.txt"):
            if ENTRY_POINT in entry.read_text(encoding="utf-8", errors="replace"):
                return True
    return False


def site_packages(python: Path) -> list[Path]:
    """``site-packages`` of the environment whose ``bin`` holds ``python`` (its link not followed:
    the interpreter of a virtual environment is usually a link out of it)."""
    root = python.absolute().parent.parent
    return sorted(root.glob("lib/python3*/site-packages"))


def read_flags(args: Sequence[str]) -> list[list[str]]:
    """The flags of a command line, each by its full name and with its values, in their order:
    ``--download_dir=/x`` is ``--download-dir``, ``/x``."""
    groups: list[list[str]] = []
    for arg in args:
        if arg.startswith("-") and not arg.lstrip("-")[:1].isdigit():
            name, equals, value = arg.partition("=")
            if name.startswith("--"):
                name = name.replace("_", "-")
            groups.append([ALIASES.get(name, name), *([value] if equals else [])])
        elif groups:
            groups[-1].append(arg)
    return groups


def _flags_in(args: Sequence[str]) -> set[str]:
    return {name for name, *_ in read_flags(args)}


def check_address(args: Sequence[str]) -> Iterator[str]:
    """What is wrong with arguments that set the address: by it Tidegate finds its replicas."""
    for name in ("--host", "--port", "--uds"):
        if name in _flags_in(args):
            yield f"holds {name}, which Tidegate sets itself"


def _environment(python: Path, model: str, settings: LoaderSettings) -> dict[str, str]:
    """What every vLLM gets. An empty PYTHONPATH or PYTHONHOME counts as unset."""
    binaries = python.absolute().parent
    path = os.pathsep.join(filter(None, (str(binaries), os.environ.get("PATH", os.defpath))))
    env = {
        "PATH": path,
        "PYTHONPATH": "",
        "PYTHONHOME": "",
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "VIRTUAL_ENV": str(binaries.parent),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_LOGGING_LEVEL": settings.engine_log_level.upper(),
        "VLLM_LOGGING_COLOR": "0",
        "TOKENIZERS_PARALLELISM": "false",
    }
    # A model with a URL is on the disk before its engine starts, and the fork server's environment
    # has to be that of its engines already.
    if "://" in model or Path(model).is_dir():
        env["HF_HUB_OFFLINE"] = "1"
        env["TRANSFORMERS_OFFLINE"] = "1"
    return env


def _thread_binding(cpus: Sequence[int], settings: LoaderSettings) -> str:
    """Cores for vLLM's compute threads: those given, less the first, which is left for the HTTP
    server and the scheduler; one core given is shared by all."""
    if cpus:
        return ",".join(str(core) for core in (cpus[1:] or cpus))
    if len(os.sched_getaffinity(0)) < 2:
        return "nobind"  # vLLM's own choice needs one core for itself and one to compute
    return settings.cpu_bind
