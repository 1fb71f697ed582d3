"""How a process of ours begins and ends: where it logs to, and what signals do to it."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import sys

# A signal to a whole process group can reach us twice, directly and passed on by our parent (make
# does so): within this time it is one wish to stop, not a second one to hurry.
_ONE_SIGNAL_S = 1.0


def set_up_logging(level: str) -> None:
    """Everything to standard error, a line each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


def take_signals(stop: asyncio.Event, hurry: asyncio.Event) -> None:
    """The first SIGINT or SIGTERM sets ``stop``, a later one ``hurry``."""
    running = asyncio.get_running_loop()
    first_s = math.inf

    def on_signal() -> None:
        nonlocal first_s
        if not stop.is_set():
            first_s = running.time()
            stop.set()
        elif running.time() - first_s >= _ONE_SIGNAL_S:
            hurry.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        running.add_signal_handler(number, on_signal)
