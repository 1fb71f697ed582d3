"""What other autoscalers are told of pools: what is not known is null, never zero."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.adapters.types import PoolSignals
from autoscaler.signals.activity import Activity
from autoscaler.types import (
    Decision,
    DecisionInputs,
    EngineObservation,
    FleetReport,
    FurtherForecast,
    GpuCapacity,
    GpuReading,
    GpuReport,
    Observation,
    Outlook,
    PoolDemand,
    PoolReport,
    PoolStatus,
    RecentTraffic,
    ReplicaLoad,
    ReplicaReport,
    ScaleReason,
    WindowedDemand,
)
from gateway.admin.signals import make_signals
from loaders.engines.base import EngineLoad
from router.types import ReplicaState

NOTHING = Observation()
RECENT = RecentTraffic(
    window_s=60.0, arrivals_per_s=2.5, arrived_prompt_tokens_per_s=300.0, requests_per_s=2.0,
    errors_per_s=0.0, prompt_tokens_per_s=250.0, generation_tokens_per_s=80.0,
    queue_wait_p50_s=0.01, queue_wait_p95_s=0.2, queue_wait_p99_s=0.4, ttft_count=3,
    ttft_mean_s=0.1, ttft_p50_s=0.1, ttft_p95_s=0.5, ttft_p99_s=0.9, itl_count=0,
    itl_mean_s=None, itl_p50_s=None, itl_p95_s=None, e2e_p50_s=1.0, e2e_p95_s=3.0, e2e_p99_s=4.0,
)  # fmt: skip
OUTLOOK = Outlook(
    made_at_s=0.0, model="mix", lead_s=45.0, levels=(0.05, 0.5, 0.9, 0.95, 0.99),
    tokens_per_s=(1.0, 100.0, 150.0, 180.0, 240.0),
    further=(FurtherForecast(horizon_s=300.0, tokens_per_s=(2.0, 110.0, 170.0, 200.0, 260.0)),),
)  # fmt: skip


def decision(reason: ScaleReason = ScaleReason.DEMAND, **given: Any) -> Decision:
    base = {"pool": "chat", "at_s": 0.0, "desired": 3, "supply": 2, "detail": ""}
    return Decision(**(base | {"reason": reason} | given))


def inputs(outlook: Outlook | None) -> DecisionInputs:
    return DecisionInputs(
        policy=None,  # type: ignore[arg-type]  # is not read
        status=PoolStatus(),
        demand=WindowedDemand(),
        outlook=outlook,
        rules=(),
    )


def replica(number: int, state: ReplicaState = ReplicaState.READY) -> ReplicaReport:
    return ReplicaReport(
        id=f"chat-{number}", pool="chat", state=state, since_s=0.0, gpus=(number - 1,)
    )


def engine(kv: float | None) -> EngineObservation:
    load = EngineLoad(running_requests=4, waiting_requests=1, kv_cache_usage_fraction=kv)
    return EngineObservation(observed_at_s=0.0, load=load)


def signals(
    seen: Observation = NOTHING,
    recent: RecentTraffic | None = None,
    activity: Activity | None = None,
    **given: Any,
) -> tuple[PoolSignals, ...]:
    base: dict[str, Any] = {
        "name": "chat", "desired": 0, "override": None, "ready": 0, "starting": 0, "unhealthy": 0,
        "draining": 0, "sleeping": 0, "wake_eta_s": None, "last_decision": None, "replicas": (),
        "slug": "chat",
    }  # fmt: skip
    pool = PoolReport(**(base | given))
    report = FleetReport(at_s=0.0, pools=(pool,), decisions={}, errors={})
    return make_signals(report, seen, lambda pool: recent, activity or Activity()).pools


def test_what_is_not_known_is_null() -> None:
    (found,) = signals()
    known = {"pool", "slug", "ready_replicas", "objects", "replicas"}
    known |= {"queue_wait", "ttft", "itl", "e2e"}
    for name in PoolSignals.__slots__:
        if name not in known:
            assert getattr(found, name) is None, name
    assert not found.is_idle


def test_what_is_known_is_told() -> None:
    demand = PoolDemand(
        observed_at_s=0.0, inflight_requests=7, inflight_tokens=700, queued_requests=2,
        queued_tokens=200,
    )  # fmt: skip
    gpus = [
        GpuReading(gpu=GpuCapacity(index=index), figures={"utilization_fraction": used})
        for index, used in enumerate((0.4, 0.8, 1.0))
    ]
    seen = Observation(
        pools={"chat": demand},
        replicas={"chat-1": ReplicaLoad(inflight_requests=5, inflight_tokens=500)},
        engines={"chat-1": engine(0.2), "chat-2": engine(0.6), "chat-3": engine(0.9)},
        gpus=GpuReport(source="nvml", gpus=tuple(gpus)),
    )
    activity = Activity()
    activity.hold("chat")
    (found,) = signals(
        seen, RECENT, activity, ready=2,
        replicas=(replica(1), replica(2), replica(3, ReplicaState.DRAINING)),
    )  # fmt: skip
    assert found.active is True
    assert (found.requests_per_s, found.input_tokens_per_s, found.output_tokens_per_s) == (
        2.5, 300.0, 80.0,
    )  # fmt: skip
    assert (found.inflight_requests, found.inflight_tokens) == (7, 700)
    assert (found.queued_requests, found.queued_tokens) == (2, 200)
    assert (found.ttft.p50_s, found.ttft.p95_s, found.ttft.p99_s) == (0.1, 0.5, 0.9)
    assert (found.queue_wait.p99_s, found.e2e.p50_s, found.itl.p50_s) == (0.4, 1.0, None)
    # Of ready replicas alone.
    assert found.kv_cache_usage_mean_fraction == pytest.approx(0.4)
    assert found.kv_cache_usage_max_fraction == pytest.approx(0.6)
    assert found.gpu_utilization_fraction == pytest.approx(0.6)
    first, second, third = found.replicas
    assert (first.inflight_tokens, first.running_requests, first.waiting_requests) == (500, 4, 1)
    assert second.inflight_tokens is None
    assert not third.ready


def test_kv_use_is_unknown_where_that_of_one_replica_is() -> None:
    for engines in ({"chat-1": engine(0.2)}, {"chat-1": engine(0.2), "chat-2": engine(None)}):
        (found,) = signals(Observation(engines=engines), replicas=(replica(1), replica(2)))
        assert found.kv_cache_usage_mean_fraction is None
        assert found.kv_cache_usage_max_fraction is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (decision(), 3),
        (decision(ScaleReason.ADVISE, recommended=5), 5),
        (decision(ScaleReason.OBSERVE, recommended=0), 0),
        (decision(ScaleReason.DISABLED, desired=0), 0),
        (decision(ScaleReason.STATIC, desired=2), None),
        (decision(ScaleReason.STATIC, desired=2, recommended=6), 6),
        (decision(ScaleReason.CLOSING, desired=0), None),
        (None, None),
    ],
)
def test_what_is_recommended(given: Decision | None, expected: int | None) -> None:
    (found,) = signals(last_decision=given)
    assert found.desired_replicas == expected


def test_a_removed_pool_is_left_out() -> None:
    assert signals(removed=True) == ()


def test_the_forecast_by_horizon_and_quantile() -> None:
    (found,) = signals(last_decision=decision(inputs=inputs(OUTLOOK)))
    assert found.forecast is not None
    by = {(one.horizon, one.quantile): (one.horizon_s, one.tokens_per_s) for one in found.forecast}
    assert by["lead", 0.95] == (45.0, 180.0)
    assert by["5m", 0.99] == (300.0, 260.0)
    assert set(by) == {(horizon, q) for horizon in ("lead", "5m") for q in (0.5, 0.9, 0.95, 0.99)}


@pytest.mark.parametrize(
    "outlook",
    [
        None,
        Outlook(made_at_s=0.0, model="", lead_s=0.0, levels=(), tokens_per_s=()),
        Outlook(
            made_at_s=0.0, model="m", lead_s=9.0, levels=(0.5,), tokens_per_s=(1.0,), distrust="new"
        ),
    ],
)
def test_a_forecast_that_is_not_trusted_is_null(outlook: Outlook | None) -> None:
    (found,) = signals(last_decision=decision(inputs=inputs(outlook)))
    assert found.forecast is None
