"""What every scaling policy keeps to, and the formulas of each."""

from __future__ import annotations

import numpy as np
import pytest

from autoscaler.replay.engine import COUNTED, ReplicaModel
from autoscaler.replay.fleet import FluidPool
from autoscaler.replay.policies.bounds import schedule
from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.policies.registry import (
    POLICIES,
    TOKENS_ONLY,
    UnknownPolicyError,
    build,
)
from autoscaler.replay.policies.tidegate import Auto, Reactive
from autoscaler.replay.run import Cut, ReplayedPool, cut, facts_of, find_oracle, replay
from autoscaler.replay.score import Score
from autoscaler.replay.supply import Starts
from autoscaler.replay.traces import from_rates
from autoscaler.replay.types import ForecastingPolicy, PoolObservation, ScalingPolicy
from forecaster.types import History

MINUTES = 90


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
    """An hour and a half with a tide and a burst."""
    minutes = np.arange(MINUTES)
    tide = 6000 + 4000 * np.sin(2 * np.pi * minutes / 60) + 800 * np.sin(2 * np.pi * minutes / 7)
    tide[70:74] *= 2.5
    return tide


QUICK = [name for name in POLICIES if name != "auto"]
"""``auto`` forecasts twice a minute, which would take long here: below it is played short."""
CASES = [(name, True) for name in (*QUICK, "oracle")] + [
    (name, False) for name in (*QUICK, "oracle") if name not in TOKENS_ONLY
]


def replayed(tokens: bool) -> tuple[Cut, ReplayedPool]:
    """The waves cut in two, and a pool that needs about a dozen replicas for them."""
    requests = waves()
    trace = from_rates("waves", requests)
    if tokens:
        trace = from_rates("waves", requests, requests * 400, requests * 100)
    engine = ReplicaModel(prefill_tokens_per_s=8_000.0) if tokens else COUNTED
    pool = ReplayedPool(engine=engine, starts=Starts.flat(45.0), max_replicas=80)
    return cut(trace), pool


@pytest.mark.parametrize(("name", "tokens"), CASES)
def test_a_policy_plays_a_trace_the_same_way_twice(name: str, tokens: bool) -> None:
    part, pool = replayed(tokens)

    def play() -> Score:
        if name == "oracle":
            return find_oracle(part, pool)
        policy = build(name, facts_of(part, pool))
        return replay(part.played, policy, pool, run_in_s=part.run_in_s)

    score = play()
    again = play()
    assert repr(score) == repr(again)  # in which NaN is NaN
    assert score.requests == pytest.approx(waves()[MINUTES // 2 :].sum())
    assert score.replica_hours >= score.seconds / 3600
    assert score.cost == pytest.approx(score.replica_hours)
    assert sum(score.minutes.violations) == pytest.approx(score.violations)
    hours = sum(map(sum, (score.minutes.ready, score.minutes.starting, score.minutes.draining)))
    assert hours / 60 == pytest.approx(score.replica_hours, rel=0.01)


def test_no_policy_without_late_requests_costs_less_than_the_oracle() -> None:
    for tokens in (False, True):
        part, pool = replayed(tokens)
        oracle = find_oracle(part, pool)
        assert oracle.violations == 0.0
        for name in QUICK:
            if tokens or name not in TOKENS_ONLY:
                policy = build(name, facts_of(part, pool))
                score = replay(part.played, policy, pool, run_in_s=part.run_in_s)
                assert score.violations > 0.0 or score.replica_hours >= oracle.replica_hours, name


def test_auto_may_be_given_another_price_of_a_violated_second() -> None:
    for name, price in (("auto", 12.0), ("auto:40", 40.0)):
        policy = build(name, facts())
        assert isinstance(policy, Auto)
        assert policy.name == name
        policy.step(0.0, seen())
        assert policy.last is not None
        assert policy.last.inputs is not None
        assert policy.last.inputs.policy.violated_second == price


def test_an_unknown_policy_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UnknownPolicyError, match="knative"):
        build("hap", facts())
    for name in ("auto:0", "auto:much", "auto:1e9", "auto:nan"):
        with pytest.raises(UnknownPolicyError, match="violated second"):
            build(name, facts())
    assert build("static:7", facts()).step(0.0, seen()) == 7


# ── One by one ───────────────────────────────────────────────────────────────────────────────────


def steps(policy: ScalingPolicy, looks: list[tuple[float, PoolObservation]]) -> list[int]:
    return [policy.step(now_s, look) for now_s, look in looks]


def rising(per_s: float, until_s: int, every_s: int, **fields: float) -> list:
    """Looks at a pool to which tokens come at a steady rate."""
    return [
        (float(now), seen(arrived_tokens_total=per_s * now, **fields))
        for now in range(0, until_s + 1, every_s)
    ]


@pytest.mark.parametrize(
    ("utilization", "ready", "starting", "expected"),
    [
        (0.70, 10, 0, 10),  # at the target
        (0.76, 10, 0, 10),  # within the tolerance
        (0.80, 10, 0, 12),  # ceil(10 * 0.8 / 0.7)
        (1.00, 10, 0, 15),
        (1.00, 10, 5, 15),  # the starting ones count as idle: asked for already
        (1.00, 10, 2, 15),
        (1.00, 2, 0, 3),
        (None, 10, 0, 10),  # unknown
    ],
)
def test_hpa_asks_for_the_ratio(
    utilization: float | None, ready: int, starting: int, expected: int
) -> None:
    look = seen(ready=ready, starting=starting, utilization=utilization)
    assert build("hpa", facts()).step(0.0, look) == expected


def test_hpa_goes_up_by_four_or_by_the_double_in_15_s() -> None:
    policy = build("hpa-requests", facts())
    wanted = rising(1400.0, 15, 15, ready=2)  # 100 replicas
    assert steps(policy, wanted)[-1] == 6
    policy = build("hpa-requests", facts())
    assert steps(policy, rising(1400.0, 15, 15, ready=20))[-1] == 40


def test_hpa_goes_down_to_the_most_of_300_s() -> None:
    policy = build("hpa", facts())
    assert policy.step(0.0, seen(utilization=0.7)) == 10
    fell = [(float(now), seen(utilization=0.35)) for now in range(15, 331, 15)]
    asked = steps(policy, fell)
    assert set(asked[:19]) == {10}
    assert asked[-1] == 5


def test_keda_goes_to_zero_after_its_cooldown_and_wakes_at_once() -> None:
    policy = build("keda", facts())
    policy.step(0.0, seen(ready=1, inflight_requests=1.0))
    assert policy.step(285.0, seen(ready=1)) == 1
    assert policy.step(300.0, seen(ready=1)) == 0
    assert policy.step(315.0, seen(ready=0)) == 0
    assert policy.step(316.0, seen(ready=0, queued_requests=1.0)) == 1


def test_knative_follows_its_stable_window() -> None:
    asked = steps(build("knative", facts()), rising(140.0, 60, 2, ready=10))
    assert asked[-1] == 10  # 140 / (0.7 * 20)


def test_knative_panics_at_twice_the_ready_and_goes_down_a_stable_window_later() -> None:
    policy = build("knative", facts())
    total = 0.0
    asked = {}
    for now in range(0, 300, 2):
        asked[now] = policy.step(float(now), seen(ready=5, arrived_tokens_total=total))
        # 70 tokens per second are five replicas; 210 are fifteen.
        total += 2 * (210.0 if 100 <= now < 112 else 70.0)
    assert asked[98] == 5
    # The panic window has seen enough of it after 4 s, the stable one has not.
    assert asked[112] == asked[150] == asked[166] == 15
    assert asked[180] == 5


def test_knative_with_a_delay_keeps_the_most_of_that_long() -> None:
    policy = build("knative-delay", facts())
    total = 0.0
    asked = {}
    for now in range(0, 700, 2):
        asked[now] = policy.step(float(now), seen(ready=10, arrived_tokens_total=total))
        total += 2 * (140.0 if now < 100 else 70.0)
    assert asked[300] == 10
    assert asked[500] == 5


def test_ray_serve_waits_30_s_to_go_up_and_600_s_to_go_down() -> None:
    policy = build("ray-serve", facts())
    asked = {}
    for now in range(1_000):
        load = 700.0 if now < 50 else 1400.0 if now < 200 else 350.0
        asked[now] = policy.step(float(now), seen(ready=10, inflight_requests=load))
    assert asked[60] == 10
    # From 51 s on the mean of 30 s asks for more; the number is that of 30 s later.
    assert asked[90] == 20
    assert asked[700] == 20
    assert asked[999] == 5


def test_ahpa_takes_the_quantile_of_the_day_ahead() -> None:
    minutes = np.arange(7 * 1440)
    day = np.where(minutes % 1440 < 720, 28.0, 140.0)  # 2 and 10 replicas at 0.7 of 20
    day[3 * 1440 : 4 * 1440] *= 1.5  # one day in seven is more than one in twenty
    policy = build("ahpa", facts(history=History(values=day)))
    total = 0.0
    asked = {}
    for now in range(0, 1000 * 60, 60):
        asked[now // 60] = policy.step(
            float(now), seen(ready=2, utilization=0.7, arrived_tokens_total=total)
        )
        total += 60 * 28.0
    assert asked[600] == 3
    # Up before noon by its look ahead, and by the neighbours that its quantile pools.
    assert asked[718] == 15
    assert isinstance(policy, ForecastingPolicy)
    assert policy.band() == (140.0, 210.0)


def test_ahpa_without_a_daily_period_is_reactive() -> None:
    noise = np.random.default_rng(1).uniform(0.0, 280.0, 7 * 1440)
    policy = build("ahpa", facts(history=History(values=noise)))
    assert policy.step(0.0, seen(ready=3, utilization=0.7)) == 3


def dynamo_facts() -> PoolFacts:
    engine = ReplicaModel(prefill_tokens_per_s=1_000.0, itl_base_s=0.01, itl_slope_s=0.001)
    return facts(engine=engine, prompt_tokens=100.0, output_tokens=100.0)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"inflight_requests": 350.0}, 10),  # 45 ms, and more than 0.8 of 50 ms on nine
        ({"inflight_requests": 450.0}, 11),  # 55 ms
        ({"inflight_requests": 200.0}, 9),  # 32 ms on nine
        ({"queued_tokens": 40_000.0}, 11),  # 20,000 of prompts: 2 s before each engine
    ],
)
def test_dynamo_moves_by_one(fields: dict[str, float], expected: int) -> None:
    policy = build("dynamo-load", dynamo_facts())
    assert policy.step(0.0, seen(**fields)) == expected


def test_dynamo_does_nothing_while_one_starts() -> None:
    policy = build("dynamo-load", dynamo_facts())
    assert policy.step(0.0, seen(inflight_requests=450.0)) == 11
    assert policy.step(5.0, seen(inflight_requests=200.0, starting=1)) == 11
    assert policy.step(10.0, seen(inflight_requests=200.0, ready=11)) == 10


def test_dynamo_throughput_takes_the_next_interval_and_its_trend() -> None:
    flat = build("dynamo-throughput", facts(history=History(values=np.full(600, 100.0))))
    assert steps(flat, rising(100.0, 180, 180, ready=5))[-1] == 5
    up = build("dynamo-throughput", facts(history=History(values=np.arange(600.0) / 3)))
    assert steps(up, rising(200.0, 180, 180, ready=10))[-1] >= 11


@pytest.mark.parametrize(
    ("itl_s", "expected"),
    [
        (0.0275, 10),  # 0.55: neither
        (0.035, 13),  # 10 + ceil(10 * (0.7 / 0.55 - 1))
        (0.200, 37),  # clamped at 2: 10 + ceil(10 * (2 / 0.55 - 1))
        (0.010, 5),  # 10 - floor(10 * (1 - 0.2 / 0.4))
    ],
)
def test_llm_d_follows_the_pressure(itl_s: float, expected: int) -> None:
    assert build("llm-d-slo", facts()).step(0.0, seen(itl_s=itl_s)) == expected


def test_llm_d_wva_counts_kv_tokens_and_what_is_on_its_way() -> None:
    engine = ReplicaModel(kv_tokens=1e9, chunk_tokens=1e9)
    known = facts(engine=engine, prompt_tokens=100.0, output_tokens=100.0, concurrency=10.0)
    # Ten requests of 150 tokens held: 1,500 a replica.
    policy = build("llm-d-wva", known)
    assert policy.step(0.0, seen(inflight_tokens=17_000.0)) == 10
    assert policy.step(30.0, seen(inflight_tokens=20_000.0)) == 12
    assert policy.step(60.0, seen(inflight_tokens=20_000.0, starting=2)) == 12
    assert policy.step(90.0, seen(inflight_tokens=5_000.0)) == 9


def test_static_is_sized_for_the_busiest_minute() -> None:
    history = History(values=np.array([20.0, 81.0, 10.0]))
    assert build("static", facts(history=history)).step(0.0, seen()) == 5


@pytest.mark.parametrize(
    ("needed", "cold_start_s", "expected"),
    [
        ([1, 1, 3, 3, 1, 1], 2, [3, 3, 3, 3, 1, 1]),
        ([1, 1, 1, 2, 1, 1, 2, 1], 2, [1, 2, 2, 2, 2, 2, 2, 1]),  # kept over the gap
        ([1, 1, 1, 2, 1, 2, 1], 2, [1, 2, 2, 2, 2, 2, 1]),  # and not started beside itself
        ([0, 0, 0, 0, 1, 0], 1, [0, 0, 0, 1, 1, 0]),
        ([2, 1, 1, 1, 2], 1, [2, 1, 1, 2, 2]),
    ],
)
def test_the_oracle_starts_early_and_keeps_what_is_cheaper_to_keep(
    needed: list[int], cold_start_s: int, expected: list[int]
) -> None:
    assert schedule(np.array(needed, dtype=float), cold_start_s).tolist() == expected


# ── At zero ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "name", ["auto", "reactive", "keda", "knative", "ray-serve", "dynamo-load", "hpa-requests"]
)
def test_a_pool_at_zero_is_started_as_soon_as_a_request_waits(name: str) -> None:
    """Rare requests to a pool with a least of zero: every one is answered, and while one waits the
    pool has a replica, or one on its way, from the next second on."""
    rate = np.zeros(1_200)
    rate[[60, 61, 600, 603, 1_100]] = 1.0
    pool = ReplayedPool(engine=COUNTED, starts=Starts.flat(20.0), min_replicas=0, max_replicas=5)
    trace = from_rates("rare", rate, step_s=1.0)
    known = facts_of(Cut(history=None, played=trace, run_in_s=0), pool)
    policy = build(name, known)
    fleet = FluidPool(COUNTED, pool.slo, pool.starts, ready=0, seconds=len(rate) + 300)
    next_s = 0.0
    for second in range(len(rate) + 300):
        waits = fleet.queued_requests > 0.0
        if second >= next_s or (waits and not fleet.supply.ready + fleet.supply.starting):
            fleet.scale(policy.step(float(second), fleet.observe()))
            next_s = second + policy.interval_s
        assert not waits or fleet.supply.ready + fleet.supply.starting > 0
        fleet.advance(rate[second] if second < len(rate) else 0.0, 1.0, 0.0)
        fleet.check_integrity()
    assert fleet.answered == pytest.approx(5.0)


def test_auto_says_what_it_expects_in_tokens_per_second() -> None:
    policy = Auto(PoolFacts(capacity_tokens_per_s=20.0), history_least_s=300.0)
    assert isinstance(policy, ForecastingPolicy)
    assert not isinstance(Reactive(facts()), ForecastingPolicy)
    assert policy.band() is None
    arrived = 0.0
    for second in range(0, 1_200, 10):
        policy.step(float(second), seen(arrived_tokens_total=arrived, arrivals_total=arrived))
        arrived += 1_400.0
    band = policy.band()
    assert band is not None
    middle, upper = band
    assert 130.0 < middle <= upper < 400.0
