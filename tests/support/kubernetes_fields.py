"""What may stand in our Kubernetes manifests: every field by name, with the type of its value.

Kubernetes drops an unknown field without a word, or refuses it where no operator looks. This table
has the fields that the manifests use, and nothing else: a new one is looked up in the API reference
and added here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LABEL = re.compile(r"([a-z0-9.-]+/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?")
NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
QUANTITY = re.compile(r"[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi)?")
PATH = re.compile(r"/\S*")
TEXT = re.compile(r".+")
PORT = range(1, 65_536)
COUNT = range(1 << 31)


@dataclass(frozen=True)
class ListOf:
    """A list, not empty."""

    of: Any


@dataclass(frozen=True)
class MapOf:
    """Any keys that are labels."""

    of: Any


META = {"name!": NAME, "labels": MapOf(LABEL)}
LABELS = {"matchLabels!": MapOf(LABEL)}
SECURITY = {
    "runAsNonRoot": bool,
    "runAsUser": COUNT,
    "runAsGroup": COUNT,
    "allowPrivilegeEscalation": bool,
    "readOnlyRootFilesystem": bool,
    "capabilities": {"drop": ListOf(re.compile("ALL")), "add": ListOf(re.compile("[A-Z_]+"))},
}
POD_SECURITY = {
    "runAsNonRoot": bool,
    "runAsUser": COUNT,
    "runAsGroup": COUNT,
    "seccompProfile": {"type!": re.compile("RuntimeDefault|Localhost|Unconfined")},
}
RESOURCES = {"requests": MapOf(QUANTITY), "limits": MapOf(QUANTITY)}
PROBE = {
    "exec!": {"command!": ListOf(TEXT)},
    "initialDelaySeconds": COUNT,
    "periodSeconds": COUNT,
    "timeoutSeconds": COUNT,
    "failureThreshold": COUNT,
}
VALUE_FROM = {
    "fieldRef": {"fieldPath!": re.compile(r"status\.podIP")},
    "secretKeyRef": {"name!": NAME, "key!": re.compile(r"[-._a-zA-Z0-9]+")},
}
CONTAINER = {
    "name!": PORT_NAME,
    "image!": TEXT,
    "command": ListOf(TEXT),
    "env": ListOf({"name!": re.compile("[A-Z][A-Z0-9_]*"), "value": str, "valueFrom": VALUE_FROM}),
    "envFrom": ListOf({"secretRef!": {"name!": NAME, "optional": bool}}),
    "ports": ListOf(
        {"name!": PORT_NAME, "containerPort!": PORT, "protocol": re.compile("TCP|UDP")}
    ),
    "readinessProbe": PROBE,
    "livenessProbe": PROBE,
    "securityContext": SECURITY,
    "resources": RESOURCES,
    "volumeMounts": ListOf({"name!": NAME, "mountPath!": PATH, "readOnly": bool}),
}
VOLUME = {
    "name!": NAME,
    "configMap": {"name!": NAME},
    "hostPath": {"path!": PATH, "type": re.compile("Directory|DirectoryOrCreate")},
    "emptyDir": {"sizeLimit": QUANTITY},
}
TOLERATION = {
    "key": LABEL,
    "operator": re.compile("Exists|Equal"),
    "effect": re.compile("NoSchedule|PreferNoSchedule|NoExecute"),
}
POD = {
    "serviceAccountName": NAME,
    "automountServiceAccountToken": bool,
    "enableServiceLinks": bool,
    "nodeSelector": MapOf(LABEL),
    "tolerations": ListOf(TOLERATION),
    "terminationGracePeriodSeconds": COUNT,
    "securityContext": POD_SECURITY,
    "initContainers": ListOf(CONTAINER),
    "containers!": ListOf(CONTAINER),
    "volumes": ListOf(VOLUME),
}
UPDATE = {
    "type!": re.compile("RollingUpdate|OnDelete"),
    "rollingUpdate": {"maxUnavailable": re.compile(r"[0-9]+%")},
}
PEER = {"podSelector": LABELS}
SERVICE_PORT = {"name!": PORT_NAME, "port!": PORT, "targetPort!": PORT_NAME}
KINDS: dict[tuple[str, str], dict[str, Any]] = {
    ("apps/v1", "DaemonSet"): {
        "metadata!": META,
        "spec!": {
            "selector!": LABELS,
            "updateStrategy": UPDATE,
            "template!": {"metadata!": {"labels!": MapOf(LABEL)}, "spec!": POD},
        },
    },
    ("v1", "Service"): {
        "metadata!": META,
        "spec!": {
            "clusterIP": re.compile("None"),
            "selector!": MapOf(LABEL),
            "publishNotReadyAddresses": bool,
            "ports!": ListOf(SERVICE_PORT),
        },
    },
    ("v1", "ServiceAccount"): {"metadata!": META, "automountServiceAccountToken": bool},
    ("networking.k8s.io/v1", "NetworkPolicy"): {
        "metadata!": META,
        "spec!": {
            "podSelector!": LABELS,
            "policyTypes!": ListOf(re.compile("Ingress|Egress")),
            "ingress": ListOf(
                {
                    "from!": ListOf(PEER),
                    "ports!": ListOf({"protocol!": re.compile("TCP"), "port!": PORT_NAME}),
                }
            ),
        },
    },
    ("kustomize.config.k8s.io/v1beta1", "Kustomization"): {
        "resources!": ListOf(TEXT),
        "configMapGenerator": ListOf({"name!": NAME, "files!": ListOf(TEXT)}),
    },
    ("kustomize.config.k8s.io/v1alpha1", "Component"): {"patches!": ListOf({"path!": TEXT})},
}


class _Strict(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]  # type: ignore[no-untyped-call]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise yaml.YAMLError(f"{node.start_mark}: {sorted(twice)} stands twice")
        return super().construct_mapping(node, deep=deep)


def read(path: Path) -> dict[str, Any]:
    """The one document of a file."""
    (document,) = yaml.load_all(path.read_text(), Loader=_Strict)
    assert isinstance(document, dict), path
    return document


def find_problems(document: dict[str, Any], *, whole: bool = True) -> list[str]:
    """What is wrong with a document; a patch (not ``whole``) may leave required fields out."""
    rest = dict(document)
    kind = (rest.pop("apiVersion", ""), rest.pop("kind", ""))
    if kind not in KINDS:
        return [f"no such kind: {kind}"]
    return _check(rest, KINDS[kind], kind[1], whole)


def _check(value: Any, shape: Any, at: str, whole: bool) -> list[str]:
    if isinstance(shape, dict):
        return _check_fields(value, shape, at, whole)
    if isinstance(shape, ListOf):
        if not isinstance(value, list) or not value:
            return [f"{at}: no list, or an empty one"]
        pairs = enumerate(value)
        return [it for n, one in pairs for it in _check(one, shape.of, f"{at}[{n}]", whole)]
    if isinstance(shape, MapOf):
        if not isinstance(value, dict) or not all(LABEL.fullmatch(str(key)) for key in value):
            return [f"{at}: no map of labels"]
        items = value.items()
        return [it for key, one in items for it in _check(one, shape.of, f"{at}.{key}", whole)]
    if isinstance(shape, re.Pattern):
        good = isinstance(value, str) and shape.fullmatch(value.strip("\n"))
    elif isinstance(shape, range):
        good = type(value) is int and value in shape
    else:
        good = type(value) is shape
    return [] if good else [f"{at}: {value!r}"]


def _check_fields(value: Any, shape: dict[str, Any], at: str, whole: bool) -> list[str]:
    if not isinstance(value, dict):
        return [f"{at}: no object"]
    known = {name.rstrip("!"): inner for name, inner in shape.items()}
    found = [f"{at}.{name}: unknown" for name in value if name not in known]
    missing = [name[:-1] for name in shape if name.endswith("!") and name[:-1] not in value]
    found += [f"{at}.{name}: missing" for name in missing if whole]
    for name, inner in value.items():
        found += _check(inner, known.get(name, type(inner)), f"{at}.{name}", whole)
    return found
