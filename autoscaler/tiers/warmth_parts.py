"""The parts of a node that ``warmth`` brings together, as far as it needs to know them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from autoscaler.backends.base import ReplicaSpec
from autoscaler.settings import PoolSettings
from autoscaler.tiers.preparer import Report
from modelcache.types import FileRange, Priority, Progress

REPORT_S = 0.1
SMALL_BYTES = 64 * 1024 * 1024
"""Files of up to this size beside the weights (tokenizer, configuration) are kept warm too."""

Cancelled = Callable[[], bool]
OnProgress = Callable[[Progress], None]


class Cache(Protocol):
    """The model cache (``modelcache.cache.ModelCache``). Blocks; thread-safe."""

    def find(self, url: str, revision: str | None = None) -> Any:
        """The newest whole revision that is here, or ``None``."""
        ...

    def preload(
        self,
        url: str,
        *,
        revision: str | None = None,
        priority: Priority = Priority.PRELOAD,
        on_progress: OnProgress | None = None,
        cancelled: Cancelled | None = None,
    ) -> Any:
        """Fetch it, unless it is here. Raises ``CacheError``."""
        ...

    def lease(self, model: Any, holder: str) -> Any:
        """A context manager that keeps it from being evicted."""
        ...

    def evict(self, url: str, revision: str | None = None) -> int:
        """Take it from the disk. Raises ``InUse``."""
        ...


class Keeper(Protocol):
    """Whoever keeps pages (``modelcache.pagecache.holder.PageKeeper``)."""

    def keep(self, key: str, files: Sequence[FileRange]) -> None:
        """Keep files in the page cache. Raises ``NoSpace`` past its budget."""
        ...

    def drop(self, key: str) -> bool:
        """Keep them no longer."""
        ...

    def close(self) -> None:
        """Let everything go."""
        ...


class Standbys(Protocol):
    """Whoever keeps engines forked (``autoscaler.backends.process.backend.ProcessBackend``)."""

    async def standby(self, spec: ReplicaSpec) -> None:
        """Have one engine of this pool stand by. Raises ``BackendError``."""
        ...

    async def end_standby(self, pool: str) -> None:
        """End it, if there is one."""
        ...

    def standbys(self) -> Sequence[Any]:
        """Those that live, each with the name of its ``pool``."""
        ...


Bring = Callable[[PoolSettings, Path], object]
"""Unpacks what a model at a path has brought along for a pool's engines. Blocks."""
Prewarm = Callable[[Sequence[FileRange], OnProgress, Cancelled], object]
"""Reads files into the page cache (``modelcache.pagecache.residency.prewarm``)."""
Transform = Callable[[str, Any, str, OnProgress, Cancelled], contextlib.AbstractContextManager[Any]]
"""The model that a pool names (with its ``path``), after its preparation steps, from what the cache
has of it (or a directory ``in_place``); held for whoever is named, as long as its context is open.
The same model where there are no steps. Blocks."""


def make_teller(report: Report) -> OnProgress:
    """``report`` for threads, told on this event loop, a few times a second at most."""
    running = asyncio.get_running_loop()
    told: list[tuple[float, str]] = []

    def tell(progress: Progress) -> None:
        now_s = time.monotonic()
        if told and told[0][1] == progress.phase and now_s - told[0][0] < REPORT_S:
            return
        told[:] = [(now_s, progress.phase)]
        with contextlib.suppress(RuntimeError):  # the loop has ended
            running.call_soon_threadsafe(report, progress)

    return tell


def list_files(directory: Path) -> list[FileRange]:
    """The files of a model that an engine reads: weights, and what is small beside them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    weights = [path for path in files if path.suffix == ".safetensors"]
    weights = weights or [path for path in files if path.suffix in {".bin", ".gguf", ".pt"}]
    small = [path for path in files if path not in weights and path.stat().st_size <= SMALL_BYTES]
    return [FileRange(path=str(path)) for path in (*weights, *small)]


def silent(progress: Progress) -> None:
    """Nobody waits for it."""
