"""What the fork server imports, and which environment variables that looked at."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
