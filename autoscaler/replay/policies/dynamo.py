"""Our re-implementations of the two loops of NVIDIA Dynamo's planner, on replicas that do both
prefill and decode.

The load loop, every 5 s: one more when all engines' next TTFT or ITL would miss the SLA, one less
when one fewer would still keep 0.8 of it, nothing while a start is under way. The throughput loop,
every 180 s: as many as a forecast of the next interval needs, where the forecast is a Kalman filter
of a level and a trend in its steady state (Holt's linear method). Together the second is a floor
under the first.
"""

from __future__ import annotations

from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.windows import Rate, replicas_for
from autoscaler.replay.types import PoolObservation

LOAD_S, THROUGHPUT_S = 5.0, 180.0
SENSITIVITY = 0.8
MOST_STEP = 8
LEVEL, TREND = 0.6, 0.2
"""Gains of the filter."""


class DynamoLoad:
    """The load loop."""

    def __init__(self, facts: PoolFacts) -> None:
        self.name = "dynamo-load"
        self.interval_s = LOAD_S
        self._facts = facts
        self._number: int | None = None

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        if self._number is None:
            self._number = seen.ready + seen.starting
        if seen.starting or not seen.ready:
            self._number = max(self._number, 1 if seen.queued_requests else 0)
            return self._number
        self._number = seen.ready
        if self._missed(seen, seen.ready):
            self._number += 1
        elif seen.ready > 1 and self._spare(seen):
            self._number -= 1
        return self._number

    def _queue_s(self, seen: PoolObservation, replicas: int) -> float:
        """Seconds of prefill that wait before each engine."""
        facts = self._facts
        prompt = seen.queued_tokens * facts.prompt_tokens / facts.tokens_per_request
        return prompt / (replicas * facts.engine.prefill_tokens_per_s)

    def _own_s(self) -> float:
        return self._facts.prompt_tokens / self._facts.engine.prefill_tokens_per_s

    def _itl_s(self, seen: PoolObservation, replicas: int) -> float:
        """The ITL with what runs and waits on so many engines, beside their share of prefill."""
        engine = self._facts.engine
        running = (seen.inflight_requests + seen.queued_requests) / replicas
        idle_s = engine.itl_base_s + engine.itl_slope_s * running
        now_s = engine.itl_base_s + engine.itl_slope_s * seen.inflight_requests / seen.ready
        stretch = max(1.0, (seen.itl_s or 0.0) / now_s) if now_s else 1.0
        return idle_s * stretch

    def _missed(self, seen: PoolObservation, replicas: int) -> bool:
        slo = self._facts.slo
        ttft_s = self._queue_s(seen, replicas) + self._own_s()
        return ttft_s > slo.ttft_s or self._itl_s(seen, replicas) > slo.itl_s

    def _spare(self, seen: PoolObservation) -> bool:
        facts, fewer = self._facts, seen.ready - 1
        if self._queue_s(seen, fewer) >= (facts.slo.ttft_s - self._own_s()) * SENSITIVITY:
            return False
        if seen.utilization is not None and seen.utilization * seen.ready / fewer >= 1.0:
            return False  # the engines could not prefill what comes
        if self._itl_s(seen, fewer) >= facts.slo.itl_s * SENSITIVITY:
            return False
        held = seen.inflight_tokens + seen.queued_tokens
        return held / fewer < facts.engine.kv_tokens


class DynamoThroughput:
    """The throughput loop."""

    def __init__(self, facts: PoolFacts) -> None:
        self.name = "dynamo-throughput"
        self.interval_s = THROUGHPUT_S
        self._capacity = facts.capacity_tokens_per_s
        self._rate = Rate(THROUGHPUT_S)
        self._level: float | None = None
        self._trend = 0.0
        if facts.history is not None:
            per_interval = round(THROUGHPUT_S / facts.history.step_s)
            values = facts.history.values
            whole = len(values) // per_interval * per_interval
            for value in values[len(values) - whole :].reshape(-1, per_interval).mean(axis=1):
                self._filter(float(value))

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        rate = self._rate.add(now_s, seen.arrived_tokens_total)
        current = seen.ready + seen.starting
        if current == 0 and seen.queued_requests:
            return 1
        if rate is None:
            return current
        coming = max(0.0, self._filter(rate))
        wanted = max(1, replicas_for(coming, self._capacity))
        return max(current - MOST_STEP, min(current + MOST_STEP, wanted))

    def _filter(self, value: float) -> float:
        """Take in an interval's rate; the forecast of the next."""
        if self._level is None:
            self._level = value
            return value
        before = self._level
        self._level = LEVEL * value + (1.0 - LEVEL) * (before + self._trend)
        self._trend = TREND * (self._level - before) + (1.0 - TREND) * self._trend
        return self._level + self._trend


class DynamoHybrid:
    """Both loops: the throughput loop's number is a floor under the load loop's."""

    def __init__(self, facts: PoolFacts) -> None:
        self.name = "dynamo-hybrid"
        self.interval_s = LOAD_S
        self._load = DynamoLoad(facts)
        self._throughput = DynamoThroughput(facts)
        self._floor = 0
        self._next_s: float | None = None

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        if self._next_s is None or now_s >= self._next_s:
            self._floor = self._throughput.step(now_s, seen)
            self._next_s = now_s + THROUGHPUT_S
        return max(self._floor, self._load.step(now_s, seen))
