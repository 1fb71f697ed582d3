"""The messages of KEDA's protocol (``externalscaler.proto``), from one table of their fields."""

from __future__ import annotations

from typing import Any

from autoscaler import protobuf
from autoscaler.protobuf import STRINGS, Fields

PACKAGE = "externalscaler"
SERVICE = f"{PACKAGE}.ExternalScaler"

FIELDS: Fields = {
    "ScaledObjectRef": {
        "name": ("string", 1),
        "namespace": ("string", 2),
        "scalerMetadata": (STRINGS, 3),
    },
    "IsActiveResponse": {"result": ("bool", 1)},
    "MetricSpec": {
        "metricName": ("string", 1),
        "targetSize": ("int64", 2),
        "targetSizeFloat": ("double", 3),
    },
    "GetMetricSpecResponse": {"metricSpecs": ("repeated MetricSpec", 1)},
    "GetMetricsRequest": {
        "scaledObjectRef": ("ScaledObjectRef", 1),
        "metricName": ("string", 2),
    },
    "MetricValue": {
        "metricName": ("string", 1),
        "metricValue": ("int64", 2),
        "metricValueFloat": ("double", 3),
    },
    "GetMetricsResponse": {"metricValues": ("repeated MetricValue", 1)},
}


def make_messages() -> dict[str, Any]:
    """The classes, by name."""
    return protobuf.make_messages(PACKAGE, FIELDS)
