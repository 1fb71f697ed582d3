"""A cache agent on a node of a cluster: it says there which models it has, and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from control_plane import ControlPlane, create_missing, wait
from fake_kubelet import FakeKubelet
from lightkube import ApiError, Client
from lightkube.codecs import from_dict
from lightkube.models.core_v1 import Container, PodSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Node, Pod, ServiceAccount
from lightkube.types import PatchType

from autoscaler.operator.node_labels import label_of

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).resolve().parents[2]
DEPLOYED = ROOT / "deploy" / "kubernetes" / "cache-agent" / "node-labels"
ACCOUNT = "tidegate-cache-agent"
TOKENS_NAME_NODES_SINCE = (1, 32)


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOYED / name).read_text())


@pytest.fixture
def agent_pod(kubelet: FakeKubelet, client: Client, namespace: str) -> Pod:
    """The agent's pod, on a node."""
    create_missing(client, ServiceAccount(metadata=ObjectMeta(name=ACCOUNT, namespace=namespace)))
    spec = PodSpec(containers=[Container(name="agent", image="a:1")], serviceAccountName=ACCOUNT)
    pod = Pod(metadata=ObjectMeta(name="agent", namespace=namespace), spec=spec)

    def is_created() -> bool:
        try:
            client.create(pod)
        except ApiError as error:  # before 1.24 a new account has no token for a moment
            if "No API token found" in (error.status.message or ""):
                return False
            raise
        return True

    wait("a token of the account", is_created)

    def is_bound() -> Pod | None:
        pod = client.get(Pod, "agent", namespace=namespace)
        return pod if pod.spec.nodeName else None

    return wait("a node for the agent", is_bound)


@pytest.fixture
def kubeconfig(plane: ControlPlane, client: Client, agent_pod: Pod, namespace: str) -> Path:
    """What the agent may do, as it is deployed."""
    if plane.version >= TOKENS_NAME_NODES_SINCE:
        for name in ("policy.yaml", "policybinding.yaml"):
            create_missing(client, from_dict(read(name)))
    rules = read("clusterrole.yaml")["rules"]
    return plane.kubeconfig(ACCOUNT, namespace=namespace, cluster_rules=rules, pod=agent_pod)


def labels(client: Client, node: str) -> dict[str, str]:
    return client.get(Node, node).metadata.labels or {}


def test_a_node_is_labelled_with_the_models_of_its_agent(
    client: Client, agent_pod: Pod, kubeconfig: Path, tmp_path: Path
) -> None:
    node = agent_pod.spec.nodeName
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    settings = (
        f"state_dir={tmp_path / 'state'}",
        f"modelcache.dir={tmp_path / 'cache'}",
        f"kubernetes.kubeconfig={kubeconfig}",
        f"kubernetes.node={node}",
    )
    command = [sys.executable, "-m", "gateway.cli.main"]
    options = [word for one in settings for word in ("-s", one)]
    environ = {**os.environ, "TIDEGATE_PEER_TOKEN": "a secret of this test alone"}
    with (tmp_path / "log").open("wb") as log:
        agent = subprocess.Popen(
            [*command, "agent", "--admin-port", "0", "--peer-port", "0", *options],
            stdout=log,
            stderr=log,
            env=environ,
            cwd=ROOT,
        )
    try:
        wait("an agent", lambda: (tmp_path / "state" / "agent.json").exists())
        url = model.as_uri()
        fetched = subprocess.run(
            [*command, "model", "preload", url, "-s", f"state_dir={tmp_path / 'state'}"],
            capture_output=True,
            text=True,
            env=environ,
            cwd=ROOT,
        )
        assert fetched.returncode == 0, fetched.stderr
        label = label_of(url)
        wait("a label", lambda: labels(client, node).get(label) == "true")
        assert (client.get(Node, node).metadata.annotations or {})[label] == url
        evicted = subprocess.run(
            [*command, "model", "evict", url, "-s", f"state_dir={tmp_path / 'state'}"],
            capture_output=True,
            text=True,
            env=environ,
            cwd=ROOT,
        )
        assert evicted.returncode == 0, evicted.stderr
        wait("no label", lambda: label not in labels(client, node))
    finally:
        agent.send_signal(signal.SIGTERM)
        agent.wait(60)
    assert agent.returncode == 0, (tmp_path / "log").read_text()


def test_an_agent_changes_only_its_own_node_and_only_labels_of_models(
    plane: ControlPlane, kubelet: FakeKubelet, client: Client, agent_pod: Pod, kubeconfig: Path
) -> None:
    own = agent_pod.spec.nodeName
    other = next(name for name in kubelet.nodes if name != own)
    model = {"metadata": {"labels": {label_of("hf://a/b"): "true"}}}
    role = {"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}}
    gone = {"metadata": {"labels": {"kubernetes.io/hostname": None}}}
    spec = {"spec": {"unschedulable": True}}
    with plane.client(kubeconfig) as agent:

        def patch(name: str, body: Any) -> None:
            agent.patch(Node, name, body, patch_type=PatchType.MERGE)

        patch(own, model)
        if plane.version < TOKENS_NAME_NODES_SINCE:
            return  # its tokens name no node, so that no policy can tell
        client.patch(
            Node,
            own,
            {"metadata": {"labels": {"kubernetes.io/hostname": own}}},
            patch_type=PatchType.MERGE,
        )
        patch(own, {"metadata": {"labels": {label_of("hf://a/b"): None}}})

        def is_refused(name: str, body: Any) -> bool:
            try:
                patch(name, body)
            except ApiError as error:
                return "a cache agent changes" in (error.status.message or "")
            return False

        wait("the policy", lambda: is_refused(other, model), within_s=120)
        for body in (role, gone, spec):
            assert is_refused(own, body), body
        patch(own, model)
