"""Knative's scaling of a revision, read from its PodAutoscaler: pure.

The KPA, Knative's own autoscaler, counts the requests at the revision's pods and has as many pods
as ``ceil(average / target)``. Load that is reported beside that of the pods makes it have more,
ahead of demand: ``find_extra_load`` says how much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

SERVING = "serving.knative.dev"
PA_API = "autoscaling.internal.knative.dev/v1alpha1"
KPA = "kpa.autoscaling.knative.dev"
REVISION_LABEL = f"{SERVING}/revision"
SERVICE_LABEL = f"{SERVING}/service"
QUEUE_PORT = 8012
"""Of the queue-proxy in each pod, which counts the requests that it passes on."""
UNCOUNTED = {"K-Kubelet-Probe": "tidegate"}
"""Headers by which the queue-proxy passes a request on without counting it. Health checks and
scrapes that it counts would keep a revision from ever going to zero."""

ANNOTATIONS = "autoscaling.knative.dev/"
DEFAULT_CONCURRENCY, DEFAULT_RPS = 100.0, 200.0
DEFAULT_UTILIZATION = 0.7
LEAST_TARGET = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionScaling:
    """How Knative scales a revision, whose name is also its PodAutoscaler's.

    ``target`` is what one pod carries of ``metric``; ``None`` where the KPA does not scale it.
    """

    revision: str
    metric: str = "concurrency"
    target: float | None = None


def read_scaling(found: Mapping[str, Any]) -> RevisionScaling:
    """From a PodAutoscaler. What it does not say is as Knative's configuration is delivered."""
    revision = found["metadata"]["name"]
    if read_annotation(found, "class", KPA) != KPA:
        return RevisionScaling(revision=revision)
    metric = read_annotation(found, "metric", "concurrency")
    limit = float((found.get("spec") or {}).get("containerConcurrency") or 0)
    total = DEFAULT_RPS if metric == "rps" else limit or DEFAULT_CONCURRENCY
    told = read_number(found, "target")
    if told is not None:
        total = min(told, limit) if limit and metric != "rps" else told
    percent = read_number(found, "target-utilization-percentage")
    fraction = DEFAULT_UTILIZATION if percent is None else percent / 100
    return RevisionScaling(
        revision=revision, metric=metric, target=max(LEAST_TARGET, total * fraction)
    )


def read_annotation(found: Mapping[str, Any], name: str, default: str = "") -> str:
    """An annotation of Knative's autoscaling, in either of its spellings."""
    given = found["metadata"].get("annotations") or {}
    first, *rest = name.split("-")
    camel = first + "".join(part.capitalize() for part in rest)
    for one in (name, camel):
        if f"{ANNOTATIONS}{one}" in given:
            return str(given[f"{ANNOTATIONS}{one}"])
    return default


def read_number(found: Mapping[str, Any], name: str) -> float | None:
    """An annotation that is a number; ``None`` where there is none, or it is none."""
    try:
        return float(read_annotation(found, name))
    except ValueError:
        return None


def find_extra_load(scaling: RevisionScaling, replicas: int, seen: float | None) -> float | None:
    """What to report, beside the load that pods report themselves (``seen``), so that the KPA has
    ``replicas``; 0 where that is enough, ``None`` where it is not known.

    The load aimed at is between those of one pod less and of this number, halfway: a report that
    comes early or late does not change the number.
    """
    if scaling.target is None or seen is None:
        return None
    return max(0.0, (replicas - 0.5) * scaling.target - seen) if replicas > 0 else 0.0
