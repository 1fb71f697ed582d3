"""Services of Knative: its own autoscaler asked for replicas ahead of demand, and ours instead.

Knative itself is played: what it writes is written by the test.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import cluster_objects
import pytest
import stat_server
from cluster_objects import define, set_status
from control_plane import ControlPlane, wait
from fake_kubelet import FakeKubelet
from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.resources.apps_v1 import Deployment
from operator_rig import Operator, ask
from queue_proxy import QUEUE_PORT, QueueProxies
from scaling_times import ScalingTimes
from stat_server import StatServer

pytestmark = pytest.mark.timeout(600)

ModelPool = create_namespaced_resource("tidegate.dev", "v1alpha1", "ModelPool", "modelpools")
REVISION = "chat-00001"
WORKLOAD = f"{REVISION}-deployment"
LABELS = {"serving.knative.dev/service": "chat", "serving.knative.dev/revision": REVISION}


class Kinds(NamedTuple):
    """What Knative defines."""

    service: Any
    pod_autoscaler: Any
    serverless_service: Any


@pytest.fixture(scope="module")
def kinds(plane: ControlPlane) -> Kinds:
    return Kinds(
        define(plane, "serving.knative.dev", "v1", "Service"),
        define(plane, "autoscaling.internal.knative.dev", "v1alpha1", "PodAutoscaler"),
        define(plane, "networking.internal.knative.dev", "v1alpha1", "ServerlessService"),
    )


@pytest.fixture
def stats() -> Iterator[StatServer]:
    with stat_server.in_thread() as server:
        yield server


@pytest.fixture
def proxies() -> QueueProxies:
    return QueueProxies()


@pytest.fixture
def revision(
    client: Client, kubelet: FakeKubelet, kinds: Kinds, namespace: str, proxies: QueueProxies
) -> Any:
    """A revision at zero; returns what makes its PodAutoscaler."""
    kubelet.treat(namespace, on_pod=proxies.engines())
    deployment = cluster_objects.deployment(WORKLOAD, namespace, replicas=0)
    assert deployment.spec is not None
    assert deployment.spec.template.metadata is not None
    deployment.spec.template.metadata.labels = {"app": WORKLOAD, **LABELS}
    client.create(deployment)

    def make(**annotations: str) -> None:
        named = {f"autoscaling.knative.dev/{key}": text for key, text in annotations.items()}
        client.create(
            kinds.pod_autoscaler(
                metadata={
                    "name": REVISION,
                    "namespace": namespace,
                    "labels": LABELS,
                    "annotations": named,
                },
                spec={
                    "scaleTargetRef": {
                        "apiVersion": "apps/v1", "kind": "Deployment", "name": WORKLOAD,
                    },
                    "protocolType": "http1",
                    "reachability": "Reachable",
                    "containerConcurrency": 10,
                },
            )
        )  # fmt: skip

    return make


def replicas(client: Client, namespace: str) -> int | None:
    found = client.get(Deployment, WORKLOAD, namespace=namespace)
    assert found.spec is not None
    return found.spec.replicas


def test_a_held_request_is_reported_to_knative_s_autoscaler(
    client: Client,
    kinds: Kinds,
    revision: Any,
    operator: Operator,
    namespace: str,
    stats: StatServer,
    proxies: QueueProxies,
    times: ScalingTimes,
) -> None:
    revision()
    set_status(client, kinds.pod_autoscaler, REVISION, namespace, desiredScale=0)
    client.create(kinds.service(metadata={"name": "chat", "namespace": namespace}, spec={}))
    set_status(client, kinds.service, "chat", namespace, latestReadyRevisionName=REVISION)
    reference = {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "chat"}
    spec = {"targetRef": reference, "scaledBy": "knative", "maxReplicas": 4}
    client.create(ModelPool(metadata={"name": "chat", "namespace": namespace}, spec=spec))
    kubernetes = {"knative": {"autoscaler_url": stats.url}}
    with operator.running(kubernetes=kubernetes) as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        assert not stats.stats
        with ThreadPoolExecutor() as threads:
            reported = times.since_now("request held -> load is reported", "Knative's statistics")
            answer = threads.submit(ask, tidegate, "chat")
            wait("a report", lambda: stats.stats)
            reported()
            first = stats.stats[0]
            assert first.revision == f"{namespace}/{REVISION}"
            assert math.ceil(first.concurrency / 7) == 1  # of 10 at once, 70 %
            assert replicas(client, namespace) == 0, "Knative scales it, nobody else"
            cluster_objects.scale(client, WORKLOAD, namespace, 1)
            set_status(client, kinds.pod_autoscaler, REVISION, namespace, desiredScale=1)
            assert answer.result(60)
        (replica,) = tidegate.pool("chat")["replicas"]
        assert replica["url"].endswith(f":{QUEUE_PORT}")

        # Those that it counts keep a revision from going to zero.
        tidegate.wait("a scrape", lambda: "/metrics" in proxies.uncounted)
        assert "/health" in proxies.uncounted
        assert proxies.counted == ["/v1/chat/completions"]

        def silent() -> bool:
            count = len(stats.stats)
            time.sleep(3)
            return len(stats.stats) == count

        wait("no more reports, without demand", silent)


def test_a_revision_of_our_class_goes_from_zero_and_back(
    client: Client,
    kinds: Kinds,
    revision: Any,
    operator: Operator,
    namespace: str,
    times: ScalingTimes,
) -> None:
    revision(**{"class": "tidegate.dev", "max-scale": "2"})

    def services() -> Any:
        return client.get(kinds.serverless_service, REVISION, namespace=namespace)

    def status() -> dict[str, Any]:
        found = client.get(kinds.pod_autoscaler, REVISION, namespace=namespace)
        return dict(found.get("status") or {})

    def condition(kind: str) -> str:
        found = {one["type"]: one for one in status().get("conditions", ())}
        return str(found.get(kind, {}).get("status", ""))

    def scales() -> tuple[Any, Any]:
        return status().get("desiredScale"), status().get("actualScale")

    with operator.running(kubernetes={"knative": {"pod_autoscalers": True}}) as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        wait("its initial scale", lambda: replicas(client, namespace) == 1)
        tidegate.wait_ready(REVISION)
        assert (condition("ScaleTargetInitialized"), condition("Ready")) == ("Unknown", "Unknown")
        # What Knative does with a ServerlessService.
        assert services()["metadata"]["ownerReferences"][0]["kind"] == "PodAutoscaler"
        set_status(
            client,
            kinds.serverless_service,
            REVISION,
            namespace,
            serviceName=REVISION,
            privateServiceName=f"{REVISION}-private",
            conditions=[{"type": "Ready", "status": "True"}],
        )
        wait("initialized", lambda: condition("ScaleTargetInitialized") == "True")
        assert status()["serviceName"] == REVISION
        assert status()["metricsServiceName"] == f"{REVISION}-private"
        wait("0 replicas", lambda: replicas(client, namespace) == 0)
        wait("inactive", lambda: (condition("Active"), scales()) == ("False", (0, 0)))
        assert services()["spec"]["mode"] == "Proxy"
        with ThreadPoolExecutor() as threads:
            wanted = times.since_now("request held -> 1 replica wanted", "class tidegate.dev")
            answer = threads.submit(ask, tidegate, "chat")
            wait("1 replica", lambda: replicas(client, namespace) == 1)
            wanted()
            assert answer.result(60)
            wait("active", lambda: (condition("Ready"), scales()) == ("True", (1, 1)))
            assert services()["spec"]["mode"] == "Serve"
        wait("0 again", lambda: replicas(client, namespace) == 0)
        client.delete(kinds.pod_autoscaler, REVISION, namespace=namespace)
        tidegate.wait("no pool", lambda: not tidegate.admin("/status")["pools"])
