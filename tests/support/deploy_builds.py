"""All that is deployed to Kubernetes, as users build it: kustomizations over the bases and their
components, and the chart with several sets of values."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_chart
import kustomize
from certificates import Authority

ROOT = Path(__file__).resolve().parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
CHART = ROOT / "deploy" / "helm" / "tidegate"
COMPONENTS = ("all-namespaces", "service-monitor", "other-workloads", "knative", "picker")
NAMESPACE = "models"
CASES: Mapping[str, dict[str, Any]] = {
    "defaults": {},
    "all": {
        "operator": {
            "allNamespaces": True,
            "otherWorkloads": True,
            "knative": True,
            "settings": "[autoscaler]\nidle_to_zero_s = 60\n",
            "env": {"TIDEGATE__GATEWAY__WORKERS": 4},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
        },
        "adapter": {"externalMetrics": True},
        "cacheAgent": {"enabled": True, "makeDirectory": True, "nodeLabels": True},
        "picker": {"enabled": True},
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "image": {"pullSecrets": ["registry"]},
    },
    "state volume": {
        "operator": {"stateVolume": {"enabled": True, "storageClassName": "fast"}},
        "adapter": {"enabled": False},
    },
    "cert-manager": {
        "operator": {"enabled": False},
        "adapter": {"externalMetrics": True, "certificate": {"source": "certManager"}},
        "networkPolicy": {"enabled": False},
    },
    "KEDA alone, secrets of one's own": {
        "adminToken": {"existingSecret": "admin"},
        "adapter": {
            "customMetrics": False,
            "certificate": {"source": "existing", "existingSecret": "tls", "caBundle": "QQ=="},
        },
    },
}


def build_kustomizations(top: Path) -> dict[str, list[dict[str, Any]]]:
    """The objects of each: a copy of the bases in ``top``, and overlays beside it."""
    shutil.copytree(KUBERNETES, top / "kubernetes")
    own = top / "kubernetes" / "adapter" / "own-certificate"
    pair = Authority(own, "ca").issue("tls", hosts=(f"tidegate-adapter.{NAMESPACE}.svc",))
    assert (pair.certificate, pair.key) == (own / "tls.crt", own / "tls.key")

    def bases(*names: str) -> list[str]:
        return [f"../kubernetes/{name}" for name in names]

    metrics = bases("adapter/custom-metrics", "adapter/external-metrics")
    overlays = {
        "operator": (bases("operator"), []),
        "operator and more": (
            bases("operator"),
            bases(*(f"operator/{one}" for one in COMPONENTS)),
        ),
        "state volume": (bases("operator"), bases("operator/state-volume")),
        "adapter": (
            bases("adapter"),
            [*metrics, *bases("adapter/own-certificate", "adapter/service-monitor")],
        ),
        "adapter in a namespace": (bases("adapter"), metrics),
        "cert-manager": (["../adapter in a namespace"], bases("adapter/cert-manager")),
        "cache agent": (bases("cache-agent"), bases("cache-agent/make-directory")),
        "cache agent with labels": (bases("cache-agent"), bases("cache-agent/node-labels")),
    }
    found = {}
    for name, (resources, components) in overlays.items():
        folder = kustomize.write_overlay(top / name, resources, components, NAMESPACE)
        found[name] = kustomize.build(folder)
    return found


def render_charts() -> dict[str, list[dict[str, Any]]]:
    """The objects of the chart with each set of values."""
    renderings, _ = helm_chart.render(CHART, list(CASES.values()), namespace=NAMESPACE)
    return {name: list(one.objects) for name, one in zip(CASES, renderings, strict=True)}
