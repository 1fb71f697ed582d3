"""Our re-implementation of Knative's pod autoscaler (KPA) on the rate of requests.

Every 2 s: a stable window of 60 s and a panic window of 6 s, each over the target per replica. It
panics when the panic window asks for twice the ready replicas, for a stable window past the last
such moment, and does not scale down then. A step is at most 1,000 times up and half down. With a
scale-down delay it takes the largest number of that long.
"""

from __future__ import annotations

import math

from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.windows import Largest, Rate, replicas_for
from autoscaler.replay.types import PoolObservation

STABLE_S, PANIC_S = 60.0, 6.0
PANIC_THRESHOLD = 2.0
MAX_SCALE_UP, MAX_SCALE_DOWN = 1000.0, 2.0
GRACE_S = 30.0
"""From the decision for zero until the last pod goes."""


class Knative:
    """See the module."""

    def __init__(
        self, facts: PoolFacts, *, target: float = 0.7, scale_down_delay_s: float = 0.0
    ) -> None:
        self.name = "knative-delay" if scale_down_delay_s else "knative"
        self.interval_s = 2.0
        self._each = target * facts.capacity_tokens_per_s
        self._stable, self._panic = Rate(STABLE_S), Rate(PANIC_S)
        self._delayed = Largest(scale_down_delay_s) if scale_down_delay_s else None
        self._panic_s: float | None = None
        self._most = 0
        self._zero_s: float | None = None

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        stable = self._stable.add(now_s, seen.arrived_tokens_total)
        panic = self._panic.add(now_s, seen.arrived_tokens_total)
        if stable is None or panic is None:
            return seen.ready + seen.starting
        ready = max(1, seen.ready)
        up, down = math.ceil(MAX_SCALE_UP * ready), math.floor(ready / MAX_SCALE_DOWN)
        asked = replicas_for(panic, self._each)
        steady = min(max(replicas_for(stable, self._each), down), up)
        urgent = min(max(asked, down), up)
        if asked / ready >= PANIC_THRESHOLD:
            self._panic_s = now_s
        elif self._panic_s is not None and self._panic_s + STABLE_S < now_s:
            self._panic_s = None
            self._most = 0
        desired = steady
        if self._panic_s is not None:
            self._most = desired = max(self._most, steady, urgent)
        if self._delayed is not None:
            desired = self._delayed.add(now_s, desired)
        return self._after_grace(now_s, desired, seen)

    def _after_grace(self, now_s: float, desired: int, seen: PoolObservation) -> int:
        """Zero only when it was decided for the grace period; a held request wakes the pool."""
        if desired > 0 or seen.queued_requests:
            self._zero_s = None
            return max(1, desired)
        if self._zero_s is None:
            self._zero_s = now_s
        done = now_s - self._zero_s >= GRACE_S
        return 0 if done or not seen.ready + seen.starting else 1
