"""One block of memory that all processes of a gateway map: inflight ledger, counters, histograms.

Layout, all 8-byte words: a header, then per pool and worker since when its first held request
waits, then per worker a block of

    version of the fleet it has applied | heartbeat | replica requests [max_replicas]
    | replica tokens [max_replicas] | windows opened [max_replicas]
    | replica counters [max_replicas] | worker counters
    | per pool: integers, histogram sums (doubles)

A word has one writer, the worker that it is of, so nothing is locked: aligned 8-byte loads
and stores are atomic on every platform vLLM runs on. The control process reads all of it, and
clears a block's ledger after its worker died.
"""

from __future__ import annotations

import mmap
import os
from operator import add
from typing import Any

from gateway.datapath.metrics import (
    HELD_SINCE,
    HISTOGRAM_OFFSETS,
    INFLIGHT_REQUESTS,
    INFLIGHT_TOKENS,
    POOL_HISTOGRAMS,
    POOL_INTEGERS,
    POOL_SUMS,
    QUEUED_BYTES,
    QUEUED_REQUESTS,
    QUEUED_TOKENS,
    REPLICA_INTEGERS,
    WORKER_INTEGERS,
    WORKER_METRICS,
)

_MAGIC = 0x7469646567617465  # "tidegate"
_LAYOUT = 5
_HEADER_WORDS = 8
_GAUGES = tuple(index for index, metric in enumerate(WORKER_METRICS) if metric.gauge)
_POOL_GAUGES = (
    *(INFLIGHT_REQUESTS, INFLIGHT_TOKENS, QUEUED_REQUESTS, QUEUED_TOKENS, QUEUED_BYTES),
    HELD_SINCE,
)


def buckets_of(histogram: int) -> slice:
    """Where a histogram's buckets are among a pool's counters: those of its bounds, and the one
    beyond them."""
    start = HISTOGRAM_OFFSETS[histogram]
    return slice(start, start + len(POOL_HISTOGRAMS[histogram].bounds) + 1)


class Shared:
    """The mapped block. Create it once with ``create``; workers ``attach`` by descriptor."""

    def __init__(self, fd: int, *, workers: int, max_replicas: int, max_pools: int) -> None:
        self.fd = fd
        self.workers = workers
        self.max_replicas = max_replicas
        self.max_pools = max_pools
        self._pool_words = POOL_INTEGERS + POOL_SUMS
        self._blocks_at = _HEADER_WORDS + max_pools * workers
        self._replicas_at = 2 + 3 * max_replicas
        self._counters_at = self._replicas_at + REPLICA_INTEGERS * max_replicas
        self._block_words = self._counters_at + WORKER_INTEGERS + max_pools * self._pool_words
        size = 8 * (self._blocks_at + workers * self._block_words)
        if os.fstat(fd).st_size < size:
            os.ftruncate(fd, size)
        self._map = mmap.mmap(fd, size)
        view = memoryview(self._map)
        self._q: Any = view.cast("q")
        self._d: Any = view.cast("d")

    @classmethod
    def create(cls, *, workers: int, max_replicas: int, max_pools: int) -> Shared:
        """A new zeroed block, in anonymous memory that goes with its last process."""
        fd = os.memfd_create("tidegate", os.MFD_CLOEXEC)
        os.fchmod(fd, 0o600)
        shared = cls(fd, workers=workers, max_replicas=max_replicas, max_pools=max_pools)
        header = (_MAGIC, _LAYOUT, workers, max_replicas, max_pools)
        for index, word in enumerate(header):
            shared._q[index] = word
        return shared

    def close(self) -> None:
        """Give the descriptor back. What is mapped stays mapped until its last reader has gone."""
        os.close(self.fd)

    @classmethod
    def attach(cls, fd: int) -> Shared:
        """Map a block made by ``create``. Raises ``ValueError`` where it is not one."""
        with mmap.mmap(fd, 8 * _HEADER_WORDS, prot=mmap.PROT_READ) as head:
            words = list(memoryview(head).cast("q"))
        if words[:2] != [_MAGIC, _LAYOUT]:
            raise ValueError("the descriptor is not a Tidegate shared block of this version")
        return cls(fd, workers=words[2], max_replicas=words[3], max_pools=words[4])

    def _base(self, worker: int) -> int:
        if not 0 <= worker < self.workers:
            raise IndexError(f"worker {worker} of {self.workers}")
        return self._blocks_at + worker * self._block_words

    def set_applied(self, worker: int, version: int) -> None:
        """A worker has applied this version of the fleet, and published its counters since."""
        self._q[self._base(worker)] = version

    def applied(self) -> int:
        """The newest version of the fleet that all workers have applied; 0 while one of them is
        not running."""
        return min(int(self._q[self._base(worker)]) for worker in range(self.workers))

    def beat(self, worker: int, now_s: float) -> None:
        """The worker's event loop turns: called many times a second. ``now_s`` is its clock."""
        self._q[self._base(worker) + 1] = int(now_s * 1000)

    def last_beat_ms(self, worker: int) -> int:
        """When the worker last beat, by the monotonic clock; 0 before it ever did."""
        return int(self._q[self._base(worker) + 1])

    def waiting_rows(self, pool_slot: int) -> Any:
        """Since when each worker's first held request of a pool waits, in microseconds of the
        monotonic clock; 0 where none waits that a replica could take. By worker, writable."""
        if not 0 <= pool_slot < self.max_pools:
            raise IndexError(f"pool slot {pool_slot} of {self.max_pools}")
        start = _HEADER_WORDS + pool_slot * self.workers
        return self._q[start : start + self.workers]

    def replica_rows(self, worker: int) -> tuple[Any, Any, Any]:
        """One worker's (requests, tokens, windows opened) by replica slot, writable."""
        base, size = self._base(worker) + 2, self.max_replicas
        first, second, third, end = (base + size * count for count in range(4))
        return self._q[first:second], self._q[second:third], self._q[third:end]

    def other_rows(self, worker: int, slots: int) -> tuple[list[int], list[int], list[int]]:
        """(requests, tokens, windows opened) of all other workers summed, for the first ``slots``
        slots."""
        sums = [[0] * slots, [0] * slots, [0] * slots]
        for other in range(self.workers):
            if other == worker:
                continue
            for index, row in enumerate(self.replica_rows(other)):
                sums[index] = list(map(int.__add__, sums[index], row[:slots].tolist()))
        return sums[0], sums[1], sums[2]

    def replica_counters(self, worker: int, slot: int) -> Any:
        """One worker's counters of one replica, indexed as ``metrics.REPLICA_…``, writable."""
        if not 0 <= slot < self.max_replicas:
            raise IndexError(f"replica slot {slot} of {self.max_replicas}")
        start = self._base(worker) + self._replicas_at + REPLICA_INTEGERS * slot
        return self._q[start : start + REPLICA_INTEGERS]

    def worker_counters(self, worker: int) -> Any:
        """One worker's own counters, indexed as ``metrics.WORKER_METRICS``."""
        start = self._base(worker) + self._counters_at
        return self._q[start : start + WORKER_INTEGERS]

    def pool_rows(self, worker: int, pool_slot: int) -> tuple[Any, Any]:
        """One worker's published (integers, histogram sums) of one pool."""
        if not 0 <= pool_slot < self.max_pools:
            raise IndexError(f"pool slot {pool_slot} of {self.max_pools}")
        start = self._base(worker) + self._counters_at + WORKER_INTEGERS
        start += pool_slot * self._pool_words
        middle, end = start + POOL_INTEGERS, start + self._pool_words
        return self._q[start:middle], self._d[middle:end]

    def pool_total(self, pool_slot: int, index: int) -> int:
        """A pool's counter summed over the workers, as last published."""
        return sum(self.pool_rows(worker, pool_slot)[0][index] for worker in range(self.workers))

    def pool_totals(self, pool_slot: int, count: int = POOL_INTEGERS) -> list[int]:
        """A pool's counters, the first ``count`` of them, each summed over the workers."""
        totals: list[int] = self.pool_rows(0, pool_slot)[0][:count].tolist()
        for worker in range(1, self.workers):
            totals = list(map(add, totals, self.pool_rows(worker, pool_slot)[0][:count]))
        return totals

    def pool_sums(self, pool_slot: int) -> list[float]:
        """The sums of all of a pool's histograms, each over the workers, as last published."""
        totals: list[float] = self.pool_rows(0, pool_slot)[1].tolist()
        for worker in range(1, self.workers):
            totals = list(map(add, totals, self.pool_rows(worker, pool_slot)[1]))
        return totals

    def held_since_ms(self, pool_slot: int) -> int:
        """When the pool's oldest held request began to wait, on the monotonic clock; 0 for none."""
        rows = (self.pool_rows(worker, pool_slot)[0] for worker in range(self.workers))
        return min((int(row[HELD_SINCE]) for row in rows if row[HELD_SINCE]), default=0)

    def replica_total(self, slot: int) -> tuple[int, int]:
        """(requests, tokens) in flight on a replica, over all workers."""
        requests = tokens = 0
        for worker in range(self.workers):
            row, token_row, _ = self.replica_rows(worker)
            requests += row[slot]
            tokens += token_row[slot]
        return requests, tokens

    def replica_totals(self, slots: int) -> tuple[list[int], list[int]]:
        """(requests, tokens) in flight on the replicas of the first ``slots`` slots, by slot, over
        all workers."""
        requests, tokens = [0] * slots, [0] * slots
        for worker in range(self.workers):
            row, token_row, _ = self.replica_rows(worker)
            requests = list(map(add, requests, row[:slots]))
            tokens = list(map(add, tokens, token_row[:slots]))
        return requests, tokens

    def clear_pool(self, worker: int, pool_slot: int) -> None:
        """The pool is gone: another that is given its slot begins at zero. Called by the worker."""
        self.waiting_rows(pool_slot)[worker] = 0
        for row in self.pool_rows(worker, pool_slot):
            row[:] = memoryview(bytes(8 * len(row))).cast(row.format)

    def clear_worker(self, worker: int) -> None:
        """The worker died: its requests are gone with it. Its counters stay, its gauges do not."""
        self.set_applied(worker, 0)
        for row in self.replica_rows(worker):
            row[:] = memoryview(bytes(8 * self.max_replicas)).cast("q")
        counters = self.worker_counters(worker)
        for index in _GAUGES:
            counters[index] = 0
        for pool_slot in range(self.max_pools):
            self.waiting_rows(pool_slot)[worker] = 0
            integers, _ = self.pool_rows(worker, pool_slot)
            for index in _POOL_GAUGES:
                integers[index] = 0
