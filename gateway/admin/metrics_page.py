"""The Prometheus page: the data path's counters and the control loop's picture, in one text.

Names and help of all of them are in ``gateway.datapath.metrics``; prometheus-client writes the
format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from autoscaler.backends.process.fork_server import FORK_STATES
from autoscaler.control.start_steps import STEPS
from autoscaler.types import FleetReport
from gateway.admin.schema import ForkServerEntry
from gateway.datapath import metrics
from gateway.datapath.shared import Shared
from modelcache.types import TIERS
from router.types import ReplicaState

PREFIX = "tidegate_"

CACHE_KINDS: Mapping[str, str] = {
    "models": "bytes_blobs",
    "prepared": "bytes_prepared",
    "partial": "bytes_partial",
    "records": "bytes_records",
}
"""What the model cache takes bytes for, by the name of the figure of its usage."""


def render(
    *,
    shared: Shared,
    pools: Mapping[str, int],
    report: FleetReport | None,
    version: str,
    traffic: Mapping[str, Any],
    forks: ForkServerEntry | None = None,
) -> bytes:
    """The whole page, in Prometheus text format 0.0.4. ``pools``: their slots in ``shared`` by
    name; ``traffic``: the model cache's figures; ``forks``: those of the fork server, as
    ``/status`` has them."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(shared, pools, report, version, traffic, forks))
    return generate_latest(registry)


def render_agent(*, version: str, traffic: Mapping[str, Any]) -> bytes:
    """The page of a cache agent, which has no pools."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_AgentPage(version, traffic))
    return generate_latest(registry)


def render_cache(usage: Any | None, failures: int = 0) -> bytes:
    """What the model cache takes (its ``Usage``; ``None``: not known), and how often that could not
    be told, to follow one of the pages above."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_CachePage(usage, failures))
    return generate_latest(registry)


class _CachePage(Collector):
    def __init__(self, usage: Any | None, failures: int) -> None:
        self._usage = usage
        self._failures = failures

    def collect(self) -> Iterator[Metric]:
        """All families, one after the other."""
        failures = _family(metrics.CACHE_LOOK_FAILURES, [])
        failures.add_metric([], self._failures)
        yield failures
        if self._usage is None:
            return
        taken = _family(metrics.CACHE_BYTES, ["kind"])
        for kind, figure in CACHE_KINDS.items():
            taken.add_metric([kind], getattr(self._usage, figure))
        yield taken
        if self._usage.quota_bytes is not None:
            quota = _family(metrics.CACHE_QUOTA, [])
            quota.add_metric([], self._usage.quota_bytes)
            yield quota


class _AgentPage(Collector):
    def __init__(self, version: str, traffic: Mapping[str, Any]) -> None:
        self._version = version
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        """All families, one after the other."""
        yield _build(self._version)
        yield from _cache(self._traffic)


class _Page(Collector):
    def __init__(
        self,
        shared: Shared,
        pools: Mapping[str, int],
        report: FleetReport | None,
        version: str,
        traffic: Mapping[str, Any],
        forks: ForkServerEntry | None,
    ) -> None:
        self._forks = forks
        self._shared = shared
        self._pools = pools
        self._report = report
        self._version = version
        self._traffic = traffic

    def collect(self) -> Iterator[Metric]:
        """All families, one after the other."""
        yield _build(self._version)
        yield from self._pool_counters()
        yield from self._histograms()
        yield from self._worker_counters()
        if self._report is not None:
            yield from self._replicas(self._report)
            yield from self._warmth(self._report)
            yield from self._decisions(self._report)
        yield from _forks(self._forks)
        yield from _cache(self._traffic)

    def _pool_counters(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for index, metric in enumerate(metrics.POOL_METRICS):
            family = families.get(metric.name)
            if family is None:
                family = families[metric.name] = _family(metric, ["pool"])
            for pool, slot in self._pools.items():
                labels = [pool, *(value for _, value in metric.labels)]
                family.add_metric(labels, self._shared.pool_total(slot, index))
        yield from families.values()

    def _histograms(self) -> Iterator[Metric]:
        for number, spec in enumerate(metrics.POOL_HISTOGRAMS):
            family = HistogramMetricFamily(PREFIX + spec.name, spec.help, labels=["pool"])
            start = metrics.HISTOGRAM_OFFSETS[number]
            bounds = [*(format(bound, "g") for bound in spec.bounds), "+Inf"]
            for pool, slot in self._pools.items():
                buckets, running = [], 0
                for offset, bound in enumerate(bounds):
                    running += self._shared.pool_total(slot, start + offset)
                    buckets.append((bound, float(running)))
                total = self._shared.pool_sum(slot, number)
                family.add_metric([pool], buckets, sum_value=total)
            yield family

    def _worker_counters(self) -> Iterator[Metric]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        for index, metric in enumerate(metrics.WORKER_METRICS):
            family = families.get(metric.name)
            if family is None:
                family = families[metric.name] = _family(metric, ["worker"])
            for worker in range(self._shared.workers):
                labels = [str(worker), *(value for _, value in metric.labels)]
                family.add_metric(labels, self._shared.worker_counters(worker)[index])
        yield from families.values()

    @staticmethod
    def _replicas(report: FleetReport) -> Iterator[Metric]:
        replicas = _family(metrics.REPLICAS, ["pool", "state"])
        desired = _family(metrics.DESIRED_REPLICAS, ["pool"])
        wake = _family(metrics.WAKE_ETA, ["pool"])
        failures = _family(metrics.START_FAILURES, ["pool"])
        for pool in report.pools:
            states = [replica.state for replica in pool.replicas]
            for state in ReplicaState:
                replicas.add_metric([pool.name, state.value], states.count(state))
            desired.add_metric([pool.name], pool.desired)
            failures.add_metric([pool.name], pool.failures)
            if pool.wake_eta_s is not None:
                wake.add_metric([pool.name], pool.wake_eta_s)
        yield from (replicas, desired, wake, failures)

    @staticmethod
    def _warmth(report: FleetReport) -> Iterator[Metric]:
        tier = _family(metrics.TIER, ["pool", "tier"])
        wake = _family(metrics.TIER_WAKE, ["pool", "tier"])
        starting = _family(metrics.STARTING_REPLICAS, ["pool", "step"])
        done = _family(metrics.PREPARED_BYTES, ["pool"])
        total = _family(metrics.PREPARE_BYTES, ["pool"])
        for pool in report.pools:
            for known in TIERS if pool.tier is not None else ():
                tier.add_metric([pool.name, known.value], known is pool.tier)
            for one in pool.tiers:
                if one.wake_s is not None:
                    wake.add_metric([pool.name, one.tier.value], one.wake_s)
            steps = [replica.step for replica in pool.replicas]
            for step in STEPS if pool.tier is not None else ():
                starting.add_metric([pool.name, step], steps.count(step))
            coming = [one.progress for one in pool.replicas if one.progress is not None]
            if coming:
                done.add_metric([pool.name], sum(one.bytes_done for one in coming))
                total.add_metric([pool.name], sum(one.bytes_total or 0 for one in coming))
        yield from (tier, wake, starting, done, total)

    @staticmethod
    def _decisions(report: FleetReport) -> Iterator[Metric]:
        decisions = _family(metrics.DECISIONS, ["pool", "reason"])
        for (pool, reason), count in sorted(report.decisions.items()):
            decisions.add_metric([pool, reason.value], count)
        errors = _family(metrics.CONTROL_ERRORS, ["where"])
        for where, count in sorted(report.errors.items()):
            errors.add_metric([where], count)
        yield from (decisions, errors)


def _forks(forks: ForkServerEntry | None) -> Iterator[Metric]:
    """The fork server and what stands by; what is not known is left out."""
    state = _family(metrics.FORK_SERVER, ["state"])
    memory = _family(metrics.FORK_SERVER_BYTES, [])
    total = _family(metrics.FORKS, [])
    crashes = _family(metrics.FORK_SERVER_CRASHES, [])
    standbys = _family(metrics.STANDBY_BYTES, ["pool"])
    if forks is not None:
        for known in FORK_STATES:
            state.add_metric([known], known == forks.state)
        if forks.pss_bytes is not None:
            memory.add_metric([], forks.pss_bytes)
        total.add_metric([], forks.forked)
        crashes.add_metric([], forks.crashes)
        for one in forks.standbys:
            if one.pss_bytes is not None:
                standbys.add_metric([one.pool], one.pss_bytes)
    yield from (state, memory, total, crashes, standbys)


def _build(version: str) -> Metric:
    info = InfoMetricFamily(PREFIX + metrics.BUILD.name, metrics.BUILD.help)
    info.add_metric([], {"version": version})
    return info


def _cache(traffic: Mapping[str, Any]) -> Iterator[Metric]:
    """The model cache's figures, those that are told."""
    families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
    for figure, metric in metrics.CACHE_METRICS.items():
        if figure not in traffic:
            continue
        family = families.get(metric.name)
        if family is None:
            family = families[metric.name] = _family(metric, [])
        family.add_metric([value for _, value in metric.labels], traffic[figure])
    yield from families.values()


def _family(metric: metrics.Metric, labels: list[str]) -> CounterMetricFamily | GaugeMetricFamily:
    names = labels + [name for name, _ in metric.labels]
    name = PREFIX + metric.name
    if metric.gauge:
        return GaugeMetricFamily(name, metric.help, labels=names)
    return CounterMetricFamily(name, metric.help, labels=names)
