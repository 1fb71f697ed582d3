"""What the admin listener shows and does: the control loop, the workers and the counters as one.

Implements ``gateway.admin.app.Control``. Turns reports into plain JSON values; readings of our
monotonic clock become Unix times (``at_s``) or durations (``since_s``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from autoscaler.backends.base import BackendError
from autoscaler.control.loop import ControlLoop
from autoscaler.settings import PoolSettings
from autoscaler.types import (
    Decision,
    Observation,
    PoolReport,
    ReplicaLoad,
    ReplicaReport,
    TierReport,
)
from gateway.admin import metrics_page
from gateway.compose.workers import Workers
from gateway.datapath import metrics

FORKS_S = 2.0
"""Seconds for which what was seen of the fork server is told again."""


class LiveControl:
    """The running Tidegate, for those who ask it something."""

    def __init__(
        self,
        *,
        loop: ControlLoop,
        workers: Workers,
        pools: tuple[PoolSettings, ...],
        version: str,
        url: str,
        admin_url: str,
        clock: Callable[[], float],
        observe: Callable[[], Observation],
        pool_slots: Callable[[], Mapping[str, int]],
        traffic: Callable[[], Mapping[str, Any]],
        forks: Callable[[], dict[str, Any] | None],
    ) -> None:
        self._loop = loop
        self._workers = workers
        self._pools = {pool.name: pool for pool in pools}
        self._version = version
        self._url = url
        self._admin_url = admin_url
        self._clock = clock
        self._observe = observe
        self._pool_slots = pool_slots
        self._traffic = traffic
        self._forks = forks
        self._forks_seen: tuple[float, dict[str, Any] | None] | None = None
        self._started_s = clock()

    def status(self) -> dict[str, Any]:
        """Everything, as JSON."""
        report = self._loop.status()
        seen = self._observe()  # now, not at the loop's last tick
        workers = self._workers.status()
        for index, worker in enumerate(workers):
            counters = self._workers.shared.worker_counters(index)
            worker["connections"] = counters[metrics.CONNECTIONS]
            worker["upstream_connections"] = counters[metrics.UPSTREAM_CONNECTIONS]
        return {
            "version": self._version,
            "endpoint": self._url,
            "admin": self._admin_url,
            "uptime_s": round(self._clock() - self._started_s, 3),
            "workers": workers,
            "pools": [self._pool(pool, seen, report.at_s) for pool in report.pools],
            "fork_server": self._fork_server(),
            "errors": dict(report.errors),
            "last_error": report.last_error,
        }

    def _fork_server(self) -> dict[str, Any] | None:
        """How the fork server is and what stands by; memory is read from the kernel, so not at
        every look."""
        now = self._clock()
        if self._forks_seen is None or now - self._forks_seen[0] >= FORKS_S:
            self._forks_seen = (now, self._forks())
        return self._forks_seen[1]

    def _pool(self, report: PoolReport, seen: Observation, now: float) -> dict[str, Any]:
        settings = self._pools[report.name]
        demand = seen.pools.get(report.name)
        return {
            "name": report.name,
            "aliases": list(settings.aliases),
            "engine": settings.engine or settings.backend,
            "backend": settings.backend,
            "model": settings.model,
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "desired": report.desired,
            "override": report.override,
            "ready": report.ready,
            "starting": report.starting,
            "unhealthy": report.unhealthy,
            "draining": report.draining,
            "sleeping": report.sleeping,
            "queued_requests": demand.queued_requests if demand else None,
            "queued_tokens": demand.queued_tokens if demand else None,
            "inflight_requests": demand.inflight_requests if demand else None,
            "inflight_tokens": demand.inflight_tokens if demand else None,
            "arrivals_total": demand.arrivals_total if demand else None,
            "wake_eta_s": report.wake_eta_s,
            "tier": None if report.tier is None else report.tier.value,
            "tiers": [_tier(one) for one in report.tiers],
            "step_down_in_s": None
            if report.step_down_at_s is None
            else round(max(0.0, report.step_down_at_s - now), 3),
            "last_decision": _decision(report.last_decision, now),
            "failures": report.failures,
            "retry_in_s": None
            if report.retry_at_s is None
            else round(max(0.0, report.retry_at_s - now), 3),
            "error": report.error,
            "replicas": [_replica(one, seen.replicas.get(one.id), now) for one in report.replicas],
        }

    def ready(self) -> tuple[bool, str]:
        """Whether requests are accepted: the workers listen. A pool at zero is no obstacle."""
        if self._workers.all_listening:
            return True, "accepting requests"
        return False, "not every worker is listening"

    def metrics(self) -> bytes:
        """Prometheus text."""
        return metrics_page.render(
            shared=self._workers.shared,
            pools=self._pool_slots(),
            report=self._loop.status(),
            version=self._version,
            traffic=self._traffic(),
            forks=self._fork_server(),
        )

    def explain(self, pool: str) -> list[dict[str, Any]]:
        """The pool's decisions, newest last. ``KeyError`` for an unknown pool."""
        self._check(pool)
        now = self._clock()
        return [
            {
                **(_decision(past.decision, now) or {}),
                "count": past.count,
                "first_at_s": _wall(past.first_at_s, now),
                "last_at_s": _wall(past.last_at_s, now),
            }
            for past in self._loop.decisions(pool)
        ]

    async def scale(self, pool: str, replicas: int | None) -> dict[str, Any]:
        """Hold the pool at a number of replicas, or give it back to the autoscaler."""
        self._check(pool)
        self._loop.set_replicas(pool, replicas)
        return {"pool": pool, "override": replicas}

    async def sleep(self, pool: str, level: int) -> dict[str, Any]:
        """Put the pool's ready replicas to sleep."""
        self._check(pool)
        try:
            report = await self._loop.sleep(pool, level)
        except BackendError as error:
            raise ValueError(str(error)) from error
        return {"pool": pool, "sleeping": report.sleeping, "ready": report.ready}

    async def wake(self, pool: str) -> dict[str, Any]:
        """Wake the pool's sleeping replicas, or see that one is started."""
        self._check(pool)
        report = await self._loop.wake(pool)
        return {"pool": pool, "starting": report.starting, "ready": report.ready}

    async def drain(self, replica_id: str) -> dict[str, Any]:
        """Give a replica no more requests and stop it when it has finished."""
        await self._loop.drain(replica_id)
        return {"replica": replica_id, "state": "draining"}

    def _check(self, pool: str) -> None:
        if pool not in self._pools:
            raise KeyError(pool)


def _wall(at_s: float, now: float) -> float:
    """A reading of our monotonic clock as Unix time, for people and their logs."""
    return round(time.time() - (now - at_s), 3)


def _decision(decision: Decision | None, now: float) -> dict[str, Any] | None:
    if decision is None:
        return None
    return {
        "at_s": _wall(decision.at_s, now),
        "desired": decision.desired,
        "supply": decision.supply,
        "reason": decision.reason.value,
        "detail": decision.detail,
        "signal": decision.signal.value,
        "bound": None if decision.bound is None else decision.bound.value,
        "panicking": decision.panicking,
    }


def _tier(report: TierReport) -> dict[str, Any]:
    return {
        "tier": report.tier.value,
        "available": report.available,
        "wake_s": None if report.wake_s is None else round(report.wake_s, 3),
        "wakes": report.wakes,
        "stays_s": report.stays_s,
        "why_not": report.why_not,
    }


def _replica(replica: ReplicaReport, load: ReplicaLoad | None, now: float) -> dict[str, Any]:
    return {
        "id": replica.id,
        "state": replica.state.value,
        "url": replica.url,
        "pid": replica.pid,
        "served_model": replica.served_model,
        "gpus": list(replica.gpus),
        "cpus": list(replica.cpus),
        "inflight_requests": load.inflight_requests if load else None,
        "inflight_tokens": load.inflight_tokens if load else None,
        "phase": replica.phase,
        "step": replica.step,
        "progress": None
        if replica.progress is None
        else {
            "phase": replica.progress.phase,
            "bytes_done": replica.progress.bytes_done,
            "bytes_total": replica.progress.bytes_total,
            "rate_bytes_s": replica.progress.rate_bytes_s,
        },
        "woken_from": None if replica.woken_from is None else replica.woken_from.value,
        "since_s": round(now - replica.since_s, 3),
        "error": replica.error,
    }
