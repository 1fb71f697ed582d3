"""Our re-implementations of Kubernetes' HorizontalPodAutoscaler and of KEDA, which goes through it.

HPA, with its defaults: every 15 s, ceil(n * metric / target), nothing within a tolerance of 0.1; up
at once, by at most 4 pods or 100 % in 15 s; down to the largest recommendation of the last 300 s.
Pods that are not ready yet count as idle where the metric asks for more, so a scale-up is not
repeated while it starts.
"""

from __future__ import annotations

import math
from collections import deque

from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.windows import Largest, Rate, replicas_for
from autoscaler.replay.types import PoolObservation

TARGET = 0.7


class HpaBehavior:
    """HPA's limits on a recommendation: tolerance, stabilization, how fast up."""

    def __init__(self, *, tolerance: float = 0.1, down_window_s: float = 300.0) -> None:
        self.tolerance = tolerance
        self._recent = Largest(down_window_s)
        self._added: deque[tuple[float, int]] = deque()

    def within(self, ratio: float) -> bool:
        """Whether the metric is near enough to its target to do nothing."""
        return abs(ratio - 1.0) <= self.tolerance

    def limit(self, now_s: float, current: int, wanted: int) -> int:
        """The number that HPA sets, which has ``current`` and computed ``wanted``."""
        stable = self._recent.add(now_s, wanted)
        desired = wanted if wanted > current else min(current, stable)
        while self._added and self._added[0][0] <= now_s - 15.0:
            self._added.popleft()
        began_with = current - sum(count for _, count in self._added)
        most = max(began_with + 4, 2 * began_with)
        if desired > current:
            desired = max(current, min(desired, most))
        if desired > current:
            self._added.append((now_s, desired - current))
        return desired


class HpaUtilization:
    """HPA on the utilisation of the pods, as a Resource metric."""

    def __init__(self, facts: PoolFacts, target: float = TARGET) -> None:
        self.name = "hpa"
        self.interval_s = 15.0
        self._target = target
        self._behavior = HpaBehavior()

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        current = seen.ready + seen.starting
        wanted = current
        if seen.utilization is not None and seen.ready:
            ratio = seen.utilization / self._target
            counted = seen.ready
            if ratio > 1.0 and seen.starting:
                counted = current
                ratio *= seen.ready / current
                if ratio < 1.0:
                    ratio = 1.0
            if not self._behavior.within(ratio):
                wanted = math.ceil(ratio * counted - 1e-9)
        if current == 0:
            return 1 if seen.queued_requests else 0
        return self._behavior.limit(now_s, current, wanted)


class HpaRequests:
    """HPA on an external metric with a target per pod (AverageValue): tokens that come per second,
    as a rate over a minute, beside 0.7 of what a replica carries."""

    def __init__(self, facts: PoolFacts, target: float = TARGET) -> None:
        self.name = "hpa-requests"
        self.interval_s = 15.0
        self._each = target * facts.capacity_tokens_per_s
        self._rate = Rate(60.0)
        self._behavior = HpaBehavior()

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        current = seen.ready + seen.starting
        rate = self._rate.add(now_s, seen.arrived_tokens_total)
        if current == 0:
            return 1 if seen.queued_requests else 0
        wanted = current
        if rate is not None and not self._behavior.within(rate / (self._each * current)):
            wanted = replicas_for(rate, self._each)
        return self._behavior.limit(now_s, current, wanted)


class Keda:
    """KEDA with a cooldown, on requests in flight and queued: from zero by its trigger, back after
    ``cooldown_s`` without any, between one and the most by HPA."""

    def __init__(self, facts: PoolFacts, cooldown_s: float = 300.0) -> None:
        self.name = "keda"
        self.interval_s = 15.0
        self._each = facts.target_concurrency
        self._cooldown_s = cooldown_s
        self._active_s: float | None = None
        self._behavior = HpaBehavior()

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        current = seen.ready + seen.starting
        load = seen.queued_requests + seen.inflight_requests
        if load > 0.0 or self._active_s is None:
            self._active_s = now_s
        elif now_s - self._active_s >= self._cooldown_s:
            return 0
        if current == 0:
            return 1 if load > 0.0 else 0
        wanted = current
        if not self._behavior.within(load / (self._each * current)):
            wanted = max(1, replicas_for(load, self._each))
        return self._behavior.limit(now_s, current, wanted)
