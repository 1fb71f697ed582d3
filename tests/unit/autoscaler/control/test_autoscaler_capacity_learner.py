"""Which minutes of a pool teach what a replica carries."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from autoscaler.control.capacity_learner import CapacityLearner, describe_setup
from autoscaler.policy.capacity import LoadSample
from autoscaler.settings import PoolSettings
from autoscaler.types import CapacitySource, EngineObservation, PoolDemand, RecentTraffic
from loaders.engines.base import EngineLoad

POOL = PoolSettings.model_validate(
    {
        "name": "m",
        "engine": "simulated",
        "model": "m",
        "target_inflight_tokens": 7_000,
        "slo": {"ttft_s": 2.0},
    }
)


def traffic(
    per_s: float = 10.0,
    ttft_p95_s: float = 0.5,
    e2e_s: float = 1.0,
    prompt_tokens: float = 100,
    output_tokens: float = 50,
    errors_per_s: float = 0.0,
    estimated_tokens: float | None = None,
) -> RecentTraffic:
    return RecentTraffic(
        window_s=60.0,
        requests_per_s=per_s + errors_per_s,
        errors_per_s=errors_per_s,
        arrivals_per_s=per_s,
        arrived_prompt_tokens_per_s=None if estimated_tokens is None else per_s * 10,
        arrived_output_tokens_per_s=(
            None if estimated_tokens is None else per_s * (estimated_tokens - 10)
        ),
        prompt_tokens_per_s=per_s * prompt_tokens,
        generation_tokens_per_s=per_s * output_tokens,
        ttft_count=600,
        ttft_mean_s=0.4,
        ttft_p50_s=0.4,
        ttft_p95_s=ttft_p95_s,
        itl_count=600,
        itl_mean_s=0.02,
        itl_p50_s=0.02,
        itl_p95_s=0.03,
        e2e_mean_s=e2e_s,
    )


class Pool:
    """A pool whose minutes pass as told."""

    def __init__(self) -> None:
        self.learner = CapacityLearner()
        self.now_s = 0.0
        self.told: list[LoadSample] = []

    def minutes(
        self,
        count: int = 1,
        *,
        ready: int = 2,
        queued: int | None = 0,
        waiting: int | Sequence[int] | None = 0,
        recent: RecentTraffic | None = None,
        kv_tokens: int | None = None,
        accelerator: str = "cpu",
        settings: PoolSettings = POOL,
    ) -> None:
        """``waiting``: of each engine, where there are several; they take turns in that."""
        for look in range(60 * count + 1):
            turns = waiting if isinstance(waiting, Sequence) else [waiting]
            loads = [
                EngineLoad(
                    waiting_requests=turns[(look + place) % len(turns)], kv_cache_tokens=kv_tokens
                )
                for place in range(len(turns))
            ]
            said = self.learner.observe(
                settings,
                ready=ready,
                demand=PoolDemand(observed_at_s=self.now_s, queued_requests=queued),
                engines=[EngineObservation(observed_at_s=self.now_s, load=one) for one in loads],
                recent=lambda: recent,
                accelerator=lambda: accelerator,
                now_s=self.now_s,
            )
            self.told += [] if said is None else [said]
            self.now_s += 1.0

    def found(self, pool: PoolSettings = POOL) -> tuple[float, CapacitySource] | None:
        found = self.learner.capacity(pool, 0.7)
        return None if found is None else (round(found.tokens_per_s), found.source)


def test_nothing_is_known_before_the_first_minute() -> None:
    assert Pool().found() is None


def test_a_target_of_tokens_in_flight_becomes_a_rate() -> None:
    pool = Pool()
    pool.minutes(recent=traffic())
    assert pool.found() == (10_000, CapacitySource.HINT)


def test_what_is_derived_of_an_idle_engine_is_no_more_than_the_target() -> None:
    pool = Pool()
    pool.minutes(recent=traffic(e2e_s=1.0), kv_tokens=5_000)
    assert pool.found() == (6_000, CapacitySource.DERIVED)
    pool.minutes(recent=traffic(e2e_s=1.0), kv_tokens=500_000)
    assert pool.found() == (10_000, CapacitySource.DERIVED)


@pytest.mark.parametrize("where", ["queued", "waiting"])
def test_minutes_at_the_limit_teach(where: str) -> None:
    pool = Pool()
    pool.minutes(4, recent=traffic(80.0), **{where: 3})  # type: ignore[arg-type]
    assert pool.found() == (6_000, CapacitySource.SATURATED)


@pytest.mark.parametrize(("idle", "learns"), [(7, False), (1, True)])
def test_of_many_replicas_one_or_another_has_a_request_waiting(idle: int, learns: bool) -> None:
    """It has just come: that is a limit only where most of them have one."""
    pool = Pool()
    pool.minutes(4, waiting=[*[0] * idle, *[1] * (8 - idle)], recent=traffic(80.0))
    found = pool.found()
    assert found is not None
    assert (found[1] is CapacitySource.SATURATED) is learns


def test_minutes_beyond_the_slo_teach_an_upper_limit() -> None:
    pool = Pool()
    pool.minutes(3, recent=traffic(60.0))
    pool.minutes(4, waiting=3, recent=traffic(90.0, ttft_p95_s=4.0))
    assert pool.found() == (4_500, CapacitySource.SATURATED)


def test_late_answers_without_a_queue_are_no_limit_of_a_replica() -> None:
    """They waited for the pool's wake, or are of long prompts."""
    pool = Pool()
    pool.minutes(6, recent=traffic(1.0, ttft_p95_s=30.0))
    assert pool.told == []
    assert pool.found() == (10_000, CapacitySource.HINT)


def test_tokens_that_come_slowly_are_a_limit_without_a_queue() -> None:
    pool = Pool()
    fast = POOL.model_validate(POOL.model_dump() | {"slo": {"itl_s": 0.025}})
    pool.minutes(4, recent=traffic(90.0), settings=fast)
    assert pool.found(fast) == (6_750, CapacitySource.SATURATED)


def test_minutes_in_which_replicas_come_or_hardly_anything_ends_do_not() -> None:
    pool = Pool()
    for ready in range(1, 9):
        for _ in range(40):
            pool.learner.observe(
                POOL,
                ready=ready,
                demand=PoolDemand(observed_at_s=pool.now_s, queued_requests=5),
                engines=[],
                recent=lambda: traffic(80.0),
                now_s=pool.now_s,
            )
            pool.now_s += 1.0
    assert pool.found() is None
    pool.minutes(5, queued=5, recent=traffic(0.1))
    assert pool.found() != (0, CapacitySource.SATURATED)
    assert pool.found() is not None
    assert pool.found()[1] is CapacitySource.HINT  # type: ignore[index]


def test_limits_of_the_engine_s_arguments_bound_what_is_derived() -> None:
    pool = Pool()
    pool.minutes(recent=traffic(), kv_tokens=5_000)
    assert pool.found() == (6_000, CapacitySource.DERIVED)
    few = POOL.model_copy(update={"engine_args": ("--max-num-seqs", "8")})
    assert pool.found(few) == (1_200, CapacitySource.DERIVED)
    small = POOL.model_copy(update={"engine_args": ("--max-num-batched-tokens=64",)})
    assert pool.found(small) == (3_200, CapacitySource.DERIVED)  # in steps of 20 ms
    held = POOL.model_copy(update={"max_inflight_requests": 10})
    assert pool.found(held) == (1_500, CapacitySource.DERIVED)


def test_only_minutes_that_say_something_are_told() -> None:
    pool = Pool()
    pool.minutes(3, recent=traffic(20.0))
    assert [one.tokens_per_s for one in pool.told] == [1_500]
    pool.minutes(2, queued=3, recent=traffic(80.0))
    assert [one.waited for one in pool.told] == [False, True, True]
    assert pool.told[-1].mix == (100, 50)
    assert pool.told[-1].accelerator == "cpu"


def test_what_was_seen_earlier_counts_until_the_limit_is_seen_again() -> None:
    before, pool = Pool(), Pool()
    before.minutes(4, queued=3, recent=traffic(80.0))
    pool.learner.recall(before.told)
    assert pool.found() == (6_000, CapacitySource.HISTORY)
    pool.minutes(1, recent=traffic(20.0))
    assert pool.found() == (6_000, CapacitySource.HISTORY)
    pool.minutes(3, queued=3, recent=traffic(60.0))
    assert pool.found() == (4_500, CapacitySource.SATURATED)


def test_replicas_on_another_accelerator_are_learned_anew() -> None:
    pool = Pool()
    pool.minutes(4, queued=3, recent=traffic(80.0))
    pool.minutes(1, recent=traffic(20.0), accelerator="NVIDIA L4")
    assert pool.found() == (10_000, CapacitySource.HINT)


def test_a_mix_of_longer_answers_is_not_taken_for_the_one_of_before() -> None:
    pool = Pool()
    pool.minutes(4, queued=3, recent=traffic(80.0))
    assert pool.found() == (6_000, CapacitySource.SATURATED)
    pool.minutes(12, recent=traffic(5.0, prompt_tokens=100, output_tokens=500))
    found = pool.found()
    assert found is not None
    assert found[1] is CapacitySource.HISTORY
    assert 3_500 < found[0] < 4_500  # a token of a prompt is less work


def test_errors_make_requests_no_shorter() -> None:
    pool = Pool()
    pool.minutes(1, queued=3, recent=traffic(80.0, errors_per_s=80.0))
    assert pool.told[-1].mix == (100, 50)


def test_the_setup_is_another_where_a_replica_may_carry_another_load() -> None:
    slo = POOL.model_validate(POOL.model_dump() | {"slo": {"ttft_s": 1.0}})
    held = POOL.model_copy(update={"max_inflight_requests": 4})
    named = POOL.model_copy(update={"aliases": ("other",), "target_inflight_tokens": 1})
    setups = [describe_setup(one, "digest") for one in (POOL, slo, held)]
    assert len({*setups, describe_setup(POOL, "another")}) == 4
    assert describe_setup(named, "digest") == setups[0]


def test_it_is_in_tokens_as_those_of_demand_are_estimated() -> None:
    pool = Pool()
    pool.minutes(4, queued=3, recent=traffic(80.0, estimated_tokens=300))
    assert pool.found() == (12_000, CapacitySource.SATURATED)
    assert pool.told[-1].tokens_per_s == 6_000
    pool = Pool()
    pool.minutes(recent=traffic(estimated_tokens=300), kv_tokens=500_000)
    assert pool.found() == (10_000, CapacitySource.DERIVED)
    pool.minutes(1, recent=traffic(estimated_tokens=100_000), kv_tokens=5_000)
    assert pool.found() == (10_000, CapacitySource.DERIVED)
