"""Levers of workloads: what is read, and what is written."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from autoscaler.backends.kubernetes.client import KubernetesError, pluralize
from autoscaler.backends.kubernetes.workloads import WorkloadRef, lever_of


class OneObject:
    """An API server with one object, which notes what is written."""

    def __init__(self, found: dict[str, Any] | None) -> None:
        self.found = found
        self.merged: list[Any] = []
        self.patched: list[Any] = []

    async def get(self, kind: Any, name: str, namespace: str) -> dict[str, Any] | None:
        return self.found

    async def merge(self, kind: Any, name: str, patch: Any, namespace: str) -> None:
        self.merged.append(patch)

    async def patch(self, kind: Any, name: str, patch: Any, namespace: str) -> None:
        self.patched.append(patch)


def ref(api_version: str, kind: str, part: str = "") -> WorkloadRef:
    return WorkloadRef(
        namespace="models", api_version=api_version, kind=kind, name="llama", part=part
    )


def read(workload: WorkloadRef, found: dict[str, Any] | None) -> Any:
    return asyncio.run(lever_of(workload).read(OneObject(found), workload))  # type: ignore[arg-type]


def write(workload: WorkloadRef, found: dict[str, Any], replicas: int) -> OneObject:
    server = OneObject(found)
    asyncio.run(lever_of(workload).write(server, workload, replicas))  # type: ignore[arg-type]
    return server


@pytest.mark.parametrize(
    ("kind", "plural"),
    [
        ("Deployment", "deployments"),
        ("StatefulSet", "statefulsets"),
        ("Policy", "policies"),
        ("Ingress", "ingresses"),
        ("RayCluster", "rayclusters"),
    ],
)
def test_plural(kind: str, plural: str) -> None:
    assert pluralize(kind) == plural


def test_scale_subresource() -> None:
    found = {"spec": {"replicas": 3}, "status": {"selector": "app=llama"}}
    scale = read(ref("apps/v1", "Deployment"), found)
    assert (scale.replicas, scale.selector) == (3, "app=llama")
    assert write(ref("apps/v1", "Deployment"), found, 5).merged == [{"spec": {"replicas": 5}}]
    assert read(ref("apps/v1", "Deployment"), {"spec": {}, "status": {}}).selector is None


def test_of_a_leader_worker_set_the_leaders_are_replicas() -> None:
    found = {"spec": {"replicas": 2}, "status": {"selector": "lws=llama"}}
    scale = read(ref("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"), found)
    assert scale.selector == "lws=llama,leaderworkerset.sigs.k8s.io/worker-index=0"


def test_bounds_of_an_inference_service() -> None:
    isvc = ref("serving.kserve.io/v1beta1", "InferenceService")
    assert read(isvc, {"spec": {"predictor": {}}}).replicas == 1
    assert read(isvc, {"spec": {"predictor": {"minReplicas": 0}}}).replicas == 0
    assert write(isvc, {}, 0).merged == [
        {"spec": {"predictor": {"minReplicas": 0, "maxReplicas": 1}}}
    ]


def test_an_inference_pool_names_pods_and_ports_and_has_no_number() -> None:
    pool = ref("inference.networking.k8s.io/v1", "InferencePool")
    ports = [{"number": 8000}, {"number": 8001}]
    spec = {"selector": {"matchLabels": {"app": "llama"}}, "targetPorts": ports}
    scale = read(pool, {"spec": spec})
    assert (scale.replicas, scale.selector, scale.ports) == (None, "app=llama", (8000, 8001))
    with pytest.raises(KubernetesError, match="no number of replicas"):
        write(pool, {"spec": spec}, 1)


GROUPS = [
    {"groupName": "cpu", "replicas": 1},
    {"groupName": "gpu", "replicas": 2, "minReplicas": 1, "maxReplicas": 3},
]


def test_worker_group_of_a_ray_cluster() -> None:
    cluster = ref("ray.io/v1", "RayCluster", "gpu")
    found = {"spec": {"workerGroupSpecs": GROUPS}}
    scale = read(cluster, found)
    assert scale.replicas == 2
    assert scale.selector is not None
    assert "ray.io/group=gpu" in scale.selector.split(",")
    (patch,) = write(cluster, found, 5).patched
    assert patch[0] == {"op": "test", "path": "/spec/workerGroupSpecs/1/groupName", "value": "gpu"}
    assert {one["path"].rpartition("/")[2]: one["value"] for one in patch[1:]} == {
        "replicas": 5,
        "maxReplicas": 5,
    }
    (patch,) = write(cluster, found, 0).patched
    assert patch[-1]["path"].endswith("/minReplicas")


def test_worker_group_of_a_ray_service_is_in_its_cluster() -> None:
    service = ref("ray.io/v1", "RayService", "gpu")
    found = {
        "spec": {"rayClusterConfig": {"workerGroupSpecs": GROUPS}},
        "status": {"activeServiceStatus": {"rayClusterName": "llama-1"}},
    }
    assert "ray.io/cluster=llama-1" in read(service, found).selector.split(",")
    (patch,) = write(service, found, 3).patched
    assert patch[0]["path"] == "/spec/rayClusterConfig/workerGroupSpecs/1/groupName"


def test_which_worker_group_must_be_clear() -> None:
    found = {"spec": {"workerGroupSpecs": GROUPS}}
    for part in ("", "tpu"):
        with pytest.raises(KubernetesError, match="cpu, gpu"):
            read(ref("ray.io/v1", "RayCluster", part), found)


def test_missing_workload_is_named() -> None:
    with pytest.raises(KubernetesError, match="Deployment models/llama") as caught:
        read(ref("apps/v1", "Deployment"), None)
    assert caught.value.status == 404


class ManyObjects(OneObject):
    """An API server that has one object of each of several kinds."""

    def __init__(self, **found: dict[str, Any]) -> None:
        super().__init__(None)
        self.kinds = found

    async def get(self, kind: Any, name: str, namespace: str) -> dict[str, Any] | None:
        found = self.kinds.get(kind._api_info.plural)
        return found if found is not None and found["metadata"]["name"] == name else None


def knative(status: dict[str, Any], scale: int | None = 2) -> ManyObjects:
    its = {} if scale is None else {"status": {"desiredScale": scale}}
    return ManyObjects(
        services={"metadata": {"name": "llama"}, "status": status},
        podautoscalers={"metadata": {"name": "llama-00002"}, **its},
    )


KNATIVE = ref("serving.knative.dev/v1", "Service")


@pytest.mark.parametrize(
    ("status", "scale", "number"),
    [
        ({"latestReadyRevisionName": "llama-00002", "latestCreatedRevisionName": "x"}, 2, 2),
        ({"latestCreatedRevisionName": "llama-00002"}, 0, 0),
        ({"latestReadyRevisionName": "llama-00002"}, -1, None),
        ({"latestReadyRevisionName": "llama-00002"}, None, None),
    ],
)
def test_the_latest_revision_of_a_knative_service(
    status: dict[str, Any], scale: int | None, number: int | None
) -> None:
    server: Any = knative(status, scale)
    found = asyncio.run(lever_of(KNATIVE).read(server, KNATIVE))
    assert (found.replicas, found.ports) == (number, (8012,))
    assert found.selector == "serving.knative.dev/revision=llama-00002"
    assert found.revision is not None
    assert found.revision.revision == "llama-00002"


@pytest.mark.parametrize("status", [{}, {"latestReadyRevisionName": "gone"}])
def test_a_knative_service_without_a_revision(status: dict[str, Any]) -> None:
    server: Any = knative(status)
    with pytest.raises(KubernetesError) as refused:
        asyncio.run(lever_of(KNATIVE).read(server, KNATIVE))
    assert refused.value.status == 404


def test_a_knative_service_is_scaled_by_knative() -> None:
    with pytest.raises(KubernetesError, match="scaled by Knative"):
        write(KNATIVE, {}, 1)
