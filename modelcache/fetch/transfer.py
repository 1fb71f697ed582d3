"""Files from a source and from peers into partial files, piece by piece, until none is missing.

One ``Transfer`` serves a process: its downloads share a ``TransferState``.
``modelcache.fetch.download`` is one of them under way.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from modelcache.bandwidth.budget import Budget
from modelcache.fetch.download import Download, Totals, TransferState, TransferTimeouts
from modelcache.fetch.readers import PeerReader, SourceReader
from modelcache.peers.group import PeerGroup
from modelcache.ports import IsCancelled, Source
from modelcache.settings import ModelCacheSettings
from modelcache.store.partial_files import Partial
from modelcache.types import Priority, Progress, RemoteFile


class Transfer:
    """Downloads, sharing what there is. Thread-safe."""

    def __init__(
        self,
        settings: ModelCacheSettings,
        *,
        budget: Budget | None = None,
        peers: PeerGroup | None = None,
        clock: Callable[[], float] = time.monotonic,
        timeouts: TransferTimeouts = TransferTimeouts(),  # noqa: B008 - it is frozen
    ) -> None:
        self.state = TransferState(
            settings, budget=budget, peers=peers, clock=clock, timeouts=timeouts
        )
        self._running: dict[str, int] = {}
        self._lock = threading.Lock()

    def run(
        self,
        source: Source,
        files: Sequence[tuple[RemoteFile, Partial]],
        *,
        priority: Priority = Priority.PRELOAD,
        on_progress: Callable[[Progress], None] | None = None,
        cancelled: IsCancelled | None = None,
    ) -> None:
        """Fetch every missing piece of ``files``; blocks until all are committed.

        ``on_progress`` is called from this thread a few times a second, ``cancelled`` more often.
        Raises ``SourceError`` where the source fails a piece ``retries`` + 1 times in a row or says
        that asking again is of no use; ``Cancelled``; ``Damaged`` where a file that became whole
        is not what its source says (run again with a fresh ``Partial``: it then comes from the
        source alone); ``CacheError`` where the disk fails.
        """
        model = source.ref.url
        with self._lock:
            self._running[model] = self._running.get(model, 0) + 1
        try:
            download = Download(
                self.state,
                source,
                files,
                priority=priority,
                on_progress=on_progress or (lambda progress: None),
                cancelled=cancelled or (lambda: False),
            )
            download.run(SourceReader(download).run, PeerReader(download).run)
        finally:
            with self._lock:
                self._running[model] -= 1
                last = not self._running[model]
                if last:
                    del self._running[model]
            if last:
                self.state.budget.forget(model)

    def totals(self) -> Totals:
        """What has been read so far."""
        return self.state.totals()
