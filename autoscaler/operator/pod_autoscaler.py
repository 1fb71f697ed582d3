"""Knative's PodAutoscaler of the class ``tidegate.dev``: the pool that it stands for, its
ServerlessService, and what is said back. Pure.

Knative makes a PodAutoscaler of each revision of a Service, with the annotations of the Service's
template, and leaves those of other classes to their controllers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from autoscaler.backends.kubernetes.knative import (
    PA_API,
    QUEUE_PORT,
    SERVICE_LABEL,
    read_annotation,
    read_number,
)
from autoscaler.settings import KubernetesPoolSettings, PoolSettings
from autoscaler.types import PoolReport

Object = dict[str, Any]

CLASS = "tidegate.dev"
"""Not under ``knative.dev``, whose classes are Knative's own."""
NAME_ANNOTATION = "tidegate.dev/served-name"
ENGINE_ANNOTATION = "tidegate.dev/engine"
SKS_API, SKS_KIND = "networking.internal.knative.dev/v1alpha1", "ServerlessService"
MOST_REPLICAS = 10
"""Where the PodAutoscaler has no ``max-scale``: to Knative that is without a bound."""


class InvalidPodAutoscaler(ValueError):
    """It stands for no pool; the message says why, for its status."""


def is_ours(found: Mapping[str, Any]) -> bool:
    """Whether a PodAutoscaler is of our class."""
    return read_annotation(found, "class") == CLASS and "deletionTimestamp" not in found["metadata"]


def served_name(found: Mapping[str, Any]) -> str:
    """What clients write in "model": as annotated, else the name of the Knative Service."""
    metadata = found["metadata"]
    named = (metadata.get("annotations") or {}).get(NAME_ANNOTATION)
    return str(named or (metadata.get("labels") or {}).get(SERVICE_LABEL) or metadata["name"])


def find_serving(objects: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """By each name that clients use, the key (``namespace/name``) of the PodAutoscaler whose pool
    answers to it: of those that a route reaches, or may soon, the newest; a reached one first."""
    best: dict[str, tuple[tuple[bool, str, str], str]] = {}
    for found in objects:
        reach = (found.get("spec") or {}).get("reachability")
        if reach == "Unreachable":
            continue
        metadata = found["metadata"]
        rank = (reach == "Reachable", metadata.get("creationTimestamp") or "", metadata["name"])
        name = served_name(found)
        if name not in best or rank > best[name][0]:
            best[name] = rank, f"{metadata['namespace']}/{metadata['name']}"
    return {name: key for name, (_, key) in best.items()}


def is_initialized(found: Mapping[str, Any]) -> bool:
    """Whether its pods have been ready once, as many as it is to begin with."""
    return read_condition(found.get("status"), "ScaleTargetInitialized") == "True"


def read_count(found: Mapping[str, Any], name: str, default: int) -> int:
    """A number of replicas in an annotation."""
    number = read_number(found, name)
    return default if number is None or not 0 <= number <= 10_000 else int(number)


def find_least(found: Mapping[str, Any]) -> int:
    """Fewest replicas: ``initial-scale`` until they have been ready once; none for a revision that
    no route reaches."""
    if (found.get("spec") or {}).get("reachability") == "Unreachable":
        return 0
    least = read_count(found, "min-scale", 0)
    return least if is_initialized(found) else max(least, read_count(found, "initial-scale", 1))


def to_pool(found: Mapping[str, Any], *, serves: bool) -> PoolSettings:
    """The pool that a PodAutoscaler stands for: named as its revision and, where it ``serves``, as
    clients call it. Raises ``InvalidPodAutoscaler``."""
    metadata, spec = found["metadata"], found.get("spec") or {}
    target = spec.get("scaleTargetRef") or {}
    name, least = metadata["name"], find_least(found)
    served = served_name(found)
    unreachable = spec.get("reachability") == "Unreachable"
    try:
        return PoolSettings(
            name=name,
            aliases=(served,) if serves and served != name else (),
            backend="kubernetes",
            engine=(metadata.get("annotations") or {}).get(ENGINE_ANNOTATION),
            min_replicas=least,
            max_replicas=max(1, least, read_count(found, "max-scale", 0) or MOST_REPLICAS),
            max_inflight_requests=spec.get("containerConcurrency") or None,
            idle_to_zero_s=0.0 if unreachable else None,
            kubernetes=KubernetesPoolSettings(
                namespace=metadata["namespace"],
                api_version=target.get("apiVersion", ""),
                kind=target.get("kind", ""),
                name=target.get("name"),
                port=QUEUE_PORT,
            ),
        )
    except ValidationError as error:
        parts = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
        raise InvalidPodAutoscaler("; ".join(parts)) from None


def make_serverless_service(found: Mapping[str, Any], report: PoolReport | None) -> Object:
    """What tells Knative how requests reach the revision: its pods, or at zero the activator, which
    holds requests that do not come through Tidegate."""
    metadata, spec = found["metadata"], found["spec"]
    has_pods = report is not None and report.ready > 0 and report.desired > 0
    return {
        "apiVersion": SKS_API,
        "kind": SKS_KIND,
        "metadata": {
            "name": metadata["name"],
            "namespace": metadata["namespace"],
            "labels": dict(metadata.get("labels") or {}),
            "ownerReferences": [
                {
                    "apiVersion": PA_API,
                    "kind": "PodAutoscaler",
                    "name": metadata["name"],
                    "uid": metadata["uid"],
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            "mode": "Serve" if has_pods else "Proxy",
            "objectRef": spec["scaleTargetRef"],
            "protocolType": spec.get("protocolType", "http1"),
        },
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionOutcome:
    """What became of a PodAutoscaler. ``problem`` says why it is no pool; empty where it is one.
    ``services`` is the status of its ServerlessService."""

    problem: str = ""
    report: PoolReport | None = None
    services: Mapping[str, Any] | None = None


def make_status(found: Mapping[str, Any], outcome: RevisionOutcome, now: str) -> Object:
    """The status of a PodAutoscaler. ``now`` is the time (RFC 3339) of conditions that change."""
    services, report = outcome.services or {}, outcome.report
    name = services.get("serviceName") or ""
    initialized = is_initialized(found) or (
        bool(name) and report is not None and report.ready >= find_least(found)
    )
    states = {
        "Active": find_active(found, outcome, initialized),
        "SKSReady": ("True", "", "")
        if read_condition(services, "Ready") == "True"
        else ("Unknown", "NotReady", "The ServerlessService is not ready yet."),
        "ScaleTargetInitialized": ("True", "", "")
        if initialized
        else ("Unknown", "Starting", "Its first pods are on their way."),
    }
    worst = next((one for one in states.values() if one[0] == "False"), None) or next(
        (one for one in states.values() if one[0] == "Unknown"), ("True", "", "")
    )
    before = {one["type"]: one for one in (found.get("status") or {}).get("conditions") or ()}
    conditions = []
    for kind, (state, reason, message) in sorted({**states, "Ready": worst}.items()):
        old = before.get(kind) or {}
        since = old.get("lastTransitionTime", now) if old.get("status") == state else now
        condition = {"type": kind, "status": state, "lastTransitionTime": since}
        condition |= {"reason": reason, "message": message[:1_024]} if reason else {}
        conditions.append(condition)
    status: Object = {
        "observedGeneration": found["metadata"].get("generation", 1),
        "serviceName": name,
        "metricsServiceName": services.get("privateServiceName") or "",
        "conditions": conditions,
    }
    if report is not None:
        status |= {"desiredScale": report.desired, "actualScale": report.ready}
    return status


def has_status(found: Mapping[str, Any], status: Mapping[str, Any]) -> bool:
    """Whether a PodAutoscaler says all of a status; it may say more, of when it was a pool."""
    known = found.get("status") or {}
    return all(known.get(key) == value for key, value in status.items())


def find_active(
    found: Mapping[str, Any], outcome: RevisionOutcome, initialized: bool
) -> tuple[str, str, str]:
    """Whether pods serve. Not ``False`` before they have once: to Knative the revision would have
    failed."""
    report = outcome.report
    if outcome.problem:
        return "False", "NoPool", outcome.problem
    if report is None:
        return "Unknown", "Queued", "Tidegate does not have it as a pool yet."
    if report.desired == 0 and initialized:
        return "False", "NoTraffic", "At zero; the next request starts it."
    if report.ready < max(1, find_least(found)):
        detail = next((one.phase for one in report.replicas if one.phase), "")
        return "Unknown", "Queued", report.error or detail or "Its pods are on their way."
    return "True", "", ""


def read_condition(status: Mapping[str, Any] | None, kind: str) -> str:
    """The state of a condition in a status; empty where it has none."""
    for one in (status or {}).get("conditions") or ():
        if one.get("type") == kind:
            return str(one.get("status"))
    return ""
