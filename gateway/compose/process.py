"""How a process of ours begins and ends: where it logs to, and what signals do to it."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from gateway.settings.errors import Problem
from gateway.settings.load import ConfigError, LoadedSettings, find_service_links
from gateway.settings.schema import Settings
from modelcache.store.files import make_private
from modelcache.types import FULL, CacheError

log = logging.getLogger("tidegate")

ENDING = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
"""The signals that would end a process that does not take them."""

# A signal to a whole process group can reach us twice, directly and passed on by our parent (make
# does so): within this time it is one request to stop, not a second one to hurry.
_ONE_SIGNAL_S = 1.0
_RECORD_BYTES = 4096
"""What is written where something shall be written: a full disk still takes empty files."""


def set_up_logging(level: str) -> None:
    """Everything to standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpx2", "httpcore", "httpcore2", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def settle(*, young: int = 10_000) -> None:
    """Said once all is there that lives as long as the process: the garbage collector visits it no
    more. The control process has hundreds of objects for each pool, and to visit those of a
    thousand takes most of a second, in which nothing is decided. ``young`` is how many more objects
    there may be than at the last visit until the newest are visited."""
    gc.freeze()
    gc.set_threshold(young, 50, 50)


def child_environ(settings: Settings, environ: Mapping[str, str]) -> dict[str, str]:
    """Our environment as those of engines and preparation steps are made of it: without our own
    variables, the secrets and keys that the settings name, and what Kubernetes tells of services
    (vLLM does not start with a ``VLLM_PORT`` of that kind)."""
    left_out = find_service_links(environ) | {settings.modelcache.peer_token_env}
    left_out |= {pool.static.api_key_env for pool in settings.pools if pool.static.api_key_env}
    return {
        name: value
        for name, value in environ.items()
        if name not in left_out and not name.startswith("TIDEGATE_")
    }


def _write_a_record(directory: Path) -> None:
    with tempfile.TemporaryFile(dir=directory) as file:
        file.write(bytes(_RECORD_BYTES))


def check_writable(
    loaded: LoadedSettings,
    field: str,
    directory: Path,
    *,
    may_be_full: bool = False,
    write: Callable[[Path], None] = _write_a_record,
) -> None:
    """Raise ``ConfigError`` where nothing can be written in the directory that ``field`` names, or
    another user owns it; it is made where it is not there, for our user alone, as it is made where
    others can enter it.

    A volume of another user would otherwise be found out by the first thing that is written. With
    ``may_be_full`` a full disk is only warned about.
    """
    try:
        make_private(directory)
        write(directory)
    except CacheError as error:
        problem = Problem(field, str(error), loaded.origins[field], value=str(directory))
        raise ConfigError([problem]) from error
    except OSError as error:
        is_file = isinstance(error, FileExistsError | NotADirectoryError)
        why = "it is no directory" if is_file else error.strerror or str(error)
        if may_be_full and error.errno in FULL:
            log.warning("%s = %s: %s; what is there is served", field, directory, why)
            return
        message = f"cannot be written to: {why} (as user {os.geteuid()})"
        problem = Problem(field, message, loaded.origins[field], value=str(directory))
        raise ConfigError([problem]) from error


def take_signals(
    stop: asyncio.Event,
    hurry: asyncio.Event,
    reload: Callable[[], None] | None = None,
    keep: asyncio.Event | None = None,
) -> None:
    """The first SIGINT or SIGTERM sets ``stop``, a later one ``hurry``; SIGHUP calls ``reload``,
    and SIGQUIT sets ``keep`` too, where there is something to keep.

    SIGHUP is also what a terminal sends that is closed: then it is a signal to stop, unless it was
    ignored before (nohup). It ends no process at once; one that cannot reload says so.
    """
    running = asyncio.get_running_loop()
    first_s = math.inf

    def on_signal() -> None:
        nonlocal first_s
        if not stop.is_set():
            first_s = running.time()
            stop.set()
        elif running.time() - first_s >= _ONE_SIGNAL_S:
            hurry.set()

    def on_quit() -> None:
        if keep is not None and not stop.is_set():
            keep.set()
        on_signal()

    def take(number: signal.Signals, callback: Callable[[], None]) -> None:
        # Not the loop's own way: it gives signals their defaults back when it closes, and one more
        # would then kill a process that has stopped in order.
        def handle(*_: object) -> None:
            if not running.is_closed():
                running.call_soon_threadsafe(callback)

        signal.signal(number, handle)

    take(signal.SIGINT, on_signal)
    take(signal.SIGTERM, on_signal)
    on_terminal = sys.stderr.isatty()
    was_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN

    def on_hangup() -> None:
        if on_terminal and not sys.stderr.isatty():
            if not was_ignored:
                on_signal()
        elif stop.is_set():
            pass
        elif reload is not None:
            reload()
        else:
            log.warning("SIGHUP: this process reads its settings at its start only; restart it")

    take(signal.SIGHUP, on_hangup)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # held back since the start
    take(signal.SIGQUIT, on_quit)
