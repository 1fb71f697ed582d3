"""ModelPool: what stands in it, and the pool, the workload and the status that come of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaler.operator.controller import find_scaler, keep_scaler
from autoscaler.operator.manifests import make_workload
from autoscaler.operator.model_pool import (
    InvalidModelPool,
    make_crd,
    parse_spec,
    structural,
    to_settings,
)
from autoscaler.operator.status import Scaling, Verdict, make_status
from autoscaler.settings import PoolSettings, TargetSettings
from autoscaler.types import Decision, PoolReport, ScaleReason

TARGET: dict[str, Any] = {"targetRef": {"name": "llama"}}
TEMPLATE: dict[str, Any] = {"template": {"spec": {"containers": [{"image": "vllm:1"}]}}}


def model_pool(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "tidegate.dev/v1alpha1",
        "kind": "ModelPool",
        "metadata": {"name": "llama", "namespace": "models", "uid": "u1", "generation": 3},
        "spec": spec,
    }


def settings(**spec: Any) -> PoolSettings:
    found = model_pool(**spec)
    return to_settings(found, parse_spec(found))


def workload(**spec: Any) -> dict[str, Any]:
    found = model_pool(**spec)
    return make_workload(found, parse_spec(found), node_label="model.tidegate.dev/x")


# -- settings --------------------------------------------------------------------------------------


def test_a_pool_of_a_workload_that_exists() -> None:
    pool = settings(
        **TARGET,
        servedName="Qwen/Qwen3-8B",
        aliases=["qwen"],
        minReplicas=1,
        maxReplicas=4,
        idleToZeroSeconds=60,
        slo={"ttftSeconds": 2},
        targets={"requestsPerSecond": 4, "e2eSeconds": 30, "gpuUtilizationFraction": 0.7},
        replicaHourPrice=8,
        violatedSecondPrice=60,
        schedules=[{"name": "day", "cron": "0 8 * * *", "durationSeconds": 3600, "minReplicas": 2}],
    )
    assert pool.name == "Qwen/Qwen3-8B"
    assert pool.backend == "kubernetes"
    assert (pool.min_replicas, pool.max_replicas, pool.idle_to_zero_s) == (1, 4, 60.0)
    assert pool.slo.ttft_s == 2.0
    assert pool.targets == TargetSettings(requests_per_s=4, e2e_s=30, gpu_utilization_fraction=0.7)
    assert (pool.replica_hour_price, pool.violated_second_price) == (8.0, 60.0)
    assert pool.schedules[0].min_replicas == 2
    given = pool.kubernetes
    assert (given.namespace, given.kind, given.name) == ("models", "Deployment", "llama")
    assert given.port == 8000
    assert given.owner_of_zero == "tidegate"


def test_the_name_is_the_resources_own_where_it_gives_none() -> None:
    assert settings(**TARGET).name == "llama"


def test_a_workload_that_another_autoscaler_has_is_left_alone() -> None:
    found = model_pool(**TARGET)
    pool = to_settings(found, parse_spec(found), taken_over="HorizontalPodAutoscaler x")
    assert pool.backend_key == "kubernetes_external"
    assert pool.kubernetes.owner_of_zero == "none"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({}, "exactly one of targetRef and template"),
        ({**TARGET, **TEMPLATE}, "exactly one of targetRef and template"),
        ({**TARGET, "maxReplicas": 0}, "spec.maxReplicas"),
        ({**TARGET, "sizzle": 1}, "spec.sizzle"),
        ({**TARGET, "minReplicas": 3}, "minReplicas is more than maxReplicas"),
        ({**TARGET, "zeroOwner": "hpa"}, "zeroOwner hpa or keda needs scaledBy of the same"),
        ({**TARGET, "zeroOwner": "tidegate", "scaledBy": "keda"}, "they go to zero themselves"),
        ({**TARGET, "queueName": "q"}, "queueName is only for template"),
        ({**TARGET, "model": "a/b", "useNodeCache": True}, "useNodeCache needs template and model"),
        ({**TEMPLATE, "useNodeCache": True}, "useNodeCache needs template and model"),
        ({**TARGET, "preloadNodes": 2}, "preloadNodes needs model"),
        ({**TEMPLATE, "scaledBy": "knative"}, "scaledBy knative is only for targetRef"),
        ({"targetRef": {}}, "spec.targetRef.name"),
        (
            {**TARGET, "schedules": [{"name": "a", "cron": "x", "durationSeconds": 1}]},
            "cron",
        ),
    ],
)
def test_what_is_no_pool_says_why(spec: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidModelPool) as caught:
        settings(**spec)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# -- the definition --------------------------------------------------------------------------------


def walk(schema: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    found = [(path, schema)]
    for name, one in (schema.get("properties") or {}).items():
        found += walk(one, f"{path}.{name}")
    if "items" in schema:
        found += walk(schema["items"], f"{path}[]")
    return found


def test_the_schema_is_structural() -> None:
    (version,) = make_crd()["spec"]["versions"]
    for path, one in walk(version["schema"]["openAPIV3Schema"]):
        assert "type" in one, path
        assert not set(one) & {"$ref", "$defs", "anyOf", "title", "additionalProperties"}, path
        if one["type"] == "array":
            assert "items" in one, path


def test_every_field_of_the_spec_is_explained() -> None:
    (version,) = make_crd()["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    assert [name for name, one in spec["properties"].items() if "description" not in one] == []


def test_bounds_are_those_of_kubernetes() -> None:
    assert structural({"type": "number", "exclusiveMinimum": 0.0}) == {
        "type": "number",
        "minimum": 0.0,
        "exclusiveMinimum": True,
    }


def test_the_file_is_that_of_the_classes() -> None:
    root = Path(__file__).resolve().parents[4]
    file = root / "deploy" / "kubernetes" / "operator" / "modelpools.yaml"
    assert yaml.safe_load(file.read_text()) == make_crd()


def test_a_change_that_would_leave_a_workload_behind_is_refused() -> None:
    (version,) = make_crd()["spec"]["versions"]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    rules = [one for one in spec["x-kubernetes-validations"] if "oldSelf" in one["rule"]]
    refused = [one["message"].partition(" cannot ")[0] for one in rules]
    assert refused == ["template", "template.kind"]
    for one in rules:
        assert "would be left behind: make another ModelPool" in one["message"]
        assert one["rule"].startswith("!has(oldSelf.template) || "), "a targetRef may change"


# -- workloads -------------------------------------------------------------------------------------


def test_a_deployment_is_completed() -> None:
    made = workload(**TEMPLATE, engine="vllm", model="hf://o/m", engineArgs=["--x"], port=9000)
    assert made["kind"] == "Deployment"
    assert "replicas" not in made["spec"]
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner["uid"] == "u1"
    pod = made["spec"]["template"]
    selector = made["spec"]["selector"]["matchLabels"]
    assert selector.items() <= pod["metadata"]["labels"].items()
    (engine,) = pod["spec"]["containers"]
    assert engine["args"] == [
        "o/m",
        "--served-model-name",
        "llama",
        "--port",
        "9000",
        "--x",
    ]
    assert engine["readinessProbe"]["httpGet"] == {"path": "/health", "port": 9000}
    assert engine["ports"][0]["containerPort"] == 9000
    assert "livenessProbe" not in engine
    assert "preStop" in engine["lifecycle"]
    terms = pod["spec"]["affinity"]["nodeAffinity"][
        "preferredDuringSchedulingIgnoredDuringExecution"
    ]
    assert terms[0]["preference"]["matchExpressions"][0]["key"] == "model.tidegate.dev/x"


def test_an_engine_has_shared_memory() -> None:
    pod = workload(**TEMPLATE, engine="vllm")["spec"]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    assert mount["mountPath"] == "/dev/shm"
    assert pod["volumes"] == [{"name": mount["name"], "emptyDir": {"medium": "Memory"}}]


def test_shared_memory_of_the_template_is_kept() -> None:
    own = {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    containers = [{"name": "engine", "image": "e:1", "volumeMounts": mounts}]
    given = {"spec": {"containers": containers, "volumes": [own]}}
    pod = workload(template=given)["spec"]["template"]["spec"]
    assert pod["containers"][0]["volumeMounts"] == mounts
    assert pod["volumes"] == [own]


def test_what_the_template_says_is_kept() -> None:
    probe = {"tcpSocket": {"port": 1}}
    containers = [
        {"name": "proxy", "image": "p:1"},
        {
            "name": "engine",
            "image": "e:1",
            "args": ["serve"],
            "readinessProbe": probe,
            "ports": [{"containerPort": 8000, "name": "api"}],
        },
    ]
    template = {
        "metadata": {"labels": {"team": "a"}, "annotations": {"b": "c"}},
        "spec": {"containers": containers, "terminationGracePeriodSeconds": 5},
    }
    made = workload(template=template, engine="vllm", preferCachedNodes=False)
    pod = made["spec"]["template"]
    proxy, engine = pod["spec"]["containers"]
    assert proxy == containers[0]
    assert engine["args"] == ["serve"]
    assert engine["readinessProbe"] == probe
    assert engine["ports"] == [{"containerPort": 8000, "name": "api"}]
    assert pod["spec"]["terminationGracePeriodSeconds"] == 5
    assert pod["metadata"]["labels"]["team"] == "a"
    assert pod["metadata"]["annotations"] == {"b": "c"}
    assert "affinity" not in pod["spec"]


def test_a_port_of_the_template_keeps_its_name() -> None:
    ports = [{"name": "http", "containerPort": 9000}]
    containers = [{"name": "engine", "image": "e:1", "ports": ports}]
    made = workload(template={"spec": {"containers": containers}})
    (engine,) = made["spec"]["template"]["spec"]["containers"]
    added = {"name": "http-8000", "containerPort": 8000, "protocol": "TCP"}
    assert engine["ports"] == [*ports, added]


@pytest.mark.parametrize(
    ("kind", "api_version"),
    [("StatefulSet", "apps/v1"), ("LeaderWorkerSet", "leaderworkerset.x-k8s.io/v1")],
)
def test_other_kinds(kind: str, api_version: str) -> None:
    made = workload(template={**TEMPLATE["template"], "kind": kind, "groupSize": 2})
    assert (made["kind"], made["apiVersion"]) == (kind, api_version)
    pool = settings(template={**TEMPLATE["template"], "kind": kind})
    assert (pool.kubernetes.kind, pool.kubernetes.api_version) == (kind, api_version)


def test_a_queue_is_named_on_the_workload() -> None:
    made = workload(**TEMPLATE, queueName="gpus")
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"


# -- other autoscalers -----------------------------------------------------------------------------


def scaler(kind: str, name: str, namespace: str = "models") -> dict[str, Any]:
    return keep_scaler(
        {
            "metadata": {"name": "hpa", "namespace": namespace},
            "spec": {"scaleTargetRef": {"kind": kind, "name": name}, "maxReplicas": 3},
        }
    )


AHPA = {
    "metadata": {"name": "mine", "namespace": "models"},
    "spec": {"scaleTargetRef": {"kind": "Deployment", "name": "llama"}},
}


def test_an_autoscaler_of_the_same_workload_is_found() -> None:
    found = model_pool(**TARGET)
    spec = parse_spec(found)
    others = [scaler("Deployment", "other"), scaler("Deployment", "llama", "elsewhere")]
    assert find_scaler(found, spec, others) == ""
    assert "hpa" in find_scaler(found, spec, [*others, scaler("Deployment", "llama")])
    ahpa = keep_scaler({"kind": "Ahpa", **AHPA})
    assert find_scaler(found, spec, [ahpa]) == "Ahpa mine"
    own = model_pool(**TEMPLATE)
    assert find_scaler(own, parse_spec(own), [scaler("Deployment", "llama")])


# -- status ----------------------------------------------------------------------------------------


def report(**fields: Any) -> PoolReport:
    values: dict[str, Any] = {
        "name": "llama",
        "desired": 0,
        "override": None,
        "ready": 0,
        "starting": 0,
        "unhealthy": 0,
        "draining": 0,
        "sleeping": 0,
        "wake_eta_s": None,
        "last_decision": Decision(
            pool="llama",
            at_s=0.0,
            desired=fields.get("desired", 0),
            supply=0,
            reason=ScaleReason.AT_ZERO,
            detail="scaled to zero, no demand",
        ),
        "replicas": (),
    }
    return PoolReport(**(values | fields))


def conditions(status: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {one["type"]: (one["status"], one["reason"]) for one in status["conditions"]}


def test_a_pool_at_zero_is_ready() -> None:
    found = model_pool(**TARGET)
    scaling = Scaling(replicas=0, selector="app=llama")
    status = make_status(found, Verdict(), report(), scaling, "now")
    assert conditions(status) == {
        "Accepted": ("True", "Accepted"),
        "Ready": ("True", "AtZero"),
        "ScalingActive": ("True", "Scaling"),
    }
    assert (status["replicas"], status["selector"], status["reason"]) == (0, "app=llama", "AtZero")
    assert status["observedGeneration"] == 3


@pytest.mark.parametrize(
    ("fields", "verdict", "scaling", "expected"),
    [
        ({"ready": 2}, Verdict(), Scaling(), ("Ready", "True", "Serving")),
        ({"starting": 1}, Verdict(), Scaling(), ("Ready", "False", "Starting")),
        (
            {"failures": 2, "error": "no GPU"},
            Verdict(),
            Scaling(),
            ("Ready", "False", "StartFails"),
        ),
        ({"disabled": True}, Verdict(), Scaling(), ("Ready", "False", "Disabled")),
        (
            {},
            Verdict(problem="no", reason="NameConflict"),
            Scaling(),
            ("Accepted", "False", "NameConflict"),
        ),
        ({}, Verdict(scaler="HPA x"), Scaling(), ("ScalingActive", "False", "AnotherAutoscaler")),
        ({}, Verdict(), Scaling(error="403"), ("ScalingActive", "False", "WorkloadNotReached")),
        ({}, Verdict(), Scaling(scaled_by="keda"), ("ScalingActive", "False", "ScaledByAnother")),
    ],
)
def test_conditions(
    fields: dict[str, Any], verdict: Verdict, scaling: Scaling, expected: tuple[str, str, str]
) -> None:
    status = make_status(model_pool(**TARGET), verdict, report(**fields), scaling, "now")
    kind, *rest = expected
    assert conditions(status)[kind] == tuple(rest)


def test_a_condition_keeps_its_time_until_it_changes() -> None:
    found = model_pool(**TARGET)
    found["status"] = make_status(found, Verdict(), report(), Scaling(), "then")
    again = make_status(found, Verdict(), report(), Scaling(), "now")
    assert again == found["status"]
    changed = make_status(found, Verdict(), report(starting=1), Scaling(), "now")
    times = {one["type"]: one["lastTransitionTime"] for one in changed["conditions"]}
    assert times == {"Accepted": "then", "Ready": "now", "ScalingActive": "then"}
