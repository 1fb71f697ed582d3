"""The fork server: imports vLLM once, then forks engines on demand until its socket ends.

Run under the engine's Python with one argument, the number of the socket it was given. It never
touches a GPU and has one Python thread, so that what it forks can do everything a fresh process
can.
"""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import time
import warnings
from collections.abc import Mapping
from typing import Any

from loaders.engines.vllm.forkserver import wire
from loaders.engines.vllm.forkserver.child import EngineStart, become_engine, fork_orphan
from loaders.engines.vllm.forkserver.preload import (
    READ_LATE,
    differences,
    preload,
    watched_environment,
)

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
        try:
            os.close(fd)
        except OSError:
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
