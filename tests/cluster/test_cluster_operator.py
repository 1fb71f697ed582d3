"""Tidegate as the operator of a cluster: ModelPools scaled by demand, to zero and back."""

from __future__ import annotations

import signal
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any

import cluster_objects
import httpx
import pytest
from cluster_engines import simulated_engines
from cluster_objects import define
from control_plane import ControlPlane, create_missing, steady_port, wait
from fake_kubelet import HOLD, FakeKubelet
from lightkube import ApiError, Client
from lightkube.codecs import from_dict
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.core_v1 import Container, PodSpec
from lightkube.models.meta_v1 import LabelSelector, LabelSelectorRequirement, ObjectMeta
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.batch_v1 import Job
from lightkube.resources.core_v1 import Event, Pod
from lightkube.types import PatchType
from openai import InternalServerError
from operator_rig import Operator, ask
from scaling_times import ScalingTimes
from tidegate_process import Tidegate, fetch, wait_up

from autoscaler.backends.kubernetes.leader import LEADER_LABEL
from autoscaler.operator.imports.ahpa import map_ahpa
from autoscaler.operator.model_pool import InvalidModelPool, parse_spec

pytestmark = pytest.mark.timeout(600)

ModelPool = create_namespaced_resource("tidegate.dev", "v1alpha1", "ModelPool", "modelpools")
AHPA_KIND, AHPAS = "AdvancedHorizontalPodAutoscaler", "advancedhorizontalpodautoscalers"
Ahpa = create_namespaced_resource("autoscaling.alibabacloud.com", "v1beta1", AHPA_KIND, AHPAS)
Lease = create_namespaced_resource("coordination.k8s.io", "v1", "Lease", "leases")


def model_pool(name: str, namespace: str, **spec: Any) -> Any:
    return ModelPool(metadata={"name": name, "namespace": namespace}, spec=spec)


def template(**spec: Any) -> dict[str, Any]:
    return {"spec": {"containers": [{"name": "engine", "image": "engine:1"}], **spec}}


def status(client: Client, name: str, namespace: str) -> dict[str, Any]:
    found: dict[str, Any] = client.get(ModelPool, name, namespace=namespace).get("status") or {}
    return found


def condition(client: Client, name: str, namespace: str, kind: str) -> tuple[str, str]:
    for one in status(client, name, namespace).get("conditions", ()):
        if one["type"] == kind:
            return one["status"], one["reason"]
    return "", ""


def replicas(client: Client, name: str, namespace: str) -> int | None:
    try:
        return client.get(Deployment, name, namespace=namespace).spec.replicas
    except ApiError as error:
        if error.status.code == 404:
            return None
        raise


def test_a_held_request_takes_a_model_pool_from_zero_and_idleness_takes_it_back(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str, times: ScalingTimes
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines(), pull_s=0.3, start_s=0.3)
    client.create(model_pool("llama", namespace, template=template()))
    with operator.running() as tidegate:
        wait("a Deployment at zero", lambda: replicas(client, "llama", namespace) == 0)
        wait("a pool", lambda: condition(client, "llama", namespace, "Ready")[1] == "AtZero")
        with ThreadPoolExecutor() as threads:
            wanted = times.since_now(
                "request held -> 1 replica wanted", "operator, Deployment /scale"
            )
            answered = times.since_now("request held -> answered (pod in 0.6 s)", "operator")
            answer = threads.submit(ask, tidegate, "llama")
            wait("1 replica", lambda: replicas(client, "llama", namespace) == 1)
            wanted()
            assert answer.result(60)
            answered()
        wait(
            "serving", lambda: condition(client, "llama", namespace, "Ready") == ("True", "Serving")
        )
        (pod,) = client.list(Pod, namespace=namespace)
        (replica,) = tidegate.pool("llama")["replicas"]
        assert replica["pod"] == pod.metadata.name
        assert replica["node"] == pod.spec.nodeName
        (signals,) = tidegate.admin("/signals")["pools"]
        assert signals["namespace"] == namespace
        assert [(one["group"], one["resource"], one["name"]) for one in signals["objects"]] == [
            ("apps", "deployments", "llama"),
            ("tidegate.dev", "modelpools", "llama"),
        ]
        seen = signals["replicas"][0]["pod"]
        assert (seen["name"], seen["labels"]) == (pod.metadata.name, pod.metadata.labels)
        wait("0 replicas", lambda: replicas(client, "llama", namespace) == 0)
        wait("no pod", lambda: not list(client.list(Pod, namespace=namespace)))
        wait("at zero", lambda: status(client, "llama", namespace).get("replicas") == 0)
        events = {one.reason: one.message for one in client.list(Event, namespace=namespace)}
        assert "a request is held" in events["ScaledUp"]
        assert "no request" in events["ScaledDown"]


def target(name: str, kind: str = "Deployment") -> dict[str, str]:
    return {"apiVersion": "apps/v1", "kind": kind, "name": name}


def scale_model_pool(client: Client, name: str, namespace: str, number: int) -> None:
    body = {"spec": {"replicas": number}}
    client.patch(ModelPool.Scale, name, body, namespace=namespace, patch_type=PatchType.MERGE)


def test_a_workload_that_exists_is_scaled_and_nothing_else_of_it(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str, times: ScalingTimes
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    made = client.create(cluster_objects.deployment("llama", namespace, replicas=1))
    client.create(model_pool("llama", namespace, targetRef=target("llama"), maxReplicas=3))
    with operator.running() as tidegate:
        tidegate.wait("adopted", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama")
        assert ask(tidegate, "llama")
        three = times.since_now("3 replicas asked for -> 3 ready", "/scale of the ModelPool")
        scale_model_pool(client, "llama", namespace, 3)
        tidegate.wait_ready("llama", 3)
        three()
        assert replicas(client, "llama", namespace) == 3
        found = status(client, "llama", namespace)
        assert "app=llama" in found["selector"]
        scale_model_pool(client, "llama", namespace, 1)
        wait("1 replica", lambda: replicas(client, "llama", namespace) == 1)
        tidegate.wait("1 is left", lambda: len(tidegate.pool("llama")["replicas"]) == 1)
        now = client.get(Deployment, "llama", namespace=namespace)
        assert now.spec.template == made.spec.template
        tidegate.expected_log.append("something else has set 2 replicas; it is to have 1")
        # Somebody else's number is not kept: Tidegate is the one that scales.
        cluster_objects.scale(client, "llama", namespace, 2)
        wait("1 again", lambda: replicas(client, "llama", namespace) == 1)
        client.delete(ModelPool, "llama", namespace=namespace)
        tidegate.wait("no pool", lambda: not tidegate.admin("/status")["pools"])
        assert replicas(client, "llama", namespace) == 1, "let go as it was"


def report_engine(
    client: Client, pod: Pod, *, ready: bool, restarts: int, **state: dict[str, Any]
) -> None:
    """Say of a pod what the kubelet says of one whose engine was started again; it runs, where
    ``state`` does not say otherwise."""
    status = {
        "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        "containerStatuses": [
            {
                "name": "engine",
                "image": "engine:1",
                "imageID": "engine",
                "ready": ready,
                "restartCount": restarts,
                "state": {"running": {}},
                **state,
            }
        ],
    }
    name, namespace = str(pod.metadata.name), str(pod.metadata.namespace)
    client.patch(Pod.Status, name, {"status": status}, namespace=namespace)


def test_an_engine_that_is_started_again_in_its_pod_has_its_whole_start_before_it(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(model_pool("llama", namespace, template=template(), minReplicas=1))
    limit_s = 1.0
    with operator.running(autoscaler={"unhealthy_restart_s": limit_s}) as tidegate:
        tidegate.wait("a pool", lambda: len(tidegate.admin("/status")["pools"]) == 1)
        tidegate.wait_ready("llama")
        (before,) = tidegate.pool("llama")["replicas"]
        (pod,) = client.list(Pod, namespace=namespace)
        report_engine(client, pod, ready=False, restarts=1)
        tidegate.wait("it loads", lambda: tidegate.pool("llama")["ready"] == 0)
        time.sleep(3 * limit_s)
        (still,) = tidegate.pool("llama")["replicas"]
        assert (still["id"], still["state"]) == (before["id"], "unhealthy")
        report_engine(client, pod, ready=True, restarts=1)
        tidegate.wait_ready("llama")
        (after,) = tidegate.pool("llama")["replicas"]
        assert (after["id"], after["pod"]) == (before["id"], before["pod"])


def test_who_is_held_is_told_of_an_engine_that_ends_again_and_again(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines(), ready_s=HOLD)
    client.create(model_pool("llama", namespace, template=template()))
    loops = {
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
        "lastState": {"terminated": {"exitCode": 2, "reason": "Error"}},
    }
    with operator.running() as tidegate, ThreadPoolExecutor() as threads:
        wait("a pool", lambda: condition(client, "llama", namespace, "Ready")[1] == "AtZero")
        answer = threads.submit(ask, tidegate, "llama")
        tidegate.wait(
            "it loads",
            lambda: [one["phase"] for one in tidegate.pool("llama")["replicas"]] == ["loading"],
        )
        (pod,) = client.list(Pod, namespace=namespace)
        report_engine(client, pod, ready=False, restarts=1, **loops)
        with pytest.raises(InternalServerError) as told:
            answer.result(60)
        assert told.value.status_code == 503
        assert told.value.code == "engine_failed"
        assert "2 times in a row" in told.value.message
        assert "container engine: CrashLoopBackOff" in told.value.message
        assert "exit code 2" in told.value.message
        # Who comes later waits for the next start.
        answer = threads.submit(ask, tidegate, "llama")
        kubelet.treat(namespace, on_pod=simulated_engines())
        assert answer.result(60)


def test_replicas_outlive_tidegate_and_the_next_takes_them_over(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(model_pool("llama", namespace, template=template(), minReplicas=2, maxReplicas=2))
    with operator.running("one") as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama", 2)
        before = {one.metadata.name for one in client.list(Pod, namespace=namespace)}
    assert replicas(client, "llama", namespace) == 2
    with operator.running("two") as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama", 2)
        assert {one["pod"] for one in tidegate.pool("llama")["replicas"]} == before
        assert ask(tidegate, "llama")
    assert {one.metadata.name for one in client.list(Pod, namespace=namespace)} == before


def readyz(tidegate: Tidegate) -> tuple[int, str]:
    try:
        return 200, fetch(f"{tidegate.admin_url}/readyz").decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_another_takes_the_place_of_a_leader_that_dies(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str, times: ScalingTimes
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(model_pool("llama", namespace, template=template(), minReplicas=1))
    first = wait_up(operator.start("first"))
    first.wait("a pool", lambda: first.admin("/status")["pools"])
    first.wait_ready("llama")
    (pod,) = client.list(Pod, namespace=namespace)
    second = operator.start("second")
    first.wait("a second one", lambda: "waiting to lead" in second.log())
    assert client.get(Lease, "tidegate", namespace=namespace)["spec"]["holderIdentity"].startswith(
        "first_"
    )
    time.sleep(4)
    assert not (second.state_dir / "running.json").exists(), "it waits while the other leads"
    taken = times.since_now("leader killed -> the next answers (lease 3 s)", "Lease")
    first.process.send_signal(signal.SIGKILL)
    wait_up(second)
    second.wait("a pool", lambda: second.admin("/status")["pools"])
    second.wait_ready("llama")
    assert ask(second, "llama")
    taken()
    assert readyz(second)[0] == 200
    assert [one.metadata.name for one in client.list(Pod, namespace=namespace)] == [
        pod.metadata.name
    ]
    # One that ends in order gives the lease back, so the next need not wait for it to run out.
    third = operator.start("third", kubernetes={"lease_s": 3.0})
    second.wait("a third one", lambda: "waiting to lead" in third.log())
    taken = times.since_now("leader ends in order -> the next is up", "Lease")
    second.stop()
    wait_up(third)
    taken()
    third.stop()
    for tidegate in (second, third):
        tidegate.assert_log_is_clean()


def leaders(client: Client, namespace: str) -> list[str | None]:
    found = client.list(Pod, namespace=namespace, labels={LEADER_LABEL: "tidegate"})
    return [one.metadata.name for one in found]


def ready_answer(port: int) -> str:
    """What /readyz says with a 200; empty until it does."""
    try:
        answer = httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=30)
    except httpx.HTTPError:
        return ""
    return answer.text if answer.status_code == 200 else ""


def knows(tidegate: Tidegate, model: str) -> bool:
    """Whether it answers, and has this model."""
    try:
        answer = httpx.get(f"{tidegate.url}/v1/models", timeout=30, trust_env=False)
    except httpx.HTTPError:
        return False
    return answer.is_success and model in [one["id"] for one in answer.json()["data"]]


def test_the_leader_is_found_by_its_label_and_the_other_is_ready_too(
    client: Client, operator: Operator, namespace: str
) -> None:
    for name in ("first", "second"):
        spec = PodSpec(containers=[Container(name="tidegate", image="tidegate:1")])
        client.create(Pod(metadata=ObjectMeta(name=name, namespace=namespace), spec=spec))
    client.create(model_pool("llama", namespace, template=template()))
    first = wait_up(operator.start("first", kubernetes={"label_leader": True}))
    wait("a leader", lambda: leaders(client, namespace) == ["first"])
    assert knows(first, "llama")
    port = steady_port()
    second = operator.start(
        "second", kubernetes={"label_leader": True}, gateway={"admin_port": port}
    )
    first.wait("a second one", lambda: "waiting to lead" in second.log())
    answer = wait("it sees the leader", lambda: ready_answer(port))
    assert "first" in answer
    with ThreadPoolExecutor() as threads:
        stopped = threads.submit(first.stop)
        while "second" not in leaders(client, namespace):
            # The one that ends takes requests until another is found in its place.
            assert knows(first, "llama") or "second" in leaders(client, namespace)
        stopped.result(120)
    wait_up(second)
    assert knows(second, "llama")
    wait("another leader", lambda: leaders(client, namespace) == ["second"])
    second.stop()
    for tidegate in (first, second):
        tidegate.assert_log_is_clean()


def test_one_that_crashed_and_comes_back_in_its_pod_is_found_no_more(
    client: Client, operator: Operator, namespace: str
) -> None:
    spec = PodSpec(containers=[Container(name="tidegate", image="tidegate:1")])
    client.create(Pod(metadata=ObjectMeta(name="first", namespace=namespace), spec=spec))
    given = {"label_leader": True, "lease_s": 600.0}
    first = wait_up(operator.start("first", kubernetes=given))
    wait("a leader", lambda: leaders(client, namespace) == ["first"])
    first.kill_all()
    assert leaders(client, namespace) == ["first"]
    operator.start("first", kubernetes=given)
    wait("none", lambda: leaders(client, namespace) == [])


def test_while_the_api_server_is_away_it_serves_on_and_acts_when_that_is_back(
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    operator: Operator,
    namespace: str,
    times: ScalingTimes,
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(model_pool("busy", namespace, template=template(), minReplicas=1))
    client.create(model_pool("idle", namespace, template=template()))
    client.create(model_pool("existing", namespace, targetRef=target("there")))
    client.create(cluster_objects.deployment("there", namespace, replicas=1))
    client.create(model_pool("missing", namespace, targetRef=target("nowhere")))
    tidegate = wait_up(operator.start("one", kubernetes={"lease_s": 3.0}))
    tidegate.wait("pools", lambda: len(tidegate.admin("/status")["pools"]) == 3)
    wait(
        "said",
        lambda: condition(client, "missing", namespace, "Ready") == ("False", "WorkloadNotReached"),
    )
    tidegate.wait_ready("busy")
    plane.kill_apiserver()
    try:
        with ThreadPoolExecutor() as threads:
            held = threads.submit(ask, tidegate, "idle")
            for _ in range(16):  # longer than it takes until all is compared twice
                assert ask(tidegate, "busy")
                time.sleep(0.8)
            assert not held.done()
            names = {one["name"] for one in tidegate.admin("/status")["pools"]}
            assert names == {"busy", "idle", "existing"}
            plane.start_apiserver()
            back = times.since_now("API server is back -> 1 replica wanted", "operator")
            wait("1 replica", lambda: replicas(client, "idle", namespace) == 1)
            back()
            # The cluster's own controllers take up to a minute to come back.
            assert held.result(240)
    finally:
        plane.start_apiserver()
    assert ask(tidegate, "busy")
    assert replicas(client, "idle", namespace) == 1
    tidegate.stop()


def test_a_workload_with_an_autoscaler_is_left_to_it(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(cluster_objects.deployment("llama", namespace, replicas=2))
    metric = cluster_objects.external_metric("nothing_measures_this", 1)
    client.create(cluster_objects.autoscaler(plane, "llama", namespace, metric, highest=2))
    client.create(model_pool("llama", namespace, targetRef=target("llama"), maxReplicas=3))
    with operator.running() as tidegate:
        wait(
            "left alone",
            lambda: (
                condition(client, "llama", namespace, "ScalingActive")[1] == "AnotherAutoscaler"
            ),
        )
        tidegate.wait_ready("llama", 2)
        assert ask(tidegate, "llama")
        time.sleep(5)  # longer than it takes to go to zero
        assert replicas(client, "llama", namespace) == 2


def test_an_autoscaler_that_is_made_later_takes_over_what_runs(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(cluster_objects.deployment("llama", namespace, replicas=2))
    spec = {"targetRef": target("llama"), "minReplicas": 2, "maxReplicas": 3}
    client.create(model_pool("llama", namespace, **spec))
    with operator.running() as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama", 2)
        metric = cluster_objects.external_metric("nothing_measures_this", 1)
        client.create(cluster_objects.autoscaler(plane, "llama", namespace, metric, highest=2))
        wait(
            "left alone",
            lambda: (
                condition(client, "llama", namespace, "ScalingActive")[1] == "AnotherAutoscaler"
            ),
        )
        cluster_objects.scale(client, "llama", namespace, 1)
        for _ in range(40):  # longer than two looks at whether a workload has its number
            assert ask(tidegate, "llama")
            assert replicas(client, "llama", namespace) == 1
            time.sleep(1.0)
        assert len(tidegate.pool("llama")["replicas"]) == 1


def test_pods_are_found_by_any_selector(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    made = cluster_objects.deployment("llama", namespace, replicas=2)
    assert made.spec is not None
    made.spec.selector = LabelSelector(
        matchExpressions=[
            LabelSelectorRequirement(key="app", operator="In", values=["llama", "other"]),
            LabelSelectorRequirement(key="canary", operator="DoesNotExist"),
        ]
    )
    client.create(made)
    spec = {"targetRef": target("llama"), "minReplicas": 2, "maxReplicas": 2}
    client.create(model_pool("llama", namespace, **spec))
    with operator.running() as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama", 2)
        assert ask(tidegate, "llama")


def test_a_workload_that_is_deleted_is_made_again_and_has_no_more_than_the_template(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    spec = {"template": template(nodeSelector={"kubernetes.io/os": "linux"}), "minReplicas": 1}
    client.create(model_pool("llama", namespace, **spec, queueName="gpus"))
    with operator.running() as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama")
        made = client.get(Deployment, "llama", namespace=namespace)
        assert made.metadata.labels["kueue.x-k8s.io/queue-name"] == "gpus"

        fewer = {"queueName": None, "template": {"spec": {"nodeSelector": None}}}
        client.patch(
            ModelPool, "llama", {"spec": fewer}, namespace=namespace, patch_type=PatchType.MERGE
        )

        def has_less() -> bool:
            found = client.get(Deployment, "llama", namespace=namespace)
            return (
                "kueue.x-k8s.io/queue-name" not in found.metadata.labels
                and not found.spec.template.spec.nodeSelector
                and found.spec.replicas == 1
            )

        wait("what was taken out of it is gone", has_less)
        tidegate.wait_ready("llama")
        client.delete(Deployment, "llama", namespace=namespace)
        tidegate.expected_log.append("there is no Deployment")
        tidegate.expected_log.append("something else has set 0 replicas; it is to have 1")

        def is_again() -> bool:
            try:
                found = client.get(Deployment, "llama", namespace=namespace)
            except ApiError:
                return False
            return bool(found.metadata.uid != made.metadata.uid and found.spec.replicas == 1)

        wait("it is made again", is_again, within_s=90)
        tidegate.wait_ready("llama", 1, 90)
        assert ask(tidegate, "llama")


def test_the_number_of_a_model_pool_holds_within_its_bounds_as_they_are_now(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(model_pool("llama", namespace, template=template(), replicas=3, maxReplicas=2))

    def change(**spec: Any) -> None:
        client.patch(
            ModelPool, "llama", {"spec": spec}, namespace=namespace, patch_type=PatchType.MERGE
        )

    with operator.running() as tidegate:
        wait("2 of 3", lambda: replicas(client, "llama", namespace) == 2)
        change(maxReplicas=4)
        wait("3", lambda: replicas(client, "llama", namespace) == 3)
        change(servedName="other")
        tidegate.wait("its name", lambda: tidegate.admin("/status")["pools"][0]["name"] == "other")
        time.sleep(5)  # longer than it takes to go to zero
        assert replicas(client, "llama", namespace) == 3
        change(replicas=None)
        wait("by demand", lambda: replicas(client, "llama", namespace) == 0)


@pytest.fixture(scope="module")
def ahpas(plane: ControlPlane) -> None:
    """AHPA's kind, which takes any field."""
    anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    group = "autoscaling.alibabacloud.com"
    version = {
        "name": "v1beta1",
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": anything},
    }
    names = {"kind": AHPA_KIND, "plural": AHPAS, "singular": AHPA_KIND.lower()}
    document = {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{AHPAS}.{group}"},
        "spec": {"group": group, "scope": "Namespaced", "names": names, "versions": [version]},
    }
    with plane.client() as client, plane.http() as http:
        create_missing(client, from_dict(document))
        path = f"/apis/{group}/v1beta1/{AHPAS}"
        wait("AHPAs", lambda: http.get(path).status_code == 200)


def test_a_workload_is_ahpas_until_it_is_deleted_and_then_the_imported_model_pools(
    kubelet: FakeKubelet, client: Client, operator: Operator, ahpas: None, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(cluster_objects.deployment("llama", namespace, replicas=2))
    spec = {
        "scaleStrategy": "auto",
        "scaleTargetRef": target("llama"),
        "minReplicas": 0,
        "maxReplicas": 3,
        "prediction": {"quantile": 95, "scaleUpForward": 180},
    }
    client.create(Ahpa(metadata={"name": "llama", "namespace": namespace}, spec=spec))
    with operator.running(kubernetes={"ahpa_pools": True}) as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama", 2)
        assert ask(tidegate, "llama")
        cluster_objects.scale(client, "llama", namespace, 3)  # as AHPA does
        tidegate.wait_ready("llama", 3)
        found = client.get(Ahpa, "llama", namespace=namespace).to_dict()
        made = map_ahpa({**found, "kind": AHPA_KIND}, now=datetime.now()).model_pool
        client.create(from_dict(made))
        wait(
            "left alone",
            lambda: (
                condition(client, "llama", namespace, "ScalingActive")[1] == "AnotherAutoscaler"
            ),
        )
        time.sleep(5)  # longer than it takes to go to zero
        assert replicas(client, "llama", namespace) == 3
        assert ask(tidegate, "llama")
        client.delete(Ahpa, "llama", namespace=namespace)
        wait("0 replicas", lambda: replicas(client, "llama", namespace) == 0)
        assert ask(tidegate, "llama")
        assert condition(client, "llama", namespace, "ScalingActive")[0] == "True"


def test_another_scales_and_tidegate_owns_zero(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str, times: ScalingTimes
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(cluster_objects.deployment("llama", namespace, replicas=0))
    spec = {"targetRef": target("llama"), "scaledBy": "hpa", "maxReplicas": 5}
    client.create(model_pool("llama", namespace, **spec))
    with operator.running(autoscaler={"idle_to_zero_s": 15.0}) as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        with ThreadPoolExecutor() as threads:
            woken = times.since_now("request held -> answered", "zeroOwner tidegate beside an HPA")
            answer = threads.submit(ask, tidegate, "llama")
            assert answer.result(60)
            woken()
        assert replicas(client, "llama", namespace) == 1
        cluster_objects.scale(client, "llama", namespace, 3)
        tidegate.wait_ready("llama", 3)
        wait("0 replicas", lambda: replicas(client, "llama", namespace) == 0)


def test_of_a_stateful_set_the_last_goes_first(
    kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    given = {**template(), "kind": "StatefulSet"}
    client.create(model_pool("llama", namespace, template=given, minReplicas=1, maxReplicas=3))
    with operator.running() as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        scale_model_pool(client, "llama", namespace, 3)
        tidegate.wait_ready("llama", 3)
        scale_model_pool(client, "llama", namespace, 1)
        tidegate.wait("1 pod", lambda: len(list(client.list(Pod, namespace=namespace))) == 1)
        (pod,) = client.list(Pod, namespace=namespace)
        assert pod.metadata.name == "llama-0"
        tidegate.wait(
            "that one",
            lambda: (
                [
                    one["pod"]
                    for one in tidegate.pool("llama")["replicas"]
                    if one["state"] == "ready"
                ]
                == ["llama-0"]
            ),
        )
        assert ask(tidegate, "llama")


SUSPENDS_JOBS_SINCE = (1, 24)
HAS_SIDECARS_SINCE = (1, 29)


def test_a_job_brings_the_model_to_nodes_once_its_queue_admits_it(
    plane: ControlPlane, client: Client, operator: Operator, namespace: str, kubelet: FakeKubelet
) -> None:
    def job() -> Job | None:
        return next(iter(client.list(Job, namespace=namespace)), None)

    def pods_of_jobs() -> list[Pod]:
        pods = client.list(Pod, namespace=namespace)
        return [pod for pod in pods if "job-name" in (pod.metadata.labels or {})]

    def preloaded() -> tuple[str, str]:
        return condition(client, "llama", namespace, "Preloaded")

    image = "registry.example.com/tidegate:1"
    own = PodSpec(containers=[Container(name="tidegate", image=image)])
    own_pod = Pod(metadata=ObjectMeta(name="one", namespace=namespace), spec=own)
    create_missing(client, own_pod)
    client.create(
        model_pool(
            "llama",
            namespace,
            template=template(),
            model="hf://org/name",
            useNodeCache=plane.version >= HAS_SIDECARS_SINCE,
            preloadNodes=2,
            queueName="models",
        )
    )
    with operator.running("one"):
        made = wait("a Job", job)
        assert made.metadata.labels["kueue.x-k8s.io/queue-name"] == "models"
        (container,) = made.spec.template.spec.containers
        assert container.image == image
        assert container.command == ["tidegate", "model", "preload", "hf://org/name"]
        if plane.version >= SUSPENDS_JOBS_SINCE:
            wait("waiting", lambda: preloaded() == ("False", "WaitingForAdmission"))
            assert pods_of_jobs() == []
            admit = {"spec": {"suspend": False}}  # as a queue does
            client.patch(Job, made.metadata.name, admit, namespace=namespace)
        wait("preloaded", lambda: preloaded() == ("True", "Complete"))
        spec = client.get(Deployment, "llama", namespace=namespace).spec.template.spec
        if plane.version >= HAS_SIDECARS_SINCE:
            assert spec.initContainers[0].image == image
            assert {"/tidegate"} <= {one.mountPath for one in spec.containers[0].volumeMounts}
        # Another number is another Job; none is none.
        changes = {"spec": {"preloadNodes": 1, "queueName": None}}
        client.patch(ModelPool, "llama", changes, namespace=namespace, patch_type=PatchType.MERGE)
        wait("a new Job", lambda: (now := job()) is not None and now.spec.completions == 1)
        wait("preloaded again", lambda: preloaded() == ("True", "Complete"))
        none = {"spec": {"preloadNodes": 0}}
        client.patch(ModelPool, "llama", none, namespace=namespace, patch_type=PatchType.MERGE)
        wait("no Job", lambda: job() is None)
        wait("no pod of it", lambda: pods_of_jobs() == [])
    if plane.version < HAS_SIDECARS_SINCE:
        return

    def image_now() -> str:
        spec = client.get(Deployment, "llama", namespace=namespace).spec.template.spec
        return str(spec.initContainers[0].image)

    # An upgrade of Tidegate starts no engine again; a change of the template takes its new image.
    with operator.running("two", kubernetes={"node_cache_image": "tidegate:2"}) as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        assert image_now() == image
        changes = {"spec": {"template": template(terminationGracePeriodSeconds=50)}}
        client.patch(ModelPool, "llama", changes, namespace=namespace, patch_type=PatchType.MERGE)
        wait("the new image", lambda: image_now() == "tidegate:2")


def test_a_cluster_without_sidecars_says_so(
    plane: ControlPlane, client: Client, operator: Operator, namespace: str
) -> None:
    spec = {"template": template(), "model": "hf://org/name", "useNodeCache": True}
    client.create(model_pool("llama", namespace, **spec))
    with operator.running(kubernetes={"node_cache_image": "tidegate:1"}):
        if plane.version >= HAS_SIDECARS_SINCE:
            wait("a pool", lambda: condition(client, "llama", namespace, "Ready")[1] == "AtZero")
            return

        def says_why() -> bool:
            return any("needs Kubernetes 1.29" in one.message for one in failures())

        def failures() -> list[Event]:
            events = client.list(Event, namespace=namespace)
            return [one for one in events if one.reason == "ApplyFailed"]

        wait("an event", says_why)
        time.sleep(7)  # longer than until it is tried again
        assert len(failures()) == 1


def test_two_pools_of_one_name_and_a_spec_that_is_none(
    client: Client, operator: Operator, namespace: str
) -> None:
    client.create(cluster_objects.deployment("a", namespace, replicas=0))
    client.create(model_pool("a", namespace, targetRef=target("a"), servedName="m"))
    with operator.running():
        wait("the first", lambda: condition(client, "a", namespace, "Accepted")[0] == "True")
        client.create(model_pool("b", namespace, targetRef=target("a"), servedName="m"))
        client.create(model_pool("c", namespace, targetRef=target("missing")))
        schedule = {"name": "x", "cron": "never", "durationSeconds": 1, "minReplicas": 1}
        client.create(model_pool("d", namespace, targetRef=target("a"), schedules=[schedule]))
        for name, kind, reason in (
            ("b", "Accepted", "NameConflict"),
            ("c", "Ready", "WorkloadNotReached"),
            ("d", "Accepted", "InvalidSpec"),
        ):
            wait(
                f"{name}: {reason}",
                lambda name=name, kind=kind, reason=reason: (
                    condition(  # type: ignore[misc]
                        client, name, namespace, kind
                    )
                    == ("False", reason)
                ),
            )
        client.create(cluster_objects.deployment("missing", namespace, replicas=0))
        wait("c is a pool", lambda: condition(client, "c", namespace, "Ready")[1] == "AtZero")


@pytest.mark.parametrize(
    ("spec", "needs_cel"),
    [
        ({"targetRef": {"name": "a"}, "maxReplicas": 0}, False),
        ({"targetRef": {"name": "A_b"}}, False),
        ({"targetRef": {"name": "a"}, "scaledBy": "nobody"}, False),
        ({"template": {}}, False),
        ({}, True),
        ({"targetRef": {"name": "a"}, "minReplicas": 3}, True),
        ({"targetRef": {"name": "a"}, "zeroOwner": "hpa"}, True),
        ({"targetRef": {"name": "a"}, "scaledBy": "keda", "zeroOwner": "tidegate"}, True),
        ({"targetRef": {"name": "a"}, "queueName": "q"}, True),
        ({"targetRef": {"name": "a"}, "model": "a/b", "useNodeCache": True}, True),
        ({"targetRef": {"name": "a"}, "preloadNodes": 1}, True),
    ],
)
def test_the_api_server_refuses_what_is_no_model_pool(
    plane: ControlPlane,
    client: Client,
    definition: None,
    namespace: str,
    spec: dict[str, Any],
    needs_cel: bool,
) -> None:
    if needs_cel and plane.version < (1, 25):  # it knows no CEL rules; Tidegate does
        with pytest.raises(InvalidModelPool):
            parse_spec(client.create(model_pool("bad", namespace, **spec)))
        return
    with pytest.raises(ApiError) as refused:
        client.create(model_pool("bad", namespace, **spec))
    assert refused.value.status.code == 422


@pytest.mark.parametrize(
    "change",
    [
        {"template": {"kind": "StatefulSet"}},
        {"template": None, "targetRef": {"name": "other"}},
    ],
)
def test_the_api_server_refuses_to_leave_a_workload_behind(
    plane: ControlPlane,
    client: Client,
    definition: None,
    namespace: str,
    change: dict[str, Any],
) -> None:
    containers = [{"name": "engine", "image": "e:1"}]
    client.create(model_pool("a", namespace, template={"spec": {"containers": containers}}))
    well = {"spec": {"maxReplicas": 3, "template": {"kind": "Deployment"}}}
    client.patch(ModelPool, "a", well, namespace=namespace, patch_type=PatchType.MERGE)

    def change_it() -> None:
        given = {"spec": change}
        client.patch(ModelPool, "a", given, namespace=namespace, patch_type=PatchType.MERGE)

    if plane.version < (1, 25):  # it knows no CEL rules
        change_it()
        return
    with pytest.raises(ApiError) as refused:
        change_it()
    assert refused.value.status.code == 422
    assert "make another ModelPool" in refused.value.status.message


def test_defaults_and_columns(
    client: Client, plane: ControlPlane, definition: None, namespace: str
) -> None:
    client.create(model_pool("a", namespace, targetRef={"name": "a"}))
    spec = client.get(ModelPool, "a", namespace=namespace)["spec"]
    assert (spec["minReplicas"], spec["maxReplicas"], spec["scaledBy"]) == (0, 1, "tidegate")
    assert spec["targetRef"]["kind"] == "Deployment"
    with plane.http() as http:
        table = http.get(
            f"/apis/tidegate.dev/v1alpha1/namespaces/{namespace}/modelpools",
            headers={"accept": "application/json;as=Table;v=v1;g=meta.k8s.io"},
        ).json()
    names = [one["name"] for one in table["columnDefinitions"]]
    assert names[:5] == ["Name", "Ready", "Desired", "Max", "Reason"]


def test_the_pods_of_an_inference_pool_are_routed_to(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, operator: Operator, namespace: str
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    pools = define(plane, "inference.networking.k8s.io", "v1", "InferencePool")
    spec = {"selector": {"matchLabels": {"app": "llama"}}, "targetPorts": [{"number": 8000}]}
    client.create(pools(metadata={"name": "llama", "namespace": namespace}, spec=spec))
    client.create(cluster_objects.deployment("llama", namespace, replicas=2))
    reference = {"apiVersion": "inference.networking.k8s.io/v1", "kind": "InferencePool"}
    reference["name"] = "llama"
    client.create(model_pool("llama", namespace, targetRef=reference, scaledBy="hpa"))
    with operator.running() as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama", 2)
        assert ask(tidegate, "llama")
        cluster_objects.scale(client, "llama", namespace, 1)
        tidegate.wait("1", lambda: tidegate.pool("llama")["ready"] == 1)
        assert ask(tidegate, "llama")
