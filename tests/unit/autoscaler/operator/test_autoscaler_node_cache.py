"""Engines that start from the cache of their node, and the Job that brings a model to nodes."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.operator.manifests import MEMORY_VOLUME, make_workload
from autoscaler.operator.model_pool import parse_spec
from autoscaler.operator.node_cache import LINK, NodeCacheAccess, digest_of, image_to_keep
from autoscaler.operator.node_labels import AGENT_LABEL, label_of
from autoscaler.operator.preload_job import find_preloaded, job_name, make_preload_job

ACCESS = NodeCacheAccess(image="tidegate:1", directory="/mnt/tidegate")
QWEN = "hf://Qwen/Qwen3-8B"
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"


def model_pool(pod: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    pod = {"containers": [{"name": "engine", "image": "vllm:1"}], **(pod or {})}
    given = {"model": QWEN, "engine": "vllm", "template": {"spec": pod}, **spec}
    metadata = {"name": "llama", "namespace": "models", "uid": "u1"}
    return {"metadata": metadata, "spec": given}


def make_pod(pod: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    found = model_pool(pod, useNodeCache=True, **spec)
    workload = make_workload(found, parse_spec(found), access=ACCESS)
    made: dict[str, Any] = workload["spec"]["template"]["spec"]
    return made


def make_job(pod: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    found = model_pool(pod, **{"preloadNodes": 3, **spec})
    return make_preload_job(found, parse_spec(found), ACCESS)


def test_the_engine_opens_what_the_container_beside_it_holds() -> None:
    pod = make_pod()
    (engine,), (holder,) = pod["containers"], pod["initContainers"]
    assert LINK in engine["args"]
    assert QWEN not in engine["args"]
    assert holder["command"] == ["tidegate", "model", "hold", QWEN, "--link", LINK]
    assert holder["restartPolicy"] == "Always"
    assert holder["startupProbe"]["exec"]["command"] == ["test", "-d", LINK]
    volumes = {one["name"]: one for one in pod["volumes"]}
    of_engine = {one["name"]: one for one in engine["volumeMounts"]}
    for of_all in (volumes, of_engine):
        del of_all[MEMORY_VOLUME]
    of_holder = {one["name"]: one for one in holder["volumeMounts"]}
    assert set(volumes) == set(of_engine) == set(of_holder)
    for name, mount in of_engine.items():
        # A link into the cache is good in both only where both have it in one place.
        assert mount["mountPath"] == of_holder[name]["mountPath"]
        assert mount["readOnly"]
        assert not of_holder[name].get("readOnly")
    (cache,) = (one["hostPath"] for one in volumes.values() if "hostPath" in one)
    assert cache == {"path": "/mnt/tidegate", "type": "Directory"}
    said = {one["name"]: one["value"] for one in holder["env"]}
    assert all(value.startswith("/mnt/tidegate/") for value in said.values())


def test_what_the_template_has_stays() -> None:
    term = {"matchExpressions": [{"key": "gpu", "operator": "Exists"}]}
    given: dict[str, Any] = {
        "containers": [
            {"name": "log", "image": "l:1"},
            {"name": "engine", "image": "e:1", "volumeMounts": [{"name": "a", "mountPath": "/a"}]},
        ],
        "initContainers": [{"name": "mine", "image": "i:1"}],
        "volumes": [{"name": "a", "emptyDir": {}}],
        "affinity": {"nodeAffinity": {REQUIRED: {"nodeSelectorTerms": [term, {}]}}},
    }
    found = model_pool(given, useNodeCache=True)
    before = repr(found)
    pod = make_pod(given)
    assert repr(found) == before
    assert [one["name"] for one in pod["initContainers"]] == ["model", "mine"]
    assert pod["volumes"][0]["name"] == "a"
    assert "volumeMounts" not in pod["containers"][0]
    assert pod["containers"][1]["volumeMounts"][0] == {"name": "a", "mountPath": "/a"}
    terms = pod["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
    agent = {"key": AGENT_LABEL, "operator": "Exists"}
    # A node needs one of the terms, so each has to want the agent.
    assert [one["matchExpressions"] for one in terms] == [
        [{"key": "gpu", "operator": "Exists"}, agent],
        [agent],
    ]


def test_without_the_cache_engines_fetch_the_model_themselves() -> None:
    found = model_pool()
    workload = make_workload(found, parse_spec(found))
    pod = workload["spec"]["template"]["spec"]
    # vLLM knows a model of the hub by its name.
    assert pod["containers"][0]["args"][0] == QWEN.removeprefix("hf://")
    assert "initContainers" not in pod
    assert not any("hostPath" in one for one in pod["volumes"])


@pytest.mark.parametrize(
    ("model", "arguments"),
    [
        ("hf://a/b@v1", ["a/b", "--revision", "v1"]),
        ("a/b", ["a/b"]),
        ("/mnt/b", ["/mnt/b"]),
        ("s3://bucket/b", ["s3://bucket/b"]),
    ],
)
def test_the_engine_is_told_the_model_as_it_knows_it(model: str, arguments: list[str]) -> None:
    found = model_pool(model=model, engineArgs=["--seed", "1"])
    pod = make_workload(found, parse_spec(found))["spec"]["template"]["spec"]
    args = pod["containers"][0]["args"]
    assert args[0] == arguments[0]
    assert ("--revision" in args) == (len(arguments) > 1)
    assert args[-2:] == ["--seed", "1"]
    assert set(arguments) <= set(args)


def test_a_job_has_one_pod_for_each_node_where_engines_may_run() -> None:
    placing = {"nodeSelector": {"gpu": "h200"}, "tolerations": [{"operator": "Exists"}]}
    job = make_job(placing)
    assert job["metadata"]["name"] == job_name("llama")
    assert job["metadata"]["ownerReferences"][0]["uid"] == "u1"
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["suspend"]) == (3, 3, False)
    pod = spec["template"]["spec"]
    assert (pod["nodeSelector"], pod["tolerations"]) == tuple(placing.values())
    (apart,) = pod["affinity"]["podAntiAffinity"][REQUIRED]
    selected = apart["labelSelector"]["matchLabels"].items()
    assert selected <= spec["template"]["metadata"]["labels"].items()
    node = pod["affinity"]["nodeAffinity"]
    assert AGENT_LABEL in str(node[REQUIRED])
    assert label_of(QWEN) in str(node["preferredDuringSchedulingIgnoredDuringExecution"])
    assert pod["containers"][0]["command"] == ["tidegate", "model", "preload", QWEN]


def test_a_queue_admits_it_and_a_change_is_seen() -> None:
    plain, queued = make_job(), make_job(queueName="inference")
    assert queued["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "inference"
    assert queued["spec"]["suspend"] is True
    others = [make_job(preloadNodes=4), make_job(model="hf://a/b"), make_job({"nodeSelector": {}})]
    digests = [digest_of(one) for one in (plain, queued, *others)]
    assert len(set(digests)) == len(digests)
    assert digest_of(make_job()) == digest_of(plain)
    assert digest_of({"metadata": {}}) == ""


@pytest.mark.parametrize("kind", ["Deployment", "StatefulSet", "LeaderWorkerSet"])
def test_another_version_of_tidegate_starts_no_engine_again(kind: str) -> None:
    def make(image: str, **spec: Any) -> dict[str, Any]:
        found = model_pool(useNodeCache=True, **spec)
        found["spec"]["template"]["kind"] = kind
        access = NodeCacheAccess(image=image, directory="/mnt/tidegate")
        return make_workload(found, parse_spec(found), access=access)

    there = make("tidegate:1")
    assert image_to_keep(there, make("tidegate:2")) == "tidegate:1"
    assert image_to_keep(there, make("tidegate:2", engineArgs=["--seed", "1"])) is None
    found = model_pool()
    plain = make_workload(found, parse_spec(found))
    assert image_to_keep(plain, make("tidegate:2")) is None
    assert image_to_keep(there, plain) is None
    assert digest_of(make_job()) == digest_of(
        make_preload_job(
            model_pool(preloadNodes=3),
            parse_spec(model_pool(preloadNodes=3)),
            NodeCacheAccess(image="tidegate:2", directory="/mnt/tidegate"),
        )
    )


def test_names_are_good_and_different() -> None:
    long = ["a" * 253, "a" * 252 + "b", "a.b" * 20, "llama"]
    names = [job_name(one) for one in long]
    assert len(set(names)) == len(long)
    assert all(len(one) <= 63 for one in names)


DONE = {"type": "Complete", "status": "True"}
FAILED = {"type": "Failed", "status": "True", "message": "too often"}


@pytest.mark.parametrize(
    ("job", "error", "status", "reason", "says"),
    [
        (None, "forbidden", "False", "JobNotMade", "forbidden"),
        (None, "", "Unknown", "JobNotMade", "not there yet"),
        ({"spec": {"suspend": True}}, "", "False", "WaitingForAdmission", "queue q"),
        ({"status": {"active": 2, "succeeded": 1}}, "", "False", "Preloading", "1 of 3 nodes"),
        ({"status": {"succeeded": 3, "conditions": [DONE]}}, "", "True", "Complete", "3 of 3"),
        ({"status": {"conditions": [FAILED]}}, "", "False", "Failed", "too often"),
    ],
)
def test_its_condition(job: Any, error: str, status: str, reason: str, says: str) -> None:
    spec = parse_spec(model_pool(preloadNodes=3, queueName="q"))
    found = find_preloaded(spec, job, error)
    assert found[:2] == (status, reason)
    assert says in found[2]
