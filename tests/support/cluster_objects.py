"""Objects that tests create in a cluster."""

from __future__ import annotations

from typing import Any

from control_plane import ControlPlane, create_missing, wait
from lightkube import Client
from lightkube.codecs import from_dict
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.apps_v1 import DeploymentSpec
from lightkube.models.core_v1 import (
    Container,
    ContainerPort,
    HTTPGetAction,
    PodSpec,
    PodTemplateSpec,
    Probe,
    ResourceRequirements,
    ServicePort,
    ServiceSpec,
)
from lightkube.models.meta_v1 import LabelSelector, ObjectMeta
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Pod, Service
from lightkube.resources.discovery_v1 import EndpointSlice
from lightkube.types import PatchType

PORT = 8000
GPU = "nvidia.com/gpu"


def pod_template(
    name: str, *, inits: int = 0, probe: bool = False, gpus: int = 0, grace_s: int | None = None
) -> PodTemplateSpec:
    """Pods of one container that serves HTTP, behind so many init containers."""
    readiness = Probe(httpGet=HTTPGetAction(path="/health", port=PORT)) if probe else None
    container = Container(
        name="engine",
        image="engine:1",
        ports=[ContainerPort(PORT)],
        readinessProbe=readiness,
        resources=ResourceRequirements(limits={GPU: str(gpus)}) if gpus else None,
    )
    first = [Container(name=f"init-{number}", image="init:1") for number in range(inits)]
    return PodTemplateSpec(
        metadata=ObjectMeta(labels={"app": name}),
        spec=PodSpec(
            containers=[container],
            initContainers=first or None,
            terminationGracePeriodSeconds=grace_s,
        ),
    )


def deployment(
    name: str,
    namespace: str,
    *,
    replicas: int = 1,
    labels: dict[str, str] | None = None,
    **template: Any,
) -> Deployment:
    """A Deployment of such pods. ``labels`` are its own."""
    return Deployment(
        metadata=ObjectMeta(name=name, namespace=namespace, labels=labels),
        spec=DeploymentSpec(
            replicas=replicas,
            selector=LabelSelector(matchLabels={"app": name}),
            template=pod_template(name, **template),
        ),
    )


def service(name: str, namespace: str, *, labels: dict[str, str] | None = None) -> Service:
    """A Service of the pods that have this label. ``labels`` are its own."""
    return Service(
        metadata=ObjectMeta(name=name, namespace=namespace, labels=labels),
        spec=ServiceSpec(selector={"app": name}, ports=[ServicePort(port=PORT)]),
    )


def scale(client: Client, name: str, namespace: str, replicas: int) -> None:
    """Scale a Deployment as everything that scales does: by /scale."""
    body = {"spec": {"replicas": replicas}}
    client.patch(Deployment.Scale, name, body, namespace=namespace, patch_type=PatchType.MERGE)


def ready_replicas(client: Client, name: str, namespace: str) -> int:
    """Of a Deployment, by its status; -1 while that is about another number of replicas."""
    found = client.get(Deployment, name, namespace=namespace)
    status = found.status
    if status is None or (status.replicas or 0) != found.spec.replicas:
        return -1
    return status.readyReplicas or 0


def pods(client: Client, name: str, namespace: str) -> list[Pod]:
    """The pods that have this label."""
    return list(client.list(Pod, namespace=namespace, labels={"app": name}))


def define(plane: ControlPlane, group: str, version: str, kind: str) -> Any:
    """A kind that others define, with any fields and a status, as a class of lightkube."""
    plural, anything = f"{kind.lower()}s", {"x-kubernetes-preserve-unknown-fields": True}
    definition = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{plural}.{group}",
            "annotations": {"api-approved.kubernetes.io": "unapproved, a test's own"},
        },
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
            },
            "versions": [
                {
                    "name": version,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": {"type": "object", **anything}},
                    "subresources": {"status": {}},
                }
            ],
        },
    }
    with plane.client() as client, plane.http() as http:
        create_missing(client, from_dict(definition))
        path = f"/apis/{group}/{version}/{plural}"
        wait(f"{kind}s", lambda: http.get(path).status_code == 200)
    return create_namespaced_resource(group, version, kind, plural)


def set_status(client: Client, kind: Any, name: str, namespace: str, **status: Any) -> None:
    """Write fields of an object's status."""
    client.patch(
        kind.Status, name, {"status": status}, namespace=namespace, patch_type=PatchType.MERGE
    )


def slice_kind(plane: ControlPlane) -> Any:
    """EndpointSlice, as this control plane serves it."""
    if plane.version >= (1, 21):
        return EndpointSlice
    return create_namespaced_resource(
        "discovery.k8s.io", "v1beta1", "EndpointSlice", "endpointslices"
    )


def ready_addresses(plane: ControlPlane, client: Client, name: str, namespace: str) -> set[str]:
    """What the EndpointSlices of a Service say is ready."""
    labels = {"kubernetes.io/service-name": name}
    found = set()
    for one in client.list(slice_kind(plane), namespace=namespace, labels=labels):
        for endpoint in one.to_dict().get("endpoints") or []:
            if endpoint["conditions"].get("ready"):
                found |= set(endpoint["addresses"])
    return found


def autoscaler_kind(plane: ControlPlane) -> Any:
    """HorizontalPodAutoscaler, in the newest version that this control plane serves."""
    version = "v2" if plane.version >= (1, 23) else "v2beta2"
    return create_namespaced_resource(
        "autoscaling", version, "HorizontalPodAutoscaler", "horizontalpodautoscalers"
    )


def autoscaler(
    plane: ControlPlane,
    name: str,
    namespace: str,
    metric: dict[str, Any],
    *,
    lowest: int = 1,
    highest: int = 5,
    delay_s: int = 0,
) -> Any:
    """A stock HorizontalPodAutoscaler of a Deployment, which scales down after ``delay_s``."""
    return autoscaler_kind(plane)(
        metadata=ObjectMeta(name=name, namespace=namespace),
        spec={
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": name},
            "minReplicas": lowest,
            "maxReplicas": highest,
            "metrics": [metric],
            "behavior": {"scaleDown": {"stabilizationWindowSeconds": delay_s}},
        },
    )


def external_metric(name: str, average: int, **labels: str) -> dict[str, Any]:
    """Of this much to a replica; the series with these labels."""
    target = {"type": "AverageValue", "averageValue": str(average)}
    metric = named_metric(name, labels)
    return {"type": "External", "external": {"metric": metric, "target": target}}


def service_metric(service_name: str, name: str, average: int, **labels: str) -> dict[str, Any]:
    """A custom metric of a Service, of this much to a replica."""
    described = {"apiVersion": "v1", "kind": "Service", "name": service_name}
    return object_metric(described, name, average, **labels)


def deployment_metric(deployment_name: str, name: str, average: int, **labels: str) -> Any:
    """A custom metric of a Deployment, of this much to a replica."""
    described = {"apiVersion": "apps/v1", "kind": "Deployment", "name": deployment_name}
    return object_metric(described, name, average, **labels)


def namespace_metric(namespace: str, name: str, average: int, **labels: str) -> Any:
    """A custom metric of a namespace, of this much to a replica."""
    described = {"apiVersion": "v1", "kind": "Namespace", "name": namespace}
    return object_metric(described, name, average, **labels)


def object_metric(
    described: dict[str, str], name: str, average: int, **labels: str
) -> dict[str, Any]:
    """A custom metric of an object."""
    target = {"type": "AverageValue", "averageValue": str(average)}
    metric = named_metric(name, labels)
    found = {"metric": metric, "target": target, "describedObject": described}
    return {"type": "Object", "object": found}


def pods_metric(name: str, average: int) -> dict[str, Any]:
    """A custom metric of pods, of this much to each."""
    target = {"type": "AverageValue", "averageValue": str(average)}
    return {"type": "Pods", "pods": {"metric": {"name": name}, "target": target}}


def named_metric(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """A metric by its name, and the labels of its series."""
    return {"name": name, "selector": {"matchLabels": labels}} if labels else {"name": name}
