"""A stock HorizontalPodAutoscaler, on metrics of the adapter behind the aggregation layer."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import metrics_api_server
import pytest
import yaml
from cluster_objects import (
    autoscaler,
    autoscaler_kind,
    deployment,
    deployment_metric,
    external_metric,
    namespace_metric,
    pods,
    pods_metric,
    ready_replicas,
    service,
    service_metric,
)
from control_plane import ControlPlane, wait
from fake_kubelet import FakeKubelet
from lightkube import Client
from metrics_api_server import FedSignals
from scaling_times import ScalingTimes
from signal_rig import deployment as deployment_object
from signal_rig import pod as pod_object
from signal_rig import service as service_object
from signal_rig import signals

from autoscaler.adapters.types import PoolSignals, ReplicaSignals

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def fed(plane: ControlPlane, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FedSignals]:
    """What the adapter is told of pools; it has the metrics APIs of the cluster meanwhile."""
    place = plane.make_namespace("metrics")
    folder = tmp_path_factory.mktemp("adapter")
    with metrics_api_server.fed(plane, place, folder) as fed:
        yield fed


def of(namespace: str, **given: Any) -> PoolSignals:
    """The pool behind the Deployment and the Service ``engine`` in a namespace."""
    objects = (
        deployment_object("engine", namespace, app="engine"),
        service_object("engine", namespace),
    )
    return signals(
        "engine", **{"namespace": namespace, "objects": objects, "replicas": (), **given}
    )


def recommend(namespace: str, number: int) -> PoolSignals:
    return of(namespace, desired_replicas=number)


def load(namespace: str, number: int) -> PoolSignals:
    return of(namespace, inflight_tokens=10_000 * number)


def of_external(namespace: str) -> dict[str, Any]:
    return external_metric("tidegate_desired_replicas", 1, pool="engine")


def of_deployment(namespace: str) -> dict[str, Any]:
    found: dict[str, Any] = deployment_metric("engine", "tidegate_inflight_tokens", 10_000)
    return found


def of_service(namespace: str) -> dict[str, Any]:
    return service_metric("engine", "tidegate_desired_replicas", 1)


def of_namespace(namespace: str) -> dict[str, Any]:
    found: dict[str, Any] = namespace_metric(namespace, "tidegate_inflight_tokens", 10_000)
    return found


@pytest.mark.parametrize(
    ("make_metric", "feed"),
    [
        (of_external, recommend),
        (of_deployment, load),
        (of_service, recommend),
        (of_namespace, load),
    ],
    ids=["external", "of a deployment", "of a service", "of a namespace"],
)
def test_it_follows_a_metric_up_and_down(
    make_metric: Callable[[str], dict[str, Any]],
    feed: Any,
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    namespace: str,
    fed: FedSignals,
    times: ScalingTimes,
    request: pytest.FixtureRequest,
) -> None:
    client.create(deployment("engine", namespace))
    client.create(service("engine", namespace))
    wait("1 ready", lambda: ready_replicas(client, "engine", namespace) == 1)
    through = f"stock HPA, metric {request.node.callspec.id}"
    fed.set(feed(namespace, 3))
    grown = times.since_now("metric says 3 -> 3 ready", through)
    client.create(autoscaler(plane, "engine", namespace, make_metric(namespace)))
    wait("3 ready", lambda: ready_replicas(client, "engine", namespace) == 3)
    grown()
    shrunk = times.since_now("metric says 1 -> 1 ready", through)
    fed.set(feed(namespace, 1))
    wait("1 ready", lambda: ready_replicas(client, "engine", namespace) == 1)
    shrunk()


def test_it_follows_the_load_of_pods(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, namespace: str, fed: FedSignals
) -> None:
    client.create(deployment("engine", namespace, replicas=2))
    wait("2 ready", lambda: ready_replicas(client, "engine", namespace) == 2)

    def feed(tokens: int) -> None:
        names = [str(one.metadata.name) for one in pods(client, "engine", namespace)]
        replicas = tuple(
            ReplicaSignals(
                replica=name, ready=True, inflight_tokens=tokens,
                pod=pod_object(name, namespace, app="engine"),
            )
            for name in names
        )  # fmt: skip
        fed.set(of(namespace, replicas=replicas))

    feed(2_000)
    metric = pods_metric("tidegate_inflight_tokens", 1_000)
    client.create(autoscaler(plane, "engine", namespace, metric, highest=4))
    wait("4 ready", lambda: ready_replicas(client, "engine", namespace) == 4)


def test_what_is_unknown_or_stale_freezes_the_replicas(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, namespace: str, fed: FedSignals
) -> None:
    client.create(deployment("engine", namespace, replicas=2))
    fed.set(of(namespace, desired_replicas=2))
    metric = external_metric("tidegate_desired_replicas", 1, pool="engine")
    client.create(autoscaler(plane, "engine", namespace, metric))

    def active() -> str:
        """The state of its condition ScalingActive."""
        kind = autoscaler_kind(plane)
        found = client.get(kind, "engine", namespace=namespace).to_dict()
        conditions = (found.get("status") or {}).get("conditions") or ()
        for one in conditions:
            if one["type"] == "ScalingActive":
                return str(one["status"])
        return ""

    wait("an active autoscaler", lambda: active() == "True")
    fed.set(of(namespace, desired_replicas=None))
    wait("an inactive autoscaler", lambda: active() == "False")
    assert ready_replicas(client, "engine", namespace) == 2
    fed.set(of(namespace, desired_replicas=1))
    wait("1 ready", lambda: ready_replicas(client, "engine", namespace) == 1)


def test_who_may_read_metrics_is_the_cluster_s_to_say(
    plane: ControlPlane, namespace: str, fed: FedSignals
) -> None:
    fed.set(of(namespace))
    path = f"/apis/external.metrics.k8s.io/v1beta1/namespaces/{namespace}/tidegate_queued_tokens"

    def get(kubeconfig: Path) -> httpx.Response:
        token = yaml.safe_load(kubeconfig.read_text())["users"][0]["user"]["token"]
        trust = ssl.create_default_context(cafile=str(plane.ca.certificate))
        headers = {"authorization": f"Bearer {token}"}
        return httpx.get(
            plane.url + path, headers=headers, verify=trust, trust_env=False, timeout=30
        )

    nobody = plane.kubeconfig("nobody", namespace=namespace)
    assert get(nobody).status_code == 403
    rules = [metrics_api_server.READ_METRICS]
    reader = plane.kubeconfig("reader", namespace=namespace, rules=rules)
    wait("what the reader may", lambda: get(reader).status_code == 200)
    assert get(reader).json()["items"][0]["value"] == "900"


def test_discovery_is_the_aggregation_layer_s(plane: ControlPlane, fed: FedSignals) -> None:
    with plane.http() as http:
        for version in ("custom.metrics.k8s.io/v1beta1", "external.metrics.k8s.io/v1beta1"):
            listed = http.get(f"/apis/{version}").json()["resources"]
            assert any("tidegate_desired_replicas" in one["name"] for one in listed)
