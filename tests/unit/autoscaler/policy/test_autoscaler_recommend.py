"""What each signal recommends, as tables; and what holds for any forecast and any backlog."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.decide import DecideState, decide
from autoscaler.policy.recommend import (
    provision,
    recommend,
    recommend_for_backlog,
    recommend_for_targets,
    value_at,
)
from autoscaler.settings import AutoscalerSettings, PoolSettings, make_policy
from autoscaler.types import (
    Bound,
    CapacitySource,
    Outlook,
    PoolStatus,
    ReplicaCapacity,
    ScaleReason,
    Signal,
    TargetFigures,
    WindowedDemand,
)

NOW = 10_000.0
POOL = {"name": "m", "engine": "simulated", "model": "m", "max_replicas": 50}
POLICY = make_policy(
    PoolSettings.model_validate(POOL), AutoscalerSettings(max_scale_up_per_tick=50)
)
CAPACITY = ReplicaCapacity(tokens_per_s=100.0, source=CapacitySource.SATURATED)
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.975, 0.99)
RECENT = DecideState(arrivals_total=0, active_at_s=NOW - 1.0)


def arriving(stable: float, panic: float | None = None, queued: int = 0) -> WindowedDemand:
    """Tokens that arrive at these rates, and what is queued."""
    return WindowedDemand(
        tokens=round(stable),
        requests=5,
        stable_tokens=stable,
        panic_tokens=stable,
        stable_requests=5,
        panic_requests=5,
        stable_tokens_per_s=stable,
        panic_tokens_per_s=stable if panic is None else panic,
        queued_tokens=queued,
        arrivals_total=0,
        some_requests=True,
        some_queued=queued > 0,
    )


def outlook(middle: float, spread: float = 0.0, **more: str) -> Outlook:
    """A forecast around these tokens per second, this wide from its median to its 0.9."""
    places = [value_at(LEVELS, range(-4, 5), level) for level in LEVELS]
    return Outlook(
        made_at_s=NOW,
        model="direct",
        lead_s=60.0,
        levels=LEVELS,
        tokens_per_s=tuple(max(0.0, middle + spread * place) for place in places),
        **more,
    )


SIX = PoolStatus(ready=6, lead_s=60.0)
CASES = [
    # name, status, demand, outlook, desired, reason, signal, bound
    (
        "without a forecast replicas are loaded to their target", SIX, arriving(560), None,
        8, ScaleReason.DEMAND, Signal.STABLE_TOKENS_PER_S, None,
    ),
    (
        "with one the headroom is the forecast's", SIX, arriving(560), outlook(560),
        6, ScaleReason.STEADY, Signal.STABLE_TOKENS_PER_S, None,
    ),
    (
        "ahead of demand", SIX, arriving(560), outlook(910),
        10, ScaleReason.FORECAST, Signal.FORECAST, None,
    ),
    (
        "reaction where the forecast is too low", SIX, arriving(760), outlook(300),
        8, ScaleReason.DEMAND, Signal.STABLE_TOKENS_PER_S, None,
    ),
    (
        "a forecast that is not trusted is not used", SIX, arriving(560),
        outlook(910, distrust="less than two days of history"),
        8, ScaleReason.DEMAND, Signal.STABLE_TOKENS_PER_S, None,
    ),
    (
        "down to the forecast", SIX, arriving(150), outlook(210),
        3, ScaleReason.SCALE_DOWN, Signal.FORECAST, None,
    ),
    (
        "a backlog that those there can work off", SIX, arriving(450, queued=1_500), outlook(450),
        6, ScaleReason.STEADY, Signal.BACKLOG, None,
    ),
    (
        "a backlog that those there cannot work off", SIX, arriving(600, queued=4_000),
        outlook(450), 9, ScaleReason.DEMAND, Signal.BACKLOG, None,
    ),
    (
        "a backlog for which enough are on their way",
        PoolStatus(ready=6, starting=4, lead_s=60.0, arriving_s=(5.0, 5.0, 5.0, 5.0)),
        arriving(600, queued=4_000), outlook(560),
        10, ScaleReason.STEADY, Signal.BACKLOG, None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("status", "demand", "seen", "desired", "reason", "signal", "bound"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_decision_with_a_capacity(
    status: PoolStatus,
    demand: WindowedDemand,
    seen: Outlook | None,
    desired: int,
    reason: ScaleReason,
    signal: Signal,
    bound: Bound | None,
) -> None:
    decision, _ = decide(POLICY, status, demand, RECENT, NOW, capacity=CAPACITY, outlook=seen)
    got = (decision.desired, decision.reason, decision.signal, decision.bound)
    assert got == (desired, reason, signal, bound), decision
    assert decision.capacity == CAPACITY
    assert (decision.forecast is None) == bool(decision.fallback)


TARGET_CASES = [
    # name, targets, seen, ready, replicas
    ("requests per second", {"requests_per_s": 4.0}, {"requests_per_s": 33.0}, 2, 9),
    ("a queue", {"queued_requests": 2.0}, {"queued_requests": 7.0}, 2, 4),
    ("a latency that is too long", {"ttft_s": 1.0}, {"ttft_s": 1.5}, 4, 6),
    ("a latency within the tolerance", {"itl_s": 0.05}, {"itl_s": 0.0545}, 4, 4),
    ("a latency that is far too long", {"e2e_s": 1.0}, {"e2e_s": 60.0}, 4, 8),
    ("a latency that is short", {"e2e_s": 1.0}, {"e2e_s": 0.5}, 4, 2),
    ("busy GPUs", {"gpu_utilization_fraction": 0.7}, {"gpu_utilization_fraction": 0.95}, 4, 6),
    ("the largest need wins", {"requests_per_s": 4.0, "ttft_s": 1.0},
     {"requests_per_s": 33.0, "ttft_s": 1.5}, 4, 9),
    ("what is not known asks for nothing", {"ttft_s": 1.0}, {}, 4, None),
    ("nor what has no target", {}, {"ttft_s": 60.0}, 4, None),
    ("a latency without a replica", {"ttft_s": 1.0}, {"ttft_s": 1.5}, 0, None),
]  # fmt: skip


@pytest.mark.parametrize(
    ("targets", "seen", "ready", "replicas"),
    [pytest.param(*case[1:], id=case[0]) for case in TARGET_CASES],
)
def test_targets(
    targets: dict[str, float], seen: dict[str, float], ready: int, replicas: int | None
) -> None:
    pool = PoolSettings.model_validate({**POOL, "targets": targets})
    policy = make_policy(pool, AutoscalerSettings(max_scale_up_per_tick=50))
    status = PoolStatus(ready=ready)
    found = recommend_for_targets(policy, status, TargetFigures(**seen))
    assert (None if found is None else found.replicas) == replicas
    decision, _ = decide(
        policy, status, arriving(100), RECENT, NOW, seen=TargetFigures(**seen), capacity=CAPACITY
    )
    assert decision.desired == max(2, replicas or 0)
    assert (decision.signal is Signal.TARGET) == ((replicas or 0) > 2)


def test_without_a_capacity_tokens_in_flight_count() -> None:
    decision, _ = decide(POLICY, SIX, arriving(99_000), RECENT, NOW, outlook=outlook(910))
    assert decision.signal is Signal.STABLE_TOKENS
    assert decision.fallback


def test_the_dearer_a_violation_the_larger_the_quantile() -> None:
    rows = outlook(1_000, spread=100).tokens_per_s
    found = [provision(LEVELS, rows, 100.0, price) for price in (1.0, 5.0, 50.0)]
    replicas, levels = zip(*found, strict=True)
    assert replicas[0] < replicas[1] < replicas[2]
    assert levels[0] < levels[1] < levels[2]
    assert 10 <= replicas[0] <= replicas[2] <= 18


def test_what_is_certain_is_provided_for_exactly() -> None:
    assert provision(LEVELS, (730.0,) * 9, 100.0, 5.0) == (8, pytest.approx(1.0, abs=1e-3))
    assert provision(LEVELS, (0.0,) * 9, 100.0, 5.0)[0] == 1


rates = st.lists(st.floats(0, 1e6), min_size=9, max_size=9).map(sorted).map(tuple)


@given(rates, st.floats(1.0, 1e5), st.floats(0.1, 1e3))
def test_any_forecast_gives_a_number_within_what_it_says(
    tokens_per_s: tuple[float, ...], each: float, price: float
) -> None:
    replicas, level = provision(LEVELS, tokens_per_s, each, price)
    assert replicas >= 1
    assert 0.0 <= level <= 1.0
    assert replicas >= tokens_per_s[0] / each - 1e-3
    assert replicas <= 1 + (tokens_per_s[-1] * 4 + each) / each * 2


@given(st.integers(0, 10**7), st.floats(0, 1e5), st.integers(0, 9), st.integers(0, 9))
def test_a_backlog_asks_for_no_fewer_the_longer_it_is(
    queued: int, rate: float, ready: int, starting: int
) -> None:
    status = PoolStatus(ready=ready, starting=starting, lead_s=60.0, arriving_s=(30.0,) * starting)
    demand = arriving(rate, queued=queued)
    more = replace(demand, queued_tokens=queued * 2 + 1)
    one = recommend_for_backlog(POLICY, status, demand, CAPACITY)
    other = recommend_for_backlog(POLICY, status, more, CAPACITY)
    assert other is not None
    assert (one is None) == (queued == 0)
    assert one is None or one.replicas <= other.replicas


LASTING = [
    # name, the panic window's rate, its deviation before; replicas for what is queued
    ("as even as never: all of it lasts", 900.0, 0.0, 22),
    ("how it came before is not known: all of it", 900.0, None, 22),
    ("no more than chance: none of it", 900.0, 150.0, 7),
    ("some of it is more than chance", 900.0, 75.0, 18),
]


@pytest.mark.parametrize(
    ("panic", "deviation", "replicas"), [pytest.param(*case[1:], id=case[0]) for case in LASTING]
)
def test_a_gust_is_not_taken_to_last(panic: float, deviation: float | None, replicas: int) -> None:
    """600 tokens/s in the stable window, six replicas, a minute to start."""
    demand = replace(arriving(600, panic, queued=1), panic_deviation_tokens_per_s=deviation)
    found = recommend_for_backlog(POLICY, SIX, demand, CAPACITY)
    assert found is not None
    assert found.replicas == replicas
    panicked = recommend(POLICY, demand, CAPACITY).panic
    assert panicked is not None
    assert panicked.replicas == {0.0: 9, None: 9, 150.0: 6, 75.0: 9}[deviation]
