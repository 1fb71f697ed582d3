"""The metrics that other autoscalers can have of pools and replicas: one table, from what is known
to values with labels. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from autoscaler.adapters.types import LatencyQuantiles, PoolSignals, ReplicaSignals

Labels = Mapping[str, str]
Readings = Iterable[tuple[Labels, float | None]]
"""Values by the labels that they have beside those of their pool; ``None`` is unknown."""

MAX_LABEL = 63
"""Characters of a label's value in Kubernetes."""
NO_LABELS: Labels = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedMetric:
    """One metric. ``labels`` are those beside ``pool`` (and ``namespace``) that tell its series
    apart. ``of_pool`` reads it of a pool, ``of_replica`` of one replica; ``None``: there is none.
    ``windowed``: it is of the last minute, not of now. ``is_additive``: that of pools together is
    their sum, which a namespace has. ``target`` is what an autoscaler divides it by, where there is
    one right number."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    of_pool: Callable[[PoolSignals], Readings] | None = None
    of_replica: Callable[[ReplicaSignals], float | None] | None = None
    windowed: bool = False
    is_additive: bool = False
    target: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedSeries:
    """One value of a metric; ``None`` where it is unknown. ``window_s`` is the time that it is
    of."""

    metric: PublishedMetric
    labels: Labels
    value: float | None
    window_s: float | None = None


def _value(name: str) -> Callable[[PoolSignals], Readings]:
    def read(pool: PoolSignals) -> Readings:
        yield NO_LABELS, getattr(pool, name)

    return read


def _sum_of_replicas(name: str) -> Callable[[PoolSignals], Readings]:
    """Over the ready ones; unknown where that of one of them is."""

    def read(pool: PoolSignals) -> Readings:
        values = [getattr(one, name) for one in pool.replicas if one.ready]
        yield NO_LABELS, None if None in values else sum(values)

    return read


def _latency(name: str) -> Callable[[PoolSignals], Readings]:
    """Where no request came, none waited: an idle pool's latencies are 0, for an autoscaler that
    follows one would never scale down otherwise."""

    def read(pool: PoolSignals) -> Readings:
        seen: LatencyQuantiles = getattr(pool, name)
        for quantile, value in (("0.5", seen.p50_s), ("0.95", seen.p95_s), ("0.99", seen.p99_s)):
            yield {"quantile": quantile}, 0.0 if value is None and pool.is_idle else value

    return read


def _forecast(pool: PoolSignals) -> Readings:
    for one in pool.forecast or ():
        labels = {"quantile": f"{one.quantile:g}", "horizon": one.horizon}
        yield labels, one.tokens_per_s


def _active(pool: PoolSignals) -> Readings:
    yield NO_LABELS, None if pool.active is None else float(pool.active)


METRICS: Mapping[str, PublishedMetric] = {
    one.name: one
    for one in (
        PublishedMetric(
            name="tidegate_desired_replicas",
            help="Replicas that Tidegate decided on, or recommends where another scales: by the "
            "forecast, queue, SLO and bounds.",
            of_pool=_value("desired_replicas"),
            target=1.0,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_ready_replicas",
            help="Replicas that take requests.",
            of_pool=_value("ready_replicas"),
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_active",
            help="1 while a request is held or in flight, else 0.",
            of_pool=_active,
        ),
        PublishedMetric(
            name="tidegate_forecast_tokens_per_second",
            help="Quantile of the highest demand within the horizon, prompt and output tokens; "
            "absent while the forecast is not trusted.",
            labels=("quantile", "horizon"),
            of_pool=_forecast,
        ),
        PublishedMetric(
            name="tidegate_requests_per_second",
            help="Requests that came.",
            of_pool=_value("requests_per_s"),
            windowed=True,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_input_tokens_per_second",
            help="Estimated prompt tokens of the requests that came.",
            of_pool=_value("input_tokens_per_s"),
            windowed=True,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_output_tokens_per_second",
            help="Output tokens of the answers that ended.",
            of_pool=_value("output_tokens_per_s"),
            windowed=True,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_queued_requests",
            help="Requests held in the gateway.",
            of_pool=_value("queued_requests"),
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_queued_tokens",
            help="Estimated tokens of the requests held in the gateway.",
            of_pool=_value("queued_tokens"),
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_inflight_requests",
            help="Requests with an engine.",
            of_pool=_value("inflight_requests"),
            of_replica=lambda one: one.inflight_requests,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_inflight_tokens",
            help="Estimated tokens of the requests with an engine.",
            of_pool=_value("inflight_tokens"),
            of_replica=lambda one: one.inflight_tokens,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_running_requests",
            help="Requests that engines compute, as they say.",
            of_pool=_sum_of_replicas("running_requests"),
            of_replica=lambda one: one.running_requests,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_waiting_requests",
            help="Requests that wait in engines, as they say.",
            of_pool=_sum_of_replicas("waiting_requests"),
            of_replica=lambda one: one.waiting_requests,
            is_additive=True,
        ),
        PublishedMetric(
            name="tidegate_queue_wait_seconds",
            help="Request read to sent to an engine.",
            labels=("quantile",),
            of_pool=_latency("queue_wait"),
            windowed=True,
        ),
        PublishedMetric(
            name="tidegate_ttft_seconds",
            help="Request read to first byte of a streamed answer.",
            labels=("quantile",),
            of_pool=_latency("ttft"),
            windowed=True,
        ),
        PublishedMetric(
            name="tidegate_itl_seconds",
            help="Between two tokens of a streamed answer.",
            labels=("quantile",),
            of_pool=_latency("itl"),
            windowed=True,
        ),
        PublishedMetric(
            name="tidegate_e2e_seconds",
            help="Request read to answer finished.",
            labels=("quantile",),
            of_pool=_latency("e2e"),
            windowed=True,
        ),
        PublishedMetric(
            name="tidegate_kv_cache_usage_fraction",
            help="Use of the KV cache, the mean over ready replicas.",
            of_pool=_value("kv_cache_usage_mean_fraction"),
            of_replica=lambda one: one.kv_cache_usage_fraction,
        ),
        PublishedMetric(
            name="tidegate_kv_cache_usage_max_fraction",
            help="Use of the KV cache of the ready replica that has most.",
            of_pool=_value("kv_cache_usage_max_fraction"),
        ),
        PublishedMetric(
            name="tidegate_gpu_utilization_fraction",
            help="Utilization of the GPUs of ready replicas, their mean.",
            of_pool=_value("gpu_utilization_fraction"),
        ),
    )
}
"""Every metric, by name."""


def label_of(pool: PoolSignals) -> str:
    """The pool's name as a label's value."""
    slug = pool.slug or re.sub(r"[^A-Za-z0-9._-]+", "-", pool.pool)
    return slug[:MAX_LABEL].strip("-_.")


def is_called(pool: PoolSignals, name: str) -> bool:
    """Whether this is the pool's name, or its name as a label."""
    return name in (pool.pool, label_of(pool))


def pool_series(metric: PublishedMetric, pool: PoolSignals) -> Iterator[PublishedSeries]:
    """A pool's series of a metric."""
    if metric.of_pool is None:
        return
    own = {"pool": label_of(pool)}
    if pool.namespace is not None:
        own["namespace"] = pool.namespace
    window_s = pool.window_s if metric.windowed else None
    for labels, value in metric.of_pool(pool):
        yield PublishedSeries(
            metric=metric, labels={**own, **labels}, value=value, window_s=window_s
        )


def replica_series(
    metric: PublishedMetric, pool: PoolSignals, replica: ReplicaSignals
) -> Iterator[PublishedSeries]:
    """The series of a replica, where the metric is one of replicas."""
    if metric.of_replica is not None:
        labels = {"pool": label_of(pool), "replica": replica.replica}
        yield PublishedSeries(metric=metric, labels=labels, value=metric.of_replica(replica))
