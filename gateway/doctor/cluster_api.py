"""What ``tidegate deploy check`` asks the API server of a cluster. Nothing is changed: reviews of
rights are answered and not kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

TIMEOUT_S = 10.0


class NoClusterError(Exception):
    """There is no access to a cluster; the message says why, in one line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiAnswer:
    """What the API server answered: its HTTP status, and its JSON object; else an empty one."""

    status: int
    body: dict[str, Any]


class ClusterApi(Protocol):
    """Asks an API server. ``url`` is its address, ``namespace`` the one that it is asked from."""

    url: str
    namespace: str

    def get(self, path: str) -> ApiAnswer:
        """Read. Raises ``NoClusterError`` where there is no answer."""
        ...

    def post(self, path: str, body: dict[str, Any]) -> ApiAnswer:
        """Have a review answered. Raises ``NoClusterError`` where there is no answer."""
        ...


class LiveCluster:
    """The cluster of a kubeconfig or of the pod's service account."""

    def __init__(self, kubeconfig: str | None, namespace: str | None) -> None:
        """``kubeconfig`` unset: the pod's service account, else ``KUBECONFIG`` and
        ``~/.kube/config``. Raises ``NoClusterError``."""
        try:
            import httpx2
            from lightkube import KubeConfig
            from lightkube.config.client_adapter import Client, ConnectionParams
            from lightkube.core.exceptions import ConfigError
        except ImportError as error:
            raise NoClusterError(
                f"the package {error.name} is missing: pip install 'tidegate[kubernetes]'"
            ) from None
        self._errors: tuple[type[Exception], ...] = (httpx2.HTTPError, ConfigError)
        try:
            found = (
                KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env()
            ).get()
            parameters = ConnectionParams(timeout=httpx2.Timeout(TIMEOUT_S))
            if found is None:
                raise NoClusterError("no access to Kubernetes: the kubeconfig has no context")
            self._http: Any = Client(found, parameters)
        except (ConfigError, OSError, KeyError, ValueError) as error:
            raise NoClusterError(f"no access to Kubernetes: {error}") from None
        self.url = str(found.cluster.server)
        self.namespace = namespace or str(found.namespace or "default")

    def get(self, path: str) -> ApiAnswer:
        """As ``ClusterApi``."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> ApiAnswer:
        """As ``ClusterApi``."""
        return self._ask("POST", path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> ApiAnswer:
        try:
            answer = self._http.request(method, path, json=body)
        except self._errors as error:
            text = str(error) or type(error).__name__
            raise NoClusterError(f"{self.url} is not reached: {text}") from None
        try:
            found = answer.json()
        except ValueError:
            found = {}
        return ApiAnswer(status=answer.status_code, body=found if isinstance(found, dict) else {})

    def close(self) -> None:
        """Close its connections."""
        self._http.close()
