"""Watches how a pool's replicas are loaded, for ``autoscaler.policy.capacity`` to learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from autoscaler.policy.capacity import (
    CapacityState,
    LoadSample,
    derive_tokens_per_s,
    estimate_capacity,
    note_load,
    running_most,
)
from autoscaler.settings import PoolSettings
from autoscaler.types import EngineObservation, PoolDemand, RecentTraffic, ReplicaCapacity

MINUTE_S = 60.0
WAITED_SHARE = 0.5
"""Of the looks in a minute at which requests waited, for the replicas to have been at a limit."""
ENDED_LEAST = 10
"""Requests that must have ended in a minute for its latencies to say anything."""


class CapacityLearner:
    """What a replica of one pool carries. ``observe`` is called at each tick."""

    def __init__(self) -> None:
        self._state = CapacityState()
        self._begun_at_s: float | None = None
        self._ready: int | None = None
        self._looks = self._waited = 0
        self._kv_tokens: float | None = None
        self._max_requests: float | None = None
        self._traffic: RecentTraffic | None = None

    def observe(
        self,
        pool: PoolSettings,
        *,
        ready: int,
        demand: PoolDemand | None,
        engines: Iterable[EngineObservation],
        recent: Callable[[], RecentTraffic | None],
        now_s: float,
    ) -> None:
        """Take in what there is. A minute counts where the number of ready replicas did not change
        in it."""
        waiting = 0 if demand is None else demand.queued_requests or 0
        for one in engines:
            waiting += one.load.waiting_requests or 0
            self._kv_tokens = one.load.kv_cache_tokens or self._kv_tokens
            self._max_requests = one.load.max_running_requests or self._max_requests
        if self._begun_at_s is None or ready != self._ready:
            self._begin(now_s, ready)
        self._looks += 1
        self._waited += waiting > 0
        if self._begun_at_s is None or now_s - self._begun_at_s < MINUTE_S:
            return
        traffic, waited = recent(), self._waited >= WAITED_SHARE * self._looks
        self._begin(now_s, ready)
        self._traffic = traffic or self._traffic
        if traffic is None or not ready or traffic.requests_per_s * MINUTE_S < ENDED_LEAST:
            return
        rate = (traffic.prompt_tokens_per_s + traffic.generation_tokens_per_s) / ready
        sample = LoadSample(tokens_per_s=rate, within_slo=is_within(pool, traffic), waited=waited)
        self._state = note_load(self._state, sample)

    def _begin(self, now_s: float, ready: int) -> None:
        self._begun_at_s, self._ready = now_s, ready
        self._looks = self._waited = 0

    def capacity(
        self, pool: PoolSettings, target_utilization_fraction: float
    ) -> ReplicaCapacity | None:
        """What one replica sustains; ``None`` where nothing is known of it yet."""
        derived = hint = None
        traffic = self._traffic
        if traffic is not None and traffic.requests_per_s > 0.0 and traffic.e2e_mean_s:
            prompt = traffic.prompt_tokens_per_s / traffic.requests_per_s
            output = traffic.generation_tokens_per_s / traffic.requests_per_s
            most = running_most(
                kv_tokens=self._kv_tokens,
                max_requests=first_known(pool.max_inflight_requests, self._max_requests),
                prompt_tokens=prompt,
                output_tokens=output,
            )
            if most is not None:
                derived = derive_tokens_per_s(
                    prompt_tokens=prompt,
                    output_tokens=output,
                    e2e_s=traffic.e2e_mean_s,
                    running_most=most,
                )
            # A target of tokens in flight is a rate too, by Little's law, and it is what a replica
            # is loaded to, not all that it can. An idle engine is fast, so what is derived of its
            # times is no more than that either.
            hint = pool.target_inflight_tokens / traffic.e2e_mean_s / target_utilization_fraction
            derived = None if derived is None else min(derived, hint)
        return estimate_capacity(self._state, derived=derived, hint=hint)


def is_within(pool: PoolSettings, traffic: RecentTraffic) -> bool:
    """Whether the last minute was within the pool's SLO."""
    slo = pool.slo
    if traffic.ttft_p95_s is not None and traffic.ttft_p95_s > slo.ttft_s:
        return False
    return slo.itl_s is None or traffic.itl_p95_s is None or traffic.itl_p95_s <= slo.itl_s


def first_known(*values: float | None) -> float | None:
    """The first that is known."""
    return next((value for value in values if value is not None), None)
