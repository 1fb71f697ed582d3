"""Which pools of a cluster may be beside each other."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.backends.kubernetes.workloads import WorkloadRef
from autoscaler.settings import PoolSettings
from gateway.compose.kubernetes import find_second_writers


def pool(name: str, workload: str = "llama", **kubernetes: Any) -> PoolSettings:
    given = {"name": workload, **kubernetes}
    return PoolSettings.model_validate({"name": name, "backend": "kubernetes", "kubernetes": given})


def ref(pool: PoolSettings) -> WorkloadRef:
    given = pool.kubernetes
    return WorkloadRef(
        namespace=given.namespace or "models",
        api_version=given.api_version,
        kind=given.kind,
        name=given.name or "",
        part=given.worker_group,
    )


KEDA = {"scaled_by": "keda"}
HPA_AND_ZERO = {"scaled_by": "hpa"}


@pytest.mark.parametrize(
    ("pools", "refused"),
    [
        ([pool("a"), pool("b", "other")], set()),
        ([pool("a"), pool("b")], {"b"}),
        ([pool("a"), pool("b", namespace="models")], {"b"}),
        ([pool("a"), pool("b", namespace="others")], set()),
        ([pool("a"), pool("b", **HPA_AND_ZERO)], {"b"}),
        ([pool("a", **KEDA), pool("b", **KEDA)], set()),
        ([pool("a", **KEDA), pool("b"), pool("c")], {"c"}),
        ([pool("a", worker_group="x"), pool("b", worker_group="y")], set()),
    ],
)
def test_a_workload_has_one_writer(pools: list[PoolSettings], refused: set[str]) -> None:
    assert set(find_second_writers(pools, [], ref)) == refused
    assert set(find_second_writers(pools[1:], pools[:1], ref)) == refused
