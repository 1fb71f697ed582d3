"""The control plane of these tests is a real one, and its pods live as pods do."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pod_network
import pytest
from cluster_objects import (
    PORT,
    deployment,
    pod_template,
    pods,
    ready_addresses,
    ready_replicas,
    scale,
    service,
)
from control_plane import ControlPlane, exists, wait
from fake_kubelet import HOLD, FakeKubelet
from lightkube import ApiError, Client
from lightkube.models.apps_v1 import DaemonSetSpec
from lightkube.models.batch_v1 import JobSpec
from lightkube.models.meta_v1 import LabelSelector, ObjectMeta
from lightkube.resources.apps_v1 import DaemonSet, Deployment
from lightkube.resources.batch_v1 import Job
from lightkube.resources.core_v1 import ConfigMap, Event, Pod

pytestmark = pytest.mark.timeout(600)


def test_it_is_what_its_programs_say(plane: ControlPlane) -> None:
    program = plane.programs / "kube-apiserver"
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    with plane.http() as http:
        assert http.get("/version").json()["gitVersion"] == said.stdout.split()[-1]


def test_clients_behind_the_aggregation_layer_are_told_whom_to_trust(client: Client) -> None:
    name = "extension-apiserver-authentication"
    found = client.get(ConfigMap, name, namespace="kube-system")
    assert "BEGIN CERTIFICATE" in found.data["requestheader-client-ca-file"]
    assert found.data["requestheader-allowed-names"] == '["front-proxy-client"]'


def test_a_service_account_may_do_what_it_was_given(
    plane: ControlPlane, client: Client, namespace: str
) -> None:
    rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get", "list"]}]
    kubeconfig = plane.kubeconfig("reader", namespace=namespace, rules=rules)
    client.create(ConfigMap(metadata=ObjectMeta(name="mine", namespace=namespace), data={"a": "b"}))
    with plane.client(kubeconfig) as reader:
        assert reader.get(ConfigMap, "mine").data == {"a": "b"}
        with pytest.raises(ApiError) as refused:
            reader.delete(ConfigMap, "mine")
        assert refused.value.status.code == 403
        with pytest.raises(ApiError) as refused:
            reader.get(ConfigMap, "mine", namespace="kube-system")
        assert refused.value.status.code == 403


def test_a_scaled_deployment_gets_pods_that_its_service_lists(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, namespace: str
) -> None:
    client.create(deployment("engine", namespace, replicas=0))
    client.create(service("engine", namespace))
    scale(client, "engine", namespace, 3)
    wait("3 ready", lambda: ready_replicas(client, "engine", namespace) == 3)
    found = pods(client, "engine", namespace)
    addresses = {pod.status.podIP for pod in found}
    assert len(addresses) == 3
    assert {pod.spec.nodeName for pod in found} == set(kubelet.nodes)

    def are_listed() -> bool:
        return ready_addresses(plane, client, "engine", namespace) == addresses

    wait("all three listed", are_listed)
    scale(client, "engine", namespace, 1)
    wait("one pod", lambda: len(pods(client, "engine", namespace)) == 1)
    (left,) = pods(client, "engine", namespace)

    def is_listed() -> bool:
        return ready_addresses(plane, client, "engine", namespace) == {left.status.podIP}

    wait("one listed", is_listed)


def test_a_pod_takes_each_step_when_the_test_lets_it(
    kubelet: FakeKubelet, client: Client, namespace: str
) -> None:
    held = dict.fromkeys(("schedule_s", "pull_s", "init_s", "start_s", "ready_s"), HOLD)
    treatment = kubelet.treat(namespace, **held)
    client.create(deployment("engine", namespace, inits=1))

    def the_pod() -> Pod | None:
        found = pods(client, "engine", namespace)
        return found[0] if found else None

    def is_scheduled() -> bool:
        return client.get(Pod, name, namespace=namespace).spec.nodeName is not None

    def state() -> tuple[str | None, str, bool]:
        status = client.get(Pod, name, namespace=namespace).status
        (init,), (main,) = status.initContainerStatuses, status.containerStatuses
        shown = [kind for kind in ("waiting", "running", "terminated") if getattr(init.state, kind)]
        return status.phase, shown[0], main.ready

    def reasons() -> set[str]:
        return {event.reason for event in client.list(Event, namespace=namespace)}

    name = str(wait("a pod", the_pod).metadata.name)
    assert not is_scheduled()
    treatment.change(schedule_s=0)
    wait("it pulling", lambda: "Pulling" in reasons())
    assert is_scheduled()
    assert "Pulled" not in reasons()
    assert state() == ("Pending", "waiting", False)
    treatment.change(pull_s=0)
    wait("it initializing", lambda: state() == ("Pending", "running", False))
    assert "Pulled" in reasons()
    treatment.change(init_s=0)
    wait("it initialized", lambda: state() == ("Pending", "terminated", False))
    treatment.change(start_s=0)
    wait("it running", lambda: state() == ("Running", "terminated", False))
    treatment.change(ready_s=0)
    wait("it ready", lambda: state() == ("Running", "terminated", True))


def test_what_runs_in_a_pod_is_reached_by_its_address_and_ends_with_it(
    kubelet: FakeKubelet, client: Client, namespace: str, pod_environ: dict[str, str]
) -> None:
    running: list[str] = []

    @asynccontextmanager
    async def serve(pod: Pod) -> AsyncIterator[None]:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            body = pod.metadata.name.encode()
            head = f"HTTP/1.1 200 OK\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            writer.write(head.encode() + body)
            await writer.drain()
            writer.close()

        address = pod_network.loopback(pod.status.podIP)
        async with await asyncio.start_server(answer, address, PORT):
            running.append(pod.metadata.name)
            yield
        running.remove(pod.metadata.name)

    kubelet.treat(namespace, on_pod=serve, terminate_s=HOLD)
    client.create(deployment("engine", namespace, probe=True, grace_s=1))
    wait("it ready", lambda: ready_replicas(client, "engine", namespace) == 1)
    (pod,) = pods(client, "engine", namespace)
    assert running == [pod.metadata.name]
    code = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=60).read())"
    asked = subprocess.run(
        [sys.executable, "-I", "-c", code, f"http://{pod.status.podIP}:{PORT}/health"],
        env={**os.environ, **pod_environ, "no_proxy": "*"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert asked.stdout.strip() == f"b'{pod.metadata.name}'"
    client.delete(Deployment, "engine", namespace=namespace)
    wait("its end", lambda: not exists(client, Pod, pod.metadata.name, namespace=namespace))
    assert running == []


def test_pods_wait_for_a_node_with_free_gpus(
    kubelet: FakeKubelet, client: Client, namespace: str
) -> None:
    for name in ("first", "second"):
        client.create(deployment(name, namespace, replicas=2, gpus=kubelet.gpus, grace_s=1))
        wait(f"2 pods of {name}", lambda name=name: len(pods(client, name, namespace)) == 2)
        if name == "first":
            wait("first ready", lambda: ready_replicas(client, "first", namespace) == 2)

    def reasons() -> list[str | None]:
        found = pods(client, "second", namespace)
        conditions = [one for pod in found for one in pod.status.conditions or []]
        return [one.reason for one in conditions if one.type == "PodScheduled"]

    wait("both unschedulable", lambda: reasons() == ["Unschedulable"] * 2)
    scale(client, "first", namespace, 1)
    wait("one of them ready", lambda: ready_replicas(client, "second", namespace) == 1)
    scale(client, "first", namespace, 0)
    wait("the other ready", lambda: ready_replicas(client, "second", namespace) == 2)


def test_pods_go_to_the_nodes_that_they_name(
    kubelet: FakeKubelet, client: Client, namespace: str
) -> None:
    first, *_ = kubelet.nodes
    chosen = deployment("engine", namespace, replicas=3)
    chosen.spec.template.spec.nodeSelector = {"kubernetes.io/hostname": first}
    client.create(chosen)
    wait("3 ready", lambda: ready_replicas(client, "engine", namespace) == 3)
    assert {pod.spec.nodeName for pod in pods(client, "engine", namespace)} == {first}
    # The pods of a DaemonSet name one each, full as the first is.
    client.create(
        DaemonSet(
            metadata=ObjectMeta(name="agent", namespace=namespace),
            spec=DaemonSetSpec(
                selector=LabelSelector(matchLabels={"app": "agent"}),
                template=pod_template("agent"),
            ),
        )
    )

    def ready() -> int:
        return client.get(DaemonSet, "agent", namespace=namespace).status.numberReady

    wait("all ready", lambda: ready() == len(kubelet.nodes))
    found = [pod.spec.nodeName for pod in pods(client, "agent", namespace)]
    assert sorted(found) == kubelet.nodes

    def created() -> int:
        events = client.list(Event, namespace=namespace)
        about = [event for event in events if event.involvedObject.kind == "DaemonSet"]
        return sum(event.count for event in about if event.reason == "SuccessfulCreate")

    # A pod on another node than its own would have been replaced.
    wait("events", lambda: created() >= len(kubelet.nodes))
    assert created() == len(kubelet.nodes)


def test_a_job_completes_when_its_pod_has_run(
    kubelet: FakeKubelet, client: Client, namespace: str
) -> None:
    treatment = kubelet.treat(namespace, run_s=HOLD)
    template = pod_template("preload")
    template.spec.restartPolicy = "Never"
    client.create(
        Job(metadata=ObjectMeta(name="preload", namespace=namespace), spec=JobSpec(template))
    )

    def phases() -> list[str | None]:
        return [pod.status.phase for pod in pods(client, "preload", namespace)]

    wait("it running", lambda: phases() == ["Running"])
    assert not client.get(Job, "preload", namespace=namespace).status.succeeded
    treatment.change(run_s=0)
    wait("its end", lambda: client.get(Job, "preload", namespace=namespace).status.succeeded == 1)
    assert phases() == ["Succeeded"]


def test_a_killed_apiserver_comes_back_with_its_state(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, namespace: str
) -> None:
    client.create(deployment("engine", namespace))
    wait("it ready", lambda: ready_replicas(client, "engine", namespace) == 1)
    before = [pod.metadata.uid for pod in pods(client, "engine", namespace)]
    plane.kill_apiserver()
    with plane.http() as http, pytest.raises(httpx.ConnectError):
        http.get("/version")
    plane.start_apiserver()
    assert [pod.metadata.uid for pod in pods(client, "engine", namespace)] == before
    scale(client, "engine", namespace, 2)
    wait("2 ready", lambda: ready_replicas(client, "engine", namespace) == 2)


def test_no_program_outlives_the_one_that_started_it(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib, control_plane\n"
        "child = control_plane.start_tied('s', ['/bin/sleep', '600'],"
        " log=pathlib.Path(sys.argv[1]))\n"
        "print(child.pid, flush=True); time.sleep(600)"
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "log"],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        wait("sleep", lambda: command_line(pid).startswith(b"/bin/sleep"))
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait("the end of its child", lambda: command_line(pid) == b"")


def command_line(pid: int) -> bytes:
    """Empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
