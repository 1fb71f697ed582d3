"""The adapter's own metrics: what it was asked, how long it took, how old what it knows is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

TEXT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)


class Aged(Protocol):
    """The signals, as far as they are measured."""

    @property
    def age_s(self) -> float | None:
        """How old they are; ``None`` before the first."""
        ...

    @property
    def failures(self) -> int:
        """How often they did not come."""
        ...


class _FeedCollector(Collector):
    """What is read of the signals when it is asked for. An age that there is not is absent."""

    def __init__(self, feed: Aged) -> None:
        self._feed = feed

    def collect(self) -> Iterator[Metric]:
        age = GaugeMetricFamily(
            "tidegate_adapter_signals_age_seconds", "Age of what is known of the pools."
        )
        if self._feed.age_s is not None:
            age.add_metric([], self._feed.age_s)
        yield age
        yield CounterMetricFamily(
            "tidegate_adapter_signals_failures",
            "Times that Tidegate did not answer.",
            value=self._feed.failures,
        )


class AdapterMeasures:
    """Counted on one event loop."""

    def __init__(self, version: str, feed: Aged) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry, namespace="tidegate_adapter")
        self._requests = Counter(
            "tidegate_adapter_requests",
            "Requests of other autoscalers, by API, verb and status.",
            ("api", "verb", "code"),
            registry=registry,
        )
        self._durations = Histogram(
            "tidegate_adapter_request_duration_seconds",
            "Request read to answer ready, of metrics and of KEDA's calls.",
            ("api",),
            buckets=BUCKETS_S,
            registry=registry,
        )
        registry.register(_FeedCollector(feed))
        self._reviews = Counter(
            "tidegate_adapter_reviews",
            "Questions to the cluster about tokens and permissions, by outcome.",
            ("kind", "outcome"),
            registry=registry,
        )
        self.streams = Gauge(
            "tidegate_adapter_streams", "KEDA's streams that are open.", registry=registry
        )
        info = Gauge("tidegate_adapter_build_info", "The adapter.", ("version",), registry=registry)
        info.labels(version).set(1)

    def answered(self, api: str, verb: str, code: str, seconds: float) -> None:
        """A request has its answer."""
        self._requests.labels(api, verb, code).inc()
        self._durations.labels(api).observe(seconds)

    def reviewed(self, kind: str, outcome: str) -> None:
        """The cluster was asked, and this came of it."""
        self._reviews.labels(kind, outcome).inc()

    def page(self) -> bytes:
        """Prometheus text."""
        page: bytes = generate_latest(self._registry)
        return page
