"""Leases that are held and released together, also by threads that come with them too late."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

from modelcache.types import Cancelled

Entered = TypeVar("Entered")


class Leases:
    """What is held together until it is closed, in parts that may be closed before. Thread-safe.

    A thread cannot be cancelled while it takes a lease. One that comes with it too late, because
    its work was cancelled, finds these closed, and the lease is released at once.
    """

    def __init__(self, whole: Leases | None = None) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._held: list[AbstractContextManager[Any]] = []
        self._parts: set[Leases] = set()
        self._whole = whole

    def part(self) -> Leases:
        """Leases that are closed with these, unless they are before."""
        part = Leases(self)
        with self._lock:
            part._closed = self._closed
            if not self._closed:
                self._parts.add(part)
        return part

    def enter(self, context: AbstractContextManager[Entered]) -> Entered:
        """Enter it, and hold it until ``close``. Blocks as long as that takes. Raises
        ``Cancelled``, with nothing held, where these are closed by then."""
        entered = context.__enter__()
        with self._lock:
            if not self._closed:
                self._held.append(context)
                return entered
        context.__exit__(None, None, None)
        raise Cancelled("the work that took this lease was cancelled")

    def refuse(self) -> bool:
        """Hold nothing more; whether there is something for ``close`` to release. Does not
        block."""
        with self._lock:
            self._closed = True
            parts, holds = tuple(self._parts), bool(self._held)
        for part in parts:
            holds |= part.refuse()
        return holds

    def close(self) -> None:
        """Release all of it, and hold nothing any more. Blocks."""
        with self._lock:
            self._closed = True
            parts, self._parts = self._parts, set()
            held, self._held = self._held, []
        if self._whole is not None:
            self._whole._forget(self)
        with ExitStack() as stack:  # one that cannot be released does not keep the others
            for context in held:
                stack.push(context)
            for part in parts:
                stack.callback(part.close)

    def _forget(self, part: Leases) -> None:
        with self._lock:
            self._parts.discard(part)
