"""What is remembered of a cluster's workloads."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from autoscaler.backends.kubernetes import cluster as module
from autoscaler.backends.kubernetes.client import KubernetesError
from autoscaler.backends.kubernetes.cluster import LABELS_S, Cluster
from autoscaler.settings import PoolSettings


class OneWorkload:
    """An API server with a Deployment of any name. ``error`` is what reading it gives; its
    ``/scale`` can be read all the same."""

    def __init__(self) -> None:
        self.labels: dict[str, str] | None = {"app": "llama"}
        self.error: KubernetesError | None = None
        self.reads = 0

    async def get(self, kind: Any, name: str, namespace: str) -> dict[str, Any]:
        if kind._api_info.action == "scale":
            return {"spec": {"replicas": 1}, "status": {"selector": "app=llama"}}
        self.reads += 1
        if self.error is not None:
            raise self.error
        return {"metadata": {"name": name, "labels": self.labels}, "spec": {}}


def pool(name: str = "llama") -> PoolSettings:
    given = {"name": name, "backend": "kubernetes", "kubernetes": {"name": name}}
    return PoolSettings.model_validate(given)


def make(api: OneWorkload) -> tuple[Cluster, list[float]]:
    now_s = [100.0]
    cluster = Cluster(lambda: api, namespace="models", clock=lambda: now_s[0])  # type: ignore[arg-type, return-value]
    return cluster, now_s


def labels(cluster: Cluster, name: str = "llama") -> Any:
    return cluster.workload_labels(cluster.ref(pool(name)))


def test_a_workload_s_labels_are_read_once_in_a_minute() -> None:
    api = OneWorkload()
    cluster, now_s = make(api)
    assert labels(cluster) is None

    async def read() -> None:
        await cluster.read_scale(pool())

    asyncio.run(read())
    assert labels(cluster) == {"app": "llama"}
    api.labels = None
    now_s[0] += LABELS_S - 1
    asyncio.run(read())
    assert (labels(cluster), api.reads) == ({"app": "llama"}, 1)
    now_s[0] += 1
    asyncio.run(read())
    assert (labels(cluster), api.reads) == ({}, 2)


@pytest.mark.parametrize(
    ("status", "kept"), [(403, False), (404, False), (None, True), (503, True)]
)
def test_labels_that_may_not_be_read_are_unknown_and_scaling_goes_on(
    status: int | None, kept: bool
) -> None:
    api = OneWorkload()
    cluster, now_s = make(api)
    asyncio.run(cluster.read_scale(pool()))
    api.error = KubernetesError("no", status)
    now_s[0] += LABELS_S
    scale = asyncio.run(cluster.read_scale(pool()))
    assert scale.replicas == 1
    assert labels(cluster) == ({"app": "llama"} if kept else None)


def test_what_is_remembered_of_workloads_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WORKLOADS", 2)
    cluster, _ = make(OneWorkload())

    async def read() -> None:
        for name in ("a", "b", "a", "c"):
            await cluster.read_scale(pool(name))

    asyncio.run(read())
    assert [labels(cluster, name) is not None for name in "abc"] == [True, False, True]
    assert [cluster.scale(pool(name)) is not None for name in "abc"] == [True, False, True]
