"""The replicas of a simulated pool: starting, ready, draining; what they cost; how warm zero is."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass, field

from autoscaler.policy.tier_policy import TierState, TierTimes, choose_tier
from modelcache.types import Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Starts:
    """How long a start takes, by the tier that it starts from.

    A pool that has replicas starts more from ``scale_up_from``. One at zero steps down the tiers of
    ``wake_s`` as production does (``autoscaler.policy.tier_policy``), after ``stays_s`` in each;
    ``holding`` is what it costs to stay there, as a part of a replica's price.
    """

    wake_s: Mapping[Tier, float]
    scale_up_from: Tier = Tier.PAGED
    stays_s: TierTimes = field(default_factory=dict)
    holding: Mapping[Tier, float] = field(default_factory=dict)

    @classmethod
    def flat(cls, cold_start_s: float) -> Starts:
        """Each start takes this long, from zero and from more."""
        return cls(wake_s={Tier.PAGED: cold_start_s})

    @property
    def cold_start_s(self) -> float:
        """How long a start beside running replicas takes."""
        return self.wake_s[self.scale_up_from]


class Supply:
    """Counts of replicas on virtual time. Its owner calls ``advance`` once per second."""

    def __init__(self, starts: Starts, ready: int, now_s: float) -> None:
        self.starts = starts
        self.ready = ready
        self.draining = 0
        self.replica_s = 0.0
        """Replica-seconds so far: starting, ready and draining ones all cost."""
        self.holding_s = 0.0
        """Replica-seconds' worth of holding a tier at zero."""
        self.started = 0
        self.cancelled = 0
        self._ready_at_s: list[float] = []
        self._now_s = now_s
        self._tier_state = TierState()
        self._tier: Tier | None = None

    @property
    def starting(self) -> int:
        """Replicas that are not ready yet."""
        return len(self._ready_at_s)

    @property
    def at_zero(self) -> bool:
        """There is no replica in any state."""
        return not (self.ready or self._ready_at_s or self.draining)

    def begin(self, now_s: float) -> int:
        """A second begins: what has loaded is ready. Returns how many became ready."""
        waiting = self._ready_at_s
        came = 0
        while waiting and waiting[0] <= now_s:
            heapq.heappop(waiting)
            came += 1
        self.ready += came
        self._now_s = now_s
        return came

    def end(self) -> None:
        """The second is over, and is paid for."""
        replicas = self.ready + len(self._ready_at_s) + self.draining
        self.replica_s += replicas
        if replicas:
            self._tier = None
            if self._tier_state.tier is not None:
                self._tier_state = TierState()
        else:
            self._step_down()

    def scale(self, desired: int, now_s: float) -> int:
        """Start what is missing, or cancel starting replicas and drain ready ones, in this order.

        Returns how many are to drain now; they stay, and cost, until ``release``.
        """
        missing = desired - self.ready - len(self._ready_at_s)
        if missing > 0:
            tier = self.starts.scale_up_from if self._tier is None else self._tier
            ready_at_s = now_s + self.starts.wake_s[tier]
            for _ in range(missing):
                heapq.heappush(self._ready_at_s, ready_at_s)
                tier = self.starts.scale_up_from
                ready_at_s = now_s + self.starts.wake_s[tier]
            self.started += missing
            return 0
        cancelled = min(-missing, len(self._ready_at_s))
        if cancelled:
            self._ready_at_s.sort()  # a sorted list is a heap
            del self._ready_at_s[len(self._ready_at_s) - cancelled :]
            self.cancelled += cancelled
        draining = -missing - cancelled
        self.ready -= draining
        self.draining += draining
        return draining

    def release(self, count: int) -> None:
        """These draining replicas are empty."""
        self.draining -= count

    def _step_down(self) -> None:
        choice, self._tier_state = choose_tier(
            self.starts.stays_s,
            self.starts.wake_s.keys(),
            self._tier_state,
            idle=True,
            now_s=self._now_s,
        )
        if choice is not None:
            self._tier = choice.tier
            self.holding_s += self.starts.holding.get(choice.tier, 0.0)
