"""Decisions, and records of them, to be put into a history."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from autoscaler.control.decision_log import find_alone
from autoscaler.settings import AutoscalerSettings, PoolSettings, make_policy
from autoscaler.signals.decisions import DecisionRecord, make_figures
from autoscaler.types import (
    CapacitySource,
    Decision,
    DecisionInputs,
    ForecastTally,
    Outlook,
    PoolPolicy,
    PoolStatus,
    ReplicaCapacity,
    ScaleReason,
    Signal,
    WindowedDemand,
)

POLICY: PoolPolicy = replace(
    make_policy(PoolSettings.model_construct(name="chat", backend="process"), AutoscalerSettings()),
    max_replicas=8,
    scale_down_delay_s=60.0,
)
OUTLOOK = Outlook(
    made_at_s=0.0,
    model="direct",
    lead_s=60.0,
    levels=(0.5, 0.95),
    tokens_per_s=(420.0, 612.5),
)


def decision(
    at_s: float = 0.0,
    *,
    ready: int = 2,
    rate: float | None = 250.0,
    outlook: Outlook | None = OUTLOOK,
    policy: PoolPolicy = POLICY,
    **fields: Any,
) -> Decision:
    """A decision of ``chat``: 2 replicas of 200 tokens/s, and what it was made from."""
    return Decision(
        **{
            "pool": "chat",
            "at_s": at_s,
            "desired": 3,
            "supply": 3,
            "reason": ScaleReason.FORECAST,
            "detail": "612 tokens/s at most within 60 s",
            "signal": Signal.FORECAST,
            "reactive": 2,
            "forecast": 3,
            "level": 0.95,
            "capacity": ReplicaCapacity(tokens_per_s=200.0, source=CapacitySource.SATURATED),
            "inputs": DecisionInputs(
                policy=policy,
                status=PoolStatus(ready=ready, starting=1, lead_s=60.0),
                demand=WindowedDemand(
                    tokens=900,
                    requests=4,
                    stable_tokens_per_s=rate,
                    panic_tokens_per_s=rate,
                    queued_tokens=0,
                ),
                outlook=outlook,
                rules=((Signal.STABLE_TOKENS_PER_S, 2), (Signal.FORECAST, 3)),
            ),
            **fields,
        }
    )


def record(
    at_s: float,
    *,
    until_s: float | None = None,
    count: int = 1,
    before: int = 59,
    tally: ForecastTally = ForecastTally(),  # noqa: B008 -- it does not change
    **fields: Any,
) -> DecisionRecord:
    """That decision as it is kept."""
    made = decision(**fields)
    return DecisionRecord(
        pool=made.pool,
        at_s=at_s,
        until_s=at_s if until_s is None else until_s,
        count=count,
        before=before,
        figures=make_figures(made, find_alone(made)),
        tally=tally,
    )
