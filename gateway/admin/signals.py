"""What other autoscalers are told of the pools: reports, counters and decisions as one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping

from autoscaler.adapters.types import (
    ForecastQuantile,
    KubernetesObject,
    LatencyQuantiles,
    PoolSignals,
    ReplicaSignals,
)
from autoscaler.signals.activity import Activity
from autoscaler.signals.gpus.figures import gpu_utilization
from autoscaler.types import (
    Decision,
    EngineObservation,
    FleetReport,
    Observation,
    Outlook,
    PoolReport,
    RecentTraffic,
    ReplicaReport,
    ScaleReason,
)
from gateway.admin import schema
from router.types import ReplicaState

LEVELS = (0.5, 0.9, 0.95, 0.99)
"""Quantiles of the forecast that are published."""
FindObjects = Callable[[str], tuple[KubernetesObject, ...]]
"""What a pool is in a cluster, by its name: its workload first; nothing where it is in none."""
FindPod = Callable[[KubernetesObject, str], KubernetesObject]
"""A pod of a workload, by its name, with its labels."""
NOT_DECIDED = frozenset({ScaleReason.STATIC, ScaleReason.CLOSING, ScaleReason.REMOVED})
"""Decisions that recommend nothing: an autoscaler that followed them would end what serves."""


def make_signals(
    report: FleetReport,
    seen: Observation,
    recent: Callable[[str], RecentTraffic | None],
    activity: Activity,
    find_objects: FindObjects = lambda pool: (),
    find_pod: FindPod | None = None,
) -> schema.SignalsAnswer:
    """All pools, but those that were removed."""
    return schema.SignalsAnswer(
        version=activity.version,
        at_s=round(time.time(), 3),
        pools=tuple(
            _pool(one, seen, recent(one.name), activity, find_objects(one.name), find_pod)
            for one in report.pools
            if not one.removed
        ),
    )


def _pool(
    report: PoolReport,
    seen: Observation,
    recent: RecentTraffic | None,
    activity: Activity,
    objects: tuple[KubernetesObject, ...],
    find_pod: FindPod | None,
) -> PoolSignals:
    demand = seen.pools.get(report.name)
    ready = [one for one in report.replicas if one.state is ReplicaState.READY]
    used = [_kv_cache_usage(seen.engines.get(one.id)) for one in ready]
    known = [one for one in used if one is not None]
    whole = bool(used) and len(known) == len(used)
    decision = report.last_decision
    return PoolSignals(
        pool=report.name,
        slug=report.slug,
        namespace=objects[0].namespace if objects else None,
        objects=objects,
        active=activity.is_active(report.name),
        window_s=recent.window_s if recent else None,
        requests_per_s=recent.arrivals_per_s if recent else None,
        input_tokens_per_s=recent.arrived_prompt_tokens_per_s if recent else None,
        output_tokens_per_s=recent.generation_tokens_per_s if recent else None,
        queued_requests=demand.queued_requests if demand else None,
        queued_tokens=demand.queued_tokens if demand else None,
        inflight_requests=demand.inflight_requests if demand else None,
        inflight_tokens=demand.inflight_tokens if demand else None,
        queue_wait=_quantiles(recent, "queue_wait"),
        ttft=_quantiles(recent, "ttft"),
        itl=_quantiles(recent, "itl"),
        e2e=_quantiles(recent, "e2e"),
        kv_cache_usage_mean_fraction=sum(known) / len(known) if whole else None,
        kv_cache_usage_max_fraction=max(known) if whole else None,
        gpu_utilization_fraction=gpu_utilization(
            seen.gpus, {gpu for one in ready for gpu in one.gpus}
        ),
        ready_replicas=report.ready,
        desired_replicas=_recommended(decision),
        forecast=_forecast(decision),
        replicas=tuple(
            _replica(
                one,
                seen,
                find_pod(objects[0], one.pod) if find_pod and objects and one.pod else None,
            )
            for one in report.replicas
        ),
    )


def _recommended(decision: Decision | None) -> int | None:
    if decision is None:
        return None
    if decision.recommended is not None:
        return decision.recommended
    return None if decision.reason in NOT_DECIDED else decision.desired


def _forecast(decision: Decision | None) -> tuple[ForecastQuantile, ...] | None:
    inputs = None if decision is None else decision.inputs
    outlook = None if inputs is None else inputs.outlook
    if outlook is None or outlook.distrust or not outlook.levels:
        return None
    return tuple(
        ForecastQuantile(
            horizon=horizon, horizon_s=horizon_s, quantile=level, tokens_per_s=by_level[level]
        )
        for horizon, horizon_s, by_level in _horizons(outlook)
        for level in LEVELS
        if level in by_level
    )


def _horizons(outlook: Outlook) -> Iterator[tuple[str, float, Mapping[float, float]]]:
    """Each with its name, its seconds, and the quantiles by their level."""
    yield (
        "lead",
        outlook.lead_s,
        dict(zip(outlook.levels, outlook.tokens_per_s, strict=True)),
    )
    for one in outlook.further:
        name = f"{one.horizon_s / 60:g}m"
        yield name, one.horizon_s, dict(zip(outlook.levels, one.tokens_per_s, strict=True))


def _quantiles(recent: RecentTraffic | None, name: str) -> LatencyQuantiles:
    return LatencyQuantiles(
        p50_s=getattr(recent, f"{name}_p50_s", None),
        p95_s=getattr(recent, f"{name}_p95_s", None),
        p99_s=getattr(recent, f"{name}_p99_s", None),
    )


def _kv_cache_usage(engine: EngineObservation | None) -> float | None:
    return None if engine is None else engine.load.kv_cache_usage_fraction


def _replica(
    report: ReplicaReport, seen: Observation, pod: KubernetesObject | None
) -> ReplicaSignals:
    load, engine = seen.replicas.get(report.id), seen.engines.get(report.id)
    return ReplicaSignals(
        replica=report.id,
        ready=report.state is ReplicaState.READY,
        pod=pod,
        inflight_requests=load.inflight_requests if load else None,
        inflight_tokens=load.inflight_tokens if load else None,
        running_requests=engine.load.running_requests if engine else None,
        waiting_requests=engine.load.waiting_requests if engine else None,
        kv_cache_usage_fraction=_kv_cache_usage(engine),
    )
