"""Our re-implementation of Ray Serve's default policy.

desired = n * ongoing requests / (target * n), rounded up, with the ongoing ones (queued and
running) as a mean over 30 s. It has to ask for more for 30 s in a row, and for less for 600 s,
before the number changes; the number is then that of this moment.
"""

from __future__ import annotations

from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.windows import Mean, replicas_for
from autoscaler.replay.types import PoolObservation

UP_S, DOWN_S = 30.0, 600.0
LOOK_BACK_S = 30.0


class RayServe:
    """See the module. The target is what a replica has in flight at 0.7 of its capacity."""

    def __init__(self, facts: PoolFacts) -> None:
        self.name = "ray-serve"
        self.interval_s = 1.0
        self._each = facts.target_concurrency
        self._ongoing = Mean(LOOK_BACK_S)
        self._number: int | None = None
        self._since_s = 0.0
        self._direction = 0

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        ongoing = self._ongoing.add(now_s, seen.queued_requests + seen.inflight_requests)
        current = seen.ready + seen.starting
        if self._number is None:
            self._number = current
        if current == 0:
            self._number = max(1, self._number) if seen.queued_requests else self._number
            return self._number
        wanted = replicas_for(ongoing, self._each)
        if self._number > 1:
            wanted = max(1, wanted)
        direction = (wanted > self._number) - (wanted < self._number)
        if direction != self._direction:
            self._direction, self._since_s = direction, now_s
        delay_s = UP_S if direction > 0 else DOWN_S
        if direction and now_s - self._since_s >= delay_s:
            self._number = wanted
            self._direction = 0
        return self._number
