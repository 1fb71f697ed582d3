"""What all parts of one worker process share: its event loop, settings, counters and ledger.

Connections, requests and pools are given the context, not the worker that composes them.
"""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable
from typing import Any, Final

from gateway.datapath import metrics
from gateway.datapath.messages import FailureReport, ToControl, WakeSignal, WorkerConfig
from gateway.datapath.protocol.errors import Reason
from gateway.datapath.protocol.openai import PROXIED
from gateway.datapath.shared import Shared
from router.ledger import Ledger

# The other workers' inflight figures may be this old when a replica is picked.
_LEDGER_AGE_S: Final = 0.001
_REPORT_INTERVAL_S: Final = 0.5
_MOST_SILENT_MS: Final = 300.0
_MAX_REPORTED_REPLICAS: Final = 4096


class WorkerContext:
    """See the module. ``now`` is the event loop's clock, in seconds; ``random`` gives numbers in
    [0, 1). ``gateway`` and ``router`` are sections of the settings. ``send`` takes messages for
    the control process, ``nudge`` wakes another worker; ``is_orphaned`` says that the control
    process is gone, so that no engine will be woken any more."""

    def __init__(
        self,
        loop: Any,
        config: WorkerConfig,
        shared: Shared,
        send: Callable[[ToControl], None],
        nudge: Callable[[int], None],
        random: Callable[[], float],
    ) -> None:
        self.index = config.index
        self.loop = loop
        self.now: Callable[[], float] = loop.time
        self.shared = shared
        self.random = random
        self.nudge = nudge
        self.draining = False
        self.is_orphaned = False
        self.started_wall_s = int(time.time())
        self.replica_slots = 0
        self.buffered_bytes = 0
        self._counters_row: Any = shared.worker_counters(self.index)
        self.counters: list[int] = list(self._counters_row)
        requests, tokens, opened = shared.replica_rows(self.index)
        others = self._read_others if shared.workers > 1 else None
        self.ledger = Ledger(requests, tokens, opened, others)
        self._ledger_read_s = 0.0
        self._send = send
        self._reported_s: dict[str, float] = {}
        self._id_prefix = os.urandom(8).hex().encode() + b"%02x" % self.index
        self._ids = 0
        self.configure(config)

    def configure(self, config: WorkerConfig) -> None:
        """Take other settings from now on."""
        self.gateway = config.gateway
        self.router = config.router
        self.proxied = PROXIED | {path.encode() for path in config.gateway.proxied_paths}
        self._cors = frozenset([origin.encode() for origin in config.gateway.cors_allow_origins])

    # To the control process

    def send_wake_signal(self, pool: str) -> None:
        """Report that a request waits for a replica of the pool."""
        self._send(WakeSignal(pool=pool))

    def report_failure(self, replica: str) -> None:
        """Report that a replica failed a request, at most twice a second for each replica."""
        now = self.now()
        if now - self._reported_s.get(replica, -1e9) >= _REPORT_INTERVAL_S:
            if len(self._reported_s) > _MAX_REPORTED_REPLICAS:
                self._reported_s.clear()
            self._reported_s[replica] = now
            self._send(FailureReport(replica=replica))

    # Counters and ledger

    def count_rejection(self, reason: Reason, status: int) -> None:
        """Count an answer that the gateway gave to a request that named no pool."""
        self.counters[metrics.WORKER_REASON_INDEX[reason]] += 1
        self.counters[metrics.worker_code_index(status)] += 1

    def publish_counters(self) -> None:
        """Copy this worker's own counters into shared memory."""
        self.counters[metrics.BUFFERED_BYTES] = self.buffered_bytes
        self._counters_row[:] = array("q", self.counters)

    def refresh_ledger(self) -> None:
        """Read the other workers' inflight figures again where ours are too old."""
        now = self.now()
        if now - self._ledger_read_s >= _LEDGER_AGE_S:
            self._ledger_read_s = now
            self.ledger.refresh()

    def responds(self, worker: int) -> bool:
        """Whether another worker's event loop turns: one that hangs must not hold up the line."""
        return self.now() * 1000.0 - self.shared.last_beat_ms(worker) < _MOST_SILENT_MS

    def _read_others(self) -> tuple[list[int], list[int], list[int]]:
        return self.shared.other_rows(self.index, self.replica_slots)

    # What responses contain

    @staticmethod
    def wall_s() -> int:
        """The time of day, in seconds since the epoch."""
        return int(time.time())

    def next_request_id(self) -> bytes:
        """An id for a request that brought none, unique over workers and restarts."""
        self._ids += 1
        return b"req-%b%08x" % (self._id_prefix, self._ids)

    def cors_lines(self, origin: bytes | None) -> bytes:
        """The CORS lines for a request's ``Origin``, each ending in CRLF; none where it has none
        or it is not allowed (the browser then refuses)."""
        if origin is None or not (origin in self._cors or b"*" in self._cors):
            return b""
        return (
            b"access-control-allow-origin: " + origin + b"\r\nvary: origin\r\n"
            b"access-control-expose-headers: x-request-id, request-id, "
            b"x-tidegate-reason, retry-after\r\n"
        )
