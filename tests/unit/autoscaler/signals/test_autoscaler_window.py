"""The demand window against a plain model that keeps every observation."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from autoscaler.settings import AutoscalerSettings, PoolSettings, make_policy
from autoscaler.signals.window import DemandWindow
from autoscaler.types import PoolDemand, WindowedDemand

POLICY = make_policy(
    PoolSettings.model_validate({"name": "m", "engine": "simulated", "model": "m"}),
    AutoscalerSettings(stable_window_s=60.0, panic_window_s=6.0, demand_stale_s=10.0),
)
BUCKET_S = POLICY.panic_window_s / 12


def seen(at_s: float, requests: int | None, tokens: int | None = None) -> PoolDemand:
    """A demand of which nothing is queued."""
    queued = None if requests is None else 0
    return PoolDemand(
        observed_at_s=at_s,
        inflight_requests=requests,
        inflight_tokens=tokens if tokens is not None or requests is None else requests * 100,
        queued_requests=queued,
        queued_tokens=queued,
        arrivals_total=None,
    )


def test_nothing_observed_is_unknown() -> None:
    assert DemandWindow(POLICY).read(5.0) == WindowedDemand()


def test_first_observation_counts_at_once() -> None:
    window = DemandWindow(POLICY)
    window.add(seen(100.0, 3))
    demand = window.read(100.0)
    assert (demand.tokens, demand.stable_tokens, demand.panic_tokens) == (300, 300, 300)
    assert (demand.requests, demand.some_requests) == (3, True)


def test_means_are_weighted_by_time() -> None:
    window = DemandWindow(POLICY)
    window.add(seen(100.0, 0))
    window.add(seen(109.0, 10))
    window.add(seen(112.0, 2))
    demand = window.read(115.0)
    # The last 6 s: 3 s with 10 requests, 3 s with 2. All 15 s: 9 s without, 3 s, 3 s.
    assert demand.panic_requests == pytest.approx(6.0)
    assert demand.stable_requests == pytest.approx(36 / 15)


def test_stale_is_unknown_and_time_not_observed_is_not_zero() -> None:
    window = DemandWindow(POLICY)
    window.add(seen(100.0, 4))
    assert window.read(110.0).requests == 4
    late = window.read(111.0)
    assert (late.requests, late.tokens, late.some_requests) == (None, None, False)
    assert late.stable_requests == pytest.approx(4.0)
    assert window.read(125.0).panic_requests is None
    window.add(seen(130.0, 8))
    assert window.read(140.0).stable_requests == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("demand", "tokens", "requests", "some"),
    [
        (PoolDemand(observed_at_s=0, inflight_requests=0, queued_requests=0), 0, 0, False),
        (PoolDemand(observed_at_s=0, inflight_requests=2, queued_requests=0), None, 2, True),
        (PoolDemand(observed_at_s=0, inflight_requests=2), None, None, True),
        (PoolDemand(observed_at_s=0, queued_tokens=7), None, None, True),
        (PoolDemand(observed_at_s=0, inflight_tokens=0, queued_tokens=0), 0, None, False),
        (PoolDemand(observed_at_s=0, inflight_requests=-1, queued_requests=0), None, None, False),
    ],
)
def test_parts_that_are_missing(
    demand: PoolDemand, tokens: int | None, requests: int | None, some: bool
) -> None:
    window = DemandWindow(POLICY)
    window.add(demand)
    read = window.read(0.0)
    assert (read.tokens, read.requests, read.some_requests) == (tokens, requests, some)


def test_trap_6_nan_is_unknown_not_a_number_that_blocks() -> None:
    window = DemandWindow(POLICY)
    nan = float("nan")
    window.add(seen(0.0, 0, nan))  # type: ignore[arg-type]
    # No requests are no tokens, whatever a ratio of nothing to nothing says.
    assert (window.read(0.0).tokens, window.read(0.0).requests) == (0, 0)
    window.add(seen(1.0, 2, nan))  # type: ignore[arg-type]
    assert window.read(1.0).tokens is None
    window.add(seen(2.0, 2))
    assert window.read(2.0).stable_tokens == pytest.approx(0.0)


def test_other_windows_keep_what_was_observed_as_far_as_they_reach() -> None:
    window = DemandWindow(POLICY)
    for at_s in range(100, 160):
        window.add(seen(float(at_s), 0 if at_s < 150 else 8))
    short = replace(POLICY, stable_window_s=20.0, panic_window_s=4.0)
    window.resize(short)
    window.check_integrity()
    demand = window.read(160.0)
    assert demand.stable_requests == pytest.approx(4.0)
    assert demand.panic_requests == pytest.approx(8.0)
    window.resize(POLICY)
    window.check_integrity()
    # What was before is forgotten, but for the span that the end of the short window cuts.
    assert window.read(160.0).stable_requests == pytest.approx(4.0, rel=0.1)


def test_an_older_observation_is_ignored() -> None:
    window = DemandWindow(POLICY)
    window.add(seen(10.0, 5))
    window.add(seen(9.0, 1))
    assert window.read(10.0).requests == 5


def deviation(tokens_per_s: list[float], queued: int = 1) -> float | None:
    """Of a rate that is each of these for six seconds."""
    window, total, at_s = DemandWindow(POLICY), 0.0, 0.0
    for rate in tokens_per_s:
        for _ in range(6):
            at_s, total = at_s + 1.0, total + rate
            demand = replace(seen(at_s, queued), queued_requests=queued, queued_tokens=queued)
            window.add(replace(demand, arrived_tokens_total=round(total)))
    return window.read(at_s).panic_deviation_tokens_per_s


def test_how_much_the_rate_varied_before_the_newest_panic_window() -> None:
    assert deviation([100.0] * 9 + [900.0]) == pytest.approx(0.0, abs=1.0)
    assert deviation([50.0, 150.0] * 4 + [900.0]) == pytest.approx(50.0, rel=0.15)
    assert deviation([50.0, 150.0] * 4 + [900.0], queued=0) is None  # nothing asks for it
    assert deviation([100.0, 100.0]) is None


class WindowMachine(RuleBasedStateMachine):
    """Any sequence of observations, with any gaps."""

    def __init__(self) -> None:
        super().__init__()
        self.window = DemandWindow(POLICY)
        self.all: list[tuple[float, int | None]] = []
        self.now_s = 0.0

    @rule(gap_s=st.floats(0.0, 30.0), requests=st.none() | st.integers(0, 50))
    def observe(self, gap_s: float, requests: int | None) -> None:
        self.now_s += gap_s
        self.window.add(seen(self.now_s, requests))
        self.all.append((self.now_s, requests))

    @rule(count=st.integers(1, 100), requests=st.integers(0, 50))
    def observe_often(self, count: int, requests: int) -> None:
        for _ in range(count):
            self.observe(0.01, requests)

    @rule(pause_s=st.floats(0.0, 20.0))
    def wait(self, pause_s: float) -> None:
        self.now_s += pause_s

    def mean(self, window_s: float) -> float | None:
        weight = total = 0.0
        ends = [at_s for at_s, _ in self.all[1:]] + [self.now_s]
        for (at_s, requests), end_s in zip(self.all, ends, strict=False):
            until_s = min(end_s, at_s + POLICY.demand_stale_s, self.now_s)
            length_s = until_s - max(at_s, self.now_s - window_s)
            if requests is not None and length_s > 0:
                weight += length_s
                total += requests * length_s
        return total / weight if weight else None

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.window.check_integrity()
        demand = self.window.read(self.now_s)
        for mean, window_s in (
            (demand.stable_requests, POLICY.stable_window_s),
            (demand.panic_requests, POLICY.panic_window_s),
        ):
            expected = self.mean(window_s)
            if expected is None:
                assert mean == demand.requests
            else:
                assert mean is not None
                # A merged span may be cut by the window's edge: at most a bucket is misjudged.
                values = [value for _, value in self.all if value is not None]
                assert min(values) - 1e-6 <= mean <= max(values) + 1e-6
                slack = 50 * BUCKET_S / window_s if self.covered(window_s) else 50
                assert abs(mean - expected) <= slack + 1e-6

    def covered(self, window_s: float) -> bool:
        """Whether the whole window was observed, so that a bucket is a small part of it."""
        times = [at_s for at_s, _ in self.all] + [self.now_s]
        gaps = [b - a for a, b in itertools.pairwise(times) if b > self.now_s - window_s]
        known = all(value is not None for _, value in self.all)
        begun = bool(self.all) and self.all[0][0] <= self.now_s - window_s
        return begun and known and max(gaps, default=0.0) <= POLICY.demand_stale_s


TestWindow = WindowMachine.TestCase
TestWindow.settings = settings(max_examples=20, stateful_step_count=25, deadline=None)
