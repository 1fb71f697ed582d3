"""Watches how a pool's replicas are loaded, for ``autoscaler.policy.capacity`` to learn from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from autoscaler.policy.capacity import (
    SAMPLES,
    CapacityState,
    LoadSample,
    Mix,
    derive_tokens_per_s,
    estimate_capacity,
    is_telling,
    note_load,
    running_most,
)
from autoscaler.settings import PoolSettings
from autoscaler.signals.series import MINUTE_S
from autoscaler.types import EngineObservation, PoolDemand, RecentTraffic, ReplicaCapacity
from loaders.engines.base import engine_of

WAITED_SHARE = 0.5
"""Of the looks at replicas in a minute, those at which requests waited, for the replicas to have
been at a limit."""
ENDED_LEAST = 10
"""Requests that must have ended in a minute for its latencies to say anything."""
KEPT_SHARE = 0.8
"""Of the weight of earlier minutes that is left with each in what the mix of requests is now."""
MOST_SCALE = 4.0
"""By how much estimates of a request's tokens may be wrong at most, to be made up for."""


class CapacityLearner:
    """What a replica of one pool carries. ``observe`` is called at each tick. ``setup`` stands for
    all that it depends on (``describe_setup``), beside the accelerator."""

    def __init__(self, setup: str = "") -> None:
        self.setup = setup
        self.recalled = False
        """What an earlier control process saw was read."""
        self._state = CapacityState()
        self._begun_at_s: float | None = None
        self._ready: int | None = None
        self._looks, self._waited = 0, 0.0
        self._kv_tokens: float | None = None
        self._requests_most: float | None = None
        self._traffic: RecentTraffic | None = None
        self._answers = self._prompt_tokens = self._output_tokens = 0.0
        self._arrivals = self._arrived_tokens = 0.0
        self._accelerator = ""
        self._asked: object = None
        self._found: ReplicaCapacity | None = None

    def recall(self, earlier: Sequence[LoadSample]) -> None:
        """Take in what an earlier control process saw of replicas with this setup."""
        self.recalled, self._asked = True, None
        self._state = replace(self._state, earlier=tuple(earlier)[-SAMPLES:])

    def observe(
        self,
        pool: PoolSettings,
        *,
        ready: int,
        demand: PoolDemand | None,
        engines: Iterable[EngineObservation],
        recent: Callable[[], RecentTraffic | None],
        accelerator: Callable[[], str] = lambda: "",
        now_s: float,
    ) -> LoadSample | None:
        """Take in what there is. A minute counts where the number of ready replicas did not change
        in it. Returns the minute that ended now, where it said something new."""
        loads = [one.load for one in engines]
        for one in loads:
            self._kv_tokens = one.kv_cache_tokens or self._kv_tokens
            self._requests_most = one.max_running_requests or self._requests_most
        if self._begun_at_s is None or ready != self._ready:
            self._begin(now_s, ready)
        self._looks += 1
        if demand is not None and demand.queued_requests:
            self._waited += 1.0
        elif loads:
            # Of many replicas one or another has a request waiting that has just come.
            self._waited += sum(bool(one.waiting_requests) for one in loads) / len(loads)
        if self._begun_at_s is None or now_s - self._begun_at_s < MINUTE_S:
            return None
        traffic, waited = recent(), self._waited >= WAITED_SHARE * self._looks
        self._begin(now_s, ready)
        if traffic is None:
            return None
        self._traffic, self._asked = traffic, None
        self._accelerator = accelerator() or self._accelerator
        answers = max(0.0, traffic.requests_per_s - traffic.errors_per_s) * MINUTE_S
        self._answers = KEPT_SHARE * self._answers + answers
        prompt, output = traffic.prompt_tokens_per_s, traffic.generation_tokens_per_s
        self._prompt_tokens = KEPT_SHARE * self._prompt_tokens + prompt * MINUTE_S
        self._output_tokens = KEPT_SHARE * self._output_tokens + output * MINUTE_S
        came, asked, expected = (
            traffic.arrivals_per_s,
            traffic.arrived_prompt_tokens_per_s,
            traffic.arrived_output_tokens_per_s,
        )
        if came is not None and asked is not None and expected is not None:
            self._arrivals = KEPT_SHARE * self._arrivals + came * MINUTE_S
            arrived = (asked + expected) * MINUTE_S
            self._arrived_tokens = KEPT_SHARE * self._arrived_tokens + arrived
        first_late, next_late = find_late(pool, traffic)
        if not ready or answers < ENDED_LEAST or (first_late and not (waited or next_late)):
            return None  # late without a queue is a wake that had to be waited for, or long prompts
        sample = LoadSample(
            tokens_per_s=(prompt + output) / ready,
            mix=Mix(prompt * MINUTE_S / answers, output * MINUTE_S / answers),
            within_slo=not (first_late or next_late),
            waited=waited,
            accelerator=self._accelerator,
        )
        if not is_telling(self._state, sample):
            return None
        self._state = note_load(self._state, sample)
        return sample

    def _begin(self, now_s: float, ready: int) -> None:
        self._begun_at_s, self._ready = now_s, ready
        self._looks, self._waited = 0, 0.0

    def capacity(
        self, pool: PoolSettings, target_utilization_fraction: float
    ) -> ReplicaCapacity | None:
        """What one replica sustains, in tokens as those of demand are counted: estimated when a
        request comes. ``None`` where nothing is known of it yet."""
        asked = (pool, target_utilization_fraction)
        if asked != self._asked:  # the same within a minute
            self._asked, self._found = asked, self._estimate(pool, target_utilization_fraction)
        return self._found

    def _estimate(
        self, pool: PoolSettings, target_utilization_fraction: float
    ) -> ReplicaCapacity | None:
        derived = hint = mix = None
        scale = 1.0
        if self._answers >= 1.0:
            mix = Mix(self._prompt_tokens / self._answers, self._output_tokens / self._answers)
            scale = self._scale(mix)
        e2e_s = None if self._traffic is None else self._traffic.e2e_mean_s
        if mix is not None and e2e_s:
            # A target of tokens in flight is a rate too, by Little's law, and it is what a replica
            # is loaded to, not all that it can. An idle engine is fast, so what is derived of its
            # times is no more than that either.
            hint = pool.target_inflight_tokens / e2e_s / target_utilization_fraction / scale
            derived = self._derive(pool, mix, e2e_s)
            derived = None if derived is None else min(derived, hint)
        found = estimate_capacity(
            self._state, mix=mix, accelerator=self._accelerator, derived=derived, hint=hint
        )
        return None if found is None else replace(found, tokens_per_s=found.tokens_per_s * scale)

    def _scale(self, mix: Mix) -> float:
        """How many tokens a request is estimated to be, for each that it has. Of short prompts,
        which are mostly JSON, that is more than one."""
        if self._arrivals < ENDED_LEAST or not self._arrived_tokens or not mix.tokens:
            return 1.0
        scale = self._arrived_tokens / self._arrivals / mix.tokens
        return min(max(scale, 1.0 / MOST_SCALE), MOST_SCALE)

    def _derive(self, pool: PoolSettings, mix: Mix, e2e_s: float) -> float | None:
        limits = engine_of(pool.engine).limits(pool.engine_args)
        known = (pool.max_inflight_requests, limits.running_requests, self._requests_most)
        most = running_most(
            mix,
            kv_tokens=self._kv_tokens,
            requests_most=min((one for one in known if one is not None), default=None),
        )
        if most is None:
            return None
        return derive_tokens_per_s(
            mix,
            e2e_s=e2e_s,
            running_most=most,
            itl_s=None if self._traffic is None else self._traffic.itl_mean_s,
            batched_tokens_most=limits.batched_tokens,
        )


def describe_setup(pool: PoolSettings, digest: str) -> str:
    """All that a replica's capacity depends on, but for its accelerator, in a few characters:
    what replicas are started with (their ``digest``), what they are given at once, and the SLO."""
    given = [pool.max_inflight_requests, pool.max_inflight_tokens]
    text = json.dumps([digest, *given, pool.slo.model_dump(mode="json")])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def find_late(pool: PoolSettings, traffic: RecentTraffic) -> tuple[bool, bool]:
    """Whether first tokens, and those after them, came later in the last minute than the pool's SLO
    has it."""
    ttft_s, itl_s, slo = traffic.ttft_p95_s, traffic.itl_p95_s, pool.slo
    first_late = ttft_s is not None and ttft_s > slo.ttft_s
    return first_late, slo.itl_s is not None and itl_s is not None and itl_s > slo.itl_s
