"""What every scaling policy keeps to, and the formulas of each."""

from __future__ import annotations

import numpy as np
import pytest

from autoscaler.replay.engine import COUNTED, ReplicaModel
from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.registry import (
    POLICIES,
    TOKENS_ONLY,
    UnknownPolicyError,
    build,
)
from autoscaler.replay.run import ReplayedPool, Score, cut, facts_of, find_oracle, replay
from autoscaler.replay.supply import Starts
from autoscaler.replay.traces import from_rates
from autoscaler.replay.types import PoolObservation

MINUTES = 180


def seen(**fields: float | None) -> PoolObservation:
    given: dict[str, float | None] = {
        "ready": 10,
        "starting": 0,
        "arrivals_total": 0.0,
        "arrived_tokens_total": 0.0,
        "queued_requests": 0.0,
        "queued_tokens": 0.0,
        "inflight_requests": 0.0,
        "inflight_tokens": 0.0,
    }
    return PoolObservation(**{**given, **fields})  # type: ignore[arg-type]


def facts(**fields: object) -> PoolFacts:
    given: dict[str, object] = {
        "capacity_tokens_per_s": 20.0,
        "concurrency": 100.0,
        "target_concurrency": 70.0,
        "cold_start_s": 60.0,
        "engine": COUNTED,
    }
    return PoolFacts(**{**given, **fields})  # type: ignore[arg-type]


# ── All of them ──────────────────────────────────────────────────────────────────────────────────


def waves() -> np.ndarray:
    """Three hours with a tide and a burst."""
    minutes = np.arange(MINUTES)
    tide = 600 + 400 * np.sin(2 * np.pi * minutes / 60) + 80 * np.sin(2 * np.pi * minutes / 7)
    tide[150:154] *= 2.5
    return tide


CASES = [(name, True) for name in (*POLICIES, "oracle")] + [
    (name, False) for name in (*POLICIES, "oracle") if name not in TOKENS_ONLY
]


@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_a_policy_plays_a_trace_the_same_way_twice(name: str, tokens: bool) -> None:
    requests = waves()
    trace = (
        from_rates("waves", requests, requests * 400, requests * 100)
        if tokens
        else from_rates("waves", requests)
    )
    engine = ReplicaModel(prefill_tokens_per_s=4_000.0) if tokens else COUNTED
    pool = ReplayedPool(engine=engine, starts=Starts.flat(45.0), max_replicas=40)
    part = cut(trace)

    def play() -> Score:
        if name == "oracle":
            return find_oracle(part, pool)[1]
        policy = build(name, facts_of(part, pool))
        return replay(part.played, policy, pool, run_in_s=part.run_in_s)

    score = play()
    again = play()
    assert score == again
    assert score.requests == pytest.approx(requests[MINUTES // 2 :].sum())
    assert score.replica_hours >= score.seconds / 3600
    assert score.cost == pytest.approx(score.replica_hours)
    assert sum(score.minutes.violations) == pytest.approx(score.violations)
    hours = sum(map(sum, (score.minutes.ready, score.minutes.starting, score.minutes.draining)))
    assert hours / 60 == pytest.approx(score.replica_hours, rel=0.01)


def test_an_unknown_policy_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UnknownPolicyError, match="knative"):
        build("hap", facts())
    assert build("static:7", facts()).step(0.0, seen()) == 7
