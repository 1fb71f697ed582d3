"""A history's writer that writes at once, in the caller's thread, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoscaler.signals.history import HistoryStore

MAX_AGE_S = 30 * 86_400.0


class DirectWriter:
    """``wall_s`` gives Unix time. While ``error`` is set nothing can be written."""

    def __init__(self, path: Path, wall_s: Callable[[], float]) -> None:
        self.store = HistoryStore(path, max_age_s=MAX_AGE_S, max_bytes=1 << 26)
        self.error: str | None = None
        self.writes = 0
        self._wall_s = wall_s

    def put(self, change: Callable[[Any], None]) -> None:
        self.writes += 1
        self.store.write([change], self._wall_s())
