"""How many replicas a workload is told to have, by the lever that its kind has.

Most kinds have a ``/scale`` subresource, which takes a merge patch whatever the kind. KServe's
InferenceService and KubeRay's RayCluster and RayService have none; theirs are fields. A Service of
Knative is scaled by Knative alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from autoscaler.backends.kubernetes import knative
from autoscaler.backends.kubernetes.client import (
    KubernetesClient,
    KubernetesError,
    Object,
    resource,
)

LWS = "leaderworkerset.x-k8s.io"
LEADER = "leaderworkerset.sigs.k8s.io/worker-index=0"
"""Of the pods of a LeaderWorkerSet, which counts groups, the leader is the one that serves."""
DELETION_COST = "controller.kubernetes.io/pod-deletion-cost"
"""A ReplicaSet ends the pod with the lowest first, among those that are equally far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadRef:
    """Which workload has a pool's replicas. ``part`` is the worker group of a RayCluster or
    RayService."""

    namespace: str
    api_version: str
    kind: str
    name: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadScale:
    """What a workload is told to have; ``replicas`` is ``None`` where it has no such number.
    ``selector`` is the label selector of its pods; ``None`` where it does not say it. ``ports``
    are those of its engines in each pod, where it says so, ``revision`` how Knative scales it."""

    replicas: int | None
    selector: str | None
    ports: tuple[int, ...] = ()
    revision: knative.RevisionScaling | None = None


class Lever(Protocol):
    """Reads and sets the number of replicas of one kind of workload."""

    async def read(self, client: KubernetesClient, ref: WorkloadRef) -> WorkloadScale:
        """Its number, and how its pods are found. Raises ``KubernetesError``, with the status 404
        where there is no such workload."""
        ...

    async def write(self, client: KubernetesClient, ref: WorkloadRef, replicas: int) -> None:
        """Set its number. Raises ``KubernetesError``."""
        ...


class ScaleSubresource:
    """Any kind with ``/scale``: Deployment, StatefulSet, LeaderWorkerSet, Argo's Rollout, custom
    resources."""

    async def read(self, client: KubernetesClient, ref: WorkloadRef) -> WorkloadScale:
        """By ``GET`` of the subresource."""
        kind = resource(ref.api_version, ref.kind).Scale
        found = await client.get(kind, ref.name, ref.namespace)
        if found is None:
            raise missing(ref)
        selector = (found.get("status") or {}).get("selector") or None
        if selector is not None and ref.api_version.startswith(f"{LWS}/"):
            selector = f"{selector},{LEADER}"
        return WorkloadScale(
            replicas=(found.get("spec") or {}).get("replicas") or 0, selector=selector
        )

    async def write(self, client: KubernetesClient, ref: WorkloadRef, replicas: int) -> None:
        """By a merge patch, which every kind takes; a strategic one is refused by custom ones."""
        kind = resource(ref.api_version, ref.kind).Scale
        await client.merge(kind, ref.name, {"spec": {"replicas": replicas}}, ref.namespace)


class InferenceServiceLever:
    """KServe's InferenceService: the bounds of its predictor, which KServe's own autoscaler keeps
    to. With both equal, that has no choice."""

    async def read(self, client: KubernetesClient, ref: WorkloadRef) -> WorkloadScale:
        """``minReplicas`` of the predictor; KServe takes 1 where it is unset."""
        found = await read_object(client, ref)
        number = (found["spec"].get("predictor") or {}).get("minReplicas")
        labels = {"serving.kserve.io/inferenceservice": ref.name, "component": "predictor"}
        return WorkloadScale(
            replicas=1 if number is None else number, selector=write_selector(labels)
        )

    async def write(self, client: KubernetesClient, ref: WorkloadRef, replicas: int) -> None:
        """Both bounds; KServe refuses a ``maxReplicas`` of 0."""
        bounds = {"minReplicas": replicas, "maxReplicas": max(1, replicas)}
        kind = resource(ref.api_version, ref.kind)
        await client.merge(kind, ref.name, {"spec": {"predictor": bounds}}, ref.namespace)


class InferencePoolSelector:
    """An InferencePool of the Gateway API Inference Extension: which pods serve, at which ports. It
    has no number; the workload that made the pods is scaled."""

    async def read(self, client: KubernetesClient, ref: WorkloadRef) -> WorkloadScale:
        """Its selector and its ports; each port of a pod is an endpoint of its own."""
        spec = (await read_object(client, ref))["spec"]
        return WorkloadScale(
            replicas=None,
            selector=write_selector((spec.get("selector") or {}).get("matchLabels") or {}),
            ports=tuple(one["number"] for one in spec.get("targetPorts") or ()),
        )

    async def write(self, client: KubernetesClient, ref: WorkloadRef, replicas: int) -> None:
        """It cannot be."""
        raise KubernetesError(f"{ref} has no number of replicas; scaledBy says who scales its pods")


class KnativeServiceRevision:
    """A Service of Knative: its latest revision that is ready, which Knative scales."""

    async def read(self, client: KubernetesClient, ref: WorkloadRef) -> WorkloadScale:
        """What Knative has decided for the revision; its pods, asked through their queue-proxy,
        which counts the requests."""
        status = (await read_object(client, ref)).get("status") or {}
        name = status.get("latestReadyRevisionName") or status.get("latestCreatedRevisionName")
        if not name:
            raise KubernetesError(f"{ref} has no revision yet", 404)
        revision = replace(ref, api_version=knative.PA_API, kind="PodAutoscaler", name=name)
        found = await read_object(client, revision)
        number = (found.get("status") or {}).get("desiredScale")
        return WorkloadScale(
            replicas=None if number is None or number < 0 else number,
            selector=write_selector({knative.REVISION_LABEL: name}),
            ports=(knative.QUEUE_PORT,),
            revision=knative.read_scaling(found),
        )

    async def write(self, client: KubernetesClient, ref: WorkloadRef, replicas: int) -> None:
        """It cannot be: it is asked for ahead of demand (``stat_stream``)."""
        raise KubernetesError(f"{ref} is scaled by Knative")


class RayWorkerGroup:
    """A worker group of KubeRay's RayCluster, or of the cluster of a RayService."""

    async def read(self, client: KubernetesClient, ref: WorkloadRef) -> WorkloadScale:
        """``replicas`` of the group."""
        found = await read_object(client, ref)
        group = worker_groups(found, ref)[find_group(found, ref)]
        labels = {"ray.io/group": group["groupName"], "ray.io/node-type": "worker"}
        if ref.kind == "RayCluster":
            labels["ray.io/cluster"] = ref.name
        else:
            active = (found.get("status") or {}).get("activeServiceStatus") or {}
            labels["ray.io/cluster"] = active.get("rayClusterName", "")
        return WorkloadScale(replicas=group.get("replicas") or 0, selector=write_selector(labels))

    async def write(self, client: KubernetesClient, ref: WorkloadRef, replicas: int) -> None:
        """The group by its place in the list, as long as it is still there."""
        found = await read_object(client, ref)
        index = find_group(found, ref)
        group = worker_groups(found, ref)[index]
        path = "/spec" if ref.kind == "RayCluster" else "/spec/rayClusterConfig"
        path = f"{path}/workerGroupSpecs/{index}"
        patch = [
            {"op": "test", "path": f"{path}/groupName", "value": group["groupName"]},
            {"op": "add", "path": f"{path}/replicas", "value": replicas},
        ]
        # KubeRay itself keeps to these bounds, whatever `replicas` says.
        if replicas < (group.get("minReplicas") or 0):
            patch.append({"op": "add", "path": f"{path}/minReplicas", "value": replicas})
        if replicas > group.get("maxReplicas", replicas):
            patch.append({"op": "add", "path": f"{path}/maxReplicas", "value": replicas})
        kind = resource(ref.api_version, ref.kind)
        await client.patch(kind, ref.name, patch, ref.namespace)


_LEVERS: dict[str, Lever] = {
    "InferencePool": InferencePoolSelector(),
    "InferenceService": InferenceServiceLever(),
    "RayCluster": RayWorkerGroup(),
    "RayService": RayWorkerGroup(),
}
_SCALE, _KNATIVE_SERVICE = ScaleSubresource(), KnativeServiceRevision()


def lever_of(ref: WorkloadRef) -> Lever:
    """How a workload is scaled."""
    if ref.kind == "Service" and ref.api_version.startswith(f"{knative.SERVING}/"):
        return _KNATIVE_SERVICE
    return _LEVERS.get(ref.kind, _SCALE)


def missing(ref: WorkloadRef) -> KubernetesError:
    """There is no such workload."""
    return KubernetesError(f"there is no {ref}", 404)


async def read_object(client: KubernetesClient, ref: WorkloadRef) -> Object:
    """A workload as it is. Raises ``KubernetesError``."""
    found = await client.get(resource(ref.api_version, ref.kind), ref.name, ref.namespace)
    if found is None:
        raise missing(ref)
    return found


def worker_groups(found: Object, ref: WorkloadRef) -> Sequence[Any]:
    """The worker groups of a RayCluster or RayService."""
    spec = found["spec"]
    cluster = spec if ref.kind == "RayCluster" else spec.get("rayClusterConfig") or {}
    return cluster.get("workerGroupSpecs") or ()


def find_group(found: Object, ref: WorkloadRef) -> int:
    """The place of the worker group that is meant. Raises ``KubernetesError``."""
    names = [one.get("groupName", "") for one in worker_groups(found, ref)]
    if not ref.part and len(names) == 1:
        return 0
    if ref.part not in names:
        there = ", ".join(names) or "none"
        raise KubernetesError(f"{ref} has no worker group {ref.part!r}; its groups: {there}", 404)
    return names.index(ref.part)


def write_selector(labels: Mapping[str, str]) -> str | None:
    """The label selector of objects with all of these labels; ``None`` for none."""
    return ",".join(f"{name}={value}" for name, value in sorted(labels.items())) or None
