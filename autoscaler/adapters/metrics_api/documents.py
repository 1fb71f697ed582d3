"""The JSON of the metrics APIs: lists of values, errors, discovery. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoscaler.adapters.metrics_api.paths import (
    CUSTOM,
    CustomQuery,
    ExternalQuery,
    NamespaceQuery,
)
from autoscaler.adapters.metrics_api.quantity import to_quantity
from autoscaler.adapters.series import METRICS, PublishedSeries
from autoscaler.adapters.types import KubernetesObject

Json = dict[str, Any]

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    405: "MethodNotAllowed",
    500: "InternalError",
    503: "ServiceUnavailable",
}
KINDS = {
    ("", "pods"): ("v1", "Pod"),
    ("", "services"): ("v1", "Service"),
    ("", "namespaces"): ("v1", "Namespace"),
    ("apps", "deployments"): ("apps/v1", "Deployment"),
    ("apps", "statefulsets"): ("apps/v1", "StatefulSet"),
    ("apps", "replicasets"): ("apps/v1", "ReplicaSet"),
    ("leaderworkerset.x-k8s.io", "leaderworkersets"): (
        "leaderworkerset.x-k8s.io/v1",
        "LeaderWorkerSet",
    ),
}
"""API version and kind of resources that are well known."""
RESOURCES = ("pods", "services", "deployments.apps", "statefulsets.apps")
"""Resources that discovery names; metrics of any other that a pool has are answered too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectValue:
    """A series of one object."""

    object: KubernetesObject
    series: PublishedSeries


def status(code: int, message: str) -> Json:
    """An error."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": REASONS[code],
        "code": code,
    }


def external_list(query: ExternalQuery, found: Iterable[PublishedSeries], at: str) -> Json:
    """Values of an external metric; ``at`` is their time. All of them must be known."""
    items = []
    for one in found:
        item: Json = {
            "metricName": query.metric,
            "metricLabels": dict(one.labels),
            "timestamp": at,
            "value": _quantity(one),
        }
        if one.window_s is not None:
            item["window"] = round(one.window_s)
        items.append(item)
    return {
        "kind": "ExternalMetricValueList",
        "apiVersion": f"external.metrics.k8s.io/{query.version}",
        "metadata": {},
        "items": items,
    }


def custom_list(query: CustomQuery | NamespaceQuery, found: Iterable[ObjectValue], at: str) -> Json:
    """Values of a metric of objects. ``v1beta1`` and ``v1beta2`` have them in different forms."""
    selector = _selector_field(query.metric_selector)
    items = []
    for one in found:
        item: Json = {"describedObject": _reference(one.object)}
        window = one.series.window_s
        if query.version == "v1beta1":
            item |= {"metricName": query.metric, "timestamp": at}
            item |= {} if window is None else {"window": round(window)}
            item |= {"value": _quantity(one.series), "selector": selector}
        else:
            item |= {"metric": {"name": query.metric, "selector": selector}, "timestamp": at}
            item |= {} if window is None else {"windowSeconds": round(window)}
            item |= {"value": _quantity(one.series)}
        items.append(item)
    return {
        "kind": "MetricValueList",
        "apiVersion": f"{CUSTOM}/{query.version}",
        "metadata": {},
        "items": items,
    }


def _quantity(series: PublishedSeries) -> str:
    if series.value is None:
        raise ValueError(f"{series.metric.name} is not known")
    return to_quantity(series.value)


def _reference(found: KubernetesObject) -> Json:
    given: Json = {"namespace": found.namespace} if found.namespace else {}
    given["name"] = found.name
    known = KINDS.get((found.group, found.resource))
    if known is not None:
        given["apiVersion"], given["kind"] = known
    return given


def _selector_field(text: str) -> Json | None:
    """The metric's selector as it is repeated in an answer; of plain equalities only."""
    pairs = [part.partition("=") for part in text.split(",") if part]
    plain = all(sep and "=" not in value and key[-1:].isalnum() for key, sep, value in pairs)
    return {"matchLabels": {key: value for key, _, value in pairs}} if pairs and plain else None


def group_list(groups: Mapping[str, Sequence[str]]) -> Json:
    """``/apis``."""
    return {
        "kind": "APIGroupList",
        "apiVersion": "v1",
        "groups": [_group(name, versions) for name, versions in groups.items()],
    }


def group(name: str, versions: Sequence[str]) -> Json:
    """``/apis/GROUP``."""
    return {"kind": "APIGroup", "apiVersion": "v1", **_group(name, versions)}


def _group(name: str, versions: Sequence[str]) -> Json:
    listed = [{"groupVersion": f"{name}/{one}", "version": one} for one in versions]
    return {"name": name, "versions": listed, "preferredVersion": listed[0]}


def resource_list(group_name: str, version: str) -> Json:
    """``/apis/GROUP/VERSION``: the same whatever is known of the pools."""
    kind, names, whole = "ExternalMetricValueList", list(METRICS), set[str]()
    if group_name == CUSTOM:
        kind, names = "MetricValueList", []
        for one in METRICS.values():
            names += [
                f"{resource}/{one.name}"
                for resource in RESOURCES
                if (one.of_replica if resource == "pods" else one.of_pool) is not None
            ]
        whole = {f"namespaces/{one.name}" for one in METRICS.values() if one.is_additive}
    return {
        "kind": "APIResourceList",
        "apiVersion": "v1",
        "groupVersion": f"{group_name}/{version}",
        "resources": [
            {
                "name": name,
                "singularName": "",
                "namespaced": name not in whole,
                "kind": kind,
                "verbs": ["get"],
            }
            for name in (*names, *sorted(whole))
        ],
    }


def openapi_v2() -> Json:
    """``/openapi/v2``: that there are no types beyond those of Kubernetes."""
    return {
        "swagger": "2.0",
        "info": {"title": "Tidegate metrics adapter", "version": "v1"},
        "paths": {},
        "definitions": {},
    }


def openapi_v3() -> Json:
    """``/openapi/v3``: the same."""
    return {"paths": {}}
