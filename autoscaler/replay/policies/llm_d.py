"""Our re-implementations of two of llm-d's rules: the SLO-aware autoscaler, and WVA's second
analyzer."""

from __future__ import annotations

import math

from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.windows import Largest, Mean
from autoscaler.replay.types import PoolObservation

UP_AT, DOWN_AT = 0.55, 0.40
MOST_PRESSURE = 2.0
MEAN_S = 45.0
UP_STABLE_S, DOWN_STABLE_S = 30.0, 180.0


class LlmDSlo:
    """Pressure s = max(p90 TTFT / SLO, p90 TPOT / SLO), at most 2, as a mean of 45 s.

    Above 0.55: n + ceil(n * (s * ready / n / 0.55 - 1)); below 0.40: n - floor(n * (1 - s / 0.40)).
    Up to the least of the last 30 s, down to the largest of the last 180 s.
    """

    def __init__(self, facts: PoolFacts) -> None:
        self.name = "llm-d-slo"
        self.interval_s = 15.0
        self._slo = facts.slo
        self._mean = Mean(MEAN_S)
        self._largest, self._least = Largest(DOWN_STABLE_S), Largest(UP_STABLE_S)

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        current = seen.ready + seen.starting
        if current == 0:
            return 1 if seen.queued_requests else 0
        pressure = max(
            (seen.ttft_s or 0.0) / self._slo.ttft_s, (seen.itl_s or 0.0) / self._slo.itl_s
        )
        # All that is held while nothing is ready is late, though no answer says so yet.
        if not seen.ready and seen.queued_requests:
            pressure = MOST_PRESSURE
        pressure = self._mean.add(now_s, min(MOST_PRESSURE, pressure))
        wanted = current
        if pressure > UP_AT:
            more = current * (pressure * seen.ready / current / UP_AT - 1.0)
            wanted = current + max(0, math.ceil(more - 1e-9))
        elif pressure < DOWN_AT:
            wanted = current - math.floor(current * (1.0 - pressure / DOWN_AT) + 1e-9)
        most = self._largest.add(now_s, wanted)
        least = -self._least.add(now_s, -wanted)
        if wanted > current:
            return max(current, least)
        return max(1, min(current, most))


class LlmDWva:
    """Capacity and demand in KV tokens.

    A replica holds min(0.8 * KV, N * (I + O / 2)) with N = min(B * O / (I + O), S) requests of I
    prompt and O output tokens, B tokens a batch and S sequences: as many as the SLO allows, as a
    careful operator sets it. Needed is what runs and waits over 0.85 of that, less what is there or
    on its way; one that is not needed at 0.7 goes.
    """

    UP_AT, DOWN_AT = 0.85, 0.70

    def __init__(self, facts: PoolFacts) -> None:
        self.name = "llm-d-wva"
        self.interval_s = 30.0
        engine, prompt, output = facts.engine, facts.prompt_tokens, facts.output_tokens
        batch = engine.chunk_tokens * output / (prompt + output)
        sequences = max(1.0, min(batch, facts.concurrency))
        self._capacity = min(0.8 * engine.kv_tokens, sequences * (prompt + output / 2))
        self._held = (prompt + output / 2) / (prompt + output)

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas."""
        current = seen.ready + seen.starting
        demand = (seen.inflight_tokens + seen.queued_tokens) * self._held
        if current == 0:
            return 1 if seen.queued_requests else 0
        supply = current * self._capacity
        if demand > self.UP_AT * supply:
            return current + math.ceil((demand / self.UP_AT - supply) / self._capacity - 1e-9)
        spare = supply - demand / self.DOWN_AT
        if not seen.starting and spare >= self._capacity and current > 1:
            return current - 1
        return current
