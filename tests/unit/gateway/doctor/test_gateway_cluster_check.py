"""What the answers of an API server mean: the report of ``tidegate deploy check``."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaler.operator.model_pool import make_crd
from autoscaler.operator.permissions import (
    AHPA_POOLS,
    KNATIVE_CLASS,
    KSERVE,
    POOLS,
    RAY,
    PermittedFeature,
)
from gateway.doctor.checks import Check, Status
from gateway.doctor.cluster import diagnose_cluster
from gateway.doctor.cluster_api import ApiAnswer, NoClusterError
from gateway.settings.schema import Settings

ROOT = Path(__file__).resolve().parents[4]
IN_CLUSTER = Settings.model_validate({"kubernetes": {"lease": "tidegate", "model_pools": True}})
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/modelpools.tidegate.dev"
LEASE = "/apis/coordination.k8s.io/v1/namespaces/models/leases/tidegate"
EXTERNAL = "/apis/external.metrics.k8s.io/v1beta1"
NODES = "/api/v1/nodes?limit=500"
SERVICES = "/apis/apiregistration.k8s.io/v1/apiservices"


def groups(*names: str) -> dict[str, Any]:
    found = []
    for name in names:
        group, _, version = name.partition("/")
        found.append({"name": group, "versions": [{"version": version}]})
    return {"groups": found}


OWN = (
    "autoscaling/v2", "apps/v1", "coordination.k8s.io/v1", "discovery.k8s.io/v1",
    "tidegate.dev/v1alpha1",
)  # fmt: skip
WELL: dict[str, Any] = {
    "/version": {"major": "1", "minor": "36+", "gitVersion": "v1.36.2"},
    "/apis": groups(*OWN, "keda.sh/v1alpha1"),
    CRDS: make_crd(),
    LEASE: {"spec": {"holderIdentity": "tidegate-1_7", "renewTime": "2026-11-30T00:00:00Z"}},
    EXTERNAL: {"resources": [{"name": "tidegate_desired_replicas"}]},
    f"{SERVICES}/v1beta1.external.metrics.k8s.io": {
        "spec": {"service": {"namespace": "models", "name": "tidegate-adapter"}}
    },
    "/api/v1/nodes?limit=500": {
        "items": [
            {"status": {"allocatable": {"cpu": "8", "nvidia.com/gpu": "4"}}},
            {"status": {"allocatable": {"cpu": "8", "nvidia.com/gpu": "2"}}},
        ]
    },
}
"""What a well cluster answered."""


class RecordedCluster:
    """Answers as they were recorded; what is not in them is not found. ``refuses`` are verbs with
    their kind of resource that are not allowed."""

    url = "https://10.0.0.1:6443"
    namespace = "models"

    def __init__(
        self, answers: dict[str, Any], *, statuses: dict[str, int] | None = None, refuses: str = ""
    ) -> None:
        self.answers, self.statuses, self.refuses = answers, statuses or {}, refuses
        self.reviews: list[dict[str, Any]] = []

    def get(self, path: str) -> ApiAnswer:
        if path in self.statuses:
            return ApiAnswer(status=self.statuses[path], body={"message": "no"})
        if path in self.answers:
            return ApiAnswer(status=200, body=self.answers[path])
        return ApiAnswer(status=404, body={})

    def post(self, path: str, body: dict[str, Any]) -> ApiAnswer:
        if path in self.statuses:
            return ApiAnswer(status=self.statuses[path], body={})
        assert path.endswith(f"/{body['kind'].lower()}s")
        self.reviews.append(body["spec"])
        asked = body["spec"]["resourceAttributes"]
        name = f"{asked['verb']} {asked['resource']}"
        return ApiAnswer(status=201, body={"status": {"allowed": name != self.refuses}})


def look(api: RecordedCluster, settings: Settings = IN_CLUSTER, **more: Any) -> dict[str, Check]:
    return {one.name: one for one in diagnose_cluster(settings, api, **more)}


def changed(change: Callable[[dict[str, Any]], Any]) -> RecordedCluster:
    answers = copy.deepcopy(WELL)
    change(answers)
    return RecordedCluster(answers)


def test_a_well_cluster_is_well_and_says_what_it_has() -> None:
    checks = look(RecordedCluster(WELL))
    assert {one.status for one in checks.values()} == {Status.OK}
    for name, word in {
        "kubernetes": "v1.36.2",
        "hpa": "from 1 up",
        "lease": "tidegate-1_7 leads",
        "external metrics": "models/tidegate-adapter, 1 metric",
        "custom metrics": "nobody",
        "KEDA": "v1alpha1",
        "Kueue": "not there",
        "nodes": "2 nodes, 6 nvidia.com/gpu",
    }.items():
        assert word in checks[name].finding, name


@pytest.mark.parametrize(
    ("api", "name", "status", "word"),
    [
        (changed(lambda a: a["/version"].update(minor="20")), "kubernetes", Status.WARN, "v1.36.2"),
        (changed(lambda a: a["/version"].update(minor="37")), "hpa", Status.OK, "zeroOwner hpa"),
        (
            changed(lambda a: a.update({"/apis": groups("autoscaling/v1", *OWN[1:])})),
            "hpa", Status.WARN, "no autoscaling/v2",
        ),
        (
            changed(lambda a: a.update({"/apis": groups(*OWN[:-1])})),
            "modelpools", Status.FAIL, "not served",
        ),
        (
            changed(
                lambda a: a[CRDS]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"][
                    "spec"
                ]["properties"].pop("zeroOwner")
            ),
            "modelpools", Status.FAIL, "spec.zeroOwner",
        ),
        (RecordedCluster(WELL, statuses={CRDS: 403}), "modelpools", Status.OK, "may not be read"),
        (RecordedCluster(WELL, refuses="patch pods"), "rights", Status.FAIL, "patch pods"),
        (changed(lambda a: a.pop(LEASE)), "lease", Status.OK, "nobody has led"),
        (changed(lambda a: a[LEASE]["spec"].pop("holderIdentity")), "lease", Status.WARN, "nobody"),
        (RecordedCluster(WELL, statuses={LEASE: 403}), "lease", Status.WARN, "no"),
        (RecordedCluster(WELL, statuses={EXTERNAL: 503}), "external metrics", Status.WARN, "503"),
        (RecordedCluster(WELL, statuses={NODES: 403}), "nodes", Status.OK, "may not"),
        (
            changed(lambda a: a["/api/v1/nodes?limit=500"].update(items=[{"status": {}}])),
            "nodes", Status.WARN, "1 node, none",
        ),
    ],
)  # fmt: skip
def test_what_is_missing_is_said(
    api: RecordedCluster, name: str, status: Status, word: str
) -> None:
    checks = look(api)
    assert checks[name].status == status
    assert word in checks[name].finding
    assert (checks[name].advice is None) == (status == Status.OK)
    others = {key for key, one in checks.items() if one.status != Status.OK}
    assert others <= {name}


def test_a_workload_of_a_kind_that_is_not_there_is_an_error() -> None:
    kind = {"api_version": "leaderworkerset.x-k8s.io/v1", "kind": "LeaderWorkerSet", "name": "big"}
    pool = {"name": "big", "backend": "kubernetes", "kubernetes": kind}
    settings = Settings.model_validate({"pools": [pool]})
    check = look(RecordedCluster(WELL), settings)["LeaderWorkerSet"]
    assert check.status == Status.FAIL
    assert "big" in check.finding


def test_rights_are_asked_where_they_are_needed() -> None:
    here = RecordedCluster(WELL)
    look(here)
    places = {one["resourceAttributes"]["namespace"] for one in here.reviews}
    assert places == {"models"}
    everywhere = RecordedCluster(WELL)
    settings = Settings.model_validate({"kubernetes": {"all_namespaces": True}})
    look(everywhere, settings)
    by_place = {
        one["resourceAttributes"]["resource"]: one["resourceAttributes"]["namespace"]
        for one in everywhere.reviews
    }
    assert by_place["leases"] == "models"
    assert by_place["pods"] == ""
    assert "leaderworkersets" not in by_place, "there is no such kind"


def test_the_rights_of_another_account_are_asked_for() -> None:
    api = RecordedCluster(WELL)
    assert "tidegate" in look(api, account="serving/tidegate")["rights"].finding
    assert {one["user"] for one in api.reviews} == {"system:serviceaccount:serving:tidegate"}
    assert "system:serviceaccounts:serving" in api.reviews[0]["groups"]
    path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
    refused = RecordedCluster(WELL, statuses={path: 403})
    assert look(refused, account="tidegate")["rights"].status == Status.WARN


@pytest.mark.parametrize("path", ["/version", "/apis"])
def test_without_access_there_is_no_report(path: str) -> None:
    with pytest.raises(NoClusterError, match="no"):
        look(RecordedCluster(WELL, statuses={path: 401}))


def of_rules(rules: Iterable[dict[str, Any]]) -> set[tuple[str, str, str]]:
    return {
        (group, resource, verb)
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }


def of_features(*features: PermittedFeature) -> set[tuple[str, str, str]]:
    return {
        (one.group, one.resource, one.verb) for feature in features for one in feature.permissions()
    }


def test_what_is_deployed_gives_these_rights_and_no_others() -> None:
    operator = ROOT / "deploy/kubernetes/operator"
    role = yaml.safe_load((operator / "role.yaml").read_text())
    assert of_rules(role["rules"]) == of_features(POOLS, AHPA_POOLS)
    for component, features in {
        "knative": (KNATIVE_CLASS,),
        "other-workloads": (KSERVE, RAY),
    }.items():
        assert {one.given_by for one in features} == {f"the component {component}"}
        patches = yaml.safe_load((operator / component / "kustomization.yaml").read_text())
        added = [one["value"] for one in yaml.safe_load(patches["patches"][0]["patch"])]
        assert of_rules(added) == of_features(*features)


KINDS = (
    "serving.knative.dev/v1", "autoscaling.internal.knative.dev/v1alpha1",
    "networking.internal.knative.dev/v1alpha1", "serving.kserve.io/v1beta1", "ray.io/v1",
    "autoscaling.alibabacloud.com/v1beta1", "argoproj.io/v1alpha1", "leaderworkerset.x-k8s.io/v1",
)  # fmt: skip
MODEL_POOLS = "/apis/tidegate.dev/v1alpha1/namespaces/models/modelpools?limit=500"


def with_kinds(*targets: dict[str, str], refuses: str = "") -> RecordedCluster:
    """A cluster that has everybody's kinds, and ModelPools with these targets."""
    items = [
        {"metadata": {"name": f"pool-{number}", "namespace": "models"}, "spec": {"targetRef": one}}
        for number, one in enumerate(targets)
    ]
    answers = {**copy.deepcopy(WELL), "/apis": groups(*OWN, *KINDS), MODEL_POOLS: {"items": items}}
    return RecordedCluster(answers, refuses=refuses)


def target(api_version: str, kind: str) -> dict[str, str]:
    return {"apiVersion": api_version, "kind": kind, "name": "x"}


@pytest.mark.parametrize(
    ("settings", "targets", "refused", "name", "advice"),
    [
        ({"knative": {"pod_autoscalers": True}}, (), "patch serverlessservices",
         "rights: the Knative class", "component knative"),
        ({"knative": {"pod_autoscalers": True}}, (), "watch podautoscalers",
         "rights: the Knative class", "component knative"),
        ({}, (target("serving.knative.dev/v1", "Service"),), "get podautoscalers",
         "rights: Services of Knative", "component knative"),
        ({}, (target("serving.kserve.io/v1beta1", "InferenceService"),), "patch inferenceservices",
         "rights: InferenceServices", "component other-workloads"),
        ({}, (target("ray.io/v1", "RayService"),), "patch rayservices",
         "rights: Ray", "component other-workloads"),
        ({"ahpa_pools": True}, (), "watch advancedhorizontalpodautoscalers",
         "rights: AHPAs", "role.yaml"),
        ({}, (target("argoproj.io/v1alpha1", "Rollout"),), "patch rollouts",
         "rights: workloads of kind Rollout", "rule of your own"),
        ({}, (target("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"),), "create leaderworkersets",
         "rights", "role.yaml"),
    ],
)  # fmt: skip
def test_a_feature_s_rights_are_asked_for_where_it_is_used(
    settings: dict[str, Any], targets: tuple[dict[str, str], ...], refused: str, name: str,
    advice: str,
) -> None:  # fmt: skip
    given = Settings.model_validate({"kubernetes": {"model_pools": True, **settings}})
    well = look(with_kinds(*targets), given)
    assert well[name].status == Status.OK
    lacking = look(with_kinds(*targets, refuses=refused), given)
    assert lacking[name].status == Status.FAIL
    assert refused in lacking[name].finding
    assert advice in str(lacking[name].advice)
    assert [one for one, check in lacking.items() if check.status == Status.FAIL] == [name]
    if name != "rights":
        unused = with_kinds(refuses=refused)
        assert name not in look(unused, IN_CLUSTER), "nothing uses it"


def test_rights_are_asked_for_in_the_namespaces_of_the_pools() -> None:
    kserve = {"api_version": "serving.kserve.io/v1beta1", "kind": "InferenceService", "name": "x"}
    pools = [
        {"name": name, "backend": "kubernetes", "kubernetes": {**kserve, "namespace": name}}
        for name in ("one", "two")
    ]
    api = with_kinds()
    check = look(api, Settings.model_validate({"pools": pools}))["rights: InferenceServices"]
    assert "namespaces one, two" in check.finding
    for resource, expected in {
        "inferenceservices": {"one", "two"},
        "pods": {"models", "one", "two"},
        "leases": {"models"},
    }.items():
        places = {
            one["resourceAttributes"]["namespace"]
            for one in api.reviews
            if one["resourceAttributes"]["resource"] == resource
        }
        assert places == expected, resource


def test_a_feature_whose_kinds_are_not_there_is_an_error() -> None:
    given = {"model_pools": True, "ahpa_pools": True, "knative": {"pod_autoscalers": True}}
    checks = look(RecordedCluster(WELL), Settings.model_validate({"kubernetes": given}))
    assert checks["Knative Serving"].status == checks["AHPA"].status == Status.FAIL
    assert "pod_autoscalers" in checks["Knative Serving"].finding
