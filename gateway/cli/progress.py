"""How far something is, on standard error: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from gateway.terminal import complain, duration, size
from modelcache.types import Progress

PLAIN_S = 10.0
"""Seconds between two lines where there is no terminal."""


class ProgressBar:
    """Shows one piece of work while the ``with`` block lasts; nothing of it stays on a terminal.

    ``show`` may be called as often as one likes, from any thread.
    """

    def __init__(self, what: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._what = what
        self._clock = clock
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._bar: Any = None
        self._task: Any = None
        self._said_s = clock()

    def __enter__(self) -> ProgressBar:
        if self._live:
            self._begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _begin(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bars

        self._bar = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            transient=True,
            expand=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self._what, total=None, figures="")

    def show(self, progress: Progress) -> None:
        """Where it is now."""
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=f"{self._what}: {progress.phase}",
                completed=progress.bytes_done,
                total=progress.bytes_total,
                figures=figures(progress),
            )
        elif self._clock() - self._said_s >= PLAIN_S:
            self._said_s = self._clock()
            complain(" ".join(f"{self._what}: {progress.phase} {figures(progress)}".split()))


def figures(progress: Progress) -> str:
    """``3.1 of 14.9 GB, 412 MB/s, 29 s left``, as far as it is known."""
    parts = []
    if progress.bytes_total:
        done, total = progress.bytes_done, progress.bytes_total
        parts.append(f"{size(done)} of {size(total)}")
    elif progress.bytes_done:
        parts.append(size(progress.bytes_done))
    if progress.rate_bytes_s:
        parts.append(f"{size(progress.rate_bytes_s)}/s")
        if progress.bytes_total:
            left_s = (progress.bytes_total - progress.bytes_done) / progress.rate_bytes_s
            parts.append(f"{duration(left_s)} left")
    if progress.detail:
        parts.append(progress.detail)
    return ", ".join(parts)
