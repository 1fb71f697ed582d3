"""Pods that start their engine from the cache of their node. Pure.

A node's agent has its cache and its admin socket in one directory of the node, which pods mount:
the engine's to read from, the container beside it to ask the agent and to hold the model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autoscaler.operator.node_labels import AGENT_LABEL

Object = dict[str, Any]

LINK_DIR, LINK = "/tidegate", "/tidegate/model"
"""Where an engine finds its model: a link that is made when all of it is there."""
HOLDER = "model"
"""The container beside the engine."""
DIGEST = "tidegate.dev/digest"
CACHE_VOLUME, LINK_VOLUME = "tidegate-cache", "tidegate-model"
USER = 10001
"""The agents' user, to whom the cache belongs."""
LOOK_PERIOD_S = 2
LONGEST_FETCH_S = 86_400
"""It is the pool's start timeout that ends a start which takes too long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCacheAccess:
    """How pods use the caches of their nodes. ``image`` is Tidegate's own; ``directory`` is the
    agents' on the node, the same in pods."""

    image: str
    directory: str


def mount_cache(pod: Object, engine: int, model: str, access: NodeCacheAccess) -> Object:
    """The pod of an engine (container number ``engine``) that starts from its node's cache: the
    cache is mounted, and a container beside the engine has the agent fetch the model before the
    engine starts and keeps it from being evicted as long as the pod lives."""
    pod = {**pod, "containers": [dict(one) for one in pod["containers"]]}
    link = {"name": LINK_VOLUME, "mountPath": LINK_DIR}
    container = pod["containers"][engine]
    container["volumeMounts"] = [
        *(container.get("volumeMounts") or ()),
        {"name": CACHE_VOLUME, "mountPath": access.directory, "readOnly": True},
        {**link, "readOnly": True},
    ]
    holder: Object = {
        **ask_agent(access, "hold", model, "--link", LINK),
        "name": HOLDER,
        # A sidecar (Kubernetes 1.29): it starts before the engine and ends after it.
        "restartPolicy": "Always",
        "startupProbe": {
            "exec": {"command": ["test", "-d", LINK]},
            "periodSeconds": LOOK_PERIOD_S,
            "failureThreshold": LONGEST_FETCH_S // LOOK_PERIOD_S,
        },
    }
    holder["volumeMounts"] = [*holder["volumeMounts"], link]
    pod["initContainers"] = [holder, *(pod.get("initContainers") or ())]
    pod["volumes"] = [
        *(pod.get("volumes") or ()),
        cache_volume(access),
        {"name": LINK_VOLUME, "emptyDir": {"sizeLimit": "1Mi"}},
    ]
    pod["affinity"] = need_agent(pod.get("affinity") or {})
    return pod


def ask_agent(access: NodeCacheAccess, verb: str, model: str, *options: str) -> Object:
    """What a container has that asks the agent of its node for something."""
    return {
        "image": access.image,
        "command": ["tidegate", "model", verb, model, *options],
        "env": [
            {"name": "TIDEGATE__STATE_DIR", "value": f"{access.directory}/agent"},
            {"name": "TIDEGATE__MODELCACHE__DIR", "value": f"{access.directory}/cache"},
        ],
        "securityContext": {
            "runAsUser": USER,
            "runAsGroup": USER,
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "resources": {
            "requests": {"cpu": "10m", "memory": "96Mi"},
            "limits": {"cpu": "1", "memory": "512Mi"},
        },
        "volumeMounts": [{"name": CACHE_VOLUME, "mountPath": access.directory}],
    }


def digest_of_spec(spec: object, access: NodeCacheAccess) -> str:
    """A digest of what was made, whatever version of Tidegate's image is in it: another version is
    no reason to start engines again, or to fetch models once more."""
    text = json.dumps(spec, sort_keys=True).replace(json.dumps(access.image), '""')
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest_of(found: Mapping[str, Any]) -> str:
    """Of which spec an object was made; empty for another's object."""
    return str((found["metadata"].get("annotations") or {}).get(DIGEST, ""))


def image_to_keep(there: Mapping[str, Any], made: Mapping[str, Any]) -> str | None:
    """The image of the container beside the engine in a workload that is as it was made now, but
    perhaps for that; ``None`` where more is different."""
    if not digest_of(made) or digest_of(there) != digest_of(made):
        return None
    body = there["spec"]
    template = body.get("template") or body["leaderWorkerTemplate"]["workerTemplate"]
    inits = template["spec"].get("initContainers") or ()
    return next((str(one["image"]) for one in inits if one["name"] == HOLDER), None)


def cache_volume(access: NodeCacheAccess) -> Object:
    """The agents' directory on the node. Where there is none the pod waits, and says so."""
    return {
        "name": CACHE_VOLUME,
        "hostPath": {"path": access.directory, "type": "Directory"},
    }


def need_agent(affinity: Mapping[str, Any]) -> Object:
    """The affinity, for nodes with an agent only."""
    found = dict(affinity)
    node = dict(found.get("nodeAffinity") or {})
    key = "requiredDuringSchedulingIgnoredDuringExecution"
    expression = {"key": AGENT_LABEL, "operator": "Exists"}
    # One term is enough for a node, so each of them is to have it.
    terms = (node.get(key) or {}).get("nodeSelectorTerms") or [{}]
    node[key] = {
        "nodeSelectorTerms": [
            {**term, "matchExpressions": [*(term.get("matchExpressions") or ()), expression]}
            for term in terms
        ]
    }
    found["nodeAffinity"] = node
    return found
