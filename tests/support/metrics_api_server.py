"""Tidegate's adapter behind the aggregation layer of a cluster.

``with fed(plane, namespace, folder) as signals`` runs the real adapter, which says of pools what
``signals.set`` is given; ``serving`` runs it for a real Tidegate. ``registered`` makes the
aggregation layer forward to any server on this machine: what it needs is a port, the authority that
signed the server's certificate, and that this is for ``SERVICE.NAMESPACE.svc``.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from adapter_process import Adapter, adapter
from admin_rig import TOKEN, ServedAdmin
from control_plane import ControlPlane, wait
from lightkube import Client
from lightkube.models.apiregistration_v1 import APIServiceSpec, ServiceReference
from lightkube.models.core_v1 import ServiceSpec
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.models.rbac_v1 import PolicyRule, RoleRef, Subject
from lightkube.resources.apiregistration_v1 import APIService
from lightkube.resources.core_v1 import Service
from lightkube.resources.rbac_authorization_v1 import ClusterRole, ClusterRoleBinding

from autoscaler.adapters.types import PoolSignals
from gateway.admin.schema import SignalsAnswer

CUSTOM, EXTERNAL = "custom.metrics.k8s.io", "external.metrics.k8s.io"
APIS = ((CUSTOM, "v1beta1"), (CUSTOM, "v1beta2"), (EXTERNAL, "v1beta1"))
SERVICE = "metrics"
READ_METRICS = {"apiGroups": [CUSTOM, EXTERNAL], "resources": ["*"], "verbs": ["get", "list"]}


class FedSignals:
    """Stands where a Tidegate is: says of its pools what the test sets."""

    def __init__(self) -> None:
        self._version = 1
        self._pools: tuple[PoolSignals, ...] = ()

    def set(self, *pools: PoolSignals) -> None:
        """What there is from now on."""
        self._version, self._pools = self._version + 1, pools

    def signals(self) -> SignalsAnswer:
        return SignalsAnswer(version=self._version, at_s=0.0, pools=self._pools)

    async def wait_for_activity(self, after: int, wait_s: float) -> None:
        await asyncio.sleep(min(wait_s, 0.1))


@contextlib.contextmanager
def fed(plane: ControlPlane, namespace: str, folder: Path, **settings: str) -> Iterator[FedSignals]:
    """The real adapter, served and registered; it says what the test feeds it."""
    signals = FedSignals()
    with (
        ServedAdmin(signals) as admin,
        serving(plane, namespace, folder, admin.url, TOKEN, **settings),
    ):
        yield signals


@contextlib.contextmanager
def serving(
    plane: ControlPlane, namespace: str, folder: Path, url: str, token: str, **settings: str
) -> Iterator[Adapter]:
    """``tidegate adapter`` as in a cluster, for the Tidegate whose admin listener is at ``url``: a
    service account of its own, the front proxy by its ConfigMap, both APIs registered."""
    pair = plane.ca.issue(f"{namespace}-{SERVICE}", hosts=(f"{SERVICE}.{namespace}.svc",))
    kubeconfig = plane.kubeconfig(
        "tidegate-adapter",
        namespace=namespace,
        cluster_roles=("system:auth-delegator",),
        roles=(("kube-system", "extension-apiserver-authentication-reader"),),
    )
    place = folder / "adapter.toml"
    given = {
        "tidegate_url": url,
        "tls_certificate": str(pair.certificate),
        "tls_key": str(pair.key),
        "kubeconfig": str(kubeconfig),
        "refresh_s": 0.3,
        **settings,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in given.items()]
    place.write_text("[adapter]\n" + "\n".join(lines))
    with adapter(place, environ={"TIDEGATE_ADMIN_TOKEN": token}) as running:
        port = int(running.url.rpartition(":")[2])
        with registered(plane, namespace, port=port, ca=plane.ca.certificate):
            yield running


@contextlib.contextmanager
def registered(
    plane: ControlPlane,
    namespace: str,
    *,
    port: int,
    ca: Path,
    apis: Sequence[tuple[str, str]] = APIS,
) -> Iterator[None]:
    """Have the aggregation layer forward these APIs to a server on this machine, until the end."""
    client = plane.client()
    client.create(
        Service(
            metadata=ObjectMeta(name=SERVICE, namespace=namespace),
            spec=ServiceSpec(type="ExternalName", externalName="localhost"),
        )
    )
    allow_horizontal_pod_autoscalers(client)
    bundle = base64.b64encode(ca.read_bytes()).decode()
    names = [f"{version}.{group}" for group, version in apis]
    for (group, version), name in zip(apis, names, strict=True):
        reference = ServiceReference(name=SERVICE, namespace=namespace, port=port)
        client.create(
            APIService(
                metadata=ObjectMeta(name=name),
                spec=APIServiceSpec(
                    group=group, version=version, service=reference, caBundle=bundle,
                    groupPriorityMinimum=100, versionPriority=100,
                ),
            )
        )  # fmt: skip
    try:
        for name in names:
            wait(f"available {name}", lambda name=name: _is_available(client, name))
        yield
    finally:
        for name in names:
            client.delete(APIService, name)


def allow_horizontal_pod_autoscalers(client: Client) -> None:
    """Let the controller read metrics; newer control planes allow it by themselves."""
    name = "horizontal-pod-autoscaler-metrics"
    client.apply(
        ClusterRole(
            metadata=ObjectMeta(name=name),
            rules=[PolicyRule.from_dict(READ_METRICS)],
        ),
        field_manager="tests",
    )
    controller = Subject(
        kind="ServiceAccount", name="horizontal-pod-autoscaler", namespace="kube-system"
    )
    client.apply(
        ClusterRoleBinding(
            metadata=ObjectMeta(name=name),
            roleRef=RoleRef(apiGroup="rbac.authorization.k8s.io", kind="ClusterRole", name=name),
            subjects=[controller],
        ),
        field_manager="tests",
    )


def _is_available(client: Client, name: str) -> bool:
    status = client.get(APIService, name).status
    conditions = (status.conditions if status else None) or []
    return any(one.type == "Available" and one.status == "True" for one in conditions)
