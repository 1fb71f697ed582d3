"""The workload that is made of a ModelPool's template: pure.

Tidegate applies it server-side, so it owns exactly these fields. The number of replicas is not
among them: that is set by /scale, as for a workload that exists.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from autoscaler.operator.model_pool import (
    API_VERSION,
    KIND,
    ModelPoolSpec,
    Template,
    api_version_of,
)
from autoscaler.operator.node_cache import (
    DIGEST,
    LINK,
    NodeCacheAccess,
    digest_of_spec,
    mount_cache,
)
from loaders.engines.base import EngineOptions, engine_of
from modelcache.refs import parse_ref

Object = dict[str, Any]

POOL_LABEL = "tidegate.dev/pool"
MANAGED = {"app.kubernetes.io/managed-by": "tidegate"}
QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
DRAIN_S = 60
"""Seconds that the pods of a template have to finish their answers, where it does not say."""
READY_PERIOD_S = 2
PREFER_WEIGHT = 50
SHARED_MEMORY = "/dev/shm"
MEMORY_VOLUME = "tidegate-shared-memory"


def make_workload(
    found: Mapping[str, Any],
    spec: ModelPoolSpec,
    *,
    node_label: str = "",
    access: NodeCacheAccess | None = None,
) -> Object:
    """The workload of a ModelPool with a template. ``node_label`` is the label of the nodes that
    have its model; empty where none is preferred. ``access``: its engines start from their node's
    cache."""
    template = spec.template
    if template is None:
        raise ValueError("a ModelPool with a targetRef has its workload")
    metadata = found["metadata"]
    name = metadata["name"]
    labels = {
        "app.kubernetes.io/name": name,
        **MANAGED,
        POOL_LABEL: name,
    }
    queue = {QUEUE_LABEL: spec.queue_name} if spec.queue_name else {}
    pod = make_pod_template(name, spec, template, labels, node_label, access)
    selector = {"matchLabels": {POOL_LABEL: name}}
    body: Object
    if template.kind == "LeaderWorkerSet":
        body = {"leaderWorkerTemplate": {"size": template.group_size, "workerTemplate": pod}}
    elif template.kind == "StatefulSet":
        body = {
            "selector": selector,
            "serviceName": name,
            "podManagementPolicy": "Parallel",
            "template": pod,
        }
    else:
        body = {
            "selector": selector,
            # A template that cannot start must not take the place of pods that serve.
            "strategy": {
                "type": "RollingUpdate",
                "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
            },
            "template": pod,
        }
    return {
        "apiVersion": api_version_of(spec),
        "kind": template.kind,
        "metadata": {
            "name": name,
            "namespace": metadata["namespace"],
            "labels": {**labels, **queue},
            **({} if access is None else {"annotations": {DIGEST: digest_of_spec(body, access)}}),
            "ownerReferences": [owner_reference(metadata)],
        },
        "spec": body,
    }


def owner_reference(metadata: Mapping[str, Any]) -> Object:
    """The reference by which an object goes with its ModelPool."""
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": metadata["name"],
        "uid": metadata["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


def make_pod_template(
    name: str,
    spec: ModelPoolSpec,
    template: Template,
    labels: Object,
    node_label: str,
    access: NodeCacheAccess | None,
) -> Object:
    """The template of its pods, with what it leaves out."""
    pod = copy.deepcopy(dict(template.spec))
    containers = pod.get("containers") or [{"name": "engine"}]
    index = next((at for at, one in enumerate(containers) if one.get("name") == "engine"), 0)
    model = spec.model if access is None else LINK
    containers[index] = complete_engine(name, spec, containers[index], model)
    pod["containers"] = containers
    share_memory(pod, containers[index])
    pod.setdefault("terminationGracePeriodSeconds", DRAIN_S + 30)
    if node_label and spec.prefer_cached_nodes:
        pod["affinity"] = prefer_nodes(pod.get("affinity") or {}, node_label)
    if access is not None and spec.model is not None:
        pod = mount_cache(pod, index, spec.model, access)
    own = template.metadata
    return {
        "metadata": {
            "labels": {**(own.get("labels") or {}), **labels},
            **({"annotations": own["annotations"]} if own.get("annotations") else {}),
        },
        "spec": pod,
    }


def share_memory(pod: Object, engine: Object) -> None:
    """Give the engine shared memory, where the template says nothing of it. A pod has 64 MiB, and
    processes of one vLLM that talk to each other want more. It counts as the container's memory."""
    mounts = list(engine.get("volumeMounts") or ())
    if any(one.get("mountPath", "").rstrip("/") == SHARED_MEMORY for one in mounts):
        return
    engine["volumeMounts"] = [*mounts, {"name": MEMORY_VOLUME, "mountPath": SHARED_MEMORY}]
    pod["volumes"] = [
        *(pod.get("volumes") or ()),
        {"name": MEMORY_VOLUME, "emptyDir": {"medium": "Memory"}},
    ]


def complete_engine(
    name: str, spec: ModelPoolSpec, given: Mapping[str, Any], model: str | None
) -> Object:
    """The engine's container, with what it leaves out; ``model`` as it is told to open it."""
    engine = dict(given)
    engine.setdefault("name", "engine")
    if spec.engine is not None and "args" not in engine and "command" not in engine:
        served = spec.served_name or name
        opened, revision = name_for_engine(model or served)
        options = EngineOptions(
            model=opened,
            served_model=served,
            args=(*revision, *spec.engine_args),
            max_model_len_tokens=spec.max_model_len_tokens,
        )
        arguments = engine_of(spec.engine).image_arguments(options, spec.port)
        if arguments is not None:
            engine["args"] = list(arguments)
    ports = list(engine.get("ports") or ())
    if not any(one.get("containerPort") == spec.port for one in ports):
        # A container's ports have names of their own.
        is_taken = any(one.get("name") == "http" for one in ports)
        port_name = f"http-{spec.port}" if is_taken else "http"
        ports.append({"name": port_name, "containerPort": spec.port, "protocol": "TCP"})
    engine["ports"] = ports
    # Only that: a liveness probe would end an engine that is slow to load or busy.
    engine.setdefault(
        "readinessProbe",
        {
            "httpGet": {"path": spec.health_path, "port": spec.port},
            "periodSeconds": READY_PERIOD_S,
            "timeoutSeconds": 5,
            "failureThreshold": 3,
        },
    )
    # Endpoints learn that a pod ends at the same time as its engine does: answers under way, and
    # requests on their way, have this long.
    engine.setdefault(
        "lifecycle", {"preStop": {"exec": {"command": ["sleep", str(min(10, DRAIN_S))]}}}
    )
    return engine


def name_for_engine(model: str) -> tuple[str, tuple[str, ...]]:
    """A model as an engine knows it that fetches it itself, and the arguments for its revision:
    one of the hub by ``org/name``, any other as it is written."""
    try:
        ref = parse_ref(model)
    except ValueError:
        return model, ()
    if ref.scheme != "hf" or ref.location.count("/") != 1:
        return model, ()
    return ref.location, () if ref.revision is None else ("--revision", ref.revision)


def prefer_nodes(affinity: Mapping[str, Any], label: str) -> Object:
    """The affinity, preferring nodes with a label besides what it says."""
    found = copy.deepcopy(dict(affinity))
    node = found.setdefault("nodeAffinity", {})
    terms = node.setdefault("preferredDuringSchedulingIgnoredDuringExecution", [])
    expression = {"key": label, "operator": "Exists"}
    terms.append({"weight": PREFER_WEIGHT, "preference": {"matchExpressions": [expression]}})
    return found
