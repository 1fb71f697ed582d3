"""The fork server: imports vLLM once, then forks engines on demand until its socket ends; and the
life of a forked process until it is vLLM's server.

Run under the engine's Python with one argument, the number of the socket it was given. It never
touches a GPU and has one Python thread, so that what it forks can do everything a fresh process
can.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loaders.engines.vllm.forkserver import wire
from loaders.engines.vllm.forkserver.patches import make_hold, patch_vllm, share_port
from loaders.engines.vllm.forkserver.wire import ENGINE, IMPORTING, Marks

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
NOT_STARTED = 125
GUARD_ENV = frozenset({"PATH", "LD_LIBRARY_PATH"})
"""What a guard needs of its engine's environment: its Python may need the libraries."""

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
    "loaders.engines.vllm.load_format",
    "loaders.weights.load",
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
            preload(device, settings["models"])
            _rehearse(device)
        unfit = why_unfit()
    except wire.Closed:
        return 0
    except Exception as error:  # noqa: BLE001 -- told to Tidegate, which starts engines plainly
        unfit, looked_at = f"{type(error).__name__}: {error}", set()
    if unfit:
        wire.send(channel, {"kind": "unfit", "reason": unfit})
        return 1
    warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
    gc.collect()
    gc.freeze()  # what is here now is never collected: looking at it would copy its pages
    wire.send(channel, {"kind": "ready", "seconds": time.monotonic() - began_s})
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


def preload(device: str, models: Iterable[str]) -> None:
    """Import what an engine needs, as far as it is there. Raises ``ImportError`` without what no
    engine can be forked."""
    for name in (*REQUIRED, *WORKERS[device]):
        importlib.import_module(name)
    for name in (*USUAL, *_model_modules(models)):
        with suppress(Exception):  # the engine imports it itself, or needs it not
            importlib.import_module(name)


def _model_modules(models: Iterable[str]) -> Iterator[str]:
    """The modules of vLLM that hold the architectures of models on this disk."""
    from vllm.model_executor.models.registry import ModelRegistry

    for model in models:
        try:
            config = json.loads((Path(model) / "config.json").read_bytes())
            named = config.get("architectures") if isinstance(config, dict) else None
        except (OSError, ValueError, RecursionError):
            continue
        for architecture in named if isinstance(named, list) else []:
            if not isinstance(architecture, str):
                continue  # the file is its author's, who may be anybody
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


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStart:
    """What is to be started. ``fds`` are the log, the gate, the marks and, parked, the go.
    ``guard`` is the command of the engine's guard, in which ``ENGINE`` stands for its pid."""

    args: tuple[str, ...]
    env: dict[str, str]
    cwd: str
    cpus: tuple[int, ...]
    mark: tuple[str, str]
    guard: tuple[str, ...]
    device: str
    fds: tuple[int, ...]

    @classmethod
    def read(cls, message: dict[str, Any], fds: list[int], device: str) -> EngineStart:
        """From a message. Raises ``KeyError``, ``TypeError`` or ``ValueError``."""
        if len(fds) not in (3, 4):
            raise ValueError(f"3 or 4 file descriptors are needed, not {len(fds)}")
        name, value = message["mark"]
        return cls(
            args=tuple(map(str, message["args"])),
            env={str(key): str(item) for key, item in message["env"].items()},
            cwd=str(message["cwd"]),
            cpus=tuple(map(int, message["cpus"])),
            mark=(str(name), str(value)),
            guard=tuple(map(str, message["guard"])),
            device=device,
            fds=tuple(fds),
        )


def fork_orphan(start: EngineStart) -> tuple[int, int] | None:
    """Fork an engine and its guard. Returns the pids of both, the guard's first; ``None`` in the
    engine.

    The guard is the engine's parent, and belongs to Tidegate and not to us: its own parent, a
    process in between, ends at once, and Tidegate takes in orphans. So the engine outlives the
    fork server, and Tidegate learns by the guard how it ended.
    """
    reading, writing = os.pipe2(os.O_CLOEXEC)
    middle = os.fork()
    if middle:
        os.close(writing)
        told = os.read(reading, 64).split()
        os.close(reading)
        os.waitpid(middle, 0)
        if len(told) != 2:
            raise OSError("the process in between could not fork")
        return int(told[0]), int(told[1])
    try:
        os.close(reading)
        if os.fork():
            os._exit(0)
        os.setsid()
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        guard = os.getpid()
        engine = os.fork()
        if engine == 0:
            os.close(writing)
            prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != guard:
                os._exit(NOT_STARTED)
            return None
        os.write(writing, f"{guard} {engine}".encode())
        # A small process instead of one more copy of this one; its file descriptors close with it.
        argv = [str(engine) if part == ENGINE else part for part in start.guard]
        name, value = start.mark
        needed = {key: item for key, item in start.env.items() if key in GUARD_ENV}
        os.execve(argv[0], argv, {**needed, name: value})
    except BaseException:  # noqa: BLE001 -- whatever it is, this process has no other use
        os._exit(1)


def become_engine(start: EngineStart) -> int:
    """In the forked process: wait for the gate, then be vLLM's server. Returns an exit status."""
    log, gate, told, *go = start.fds
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(log)
    restamp(*start.mark)
    if os.read(gate, 1) != b"!":
        return NOT_STARTED
    os.close(gate)
    os.environ.clear()
    os.environ.update(start.env)
    os.chdir(start.cwd)
    if start.cpus:
        os.sched_setaffinity(0, start.cpus)
    marks = Marks(told)
    marks(IMPORTING)
    hold = make_hold(marks, go[0]) if go else None
    try:
        share_port(list(start.args))
        patch_vllm(marks, device=start.device, hold=hold)
        return _serve(start.args)
    except Exception:  # noqa: BLE001 -- the engine's log is where a failed start is explained
        traceback.print_exc()
        return 1


def restamp(name: str, new: str) -> None:
    """Give this process its own value of a variable in ``/proc/self/environ``, which shows the
    memory in which the kernel once put the environment: a fork shares that with its server. So
    processes are told apart from outside as if each had been started.

    Raises ``RuntimeError`` where the variable is not there with a value of the same length.
    """
    stat = Path("/proc/self/stat").read_bytes()
    fields = stat[stat.rindex(b")") + 2 :].split()
    start, end = int(fields[47]), int(fields[48])
    memory = ctypes.string_at(start, end - start)
    prefix, value = f"{name}=".encode(), new.encode()
    for entry in memory.split(b"\0"):
        if entry.startswith(prefix) and len(entry) == len(prefix) + len(value):
            address = start + (b"\0" + memory).index(b"\0" + entry + b"\0") + len(prefix)
            ctypes.memmove(address, value, len(value))
            return
    raise RuntimeError(f"{name} cannot be found in this process's environment")


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def _serve(args: tuple[str, ...]) -> int:
    from vllm.entrypoints.launchers.api_server.entry import main

    sys.argv = ["vllm", *args]
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    with suppress(KeyboardInterrupt):
        main()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
