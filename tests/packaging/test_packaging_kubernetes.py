"""The cache agents' Kubernetes manifests: valid, safe, of one mind, and started as they say."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_schemas import read

from gateway.settings.schema import Settings
from modelcache.fetch.download import JOIN_S
from modelcache.pagecache.holder import END_S
from modelcache.peers.server import MOST_WAIT_S

COMMAND = str(Path(sys.executable).parent / "tidegate")
NAME = "tidegate-cache-agent"
START_S = 60
ADMIN_S = 5
"""What the admin listener may take to end (``serve_admin_on``)."""


@pytest.fixture(scope="module")
def base(root: Path) -> Path:
    return root / "deploy" / "kubernetes" / "cache-agent"


@pytest.fixture(scope="module")
def manifests(base: Path) -> dict[str, dict[str, Any]]:
    """The documents of the base by kind."""
    names = read(base / "kustomization.yaml")["resources"]
    return {document["kind"]: document for document in map(read, map(base.joinpath, names))}


@pytest.fixture(scope="module")
def pod(manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec = manifests["DaemonSet"]["spec"]["template"]["spec"]
    assert isinstance(spec, dict)
    return spec


@pytest.fixture(scope="module")
def agent(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    assert isinstance(container, dict)
    return container


@pytest.fixture(scope="module")
def settings(base: Path) -> Settings:
    return Settings.model_validate(tomllib.loads((base / "tidegate.toml").read_text()))


# -- valid (by the schemas: ``test_packaging_deploy``) ------------------------------------------


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "twice.yaml").write_text("a: 1\nb: {c: 1, c: 2}\n")
    with pytest.raises(yaml.YAMLError, match="'c'"):
        read(tmp_path / "twice.yaml")


def test_the_kustomization_names_every_file(base: Path) -> None:
    kustomization = read(base / "kustomization.yaml")
    (generator,) = kustomization["configMapGenerator"]
    named = {"kustomization.yaml", "README.md", *kustomization["resources"], *generator["files"]}
    assert named == {path.name for path in base.iterdir() if path.is_file()}
    components = sorted(path.parent for path in base.glob("*/kustomization.yaml"))
    assert [path.name for path in components] == ["make-directory", "node-labels"]
    for folder in components:
        component = read(folder / "kustomization.yaml")
        patches = [one["path"] for one in component["patches"]]
        named = {"kustomization.yaml", *patches, *component.get("resources", ())}
        assert named == {path.name for path in folder.iterdir()}


def test_no_namespace_and_no_secret_is_written_down(base: Path) -> None:
    for path in base.rglob("*.yaml"):
        text = path.read_text()
        assert not re.search(r"^\s*namespace:", text, re.MULTILINE), path
        assert not re.search(r"^kind: Secret", text, re.MULTILINE), path


# -- of one mind -----------------------------------------------------------------------------------


def test_names_labels_and_ports_fit_each_other(
    manifests: dict[str, dict[str, Any]], pod: dict[str, Any], agent: dict[str, Any], base: Path
) -> None:
    daemonset, service = manifests["DaemonSet"]["spec"], manifests["Service"]
    policy = manifests["NetworkPolicy"]["spec"]
    labels = daemonset["template"]["metadata"]["labels"].items()
    selectors = [daemonset["selector"]["matchLabels"], service["spec"]["selector"]]
    selectors += [policy["podSelector"]["matchLabels"]]
    (rule,) = policy["ingress"]
    selectors.append(rule["from"][0]["podSelector"]["matchLabels"])
    assert all(one.items() <= labels for one in selectors)
    (port,) = agent["ports"]
    assert [one["port"] for one in rule["ports"]] == [port["name"]]
    (exposed,) = service["spec"]["ports"]
    assert (exposed["targetPort"], exposed["port"]) == (port["name"], port["containerPort"])
    assert service["spec"]["clusterIP"] == "None"
    assert pod["serviceAccountName"] == manifests["ServiceAccount"]["metadata"]["name"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = {mount["name"]: mount["mountPath"] for mount in agent["volumeMounts"]}
    assert set(volumes) == set(mounts)
    (generator,) = read(base / "kustomization.yaml")["configMapGenerator"]
    assert volumes["config"]["configMap"]["name"] == generator["name"]


def test_the_settings_fit_the_manifests(
    manifests: dict[str, dict[str, Any]],
    pod: dict[str, Any],
    agent: dict[str, Any],
    settings: Settings,
) -> None:
    (port,) = agent["ports"]
    service = manifests["Service"]["metadata"]["name"]
    assert settings.modelcache.peer_port == port["containerPort"]
    assert settings.modelcache.peer_names == (f"http://{service}:{port['containerPort']}",)
    mounts = {mount["name"]: mount["mountPath"] for mount in agent["volumeMounts"]}
    # Where pods of ModelPools look for them by default.
    assert mounts["node"] == Settings().kubernetes.node_cache_dir
    assert str(settings.modelcache.dir) == f"{mounts['node']}/cache"
    assert str(settings.state_dir) == f"{mounts['node']}/agent"
    assert settings.gateway.admin_host == "127.0.0.1"
    admin = f"http://127.0.0.1:{settings.gateway.admin_port}"
    asked = [agent[probe]["exec"]["command"][-1] for probe in ("readinessProbe", "livenessProbe")]
    assert asked == [f"{admin}/readyz", f"{admin}/healthz"]
    (config,) = [one["value"] for one in agent["env"] if one["name"] == "TIDEGATE_CONFIG"]
    assert config == f"{mounts['config']}/tidegate.toml"


def test_the_settings_are_good_by_the_command(base: Path) -> None:
    done = subprocess.run(
        [COMMAND, "config", "check", "--config", str(base / "tidegate.toml")],
        env={**os.environ, "TIDEGATE__MODELCACHE__PEER_HOST": "10.0.0.7"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_an_agent_has_the_time_it_may_take_to_end(pod: dict[str, Any]) -> None:
    longest_s = ADMIN_S + MOST_WAIT_S + 5 + END_S + JOIN_S
    assert pod["terminationGracePeriodSeconds"] > longest_s


# -- safe ------------------------------------------------------------------------------------------


def test_it_runs_with_no_right_that_it_does_not_need(
    manifests: dict[str, dict[str, Any]], pod: dict[str, Any], agent: dict[str, Any], root: Path
) -> None:
    assert pod["automountServiceAccountToken"] is False
    assert manifests["ServiceAccount"]["automountServiceAccountToken"] is False
    security = pod["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    dockerfile = (root / "deploy" / "docker" / "Dockerfile").read_text()
    assert f"USER {security['runAsUser']}:{security['runAsGroup']}\n" in dockerfile
    assert agent["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert set(agent["resources"]["requests"]) == set(agent["resources"]["limits"])
    assert manifests["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress"]


def test_the_secret_is_the_users_and_must_be_there(agent: dict[str, Any]) -> None:
    (token,) = [one for one in agent["env"] if one["name"] == "TIDEGATE_PEER_TOKEN"]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "tidegate-peer-token", "key": "token"}}
    assert "value" not in token


def test_the_component_gives_the_directory_to_the_agents_user(
    base: Path, pod: dict[str, Any], agent: dict[str, Any]
) -> None:
    patch = read(base / "make-directory" / "patch.yaml")["spec"]["template"]["spec"]
    (maker,) = patch["initContainers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in agent["volumeMounts"]}
    owner = f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
    assert maker["command"] == ["chown", owner, mounts["node"]]
    assert maker["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["CHOWN"]}
    assert maker["image"] == agent["image"]
    assert maker["volumeMounts"] == [{"name": "node", "mountPath": mounts["node"]}]


# -- started as it says ----------------------------------------------------------------------------


@dataclass
class Started:
    """An agent with the manifest's command, settings and environment, in folders of the test."""

    process: subprocess.Popen[str]
    env: dict[str, str]
    admin: str
    probe: Path

    def ask(self, command: list[str]) -> subprocess.CompletedProcess[str]:
        """Run a probe's command as the kubelet does, against this agent."""
        program, *words = command
        assert program == "python"
        words = [str(self.probe) if word == "/etc/tidegate/probe.py" else word for word in words]
        words = [word.replace("http://127.0.0.1:8001", self.admin) for word in words]
        return self.run(sys.executable, *words)

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=100, check=False
        )


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def started(agent: dict[str, Any], base: Path, tmp_path: Path) -> Iterator[Started]:
    admin_port, peer_port = free_ports(2)
    text = (base / "tidegate.toml").read_text()
    for old, new in {
        "8001": str(admin_port),
        "8002": str(peer_port),
        "/var/lib/tidegate/agent": str(tmp_path / "state"),
        "/var/lib/tidegate/cache": str(tmp_path / "cache"),
        NAME: "localhost",  # the service's name, whose addresses are this machine's here
    }.items():
        assert old in text
        text = text.replace(old, new)
    config = tmp_path / "tidegate.toml"
    config.write_text(text)
    given = {
        "TIDEGATE_CONFIG": str(config),
        "TIDEGATE__MODELCACHE__PEER_HOST": "127.0.0.1",
        "TIDEGATE_PEER_TOKEN": "a secret for this very test",
    }
    assert set(given) == {one["name"] for one in agent["env"]}
    env = {**os.environ, **given}
    program, *words = agent["command"]
    assert program == "tidegate"
    process = subprocess.Popen(
        [COMMAND, *words],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    admin = f"http://127.0.0.1:{admin_port}"
    try:
        yield Started(process, env, admin, base / "probe.py")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=30)


def wait_ready(started: Started, command: list[str]) -> None:
    deadline_s = time.monotonic() + START_S
    while (done := started.ask(command)).returncode != 0:
        assert started.process.poll() is None, started.process.communicate()[0]
        assert time.monotonic() < deadline_s, done.stderr
        time.sleep(0.2)


def test_it_starts_answers_its_probes_and_ends_in_time(
    started: Started, agent: dict[str, Any], pod: dict[str, Any]
) -> None:
    ready = agent["readinessProbe"]["exec"]["command"]
    alive = agent["livenessProbe"]["exec"]["command"]
    wait_ready(started, ready)
    assert started.ask(alive).returncode == 0
    refused = started.ask([*alive[:-1], "http://127.0.0.1:8001/no-such-path"])
    assert refused.returncode == 1
    assert ": 401 " in refused.stderr
    # As `kubectl exec` would: the same environment leads it to the agent.
    listed = started.run(COMMAND, "model", "ls")
    assert listed.returncode == 0, listed.stderr
    assert "No model is in it" in listed.stdout
    started.process.send_signal(signal.SIGTERM)
    said, _ = started.process.communicate(timeout=pod["terminationGracePeriodSeconds"])
    assert started.process.returncode == 0, said
    assert "Traceback" not in said
    assert "cannot be looked up" not in said
    gone = started.ask(ready)
    assert gone.returncode == 1
    assert gone.stderr.count("\n") == 1, "one line, which Kubernetes shows as the event"
