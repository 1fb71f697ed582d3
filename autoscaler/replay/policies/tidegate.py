"""Tidegate's own policies: the production ``decide``, with the forecast (``Auto``) and without it
(``Reactive``)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autoscaler.policy.decide import DecideState, decide
from autoscaler.policy.outlook import OutlookMaker
from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.types import PoolObservation
from autoscaler.settings import AutoscalerSettings, PoolSettings, make_policy
from autoscaler.signals.rates import PoolRates, RateGrid
from autoscaler.signals.window import DemandWindow
from autoscaler.types import (
    CapacitySource,
    Decision,
    Outlook,
    PoolDemand,
    PoolPolicy,
    PoolStatus,
    ReplicaCapacity,
)
from forecaster.types import History

LONGEST_STEP_S = 30.0
"""A policy may be stepped as rarely as that."""
UNIT = 1_024.0
"""Tokens are counted in parts of one: a trace may have fewer than one a second."""

SETTINGS = AutoscalerSettings()
POLICY = make_policy(PoolSettings.model_construct(name="replay", backend="process"), SETTINGS)
"""What a pool with no settings of its own has."""


class Reactive:
    """What Tidegate does without a forecast."""

    def __init__(self, facts: PoolFacts, *, policy: PoolPolicy = POLICY) -> None:
        """``policy`` holds all other settings; its least and most replicas are the facts'."""
        self.name = "reactive"
        self.interval_s = 1.0
        self._capacity = ReplicaCapacity(
            tokens_per_s=facts.capacity_tokens_per_s * UNIT, source=CapacitySource.SATURATED
        )
        self._lead_s = facts.cold_start_s
        self._policy = replace(
            policy,
            min_replicas=facts.min_replicas,
            max_replicas=facts.max_replicas,
            max_scale_up_per_tick=facts.max_replicas,
            demand_stale_s=max(policy.demand_stale_s, 2 * LONGEST_STEP_S),
        )
        self._window = DemandWindow(self._policy)
        self._state = DecideState()
        self._starts: list[float] = []
        self._ready = 0
        self._ready_at_s: float | None = None
        self.last: Decision | None = None
        """The newest decision, with all that led to it; its tokens are of ``1 / UNIT``."""

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas at ``now_s``."""
        if seen.ready > self._ready:
            self._ready_at_s = now_s
        self._ready = seen.ready
        # The newest are cancelled first.
        self._starts = [at_s for at_s in self._starts if at_s > now_s][: seen.starting]
        self._window.add(
            PoolDemand(
                observed_at_s=now_s,
                inflight_requests=round(seen.inflight_requests),
                inflight_tokens=round(seen.inflight_tokens * UNIT),
                queued_requests=round(seen.queued_requests),
                queued_tokens=round(seen.queued_tokens * UNIT),
                arrivals_total=round(seen.arrivals_total),
                arrived_tokens_total=round(seen.arrived_tokens_total * UNIT),
            )
        )
        self.last, self._state = decide(
            self._policy,
            PoolStatus(
                ready=seen.ready,
                starting=seen.starting,
                ready_at_s=self._ready_at_s,
                arriving_s=tuple(at_s - now_s for at_s in self._starts),
                lead_s=self._lead_s,
            ),
            self._window.read(now_s),
            self._state,
            now_s,
            capacity=self._capacity,
            outlook=self._look(now_s, seen),
        )
        more = self.last.desired - seen.ready - seen.starting
        self._starts += [now_s + self._lead_s] * max(0, more)
        return self.last.desired

    def _look(self, now_s: float, seen: PoolObservation) -> Outlook | None:
        return None


class Auto(Reactive):
    """What Tidegate does. It forecasts as production does, and reacts alone where that would: until
    ``history_least_s`` of demand are known, or while its forecasts turn out badly."""

    def __init__(
        self,
        facts: PoolFacts,
        *,
        policy: PoolPolicy = POLICY,
        history_least_s: float = SETTINGS.forecast.history_least_s,
        name: str = "auto",
    ) -> None:
        super().__init__(facts, policy=policy)
        self.name = name
        known = [] if facts.history is None else (facts.history.values * UNIT).tolist()
        self._rates = PoolRates(known)
        self._maker = OutlookMaker(history_least_s)
        self.outlook: Outlook | None = None
        """What is expected now."""

    def band(self) -> tuple[float, float] | None:
        """The median and the quantile 0.95 of the highest demand until a start now would serve, in
        tokens per second; ``None`` while the forecast is not used."""
        found = self.outlook
        if found is None or found.distrust:
            return None
        middle, upper = np.interp((0.5, 0.95), found.levels, found.tokens_per_s) / UNIT
        return float(middle), float(upper)

    def _look(self, now_s: float, seen: PoolObservation) -> Outlook | None:
        rates = self._rates
        if rates.add(now_s, seen.arrived_tokens_total * UNIT, self._lead_s):
            minutes, fine = to_history(rates.minutes), to_history(rates.fine)
            try:
                self.outlook = self._maker.make(minutes, fine, self._lead_s, now_s, rates.so_far)
            except ValueError:
                self.outlook = None  # nothing is known yet
        return self.outlook


def to_history(grid: RateGrid) -> History:
    """What a grid has, as a forecaster reads it."""
    values = np.array(grid.values)
    start_s = None if grid.end_s is None else grid.end_s - len(values) * grid.step_s
    return History(values=values, step_s=grid.step_s, start_s=start_s)
