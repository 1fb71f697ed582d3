"""What one replica carries: learned from minutes in which it was loaded as far as it could be.

A minute in which requests waited, or were answered beyond the SLO, shows a limit. Where they waited
and were still within the SLO, the throughput was the capacity. Where they were beyond it, the
capacity lies between the best minute within the SLO and that one. Before any limit was seen there
are what an earlier control process learned, what can be derived from the engine, and a hint.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

from autoscaler.types import CapacitySource, ReplicaCapacity

SAMPLES = 240
"""Minutes under load that are remembered: of the mix of requests that there is now."""
LIMITS_LEAST = 3
"""Minutes at a limit before they are believed: one may have been the start of a replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSample:
    """A minute of a pool in which the number of its replicas did not change: prompt and output
    tokens per second that each of them worked off, whether all was within the SLO, and whether
    requests waited."""

    tokens_per_s: float
    within_slo: bool
    waited: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityState:
    """What was seen, oldest first, and what an earlier control process had learned."""

    samples: tuple[LoadSample, ...] = ()
    learned_tokens_per_s: float | None = None


def note_load(state: CapacityState, sample: LoadSample) -> CapacityState:
    """The state with one more minute; those without any work say nothing."""
    if not sample.tokens_per_s > 0.0:
        return state
    return replace(state, samples=(*state.samples, sample)[-SAMPLES:])


def estimate_capacity(
    state: CapacityState, *, derived: float | None = None, hint: float | None = None
) -> ReplicaCapacity | None:
    """What a replica sustains within the SLO; ``None`` where nothing is known.

    ``derived`` and ``hint`` are tokens per second. Neither counts below what was done within the
    SLO already.
    """
    good = [one.tokens_per_s for one in state.samples if one.within_slo]
    full = [one.tokens_per_s for one in state.samples if one.within_slo and one.waited]
    beyond = [one.tokens_per_s for one in state.samples if not one.within_slo]
    best = max(good, default=0.0)
    if len(full) >= LIMITS_LEAST:
        return ReplicaCapacity(
            tokens_per_s=statistics.median(full), source=CapacitySource.SATURATED
        )
    if len(beyond) >= LIMITS_LEAST:
        limit = statistics.median(beyond)
        return ReplicaCapacity(
            tokens_per_s=min(best, limit) if best else limit, source=CapacitySource.SATURATED
        )
    for tokens_per_s, source in (
        (state.learned_tokens_per_s, CapacitySource.HISTORY),
        (derived, CapacitySource.DERIVED),
        (hint, CapacitySource.HINT),
    ):
        if tokens_per_s is not None and tokens_per_s > 0.0:
            return ReplicaCapacity(tokens_per_s=max(best, tokens_per_s), source=source)
    return None


def derive_tokens_per_s(
    *,
    prompt_tokens: float,
    output_tokens: float,
    e2e_s: float,
    running_most: float,
) -> float | None:
    """Tokens per second of a replica that keeps as many requests running as it can (Little's law):
    each request of these means is there for ``e2e_s``. ``None`` where a figure is missing."""
    if e2e_s <= 0.0 or running_most <= 0.0:
        return None
    return running_most * (prompt_tokens + output_tokens) / e2e_s


def running_most(
    *,
    kv_tokens: float | None,
    max_requests: float | None,
    prompt_tokens: float,
    output_tokens: float,
) -> float | None:
    """Requests that fit in the KV cache of a replica and below its limits at a time: each holds its
    prompt and on average half of its output (as the workload variant autoscaler of llm-d has it).
    ``None`` where neither is known."""
    limits = [] if max_requests is None else [max_requests]
    held = prompt_tokens + output_tokens / 2
    if kv_tokens is not None and held > 0.0:
        limits.append(kv_tokens / held)
    return min(limits, default=None)
