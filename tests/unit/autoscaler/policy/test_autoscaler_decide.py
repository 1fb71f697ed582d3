"""The decision, as tables of (name, what is known, expected), and what holds for any of it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.decide import (
    RECENT_BUCKETS,
    DecideState,
    decide,
    decide_removed,
    hold_back,
)
from autoscaler.settings import AutoscalerSettings, PoolSettings, make_policy
from autoscaler.types import Bound, PoolPolicy, PoolStatus, ScaleReason, Signal, WindowedDemand

R = ScaleReason
NOW = 10_000.0
POLICY = make_policy(
    PoolSettings.model_validate(
        {
            "name": "m",
            "engine": "simulated",
            "model": "m",
            "max_replicas": 10,
            "target_inflight_tokens": 1_000,
        }
    ),
    AutoscalerSettings(max_scale_up_per_tick=4),
)


def known(
    tokens: float = 0, requests: int = 0, *, arrivals: int = 0, panic: float = -1
) -> WindowedDemand:
    """Demand that has been the same for both windows, unless told otherwise."""
    return WindowedDemand(
        tokens=round(tokens),
        requests=requests,
        stable_tokens=tokens,
        panic_tokens=tokens if panic < 0 else panic,
        stable_requests=requests,
        panic_requests=requests,
        arrivals_total=arrivals,
        some_requests=requests > 0 or tokens > 0,
        some_queued=False,
    )


QUIET = DecideState(arrivals_total=0, active_at_s=NOW - 1_000.0)
RECENT = DecideState(arrivals_total=0, active_at_s=NOW - 10.0)
UNKNOWN = WindowedDemand()
TWO = replace(POLICY, min_replicas=2)

CASES = [
    # name, policy, status, demand, state, desired, reason, signal, bound
    ("no demand", POLICY, PoolStatus(), known(), QUIET, 0, R.AT_ZERO, "none", None),
    (
        "first request", POLICY, PoolStatus(), known(300, 1), QUIET,
        1, R.WAKE, Signal.HELD, None,
    ),
    (
        "first burst", POLICY, PoolStatus(), known(3_500, 9), QUIET,
        4, R.WAKE, Signal.HELD, None,
    ),
    (
        "huge burst is bounded per decision", POLICY, PoolStatus(), known(9_500, 30), QUIET,
        4, R.WAKE, Signal.HELD, Bound.MAX_SCALE_UP,
    ),
    (
        "came and went", POLICY, PoolStatus(), known(arrivals=1), QUIET,
        1, R.WAKE, Signal.ARRIVALS, None,
    ),
    (
        "counter was reset", POLICY, PoolStatus(), known(arrivals=2),
        replace(QUIET, arrivals_total=50), 1, R.WAKE, Signal.ARRIVALS, None,
    ),
    (
        "woken on unknown demand", POLICY, PoolStatus(wake_signal=True), UNKNOWN, QUIET,
        1, R.WAKE, Signal.HELD, None,
    ),
    (
        "unknown demand at zero starts none", POLICY, PoolStatus(), UNKNOWN, QUIET,
        0, R.AT_ZERO, "none", None,
    ),
    (
        "more is needed", POLICY, PoolStatus(ready=1), known(1_500, 3), RECENT,
        2, R.PANIC, Signal.STABLE_TOKENS, None,
    ),
    (
        "a little more is needed", POLICY, PoolStatus(ready=4), known(4_500, 9), RECENT,
        5, R.DEMAND, Signal.STABLE_TOKENS, None,
    ),
    (
        "exactly what is there", POLICY, PoolStatus(ready=4), known(4_000, 9), RECENT,
        4, R.STEADY, Signal.STABLE_TOKENS, None,
    ),
    (
        "pending replicas are supply", POLICY, PoolStatus(ready=1, starting=2, scheduled=1),
        known(4_000, 9), RECENT, 4, R.STEADY, Signal.STABLE_TOKENS, None,
    ),
    (
        "maximum", POLICY, PoolStatus(ready=9), known(99_000, 99), RECENT,
        10, R.PANIC, Signal.STABLE_TOKENS, Bound.MAX_REPLICAS,
    ),
    (
        "minimum from nothing", TWO, PoolStatus(), known(), QUIET,
        2, R.MINIMUM, "stable_tokens", Bound.MIN_REPLICAS,
    ),
    (
        "minimum holds when idle", TWO, PoolStatus(ready=2), known(), QUIET,
        2, R.MINIMUM, "stable_tokens", Bound.MIN_REPLICAS,
    ),
    (
        "minimum though demand is unknown", TWO, PoolStatus(ready=1), UNKNOWN, QUIET,
        2, R.MINIMUM, "none", Bound.MIN_REPLICAS,
    ),
    (
        "idle, not long enough", POLICY, PoolStatus(ready=1), known(), RECENT,
        1, R.IDLE, Signal.STABLE_TOKENS, Bound.IDLE_TO_ZERO,
    ),
    (
        "idle long enough", POLICY, PoolStatus(ready=1), known(), QUIET,
        0, R.IDLE_TO_ZERO, "none", None,
    ),
    (
        "idle since it became ready only", POLICY, PoolStatus(ready=1, ready_at_s=NOW - 10),
        known(), QUIET, 1, R.IDLE, Signal.STABLE_TOKENS, Bound.IDLE_TO_ZERO,
    ),
    (
        "idle, but loading", POLICY, PoolStatus(starting=1), known(), QUIET,
        1, R.STARTING, Signal.STABLE_TOKENS, Bound.STARTING,
    ),
    (
        "idle, but waking", POLICY, PoolStatus(waking=1), known(), QUIET,
        1, R.STARTING, Signal.STABLE_TOKENS, Bound.STARTING,
    ),
    (
        "idle crash loop is given up", POLICY, PoolStatus(scheduled=1), known(), QUIET,
        0, R.IDLE_TO_ZERO, "none", None,
    ),
    (
        "idle, arrivals unknown", POLICY, PoolStatus(ready=1),
        replace(known(), arrivals_total=None), QUIET,
        1, R.UNKNOWN_DEMAND, Signal.STABLE_TOKENS, Bound.UNKNOWN_DEMAND,
    ),
    (
        "unknown removes nothing", POLICY, PoolStatus(ready=3), UNKNOWN, QUIET,
        3, R.UNKNOWN_DEMAND, "none", Bound.UNKNOWN_DEMAND,
    ),
    (
        "unknown now, little before", POLICY, PoolStatus(ready=3),
        WindowedDemand(stable_tokens=10.0, panic_tokens=0.0, arrivals_total=0), QUIET,
        3, R.UNKNOWN_DEMAND, Signal.STABLE_TOKENS, Bound.UNKNOWN_DEMAND,
    ),
    (
        "half unknown is unknown", POLICY, PoolStatus(ready=3),
        replace(known(), tokens=None), QUIET,
        3, R.UNKNOWN_DEMAND, Signal.STABLE_TOKENS, Bound.UNKNOWN_DEMAND,
    ),
    (
        "a stream keeps the last one", replace(POLICY, idle_to_zero_s=0.0), PoolStatus(ready=1),
        replace(known(0, 1), stable_tokens=0.0, panic_tokens=0.0), QUIET,
        1, R.BUSY, Signal.HELD, Bound.NEVER_ZERO,
    ),
    (
        "fewer are needed", POLICY, PoolStatus(ready=5), known(1_500, 3), RECENT,
        2, R.SCALE_DOWN, Signal.STABLE_TOKENS, None,
    ),
    (
        "fewer by the long mean, not by the short", POLICY, PoolStatus(ready=5),
        known(1_500, 3, panic=4_500), RECENT, 5, R.STEADY, Signal.PANIC_TOKENS, None,
    ),
    (
        "fewer, and those that load go first", POLICY, PoolStatus(ready=2, starting=2),
        known(500, 3), RECENT, 1, R.SCALE_DOWN, Signal.STABLE_TOKENS, None,
    ),
    (
        "fewer, but none is ready yet", POLICY, PoolStatus(starting=4), known(500, 3),
        RECENT, 4, R.STARTING, Signal.STABLE_TOKENS, Bound.STARTING,
    ),
    (
        "none needed, but one is loading", POLICY, PoolStatus(ready=2, starting=2), known(),
        RECENT, 1, R.SCALE_DOWN, Signal.STABLE_TOKENS, Bound.STARTING,
    ),
    (
        "a few at a time", replace(POLICY, max_scale_down_per_tick=2), PoolStatus(ready=9),
        known(500, 3), RECENT, 7, R.SCALE_DOWN, Signal.STABLE_TOKENS, Bound.MAX_SCALE_DOWN,
    ),
    (
        "many small requests", replace(POLICY, max_inflight_requests=4),
        PoolStatus(ready=5), known(100, 19), RECENT,
        5, R.STEADY, Signal.STABLE_REQUESTS, None,
    ),
    (
        "an operator's number", POLICY, PoolStatus(ready=1, override=7), known(), QUIET,
        7, R.OVERRIDE, Signal.OVERRIDE, None,
    ),
    (
        "an operator's number below the need", POLICY, PoolStatus(ready=5, override=2),
        known(5_000, 9), RECENT, 2, R.OVERRIDE, Signal.OVERRIDE, None,
    ),
    (
        "an operator's zero", TWO, PoolStatus(ready=2, override=0), known(), RECENT,
        0, R.OVERRIDE, Signal.OVERRIDE, None,
    ),
    (
        "an operator's zero waits", TWO, PoolStatus(ready=2, override=0), known(100, 1), RECENT,
        1, R.OVERRIDE_WAITS, Signal.OVERRIDE, Bound.NEVER_ZERO,
    ),
    (
        "an operator's zero is woken", POLICY, PoolStatus(override=0, wake_signal=True), known(),
        QUIET,
        1, R.OVERRIDE_WAITS, Signal.OVERRIDE, Bound.NEVER_ZERO,
    ),
    (
        "an operator's zero, unknown demand", POLICY, PoolStatus(ready=1, override=0), UNKNOWN,
        QUIET, 1, R.OVERRIDE_WAITS, Signal.OVERRIDE, Bound.NEVER_ZERO,
    ),
    (
        "put to sleep", TWO, PoolStatus(sleep_requested=True), known(5_000), RECENT,
        0, R.SLEEP_REQUESTED, "none", None,
    ),
    (
        "put to sleep, then a request", POLICY,
        PoolStatus(sleep_requested=True, wake_signal=True),
        known(), QUIET, 1, R.WAKE, Signal.HELD, None,
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policy", "status", "demand", "state", "desired", "reason", "signal", "bound"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_decision(
    policy: PoolPolicy,
    status: PoolStatus,
    demand: WindowedDemand,
    state: DecideState,
    desired: int,
    reason: ScaleReason,
    signal: str,
    bound: Bound | None,
) -> None:
    decision, _ = decide(policy, status, demand, state, NOW)
    got = (decision.desired, decision.reason, str(decision.signal), decision.bound)
    assert got == (desired, reason, str(signal), bound), decision
    assert decision.detail
    assert (decision.pool, decision.at_s, decision.supply) == ("m", NOW, status.supply)


@pytest.mark.parametrize(("number", "noun"), [(0.4, "0 tokens"), (1.2, "1 token"), (5, "5 tokens")])
def test_one_token_is_not_tokens(number: float, noun: str) -> None:
    decision, _ = decide(POLICY, PoolStatus(ready=1), known(number), RECENT, NOW)
    assert decision.detail.startswith(f"{noun} in flight")
    requests = replace(POLICY, max_inflight_requests=1)
    decision, _ = decide(requests, PoolStatus(ready=1), known(0, 1), RECENT, NOW)
    assert decision.detail.startswith("1 request in flight")


@pytest.mark.parametrize(
    ("status", "demand", "desired", "reason", "bound"),
    [
        pytest.param(PoolStatus(ready=2), known(), 0, R.REMOVED, None, id="idle"),
        pytest.param(PoolStatus(starting=1), known(), 0, R.REMOVED, None, id="starting"),
        pytest.param(PoolStatus(ready=2), known(10, 1), 1, R.REMOVED, None, id="busy"),
        pytest.param(PoolStatus(), known(10, 1), 1, R.REMOVED, None, id="held"),
        pytest.param(
            PoolStatus(ready=2),
            UNKNOWN,
            2,
            R.UNKNOWN_DEMAND,
            Bound.UNKNOWN_DEMAND,
            id="blind",
        ),
    ],
)
def test_a_removed_pool_serves_what_it_has_and_ends(
    status: PoolStatus,
    demand: WindowedDemand,
    desired: int,
    reason: ScaleReason,
    bound: Bound | None,
) -> None:
    at_once = replace(TWO, scale_down_delay_s=0.0)
    decision, _ = decide_removed(at_once, status, demand, QUIET, NOW)
    assert (decision.desired, decision.reason, decision.bound) == (desired, reason, bound)


@pytest.mark.parametrize(
    ("given_s", "lead_s", "delay_s"),
    [(90.0, 300.0, 90.0), (None, None, 60.0), (None, 2.0, 30.0), (None, 42.0, 42.0)]
    + [(None, 600.0, 60.0)],
)
def test_scale_down_waits_for_the_delay(
    given_s: float | None, lead_s: float | None, delay_s: float
) -> None:
    policy, state = replace(POLICY, scale_down_delay_s=given_s), RECENT
    status = PoolStatus(ready=5, lead_s=lead_s)
    _, state = decide(policy, status, known(4_900, 9), state, NOW)
    for second in range(1, 200):
        now_s = NOW + second
        demand = known(1_900, 4)
        decision, state = decide(policy, status, demand, state, now_s)
        if second <= delay_s:
            assert decision.desired == 5
            assert decision.reason is R.SCALE_DOWN_DELAYED
            assert decision.bound is Bound.SCALE_DOWN_DELAY
        elif second > delay_s * (1 + 2 / RECENT_BUCKETS):
            assert (decision.desired, decision.reason) == (2, R.SCALE_DOWN)
    assert decision.desired == 2


def test_recommendations_that_are_remembered_are_bounded() -> None:
    # Without a panic, which would recommend its peak each time: equal neighbours are merged.
    policy, state = replace(POLICY, panic_threshold=1_000.0, scale_down_delay_s=20.0), RECENT
    for number in range(5_000):
        demand = known(1_000 * (number % 7), 1)
        _, state = decide(policy, PoolStatus(ready=3), demand, state, NOW + number / 50)
        assert len(state.recent) <= RECENT_BUCKETS + 2
    assert len(state.recent) > RECENT_BUCKETS / 2


def test_panic_only_grows_and_ends_a_stable_window_after_its_last_cause() -> None:
    state = RECENT
    decision, state = decide(POLICY, PoolStatus(ready=2), known(1_900, 4, panic=7_900), state, NOW)
    assert (decision.desired, decision.panicking) == (6, True)
    assert decision.bound is Bound.MAX_SCALE_UP
    for second in range(1, 60):
        calm = known(900, 2)
        decision, state = decide(POLICY, PoolStatus(ready=6), calm, state, NOW + second)
        assert decision.panicking
        assert decision.desired >= 6
    decision, state = decide(POLICY, PoolStatus(ready=6), known(900, 2), state, NOW + 60)
    assert not decision.panicking
    # What the panic recommended still counts for the delay: no collapse.
    assert decision.desired == 6
    assert decision.reason is R.SCALE_DOWN_DELAYED


def test_without_a_delay_the_end_of_a_panic_follows_the_mean_of_what_has_come_since() -> None:
    policy = replace(POLICY, scale_down_delay_s=0.0)
    _, state = decide(policy, PoolStatus(ready=1), known(900, 4, panic=5_900), RECENT, NOW)
    demand = known(4_900, 9)
    decision, _ = decide(policy, PoolStatus(ready=6), demand, state, NOW + 61)
    assert not decision.panicking
    assert decision.desired == 5


def test_idle_time_counts_over_a_gap_in_which_nothing_was_known() -> None:
    state = DecideState(arrivals_total=7, active_at_s=NOW)
    decision, state = decide(POLICY, PoolStatus(ready=1), UNKNOWN, state, NOW + 299)
    assert decision.desired == 1
    decision, state = decide(POLICY, PoolStatus(ready=1), known(arrivals=7), state, NOW + 301)
    assert (decision.desired, decision.reason) == (0, R.IDLE_TO_ZERO)


def test_request_in_the_gap_counts() -> None:
    state = DecideState(arrivals_total=7, active_at_s=NOW)
    _, state = decide(POLICY, PoolStatus(ready=1), UNKNOWN, state, NOW + 299)
    decision, _ = decide(POLICY, PoolStatus(ready=1), known(arrivals=8), state, NOW + 301)
    assert decision.desired == 1


def test_nan_is_unknown() -> None:
    demand = replace(known(), stable_tokens=float("nan"), panic_tokens=float("nan"), tokens=None)
    decision, _ = decide(POLICY, PoolStatus(ready=3), demand, QUIET, NOW)
    assert decision.desired == 3


@pytest.mark.parametrize("mode", ["advise", "observe"])
@pytest.mark.parametrize(
    ("policy", "status", "demand", "state", "desired", "recommended"),
    [
        pytest.param(POLICY, PoolStatus(ready=2), known(4_500, 9), RECENT, 2, 5, id="more"),
        pytest.param(POLICY, PoolStatus(ready=4), known(500, 3), RECENT, 4, 1, id="fewer"),
        pytest.param(POLICY, PoolStatus(ready=1), known(), QUIET, 1, 0, id="not to zero"),
        pytest.param(POLICY, PoolStatus(), known(300, 1), QUIET, 1, 1, id="a request that waits"),
        pytest.param(TWO, PoolStatus(), known(), QUIET, 2, 2, id="the least"),
        pytest.param(
            POLICY, PoolStatus(ready=2, override=5), known(), RECENT, 5, None, id="an operator"
        ),
    ],
)
def test_a_mode_that_does_not_carry_it_out(
    mode: str,
    policy: PoolPolicy,
    status: PoolStatus,
    demand: WindowedDemand,
    state: DecideState,
    desired: int,
    recommended: int | None,
) -> None:
    decision, _ = decide(policy, status, demand, state, NOW)
    assert hold_back(decision, status, policy, "auto") == decision
    held = hold_back(decision, status, policy, mode)
    assert (held.desired, held.recommended) == (desired, recommended)
    assert recommended is None or held.reason == mode


figures = st.none() | st.integers(0, 50_000)
means = st.none() | st.floats(0, 50_000)
demands = st.builds(
    WindowedDemand,
    tokens=figures,
    requests=figures,
    stable_tokens=means,
    panic_tokens=means,
    stable_requests=means,
    panic_requests=means,
    arrivals_total=st.none() | st.integers(0, 3),
    some_requests=st.booleans(),
    some_queued=st.booleans(),
)
counts = st.integers(0, 4)
statuses = st.builds(
    PoolStatus,
    scheduled=counts,
    starting=counts,
    waking=counts,
    ready=counts,
    unhealthy=counts,
    ready_at_s=st.none() | st.floats(0, NOW),
    wake_signal=st.booleans(),
    sleep_requested=st.booleans(),
    override=st.none() | st.integers(0, 12),
)
policies = st.builds(
    partial(replace, POLICY),
    min_replicas=st.integers(0, 3),
    max_replicas=st.integers(3, 12),
    target_inflight_tokens=st.integers(1, 10_000),
    max_inflight_requests=st.none() | st.integers(1, 100),
    scale_down_delay_s=st.sampled_from([0.0, 1.0, 60.0]),
    idle_to_zero_s=st.sampled_from([0.0, 1.0, 300.0]),
    max_scale_up_per_tick=st.integers(1, 5),
)


@given(policies, statuses, st.lists(st.tuples(demands, st.floats(0, 100)), max_size=8))
def test_whatever_is_known_the_invariants_hold(
    policy: PoolPolicy, status: PoolStatus, past: list[tuple[WindowedDemand, float]]
) -> None:
    state, now_s = DecideState(), NOW
    for demand, pause_s in past:
        now_s += pause_s
        before = state
        decision, state = decide(policy, status, demand, state, now_s)
        desired = decision.desired
        assert desired >= 0
        assert decision.detail
        held = demand.some_queued or status.wake_signal
        arrived = demand.arrivals_total not in {None, before.arrivals_total or 0}
        if held or demand.some_requests or arrived:
            asleep = status.sleep_requested and not (held or arrived)
            assert desired >= 1 or asleep, "to zero with a request there"
        if status.sleep_requested or status.override is not None:
            continue
        assert policy.min_replicas <= desired <= max(policy.max_replicas, policy.min_replicas)
        growth = policy.max_scale_up_per_tick + max(0, policy.min_replicas - status.supply)
        assert desired <= max(status.supply, 0) + growth
        if demand.tokens is None or demand.requests is None:
            assert desired >= min(status.supply, policy.max_replicas), "fewer on unknown demand"
        if (status.starting or status.waking) and not status.ready:
            loaded = min(status.supply - status.scheduled, policy.max_replicas)
            assert desired >= loaded, "one that loads would be taken away"
        if decision.panicking:
            quiet = not (held or demand.some_requests or arrived)
            idle = decision.reason in {
                R.IDLE_TO_ZERO,
                R.AT_ZERO,
                R.MINIMUM,
            }
            assert desired >= min(status.supply, policy.max_replicas) or (quiet and idle)
