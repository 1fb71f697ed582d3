"""``tidegate deploy check``: what a cluster has of all that Tidegate may use, what is missing, and
what to do about it.

As in ``gateway.doctor.report``, this only decides what an answer means; ``cluster_api`` asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from autoscaler.operator.model_pool import API_VERSION, GROUP, PLURAL, VERSION, make_crd
from autoscaler.operator.permissions import (
    AHPA_POOLS,
    KNATIVE_CLASS,
    POOLS,
    Permission,
    PermittedFeature,
    workload_feature,
)
from gateway.doctor.checks import Check, fail, ok, warn
from gateway.doctor.cluster_api import ApiAnswer, ClusterApi, NoClusterError
from gateway.settings.schema import Settings
from gateway.terminal import count

OLDEST = (1, 28)
"""What the manifests are checked for."""
ZERO_SINCE = (1, 37)
"""Where HPA scales from and to zero without a feature gate."""
METRICS = ("custom.metrics.k8s.io", "external.metrics.k8s.io")
GPU = re.compile(r"(nvidia\.com/(gpu|mig-.+)|amd\.com/gpu|gpu\.intel\.com/.+)")
NO_ACCESS = {401, 403}

OTHERS: Mapping[str, tuple[str, str]] = {
    "keda.sh": ("KEDA", "scaledBy keda"),
    "serving.knative.dev": ("Knative Serving", "scaledBy knative"),
    "kueue.x-k8s.io": ("Kueue", "queueName"),
    "leaderworkerset.x-k8s.io": ("LeaderWorkerSet", "models over several nodes"),
    "serving.kserve.io": ("KServe", "a targetRef to an InferenceService"),
    "ray.io": ("KubeRay", "a targetRef to a RayCluster or RayService"),
    "gateway.networking.k8s.io": ("Gateway API", "HTTPRoutes"),
    "inference.networking.k8s.io": ("Gateway API Inference Extension", "the endpoint picker"),
    "monitoring.coreos.com": ("Prometheus operator", "the ServiceMonitors"),
    "cert-manager.io": ("cert-manager", "the adapter's certificate"),
    "autoscaling.alibabacloud.com": ("AHPA", "kubernetes.ahpa_pools"),
}
"""Groups of others' kinds: whose they are, and what of Tidegate wants them."""


MOST_POOLS = 500
"""ModelPools that are looked at for the kinds of their workloads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedWorkload:
    """A workload that a pool names."""

    pool: str
    namespace: str
    api_version: str
    kind: str

    @property
    def group(self) -> str:
        """Of its kind."""
        return self.api_version.rpartition("/")[0]


def diagnose_cluster(
    settings: Settings, api: ClusterApi, account: str | None = None
) -> Iterator[Check]:
    """What the answers of ``api`` mean for these settings. ``account`` is the service account whose
    rights count, as NAMESPACE/NAME or a name; unset: those of whoever asks. Raises
    ``NoClusterError``."""
    found = api.get("/version")
    if found.status in NO_ACCESS:
        raise NoClusterError(f"{api.url}: {_why(found)}")
    version = _version(found)
    groups = _groups(api)
    yield _api_server(api, found, version)
    yield _autoscaling(version, groups)
    yield _definition(settings, api, groups)
    workloads = list(_workloads(settings, api))
    yield from _rights(settings, api, account, groups, workloads)
    yield _lease(settings, api)
    for group in METRICS:
        yield _metrics(api, group)
    yield from _others(settings, groups, workloads)
    yield _nodes(api)


def _version(found: ApiAnswer) -> tuple[int, int] | None:
    """Also of clouds, whose minor version ends in ``+``."""
    numbers = [re.match(r"\d+", str(found.body.get(name, ""))) for name in ("major", "minor")]
    major, minor = numbers
    return None if major is None or minor is None else (int(major[0]), int(minor[0]))


def _groups(api: ClusterApi) -> dict[str, list[str]]:
    """The versions that are served of each group of kinds."""
    found = api.get("/apis")
    if found.status in NO_ACCESS:
        raise NoClusterError(f"{api.url}: {_why(found)}")
    return {
        str(one["name"]): [str(version["version"]) for version in one["versions"]]
        for one in found.body.get("groups", ())
    }


def _api_server(api: ClusterApi, found: ApiAnswer, version: tuple[int, int] | None) -> Check:
    text = f"Kubernetes {found.body.get('gitVersion', 'of an unknown version')} at {api.url}"
    if version is not None and version < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return warn("kubernetes", text, f"the manifests are checked for {oldest} and newer")
    return ok("kubernetes", f"{text}, namespace {api.namespace}")


def _autoscaling(version: tuple[int, int] | None, groups: Mapping[str, list[str]]) -> Check:
    if "v2" not in groups.get("autoscaling", ()):
        return warn(
            "hpa",
            "no autoscaling/v2",
            "HPA on Tidegate's metrics needs Kubernetes 1.23; Tidegate's own scaling does not",
        )
    if version is not None and version >= ZERO_SINCE:
        return ok("hpa", "autoscaling/v2, from and to zero too: zeroOwner hpa or tidegate")
    text = "autoscaling/v2, from 1 up: zeroOwner none or tidegate"
    return ok("hpa", f"{text} (hpa from 1.37, or with HPAScaleToZero)")


def _definition(settings: Settings, api: ClusterApi, groups: Mapping[str, list[str]]) -> Check:
    served = VERSION in groups.get(GROUP, ())
    advice = "kubectl apply --server-side -f deploy/kubernetes/operator/modelpools.yaml"
    if not served:
        if settings.kubernetes.model_pools:
            return fail("modelpools", f"{API_VERSION} is not served", advice)
        return ok("modelpools", "not there, and kubernetes.model_pools is off")
    found = api.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{PLURAL}.{GROUP}")
    if found.status != 200:
        return ok("modelpools", f"{API_VERSION} is served; its definition may not be read")
    missing = sorted(_fields(make_crd()) - _fields(found.body))
    if missing:
        shown = ", ".join(missing[:5])
        return fail("modelpools", f"an older {API_VERSION}, without {shown}", advice)
    return ok("modelpools", f"{API_VERSION} is served, as this Tidegate knows it")


def _fields(definition: Mapping[str, Any]) -> set[str]:
    """The paths of all fields of our version in a definition."""

    def walk(schema: Mapping[str, Any], path: str) -> Iterator[str]:
        for name, below in schema.get("properties", {}).items():
            at = f"{path}.{name}" if path else name
            yield at
            yield from walk(below, at)
        if "items" in schema:
            yield from walk(schema["items"], f"{path}[]")

    for one in definition["spec"]["versions"]:
        if one["name"] == VERSION:
            return set(walk(one["schema"]["openAPIV3Schema"], ""))
    return set()


def _workloads(settings: Settings, api: ClusterApi) -> Iterator[NamedWorkload]:
    """Those of the pools of the settings, and of the ModelPools that there are."""
    for pool in settings.pools:
        if pool.backend == "kubernetes":
            yield NamedWorkload(
                pool=pool.name,
                namespace=pool.kubernetes.namespace or api.namespace,
                api_version=pool.kubernetes.api_version,
                kind=pool.kubernetes.kind,
            )
    if not settings.kubernetes.model_pools:
        return
    place = "" if settings.kubernetes.all_namespaces else f"/namespaces/{api.namespace}"
    found = api.get(f"/apis/{API_VERSION}{place}/{PLURAL}?limit={MOST_POOLS}")
    for one in found.body.get("items", ()):
        metadata, target = one["metadata"], one.get("spec", {}).get("targetRef")
        if target:
            yield NamedWorkload(
                pool=metadata["name"],
                namespace=metadata.get("namespace", ""),
                api_version=target.get("apiVersion", "apps/v1"),
                kind=target.get("kind", "Deployment"),
            )


def _rights(
    settings: Settings,
    api: ClusterApi,
    account: str | None,
    groups: Mapping[str, list[str]],
    workloads: Sequence[NamedWorkload],
) -> Iterator[Check]:
    """What Tidegate always does, and what each feature does that the settings switch on or a pool
    needs, in the namespaces where it does."""
    everywhere = settings.kubernetes.all_namespaces
    needed: dict[PermittedFeature, set[str]] = {POOLS: {api.namespace}}
    if settings.kubernetes.ahpa_pools:
        needed[AHPA_POOLS] = {api.namespace}
    if settings.kubernetes.knative.pod_autoscalers:
        needed[KNATIVE_CLASS] = {api.namespace}
    for one in workloads:
        needed[POOLS].add(one.namespace)
        feature = workload_feature(one.api_version, one.kind)
        if feature is not None:
            needed.setdefault(feature, set()).add(one.namespace)
    for feature, namespaces in needed.items():
        places = [""] if everywhere else sorted(namespaces)
        yield _feature_rights(feature, api, account, groups, places)


def _feature_rights(
    feature: PermittedFeature,
    api: ClusterApi,
    account: str | None,
    groups: Mapping[str, list[str]],
    places: Sequence[str],
) -> Check:
    """Each right is asked for: what an answer to "all my rights" leaves out would be missed."""
    name = "rights" if feature == POOLS else f"rights: {feature.name}"
    whose = account or "this user"
    missing: dict[str, None] = {}
    unknown, asked = 0, 0
    for one in feature.permissions():
        if one.group and one.group not in groups and one.group != GROUP:
            continue  # no such kind here: nothing to have a right to
        for place in [api.namespace] if one.own else places:
            asked += 1
            allowed = _is_allowed(api, one, place, account)
            if allowed is None:
                unknown += 1
            elif not allowed:
                missing[str(one)] = None
    named = ", ".join(places)
    place = f"namespace{'s' * (len(places) > 1)} {named}" if named else "all namespaces"
    if unknown:
        return warn(
            name,
            f"{count(unknown, 'right')} of {whose} could not be asked for",
            "asking for another account's rights needs the right to create subjectaccessreviews",
        )
    if missing:
        shown = list(missing)
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        advice = f"apply deploy/kubernetes/operator with {feature.given_by}"
        if account is None:
            advice += "; --account NAMESPACE/NAME asks for the rights of Tidegate's own account"
        text = f"{whose} may not in {place}: {', '.join(shown[:8])}{more}"
        return fail(name, text, advice)
    return ok(name, f"all {asked} that it needs, of {whose} in {place}")


def _is_allowed(
    api: ClusterApi, right: Permission, namespace: str, account: str | None
) -> bool | None:
    """``None`` where that is not answered."""
    resource, _, sub = right.resource.partition("/")
    attributes = {
        "group": right.group,
        "resource": resource,
        "subresource": sub,
        "verb": right.verb,
        "namespace": namespace,
    }
    kind = "SelfSubjectAccessReview"
    spec: dict[str, Any] = {"resourceAttributes": attributes}
    if account is not None:
        place, _, name = account.rpartition("/")
        place = place or api.namespace
        kind = "SubjectAccessReview"
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{place}"]
        spec = {
            **spec,
            "user": f"system:serviceaccount:{place}:{name}",
            "groups": [*groups, "system:authenticated"],
        }
    found = api.post(
        f"/apis/authorization.k8s.io/v1/{kind.lower()}s",
        {"apiVersion": "authorization.k8s.io/v1", "kind": kind, "spec": spec},
    )
    if found.status not in {200, 201}:
        return None
    return bool(found.body.get("status", {}).get("allowed"))


def _lease(settings: Settings, api: ClusterApi) -> Check:
    name = settings.kubernetes.lease
    if name is None:
        return ok("lease", "kubernetes.lease is not set: one Tidegate alone")
    path = f"/apis/coordination.k8s.io/v1/namespaces/{api.namespace}/leases/{name}"
    found = api.get(path)
    if found.status == 404:
        return ok("lease", f"{name}: nobody has led yet")
    if found.status != 200:
        return warn("lease", f"{name}: {_why(found)}", "see the check of rights")
    spec = found.body.get("spec") or {}
    holder = spec.get("holderIdentity")
    if not holder:
        return warn("lease", f"{name}: given back, nobody leads", "is a Tidegate running?")
    return ok("lease", f"{name}: {holder} leads, last renewed at {spec.get('renewTime')}")


def _metrics(api: ClusterApi, group: str) -> Check:
    """Whose a metrics API is, and whether it answers: the API server passes the question on."""
    name = group.partition(".")[0] + " metrics"
    states = []
    for version in ("v1beta2", "v1beta1") if group == METRICS[0] else ("v1beta1",):
        answer = api.get(f"/apis/{group}/{version}")
        if answer.status == 404:
            continue
        owner = _owner(api, f"{version}.{group}")
        if answer.status != 200:
            return warn(
                name,
                f"{version}{owner} does not answer ({answer.status})",
                "an API that does not answer blocks the deletion of namespaces: look at its pods",
            )
        states.append(f"{version}{owner}, {count(len(answer.body.get('resources', ())), 'metric')}")
    if not states:
        return ok(name, f"nobody serves {group}: `tidegate adapter` may, for HPA")
    return ok(name, "; ".join(states))


def _owner(api: ClusterApi, name: str) -> str:
    """Which Service serves an API, where that may be read."""
    found = api.get(f"/apis/apiregistration.k8s.io/v1/apiservices/{name}")
    service = (found.body.get("spec") or {}).get("service") if found.status == 200 else None
    return f" by {service.get('namespace')}/{service.get('name')}" if service else ""


def _others(
    settings: Settings, groups: Mapping[str, list[str]], workloads: Sequence[NamedWorkload]
) -> Iterator[Check]:
    """Kinds of others. One that a pool names or a setting is for is needed, any other is not."""
    needed: dict[str, list[str]] = {}
    for workload in workloads:
        needed.setdefault(workload.group, []).append(f"the workload of {workload.pool}")
    if settings.kubernetes.knative.pod_autoscalers:
        wanted = needed.setdefault("serving.knative.dev", [])
        wanted.append("what kubernetes.knative.pod_autoscalers is for")
    if settings.kubernetes.ahpa_pools:
        wanted = needed.setdefault("autoscaling.alibabacloud.com", [])
        wanted.append("what kubernetes.ahpa_pools is for")
    for group, (name, what) in OTHERS.items():
        if group in groups:
            yield ok(name, f"{', '.join(groups[group])}")
        elif group in needed:
            why = ", ".join(needed[group][:8])
            yield fail(name, f"{group} is not served, and is {why}", "install it")
        else:
            yield ok(name, f"not there (for {what})")


def _nodes(api: ClusterApi) -> Check:
    found = api.get("/api/v1/nodes?limit=500")
    if found.status != 200:
        return ok("nodes", "may not be listed, and need not")
    nodes = found.body.get("items") or []
    gpus: dict[str, int] = {}
    for node in nodes:
        for name, amount in ((node.get("status") or {}).get("allocatable") or {}).items():
            if GPU.fullmatch(name) and str(amount).isdigit():
                gpus[name] = gpus.get(name, 0) + int(amount)
    text = count(len(nodes), "node")
    if not any(gpus.values()):
        return warn(
            "nodes",
            f"{text}, none with GPUs to allocate",
            "engines that ask for GPUs wait: is there a device plugin, or an autoscaler of nodes?",
        )
    return ok("nodes", f"{text}, {', '.join(f'{n} {name}' for name, n in sorted(gpus.items()))}")


def _why(found: ApiAnswer) -> str:
    return str(found.body.get("message") or f"the API server answers {found.status}")


def run_cluster_check(
    settings: Settings, kubeconfig: str | None = None, account: str | None = None
) -> list[Check]:
    """Look at the cluster of these settings. Raises ``NoClusterError``."""
    from gateway.doctor.cluster_api import LiveCluster

    given = settings.kubernetes
    api = LiveCluster(kubeconfig or given.kubeconfig, given.namespace)
    try:
        return list(diagnose_cluster(settings, api, account))
    finally:
        api.close()
