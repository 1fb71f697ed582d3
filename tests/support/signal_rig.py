"""Signals of a few pools, and a feed that has them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from autoscaler.adapters.feed import FetchError, SignalFeed
from autoscaler.adapters.types import (
    ForecastQuantile,
    KubernetesObject,
    LatencyQuantiles,
    PoolSignals,
    ReplicaSignals,
)


def pod(name: str, namespace: str = "default", **labels: str) -> KubernetesObject:
    return KubernetesObject(resource="pods", namespace=namespace, name=name, labels=labels)


def deployment(name: str, namespace: str = "default", **labels: str) -> KubernetesObject:
    return KubernetesObject(
        group="apps", resource="deployments", namespace=namespace, name=name, labels=labels
    )


def service(name: str, namespace: str = "default", **labels: str) -> KubernetesObject:
    return KubernetesObject(resource="services", namespace=namespace, name=name, labels=labels)


def signals(pool: str = "chat", **given: Any) -> PoolSignals:
    """A busy pool with everything known, and two replicas in pods."""
    base: dict[str, Any] = {
        "pool": pool,
        "slug": pool.replace("/", "-"),
        "active": True,
        "window_s": 60.0,
        "requests_per_s": 2.5,
        "input_tokens_per_s": 300.0,
        "output_tokens_per_s": 80.0,
        "queued_requests": 3,
        "queued_tokens": 900,
        "inflight_requests": 8,
        "inflight_tokens": 4_000,
        "queue_wait": LatencyQuantiles(p50_s=0.01, p95_s=0.2, p99_s=0.4),
        "ttft": LatencyQuantiles(p50_s=0.1, p95_s=0.5, p99_s=0.9),
        "itl": LatencyQuantiles(p50_s=0.02, p95_s=0.03, p99_s=0.05),
        "e2e": LatencyQuantiles(p50_s=1.0, p95_s=3.0, p99_s=4.0),
        "kv_cache_usage_mean_fraction": 0.4,
        "kv_cache_usage_max_fraction": 0.6,
        "gpu_utilization_fraction": 0.9,
        "ready_replicas": 2,
        "desired_replicas": 3,
        "objects": (deployment(pool, app=pool), service(pool)),
        "forecast": tuple(
            ForecastQuantile(
                horizon=horizon, horizon_s=seconds, quantile=quantile,
                tokens_per_s=100.0 * quantile + seconds,
            )
            for horizon, seconds in (("lead", 45.0), ("5m", 300.0))
            for quantile in (0.5, 0.95)
        ),
        "replicas": tuple(
            ReplicaSignals(
                replica=f"{pool}-{number}", ready=True, pod=pod(f"{pool}-{number}", app=pool),
                inflight_requests=4, inflight_tokens=2_000 * number, running_requests=3,
                waiting_requests=1, kv_cache_usage_fraction=0.2 * number,
            )
            for number in (1, 2)
        ),
    }  # fmt: skip
    return PoolSignals(**(base | given))


def unknown(pool: str = "chat") -> PoolSignals:
    """A pool of which nothing is known."""
    return PoolSignals(pool=pool, slug=pool, ready_replicas=0)


@dataclass
class Answer:
    version: int
    pools: tuple[PoolSignals, ...]


class Source:
    """Stands where a Tidegate is asked: waits until the test sets something else."""

    def __init__(self, *pools: PoolSignals) -> None:
        self.version = 1
        self.now = pools
        self.error = ""
        self.asked: list[int | None] = []
        self._news = asyncio.Event()

    def set(self, *pools: PoolSignals) -> None:
        self.now = pools
        self.version += 1
        self._news.set()
        self._news = asyncio.Event()

    async def fetch(self, after: int | None, wait_s: float) -> Answer:
        self.asked.append(after)
        if self.error:
            raise FetchError(self.error)
        if after == self.version:
            try:
                async with asyncio.timeout(wait_s):
                    await self._news.wait()
            except TimeoutError:
                pass
        return Answer(self.version, self.now)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0

    def __call__(self) -> float:
        return self.now_s


def make_feed(source: Source, clock: Callable[[], float], **given: Any) -> SignalFeed:
    return SignalFeed(source.fetch, clock=clock, **{"refresh_s": 0.05, "stale_s": 15.0, **given})


async def until(look: Callable[[], object], within_s: float = 30.0) -> None:
    """Until ``look`` returns something true."""
    async with asyncio.timeout(within_s):
        while not look():  # noqa: ASYNC110 -- what is looked at tells nobody
            await asyncio.sleep(0.002)


async def within(work: Awaitable[Any], within_s: float = 30.0) -> Any:
    async with asyncio.timeout(within_s):
        return await work
