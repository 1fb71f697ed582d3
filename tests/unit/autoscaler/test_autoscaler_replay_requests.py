"""Requests one by one, placed by the real router: nothing lost, and the fluid's figures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.replay import run
from autoscaler.replay.engine import ReplicaModel, Slo
from autoscaler.replay.fleet import FluidPool
from autoscaler.replay.policies.bounds import Static
from autoscaler.replay.policies.registry import build
from autoscaler.replay.requests import PlayedRequest, RequestPool, replay_requests
from autoscaler.replay.supply import Starts
from autoscaler.replay.traces import RequestTrace

ENGINE = ReplicaModel(
    prefill_tokens_per_s=8_000.0,
    itl_base_s=0.01,
    itl_slope_s=0.0004,
    max_running_requests=64,
    chunk_tokens=1_024.0,
)
SLO = Slo(ttft_s=2.0, itl_s=0.05)
STARTS = Starts.flat(20.0)


def drawn(rate_per_s: list[float], seed: int, prompt: float, output: float) -> RequestTrace:
    """Requests that come by chance, at each second's rate."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rate_per_s)
    at_s = np.sort(np.repeat(np.arange(len(counts)), counts) + rng.random(counts.sum()))
    return RequestTrace(
        name="drawn",
        at_s=at_s,
        prompt_tokens=np.full(len(at_s), prompt),
        output_tokens=np.full(len(at_s), output),
    )


@pytest.mark.parametrize("name", ["static:6", "hpa", "hpa-requests", "knative-delay"])
def test_the_fluid_and_the_requests_agree(name: str) -> None:
    """A tide with an overload in it: hurt requests, replica-hours and waits are alike. The sizes
    are equal, so that a cohort's mean is every request's."""
    seconds = np.arange(900)
    rate = 45 + 25 * np.sin(seconds / 90)
    rate[400:430] += 90
    trace = drawn(rate.tolist(), 1, prompt=300.0, output=120.0)
    binned = trace.binned()
    pool = run.ReplayedPool(engine=ENGINE, slo=SLO, starts=STARTS, max_replicas=12)
    facts = run.facts_of(run.Cut(history=None, played=binned, run_in_s=0), pool)
    fluid = run.replay(binned, build(name, facts), pool, ready=6)
    single = replay_requests(
        trace, build(name, facts), engine=ENGINE, slo=SLO, starts=STARTS, ready=6, max_replicas=12
    )
    assert single.requests == fluid.requests
    assert single.replica_hours == pytest.approx(fluid.replica_hours, rel=0.1)
    assert fluid.violations > 0
    assert single.violations == pytest.approx(fluid.violations, rel=0.3)
    assert single.wait_s["max"] == pytest.approx(fluid.wait_s["max"], rel=0.35)


def test_a_steady_pool_has_as_much_in_flight_as_the_fluid() -> None:
    trace = drawn([40.0] * 300, 2, prompt=300.0, output=120.0)
    fluid = FluidPool(ENGINE, SLO, STARTS, ready=6, seconds=300)
    single = RequestPool(
        trace, ENGINE, SLO, STARTS, ready=6, max_replicas=6, scored_from_s=0, seed=0
    )
    counts = trace.binned().requests.tolist() + [0.0]
    means: tuple[list[float], list[float]] = ([], [])
    for second in range(300):
        fluid.advance(counts[second], 300.0, 120.0)
        single.advance()
        if second > 60:
            means[0].append(fluid.observe().inflight_requests)
            means[1].append(single.observe().inflight_requests)
    assert np.mean(means[1]) == pytest.approx(np.mean(means[0]), rel=0.08)
    assert fluid.observe().itl_s == pytest.approx(single.observe().itl_s, rel=0.15)


ROW = st.tuples(st.floats(0.0, 3.0), st.integers(1, 3_000), st.integers(0, 400))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ROW, min_size=1, max_size=60),
    numbers=st.lists(st.integers(0, 6), min_size=1, max_size=12),
    seed=st.integers(0, 9),
)
def test_every_request_is_answered_once(
    rows: list[tuple[float, int, int]], numbers: list[int], seed: int
) -> None:
    gaps, prompts, outputs = (np.array(values, dtype=float) for values in zip(*rows, strict=True))
    trace = RequestTrace(
        name="rows", at_s=np.cumsum(gaps), prompt_tokens=prompts, output_tokens=outputs
    )
    pool = RequestPool(
        trace, ENGINE, SLO, Starts.flat(3.0), ready=1, max_replicas=6, scored_from_s=0, seed=seed
    )
    for second in range(int(trace.at_s[-1]) + 1):
        pool.scale(numbers[second % len(numbers)])
        pool.advance()
        pool.check_integrity()
    pool.scale(1)
    for _ in range(2_000):
        if pool.answered == len(rows) and not pool.supply.draining:
            break
        pool.advance()
    pool.check_integrity()
    assert pool.answered == pool.arrivals == len(rows)
    assert pool.inflight == 0
    assert (pool.supply.ready + pool.supply.starting, pool.supply.draining) == (1, 0)
    assert pool.observe().inflight_tokens == pytest.approx(0.0, abs=1e-6)


def test_a_prompt_stalls_decode_for_its_own_time_and_no_longer() -> None:
    trace = RequestTrace(
        name="two",
        at_s=np.array([0.0, 0.5]),
        prompt_tokens=np.array([8.0, 800.0]),
        output_tokens=np.array([100.0, 0.0]),
    )
    pool = RequestPool(trace, ENGINE, SLO, STARTS, ready=1, max_replicas=1, scored_from_s=0, seed=0)
    done: list[PlayedRequest] = []
    pool.on_answer = done.append
    for _ in range(5):
        pool.advance()
    # The second is prefilled in one step, of which the first has one token.
    assert [one.prompt_tokens for one in done] == [800.0, 8.0]
    assert done[0].done_s == pytest.approx(0.5 + 0.1 + 0.0104)
    assert done[1].done_s == pytest.approx(0.001 + 100 * 0.0104 + 0.1, abs=0.001)


def test_a_request_that_waits_for_a_start_is_hurt() -> None:
    trace = drawn([2.0] * 60, 3, prompt=100.0, output=10.0)
    policy = Static(1)
    score = replay_requests(
        trace, policy, engine=ENGINE, slo=SLO, starts=STARTS, ready=0, max_replicas=2
    )
    # Those of the first 18 s wait longer than 2 s for a replica that is ready after 20 s.
    assert score.violations == pytest.approx(36.0, abs=15)
    assert score.wait_s["max"] == pytest.approx(20.0 - trace.at_s[0], abs=0.1)
