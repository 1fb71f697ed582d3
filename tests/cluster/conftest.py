"""One control plane and one fake kubelet for all tests here; each test has its own namespace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import control_plane
import fake_kubelet
import pod_network
import pytest
import yaml
from control_plane import ControlPlane, create_missing, wait
from fake_kubelet import FakeKubelet
from lightkube import Client
from lightkube.codecs import from_dict
from lightkube.resources.core_v1 import Namespace
from operator_rig import OPERATOR, Operator
from scaling_times import ScalingTimes

TIMES = pytest.StashKey[ScalingTimes]()


@pytest.fixture(scope="session")
def times(pytestconfig: pytest.Config) -> ScalingTimes:
    """Where a test says how long it took until something was scaled."""
    return pytestconfig.stash.setdefault(TIMES, ScalingTimes())


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """What was scaled, through what, how fast."""
    lines = config.stash.get(TIMES, ScalingTimes()).lines()
    if lines:
        terminalreporter.section("what was scaled, through what, how fast")
    for line in lines:
        terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """The control plane."""
    with control_plane.running(tmp_path_factory.mktemp("control-plane")) as plane:
        yield plane


@pytest.fixture(scope="session")
def kubelet(plane: ControlPlane) -> Iterator[FakeKubelet]:
    """What makes its pods ready."""
    with fake_kubelet.running(plane) as kubelet:
        yield kubelet


@pytest.fixture
def client(plane: ControlPlane) -> Iterator[Client]:
    """The administrator's."""
    with plane.client() as client:
        yield client


@pytest.fixture
def namespace(plane: ControlPlane, client: Client) -> Iterator[str]:
    """A namespace of the test's own."""
    name = plane.make_namespace("test")
    yield name
    client.delete(Namespace, name)


@pytest.fixture(scope="session")
def pod_environ(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What a process has in its environment to reach pods by their addresses."""
    return pod_network.environ(pod_network.build(tmp_path_factory.mktemp("pod-network")))


@pytest.fixture(scope="session")
def definition(plane: ControlPlane) -> None:
    """The custom resource definition of ModelPool, as it is deployed."""
    document = yaml.safe_load((OPERATOR / "modelpools.yaml").read_text())
    with plane.client() as client:
        create_missing(client, from_dict(document))
        with plane.http() as http:
            path = "/apis/tidegate.dev/v1alpha1/modelpools"
            wait("ModelPools", lambda: http.get(path).status_code == 200)


@pytest.fixture
def operator(
    plane: ControlPlane,
    definition: None,
    namespace: str,
    pod_environ: dict[str, str],
    tmp_path: Path,
) -> Iterator[Operator]:
    """What starts Tidegates in the test's namespace."""
    operator = Operator(plane, namespace, pod_environ, tmp_path)
    yield operator
    for tidegate in operator.started:
        tidegate.kill_all()
