"""The Prometheus page: the data path's counters and the control loop's picture, in one text.

Names and help of all of them are in ``gateway.datapath.metrics``; prometheus-client writes the
format.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from types import MappingProxyType
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from autoscaler.backends.process.fork_server import FORK_STATES
from autoscaler.control.start_steps import STEPS_TO_READY
from autoscaler.policy.gpu_faults import find_fault
from autoscaler.signals.gpus.figures import GPU_FIGURES, THROTTLE_REASONS
from autoscaler.types import (
    Decision,
    EngineObservation,
    FleetReport,
    ForecastTally,
    GpuReading,
    GpuReport,
    ScaleReason,
    TierReport,
)
from gateway.admin.schema import ForkServerEntry, HistoryState
from gateway.datapath import metrics
from gateway.datapath.shared import Shared, buckets_of
from modelcache.types import TIERS
from router.types import ReplicaState

log = logging.getLogger("tidegate.cache")

PREFIX = "tidegate_"

CACHE_KINDS: Mapping[str, str] = {
    "models": "bytes_blobs",
    "prepared": "bytes_prepared",
    "partial": "bytes_partial",
    "records": "bytes_records",
}
"""What the model cache takes bytes for, by the name of the figure of its usage."""

FRESH_S = 15.0
"""A reading of this age is not repeated: Prometheus scrapes about so often."""

WAIT_S = 2.0
"""Longest time that a page waits for a reading; after that it has the last one."""

STALE_S = 120.0
"""A reading older than this is not used: unknown is not what it was."""


def render(
    *,
    shared: Shared,
    pools: Mapping[str, int],
    report: FleetReport | None,
    version: str,
    traffic: Mapping[str, Any],
    replicas: Mapping[str, int],
    workers: Sequence[Mapping[str, Any]],
    forks: ForkServerEntry | None = None,
    engines: Mapping[str, EngineObservation] = MappingProxyType({}),
    gpus: GpuReport | None = None,
) -> bytes:
    """The whole page, in Prometheus text format 0.0.4. ``pools``: their slots in ``shared`` by
    name; ``replicas``: theirs by id; ``traffic``: the model cache's figures;
    ``workers``: index, pid and restarts of each; ``forks``: the fork server's figures, as
    ``/status`` has them; ``engines``: what engines say themselves, by replica id;
    ``gpus``: what the GPUs of this node do."""
    page = _Page(version)
    totals = {pool: shared.pool_totals(slot) for pool, slot in pools.items()}
    for pool, slot in pools.items():
        for index, metric in enumerate(metrics.POOL_METRICS):
            if index == metrics.HELD_SINCE:
                page.add(metric, _age_s(shared.held_since_ms(slot)), pool=pool)
            else:
                page.add(metric, totals[pool][index], pool=pool)
    sums = {pool: shared.pool_sums(slot) for pool, slot in pools.items()}
    for number, spec in enumerate(metrics.POOL_HISTOGRAMS):
        for pool in pools:
            counts = totals[pool][buckets_of(number)]
            if any(counts) or not spec.labels:  # of the many combinations those that there were
                page.observe(spec, spec.bounds, counts, sums[pool][number], pool=pool)
    counters = [shared.worker_counters(worker) for worker in range(shared.workers)]
    for index, metric in enumerate(metrics.WORKER_METRICS):
        if metric.labels:  # of requests that named no pool
            page.add(metric, sum(one[index] for one in counters))
            continue
        for worker, one in enumerate(counters):
            if index != metrics.TLS_NOT_AFTER or one[index]:
                page.add(metric, one[index], worker=str(worker))
    _add_processes(page, workers)
    if report is not None:
        _add_fleet(page, report)
        for replica in (one for each in report.pools for one in each.replicas):
            if replica.id in replicas:
                _add_replica(page, shared, replica.pool, replica.id, replicas[replica.id])
            for gpu in replica.gpus:
                labels = {"pool": replica.pool, "replica": replica.id, "gpu": str(gpu)}
                page.add(metrics.REPLICA_GPU, 1, **labels)
            if replica.id in engines:
                _add_engine(page, replica.pool, replica.id, engines[replica.id], report.at_s)
        for reading in (gpus.gpus if gpus is not None else None) or ():
            _add_gpu(page, reading, report.at_s)
    if forks is not None:
        _add_forks(page, forks)
    _add_traffic(page, traffic)
    return page.text()


def render_agent(*, version: str, traffic: Mapping[str, Any]) -> bytes:
    """The page of a cache agent, which has no pools."""
    page = _Page(version)
    _add_processes(page, ())
    _add_traffic(page, traffic)
    return page.text()


def render_cache(usage: Any | None, failures: int = 0) -> bytes:
    """What the model cache takes (its ``Usage``; ``None``: not known), and how often reading that
    failed, to follow one of the pages above."""
    page = _Page()
    page.add(metrics.CACHE_LOOK_FAILURES, failures)
    if usage is not None:
        for kind, figure in CACHE_KINDS.items():
            page.add(metrics.CACHE_BYTES, getattr(usage, figure), kind=kind)
        page.add(metrics.CACHE_QUOTA, usage.quota_bytes)
    return page.text()


def render_history(state: HistoryState) -> bytes:
    """Whether the past of the pools is kept, to follow one of the pages above."""
    page = _Page()
    page.add(metrics.HISTORY_BYTES, state.size_bytes)
    page.add(metrics.HISTORY_FAILURES, state.failures)
    return page.text()


def render_forecasts(tallies: Mapping[str, ForecastTally]) -> bytes:
    """What came of the forecasts of each pool, to follow one of the pages above."""
    page = _Page()
    for pool, tally in tallies.items():
        page.add(metrics.FORECASTS_SCORED, tally.scored, pool=pool)
        page.add(metrics.FORECASTS_COVERED, tally.covered, pool=pool)
        page.add(metrics.FORECAST_LOSS, tally.loss, pool=pool)
        page.add(metrics.LAST_VALUE_LOSS, tally.last_value_loss, pool=pool)
    return page.text()


class _Page(Collector):
    """Samples by family. A metric without a sample is not on the page."""

    def __init__(self, version: str | None = None) -> None:
        self.families: dict[str, Metric] = {}
        if version is not None:
            info = InfoMetricFamily(PREFIX + metrics.BUILD.name, metrics.BUILD.help)
            info.add_metric([], {"version": version})
            self.families[metrics.BUILD.name] = info

    def add(self, metric: metrics.Metric, value: float | None, **labels: str) -> None:
        """One sample; an unknown one is left out."""
        if value is not None:
            kind = GaugeMetricFamily if metric.gauge else CounterMetricFamily
            family, texts = self._family(kind, metric, labels | dict(metric.labels))
            family.add_metric(texts, value)

    def sum_up(self, metric: metrics.Metric, count: int, total: float, **labels: str) -> None:
        """One summary: how many values, and their sum."""
        family, texts = self._family(SummaryMetricFamily, metric, labels)
        family.add_metric(texts, count, total)

    def observe(
        self,
        metric: metrics.Metric | metrics.Buckets,
        bounds: Sequence[float],
        counts: Sequence[int],
        total: float,
        **labels: str,
    ) -> None:
        """One histogram: ``counts`` of values up to each bound and, last, beyond them."""
        family, texts = self._family(HistogramMetricFamily, metric, labels | dict(metric.labels))
        names = [*(format(bound, "g") for bound in bounds), "+Inf"]
        buckets = list(zip(names, map(float, accumulate(counts)), strict=True))
        family.add_metric(texts, buckets, sum_value=total)

    def _family(
        self, kind: Any, metric: metrics.Metric | metrics.Buckets, labels: Mapping[str, str]
    ) -> tuple[Any, list[str]]:
        """The family of a metric, and the values of its labels in the order of their names."""
        names = sorted(labels)
        if metric.name not in self.families:
            self.families[metric.name] = kind(PREFIX + metric.name, metric.help, labels=names)
        return self.families[metric.name], [labels[name] for name in names]

    def collect(self) -> Iterable[Metric]:
        """The families, in the order of their first samples."""
        return self.families.values()

    def text(self) -> bytes:
        """The page."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)


def _age_s(since_ms: int) -> float:
    return max(0.0, time.monotonic() - since_ms / 1000) if since_ms else 0.0


def _add_replica(page: _Page, shared: Shared, pool: str, replica: str, slot: int) -> None:
    labels = {"pool": pool, "replica": replica}
    requests, tokens = shared.replica_total(slot)
    page.add(metrics.REPLICA_INFLIGHT_REQUESTS, requests, **labels)
    page.add(metrics.REPLICA_INFLIGHT_TOKENS, tokens, **labels)
    rows = [shared.replica_counters(worker, slot) for worker in range(shared.workers)]
    ok, error, answers, wait_us = (sum(column) for column in zip(*rows, strict=True))
    page.add(metrics.REPLICA_REQUESTS, ok, **labels, outcome="ok")
    page.add(metrics.REPLICA_REQUESTS, error, **labels, outcome="error")
    page.sum_up(metrics.REPLICA_TTFT, answers, wait_us / 1e6, **labels)


def _add_engine(
    page: _Page, pool: str, replica: str, seen: EngineObservation, now_s: float
) -> None:
    labels = {"pool": pool, "replica": replica}
    for field, metric in metrics.ENGINE_METRICS.items():
        page.add(metric, getattr(seen.load, field), **labels)
    page.add(metrics.ENGINE_HIT_FRACTION, seen.prefix_cache_hit_fraction, **labels)
    page.add(metrics.ENGINE_AGE, max(0.0, now_s - seen.observed_at_s), **labels)


def _add_gpu(page: _Page, reading: GpuReading, now_s: float) -> None:
    gpu = reading.gpu
    labels = {"gpu": str(gpu.index), "uuid": gpu.uuid}
    page.add(metrics.GPU_INFO, 1, **labels, name=gpu.name, driver=gpu.driver)
    for figure in GPU_FIGURES:
        metric = metrics.Metric(f"gpu_{figure.name}", figure.help, gauge=not figure.counter)
        page.add(metric, reading.figures.get(figure.name), **labels)
    if reading.throttle_reasons is not None:
        for _, reason in THROTTLE_REASONS:
            is_one = reason in reading.throttle_reasons
            page.add(metrics.GPU_THROTTLED, is_one, **labels, reason=reason)
    for xid, count in sorted(reading.xid_counts.items()):
        page.add(metrics.GPU_XIDS, count, **labels, xid=str(xid))
    fault = find_fault(reading, now_s)
    if fault is not None:
        page.add(metrics.GPU_FAULT, 1, **labels, action=fault.action.value)


def _add_processes(page: _Page, workers: Sequence[Mapping[str, Any]]) -> None:
    """This process by the usual names (``process_*``), and each worker's."""
    for family in ProcessCollector(registry=None).collect():
        page.families[family.name] = family
    for worker in workers:
        label = str(worker["index"])
        page.add(metrics.WORKER_RESTARTS, worker["restarts"], worker=label)
        pid = worker["pid"]
        if pid is None:
            continue
        for family in ProcessCollector(pid=partial(int, pid), registry=None).collect():
            for sample in family.samples:
                metric = metrics.WORKER_PROCESS_METRICS.get(sample.name)
                if metric is not None:
                    page.add(metric, sample.value, worker=label)


def _add_decision(page: _Page, name: str, decision: Decision) -> None:
    recommended: int | None = (
        decision.desired if decision.recommended is None else decision.recommended
    )
    if decision.reason is ScaleReason.OBSERVE:
        recommended = None  # it is recorded only, so that no other autoscaler follows it
    page.add(metrics.RECOMMENDED_REPLICAS, recommended, pool=name)
    page.add(metrics.REACTIVE_REPLICAS, decision.reactive, pool=name)
    page.add(metrics.FORECAST_REPLICAS, decision.forecast, pool=name)
    page.add(metrics.FORECAST_TRUSTED, int(not decision.fallback), pool=name)
    if decision.capacity is not None:
        page.add(
            metrics.CAPACITY,
            decision.capacity.tokens_per_s,
            pool=name,
            source=decision.capacity.source.value,
        )


def _add_fleet(page: _Page, report: FleetReport) -> None:
    for pool in report.pools:
        name = pool.name
        states = [replica.state for replica in pool.replicas]
        for state in ReplicaState:
            page.add(metrics.REPLICAS, states.count(state), pool=name, state=state.value)
        page.add(metrics.DESIRED_REPLICAS, pool.desired, pool=name)
        if pool.last_decision is not None and pool.tier is not None:
            _add_decision(page, name, pool.last_decision)
        if pool.tier is not None:
            page.add(metrics.MAX_REPLICAS, pool.max_replicas, pool=name)
        page.add(metrics.REPLICA_CRASHES, pool.crashes, pool=name)
        page.add(metrics.WAKE_ETA, pool.wake_eta_s, pool=name)
        page.add(metrics.START_FAILURES, pool.failures, pool=name)
        if pool.tier is not None:
            for tier in TIERS:
                page.add(metrics.TIER, tier is pool.tier, pool=name, tier=tier.value)
        for one in pool.tiers:
            _add_tier(page, name, one)
        if pool.tier is not None:
            steps = [replica.step for replica in pool.replicas]
            for step in STEPS_TO_READY:
                page.add(metrics.STARTING_REPLICAS, steps.count(step), pool=name, step=step)
        coming = [one.progress for one in pool.replicas if one.progress is not None]
        if coming:
            totals = [one.bytes_total for one in coming if one.bytes_total is not None]
            page.add(metrics.PREPARED_BYTES, sum(one.bytes_done for one in coming), pool=name)
            page.add(metrics.PREPARE_BYTES, sum(totals) if totals else None, pool=name)
    for (name, reason), count in sorted(report.decisions.items()):
        page.add(metrics.DECISIONS, count, pool=name, reason=reason.value)
    for where, count in sorted(report.errors.items()):
        page.add(metrics.CONTROL_ERRORS, count, where=where)


def _add_tier(page: _Page, pool: str, one: TierReport) -> None:
    """What starts and wakes out of one tier came to."""
    labels = {"pool": pool, "tier": one.tier.value}
    times = one.start_times
    page.add(metrics.TIER_WAKE, one.wake_s, **labels)
    page.add(metrics.STARTS, 0 if times is None else sum(times.counts), **labels, outcome="ready")
    page.add(metrics.STARTS, one.failed_starts, **labels, outcome="failed")
    if times is not None:
        page.observe(metrics.START_TIME, times.bounds_s, times.counts, times.sum_s, **labels)


def _add_forks(page: _Page, forks: ForkServerEntry) -> None:
    """The fork server and its standbys."""
    for state in FORK_STATES:
        page.add(metrics.FORK_SERVER, state == forks.state, state=state)
    page.add(metrics.FORK_SERVER_BYTES, forks.pss_bytes)
    page.add(metrics.FORKS, forks.forked)
    page.add(metrics.FORK_SERVER_CRASHES, forks.crashes)
    for one in forks.standbys:
        page.add(metrics.STANDBY_BYTES, one.pss_bytes, pool=one.pool)


def _add_traffic(page: _Page, traffic: Mapping[str, Any]) -> None:
    """The model cache's figures that are known."""
    for figure, metric in metrics.CACHE_METRICS.items():
        page.add(metric, traffic.get(figure))


class UsagePoller:
    """What the model cache takes, read from its disk now and then: ``usage`` is called in a thread
    of its own, one at a time. For one event loop.

    A reading goes over the record of every model, on a disk that may be slow, broken or hung.
    Neither the event loop nor its threads may wait for that, nor may a page of metrics be lost.
    """

    def __init__(
        self,
        usage: Callable[[], Any],
        *,
        clock: Callable[[], float] = time.monotonic,
        wait_s: float = WAIT_S,
    ) -> None:
        self._usage = usage
        self._clock = clock
        self._wait_s = wait_s
        self._seen: Any = None
        self._seen_s = -STALE_S
        self._reading: asyncio.Future[None] | None = None
        self.failures = 0
        """Readings that met an error."""

    async def get(self) -> Any | None:
        """The cache's ``Usage``, not older than ``STALE_S``; ``None`` where it is not known."""
        if self._clock() - self._seen_s >= FRESH_S:
            if self._reading is None or self._reading.done():
                self._reading = self._read()
            await asyncio.wait({self._reading}, timeout=self._wait_s)
        return self._seen if self._clock() - self._seen_s < STALE_S else None

    def _read(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        reading = loop.create_future()

        def read() -> None:
            seen: Any = None
            try:
                seen = self._usage()
            except Exception as error:  # noqa: BLE001 -- the page of metrics goes on without it
                log.warning("the disk use of the model cache cannot be read: %s", error)
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._done, reading, seen)

        # Not one of the loop's threads: a disk that hangs would take them one by one.
        threading.Thread(target=read, name="cache usage", daemon=True).start()
        return reading

    def _done(self, reading: asyncio.Future[None], seen: Any) -> None:
        if seen is None:
            self.failures += 1
        else:
            self._seen, self._seen_s = seen, self._clock()
        if not reading.done():
            reading.set_result(None)
