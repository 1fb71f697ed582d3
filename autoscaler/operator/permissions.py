"""What Tidegate asks an API server to do, so what it must be allowed to. Pure.

``deploy/kubernetes/operator`` says the same, in ``role.yaml`` and the components that add to it; a
test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from autoscaler.backends.kubernetes.client import pluralize


@dataclass(frozen=True, slots=True, kw_only=True)
class Permission:
    """One verb on one kind of resource. ``own``: only in the namespace that Tidegate is in."""

    group: str
    resource: str
    verb: str
    own: bool = False

    def __str__(self) -> str:
        name = f"{self.resource}.{self.group}" if self.group else self.resource
        return f"{self.verb} {name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class PermittedFeature:
    """What one feature needs. ``rules`` are groups, resources and verbs; ``given_by`` is what gives
    them, below ``deploy/kubernetes/operator``."""

    name: str
    given_by: str
    rules: tuple[tuple[str, str, str], ...]

    def permissions(self) -> Iterator[Permission]:
        """All of them."""
        for group, resource, verbs in self.rules:
            for verb in verbs.split():
                yield Permission(
                    group=group, resource=resource, verb=verb, own=resource == "leases"
                )


POOLS = PermittedFeature(
    name="pools",
    given_by="role.yaml, or the component all-namespaces",
    rules=(
        ("coordination.k8s.io", "leases", "get create update"),
        ("tidegate.dev", "modelpools", "get list watch"),
        ("tidegate.dev", "modelpools/status", "patch"),
        ("", "events", "create"),
        ("", "pods", "get list watch patch"),
        ("discovery.k8s.io", "endpointslices", "get list watch"),
        ("apps", "deployments", "get create patch"),
        ("apps", "statefulsets", "get create patch"),
        ("apps", "deployments/scale", "get patch"),
        ("apps", "statefulsets/scale", "get patch"),
        ("leaderworkerset.x-k8s.io", "leaderworkersets", "get create patch"),
        ("leaderworkerset.x-k8s.io", "leaderworkersets/scale", "get patch"),
        ("tidegate.dev", "modelpools/finalizers", "update"),
        ("batch", "jobs", "create delete list watch"),
        ("autoscaling", "horizontalpodautoscalers", "list watch"),
        ("inference.networking.k8s.io", "inferencepools", "get"),
    ),
)
"""What it does whatever the settings are; of kinds that a cluster may lack, where it has them."""
AHPA_POOLS = PermittedFeature(
    name="AHPAs",
    given_by=POOLS.given_by,
    rules=(("autoscaling.alibabacloud.com", "advancedhorizontalpodautoscalers", "list watch"),),
)
KNATIVE = PermittedFeature(
    name="Services of Knative",
    given_by="the component knative",
    rules=(
        ("serving.knative.dev", "services", "get"),
        ("autoscaling.internal.knative.dev", "podautoscalers", "get"),
    ),
)
KNATIVE_CLASS = PermittedFeature(
    name="the Knative class",
    given_by=KNATIVE.given_by,
    rules=(
        *KNATIVE.rules,
        ("autoscaling.internal.knative.dev", "podautoscalers", "list watch"),
        ("autoscaling.internal.knative.dev", "podautoscalers/status", "patch"),
        ("autoscaling.internal.knative.dev", "podautoscalers/finalizers", "update"),
        ("networking.internal.knative.dev", "serverlessservices", "list watch create patch"),
    ),
)
KSERVE = PermittedFeature(
    name="InferenceServices",
    given_by="the component other-workloads",
    rules=(("serving.kserve.io", "inferenceservices", "get patch"),),
)
RAY = PermittedFeature(
    name="Ray",
    given_by=KSERVE.given_by,
    rules=(("ray.io", "rayclusters", "get patch"), ("ray.io", "rayservices", "get patch")),
)


def workload_feature(api_version: str, kind: str) -> PermittedFeature | None:
    """What a workload of this kind needs beyond ``POOLS``; ``None``: nothing."""
    group, plural = api_version.rpartition("/")[0], pluralize(kind)
    if group == "serving.knative.dev":
        return KNATIVE
    for feature in (KSERVE, RAY):
        if any(one[:2] == (group, plural) for one in feature.rules):
            return feature
    if any(one[:2] == (group, plural) for one in POOLS.rules):
        return None
    return PermittedFeature(
        name=f"workloads of kind {kind}",
        given_by="a rule of your own",
        rules=((group, f"{plural}/scale", "get patch"),),
    )
