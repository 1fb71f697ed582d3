"""From requests to replicas: a real Tidegate recommends, its adapter says so, a stock
HorizontalPodAutoscaler scales.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import metrics_api_server
import pytest
from asking import ask_now, chat
from cluster_engines import simulated_engines
from cluster_objects import autoscaler, deployment, external_metric, ready_replicas, service
from control_plane import ControlPlane, wait
from fake_kubelet import FakeKubelet
from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.core_v1 import Service
from operator_rig import Operator, ask
from scaling_times import ScalingTimes
from tidegate_process import Tidegate, simulated, up

pytestmark = pytest.mark.timeout(600)


def test_requests_move_a_deployment(
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    namespace: str,
    tmp_path: Path,
    times: ScalingTimes,
) -> None:
    flags = ("--decode-tokens-per-s", 20, "--output-tokens", 800, "--output-spread", 0)
    pool = simulated("engine", *flags, mode="advise", min_replicas=1, max_replicas=3)
    with up(tmp_path / "tidegate", pools=[pool]) as tidegate:
        token = (tidegate.state_dir / "admin-token").read_text().strip()
        tidegate.wait_ready("engine")
        with metrics_api_server.serving(
            plane, plane.make_namespace("metrics"), tmp_path, tidegate.admin_url, token
        ):
            client.create(deployment("engine", namespace))
            metric = external_metric("tidegate_desired_replicas", 1, pool="engine")
            client.create(autoscaler(plane, "engine", namespace, metric))
            wait("1 ready", lambda: ready_replicas(client, "engine", namespace) == 1)
            body = chat("engine", "x " * 6_000, max_tokens=800)
            asking = [threading.Thread(target=ask_now, args=(tidegate, body)) for _ in range(8)]
            grown = times.since_now("8 requests -> 3 ready", "stock HPA, tidegate_desired_replicas")
            for one in asking:
                one.start()
            wait("3 ready", lambda: ready_replicas(client, "engine", namespace) == 3)
            grown()
            for one in asking:
                one.join(300)
            assert tidegate.pool("engine")["ready"] == 1  # it recommends, and scales nothing


ModelPool = create_namespaced_resource("tidegate.dev", "v1alpha1", "ModelPool", "modelpools")


def model_pool(namespace: str, labels: Mapping[str, str] | None = None, **spec: Any) -> Any:
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": "llama"}
    metadata = {"name": "llama", "namespace": namespace, "labels": dict(labels or {})}
    return ModelPool(metadata=metadata, spec={"targetRef": target, "maxReplicas": 3, **spec})


def token_of(tidegate: Tidegate) -> str:
    return (tidegate.state_dir / "admin-token").read_text().strip()


def test_a_stock_autoscaler_owns_zero_and_tidegate_writes_no_number(
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    operator: Operator,
    namespace: str,
    tmp_path: Path,
    times: ScalingTimes,
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(deployment("llama", namespace))
    client.create(model_pool(namespace, scaledBy="hpa", zeroOwner="hpa"))
    # An account that may write no number: a try would be refused, and be in the log.
    reads = [
        {**rule, "verbs": ["get"]} if "apps" in rule["apiGroups"] else rule
        for rule in operator.rules
    ]
    spectator = plane.kubeconfig("spectator", namespace=namespace, rules=reads)

    def number() -> int | None:
        spec = client.get(Deployment, "llama", namespace=namespace).spec
        return None if spec is None else spec.replicas

    with operator.running(kubernetes={"kubeconfig": str(spectator)}) as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama")
        assert ask(tidegate, "llama")
        place = plane.make_namespace("metrics")
        with metrics_api_server.serving(
            plane, place, tmp_path, tidegate.admin_url, token_of(tidegate)
        ):
            metric = external_metric("tidegate_desired_replicas", 1, pool="llama")
            client.create(autoscaler(plane, "llama", namespace, metric, lowest=0, highest=3))
            wait("0 replicas", lambda: number() == 0)
            tidegate.wait("none left", lambda: not tidegate.pool("llama")["replicas"])
            woken = times.since_now("request held -> answered", "stock HPA owns zero")
            with ThreadPoolExecutor() as threads:
                answer = threads.submit(ask, tidegate, "llama")
                wait("1 replica", lambda: (number() or 0) >= 1)
                assert answer.result(120)
            woken()
            wait("0 replicas again", lambda: number() == 0)


def test_objects_are_selected_by_their_own_labels(
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    operator: Operator,
    namespace: str,
    tmp_path: Path,
) -> None:
    kubelet.treat(namespace, on_pod=simulated_engines())
    client.create(deployment("llama", namespace, labels={"tier": "gold", "team": "a"}))
    client.create(service("llama", namespace, labels={"tier": "gold", "team": "b"}))
    client.create(model_pool(namespace, {"team": "c"}, service="llama", minReplicas=1))
    with operator.running() as tidegate:
        tidegate.wait("a pool", lambda: tidegate.admin("/status")["pools"])
        tidegate.wait_ready("llama")
        place = plane.make_namespace("metrics")
        with (
            metrics_api_server.serving(
                plane, place, tmp_path, tidegate.admin_url, token_of(tidegate)
            ),
            plane.http() as http,
        ):
            base = f"/apis/custom.metrics.k8s.io/v1beta2/namespaces/{namespace}"

            def read(path: str, **query: str) -> httpx.Response:
                """Once the aggregation layer and the adapter's first reading are there."""

                def look() -> httpx.Response | None:
                    answer = http.get(f"{base}/{path}", params=query)
                    return None if answer.status_code == 503 else answer

                return wait(f"an answer to {path}", look)

            def selected(resource: str, selector: str) -> list[str]:
                answer = read(f"{resource}/*/tidegate_ready_replicas", labelSelector=selector)
                if answer.status_code == 404:
                    return []
                items = answer.raise_for_status().json()["items"]
                return [one["describedObject"]["name"] for one in items]

            for resource, team in (
                ("deployments.apps", "a"), ("services", "b"), ("modelpools.tidegate.dev", "c"),
            ):  # fmt: skip
                wait(resource, lambda r=resource, t=team: selected(r, f"team={t}") == ["llama"])
                assert selected(resource, f"team!={team}") == []
            assert selected("services", "tier in (gold,silver),!old") == ["llama"]
            labels = {"metadata": {"labels": {"team": "z"}}}
            client.patch(Service, "llama", labels, namespace=namespace)
            wait("the new label", lambda: selected("services", "team=z") == ["llama"])
            total = read("metrics/tidegate_ready_replicas").json()
            assert [one["value"] for one in total["items"]] == ["1"]
