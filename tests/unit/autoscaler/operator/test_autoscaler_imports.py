"""What AHPA's and Fluid's resources become: each field, and what is made of all of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.operator.imports.ahpa import ImportedPool, is_ahpa, map_ahpa
from autoscaler.operator.imports.bounds import windows_of
from autoscaler.operator.imports.fields import InvalidResource, MappedField, parse_quantity, unpack
from autoscaler.operator.imports.fluid import ImportedCache, is_fluid, map_fluid
from autoscaler.operator.model_pool import make_crd, parse_spec, to_settings
from autoscaler.policy.outlook import LEVELS
from autoscaler.policy.recommend import provision
from forecaster.cron import RecurringWindow
from modelcache.settings import ModelCacheSettings

NOW = dt.datetime(2026, 11, 30, 12)
TARGET = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "qwen"}


def ahpa(**spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "autoscaling.alibabacloud.com/v1beta1",
        "kind": "AdvancedHorizontalPodAutoscaler",
        "metadata": {"name": "qwen", "namespace": "models"},
        "spec": {"scaleTargetRef": TARGET, "maxReplicas": 5, "minReplicas": 1, **spec},
    }


def mapped(**spec: Any) -> ImportedPool:
    return map_ahpa(ahpa(**spec), now=NOW)


def made(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = mapped(**spec).model_pool["spec"]
    return found


def resource_metric(name: str, **target: Any) -> dict[str, Any]:
    return {"type": "Resource", "resource": {"name": name, "target": target}}


def said(fields: Mapping[str, MappedField], field: str) -> tuple[str, str]:
    return fields[field].outcome, fields[field].became


def by_field(found: ImportedPool | ImportedCache) -> dict[str, MappedField]:
    return {one.field: one for one in found.fields}


# -- AHPA ------------------------------------------------------------------------------------------

WHOLE = """
apiVersion: autoscaling.alibabacloud.com/v1beta1
kind: AdvancedHorizontalPodAutoscaler
metadata:
  name: qwen
  namespace: models
  annotations: {kubectl.kubernetes.io/last-applied-configuration: "{}"}
  managedFields: [{manager: kubectl, operation: Update}]
spec:
  scaleStrategy: auto
  metrics:
  - type: Resource
    resource: {name: gpu, target: {type: Utilization, averageUtilization: 20}}
  - type: Resource
    resource: {name: cpu, target: {type: Utilization, averageUtilization: 40}}
  - type: Resource
    resource: {name: qps, target: {type: AverageValue, averageValue: "2500m"}}
  - type: Resource
    resource: {name: rt, target: {type: Value, value: 30000}}
  - type: External
    external: {metric: {name: jobs}, target: {type: AverageValue, averageValue: 10}}
  scaleTargetRef: {apiVersion: apps/v1, kind: StatefulSet, name: qwen}
  minReplicas: 0
  maxReplicas: 50
  stabilizationWindowSeconds: 300
  prediction: {quantile: 95, scaleUpForward: 180}
  instanceBounds:
  - startTime: "2021-12-16 00:00:00"
    endTime: "2031-12-16 00:00:00"
    bounds:
    - {cron: "* 0-8 ? * MON-FRI", minReplicas: 4, maxReplicas: 15}
    - {cron: "* 9-23 ? * MON-FRI", minReplicas: 10, maxReplicas: 20}
status:
  currentReplicas: 2
  desiredReplicas: 2
"""


def test_a_whole_ahpa_is_a_model_pool_that_is_accepted() -> None:
    found = map_ahpa(yaml.safe_load(WHOLE), timezone="Asia/Shanghai", now=NOW)
    pool = found.model_pool
    assert pool["metadata"] == {"name": "qwen", "namespace": "models"}
    assert pool["spec"] == {
        "targetRef": {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "qwen"},
        "minReplicas": 0,
        "maxReplicas": 50,
        "mode": "auto",
        "scaleDownDelaySeconds": 300,
        "violatedSecondPrice": 19.0,
        "targets": {"gpuUtilizationFraction": 0.2, "requestsPerSecond": 2.5, "e2eSeconds": 30.0},
        "schedules": [
            {
                "name": "AHPA * 0-8 ? * MON-FRI",
                "cron": "0 0 * * mon-fri",
                "durationSeconds": 9 * 3600,
                "timezone": "Asia/Shanghai",
                "minReplicas": 4,
                "maxReplicas": 15,
            },
            {
                "name": "AHPA * 9-23 ? * MON-FRI",
                "cron": "0 9 * * mon-fri",
                "durationSeconds": 15 * 3600,
                "timezone": "Asia/Shanghai",
                "minReplicas": 10,
                "maxReplicas": 20,
            },
        ],
    }
    settings = to_settings(pool, parse_spec(pool))
    assert (settings.targets.requests_per_s, settings.targets.e2e_s) == (2.5, 30.0)
    assert settings.targets.gpu_utilization_fraction == 0.2
    assert settings.violated_second_price == 19.0
    assert settings.schedules[1].bounds.min_replicas == 10
    (version,) = make_crd()["spec"]["versions"]
    jsonschema.Draft4Validator(version["schema"]["openAPIV3Schema"]).validate(pool)
    outcomes = {one.field: one.outcome for one in found.fields}
    assert outcomes == {
        "metadata.annotations": "not needed",
        "status": "not needed",
        "spec.scaleTargetRef": "kept",
        "spec.minReplicas": "kept",
        "spec.maxReplicas": "kept",
        "spec.scaleStrategy": "kept",
        "spec.stabilizationWindowSeconds": "kept",
        "spec.prediction.quantile": "changed",
        "spec.prediction.scaleUpForward": "not needed",
        "spec.metrics[0]": "kept",
        "spec.metrics[1]": "not supported",
        "spec.metrics[2]": "kept",
        "spec.metrics[3]": "changed",
        "spec.metrics[4]": "not supported",
        "spec.instanceBounds[0].startTime": "not needed",
        "spec.instanceBounds[0].endTime": "not supported",
        "spec.instanceBounds[0].bounds[0]": "changed",
        "spec.instanceBounds[0].bounds[1]": "changed",
    }


@pytest.mark.parametrize(
    ("strategy", "mode", "outcome"),
    [
        ("auto", "auto", "kept"),
        ("observer", "observe", "kept"),
        ("scalingUpOnly", "observe", "not supported"),
        (None, "observe", "changed"),
    ],
)
def test_what_is_not_known_to_scale_only_observes(
    strategy: str | None, mode: str, outcome: str
) -> None:
    found = mapped(scaleStrategy=strategy)
    assert found.model_pool["spec"]["mode"] == mode
    assert by_field(found)["spec.scaleStrategy"].outcome == outcome


@pytest.mark.parametrize(
    ("quantile", "price"), [(95, 19.0), (99, 99.0), ("0.9", 9.0), (50, 1.0), (99.9, 999.0)]
)
def test_a_quantile_is_the_price_that_covers_it(quantile: Any, price: float) -> None:
    assert made(prediction={"quantile": quantile})["violatedSecondPrice"] == price


@pytest.mark.parametrize("mean", [2.0, 5.0, 20.0])
@pytest.mark.parametrize("spread", [0.1, 0.3, 0.5])
@pytest.mark.parametrize("quantile", [0.8, 0.9, 0.95, 0.99])
def test_the_price_of_a_quantile_covers_it(quantile: float, spread: float, mean: float) -> None:
    price = made(prediction={"quantile": quantile})["violatedSecondPrice"]
    demand = NormalDist(mean, spread * mean)
    rates = tuple(max(0.0, demand.inv_cdf(level)) for level in LEVELS)
    replicas, _ = provision(LEVELS, rates, 1.0, price)
    assert demand.cdf(replicas) >= quantile
    # And it is no price at which everything is covered.
    assert replicas <= demand.inv_cdf(0.9999) + 1.0


@pytest.mark.parametrize(
    ("metric", "targets", "outcome"),
    [
        (resource_metric("rps", averageValue=4), {"requestsPerSecond": 4.0}, "kept"),
        (resource_metric("qps", type="Value", value=400), None, "not supported"),
        (resource_metric("rt", averageValue="500"), {"e2eSeconds": 0.5}, "changed"),
        (resource_metric("memory", averageValue="10Gi"), None, "not supported"),
        (resource_metric("tokens", averageValue=3), None, "not supported"),
        ({"type": "Pods", "pods": {"metric": {"name": "x"}}}, None, "not supported"),
    ],
)
def test_metrics(metric: Any, targets: Any, outcome: str) -> None:
    found = mapped(metrics=[metric])
    assert found.model_pool["spec"].get("targets") == targets
    assert by_field(found)["spec.metrics[0]"].outcome == outcome


def bounds(*given: Any, **times: str) -> dict[str, Any]:
    return {"instanceBounds": [{**times, "bounds": list(given)}]}


def bound(cron: str, **limits: int) -> dict[str, Any]:
    return {"cron": cron, **(limits or {"minReplicas": 1, "maxReplicas": 2})}


def test_bounds_that_have_ended_or_not_begun_are_left_out() -> None:
    spec = bounds(bound("* * * * *"), endTime="2026-11-30 11:59:59")
    assert "schedules" not in made(**spec)
    field = by_field(mapped(**spec))["spec.instanceBounds[0].bounds[0]"]
    assert field.outcome == "not needed"
    spec = bounds(bound("* * * * *"), startTime="2026-11-30 12:00:01")
    assert "schedules" not in made(**spec)
    field = by_field(mapped(**spec))["spec.instanceBounds[0].bounds[0]"]
    assert field.outcome == "not supported"


def test_bounds_that_overlap_are_said_to() -> None:
    spec = bounds(bound("* 0-9 ? * MON"), bound("* 9-12 ? * MON-TUE"), bound("* 0-9 ? * WED"))
    fields = [one for one in mapped(**spec).fields if "overlap" in one.became]
    assert [one.field for one in fields] == ["spec.instanceBounds[0].bounds[1]"]
    assert "bounds[0]" in fields[0].became


@pytest.mark.parametrize("cron", ["* 0-8 L * ?", "0 * 0-8 ? * MON-FRI", "* 25 * * *", "sometimes"])
def test_an_expression_that_no_schedule_has_is_said_and_left_out(cron: str) -> None:
    found = mapped(**bounds(bound(cron), bound("* 1 * * *")))
    assert len(found.model_pool["spec"]["schedules"]) == 1
    assert by_field(found)["spec.instanceBounds[0].bounds[0]"].outcome == "not supported"


def test_no_field_is_passed_over_in_silence() -> None:
    found = by_field(
        mapped(
            scaleDown={"policies": []},
            prediction={"quantile": 95, "algorithm": "x"},
            metrics=[resource_metric("gpu", averageUtilization=20, extra=1)],
            **bounds({**bound("* 1 * * *"), "holiday": True}),
        )
    )
    for field in (
        "spec.scaleDown",
        "spec.prediction.algorithm",
        "spec.metrics[0].resource.target.extra",
        "spec.instanceBounds[0].bounds[0].holiday",
    ):
        assert found[field].outcome == "not supported"


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"maxReplicas": None}, ["spec.maxReplicas", "missing"]),
        ({"maxReplicas": 0}, ["spec.maxReplicas", "'0'", "1 to 10000"]),
        ({"minReplicas": 9}, ["spec.minReplicas", "9", "5"]),
        ({"minReplicas": "1"}, ["spec.minReplicas", "whole number"]),
        ({"scaleTargetRef": None}, ["spec.scaleTargetRef"]),
        ({"scaleTargetRef": {**TARGET, "name": "Q!"}}, ["spec.scaleTargetRef.name", "'Q!'"]),
        (
            {"scaleTargetRef": {"apiVersion": "serving.knative.dev/v1", "name": "q"}},
            ["spec.scaleTargetRef.apiVersion", "/scale"],
        ),
        ({"stabilizationWindowSeconds": -1}, ["stabilizationWindowSeconds", "'-1'", "86400"]),
        ({"prediction": {"quantile": 100}}, ["spec.prediction.quantile", "100"]),
        ({"prediction": {"quantile": "high"}}, ["spec.prediction.quantile", "'high'"]),
        ({"prediction": []}, ["spec.prediction", "no object"]),
        ({"metrics": {}}, ["spec.metrics", "a list"]),
        ({"metrics": [resource_metric("gpu", averageUtilization=120)]}, ["metrics[0]", "120"]),
        ({"metrics": [resource_metric("qps")]}, ["metrics[0]", "averageValue"]),
        ({"metrics": [resource_metric("rt", value=0)]}, ["metrics[0]", "above 0"]),
        (
            {"metrics": [resource_metric("gpu", averageUtilization=1)] * 2},
            ["spec.metrics[1]", "twice"],
        ),
        (bounds(bound("* * * * *", minReplicas=3, maxReplicas=2)), ["bounds[0].minReplicas", "3"]),
        (bounds({"cron": "* * * * *"}), ["bounds[0]", "neither"]),
        (bounds(bound("* * * * *"), startTime="yesterday"), ["startTime", "'yesterday'"]),
        (
            bounds(startTime="2026-01-02 00:00:00", endTime="2026-01-01 00:00:00"),
            ["endTime", "after"],
        ),
        (bounds(*[bound(f"{at % 60} * * * *") for at in range(101)]), ["instanceBounds", "101"]),
    ],
)
def test_what_is_not_as_ahpa_has_it_is_refused(spec: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidResource) as caught:
        mapped(**spec)
    assert [word for word in words if word not in str(caught.value)] == []


# -- cron ------------------------------------------------------------------------------------------

MONDAY = dt.datetime(2026, 11, 30, tzinfo=dt.UTC)
DAYS = 14


def value_lists(low: int, high: int) -> st.SearchStrategy[tuple[str, frozenset[int]]]:
    """What may stand in a field of a cron expression, and which values it means."""
    number = st.integers(low, high)
    ranges = st.tuples(number, number).map(lambda ends: (min(ends), max(ends)))
    part = st.one_of(
        number.map(lambda one: (str(one), frozenset({one}))),
        ranges.map(lambda ends: (f"{ends[0]}-{ends[1]}", frozenset(range(ends[0], ends[1] + 1)))),
        st.integers(2, 12).map(lambda step: (f"*/{step}", frozenset(range(low, high + 1, step)))),
    )
    lists = st.lists(part, min_size=1, max_size=3).map(
        lambda parts: (
            ",".join(text for text, _ in parts),
            frozenset(value for _, values in parts for value in values),
        )
    )
    return st.one_of(st.just(("*", frozenset(range(low, high + 1)))), lists)


@settings(max_examples=80, deadline=None)
@given(
    minutes=value_lists(0, 59),
    hours=value_lists(0, 23),
    weekdays=st.one_of(
        st.just(("*", frozenset(range(7)))),
        st.sets(st.integers(0, 6), min_size=1).map(
            lambda days: (",".join(map(str, sorted(days))), frozenset(days))
        ),
        st.just(("MON-FRI", frozenset(range(1, 6)))),
    ),
)
def test_windows_are_exactly_the_minutes_that_match(
    minutes: tuple[str, frozenset[int]],
    hours: tuple[str, frozenset[int]],
    weekdays: tuple[str, frozenset[int]],
) -> None:
    windows = windows_of(f"{minutes[0]} {hours[0]} ? * {weekdays[0]}")
    assert len(windows) <= 10
    begin_s, end_s = MONDAY.timestamp(), (MONDAY + dt.timedelta(days=DAYS)).timestamp()
    covered: set[int] = set()
    for one in windows:
        window = RecurringWindow.parse(one.cron, one.duration_s)
        for start_s in window.starts(begin_s - one.duration_s, end_s):
            covered |= set(range(round(start_s), round(start_s + one.duration_s), 60))
    expected = set()
    at = MONDAY
    for _ in range(DAYS * 24 * 60):
        if at.minute in minutes[1] and at.hour in hours[1] and at.isoweekday() % 7 in weekdays[1]:
            expected.add(round(at.timestamp()))
        at += dt.timedelta(minutes=1)
    assert {one for one in covered if begin_s <= one < end_s} == expected


def test_a_window_is_as_long_as_its_hours() -> None:
    assert [(one.cron, one.duration_s) for one in windows_of("* 0-6,22,23 ? * SAT")] == [
        ("0 22 * * sat", 7200.0),
        ("0 0 * * sat", 25200.0),
    ]
    assert [(one.cron, one.duration_s) for one in windows_of("*/30 8-9 1 JAN ?")] == [
        ("0,30 8-9 1 jan *", 60.0)
    ]


# -- Fluid -----------------------------------------------------------------------------------------

FLUID = """
apiVersion: data.fluid.io/v1alpha1
kind: DatasetList
items:
- metadata: {name: llm, namespace: models}
  spec:
    mounts:
    - mountPoint: oss://models/llm/
      name: qwen
      options: {fs.oss.endpoint: oss-cn-hangzhou-internal.aliyuncs.com, fs.jindo.x: "1"}
      encryptOptions:
      - {name: fs.oss.accessKeyId, valueFrom: {secretKeyRef: {name: oss, key: id}}}
      - {name: fs.oss.accessKeySecret, valueFrom: {secretKeyRef: {name: oss, key: secret}}}
    - {mountPoint: s3a://weights/llama, name: llama, path: /meta, readOnly: true}
    - {mountPoint: pvc://claim/models, name: claim}
    - {mountPoint: local:///mnt/models, name: local}
    - {mountPoint: hdfs://namenode:9000/models, name: hdfs}
    nodeAffinity:
      required:
        nodeSelectorTerms:
        - matchExpressions: [{key: gpu, operator: In, values: [h200]}]
    tolerations: [{key: spot, operator: Exists}]
    accessModes: [ReadOnlyMany]
    placement: Shared
    owner: {uid: 1000}
  status: {phase: Bound}
---
apiVersion: data.fluid.io/v1alpha1
kind: JindoRuntime
metadata: {name: llm, namespace: models}
spec:
  replicas: 3
  tieredstore:
    levels:
    - {mediumtype: MEM, path: /dev/shm, quota: 8Gi}
    - {mediumtype: SSD, path: /mnt/nvme, quota: 400Gi, high: "0.95", low: "0.7"}
  fuse: {args: [-ometrics_port=0]}
---
apiVersion: data.fluid.io/v1alpha1
kind: DataLoad
metadata: {name: warm, namespace: models}
spec:
  dataset: {name: llm, namespace: models}
  loadMetadata: true
  target: [{path: /qwen/qwen3-8b, replicas: 2}, {path: /meta}, {path: /nowhere}]
  policy: Cron
  schedule: "0 18 * * *"
---
apiVersion: data.fluid.io/v1alpha1
kind: DataProcess
metadata: {name: quantize, namespace: models}
spec:
  dataset: {name: llm, namespace: models, mountPath: /data, subPath: qwen/qwen3-8b}
  processor:
    script:
      image: python
      command: [bash]
      source: python quantize.py /data/x /database /mnt/data "/data"
      env: [{name: BITS, value: "4"}, {name: KEY, valueFrom: {secretKeyRef: {name: a, key: b}}}]
"""


def cache(text: str) -> ImportedCache:
    found = unpack(list(yaml.safe_load_all(text)))
    assert all(map(is_fluid, found))
    return map_fluid(found)


def cache_volume() -> str:
    """The name of the volume that the agents' DaemonSet has their cache in."""
    deployed = Path(__file__).resolve().parents[4] / "deploy" / "kubernetes" / "cache-agent"
    pod = yaml.safe_load((deployed / "daemonset.yaml").read_text())["spec"]["template"]["spec"]
    (name,) = (one["name"] for one in pod["volumes"] if "hostPath" in one)
    return str(name)


def test_a_dataset_and_what_belongs_to_it() -> None:
    found = cache(FLUID)
    assert found.models == ["oss://models/llm", "s3://weights/llama"]
    assert found.commands == [
        "0 18 * * *  tidegate model preload oss://models/llm/qwen3-8b",
        "0 18 * * *  tidegate model preload s3://weights/llama",
    ]
    patch = found.patch
    assert patch is not None
    spec = patch["spec"]["template"]["spec"]
    (agent,) = spec["containers"]
    assert agent["env"] == [
        {"name": "TIDEGATE__MODELCACHE__QUOTA_BYTES", "value": str(400 * 2**30)},
        {"name": "OSS_ENDPOINT", "value": "oss-cn-hangzhou-internal.aliyuncs.com"},
        {
            "name": "OSS_ACCESS_KEY_ID",
            "valueFrom": {"secretKeyRef": {"name": "oss", "key": "id"}},
        },
        {
            "name": "OSS_ACCESS_KEY_SECRET",
            "valueFrom": {"secretKeyRef": {"name": "oss", "key": "secret"}},
        },
    ]
    terms = spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert terms["nodeSelectorTerms"][0]["matchExpressions"][0]["values"] == ["h200"]
    assert {one["key"] for one in spec["tolerations"]} == {"spot", "nvidia.com/gpu"}
    assert spec["volumes"] == [
        {"name": cache_volume(), "hostPath": {"path": "/mnt/nvme", "type": "Directory"}}
    ]
    settings = ModelCacheSettings.model_validate(found.settings["modelcache"])
    assert settings.quota_bytes == 400 * 2**30
    assert settings.page_budget_bytes == 8 * 2**30
    (step,) = settings.steps_for("oss://models/llm/qwen3-8b")
    script = 'python quantize.py {input}/x /database /mnt/data "{input}"'
    assert step.argv == ("bash", "-c", script)
    assert step.env == {"BITS": "4"}


def test_each_field_of_fluid_is_said() -> None:
    found = {(one.resource, one.field): one.outcome for one in cache(FLUID).fields}
    assert found == {
        ("Dataset/llm", "status"): "not needed",
        ("Dataset/llm", "spec.mounts[0].mountPoint"): "kept",
        ("Dataset/llm", "spec.mounts[0].options.fs.oss.endpoint"): "kept",
        ("Dataset/llm", "spec.mounts[0].options.fs.jindo.x"): "not supported",
        ("Dataset/llm", "spec.mounts[0].encryptOptions[0]"): "kept",
        ("Dataset/llm", "spec.mounts[0].encryptOptions[1]"): "kept",
        ("Dataset/llm", "spec.mounts[1].mountPoint"): "changed",
        ("Dataset/llm", "spec.mounts[1].readOnly"): "not needed",
        ("Dataset/llm", "spec.mounts[2].mountPoint"): "not supported",
        ("Dataset/llm", "spec.mounts[3].mountPoint"): "not supported",
        ("Dataset/llm", "spec.mounts[4].mountPoint"): "not supported",
        ("Dataset/llm", "spec.nodeAffinity.required"): "kept",
        ("Dataset/llm", "spec.tolerations"): "kept",
        ("Dataset/llm", "spec.accessModes"): "not needed",
        ("Dataset/llm", "spec.placement"): "not needed",
        ("Dataset/llm", "spec.owner"): "not needed",
        ("JindoRuntime/llm", "spec.tieredstore.levels[0].quota"): "changed",
        ("JindoRuntime/llm", "spec.tieredstore.levels[1].quota"): "kept",
        ("JindoRuntime/llm", "spec.tieredstore.levels[1].path"): "kept",
        ("JindoRuntime/llm", "spec.tieredstore.levels[1].high"): "not needed",
        ("JindoRuntime/llm", "spec.tieredstore.levels[1].low"): "not needed",
        ("JindoRuntime/llm", "spec.replicas"): "not needed",
        ("JindoRuntime/llm", "spec.fuse"): "not needed",
        ("DataProcess/quantize", "spec.dataset.name"): "kept",
        ("DataProcess/quantize", "spec.processor.script.env[0]"): "kept",
        ("DataProcess/quantize", "spec.processor.script.env[1]"): "not supported",
        ("DataProcess/quantize", "spec.processor.script"): "changed",
        ("DataProcess/quantize", "spec.processor.script.image"): "not supported",
        ("DataProcess/quantize", "spec.dataset.mountPath"): "changed",
        ("DataProcess/quantize", "spec.dataset.subPath"): "kept",
        ("DataLoad/warm", "spec.dataset.name"): "kept",
        ("DataLoad/warm", "spec.policy"): "changed",
        ("DataLoad/warm", "spec.schedule"): "kept",
        ("DataLoad/warm", "spec.target[0].path"): "changed",
        ("DataLoad/warm", "spec.target[0].replicas"): "changed",
        ("DataLoad/warm", "spec.target[1].path"): "changed",
        ("DataLoad/warm", "spec.target[2].path"): "not supported",
        ("DataLoad/warm", "spec.loadMetadata"): "not needed",
    }


def fluid(kind: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "data.fluid.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": "x", "namespace": "models"},
        "spec": spec,
    }


def mount(point: str, **more: Any) -> dict[str, Any]:
    return {"mountPoint": point, "name": "m", **more}


def test_a_secret_in_the_clear_is_shown_nowhere() -> None:
    secret = "wJalrXUtnFEMIK7MDENG"
    options = {"aws.accessKeyId": "AKIAIOSFODNN7EXAMPLE", "aws.secretKey": secret}
    found = map_fluid([fluid("Dataset", mounts=[mount("s3://models/x", options=options)])])
    assert secret not in repr(found)
    assert "AKIAIOSFODNN7EXAMPLE" not in repr(found)
    assert [one["valueFrom"]["secretKeyRef"]["name"] for one in found.env] == [
        "tidegate-store-credentials"
    ] * 2


def test_agents_have_one_key_of_a_store() -> None:
    def key(name: str) -> list[dict[str, Any]]:
        ref = {"secretKeyRef": {"name": name, "key": "id"}}
        return [{"name": "access-key", "valueFrom": ref}]

    mounts = [
        mount("s3://one/x", encryptOptions=key("one")),
        mount("s3://two/x", encryptOptions=key("two")),
    ]
    found = map_fluid([fluid("Dataset", mounts=mounts)])
    assert [one["name"] for one in found.env] == ["AWS_ACCESS_KEY_ID"]
    assert found.fields[-1].outcome == "not supported"
    assert "second set of agents" in found.fields[-1].became


def test_a_page_of_the_hub_is_the_hubs_model() -> None:
    found = map_fluid([fluid("Dataset", mounts=[mount("https://huggingface.co/Qwen/Qwen3-8B")])])
    assert found.models == ["hf://Qwen/Qwen3-8B"]
    assert found.patch is None


def test_a_load_of_a_dataset_that_is_not_given_says_so() -> None:
    found = map_fluid([fluid("DataLoad", dataset={"name": "other"}, target=[{"path": "/"}])])
    assert found.commands == []
    assert by_field(found)["spec.dataset.name"].outcome == "not supported"


@pytest.mark.parametrize(
    ("path", "urls"),
    [
        ("/", ["s3://models/llm"]),
        ("/m", ["s3://models/llm"]),
        ("/m/a/b", ["s3://models/llm/a/b"]),
        ("/a b", ["'s3://models/llm/a b'"]),
    ],
)
def test_a_path_of_a_dataset_is_a_url(path: str, urls: list[str]) -> None:
    found = map_fluid(
        [
            fluid("Dataset", mounts=[mount("s3://models/llm")]),
            fluid("DataLoad", dataset={"name": "x"}, target=[{"path": path}]),
        ]
    )
    assert found.commands == [f"tidegate model preload {url}" for url in urls]


def test_the_newer_runtime_says_its_quota_too() -> None:
    levels = [{"path": ["/a"], "quota": ["100Gi"]}]
    found = map_fluid([fluid("CacheRuntime", worker={"tieredStore": {"levels": levels}})])
    assert found.quota_bytes == 100 * 2**30


def test_a_job_and_other_operations_are_explained() -> None:
    found = map_fluid(
        [
            fluid("Dataset", mounts=[mount("s3://models/llm")]),
            fluid(
                "DataProcess",
                dataset={"name": "x", "mountPath": "/data"},
                processor={"job": {"podSpec": {}}, "serviceAccountName": "a"},
            ),
            fluid("DataMigrate"),
        ]
    )
    assert found.settings == {}
    outcomes = by_field(found)
    assert outcomes["spec.processor.job"].outcome == "not supported"
    assert outcomes["spec.processor.serviceAccountName"].outcome == "not supported"
    assert "replicate" in outcomes["kind"].became


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (fluid("Dataset", mounts=[{"name": "x"}]), ["Dataset/x", "mounts[0].mountPoint"]),
        (fluid("Dataset", mounts=[mount("s3://user:word@b/x")]), ["mounts[0].mountPoint"]),
        (
            fluid("Dataset", mounts=[mount("s3://b2b/x", encryptOptions=[{"name": "k"}])]),
            ["encryptOptions[0].valueFrom"],
        ),
        (fluid("Dataset", tolerations={}), ["spec.tolerations"]),
        (fluid("DataLoad"), ["DataLoad/x", "spec.dataset"]),
        (fluid("DataLoad", dataset={"name": "x"}, policy="Cron"), ["spec.schedule"]),
        (fluid("DataProcess", dataset={"name": "x"}), ["spec.processor"]),
        (
            fluid("JindoRuntime", tieredstore={"levels": [{"quota": "much"}]}),
            ["levels[0].quota", "'much'"],
        ),
    ],
)
def test_what_is_not_as_fluid_has_it_is_refused(found: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InvalidResource) as caught:
        map_fluid([found])
    assert [word for word in words if word not in str(caught.value)] == []
    assert "word@" not in str(caught.value)


# -- reading ---------------------------------------------------------------------------------------


def test_lists_are_their_items() -> None:
    one = ahpa()
    listed = {"apiVersion": one["apiVersion"], "kind": f"{one['kind']}List", "items": [{}, one]}
    found = unpack([None, {"apiVersion": "v1", "kind": "List", "items": [one, listed]}])
    assert [is_ahpa(each) for each in found] == [True, True, True]
    for wrong in ("text", [], {"items": []}, {"kind": "List", "items": ["text"]}):
        with pytest.raises(InvalidResource):
            unpack([wrong])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("10", 10.0),
        ("2500m", 2.5),
        ("1.5k", 1500.0),
        ("400Gi", 400 * 2.0**30),
        ("1e400", None),
        ("-1", None),
        ("", None),
        ("9" * 30, None),
    ],
)
def test_quantities(text: str, value: float | None) -> None:
    assert parse_quantity(text) == value
