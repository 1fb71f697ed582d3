"""What a replay is scored by: whom it hurt, what it cost, and a record of each minute."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WAIT_GROWTH = 1.05
"""Waits are counted in buckets, each this much wider than the one before."""
WAIT_FROM_S = 0.01


class WaitQuantiles:
    """Quantiles of waits, weighted by requests, within 5 %. Waits below 10 ms are none."""

    def __init__(self) -> None:
        self._weights: dict[int, float] = {}
        self._total = 0.0

    def add(self, wait_s: float, requests: float) -> None:
        """So many requests waited this long."""
        bucket = -1
        if wait_s >= WAIT_FROM_S:
            bucket = int(math.log(wait_s / WAIT_FROM_S) / math.log(WAIT_GROWTH))
        self._weights[bucket] = self._weights.get(bucket, 0.0) + requests
        self._total += requests

    def quantile(self, level: float) -> float:
        """The wait that a part ``level`` of the requests does not exceed."""
        left = level * self._total * (1.0 - 1e-12)
        for bucket in sorted(self._weights):
            left -= self._weights[bucket]
            if left <= 0.0:
                return 0.0 if bucket < 0 else WAIT_FROM_S * WAIT_GROWTH ** (bucket + 0.5)
        return 0.0


@dataclass(slots=True)
class Minutes:
    """One entry per scored minute. ``demand`` is the work that came, in replicas loaded as far as
    the SLO allows; ``ready``, ``starting`` and ``draining`` are means, ``queued`` is the most."""

    demand: list[float] = field(default_factory=list)
    requests: list[float] = field(default_factory=list)
    violations: list[float] = field(default_factory=list)
    ready: list[float] = field(default_factory=list)
    starting: list[float] = field(default_factory=list)
    draining: list[float] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)
    expected: list[float] = field(default_factory=list)
    """The middle and the upper edge of what a policy that forecasts expected, in replicas as
    ``demand`` is; empty for others, NaN while it did not."""
    provisioned: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """One policy on one trace. Everything is of the scored part of the trace alone.

    A request violates where its TTFT (wait and prefill) or its mean ITL is beyond the SLO; one that
    still waits at the end, where it has waited longer than that. ``violated_s`` are the seconds
    whose arrivals were hurt. ``cost`` is the replica-hours at their price, and what holding a tier
    at zero cost.
    """

    policy: str
    trace: str
    requests: float
    violations: float
    seconds: int
    violated_s: int
    replica_hours: float
    cost: float
    wait_s: dict[str, float]
    """Waits for a replica, before prefill: ``p50``, ``p90``, ``p99`` and ``max``."""
    started: int
    cancelled: int
    minutes: Minutes

    @property
    def violated_fraction(self) -> float:
        """The part of requests that was hurt."""
        return self.violations / self.requests if self.requests else 0.0

    @property
    def goodput_per_replica_hour(self) -> float:
        """Requests within the SLO per replica-hour; none without a replica."""
        good = self.requests - self.violations
        return good / self.replica_hours if self.replica_hours else 0.0


def frontier(scores: Sequence[Score]) -> set[str]:
    """The policies that no other beats: none hurts fewer requests at no higher cost."""
    return {
        one.policy
        for one in scores
        if not any(
            other.violations <= one.violations
            and other.cost <= one.cost
            and (other.violations, other.cost) != (one.violations, one.cost)
            for other in scores
        )
    }
