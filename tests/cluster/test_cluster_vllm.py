"""The real vLLM in a pod: from zero, out of the cache of its node, as the pod's containers say."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from asyncio.subprocess import Process
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pod_network
import pytest
from control_plane import ControlPlane, wait
from fake_kubelet import FakeKubelet
from lightkube import Client
from lightkube.generic_resource import create_namespaced_resource
from lightkube.models.core_v1 import Container
from lightkube.resources.core_v1 import Pod
from object_server import IndexedServer, serving
from operator_rig import Operator, ask
from scaling_times import ScalingTimes

from autoscaler.operator.node_cache import LINK

PATIENCE_S = 600.0
HAS_SIDECARS_SINCE = (1, 29)
COMMAND = Path(sys.executable).parent / "tidegate"
ModelPool = create_namespaced_resource("tidegate.dev", "v1alpha1", "ModelPool", "modelpools")

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(PATIENCE_S + 120)]


class Node:
    """A node's directory with its cache agent, and pods whose containers are processes here."""

    def __init__(self, directory: Path, engine_python: Path) -> None:
        self.directory, self.engine_python = directory, engine_python
        self.links = 0

    @asynccontextmanager
    async def run(self, pod: Pod) -> AsyncIterator[None]:
        """Its containers, in order: the engine starts when the startup probe of the one before it
        has seen the link."""
        self.links += 1
        link = self.directory / f"link-{self.links}"
        (engine,) = pod.spec.containers
        inside = {LINK: str(link)}
        async with AsyncExitStack() as stack:
            for holder in pod.spec.initContainers or ():
                assert holder.restartPolicy == "Always"
                assert holder.startupProbe.exec.command == ["test", "-d", LINK]
                words = [inside.get(word, word) for word in holder.command]
                environ = {**os.environ, **{one.name: one.value for one in holder.env}}
                sidecar = await stack.enter_async_context(
                    process(str(COMMAND), *words[1:], environ=environ, log=self.log(holder))
                )
                while not link.is_dir():
                    assert sidecar.returncode is None, self.log(holder).read_text()
                    await asyncio.sleep(0.1)
            words = [inside.get(word, word) for word in engine.args]
            host = pod_network.loopback(pod.status.podIP)
            # What `vllm serve MODEL` runs; the command itself does not start from the CPU's wheel.
            server = ("-m", "vllm.entrypoints.openai.api_server", "--model", *words, "--host", host)
            await stack.enter_async_context(
                process(str(self.engine_python), *server, environ=ENGINE, log=self.log(engine))
            )
            yield

    def log(self, container: Container) -> Path:
        """What a container says."""
        return self.directory / f"{container.name}-{self.links}.log"


ENGINE = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    # Threads that are bound to cores which others use wait for each other.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}


@asynccontextmanager
async def process(*argv: str, environ: dict[str, str], log: Path) -> AsyncIterator[Process]:
    """One process, ended as a kubelet ends a container."""
    with log.open("ab") as file:
        started = await asyncio.create_subprocess_exec(
            *argv, stdin=asyncio.subprocess.DEVNULL, stdout=file, stderr=file, env=environ
        )
    try:
        yield started
    finally:
        if started.returncode is None:
            started.terminate()
            try:
                await asyncio.wait_for(started.wait(), 60)
            except TimeoutError:
                started.kill()
                await started.wait()


@pytest.fixture
def model_url(model_dir: Path) -> Iterator[str]:
    """The default model in a store."""
    server = IndexedServer()
    files = [one for one in model_dir.iterdir() if one.name != "tidegate-manifest.json"]
    server.objects = {f"models/small/{one.name}": one.read_bytes() for one in files}
    with serving(server):
        yield f"{server.url}/models/small/"


def settings_of(directory: Path) -> list[str]:
    """Those of the agent of a node."""
    sets = [f"state_dir={directory / 'agent'}", f"modelcache.dir={directory / 'cache'}"]
    return [word for one in sets for word in ("-s", one)]


@pytest.fixture
def node(engine_python: Path, tmp_path: Path) -> Iterator[Node]:
    """A node whose agent runs."""
    node = Node(tmp_path / "node", engine_python)
    node.directory.mkdir()
    ports = ("--admin-port", "0", "--peer-port", "0")
    agent = subprocess.Popen(
        [COMMAND, "agent", *ports, *settings_of(node.directory)],
        env={**os.environ, "TIDEGATE_PEER_TOKEN": "a secret of this test"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        record = node.directory / "agent" / "agent.json"
        wait("an agent", lambda: record.exists() or agent.poll() is not None)
        yield node
        assert agent.poll() is None
    finally:
        agent.terminate()
        agent.wait(60)


def test_vllm_starts_from_its_nodes_cache_for_a_held_request(
    plane: ControlPlane,
    kubelet: FakeKubelet,
    client: Client,
    operator: Operator,
    namespace: str,
    times: ScalingTimes,
    node: Node,
    model_url: str,
    model_dir: Path,
) -> None:
    cached = plane.version >= HAS_SIDECARS_SINCE
    kubelet.treat(namespace, on_pod=node.run)
    template = {"spec": {"containers": [{"name": "engine", "image": "vllm/vllm-openai:v0.32.0"}]}}
    spec = {
        "servedName": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "model": model_url if cached else str(model_dir),
        "engine": "vllm",
        "maxModelLenTokens": 1024,
        "engineArgs": ["--max-num-seqs", "8", "--enforce-eager"],
        "useNodeCache": cached,
        "template": template,
    }
    client.create(ModelPool(metadata={"name": "small", "namespace": namespace}, spec=spec))
    kubernetes = {"node_cache_dir": str(node.directory), "node_cache_image": "tidegate:1"}
    # vLLM takes all cores: the API server may be slow to answer meanwhile.
    kubernetes["lease_s"] = 60.0
    holding = {"holding": {"deadline_s": PATIENCE_S}}
    with operator.running(kubernetes=kubernetes, gateway=holding) as tidegate:
        tidegate.expected_log.append("API server")
        wait("a pool", lambda: bool(tidegate.admin("/status")["pools"]))
        answered = times.since_now("request held -> answered by vLLM", "vLLM in a pod")
        answer = ask(
            tidegate, "HuggingFaceTB/SmolLM2-135M-Instruct", max_tokens=8, timeout=PATIENCE_S
        )
        answered()
        assert answer
        if cached:
            (model,) = listing(node.directory)
            assert model["url"] == model_url
            assert model["leases"], "the pod's container holds it"
        wait("0 pods", lambda: not [*client.list(Pod, namespace=namespace)], within_s=120)
    assert not any(one["leases"] for one in listing(node.directory))


def listing(directory: Path) -> list[dict[str, Any]]:
    """The models in a node's cache, as its agent sees them."""
    done = subprocess.run(
        [COMMAND, "model", "ls", "--json", *settings_of(directory)],
        capture_output=True,
        check=True,
        timeout=100,
    )
    models: list[dict[str, Any]] = json.loads(done.stdout)["models"]
    return models
