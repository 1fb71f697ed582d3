"""The Job that brings a ModelPool's model to the caches of nodes, ahead of demand. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from autoscaler.operator.manifests import MANAGED, QUEUE_LABEL, owner_reference
from autoscaler.operator.model_pool import ModelPoolSpec
from autoscaler.operator.node_cache import (
    DIGEST,
    NodeCacheAccess,
    ask_agent,
    cache_volume,
    digest_of_spec,
    need_agent,
)
from autoscaler.operator.node_labels import label_of

Object = dict[str, Any]

JOB_LABEL = "tidegate.dev/preload"
RETRIES = 20
PLACING = ("nodeSelector", "tolerations", "imagePullSecrets")
"""What its pods have of the template's."""


def job_name(name: str) -> str:
    """The name of a ModelPool's Job."""
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[:45].rstrip('-.')}-preload-{digest}"


def make_preload_job(
    found: Mapping[str, Any], spec: ModelPoolSpec, access: NodeCacheAccess
) -> Object:
    """The Job that brings a ModelPool's model to as many nodes as it says, each by its agent. With
    ``queueName`` it is suspended until the queue admits it."""
    metadata = found["metadata"]
    name = job_name(metadata["name"])
    given = {} if spec.template is None else spec.template.spec
    labels = {
        "app.kubernetes.io/name": metadata["name"],
        **MANAGED,
        JOB_LABEL: name,
    }
    affinity = need_agent(given.get("affinity") or {})
    # One pod to a node; one that is done does not count, so nodes that have the model come last.
    affinity["podAntiAffinity"] = {
        "requiredDuringSchedulingIgnoredDuringExecution": [
            {
                "topologyKey": "kubernetes.io/hostname",
                "labelSelector": {"matchLabels": {JOB_LABEL: name}},
            }
        ]
    }
    affinity.pop("podAffinity", None)
    label = label_of(spec.model or "")
    if label:
        missing = {"matchExpressions": [{"key": label, "operator": "DoesNotExist"}]}
        affinity["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"] = [
            {"weight": 100, "preference": missing}
        ]
    job: Object = {
        "completions": spec.preload_nodes,
        "parallelism": spec.preload_nodes,
        "backoffLimit": RETRIES,
        "suspend": spec.queue_name is not None,
        "template": {
            "metadata": {"labels": labels},
            "spec": {
                **{field: given[field] for field in PLACING if field in given},
                "restartPolicy": "OnFailure",
                "automountServiceAccountToken": False,
                "enableServiceLinks": False,
                "affinity": affinity,
                "containers": [
                    {**ask_agent(access, "preload", spec.model or ""), "name": "preload"}
                ],
                "volumes": [cache_volume(access)],
            },
        },
    }
    queue = {} if spec.queue_name is None else {QUEUE_LABEL: spec.queue_name}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": name,
            "namespace": metadata["namespace"],
            "labels": {**labels, **queue},
            "annotations": {DIGEST: digest_of_spec([job, queue], access)},
            "ownerReferences": [owner_reference(metadata)],
        },
        "spec": job,
    }


def find_preloaded(
    spec: ModelPoolSpec, job: Mapping[str, Any] | None, error: str
) -> tuple[str, str, str]:
    """The condition ``Preloaded`` of a ModelPool with ``preloadNodes``, by its Job: status, reason
    and message."""
    if error:
        return "False", "JobNotMade", error
    if job is None:
        return "Unknown", "JobNotMade", "Its Job is not there yet."
    status = job.get("status") or {}
    done = f"{status.get('succeeded') or 0} of {spec.preload_nodes} nodes"
    for one in status.get("conditions") or ():
        if one.get("status") == "True" and one["type"] == "Complete":
            return "True", "Complete", done
        if one.get("status") == "True" and one["type"] == "Failed":
            return "False", "Failed", f"{done}: {one.get('message') or one.get('reason')}"
    if (job.get("spec") or {}).get("suspend"):
        if spec.queue_name is None:
            return "False", "Suspended", f"{done}: its Job is suspended"
        text = f"{done}: waits for queue {spec.queue_name} to admit it"
        return "False", "WaitingForAdmission", text
    return "False", "Preloading", f"{done}, {status.get('active') or 0} pods not done"
