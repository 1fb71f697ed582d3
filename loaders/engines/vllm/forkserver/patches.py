"""What a forked engine does otherwise than vLLM would by itself, and why it may.

Nothing here changes an answer. Workers are forked where vLLM would start a Python and import it all
again; work that depends on nothing else (tokenizer, chat template, HTTP application) is done while
the engine core starts instead of before and after it; memory that must be zero is taken from the
kernel, which hands it out zeroed, when it is used. Each step looks for what it is about to replace
and is left out, with a line in the log, where this vLLM has it otherwise.
"""

from __future__ import annotations

import functools
import mmap
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from loaders.engines.vllm.forkserver.wire import (
    IMPORTING,
    LOADING,
    PARKED,
    SERVING,
    WARMING,
    Marks,
)

Hold = Callable[[], None]

CONTEXT_USERS = (
    "vllm.utils.system_utils",
    "vllm.v1.engine.coordinator",
    "vllm.v1.engine.utils",
    "vllm.v1.executor.multiproc_executor",
)
"""Modules that know vLLM's ``get_mp_context`` by name. The CPU platform makes it ``spawn``."""


def say(text: str) -> None:
    """One line to the engine's log."""
    sys.stderr.write(f"tidegate: {text}\n")
    sys.stderr.flush()


def patch_vllm(marks: Marks, *, device: str, hold: Hold | None) -> None:
    """Prepare this process, which is about to run vLLM's server. ``hold`` waits, in the process
    that is about to load weights, until it may."""
    _fork_workers()
    steps: list[tuple[str, Callable[[], None]]] = [
        ("marks", lambda: _place_marks(marks)),
        ("overlap", _overlap),
        ("processor look-up", _look_before_loading),
        ("model look-up", lambda: _ask_class_here(device)),
    ]
    if device == "cpu":
        steps += [("threads", _fit_threads), ("lazy KV cache", _take_zeros_lazily)]
    for name, step in steps:
        try:
            step()
        except (AttributeError, ImportError) as error:
            say(f"{name} left out, this vLLM has it otherwise: {error}")
    if hold is not None:
        _place_hold(hold, device)


def share_port(arguments: list[str]) -> None:
    """Have the server bind its port beside the socket by which Tidegate keeps other users from it.

    vLLM sets SO_REUSEPORT only for several API servers. Its command line has this function's text.
    """
    import socket

    port, bind = int(arguments[arguments.index("--port") + 1]), socket.socket.bind

    def bind_shared(self: socket.socket, address: Any) -> None:
        if address[1:2] == (port,):
            self.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bind(self, address)

    setattr(socket.socket, "bind", bind_shared)  # noqa: B010 -- a method, to mypy


def _fork_workers() -> None:
    """Have all processes of the engine forked. Raises when that is not possible here."""
    context = multiprocessing.get_context("fork")
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
    for name in CONTEXT_USERS:
        module = sys.modules[name]
        if not hasattr(module, "get_mp_context"):
            raise AttributeError(f"{name} has no get_mp_context")
        module.get_mp_context = lambda: context  # type: ignore[attr-defined]


def _place_marks(marks: Marks) -> None:
    import uvicorn
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.worker.gpu_worker import Worker

    def around(owner: Any, name: str, before: str, after: str = "") -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def marked(*args: Any, **kwargs: Any) -> Any:
            marks(before)
            result = original(*args, **kwargs)
            if after:
                marks(after)
            return result

        setattr(owner, name, marked)

    around(AsyncEngineArgs, "create_engine_config", f"{IMPORTING}: configuration")
    around(EngineCore, "__init__", f"{IMPORTING}: engine core")
    around(Worker, "load_model", LOADING, WARMING)
    startup = uvicorn.Server.startup

    async def started(*args: Any, **kwargs: Any) -> None:
        await startup(*args, **kwargs)
        marks(SERVING)

    setattr(uvicorn.Server, "startup", started)  # noqa: B010 -- a method, to mypy


def _fit_threads() -> None:
    """What ``OMP_NUM_THREADS`` and its kin would do in a Python that is started: the library has
    read them long ago. vLLM sets them around the start of each worker."""
    import torch
    from vllm.v1.executor.multiproc_executor import WorkerProc

    original = WorkerProc.worker_main

    @functools.wraps(original)
    def worker_main(*args: Any, **kwargs: Any) -> None:
        places = os.environ.get("OMP_PLACES", "").strip("{}")
        number = os.environ.get("OMP_NUM_THREADS", "")
        if places:
            os.sched_setaffinity(0, [int(core) for core in places.split(",")])
        if number.isdigit():
            torch.set_num_threads(int(number))
        if places:
            _bind_threads([int(core) for core in places.split(",")])
        original(*args, **kwargs)

    WorkerProc.worker_main = staticmethod(worker_main)


def _bind_threads(cores: list[int]) -> None:
    """One core for each compute thread, this one first, as ``OMP_PROC_BIND`` would."""
    import torch

    if len(cores) < 2:
        return
    before = set(os.listdir("/proc/self/task"))
    size = len(cores) * 65_536  # large enough for every thread to be given a part
    torch.ones(size).add_(1.0)
    threads = sorted(set(os.listdir("/proc/self/task")) - before, key=int)
    os.sched_setaffinity(0, cores[:1])
    for thread, core in zip(threads, cores[1:], strict=False):
        os.sched_setaffinity(int(thread), [core])


def _take_zeros_lazily() -> None:
    """The KV cache as fresh pages of the kernel, which are zero: writing zeros to each takes about
    a second per GiB, and most are not used for long."""
    import torch
    from vllm.v1.worker import gpu_model_runner, utils

    original = utils.allocate_kv_cache
    zeros = torch.zeros

    def lazy_zeros(*args: Any, **kwargs: Any) -> Any:
        size = args[0] if len(args) == 1 else None
        on_cpu = str(kwargs.get("device")) == "cpu" and kwargs.keys() == {"dtype", "device"}
        if not (on_cpu and isinstance(size, int) and size > 0 and kwargs["dtype"] is torch.int8):
            return zeros(*args, **kwargs)
        pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=torch.int8)

    @functools.wraps(original)
    def allocate_kv_cache(*args: Any, **kwargs: Any) -> Any:
        torch.zeros = lazy_zeros
        try:
            return original(*args, **kwargs)
        finally:
            torch.zeros = zeros

    for module in (utils, gpu_model_runner):
        if getattr(module, "allocate_kv_cache", None) is original:
            module.allocate_kv_cache = allocate_kv_cache


def _overlap() -> None:
    """Start the engine core first, and do meanwhile what vLLM does before and after that."""
    from vllm.entrypoints.launchers.api_server import entry
    from vllm.v1.engine import async_llm

    serve, make_app = entry.run_server_worker, entry.build_app
    initialize = async_llm.AsyncLLM.__init__
    make_renderer = async_llm.renderer_from_config
    make_client = async_llm.EngineCoreClient.make_async_mp_client
    meanwhile = SimpleNamespace(args=None, work=None, client=None)

    async def run_server_worker(listen_address: Any, sock: Any, args: Any, **kwargs: Any) -> None:
        meanwhile.args = args
        os.register_at_fork(after_in_child=sock.close)  # the port is this process's alone
        await serve(listen_address, sock, args, **kwargs)

    @functools.wraps(initialize)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        config = kwargs.get("vllm_config")
        if args or config is None or not _overlaps(config, kwargs.get("client_addresses")):
            initialize(self, *args, **kwargs)
            return
        meanwhile.work = _Meanwhile(config, meanwhile.args, make_renderer, make_app)
        names = ("executor_class", "log_stats", "client_addresses", "client_count", "client_index")
        given = {name: kwargs[name] for name in names if name in kwargs}
        client = make_client(vllm_config=config, renderer=meanwhile.work, **given)
        meanwhile.client = client
        try:
            initialize(self, **kwargs)
        except BaseException:
            client.shutdown()
            raise

    def renderer_from_config(config: Any) -> Any:
        work = meanwhile.work
        renderer = None if work is None else work.take("renderer", config)
        return make_renderer(config) if renderer is None else renderer

    def make_async_mp_client(*args: Any, **kwargs: Any) -> Any:
        client, meanwhile.client = meanwhile.client, None
        return make_client(*args, **kwargs) if client is None else client

    def build_app(args: Any, supported_tasks: Any = None, model_config: Any = None) -> Any:
        work, app = meanwhile.work, None
        if work is not None and args is work.args and tuple(supported_tasks or ()) == work.tasks:
            app = work.take("app", work.config)
        return make_app(args, supported_tasks, model_config) if app is None else app

    entry.run_server_worker, entry.build_app = run_server_worker, build_app
    async_llm.AsyncLLM.__init__ = init
    async_llm.renderer_from_config = renderer_from_config
    async_llm.EngineCoreClient.make_async_mp_client = staticmethod(make_async_mp_client)


def _overlaps(config: Any, addresses: Any) -> bool:
    """Only the ordinary case, one engine core for a model that reads text."""
    model = config.model_config
    return bool(
        not addresses
        and config.parallel_config.data_parallel_size == 1
        and config.observability_config.otlp_traces_endpoint is None
        and model.runner_type == "generate"
        and not model.is_multimodal_model
        and not model.is_encoder_decoder
    )


class _Meanwhile:
    """The work done beside the start of the engine core, by a thread.

    vLLM's client calls ``start_mm_warmup_in_background`` of what it takes for the renderer once it
    has forked the engine core; no thread may run before that.
    """

    tasks = ("generate",)

    def __init__(self, config: Any, args: Any, make_renderer: Any, make_app: Any) -> None:
        self.config, self.args = config, args
        self._make_renderer, self._make_app = make_renderer, make_app
        self._made: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._work, name="tidegate-meanwhile", daemon=True)

    def start_mm_warmup_in_background(self) -> None:
        self._thread.start()

    def take(self, name: str, config: Any) -> Any:
        """What was made, once: ``None`` where that failed; it is then made in the open, and fails
        there as it should."""
        if self._thread.ident is not None:
            self._thread.join()
        return self._made.pop(name, None) if config is self.config else None

    def _work(self) -> None:
        try:
            renderer = self._make_renderer(self.config)
            self._made["renderer"] = renderer
            if self.args is not None:
                self._warm(renderer)
                self._made["app"] = self._make_app(self.args, self.tasks, self.config.model_config)
        except Exception as error:  # noqa: BLE001 -- tried again by vLLM itself, in the open
            say(f"not done beside the start of the engine: {error!r}")

    def _warm(self, renderer: Any) -> None:
        """Read and compile the chat template, which vLLM does once the engine core is up."""
        from vllm.entrypoints.launchers.cli_args import resolve_default_chat_template_kwargs
        from vllm.renderers.chat_utils import load_chat_template
        from vllm.renderers.params import ChatParams

        renderer.warmup(
            ChatParams(
                chat_template=load_chat_template(self.args.chat_template),
                chat_template_content_format=self.args.chat_template_content_format,
                chat_template_kwargs=resolve_default_chat_template_kwargs(self.args) or {},
            )
        )


def _look_before_loading() -> None:
    """For a chat template vLLM asks transformers for a processor, which for a model without one
    reads the whole tokenizer a second time to find that out. Its files tell it at once."""
    from vllm.renderers import hf

    original = hf._try_get_processor_chat_template

    @functools.wraps(original)
    def look(tokenizer: Any, **kwargs: Any) -> Any:
        return original(tokenizer, **kwargs) if may_have_processor(tokenizer.name_or_path) else None

    hf._try_get_processor_chat_template = look


def _ask_class_here(device: str) -> None:
    """What a model's class can do is asked of the class. vLLM starts a Python that imports
    everything for that, so that CUDA stays uninitialised; a class that is imported already touches
    no GPU, and on a CPU there is none."""
    from vllm.model_executor.models import registry

    kind, info = registry._LazyRegisteredModel, registry._ModelInfo
    original = kind.inspect_model_cls

    def ask(self: Any) -> Any:
        if device != "cpu" and self.module_name not in sys.modules:
            return original(self)
        return info.from_model_cls(self.load_model_cls())

    kind.inspect_model_cls = ask


def may_have_processor(model: str) -> bool:
    """Whether a model may come with a processor: surely not, if it is a directory in which no
    file is one's and no configuration names one."""
    directory = Path(model)
    if not directory.is_dir() or any(directory.glob("*process*")):
        return True
    for name in ("config.json", "tokenizer_config.json", "chat_template.json"):
        try:
            text = (directory / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, ValueError):
            return True
        if name == "chat_template.json" or "rocessor" in text:
            return True
    return False


def _place_hold(hold: Hold, device: str) -> None:
    """Where a parked engine waits: on a CPU with the model built and only its weights missing; on a
    GPU before the first touch of it, so that its memory stays free."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
    from vllm.v1.executor.multiproc_executor import WorkerProc

    owner: Any
    if device == "cpu":
        owner, name = DefaultModelLoader, "load_weights"
    else:
        owner, name = WorkerProc, "worker_main"
    original = getattr(owner, name)

    @functools.wraps(original)
    def held(*args: Any, **kwargs: Any) -> Any:
        hold()
        return original(*args, **kwargs)

    setattr(owner, name, staticmethod(held) if owner is WorkerProc else held)


def make_hold(marks: Marks, fd: int) -> Hold:
    """Wait until a byte can be read from ``fd``; its end means that the engine is not wanted any
    more."""

    def hold() -> None:
        marks(PARKED)
        if not os.read(fd, 1):
            os._exit(0)
        marks(LOADING)

    return hold
