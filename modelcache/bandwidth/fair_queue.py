"""Which flow may read how much, and when: rate caps shared fairly. Pure; time is a parameter.

A *claim* asks for some bytes under one or more *caps*. Every cap is a bucket that fills at its
rate; a claim is granted when all its caps hold what it asks, so over any time ``t`` a cap grants
at most ``rate * t + burst``. Where claims compete they are served by start-time fair queueing on
two levels: classes by weight (a waking replica before a preload, which still gets a little: none
starves), and within a class models evenly, however many connections each has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from modelcache.types import Priority

CLASS_WEIGHTS: Mapping[Priority, float] = MappingProxyType(
    {Priority.WAKE: 90.0, Priority.PRELOAD: 9.0, Priority.REPLICATE: 1.0}
)
"""Per cent of a cap that a class gets while all three want it."""

BURST_S = 0.04
"""A bucket holds a claim and this many seconds of its rate: a thread that wakes late to a grant
loses none of it."""

USED_FRACTION = 0.92
"""Part of a cap that is used over time. A source counts what it sent, over windows of its own: with
the burst and what sockets take in ahead of us, a second's worth still stays below the cap."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """A limit in bytes a second. ``burst_bytes`` is what may be had at once after a pause."""

    name: str
    rate_bytes_s: float
    burst_bytes: float


def make_cap(name: str, rate_bytes_s: float, claim_bytes: int) -> Cap:
    """A cap for claims of at most ``claim_bytes`` each, that stays below what is allowed."""
    return Cap(
        name=name,
        rate_bytes_s=USED_FRACTION * rate_bytes_s,
        burst_bytes=claim_bytes + BURST_S * rate_bytes_s,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """``size_bytes`` wanted for a model. ``caps`` are names of caps it counts against."""

    ticket: int
    model: str
    priority: Priority
    caps: tuple[str, ...]
    size_bytes: int


@dataclass(slots=True)
class _Bucket:
    cap: Cap
    level_bytes: float
    at_s: float

    def fill(self, now_s: float) -> None:
        # A clock that jumps back must not drain what was there.
        passed_s = max(0.0, now_s - self.at_s)
        self.at_s = max(self.at_s, now_s)
        self.level_bytes = min(
            self.cap.burst_bytes, self.level_bytes + passed_s * self.cap.rate_bytes_s
        )

    def wait_s(self, size_bytes: int) -> float:
        return max(0.0, (size_bytes - self.level_bytes) / self.cap.rate_bytes_s)


@dataclass(slots=True)
class _Queue:
    """Start-time fair queueing between flows: first the one with the least served for its
    weight."""

    virtual: float = 0.0
    finished: dict[str, float] = field(default_factory=dict)

    def tag(self, flow: str) -> float:
        # A flow that was idle does not come back with what it did not use meanwhile.
        return max(self.virtual, self.finished.get(flow, 0.0))

    def serve(self, flow: str, cost: float) -> None:
        start = self.tag(flow)
        self.virtual = start
        self.finished[flow] = start + cost


class FairQueue:
    """The claims that wait, and what each cap has left. One owner; not thread-safe."""

    def __init__(self, caps: tuple[Cap, ...], now_s: float) -> None:
        self.buckets = {cap.name: _Bucket(cap, cap.burst_bytes, now_s) for cap in caps}
        self.waiting: dict[int, Claim] = {}
        self._classes = _Queue()
        self._models = {priority: _Queue() for priority in Priority}
        self._tickets = 0

    def ask(self, model: str, priority: Priority, caps: tuple[str, ...], size_bytes: int) -> Claim:
        """A new claim, waiting. ``ValueError`` if it is more than one of its caps ever holds."""
        for name in caps:
            most = self.buckets[name].cap.burst_bytes
            if size_bytes > most:
                raise ValueError(f"{size_bytes} bytes at once, but {name} holds {most:.0f}")
        self._tickets += 1
        claim = Claim(
            ticket=self._tickets, model=model, priority=priority, caps=caps, size_bytes=size_bytes
        )
        self.waiting[claim.ticket] = claim
        return claim

    def withdraw(self, claim: Claim) -> None:
        """Forget a claim that waits; one that does not is left alone."""
        self.waiting.pop(claim.ticket, None)

    def give_back(self, caps: tuple[str, ...], size_bytes: int) -> None:
        """Return what was granted and not read."""
        for name in caps:
            bucket = self.buckets[name]
            bucket.level_bytes = min(bucket.cap.burst_bytes, bucket.level_bytes + size_bytes)

    def forget(self, model: str) -> None:
        """A model is done: nothing about it is kept."""
        for queue in self._models.values():
            queue.finished.pop(model, None)

    def grant(self, now_s: float) -> list[Claim]:
        """The claims whose turn it is now, in order; they wait no longer."""
        for bucket in self.buckets.values():
            bucket.fill(now_s)
        granted: list[Claim] = []
        while (claim := self._next()) is not None:
            del self.waiting[claim.ticket]
            for name in claim.caps:
                self.buckets[name].level_bytes -= claim.size_bytes
            weight = CLASS_WEIGHTS[claim.priority]
            self._classes.serve(claim.priority.name, claim.size_bytes / weight)
            self._models[claim.priority].serve(claim.model, claim.size_bytes)
            granted.append(claim)
        return granted

    def first(self) -> tuple[Claim, float] | None:
        """The claim that can be granted soonest, and in how many seconds, as of the last
        :meth:`grant`; ``None`` if none waits."""
        found: tuple[Claim, float] | None = None
        kept: set[str] = set()
        for claim in self._in_order():
            waits_s = {name: self.buckets[name].wait_s(claim.size_bytes) for name in claim.caps}
            wait_s = max(waits_s.values(), default=0.0)
            if kept.isdisjoint(claim.caps) and (found is None or wait_s < found[1]):
                found = (claim, wait_s)
            kept |= bottleneck(waits_s)
        return found

    def _next(self) -> Claim | None:
        """The first in order whose caps all suffice. The cap that a claim waits longest for is
        kept for it: smaller claims behind it would otherwise always be quicker. Its other caps
        are not, or a flow that waits for a slow source would hold up all others."""
        kept: set[str] = set()
        for claim in self._in_order():
            waits_s = {name: self.buckets[name].wait_s(claim.size_bytes) for name in claim.caps}
            if not any(waits_s.values()) and kept.isdisjoint(claim.caps):
                return claim
            kept |= bottleneck(waits_s)
        return None

    def _in_order(self) -> list[Claim]:
        def key(claim: Claim) -> tuple[float, int, float, int]:
            return (
                self._classes.tag(claim.priority.name),
                claim.priority,
                self._models[claim.priority].tag(claim.model),
                claim.ticket,
            )

        return sorted(self.waiting.values(), key=key)


def bottleneck(waits_s: Mapping[str, float]) -> set[str]:
    """The cap that takes longest to suffice, if any does not yet."""
    longest = max(waits_s, key=lambda name: waits_s[name], default=None)
    return {longest} if longest is not None and waits_s[longest] > 0 else set()
