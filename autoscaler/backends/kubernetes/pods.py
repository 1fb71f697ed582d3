"""What a pod is at, read from the objects of the API: pure.

The phases are the warmth of a start: scheduled, image pulled, init containers done, the engine
loading, ready.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from autoscaler.backends.kubernetes.client import Object

ENGINE_PORT = 8000
"""Where vLLM listens, if it is not told otherwise."""
SERVICE_LABEL = "kubernetes.io/service-name"
MANAGER_LABEL = "endpointslice.kubernetes.io/managed-by"
SLICE_LABELS = {SERVICE_LABEL, MANAGER_LABEL, "service.kubernetes.io/headless"}
"""What an EndpointSlice has beside the labels of its Service."""
SLICE_MANAGER = "endpointslice-controller.k8s.io"
CRASH_LOOP = "CrashLoopBackOff"
POD_FIELDS = ("name", "namespace", "labels", "creationTimestamp", "deletionTimestamp", "uid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Pod:
    """A pod as a replica's place.

    ``address`` is its IP, once it has one. ``ready`` is Kubernetes' own condition. ``terminating``:
    it has been deleted, or has ended, and serves what it has. ``phase`` says what it is at on its
    way, ``cause`` why it does not get further; both in a line. ``node`` is empty until it is
    scheduled. ``ordinal`` is its place in a StatefulSet, where the highest ends first. ``url`` is
    where its engine is asked, known once it has been placed (``place``). ``restarts``: how often
    Kubernetes has started its containers again. ``failed_starts``: how often one has ended that is
    in a crash loop, else 0. ``start_s``: from when it was asked for until it was ready, of one that
    is and whose containers were not started again.
    """

    name: str
    created: str
    address: str | None = None
    ready: bool = False
    terminating: bool = False
    phase: str = ""
    cause: str = ""
    node: str = ""
    ordinal: int | None = None
    url: str | None = None
    restarts: int = 0
    failed_starts: int = 0
    start_s: float | None = None


def keep_pod(found: Object) -> Object:
    """What is kept of a pod: some hundred bytes of several thousand."""
    metadata, spec, status = found["metadata"], found.get("spec", {}), found.get("status", {})
    return {
        "metadata": {name: metadata[name] for name in POD_FIELDS if name in metadata},
        "spec": {
            "nodeName": spec.get("nodeName", ""),
            "schedulingGates": spec.get("schedulingGates", ()),
            "initContainers": [
                {"name": name, "restartPolicy": "Always"} for name in sorted(sidecars(spec))
            ],
        },
        "status": {
            "phase": status.get("phase", ""),
            "reason": status.get("reason", ""),
            "podIP": status.get("podIP", ""),
            "conditions": status.get("conditions") or (),
            "initContainerStatuses": status.get("initContainerStatuses") or (),
            "containerStatuses": status.get("containerStatuses") or (),
        },
    }


def keep_slice(found: Object) -> Object:
    """What is kept of an EndpointSlice."""
    metadata = found["metadata"]
    return {
        "metadata": {name: metadata[name] for name in POD_FIELDS if name in metadata},
        "addressType": found.get("addressType", ""),
        "endpoints": found.get("endpoints") or (),
        "ports": found.get("ports") or (),
    }


def read_pod(found: Object) -> Pod:
    """A pod from its object, or from what ``keep_pod`` has kept of it."""
    metadata, spec, status = found["metadata"], found["spec"], found["status"]
    phase, cause = describe_phase(spec, status)
    name = metadata["name"]
    labels = metadata.get("labels") or {}
    ordinal = labels.get("apps.kubernetes.io/pod-index") or (
        name.rpartition("-")[2] if "statefulset.kubernetes.io/pod-name" in labels else None
    )
    ended = status.get("phase") in {"Failed", "Succeeded"}
    containers = status.get("containerStatuses") or ()
    restarts = sum(one.get("restartCount", 0) for one in containers)
    return Pod(
        name=name,
        created=metadata.get("creationTimestamp", ""),
        address=status.get("podIP") or None,
        ready=condition(status, "Ready") == "True" and not ended,
        terminating="deletionTimestamp" in metadata or ended,
        phase=phase,
        cause=cause,
        restarts=restarts,
        failed_starts=max(map(count_failed_starts, containers), default=0),
        node=spec.get("nodeName", ""),
        ordinal=int(ordinal) if ordinal is not None and ordinal.isdecimal() else None,
        start_s=None if restarts else find_start_s(metadata, status),
    )


def find_condition(status: Object, kind: str) -> Object:
    """One of a pod's conditions; empty where it has none of this type."""
    found = (one for one in status.get("conditions") or () if one.get("type") == kind)
    return next(found, {})


def condition(status: Object, kind: str) -> str | None:
    """The state of one of a pod's conditions: ``True``, ``False``, ``Unknown``, or ``None``."""
    found = find_condition(status, kind)
    return str(found.get("status")) if found else None


def find_start_s(metadata: Object, status: Object) -> float | None:
    """How long a pod took from its creation until it was ready, the last time that it became so;
    ``None`` of one that is not."""
    ready = find_condition(status, "Ready")
    try:
        created = datetime.fromisoformat(metadata["creationTimestamp"])
        since = datetime.fromisoformat(ready["lastTransitionTime"])
        return max(0.0, (since - created).total_seconds()) if ready["status"] == "True" else None
    except (KeyError, TypeError, ValueError):
        return None


def describe_phase(spec: Object, status: Object) -> tuple[str, str]:
    """What a pod is at on its way to ready, and why it gets no further."""
    if gates := spec.get("schedulingGates"):
        names = ", ".join(gate.get("name", "") for gate in gates)
        return f"waits for admission ({names})", ""
    if status.get("phase") in {"Failed", "Succeeded"}:
        why = status.get("reason") or failure(status.get("containerStatuses") or ())
        return "ended", f"the pod has ended: {why}" if why else "the pod has ended"
    if not spec.get("nodeName"):
        for one in status.get("conditions") or ():
            if one.get("type") == "PodScheduled" and one.get("status") == "False":
                return "waits for a node", one.get("message") or one.get("reason") or ""
        return "waits for a node", ""
    inits = status.get("initContainerStatuses") or ()
    beside = sidecars(spec)
    for one in inits:
        has_started = one.get("name") in beside and one.get("started")
        if not has_started and not (one.get("state") or {}).get("terminated"):
            return describe_container(one, f"init container {one.get('name', '')}")
    for one in status.get("containerStatuses") or ():
        state = one.get("state") or {}
        if "running" not in state:
            return describe_container(one, f"container {one.get('name', '')}")
    if not status.get("containerStatuses"):
        return "its node prepares it", ""
    return ("", "") if condition(status, "Ready") == "True" else ("loading", "")


def sidecars(spec: Object) -> set[str]:
    """The init containers that stay beside the others: these wait only for their start."""
    inits = spec.get("initContainers") or ()
    return {one["name"] for one in inits if one.get("restartPolicy") == "Always"}


def describe_container(one: Object, name: str) -> tuple[str, str]:
    """What a container that does not run (or that others wait for) is at."""
    state = one.get("state") or {}
    waiting, ended = state.get("waiting"), state.get("terminated")
    if waiting is not None:
        reason = waiting.get("reason", "")
        if reason in {"", "ContainerCreating", "PodInitializing"}:
            return "pulls its image", ""
        last = failure([one])
        # Of a crash loop the message says which pod, and how long Kubernetes waits.
        text = reason if reason == CRASH_LOOP else waiting.get("message") or reason
        return reason, f"{name}: {text}" + (f" (it ended before: {last})" if last else "")
    if ended is not None:
        return "ended", f"{name}: {failure([one])}"
    return f"runs {name}", ""


def count_failed_starts(one: Object) -> int:
    """How often a container in a crash loop has ended; 0 for others."""
    waiting = (one.get("state") or {}).get("waiting") or {}
    return one.get("restartCount", 0) + 1 if waiting.get("reason") == CRASH_LOOP else 0


def failure(statuses: Iterable[Object]) -> str:
    """How a container ended last, in a few words."""
    for one in statuses:
        for state in (one.get("state") or {}, one.get("lastState") or {}):
            ended: Any = state.get("terminated")
            if ended and (ended.get("exitCode") or ended.get("reason") not in {None, "Completed"}):
                return f"{ended.get('reason', 'Error')}, exit code {ended.get('exitCode')}"
    return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceEndpoint:
    """One address of a Service. ``pod`` is empty where no pod stands behind it."""

    address: str
    port: int
    pod: str
    ready: bool


def read_endpoints(slices: Iterable[Object], port: str | int | None) -> list[ServiceEndpoint]:
    """The addresses in the EndpointSlices of a Service. ``port`` is the name or the number of the
    one that is meant; unset: the only one, else that named ``http``.

    An endpoint may be in two slices for a moment; a terminating one is not ready. Of a pod with
    addresses of both families (a dual-stack Service has slices for each) the one of IPv4 is kept.
    """
    found: dict[tuple[str, int], ServiceEndpoint] = {}
    # What comes later takes the place of what came before.
    for one in sorted(slices, key=lambda one: one.get("addressType") != "IPv6"):
        number = choose_port(one.get("ports") or (), port)
        if number is None:
            continue
        for each in one.get("endpoints") or ():
            conditions = each.get("conditions") or {}
            # Unset is ready, by the API.
            ready = conditions.get("ready") is not False
            target = each.get("targetRef") or {}
            pod = target.get("name", "") if target.get("kind") == "Pod" else ""
            for address in (each.get("addresses") or ())[:1]:
                found[pod or address, number] = ServiceEndpoint(
                    address=address,
                    port=number,
                    pod=pod,
                    ready=ready and not conditions.get("terminating", False),
                )
    return list(found.values())


def read_service_labels(slices: Iterable[Object]) -> dict[str, dict[str, str]]:
    """The labels of Services, by their names: Kubernetes' own EndpointSlices have them too. Those
    of others (mirrored Endpoints, meshes) are not looked at."""
    found: dict[str, dict[str, str]] = {}
    for one in slices:
        labels = one["metadata"].get("labels") or {}
        if labels.get(MANAGER_LABEL) == SLICE_MANAGER and SERVICE_LABEL in labels:
            found[labels[SERVICE_LABEL]] = {
                name: value for name, value in labels.items() if name not in SLICE_LABELS
            }
    return found


def place(
    pods: Iterable[Pod],
    endpoints: Iterable[ServiceEndpoint] | None,
    port: str | int | None,
    url: str | None,
) -> list[Pod]:
    """The pods with the addresses of their engines: by the ``endpoints`` of the pool's Service,
    where it has one, which then says which of them are ready; else their own; or the one ``url``
    that all have. A pod that has an address and is none of the Service's is no replica (the workers
    of a group)."""
    if endpoints is None:
        own = port if isinstance(port, int) else ENGINE_PORT
        return [
            replace(pod, url=url or (pod.address and make_url(pod.address, own))) for pod in pods
        ]
    named = {one.pod: one for one in endpoints if one.pod}
    placed = []
    for pod in pods:
        its = named.get(pod.name)
        if its is not None:
            address = url or make_url(its.address, its.port)
            placed.append(replace(pod, url=address, ready=its.ready))
        elif not pod.ready:
            placed.append(replace(pod, url=None))
    return placed


def choose_port(ports: Sequence[Object], wanted: str | int | None) -> int | None:
    """The number of the port that is meant; ``None`` where it is not there, or not clear which."""
    if wanted is None:
        named = [one for one in ports if one.get("name") == "http"]
        ports = named or (ports if len(ports) == 1 else ())
    elif isinstance(wanted, int):
        return wanted
    else:
        ports = [one for one in ports if one.get("name") == wanted]
    number = ports[0].get("port") if ports else None
    return number if isinstance(number, int) else None


def make_url(address: str, port: int) -> str:
    """The address of a server, IPv4 or IPv6."""
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"
