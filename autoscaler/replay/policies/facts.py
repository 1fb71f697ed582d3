"""What a policy is built with: the same for all."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoscaler.replay.engine import COUNTED, ReplicaModel, Slo
from forecaster.types import History


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """What is known of a pool before a policy is first stepped.

    ``capacity_tokens_per_s`` is what one replica sustains within the SLO for this pool's mean
    request. The others are for policies that need them: ``concurrency`` is how many requests it has
    in flight then, ``target_concurrency`` how many at 0.7 of it, which is what a careful operator
    sets where a product wants a number of requests; of ``engine`` the rules are asked that watch an
    SLO. ``history`` is tokens per second of each minute up to the first step, where there is one.
    """

    capacity_tokens_per_s: float
    concurrency: float = 100.0
    target_concurrency: float = 70.0
    cold_start_s: float = 60.0
    prompt_tokens: float = 1.0
    """Of the mean request."""
    output_tokens: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 1_000
    history: History | None = None
    engine: ReplicaModel = COUNTED
    slo: Slo = field(default_factory=Slo)

    @property
    def tokens_per_request(self) -> float:
        """Prompt and output tokens of the mean request."""
        return self.prompt_tokens + self.output_tokens
