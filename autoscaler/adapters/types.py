"""What is published of the pools to autoscalers that are not ours: HPA and KEDA. Pure.

The admin API answers with these (``GET /signals``), and the adapter makes the metrics of
``autoscaler.adapters.series`` of them. ``None`` is unknown, which is not zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class KubernetesObject:
    """An object of a cluster. ``resource`` is its plural name (``deployments``), ``group`` is empty
    for core ones. ``labels`` are those that label selectors are compared with; ``None`` where they
    are not known, so that no selector selects it."""

    group: str = ""
    resource: str
    namespace: str
    name: str
    labels: Mapping[str, str] | None = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyQuantiles:
    """Quantiles of a time within the window; ``None`` where nothing was measured in it."""

    p50_s: float | None = None
    p95_s: float | None = None
    p99_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastQuantile:
    """A quantile of the highest demand within the next ``horizon_s``, which ``horizon`` names:
    ``lead`` is the time that a new replica takes to be ready."""

    horizon: str
    horizon_s: float
    quantile: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSignals:
    """One replica. ``pod`` is what it runs in, where that is a pod."""

    replica: str
    ready: bool
    pod: KubernetesObject | None = None
    inflight_requests: int | None = None
    inflight_tokens: int | None = None
    running_requests: int | None = None
    """As its engine says, as the next two are."""
    waiting_requests: int | None = None
    kv_cache_usage_fraction: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSignals:
    """One pool. Rates and latencies are of the last ``window_s``."""

    pool: str
    slug: str = ""
    """The name as labels can have it."""
    namespace: str | None = None
    """That it belongs to; ``null``: it is shown in every namespace."""
    objects: tuple[KubernetesObject, ...] = ()
    """What it is in a cluster: its Deployment, its Service."""
    active: bool | None = None
    """Whether a request is held or in flight."""
    window_s: float | None = None
    requests_per_s: float | None = None
    """Requests that came."""
    input_tokens_per_s: float | None = None
    """Their prompts' tokens, estimated as they came."""
    output_tokens_per_s: float | None = None
    """Tokens of the answers that ended."""
    queued_requests: int | None = None
    queued_tokens: int | None = None
    inflight_requests: int | None = None
    inflight_tokens: int | None = None
    queue_wait: LatencyQuantiles = LatencyQuantiles()
    """Request read to sent to an engine."""
    ttft: LatencyQuantiles = LatencyQuantiles()
    """Request read to first byte, of streams."""
    itl: LatencyQuantiles = LatencyQuantiles()
    """Pauses between two tokens of a stream."""
    e2e: LatencyQuantiles = LatencyQuantiles()
    """Request read to answer finished."""
    kv_cache_usage_mean_fraction: float | None = None
    """Over its ready replicas; unknown where that of one of them is."""
    kv_cache_usage_max_fraction: float | None = None
    gpu_utilization_fraction: float | None = None
    ready_replicas: int
    desired_replicas: int | None = None
    """What Tidegate decided, or would decide in a mode that does not carry it out; ``null`` where
    it decides nothing: of externally managed servers, and while it ends."""
    forecast: tuple[ForecastQuantile, ...] | None = None
    """``null`` where there is none, or it is not trusted."""
    replicas: tuple[ReplicaSignals, ...] = ()

    @property
    def is_idle(self) -> bool:
        """Whether there was no request in the window, for sure."""
        return self.requests_per_s == self.queued_requests == self.inflight_requests == 0
