"""Bandwidth, connections and memory, shared between everything that is being fetched here.

The order in which models are served is :mod:`modelcache.bandwidth.fair_queue`'; this is its edge:
threads wait
here for their turn. Bytes are paid for *before* they are read, ``ANNOUNCE_BYTES`` at a time, so a
cap holds for what is read, over any window and not only on average; beyond its rate a cap lets
through at most ``ANNOUNCE_BYTES`` and 0.1 s of its rate, after a pause. What the kernel has
received and has not been read yet is not counted.

One process keeps one budget. Two processes on a node that fetch at the same time know nothing of
each other's: let one of them do it, as the command line does while a Tidegate runs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from modelcache.bandwidth.fair_queue import CLASS_WEIGHTS, Claim, FairQueue, make_cap
from modelcache.ports import ANNOUNCE_BYTES, IsCancelled
from modelcache.refs import is_below
from modelcache.settings import ModelCacheSettings
from modelcache.types import Cancelled, Priority

NODE = "node"
POLL_S = 0.1
"""Seconds within which a waiting thread notices that it was cancelled."""


class Budget:
    """The caps of a node. Thread-safe."""

    def __init__(
        self, settings: ModelCacheSettings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._prefixes = sorted(settings.source_bandwidth_bytes_s, key=len, reverse=True)
        rates = {**settings.source_bandwidth_bytes_s}
        if settings.bandwidth_bytes_s is not None:
            rates[NODE] = settings.bandwidth_bytes_s
        self._capped_node = NODE in rates
        caps = tuple(make_cap(name, rate, ANNOUNCE_BYTES) for name, rate in rates.items())
        self._queue = FairQueue(caps, clock())
        self._lock = threading.Lock()
        self._turns: dict[int, threading.Event] = {}

    def share(self, url: str, model: str, priority: Priority) -> BandwidthShare:
        """What reading ``url`` for ``model`` counts against."""
        prefix = next((p for p in self._prefixes if is_below(url, p)), None)
        names = ((NODE,) if self._capped_node else ()) + ((prefix,) if prefix else ())
        return BandwidthShare(budget=self, model=model, priority=priority, caps=names)

    @property
    def waiting(self) -> int:
        """Threads that wait for their turn."""
        return len(self._turns)

    def forget(self, model: str) -> None:
        """A model has been fetched: keep nothing about it."""
        with self._lock:
            self._queue.forget(model)

    def take(self, share: BandwidthShare, size_bytes: int, cancelled: IsCancelled) -> None:
        """Wait until ``size_bytes`` (at most ``ANNOUNCE_BYTES``) may be read. ``Cancelled`` if it
        is cancelled first."""
        turn = threading.Event()
        with self._lock:
            claim = self._queue.ask(share.model, share.priority, share.caps, size_bytes)
            self._turns[claim.ticket] = turn
            wait_s = self._grant(claim)
        while wait_s is not None:
            turn.wait(wait_s)
            with self._lock:
                if cancelled() and claim.ticket in self._queue.waiting:
                    self._withdraw(claim)
                    raise Cancelled("fetching was cancelled")
                wait_s = self._grant(claim)

    def give_back(self, share: BandwidthShare, size_bytes: int) -> None:
        """Return what was taken and not read."""
        with self._lock:
            self._queue.give_back(share.caps, size_bytes)

    def _withdraw(self, claim: Claim) -> None:
        self._queue.withdraw(claim)
        self._turns.pop(claim.ticket, None)
        self._nudge()

    def _grant(self, claim: Claim) -> float | None:
        """Admit every claim whose turn it is; seconds until ``claim`` should look again, ``None``
        when it was let in."""
        for granted in self._queue.grant(self._clock()):
            self._turns.pop(granted.ticket).set()
        if claim.ticket not in self._queue.waiting:
            self._nudge()
            return None
        self._turns[claim.ticket].clear()
        found = self._queue.first()
        if found is not None and found[0] is claim:
            return min(found[1], POLL_S)
        return POLL_S

    def _nudge(self) -> None:
        """Only the first in the queue sleeps until the moment it is due, or all would wake for
        every grant. Tell the new first that it is."""
        found = self._queue.first()
        if found is not None:
            self._turns[found[0].ticket].set()


@dataclass(frozen=True, slots=True, kw_only=True)
class BandwidthShare:
    """What one model's reads from one source count against."""

    budget: Budget
    model: str
    priority: Priority
    caps: tuple[str, ...]

    def meter(self, size_bytes: int, cancelled: IsCancelled) -> Meter:
        """For one range of ``size_bytes``."""
        return Meter(share=self, left_bytes=size_bytes, cancelled=cancelled)


@dataclass(slots=True, kw_only=True)
class Meter:
    """Pays for one range as it is read. Used by one thread."""

    share: BandwidthShare
    left_bytes: int
    """Not paid for yet."""
    cancelled: IsCancelled
    paid_bytes: int = 0
    """Paid for and not read yet."""

    def __enter__(self) -> Meter:
        self.ahead()
        return self

    def __exit__(self, *_: object) -> None:
        if self.paid_bytes and self.share.caps:
            self.share.budget.give_back(self.share, self.paid_bytes)
        self.paid_bytes = 0

    def count(self, size_bytes: int) -> None:
        """So many bytes were read; waits until the next may be."""
        self.paid_bytes = max(0, self.paid_bytes - size_bytes)
        self.ahead()

    def ahead(self) -> None:
        """Pay for as much as a source reads at once."""
        wanted = min(ANNOUNCE_BYTES - self.paid_bytes, self.left_bytes)
        if wanted <= 0:
            return
        if self.share.caps:
            self.share.budget.take(self.share, wanted, self.cancelled)
        self.left_bytes -= wanted
        self.paid_bytes += wanted


@dataclass(slots=True)
class _Waiter:
    model: str
    priority: Priority
    amount: int
    ticket: int
    turn: threading.Event = field(default_factory=threading.Event)


class Slots:
    """So much of something at once (connections, bytes of memory), over all models. Thread-safe.

    Whose model has least for its class's weight comes first, so one that has nothing yet is never
    far behind; amounts are at most the limit.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._free = limit
        self._held: dict[str, int] = {}
        self._waiting: list[_Waiter] = []
        self._tickets = 0
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """What is not lent."""
        return self._free

    @property
    def waiting(self) -> int:
        """Threads that wait for some of it."""
        return len(self._waiting)

    def take(self, model: str, priority: Priority, amount: int, cancelled: IsCancelled) -> None:
        """Wait for ``amount``; ``Cancelled`` if it is cancelled first."""
        amount = min(amount, self.limit)
        with self._lock:
            self._tickets += 1
            waiter = _Waiter(model, priority, amount, self._tickets)
            self._waiting.append(waiter)
            self._serve()
        while not waiter.turn.wait(POLL_S):
            if not cancelled():
                continue
            with self._lock:
                if not waiter.turn.is_set():
                    self._waiting.remove(waiter)
                    self._serve()
                    raise Cancelled("fetching was cancelled")

    def give_back(self, model: str, amount: int) -> None:
        """Return what was taken."""
        amount = min(amount, self.limit)
        with self._lock:
            self._free += amount
            self._held[model] -= amount
            if self._held[model] == 0:
                del self._held[model]
            self._serve()

    def _serve(self) -> None:
        while self._waiting:
            first = min(self._waiting, key=self._rank)
            if first.amount > self._free:
                return
            self._waiting.remove(first)
            self._free -= first.amount
            self._held[first.model] = self._held.get(first.model, 0) + first.amount
            first.turn.set()

    def _rank(self, waiter: _Waiter) -> tuple[float, int, int]:
        share = self._held.get(waiter.model, 0) / CLASS_WEIGHTS[waiter.priority]
        return (share, waiter.priority, waiter.ticket)
