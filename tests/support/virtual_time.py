"""An event loop whose time jumps to the next timer as soon as nothing else is to be done.

Hours pass in milliseconds, in the same order every time. Threads must not be used on it: it would
not wait for them.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")

START_S = 1_000.0
LIMIT_S = 60.0
"""Of real time, for one story. pytest-timeout cannot end one that never ends: its interrupt may
come while a task runs, which takes it for its own error, and the others go on for ever."""


class JumpingSelector(selectors.SelectSelector):
    """Does not wait: tells the loop how long it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = START_S
        self._end_s = time.monotonic() + LIMIT_S

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if time.monotonic() > self._end_s:
            raise RuntimeError(f"it still runs at {self.now_s - START_S:g} s of virtual time")
        if not ready and timeout is None:
            raise RuntimeError("everything waits, and no timer will ever end that")
        if not ready and timeout:
            self.now_s += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    def __init__(self) -> None:
        self._jumping = JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s


def run_virtual(work: Coroutine[Any, Any, Result]) -> Result:
    """Run to the end on virtual time; ``asyncio.sleep`` and ``loop.time`` are virtual in it."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)


def now() -> float:
    """The virtual time."""
    return asyncio.get_running_loop().time()


def wall_s() -> float:
    """The virtual time as Unix time."""
    return 1_700_000_000.0 + now()
