"""What is deployed, as the API server itself sees it: every object that kustomize and Helm make,
and the examples, by a dry run with strict validation of fields."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cluster_objects
import deploy_builds
import helm_chart
import httpx
import kustomize
import pytest
import yaml
from control_plane import ControlPlane, create_missing, exists, wait
from fake_kubelet import FakeKubelet
from lightkube import ApiError, Client
from lightkube.codecs import from_dict
from lightkube.models.authentication_v1 import TokenReviewSpec
from lightkube.models.authorization_v1 import ResourceAttributes, SubjectAccessReviewSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.apiextensions_v1 import CustomResourceDefinition
from lightkube.resources.apps_v1 import Deployment
from lightkube.resources.authentication_v1 import TokenReview
from lightkube.resources.authorization_v1 import SubjectAccessReview
from lightkube.resources.core_v1 import ConfigMap, Namespace, Pod, Secret
from manifest_schemas import SPECS, read_all
from tidegate_process import Tidegate, start, wait_up

pytestmark = pytest.mark.timeout(900)

FRONT_PROXY = "extension-apiserver-authentication"
SINCE = (1, 28)
"""What the manifests are for. An older API server does not know all kinds and fields."""


@pytest.fixture
def objects(tmp_path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for one in deploy_builds.build_kustomizations(tmp_path).values():
        found += one
    for one in deploy_builds.render_charts().values():
        found += one
    for path in sorted((deploy_builds.KUBERNETES / "examples").glob("*.yaml")):
        found += read_all(path)
    unique = {json.dumps(one, sort_keys=True): one for one in found}
    return list(unique.values())


def paths(http: httpx.Client) -> dict[tuple[str, str], tuple[str, bool]]:
    """The path of each kind that the API server has, and whether it is in namespaces."""
    groups = [one["preferredVersion"] for one in http.get("/apis").json()["groups"]]
    versions = [f"/apis/{one['groupVersion']}" for one in groups] + ["/api/v1"]
    versions += ["/apis/apiregistration.k8s.io/v1"]
    found = {}
    for version in versions:
        answer = http.get(version).json()
        for one in answer["resources"]:
            if "/" not in one["name"]:
                found[answer["groupVersion"], one["kind"]] = (
                    version,
                    one["name"],
                    one["namespaced"],
                )
    return {key: (f"{path}/{name}", spaced) for key, (path, name, spaced) in found.items()}


def address(known: dict[tuple[str, str], tuple[str, bool]], one: dict[str, Any]) -> str:
    """Where an object of this kind is created."""
    path, namespaced = known[one["apiVersion"], one["kind"]]
    if not namespaced:
        return path
    head, _, name = path.rpartition("/")
    space = one["metadata"].get("namespace", deploy_builds.NAMESPACE)
    return f"{head}/namespaces/{space}/{name}"


def refusals(
    plane: ControlPlane, http: httpx.Client, objects: list[dict[str, Any]]
) -> Iterator[str]:
    known = paths(http)
    for one in objects:
        key = (one["apiVersion"], one["kind"])
        if key in SPECS:
            continue  # a kind of others, which is not installed here
        if key not in known:
            if plane.version >= SINCE:
                yield f"{key}: no such kind"
            continue
        answer = http.post(
            address(known, one), json=one, params={"dryRun": "All", "fieldValidation": "Strict"}
        )
        # 409: it is there already, as the definition is; it was checked all the same.
        if answer.status_code not in {201, 409}:
            yield f"{key} {one['metadata']['name']}: {answer.json().get('message')}"


def test_the_api_server_takes_everything_that_is_deployed(
    plane: ControlPlane, client: Client, objects: list[dict[str, Any]]
) -> None:
    create_missing(client, Namespace(metadata=ObjectMeta(name=deploy_builds.NAMESPACE)))
    definition = yaml.safe_load((deploy_builds.KUBERNETES / "operator/modelpools.yaml").read_text())
    create_missing(client, from_dict(definition))
    with plane.http() as http:
        pools = "/apis/tidegate.dev/v1alpha1/modelpools"
        wait("ModelPools", lambda: http.get(pools).status_code == 200)
        wait(
            "a service account",
            lambda: (
                http.get(
                    f"/api/v1/namespaces/{deploy_builds.NAMESPACE}/serviceaccounts/default"
                ).status_code
                == 200
            ),
        )
        assert list(refusals(plane, http, objects)) == []
        wrong = next(one for one in objects if one["kind"] == "Deployment")
        wrong = {**wrong, "spec": {**wrong["spec"], "replica": 2}}
        if plane.version >= SINCE:
            assert list(refusals(plane, http, [wrong])) != []
    assert len(objects) > 60


def test_the_operator_runs_as_it_is_deployed(
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    namespace: str,
    pod_environ: dict[str, str],
    tmp_path: Path,
) -> None:
    """All objects are made; Tidegate runs with their settings, their account and its rights, in the
    name of the Deployment's pods; its Service has the one that leads."""
    shutil.copytree(deploy_builds.KUBERNETES, tmp_path / "kubernetes")
    overlay = kustomize.write_overlay(
        tmp_path / "mine", ["../kubernetes/operator"], namespace=namespace
    )
    objects = kustomize.build(overlay)
    kubelet.treat(namespace)
    with plane.http() as http:
        known = paths(http)
        for one in objects:
            if (one["apiVersion"], one["kind"]) in known:
                answer = http.post(address(known, one), json=one)
                assert answer.status_code in {201, 409}, answer.text
        pools = "/apis/tidegate.dev/v1alpha1/modelpools"
        wait("ModelPools", lambda: http.get(pools).status_code == 200)
    wait("two pods", lambda: cluster_objects.ready_replicas(client, "tidegate", namespace) == 2)
    pods = list(client.list(Pod, namespace=namespace))
    addresses = {one.metadata.name: one.status.podIP for one in pods}
    assert len(addresses) == 2
    assert cluster_objects.ready_addresses(plane, client, "tidegate", namespace) == set()
    (config,) = (one for one in objects if one["kind"] == "ConfigMap")
    settings = tomllib.loads(config["data"]["tidegate.toml"])
    token = tmp_path / "token"
    token.write_text("a-token-for-this-very-test\n")
    token.chmod(0o440)
    account = plane.kubeconfig("tidegate", namespace=namespace)
    here = {"host": "127.0.0.1", "port": 0, "admin_host": "127.0.0.1", "admin_port": 0}
    gateway = {**settings["gateway"], **here, "admin_token_file": str(token)}
    cluster = {**settings["kubernetes"], "kubeconfig": str(account), "lease_s": 3.0}
    started: dict[str, Tidegate] = {}

    def leading(name: str) -> bool:
        found = cluster_objects.ready_addresses(plane, client, "tidegate", namespace)
        return found == {addresses[name]}

    try:
        for name in addresses:
            started[name] = start(
                tmp_path / name,
                pools=[],
                environ={**pod_environ, "HOSTNAME": name},
                gateway=gateway,
                kubernetes=cluster,
            )
            if len(started) == 1:
                wait_up(started[name])
        first, second = started
        wait("the Service has the leader", lambda: leading(first))
        started[first].stop()
        wait("the Service has the next", lambda: leading(second))
        started[second].stop()
        for tidegate in started.values():
            tidegate.assert_log_is_clean()
    finally:
        for tidegate in started.values():
            tidegate.kill_all()
    if plane.version >= SINCE:
        budget = f"/apis/policy/v1/namespaces/{namespace}/poddisruptionbudgets/tidegate"
        with plane.http() as http:
            wait(
                "a drain may take one",
                lambda: http.get(budget).json()["status"].get("disruptionsAllowed") == 1,
            )


def test_helm_installs_upgrades_and_takes_away_the_chart(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, namespace: str
) -> None:
    """Without the metrics APIs: one that does not answer keeps namespaces from being deleted."""
    if plane.version < SINCE:
        return  # the chart says so itself: kubeVersion
    kubelet.treat(namespace)
    chart = deploy_builds.CHART
    adapter = {"customMetrics": False, "externalMetrics": False}

    def token() -> str:
        found = client.get(Secret, "tidegate-admin-token", namespace=namespace).data
        assert found is not None
        return found["token"]

    helm_chart.deploy("install", plane.admin, namespace, chart, adapter=adapter)
    first = token()
    assert cluster_objects.ready_replicas(client, "tidegate", namespace) == 2
    assert cluster_objects.ready_replicas(client, "tidegate-adapter", namespace) == 2
    more = {"settings": "[autoscaler]\nidle_to_zero_s = 60\n", "replicas": 3}
    helm_chart.deploy("upgrade", plane.admin, namespace, chart, adapter=adapter, operator=more)
    assert token() == first, "kept"
    wait("3 pods", lambda: cluster_objects.ready_replicas(client, "tidegate", namespace) == 3)
    helm_chart.deploy("uninstall", plane.admin, namespace, chart)
    assert not exists(client, Deployment, "tidegate", namespace=namespace)
    assert exists(client, CustomResourceDefinition, "modelpools.tidegate.dev"), "pools stay"


def test_the_adapters_account_has_the_rights_that_it_uses_and_no_more(
    plane: ControlPlane, namespace: str, tmp_path: Path
) -> None:
    shutil.copytree(deploy_builds.KUBERNETES, tmp_path / "kubernetes")
    overlay = kustomize.write_overlay(
        tmp_path / "mine", ["../kubernetes/adapter"], namespace=namespace
    )
    rights = [
        one
        for one in kustomize.build(overlay)
        if one["kind"] in {"ServiceAccount", "ClusterRole", "ClusterRoleBinding"}
    ]
    made = []
    with plane.http() as http:
        known = paths(http)
        try:
            for one in rights:
                answer = http.post(address(known, one), json=one)
                assert answer.status_code == 201, answer.text
                made.append(f"{address(known, one)}/{one['metadata']['name']}")
            account = plane.kubeconfig("tidegate-adapter", namespace=namespace)
            with plane.client(account) as client:
                found = client.get(ConfigMap, FRONT_PROXY, namespace="kube-system")
                assert "requestheader-client-ca-file" in (found.data or {})
                for kind, name in ((ConfigMap, "kube-root-ca.crt"), (Secret, "any")):
                    with pytest.raises(ApiError) as refused:
                        client.get(kind, name, namespace="kube-system")
                    assert refused.value.status.code == 403
                spec = SubjectAccessReviewSpec(
                    user="system:serviceaccount:kube-system:horizontal-pod-autoscaler",
                    resourceAttributes=ResourceAttributes(
                        group="external.metrics.k8s.io", resource="any", verb="list", namespace="a"
                    ),
                )
                review = client.create(SubjectAccessReview(spec=spec))
                assert review.status is not None
                assert review.status.allowed
                tokens = TokenReview(spec=TokenReviewSpec(token="none"))
                assert client.create(tokens).status is not None
        finally:
            for path in made:
                http.delete(path)
