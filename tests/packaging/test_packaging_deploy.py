"""What is deployed to Kubernetes, by kustomize and by Helm: valid in every version, least in
rights, of one mind, and the settings in it good."""

from __future__ import annotations

import base64
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import deploy_builds
import helm_chart
import pytest
import yaml
from deploy_builds import CASES, CHART, KUBERNETES, NAMESPACE
from helm_chart import Rendering
from manifest_schemas import find_problems, read, read_all

from autoscaler.backends.kubernetes.leader import LEADER_LABEL
from autoscaler.settings import KubernetesSettings
from gateway.settings.schema import Settings

pytestmark = pytest.mark.timeout(300)

REFUSED: Mapping[str, tuple[dict[str, Any], str]] = {
    "a value that there is not": ({"operator": {"replica": 2}}, "replica"),
    "a number as text": ({"operator": {"replicas": "2"}}, "replicas"),
    "nothing to serve": ({"adapter": {"customMetrics": False, "keda": False}}, "customMetrics"),
    "a secret that is not named": (
        {"adapter": {"certificate": {"source": "existing"}}},
        "existingSecret",
    ),
}


@pytest.fixture(scope="module")
def rendered() -> tuple[dict[str, Rendering], list[str]]:
    """The chart with each set of values, and what lint says of it."""
    values = [*CASES.values(), *(one for one, _ in REFUSED.values())]
    renderings, lint = helm_chart.render(CHART, values, namespace=NAMESPACE)
    return dict(zip([*CASES, *REFUSED], renderings, strict=True)), lint


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Kustomizations as users make them."""
    return deploy_builds.build_kustomizations(tmp_path_factory.mktemp("deploy"))


@pytest.fixture(scope="module")
def every(
    built: dict[str, Any], rendered: tuple[dict[str, Rendering], list[str]]
) -> dict[str, Sequence[dict[str, Any]]]:
    """All objects that are deployed, by how."""
    charts = {f"chart: {name}": rendered[0][name].objects for name in CASES}
    return {**{f"kustomize: {name}": one for name, one in built.items()}, **charts}


def walk(every: Mapping[str, Sequence[dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for way, objects in every.items():
        for one in objects:
            yield f"{way}: {one['kind']} {one['metadata']['name']}", one


def pick(objects: Sequence[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = (
        one
        for one in objects
        if one["kind"] == kind and re.sub("-[a-z0-9]{10}$", "", one["metadata"]["name"]) == name
    )
    return found


# -- valid -----------------------------------------------------------------------------------------


def test_everything_is_valid_in_every_version(
    every: dict[str, Sequence[dict[str, Any]]],
) -> None:
    seen = set()
    for where, one in walk(every):
        text = json.dumps(one, sort_keys=True)
        if text not in seen:
            assert find_problems(one) == [], where
        seen.add(text)
    assert len(seen) > 60


def test_what_is_wrong_is_found(built: dict[str, Any]) -> None:
    deployment = json.loads(json.dumps(pick(built["operator"], "Deployment", "tidegate")))
    spec = deployment["spec"]["template"]["spec"]
    spec["containers"][0]["securityContext"]["readOnlyRootFileSystem"] = True
    spec["containers"][0]["ports"][0]["containerPort"] = "8000"
    del deployment["spec"]["selector"]
    found = find_problems(deployment, ["1.37"])
    assert len(found) == 3
    assert all(word in "".join(found) for word in ("readOnlyRootFileSystem", "'8000'", "selector"))
    monitor = pick(built["adapter"], "ServiceMonitor", "tidegate-adapter")
    assert find_problems({**monitor, "spec": {**monitor["spec"], "endpoint": []}}) != []
    assert find_problems({**monitor, "kind": "PodMonitor"}, ["1.37"]) != []


def test_the_examples_are_valid() -> None:
    files = sorted((KUBERNETES / "examples").glob("*.yaml"))
    assert len(files) >= 10
    for path in files:
        documents = read_all(path)
        versions = ["1.37"] if path.name == "hpa-from-zero.yaml" else ["1.28", "1.37"]
        for document in documents:
            assert find_problems(document, versions) == [], path
            assert "namespace" not in document["metadata"], path
        if path.name not in {"kueue.yaml", "knative-class.yaml"}:
            assert any(one["kind"] == "ModelPool" for one in documents), path


def test_helm_finds_nothing_wrong_with_the_chart(
    rendered: tuple[dict[str, Rendering], list[str]],
) -> None:
    renderings, lint = rendered
    assert lint == []
    for name in CASES:
        assert renderings[name].error == "", name
        assert renderings[name].objects, name
        assert "{{" not in renderings[name].notes
    for name, (_, word) in REFUSED.items():
        assert word in renderings[name].error, name


def test_a_changed_setting_of_the_operator_is_a_rollout() -> None:
    cases: list[dict[str, Any]] = [
        {},
        {"cacheAgent": {"path": "/mnt/nvme/tidegate"}},
        {"operator": {"allNamespaces": True}},
        {"operator": {"settings": "[autoscaler]\nidle_to_zero_s = 60\n"}},
    ]
    renderings, _ = helm_chart.render(CHART, cases, namespace=NAMESPACE)
    settings, rollouts = set(), set()
    for one in renderings:
        deployment = pick(one.objects, "Deployment", "tidegate")
        settings.add(pick(one.objects, "ConfigMap", "tidegate")["data"]["tidegate.toml"])
        rollouts.add(
            deployment["spec"]["template"]["metadata"]["annotations"]["tidegate.dev/settings"]
        )
    assert len(settings) == len(rollouts) == len(cases)


def names_in_the_cluster(namespace: str) -> set[tuple[str, str]]:
    """What a release has outside its namespace, but for APIServices: a cluster has one of each."""
    (release,), _ = helm_chart.render(CHART, [CASES["all"]], namespace=namespace)
    return {
        (one["kind"], one["metadata"]["name"])
        for one in release.objects
        if one["kind"].startswith(("Cluster", "ValidatingAdmission"))
        or one["metadata"].get("namespace") == "kube-system"
    }


def test_releases_of_one_name_in_two_namespaces_share_no_object() -> None:
    ours, theirs = map(names_in_the_cluster, ("models", "others"))
    assert len(ours) == len(theirs) >= 8
    assert not ours & theirs


def test_the_chart_has_the_same_definition_and_probe() -> None:
    for ours, other in {
        "crds/modelpools.yaml": "operator/modelpools.yaml",
        "files/probe.py": "cache-agent/probe.py",
    }.items():
        assert (CHART / ours).read_bytes() == (KUBERNETES / other).read_bytes()


def test_the_chart_has_the_projects_version(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    meta = read(CHART / "Chart.yaml")
    assert meta["version"] == meta["appVersion"] == project["version"]


# -- of one mind -----------------------------------------------------------------------------------

HELM_LABELS = ("app.kubernetes.io/instance", "app.kubernetes.io/managed-by", "helm.sh/chart")
"""What the chart adds to labels and selectors."""


def plain(one: Any) -> Any:
    """Without what only Helm or only kustomize adds."""
    if isinstance(one, dict):
        left_out = (*HELM_LABELS, "imagePullPolicy")
        return {key: plain(value) for key, value in one.items() if key not in left_out}
    if isinstance(one, list):
        return [plain(value) for value in one]
    return (
        re.sub(r"^(tidegate(?:-adapter)?(?:-tls)?)-[a-z0-9]{10}$", r"\1", one)
        if isinstance(one, str)
        else one
    )


def by_name(objects: Sequence[dict[str, Any]]) -> dict[tuple[str, str], Any]:
    found = {}
    for one in map(plain, objects):
        one["metadata"].pop("namespace", None)
        one["metadata"]["name"] = one["metadata"]["name"].removeprefix(f"{NAMESPACE}-")
        for image in one.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            image["image"] = "tidegate"
        one.get("spec", {}).get("template", {}).get("metadata", {}).pop("annotations", None)
        found[one["kind"], one["metadata"]["name"]] = one
    return found


def test_chart_and_kustomize_deploy_the_same(
    built: dict[str, Any], rendered: tuple[dict[str, Rendering], list[str]]
) -> None:
    by_kustomize = by_name([*built["operator"], *built["adapter"]])
    by_chart = by_name(rendered[0]["defaults"].objects)
    compared = 0
    for key, one in by_chart.items():
        if key[0] in {"ConfigMap", "Secret", "APIService"}:
            continue  # settings are compared by what they say; certificates are made anew
        if "authentication-reader" in key[1] or "metrics-reader" in key[1]:
            continue  # a Role of kube-system, which kustomize's namespace would move
        if key[0] in {"ClusterRoleBinding"}:
            assert one["roleRef"] == by_kustomize[key]["roleRef"]
            continue
        assert one == by_kustomize[key], key
        compared += 1
    assert compared >= 12


def toml_of(objects: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    return tomllib.loads(pick(objects, "ConfigMap", name)["data"]["tidegate.toml"])


def test_chart_and_kustomize_have_the_same_settings(
    built: dict[str, Any], rendered: tuple[dict[str, Rendering], list[str]]
) -> None:
    charted = toml_of(rendered[0]["defaults"].objects, "tidegate")
    assert charted["kubernetes"].pop("all_namespaces") is False
    directory = charted["kubernetes"].pop("node_cache_dir")
    assert directory == KubernetesSettings().node_cache_dir
    assert charted == toml_of(built["operator"], "tidegate")
    every = toml_of(rendered[0]["all"].objects, "tidegate-adapter")
    assert every == toml_of(built["adapter"], "tidegate-adapter")
    agent = toml_of(rendered[0]["all"].objects, "tidegate-cache-agent")
    (config,) = (one for one in built["cache agent"] if one["kind"] == "ConfigMap")
    assert agent == tomllib.loads(config["data"]["tidegate.toml"])


def test_settings_are_good_and_fit_the_objects(
    every: dict[str, Sequence[dict[str, Any]]],
) -> None:
    checked = 0
    for way, objects in every.items():
        deployments = [one for one in objects if one["kind"] == "Deployment"]
        for deployment in deployments:
            name = deployment["metadata"]["name"]
            (container,) = deployment["spec"]["template"]["spec"]["containers"]
            config = tomllib.loads(pick(objects, "ConfigMap", name)["data"]["tidegate.toml"])
            for one in container["env"]:
                if one["name"].startswith("TIDEGATE__"):
                    into = config
                    *path, last = one["name"].lower().split("__")[1:]
                    for part in path:
                        into = into.setdefault(part, {})
                    into[last] = one["value"]
            settings = Settings.model_validate(config, strict=False)
            ports = {one["name"]: one["containerPort"] for one in container["ports"]}
            if container["command"] == ["tidegate", "up"]:
                assert (settings.gateway.port, settings.gateway.admin_port) == (
                    ports["http"],
                    ports["admin"],
                ), way
                assert settings.gateway.picker.port == ports.get("picker"), way
                services = [one for one in objects if one["kind"] == "Service"]
                leaders = [
                    one["spec"]["selector"][LEADER_LABEL]
                    for one in services
                    if LEADER_LABEL in one["spec"]["selector"]
                ]
                assert set(leaders) == {settings.kubernetes.lease}, way
                assert settings.gateway.admin_allowed_hosts == ("tidegate-admin",)
                grace_s = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
                assert grace_s > settings.gateway.drain_s
            else:
                adapter = settings.adapter
                assert (adapter.metrics_port, adapter.keda_port) == (ports["https"], ports["keda"])
                assert adapter.tidegate_url == "http://tidegate-admin:8001"
            checked += 1
    assert checked >= 10


def test_selectors_names_and_ports_fit_each_other(
    every: dict[str, Sequence[dict[str, Any]]],
) -> None:
    for way, objects in every.items():
        pods = {
            one["metadata"]["name"]: one["spec"]["template"]
            for one in objects
            if one["kind"] in {"Deployment", "DaemonSet"}
        }
        accounts = {one["metadata"]["name"] for one in objects if one["kind"] == "ServiceAccount"}
        volumes = {
            f"{one['kind']}/{one['metadata']['name']}"
            for one in objects
            if one["kind"] in {"ConfigMap", "PersistentVolumeClaim"}
        }
        for template in pods.values():
            spec = template["spec"]
            assert spec["serviceAccountName"] in accounts, way
            mounted = {one["name"] for box in spec["containers"] for one in box["volumeMounts"]}
            assert mounted == {one["name"] for one in spec["volumes"]}, way
            for one in spec["volumes"]:
                claim = one.get("persistentVolumeClaim", {}).get("claimName")
                assert claim is None or f"PersistentVolumeClaim/{claim}" in volumes
                for source in one.get("projected", {}).get("sources", ()):
                    if "configMap" in source:
                        assert f"ConfigMap/{source['configMap']['name']}" in volumes, way
        for one in objects:
            if one["kind"] not in {"Service", "NetworkPolicy", "PodDisruptionBudget"}:
                continue
            spec = one["spec"]
            selector = spec.get("selector") or spec.get("podSelector")
            wanted = dict(selector.get("matchLabels", selector))
            wanted.pop(LEADER_LABEL, None)
            (template,) = (
                pod for pod in pods.values() if wanted.items() <= pod["metadata"]["labels"].items()
            )
            names = {
                port["name"] for box in template["spec"]["containers"] for port in box["ports"]
            }
            if one["kind"] == "Service":
                assert {port["targetPort"] for port in spec["ports"]} <= names, way
            for rule in spec.get("ingress", ()):
                assert {port["port"] for port in rule["ports"]} <= names, way


def test_a_rollout_ends_and_a_drain_goes_on(every: dict[str, Sequence[dict[str, Any]]]) -> None:
    """Of several pods one is always left, and none is waited for that cannot become ready."""
    for way, objects in every.items():
        for one in objects:
            if one["kind"] != "Deployment":
                continue
            spec = one["spec"]
            budgets = [
                budget["spec"]
                for budget in objects
                if budget["kind"] == "PodDisruptionBudget"
                and budget["metadata"]["name"] == one["metadata"]["name"]
            ]
            if spec["replicas"] == 1:
                assert spec["strategy"] == {"type": "Recreate"}, way
                assert budgets == [], way
                continue
            assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}, way
            assert [budget["maxUnavailable"] for budget in budgets] == [1], way


# -- safe ------------------------------------------------------------------------------------------


def test_pods_have_no_right_that_they_do_not_need(
    every: dict[str, Sequence[dict[str, Any]]],
) -> None:
    for where, one in walk(every):
        if one["kind"] == "ServiceAccount":
            assert one["automountServiceAccountToken"] is False, where
        if one["kind"] not in {"Deployment", "DaemonSet"}:
            continue
        spec = one["spec"]["template"]["spec"]
        security = spec["securityContext"]
        assert security["runAsNonRoot"] is True, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where
            assert "memory" in container["resources"]["limits"], where
        assert "hostNetwork" not in spec, where


def rules_of(objects: Sequence[dict[str, Any]], kind: str, name: str) -> list[dict[str, Any]]:
    found = pick(objects, kind, name)["rules"]
    assert isinstance(found, list)
    return found


def test_roles_name_what_they_give(every: dict[str, Sequence[dict[str, Any]]]) -> None:
    for where, one in walk(every):
        if one["kind"] not in {"Role", "ClusterRole"}:
            continue
        for rule in one["rules"]:
            assert "*" not in rule["verbs"], where
            assert "secrets" not in rule["resources"], where
            if "*" in rule["resources"]:
                assert set(rule["apiGroups"]) <= {
                    "custom.metrics.k8s.io",
                    "external.metrics.k8s.io",
                }, where


def test_all_namespaces_have_the_rules_of_one(
    built: dict[str, Any], rendered: tuple[dict[str, Rendering], list[str]]
) -> None:
    here = rules_of(built["operator"], "Role", "tidegate")
    everywhere = rules_of(built["operator and more"], "ClusterRole", "tidegate")
    leases = [one for one in here if one["resources"] == ["leases"]]
    assert len(leases) == 1
    assert [one for one in here if one not in leases] == everywhere
    charted = rules_of(rendered[0]["defaults"].objects, "Role", "tidegate")
    assert charted == here
    wide = rules_of(rendered[0]["all"].objects, "ClusterRole", f"{NAMESPACE}-tidegate")
    more = rules_of(built["operator and more"], "Role", "tidegate")
    assert [*leases, *wide] == more


def test_subjects_are_in_the_users_namespace(every: dict[str, Sequence[dict[str, Any]]]) -> None:
    for where, one in walk(every):
        for subject in one.get("subjects", ()):
            place = "kube-system" if "horizontal" in subject["name"] else NAMESPACE
            assert subject["namespace"] == place, where
        if one["kind"] == "APIService":
            assert one["spec"]["service"]["namespace"] == NAMESPACE, where


def test_the_api_server_trusts_the_certificate_that_is_shown(
    built: dict[str, Any], rendered: tuple[dict[str, Rendering], list[str]]
) -> None:
    from cryptography import x509

    for objects in (built["adapter"], rendered[0]["defaults"].objects):
        services = [one for one in objects if one["kind"] == "APIService"]
        assert services
        secret = pick(objects, "Secret", "tidegate-adapter-tls")
        assert {one["spec"]["caBundle"] for one in services} == {secret["data"]["tls.crt"]}
        found = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == [f"tidegate-adapter.{NAMESPACE}.svc"]


def test_cert_manager_is_told_where_the_certificate_is(
    built: dict[str, Any], rendered: tuple[dict[str, Rendering], list[str]]
) -> None:
    for objects in (built["cert-manager"], rendered[0]["cert-manager"].objects):
        certificate = pick(objects, "Certificate", "tidegate-adapter")["spec"]
        assert certificate["dnsNames"] == [f"tidegate-adapter.{NAMESPACE}.svc"]
        for one in objects:
            if one["kind"] == "APIService":
                source = one["metadata"]["annotations"]["cert-manager.io/inject-ca-from"]
                assert source == f"{NAMESPACE}/tidegate-adapter"


def test_no_secret_is_written_down() -> None:
    for path in KUBERNETES.rglob("*.yaml"):
        assert not re.search(r"^kind: Secret", path.read_text(), re.MULTILINE), path
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert values["adminToken"] == {"existingSecret": ""}
