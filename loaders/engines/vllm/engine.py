"""vLLM as an engine: its command line, sleep calls, log phases, and what it can do.

The command is worked out from what is installed beside the engine's interpreter, read from the file
system: importing vLLM to ask its version would take ten seconds.

Three traps are met here. The ``vllm`` console script of the CPU build fails, because it looks up
the version of a package called ``vllm``; and the server's module has moved between versions, so a
launcher of a few lines tries the newer place first. And an engine must not see the gateway's
environment (``PYTHONPATH``, ``VIRTUAL_ENV``), nor import what lies in the working directory.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from loaders.engines.base import (
    Capabilities,
    EngineCommand,
    EngineLimits,
    EngineOptions,
    Placement,
)
from loaders.engines.client import EngineClient
from loaders.engines.openai_compatible import OpenAICompatibleEngine
from loaders.engines.vllm.forkserver.patches import share_port
from loaders.engines.vllm.load_format import ENTRY_POINT, LOAD_FORMAT
from loaders.engines.vllm.tool_calls import find_tool_parser
from loaders.settings import LoaderSettings

LAUNCHER = f"""\
from __future__ import annotations
import runpy, sys
{inspect.getsource(share_port)}
share_port(sys.argv)
try:
    from vllm.entrypoints.launchers.api_server.entry import main
except ModuleNotFoundError as missing:
    if not (missing.name or "").startswith("vllm.entrypoints."):
        raise
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
else:
    main()
"""
"""Starts vLLM's server: from its present place, or from the one it had until 0.2x. The function is
in the text because the engine's Python need not have this package."""

Device = Literal["cpu", "cuda"]

DIST_INFO = re.compile(r"(?P<name>vllm(?:[_-]cpu)?)-(?P<version>[^-]+)\.dist-info")

ALIASES: Mapping[str, str] = {
    "-tp": "--tensor-parallel-size",
    "--tp": "--tensor-parallel-size",
    "-pp": "--pipeline-parallel-size",
    "-dp": "--data-parallel-size",
}
"""Short forms of flags that we set too, so that a user's short form is seen to replace ours."""

COUNT = re.compile(r"(?P<number>\d{1,15}(\.\d{1,6})?)(?P<unit>[kmgKMG]?)")
COUNT_UNITS: Mapping[str, int] = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "K": 2**10,
    "M": 2**20,
    "G": 2**30,
}

NEGATABLE = frozenset({"--enforce-eager", "--disable-uvicorn-access-log"})

SLEEP_FLAG = "--enable-sleep-mode"

TOOL_FLAGS = frozenset(
    {
        *("--enable-auto-tool-choice", "--no-enable-auto-tool-choice", "--tool-call-parser"),
        *("--tool-parser-plugin", "--chat-template", "--tokenizer", "--config"),
    }
)
"""Arguments with which the user says how tools are called, or changes what would tell us."""

PHASE_SIGNS: Sequence[tuple[str, re.Pattern[str]]] = (
    ("loading", re.compile(
        r"Starting to load model|Loading (safetensors|pt|weights)|checkpoint shards",
        re.IGNORECASE)),
    ("compiling", re.compile(
        r"torch\.compile takes|directory: .* for vLLM's torch\.compile|Dynamo bytecode|"
        r"Compiling (a|the) ", re.IGNORECASE)),
    ("warming", re.compile(
        r"KV cache size|Capturing |Warming up|init engine|Supported tasks|vLLM server on|"
        r"Loading weights took|Available routes|^Route:", re.IGNORECASE)),
)  # fmt: skip
"""Log messages, by the start phase they show to have begun."""

WAKE_AND_RELOAD: tuple[tuple[str, Mapping[str, object] | None], ...] = (
    ("/wake_up?tags=weights", None),
    ("/collective_rpc", {"method": "reload_weights"}),
    ("/wake_up?tags=kv_cache", None),
    ("/reset_prefix_cache", None),
)
"""At level 2 the weights were dropped. Waking allocates memory for them and fills it with nothing,
so they are read again before the cache is made, as vLLM's documentation has it."""

FETCH_FLAGS = frozenset(
    {
        *("--revision", "--code-revision", "--tokenizer-revision", "--download-dir"),
        # These may name another repository of the hub, and an engine with a model here is offline.
        *("--tokenizer", "--hf-config-path", "--lora-modules", "--speculative-config", "--config"),
        *("--hf-token", "--hf-overrides", "-sc"),
    }
)
"""Arguments that name what vLLM fetches, from where, or where it keeps it."""

UNCACHED_FORMATS = frozenset({"dummy", "pt", "npcache"})
"""Load formats that make weights up, or want files which are not fetched beside safetensors."""

HUB_VARIABLES = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "VLLM_USE_MODELSCOPE", "MODELSCOPE_")
"""What variables begin with that say where a hub is and which token to use. Set for a pool alone,
the model cache does not see them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInstall:
    """A vLLM found in an environment: the name it was installed under, its version, its device."""

    distribution: str
    version: str
    device: Device


class VllmEngine(OpenAICompatibleEngine):
    """vLLM, installed for ``loaders.engine_python``."""

    name = "vllm"
    capabilities = Capabilities(
        loads_weights=True,
        sleep_levels=frozenset({1, 2}),
        fork=True,
        compile_cache=True,
    )
    phase_signs = PHASE_SIGNS
    consequences = re.compile(
        r"(WorkerProc|Engine core) initialization failed|EngineDeadError|died unexpectedly|"
        r"[Ss]ee (the )?(root cause|stack trace)|EngineCore (failed|encountered)"
    )

    def check(self, args: Sequence[str]) -> Iterator[str]:
        """See ``Engine``. By its address Tidegate finds a replica."""
        for name in ("--host", "--port", "--uds"):
            if name in _flags_in(args):
                yield f"holds {name}, which Tidegate sets itself"

    def limits(self, args: Sequence[str]) -> EngineLimits:
        """See ``Engine``. Each engine of a data-parallel server has the limits for itself."""
        flags = {name: values[0] for name, *values in read_flags(args) if values}
        engines = read_count(flags.get("--data-parallel-size")) or 1
        requests = read_count(flags.get("--max-num-seqs"))
        tokens = read_count(flags.get("--max-num-batched-tokens"))
        return EngineLimits(
            running_requests=None if requests is None else engines * requests,
            batched_tokens=None if tokens is None else engines * tokens,
        )

    def program(self, settings: LoaderSettings) -> Path | None:
        """See ``Engine``."""
        return settings.engine_python.expanduser()

    def fetches_model(
        self, args: Sequence[str], env: Mapping[str, str], settings: LoaderSettings
    ) -> bool:
        """See ``Engine``."""
        load_format = settings.load_format
        for name, *values in read_flags(args):
            if name.partition(".")[0] in FETCH_FLAGS:  # --speculative-config.model
                return True
            if name == "--load-format" and values:
                load_format = values[0]
        return load_format in UNCACHED_FORMATS or any(one.startswith(HUB_VARIABLES) for one in env)

    def image_arguments(self, options: EngineOptions, port: int) -> Sequence[str]:
        """Of ``vllm/vllm-openai``, whose entry point is ``vllm serve``."""
        flags = [options.model, "--served-model-name", options.served_model]
        if options.max_model_len_tokens is not None:
            flags += ["--max-model-len", str(options.max_model_len_tokens)]
        return [*flags, "--port", str(port), *options.args]

    def command(
        self, options: EngineOptions, placement: Placement, settings: LoaderSettings
    ) -> EngineCommand:
        """See ``Engine``.

        GPUs are numbered in PCI order; without GPUs or cores the engine chooses. The user's
        arguments replace any flag of ours.
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
        if not _flags_in(args) & TOOL_FLAGS:
            parser = find_tool_parser(options.model, site_packages(python))
            if parser is not None:
                flags += [("--enable-auto-tool-choice", None), ("--tool-call-parser", parser)]
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

    async def sleep(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """See ``Engine``. Needs ``--enable-sleep-mode``."""
        await client.post(f"{url}/sleep?level={level}", timeout_s=timeout_s)

    async def is_sleeping(self, client: EngineClient, url: str) -> bool | None:
        """See ``Engine``."""
        try:
            status, body = await client.request("GET", f"{url}/is_sleeping", {})
            answer = json.loads(body) if status == 200 else None
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, RecursionError):
            return None
        sleeps = answer.get("is_sleeping") if isinstance(answer, dict) else None
        return sleeps if isinstance(sleeps, bool) else None

    async def wake(self, client: EngineClient, url: str, level: int, *, timeout_s: float) -> None:
        """See ``Engine``."""
        for path, body in WAKE_AND_RELOAD if level == 2 else (("/wake_up", None),):
            await client.post(f"{url}{path}", timeout_s=timeout_s, body=body)


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


def read_count(text: str | None) -> int | None:
    """A number as vLLM takes it, ``8192`` or ``8k`` (``8K`` is 8 * 1024); ``None`` where it is
    none."""
    match = COUNT.fullmatch(text or "")
    if match is None:
        return None
    return int(float(match["number"]) * COUNT_UNITS[match["unit"]]) or None


def _flags_in(args: Sequence[str]) -> set[str]:
    return {name for name, *_ in read_flags(args)}


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
