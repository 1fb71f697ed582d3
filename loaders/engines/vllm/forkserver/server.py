"""The fork server: imports vLLM once, then forks engines on demand until its socket ends.

Run under the engine's Python with one argument, the number of the socket it was given. It never
touches a GPU and has one Python thread, so that what it forks can do everything a fresh process
can.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loaders.engines.vllm.forkserver import wire
from loaders.engines.vllm.forkserver.child import EngineStart, become_engine, fork_orphan

REQUIRED = (
    "vllm",
    "vllm.entrypoints.launchers.api_server.entry",
    "vllm.v1.engine.core",
    "vllm.v1.engine.async_llm",
    "vllm.v1.executor.multiproc_executor",
)
"""Without these there is nothing to fork: another vLLM, which is started the plain way."""

WORKERS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("vllm.v1.worker.cpu_worker", "vllm.v1.worker.cpu_model_runner"),
    "cuda": ("vllm.v1.worker.gpu_worker", "vllm.v1.worker.gpu_model_runner"),
}

USUAL = (
    "compressed_tensors",
    "fastapi.routing",
    "httptools",
    "model_hosting_container_standards.sagemaker",
    "multiprocessing.popen_fork",
    "pydantic.v1",
    "setproctitle",
    "uvicorn.lifespan.on",
    "uvicorn.loops.uvloop",
    "uvicorn.protocols.http.httptools_impl",
    "uvicorn.protocols.websockets.websockets_sansio_impl",
    "uvloop",
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.entrypoints.anthropic.api_router",
    "vllm.entrypoints.generate.api_router",
    "vllm.entrypoints.generate.structured_decisions.api_router",
    "vllm.entrypoints.launchers.api_server.routers",
    "vllm.entrypoints.openai.chat_completion.api_router",
    "vllm.entrypoints.openai.completion.api_router",
    "vllm.entrypoints.openai.responses.api_router",
    "vllm.entrypoints.scale_out.factories",
    "vllm.entrypoints.serve",
    "vllm.entrypoints.serve.elastic_ep.api_router",
    "vllm.entrypoints.serve.lora.api_router",
    "vllm.entrypoints.serve.profile.api_router",
    "vllm.entrypoints.serve.tokenize.api_router",
    "vllm.entrypoints.serve.utils.fingerprint",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.renderers.hf",
    "vllm.tokenizers.hf",
    "vllm.transformers_utils.chat_templates",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.pool.flash_maxsim",
)
"""What an engine imports on its way to the first answer; one that is missing costs nothing."""

NATIVE_PREFIXES = (
    "ATEN_", "BLIS_", "CUBLAS", "CUDA_", "DNNL_", "GLIBC_", "GOMP_", "GOTO", "KMP_", "LD_",
    "MALLOC_", "MKL_", "NCCL_", "OMP_", "ONEDNN_", "OPENBLAS_", "PYTHON", "TORCH", "TRITON_",
)  # fmt: skip
"""Variables that native libraries read when they are loaded, which Python cannot observe."""

READ_LATE = frozenset(
    {
        "CUDA_CACHE_PATH",
        "CUDA_DEVICE_ORDER",
        "CUDA_VISIBLE_DEVICES",
        "SPT_NOENV",
        "TIDEGATE_REPLICA_MARK",
        "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
        "VLLM_CACHE_ROOT",
        "VLLM_ENABLE_STARTUP_PLAN",
        "VLLM_CPU_KVCACHE_SPACE",
        "VLLM_CPU_OMP_THREADS_BIND",
    }
)
"""Variables that take effect after the fork, whatever was looked at before: no GPU has been
touched by then, and vLLM, Inductor and Triton ask for theirs each time they need them."""

REFUSED_FLAGS = frozenset({"--numa-bind", "--headless", "--grpc"})
"""Flags with which vLLM needs processes that were started, or another server."""


def main(arguments: list[str]) -> int:
    """Import, tell, serve. In an engine that was forked it returns when that engine ends."""
    channel = socket.socket(fileno=int(arguments[0]))
    channel.set_inheritable(False)
    began_s = time.monotonic()
    given = dict(os.environ)
    try:
        settings, _ = wire.receive(channel)
        device = settings["device"]
        with watched_environment() as looked_at:
            missing = preload(device, settings["models"])
            _rehearse(device)
        unfit = why_unfit()
    except wire.Closed:
        return 0
    except Exception as error:  # noqa: BLE001 -- told to Tidegate, which starts engines plainly
        unfit, looked_at, missing = f"{type(error).__name__}: {error}", set(), []
    if unfit:
        wire.send(channel, {"kind": "unfit", "reason": unfit})
        return 1
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    gc.collect()
    gc.freeze()  # what is here now is never collected: looking at it would copy its pages
    ready = {"kind": "ready", "seconds": time.monotonic() - began_s, "missing": missing}
    wire.send(channel, {**ready, "modules": len(sys.modules)})
    return serve(channel, device, given, looked_at)


def why_unfit() -> str | None:
    """Why this process must not fork engines, after all it has imported."""
    if threading.active_count() > 1:
        names = ", ".join(sorted(one.name for one in threading.enumerate()))
        return f"an import has started threads: {names}"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "an import has initialised CUDA"
    return None


def serve(channel: socket.socket, device: str, given: dict[str, str], looked_at: set[str]) -> int:
    """Fork until the other side goes. ``given`` is the environment from before the imports."""
    added = {name: value for name, value in os.environ.items() if given.get(name) != value}
    while True:
        try:
            message, fds = wire.receive(channel)
        except wire.Closed:
            return 0
        except ValueError as error:
            wire.send(channel, {"kind": "refused", "reason": str(error)})
            continue
        try:
            refusal = why_not(message, given, looked_at)
            if refusal:
                wire.send(channel, {"kind": "refused", "reason": refusal})
                continue
            message["env"] = with_added(message["env"], added)
            start = EngineStart.read(message, fds, device)
            pids = fork_orphan(start)
            if pids is None:
                fds = []
                channel.close()
                return become_engine(start)
            wire.send(channel, {"kind": "forked", "pid": pids[0], "engine": pids[1]})
        except (OSError, KeyError, TypeError, ValueError) as error:
            wire.send(channel, {"kind": "refused", "reason": f"{type(error).__name__}: {error}"})
        finally:
            _close(fds)


def with_added(env: Mapping[str, str], added: Mapping[str, str]) -> dict[str, str]:
    """An engine's environment with what the imports have set, which is as it would have been in its
    own process; what is read later is the engine's own all the same."""
    return {**env, **{n: v for n, v in added.items() if n not in READ_LATE or n not in env}}


def why_not(message: dict[str, Any], given: dict[str, str], looked_at: set[str]) -> str | None:
    """Why an engine cannot be forked from here, or ``None``."""
    different = differences(given, message["env"], looked_at)
    if different:
        return f"its environment differs in {', '.join(different[:5])}"
    names = {str(arg).partition("=")[0].replace("_", "-") for arg in message["args"]}
    refused = sorted(names & REFUSED_FLAGS)
    if refused:
        return f"{refused[0]} needs a process of its own"
    return None


def preload(device: str, models: Iterable[str]) -> list[str]:
    """Import what an engine needs; returns what was not there. Raises ``ImportError`` without
    what no engine can be forked."""
    for name in (*REQUIRED, *WORKERS[device]):
        importlib.import_module(name)
    missing = []
    for name in (*USUAL, *_model_modules(models)):
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001 -- the engine imports it itself, or needs it not
            missing.append(f"{name}: {error}")
    return missing


def _model_modules(models: Iterable[str]) -> Iterator[str]:
    """The modules of vLLM that hold the architectures of models on this disk."""
    from vllm.model_executor.models.registry import ModelRegistry

    for model in models:
        try:
            config = json.loads((Path(model) / "config.json").read_bytes())
            architectures = config.get("architectures") or []
        except (OSError, ValueError, AttributeError):
            continue
        for architecture in architectures:
            module = getattr(ModelRegistry.models.get(architecture), "module_name", None)
            if isinstance(module, str):
                yield module


@contextmanager
def watched_environment() -> Iterator[set[str]]:
    """Collect the names of environment variables that are looked at, by ``os.environ``."""
    seen: set[str] = set()
    kind = type(os.environ)
    original = kind.__getitem__

    def look(self: Any, key: Any) -> Any:
        seen.add(key if isinstance(key, str) else os.fsdecode(key))
        return original(self, key)

    kind.__getitem__ = look  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        kind.__getitem__ = original  # type: ignore[method-assign]


def differences(
    ours: Mapping[str, str], theirs: Mapping[str, str], looked_at: Iterable[str]
) -> list[str]:
    """Names of variables that differ and were read by the imports, or may have been."""
    read = set(looked_at)
    return sorted(
        name
        for name in (ours.keys() | theirs.keys()) - READ_LATE
        if ours.get(name) != theirs.get(name) and (name in read or name.startswith(NATIVE_PREFIXES))
    )


def _rehearse(device: str) -> None:
    """Do once what every worker would do for itself."""
    if device != "cpu":
        return
    from vllm.platforms import current_platform

    register = getattr(current_platform, "register_triton_kernel_overrides", None)
    if register is not None:
        register()
        type(current_platform).register_triton_kernel_overrides = classmethod(lambda cls: None)


def _close(fds: list[int]) -> None:
    for fd in fds:
        with suppress(OSError):
            os.close(fd)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
