"""The fluid pool: no request lost or answered twice, every replica-second paid, known answers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.replay.engine import COUNTED, ReplicaModel, Slo
from autoscaler.replay.fleet import FluidPool
from autoscaler.replay.supply import Starts
from modelcache.types import Tier

SLO = Slo(ttft_s=2.0, itl_s=0.05)
ENGINE = ReplicaModel(
    prefill_tokens_per_s=1000.0,
    itl_base_s=0.02,
    itl_slope_s=0.001,
    max_running_requests=20,
    kv_tokens=10_000.0,
    chunk_tokens=256.0,
)


def pool(
    engine: ReplicaModel = COUNTED, *, ready: int = 1, cold_start_s: float = 10.0
) -> FluidPool:
    return FluidPool(engine, SLO, Starts.flat(cold_start_s), ready=ready, seconds=5_000)


# ── Known answers ────────────────────────────────────────────────────────────────────────────────


def test_a_pool_within_its_capacity_makes_no_request_wait() -> None:
    one = pool(ready=2)
    for _ in range(100):
        one.advance(39.0, 1.0, 0.0)
    assert one.violations == 0.0
    assert one.longest_wait_s == 0.0
    assert one.supply.replica_s == 200
    assert one.observe().utilization == pytest.approx(39 / 40)


def test_a_burst_waits_as_long_as_it_takes_to_be_served() -> None:
    one = pool()
    one.advance(100.0, 1.0, 0.0)  # 5 s of work on one replica of 20 a second
    for _ in range(10):
        one.advance(0.0, 1.0, 0.0)
    one.check_integrity()
    assert one.answered == pytest.approx(100.0)
    # The last waits from the end of its second to the end of the fifth.
    assert one.longest_wait_s == pytest.approx(4.0, abs=0.5)
    # Served from 2 s on (and 50 ms of prefill), three fifths or so have waited too long.
    assert one.violations == pytest.approx(50.0, abs=11.0)
    assert sum(one.violated) == 1


def test_a_replica_is_ready_after_its_cold_start_and_costs_before() -> None:
    one = pool(ready=1, cold_start_s=3.0)
    one.scale(2)
    seen = []
    for _ in range(5):
        one.advance(0.0, 1.0, 0.0)
        seen.append((one.supply.ready, one.supply.starting))
    assert seen == [(1, 1), (1, 1), (1, 1), (2, 0), (2, 0)]
    assert one.supply.replica_s == 10


def test_starting_replicas_are_cancelled_before_ready_ones_drain() -> None:
    one = pool(ready=3)
    one.scale(5)
    one.scale(2)
    assert (one.supply.ready, one.supply.starting, one.supply.cancelled) == (2, 0, 2)


def test_a_draining_replica_costs_until_its_requests_are_answered() -> None:
    one = pool(ENGINE, ready=2)
    one.advance(2.0, 10.0, 200.0)  # some 4 s of decode
    one.scale(1)
    assert (one.supply.ready, one.supply.draining) == (1, 1)
    seconds = 0
    while one.supply.draining:
        one.advance(0.0, 0.0, 0.0)
        seconds += 1
    assert 3 <= seconds <= 6
    assert one.answered == pytest.approx(2.0)
    assert one.supply.replica_s == 2 * (1 + seconds)


def test_what_drains_takes_no_place_of_what_stays() -> None:
    one = pool(ENGINE, ready=4)
    one.advance(40.0, 1.0, 400.0)  # ten on each
    one.scale(1)
    one.advance(10.0, 1.0, 400.0)
    assert one.queued_requests == 0.0
    one.advance(5.0, 1.0, 400.0)
    assert one.queued_requests == pytest.approx(5.0)


def test_a_pool_drained_to_zero_and_back_loses_nothing() -> None:
    one = pool(ENGINE, ready=2, cold_start_s=2.0)
    one.advance(4.0, 10.0, 200.0)
    one.scale(0)
    one.advance(1.0, 10.0, 200.0)
    assert one.queued_requests == pytest.approx(1.0)
    one.scale(1)
    for _ in range(30):
        one.advance(0.0, 0.0, 0.0)
    one.check_integrity()
    assert one.answered == pytest.approx(5.0)
    assert one.supply.draining == 0


def test_requests_over_the_places_wait_in_the_gateway() -> None:
    one = pool(ENGINE, ready=1)
    one.advance(50.0, 1.0, 100.0)
    assert one.running == pytest.approx(20.0)
    assert one.queued_requests == pytest.approx(30.0)


@pytest.mark.parametrize("prompt", [10.0, 200.0])
@pytest.mark.parametrize("output", [5.0, 150.0, 400.0])
def test_the_capacity_is_the_most_that_keeps_the_slo(prompt: float, output: float) -> None:
    """Requests within the capacity keep the SLO in the end, and ten per cent more do not."""
    rate = ENGINE.capacity_tokens_per_s(prompt, output, SLO) / (prompt + output)
    hurt = {}
    for load in (0.97, 1.15):
        one = pool(ENGINE, ready=10)
        for _ in range(900):
            one.advance(10 * rate * load, prompt, output)
        one.check_integrity()
        hurt[load] = one.violations
    assert hurt[0.97] == 0.0
    assert hurt[1.15] > 0.0


def test_an_itl_below_an_idle_replicas_is_refused() -> None:
    with pytest.raises(ValueError, match="out of reach"):
        ENGINE.work_s(10.0, 10.0, Slo(itl_s=0.01))


def test_a_pool_at_zero_steps_down_its_tiers_and_starts_from_where_it_is() -> None:
    starts = Starts(
        wake_s={Tier.SLEEPING: 2.0, Tier.PAGED: 5.0, Tier.REMOTE: 30.0},
        stays_s={Tier.SLEEPING: 10.0, Tier.PAGED: 20.0},
        holding={Tier.SLEEPING: 0.5},
    )
    woke = {}
    for idle_s in (5, 20, 60):
        one = FluidPool(COUNTED, SLO, starts, ready=1, seconds=1_000)
        one.scale(0)
        for _ in range(idle_s):
            one.advance(0.0, 0.0, 0.0)
        one.scale(1)
        waited = 0
        while not one.supply.ready:
            one.advance(0.0, 0.0, 0.0)
            waited += 1
        woke[idle_s] = waited - 1, one.supply.holding_s
    assert woke[5] == (2, pytest.approx(2.5, abs=0.5))
    assert woke[20] == (5, pytest.approx(5.0, abs=0.5))
    assert woke[60] == (30, pytest.approx(5.0, abs=0.5))


# ── Invariants ───────────────────────────────────────────────────────────────────────────────────

SECOND = st.tuples(
    st.floats(0.0, 200.0), st.floats(1.0, 500.0), st.floats(0.0, 300.0), st.integers(-1, 12)
)


@settings(max_examples=60, deadline=None)
@given(seconds=st.lists(SECOND, min_size=1, max_size=80), cold_start_s=st.integers(0, 20))
def test_no_request_is_lost_and_every_replica_second_is_paid(
    seconds: list[tuple[float, float, float, int]], cold_start_s: int
) -> None:
    one = pool(ENGINE, ready=2, cold_start_s=float(cold_start_s))
    paid = 0
    came = 0.0
    for arrivals, prompt, output, desired in seconds:
        if desired >= 0:
            one.scale(desired)
            assert one.supply.ready + one.supply.starting == desired
        supply = one.supply
        paid += supply.ready + supply.starting + supply.draining
        one.advance(arrivals, prompt, output)
        came += arrivals
        assert supply.replica_s == paid
        if one.running > 1e-9:
            assert supply.ready + supply.draining > 0
        one.check_integrity()
    one.scale(3)
    for _ in range(3_000):
        if one.queued_requests + one.running + supply.draining == 0:
            break
        one.advance(0.0, 0.0, 0.0)
    one.advance(0.0, 0.0, 0.0)
    one.check_integrity()
    assert one.answered == pytest.approx(came)
    assert one.supply.draining == 0
    assert one.observe().inflight_tokens == pytest.approx(0.0, abs=1e-6)
    assert math.isclose(one.arrivals_total, came)
