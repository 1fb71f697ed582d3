"""A burst that recurs every few minutes: foretold from its third time on, and not in between."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from autoscaler.policy.decide import DecideState, decide
from autoscaler.policy.outlook import OutlookMaker, find_least
from autoscaler.settings import AutoscalerSettings, PoolSettings, make_policy
from autoscaler.signals.rates import FINE_STEP_S
from autoscaler.tiers.idle_planner import chance_of_requests
from autoscaler.types import (
    CapacitySource,
    Outlook,
    PoolStatus,
    ReplicaCapacity,
    ScaleReason,
    WindowedDemand,
)
from forecaster.types import Floats, History

LEAD_S = 26.0
SURE = 0.5


def bursts(period_s: float, count: int, *, first_s: float = 60.0, seed: int = 1) -> Floats:
    """Tokens per second on the fine grid: ten requests within ten seconds, again and again."""
    rng = np.random.default_rng(seed)
    steps = round((first_s + count * period_s) / FINE_STEP_S)
    values = np.zeros(steps)
    for number in range(count):
        at_s = first_s + number * period_s + rng.uniform(-1.0, 1.0)
        for request_s in at_s + np.r_[0.0, rng.uniform(0.0, 10.0, 9)]:
            step = int(request_s // FINE_STEP_S)
            if step < steps:
                values[step] += 100.0 / FINE_STEP_S
    return values


@pytest.mark.parametrize("period_s", [120.0, 240.0])
def test_third_burst_is_foretold_and_the_quiet_before_it_is_not(period_s: float) -> None:
    values, maker = bursts(period_s, 5), OutlookMaker()

    def chance(at_s: float) -> float:
        history = History(values=values[: round(at_s / FINE_STEP_S)], step_s=FINE_STEP_S)
        return chance_of_requests(maker.make(history, history, LEAD_S, 0.0))

    for burst_s in (60.0 + number * period_s for number in range(2, 5)):
        assert min(chance(burst_s - one) for one in (25.0, 15.0)) > SURE, burst_s
    # Once each place of the period was seen twice, it is known to be quiet too.
    for burst_s in (60.0 + number * period_s for number in range(3, 5)):
        assert max(chance(burst_s - one) for one in (45.0, 60.0, period_s - 20.0)) < SURE, burst_s


def test_least_that_is_of_a_request_follows_what_requests_there_are() -> None:
    assert find_least(np.zeros(10)) == pytest.approx(0.1)
    assert find_least(np.array([0.0, 20.0, np.nan, 20.0, 0.0])) == pytest.approx(10.0)


POLICY = make_policy(
    PoolSettings.model_validate(
        {"name": "a", "engine": "simulated", "model": "m", "max_replicas": 8}
    ),
    AutoscalerSettings(),
)
NOW_S = 10_000.0
IDLE = WindowedDemand(
    tokens=0,
    requests=0,
    stable_tokens=0.0,
    panic_tokens=0.0,
    stable_requests=0.0,
    panic_requests=0.0,
    stable_tokens_per_s=0.0,
    panic_tokens_per_s=0.0,
    arrivals_total=7,
)
EXPECTED = Outlook(
    made_at_s=NOW_S,
    model="m",
    lead_s=30.0,
    levels=(0.05, 0.5, 0.95),
    tokens_per_s=(210.0, 220.0, 230.0),
)
NONE = replace(EXPECTED, tokens_per_s=(0.0, 0.0, 0.0))
WHY = "a request is expected"


@pytest.mark.parametrize(
    ("name", "outlook", "prewarm", "idle_s", "desired", "reason"),
    [
        ("as many as are forecast", EXPECTED, WHY, 900.0, 3, ScaleReason.FORECAST),
        ("one at least", NONE, WHY, 900.0, 1, ScaleReason.PREWARM),
        ("it does not pay", EXPECTED, "", 900.0, 0, ScaleReason.AT_ZERO),
        ("nor just after a restart", NONE, "", 0.0, 0, ScaleReason.AT_ZERO),
    ],
)
def test_pool_at_zero_with_a_forecast(
    name: str, outlook: Outlook, prewarm: str, idle_s: float, desired: int, reason: ScaleReason
) -> None:
    decision, _ = decide(
        POLICY,
        PoolStatus(prewarm=prewarm),
        IDLE,
        DecideState(arrivals_total=7, active_at_s=NOW_S - idle_s),
        NOW_S,
        capacity=ReplicaCapacity(tokens_per_s=100.0, source=CapacitySource.SATURATED),
        outlook=outlook,
    )
    assert (decision.desired, decision.reason) == (desired, reason)


def test_forecast_counts_for_an_idle_pool_that_never_goes_to_zero() -> None:
    decision, _ = decide(
        replace(POLICY, min_replicas=1, idle_to_zero_s=60.0),
        PoolStatus(ready=1, ready_at_s=0.0),
        IDLE,
        DecideState(arrivals_total=7, active_at_s=NOW_S - 900.0),
        NOW_S,
        capacity=ReplicaCapacity(tokens_per_s=100.0, source=CapacitySource.SATURATED),
        outlook=EXPECTED,
    )
    assert (decision.desired, decision.reason) == (3, ScaleReason.FORECAST)
