"""What pods are at, and where their engines are asked."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.backends.kubernetes.binding import bind
from autoscaler.backends.kubernetes.pods import (
    Pod,
    ServiceEndpoint,
    choose_port,
    keep_pod,
    keep_slice,
    make_url,
    place,
    read_endpoints,
    read_pod,
    read_service_labels,
)

UP: dict[str, Any] = {"running": {}}
WAITING = {"name": "engine", "state": {"waiting": {"reason": "ContainerCreating"}}}
CRASHED = {
    "name": "engine",
    "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 10s"}},
    "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}},
}
RUNNING = {"name": "engine", "state": {"running": {}}}
READY = ({"type": "Ready", "status": "True"},)


def pod_object(name: str = "a", **status: Any) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"}
    if status.pop("deleted", False):
        metadata["deletionTimestamp"] = "2026-01-02T00:00:00Z"
    metadata["labels"] = status.pop("labels", {})
    spec = {"nodeName": status.pop("node", "node-0")}
    if gates := status.pop("gates", ()):
        spec["schedulingGates"] = gates
    if sidecars := status.pop("sidecars", ()):
        spec["initContainers"] = [{"name": one, "restartPolicy": "Always"} for one in sidecars]
    return {"metadata": metadata, "spec": spec, "status": {"phase": "Pending", **status}}


@pytest.mark.parametrize(
    ("found", "phase", "cause"),
    [
        (pod_object(node="", gates=[{"name": "kueue.x-k8s.io/admission"}]), "admission", ""),
        (pod_object(node=""), "waits for a node", ""),
        (
            pod_object(
                node="",
                conditions=[
                    {
                        "type": "PodScheduled",
                        "status": "False",
                        "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
                    }
                ],
            ),
            "waits for a node",
            "Insufficient nvidia.com/gpu",
        ),
        (pod_object(), "its node prepares it", ""),
        (pod_object(containerStatuses=[WAITING]), "pulls its image", ""),
        (
            pod_object(initContainerStatuses=[{"name": "fetch", "state": {"running": {}}}]),
            "runs init container fetch",
            "",
        ),
        (
            pod_object(
                initContainerStatuses=[{"name": "fetch", "state": {"terminated": {"exitCode": 0}}}],
                containerStatuses=[RUNNING],
            ),
            "loading",
            "",
        ),
        (
            pod_object(
                sidecars=["model"],
                initContainerStatuses=[{"name": "model", "started": False, "state": UP}],
                containerStatuses=[WAITING],
            ),
            "runs init container model",
            "",
        ),
        (
            pod_object(
                sidecars=["model"],
                initContainerStatuses=[{"name": "model", "started": True, "state": UP}],
                containerStatuses=[WAITING],
            ),
            "pulls its image",
            "",
        ),
        (
            pod_object(
                sidecars=["model"],
                initContainerStatuses=[{"name": "model", "started": True, "state": UP}],
                containerStatuses=[RUNNING],
            ),
            "loading",
            "",
        ),
        (pod_object(containerStatuses=[CRASHED]), "CrashLoopBackOff", "exit code 137"),
        (pod_object(containerStatuses=[RUNNING], conditions=READY), "", ""),
        (pod_object(phase="Failed", reason="Evicted"), "ended", "Evicted"),
    ],
)
def test_phase_of_a_pod(found: dict[str, Any], phase: str, cause: str) -> None:
    pod = read_pod(keep_pod(found))
    assert phase in pod.phase if phase else pod.phase == ""
    assert cause in pod.cause if cause else pod.cause == ""


def test_a_crash_loop_is_failed_starts() -> None:
    def failed_starts(*containers: dict[str, Any]) -> int:
        return read_pod(pod_object(containerStatuses=list(containers))).failed_starts

    assert failed_starts() == 0
    assert failed_starts(CRASHED | {"restartCount": 2}, RUNNING) == 3
    assert failed_starts(RUNNING | {"restartCount": 2}) == 0, "it tries again"
    assert failed_starts(WAITING | {"restartCount": 0}) == 0


def test_how_long_a_start_took() -> None:
    def start_s(status: str, **container: Any) -> float | None:
        ready = {"type": "Ready", "status": status, "lastTransitionTime": "2026-12-01T10:02:30Z"}
        found = pod_object(conditions=[ready], containerStatuses=[RUNNING | container])
        found["metadata"]["creationTimestamp"] = "2026-12-01T10:00:50Z"
        return read_pod(keep_pod(found)).start_s

    assert start_s("True") == 100.0
    assert start_s("False") is None
    assert start_s("True", restartCount=1) is None
    assert read_pod(keep_pod(pod_object(conditions=READY))).start_s is None


def test_deleted_and_ended_pods_are_terminating() -> None:
    assert not read_pod(pod_object(conditions=READY)).terminating
    assert read_pod(pod_object(conditions=READY)).ready
    assert read_pod(pod_object(deleted=True)).terminating
    ended = read_pod(pod_object(phase="Failed", conditions=READY))
    assert ended.terminating
    assert not ended.ready


def test_place_in_a_stateful_set_is_known() -> None:
    labels = {"statefulset.kubernetes.io/pod-name": "llama-3"}
    assert read_pod(pod_object("llama-3", labels=labels)).ordinal == 3
    assert read_pod(pod_object("llama-3")).ordinal is None
    newer = {"apps.kubernetes.io/pod-index": "12"}
    assert read_pod(pod_object("llama-12", labels=newer)).ordinal == 12


def endpoint_slice(
    *endpoints: dict[str, Any],
    ports: Any = ({"name": "http", "port": 8000},),
    family: str = "IPv4",
) -> Any:
    return keep_slice(
        {
            "metadata": {"name": "s"},
            "addressType": family,
            "endpoints": list(endpoints),
            "ports": list(ports),
        }
    )


def labelled_slice(**labels: str) -> Any:
    return keep_slice({"metadata": {"name": "s", "labels": labels}})


def test_a_service_s_labels_are_those_of_its_slices_without_their_own() -> None:
    own = {
        "kubernetes.io/service-name": "llama",
        "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        "service.kubernetes.io/headless": "",
    }
    mirrored = {
        "kubernetes.io/service-name": "other",
        "endpointslice.kubernetes.io/managed-by": "endpointslicemirroring-controller.k8s.io",
    }
    slices = [
        labelled_slice(**own, app="llama", tier="gold"),
        labelled_slice(**mirrored, app="other"),
        labelled_slice(app="nobody"),
        keep_slice({"metadata": {"name": "s"}}),
    ]
    assert read_service_labels(slices) == {"llama": {"app": "llama", "tier": "gold"}}


def endpoint(address: str, pod: str, **conditions: bool) -> dict[str, Any]:
    target = {"kind": "Pod", "name": pod}
    return {"addresses": [address], "targetRef": target, "conditions": conditions}


def test_endpoints_of_slices() -> None:
    slices = [
        endpoint_slice(
            endpoint("10.0.0.1", "a", ready=True),
            endpoint("10.0.0.2", "b", ready=False, serving=True, terminating=True),
            endpoint("10.0.0.3", "c"),
        ),
        endpoint_slice(),
    ]
    found = {one.pod: one for one in read_endpoints(slices, None)}
    assert found["a"].ready
    assert not found["b"].ready
    assert found["c"].ready, "unset means ready, by the API"
    assert {one.port for one in found.values()} == {8000}


def test_a_pod_of_a_dual_stack_service_counts_once() -> None:
    slices = [
        endpoint_slice(endpoint("10.0.0.1", "a"), endpoint("10.0.0.2", "b")),
        endpoint_slice(
            endpoint("fd00::1", "a"),
            endpoint("fd00::2", "b"),
            endpoint("fd00::3", "c"),
            {"addresses": ["fd00::9"]},
            family="IPv6",
        ),
    ]
    for order in (slices, slices[::-1]):
        found = {one.address: one.pod for one in read_endpoints(order, None)}
        assert found == {"10.0.0.1": "a", "10.0.0.2": "b", "fd00::3": "c", "fd00::9": ""}


@pytest.mark.parametrize(
    ("ports", "wanted", "number"),
    [
        ([{"name": "", "port": 9}], None, 9),
        ([{"name": "a", "port": 1}, {"name": "http", "port": 2}], None, 2),
        ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], None, None),
        ([{"name": "a", "port": 1}, {"name": "b", "port": 2}], "b", 2),
        ([{"name": "a", "port": 1}], "b", None),
        ([{"name": "a", "port": 1}], 7, 7),
        ([], None, None),
    ],
)
def test_port_that_is_meant(ports: Any, wanted: Any, number: int | None) -> None:
    assert choose_port(ports, wanted) == number


def test_pods_have_their_own_addresses_without_a_service() -> None:
    pods = [Pod(name="a", created="1", address="10.0.0.1"), Pod(name="b", created="1")]
    assert [one.url for one in place(pods, None, None, None)] == ["http://10.0.0.1:8000", None]
    assert place(pods, None, 9, None)[0].url == "http://10.0.0.1:9"
    assert place(pods, None, None, "http://front")[0].url == "http://front"
    assert make_url("fd00::1", 80) == "http://[fd00::1]:80"


def test_a_service_says_which_pods_are_replicas_and_ready() -> None:
    pods = [
        Pod(name="leader", created="1", address="10.0.0.1", ready=True),
        Pod(name="worker", created="1", address="10.0.0.2", ready=True),
        Pod(name="coming", created="1"),
    ]
    endpoints = [ServiceEndpoint(address="10.0.0.1", port=80, pod="leader", ready=False)]
    placed = {one.name: one for one in place(pods, endpoints, None, None)}
    assert set(placed) == {"leader", "coming"}
    assert placed["leader"].url == "http://10.0.0.1:80"
    assert not placed["leader"].ready
    assert placed["coming"].url is None


def living(name: str, **fields: Any) -> Pod:
    return Pod(name=name, **{"created": name, "node": "n", **fields})


def test_replicas_keep_their_pods_and_new_ones_get_those_nearest_to_serving() -> None:
    pods = [living("a"), living("b", ready=True), living("c", node=""), living("d")]
    assert bind({"r1": "a", "r2": None, "r3": None}, pods) == {"r1": "a", "r2": "b", "r3": "d"}
    assert bind({"r1": "a"}, pods) == {"r1": "a"}


def test_a_replica_whose_pod_ends_gets_another() -> None:
    pods = [living("a", terminating=True), living("b", ready=True), living("c", ready=True)]
    assert bind({"r1": "a", "r2": "b"}, pods) == {"r1": "c", "r2": "b"}
    assert bind({"r1": "a", "r2": "b"}, pods[:2]) == {"r1": None, "r2": "b"}
    assert bind({"r1": "gone"}, []) == {"r1": None}
