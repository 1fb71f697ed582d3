"""The adapter's section of the settings: whom it asks, and whom it answers."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from autoscaler.adapters.types import KubernetesObject
from autoscaler.settings import ConsistentSettings, Name, Url

AdapterApi = Literal[
    "custom.metrics.k8s.io/v1beta1",
    "custom.metrics.k8s.io/v1beta2",
    "external.metrics.k8s.io/v1beta1",
    "keda",
]
EVERY_API: tuple[AdapterApi, ...] = (
    "custom.metrics.k8s.io/v1beta1",
    "custom.metrics.k8s.io/v1beta2",
    "external.metrics.k8s.io/v1beta1",
    "keda",
)
ObjectName = Annotated[
    str, StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]


class AdapterObjectSettings(BaseModel):
    """An object of a cluster that a pool stands for, where Tidegate does not know it itself: a
    ``static`` pool is the Service that its URL names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pool: Name
    """The pool's name."""

    resource: ObjectName
    """The plural of its kind, with its group: ``deployments.apps``, ``services``."""

    namespace: ObjectName
    """Its namespace."""

    name: ObjectName
    """Its name."""

    labels: dict[str, str] = {}
    """Its labels, for label selectors."""

    @property
    def object(self) -> KubernetesObject:
        """It as the signals have it."""
        resource, _, group = self.resource.partition(".")
        return KubernetesObject(
            group=group,
            resource=resource,
            namespace=self.namespace,
            name=self.name,
            labels=self.labels,
        )


class AdapterSettings(ConsistentSettings):
    """``tidegate adapter``: what HPA and KEDA ask, answered from what a running Tidegate says."""

    tidegate_url: Url | None = None
    """Admin listener of the Tidegate whose pools these are (``http://tidegate:8001``); its token is
    in ``TIDEGATE_ADMIN_TOKEN``, else in the file ``gateway.admin_token_file``. Unset: the one that
    runs with this state directory, else ``gateway.admin_host`` and ``gateway.admin_port``."""

    apis: tuple[AdapterApi, ...] = Field(default=EVERY_API, max_length=4)
    """What is served. A cluster has one server of an API's version: leave out
    ``external.metrics.k8s.io/v1beta1`` where KEDA has it."""

    metrics_host: str = Field(default="127.0.0.1", min_length=1)
    """Address of the metrics APIs; in a cluster ``0.0.0.0`` or ``::``."""

    metrics_port: int = Field(default=8003, ge=0, le=65_535)
    """Port of the metrics APIs, which an APIService names by way of its Service; 0 takes any free
    one."""

    tls_certificate: Path | None = None
    """PEM file with the certificate chain of the metrics APIs, for SERVICE.NAMESPACE.svc; with
    ``tls_key``. A changed pair is used without a restart."""

    tls_key: Path | None = None
    """PEM file with the private key of ``tls_certificate``."""

    authorization: Literal["kubernetes", "none"] = "kubernetes"
    """Who may read metrics: ``kubernetes`` believes the API server's front proxy, or a bearer token
    that the cluster knows, and asks the cluster (SubjectAccessReview). ``none`` answers everybody,
    on loopback only."""

    kubeconfig: Path | None = None
    """How the cluster is reached; unset: as a pod's service account is, else by ``KUBECONFIG``."""

    front_proxy_ca: Path | None = None
    """PEM file with the authority of the front proxy's client certificate. Unset: as in the
    ConfigMap ``kube-system/extension-apiserver-authentication``, which is read again each
    minute."""

    front_proxy_names: tuple[str, ...] = Field(default=(), max_length=100)
    """Names (CN) that the front proxy may have in that certificate; empty: any. Only with
    ``front_proxy_ca``; else they are in the ConfigMap."""

    access_cache_s: float = Field(default=10.0, ge=0.0, le=300.0)
    """Seconds that the cluster's answer to who may read what is used."""

    refresh_s: float = Field(default=1.0, ge=0.1, le=60.0)
    """Seconds between two readings of the pools. A pool's first request is heard of at once."""

    stale_s: float = Field(default=15.0, ge=0.5, le=600.0)
    """Age from which what is known is not answered with any more: autoscalers get an error, and
    keep what they have. At least twice ``refresh_s``; 15 is HPA's own period."""

    keda_host: str = Field(default="127.0.0.1", min_length=1)
    """Address of the external scaler; in a cluster ``0.0.0.0`` or ``::``."""

    keda_port: int = Field(default=8004, ge=0, le=65_535)
    """Port of the external scaler, which a trigger names as ``scalerAddress``; 0 takes any free
    one."""

    keda_tls_certificate: Path | None = None
    """PEM file with the certificate chain of the external scaler; with ``keda_tls_key``. Unset:
    without TLS."""

    keda_tls_key: Path | None = None
    """PEM file with the private key of ``keda_tls_certificate``."""

    keda_client_ca: Path | None = None
    """PEM file with the authority of KEDA's client certificate, which it needs then."""

    keda_max_streams: int = Field(default=1_000, ge=1, le=100_000)
    """Streams that KEDA may have open: two for each trigger of an ``external-push`` scaler."""

    objects: tuple[AdapterObjectSettings, ...] = Field(default=(), max_length=1_000)
    """Objects of the cluster that pools stand for, where Tidegate does not know them itself."""

    def serves_metrics(self) -> bool:
        """Whether any of the metrics APIs is served."""
        return any(one != "keda" for one in self.apis)

    def _conflicts(self) -> Iterator[str]:
        for first, second in (
            ("tls_certificate", "tls_key"),
            ("tls_key", "tls_certificate"),
            ("keda_tls_certificate", "keda_tls_key"),
            ("keda_tls_key", "keda_tls_certificate"),
            ("keda_client_ca", "keda_tls_certificate"),
            ("front_proxy_names", "front_proxy_ca"),
        ):
            if getattr(self, first) and not getattr(self, second):
                yield f"{second} is missing: {first} is set, and needs it"
        if self.stale_s < 2 * self.refresh_s:
            least_s = 2 * self.refresh_s
            yield f"stale_s is {self.stale_s:g}, less than twice refresh_s: at least {least_s:g}"
        if not self.apis:
            yield "apis is empty: there would be nothing to serve"
        if (
            self.authorization == "none"
            and self.serves_metrics()
            and not _is_loopback(self.metrics_host)
        ):
            yield f'metrics_host is {self.metrics_host}: with authorization "none" only on loopback'
        if self.metrics_port == self.keda_port != 0:
            yield f"keda_port is {self.keda_port}, as metrics_port is: give each its own"


def _is_loopback(host: str) -> bool:
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
