"""What a policy is built with: the same for all."""

from __future__ import annotations

from dataclasses import dataclass, field

from autoscaler.replay.engine import ReplicaModel, Slo
from forecaster.types import History


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """What is known of a pool before a policy is first stepped.

    ``capacity_tokens_per_s`` is what one replica sustains within the SLO for this pool's mean
    request, ``concurrency`` how many requests it has in flight then, and ``target_concurrency`` at
    0.7 of it: what a careful operator sets where a product wants a number of requests. ``history``
    is tokens per second of each minute up to the first step, where there is one.
    """

    capacity_tokens_per_s: float
    concurrency: float
    target_concurrency: float
    cold_start_s: float
    prompt_tokens: float = 1.0
    """Of the mean request."""
    output_tokens: float = 0.0
    min_replicas: int = 1
    max_replicas: int = 1_000
    history: History | None = None
    engine: ReplicaModel
    slo: Slo = field(default_factory=Slo)

    @property
    def tokens_per_request(self) -> float:
        """Prompt and output tokens of the mean request."""
        return self.prompt_tokens + self.output_tokens
