"""The Kubernetes API, through lightkube: which resources there are, and what its errors mean.

Objects are plain dicts, as the API server sends them: custom resources and those of its own alike.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, cast

from autoscaler.backends.base import BackendError
from autoscaler.settings import KubernetesSettings

Object = dict[str, Any]
"""An object of the API, as JSON."""

FIELD_MANAGER = "tidegate"
"""The owner of the fields that Tidegate applies (server-side apply)."""
CONFLICT_TRIES = 5
"""How often a write that met another one is tried, at most."""

_PLURALS = {"EndpointSlice": "endpointslices", "InferencePool": "inferencepools"}


class KubernetesError(BackendError):
    """The API server refused, or could not be reached. ``status`` is its HTTP status; ``None``
    where there was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status

    @property
    def is_passing(self) -> bool:
        """Whether the same call may succeed later: the API server is away or overloaded."""
        return self.status is None or self.status == 429 or self.status >= 500

    @property
    def level(self) -> int:
        """How it is logged where many calls meet it in turn: an API server that is away is in the
        log once, by the lists that are kept."""
        return logging.DEBUG if self.is_passing else logging.WARNING


@cache
def resource(api_version: str, kind: str, plural: str = "", *, namespaced: bool = True) -> Any:
    """The class by which lightkube knows a kind of objects. ``plural`` is its name in paths; unset:
    as nearly all kinds form it."""
    from lightkube.generic_resource import create_global_resource, create_namespaced_resource

    group, _, version = api_version.rpartition("/")
    create = create_namespaced_resource if namespaced else create_global_resource
    return create(group, version, kind, plural or _PLURALS.get(kind) or pluralize(kind))


def pluralize(kind: str) -> str:
    """The name of a kind in paths, as the Kubernetes code generators form it."""
    name = kind.lower()
    if name.endswith(("s", "x", "ch", "sh")):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}s"


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Errors of lightkube as ``KubernetesError``, with what was done."""
    import httpx2
    from lightkube.core.exceptions import ApiError

    try:
        yield
    except ApiError as error:
        status = error.status
        raise KubernetesError(f"{what}: {status.message or status.reason}", status.code) from None
    except httpx2.HTTPStatusError as error:
        code = error.response.status_code
        raise KubernetesError(f"{what}: the API server answered {code}", code) from None
    except httpx2.HTTPError as error:
        text = str(error) or type(error).__name__
        raise KubernetesError(f"{what}: the API server is not reached ({text})") from None


class KubernetesClient:
    """Calls to one API server, each within ``timeout_s``. Raises ``KubernetesError``."""

    def __init__(self, kubeconfig: str | None = None, *, timeout_s: float = 10.0) -> None:
        """``kubeconfig`` unset: the pod's service account, else ``KUBECONFIG`` and
        ``~/.kube/config``."""
        import httpx2
        from lightkube import AsyncClient, KubeConfig
        from lightkube.core.exceptions import ConfigError

        try:
            config = (
                KubeConfig.from_file(kubeconfig) if kubeconfig else KubeConfig.from_env()
            ).get()
            self._api: Any = AsyncClient(
                config=config, timeout=httpx2.Timeout(timeout_s), field_manager=FIELD_MANAGER
            )
        except (ConfigError, OSError, KeyError, ValueError) as error:
            raise KubernetesError(f"no access to Kubernetes: {error}") from None
        self.namespace: str = self._api.namespace
        """The namespace of the service account, or of the kubeconfig's context."""

    async def get(self, kind: Any, name: str, namespace: str | None = None) -> Object | None:
        """An object; ``None`` where there is none of this name."""
        with naming_errors(f"get {describe(kind)} {name}"):
            try:
                return as_object(await self._api.get(kind, name, namespace=namespace))
            except Exception as error:
                if status_of(error) == 404:
                    return None
                raise

    async def read_all(
        self, kind: Any, namespace: str | None, labels: Mapping[str, str] | None = None
    ) -> tuple[list[Object], str]:
        """All objects of a kind (namespace ``*``: of all namespaces), and the version of the
        list."""
        with naming_errors(f"list {describe(kind)}"):
            found = self._api.list(kind, namespace=namespace, labels=labels, chunk_size=500)
            objects = [as_object(one) async for one in found]
            return objects, found.resourceVersion

    async def watch(
        self,
        kind: Any,
        namespace: str | None,
        version: str,
        labels: Mapping[str, str] | None = None,
        *,
        lasts_s: int,
    ) -> AsyncIterator[tuple[str, Object]]:
        """The changes since a version, each as (``ADDED``, ``MODIFIED`` or ``DELETED``, object),
        without end; the API server is asked anew every ``lasts_s`` seconds."""
        with naming_errors(f"watch {describe(kind)}"):
            async for event, found in self._api.watch(
                kind,
                namespace=namespace,
                labels=labels,
                resource_version=version,
                server_timeout=lasts_s,
            ):
                yield event, as_object(found)

    async def create(self, kind: Any, obj: Object, namespace: str | None = None) -> Object:
        """Create an object. Raises with the status 409 where there is one of this name."""
        name = obj["metadata"].get("name") or obj["metadata"].get("generateName")
        with naming_errors(f"create {describe(kind)} {name}"):
            return as_object(await self._api.create(kind(obj), namespace=namespace))

    async def replace(self, kind: Any, obj: Object, namespace: str | None = None) -> Object:
        """Replace an object that is still of the version that was read; else raises with the status
        409."""
        with naming_errors(f"replace {describe(kind)} {obj['metadata']['name']}"):
            return as_object(await self._api.replace(kind(obj), namespace=namespace))

    async def merge(
        self, kind: Any, name: str, patch: Object, namespace: str | None = None
    ) -> Object:
        """Change fields of an object (JSON merge patch, which every kind of resource takes)."""
        return await self._patch(kind, name, patch, namespace, "MERGE")

    async def patch(
        self, kind: Any, name: str, patch: Sequence[Object], namespace: str | None = None
    ) -> Object:
        """Change parts of an object by JSON patch; its ``test`` operations must hold."""
        return await self._patch(kind, name, patch, namespace, "JSON")

    async def apply(
        self,
        kind: Any,
        obj: Object,
        namespace: str | None = None,
        *,
        force: bool = False,
        manager: str = FIELD_MANAGER,
    ) -> Object:
        """Have an object with these fields, which are the manager's from then on (server-side
        apply). Raises with the status 409 where another owns one of them, unless ``force``."""
        name = obj["metadata"]["name"]
        return await self._patch(kind, name, obj, namespace, "APPLY", force=force, manager=manager)

    async def delete(self, kind: Any, name: str, namespace: str | None = None) -> None:
        """Delete an object; nothing to do where there is none."""
        with naming_errors(f"delete {describe(kind)} {name}"):
            try:
                from lightkube.types import CascadeType

                # A Job's pods would stay behind otherwise.
                await self._api.delete(
                    kind, name, namespace=namespace, cascade=CascadeType.BACKGROUND
                )
            except Exception as error:
                if status_of(error) != 404:
                    raise

    async def _patch(
        self,
        kind: Any,
        name: str,
        patch: object,
        namespace: str | None,
        how: str,
        *,
        force: bool = False,
        manager: str = FIELD_MANAGER,
    ) -> Object:
        from lightkube.types import PatchType

        with naming_errors(f"patch {describe(kind)} {name}"):
            for tried in range(1, CONFLICT_TRIES + 1):
                try:
                    found = await self._api.patch(
                        kind,
                        name,
                        patch,
                        namespace=namespace,
                        patch_type=PatchType[how],
                        field_manager=manager,
                        force=force,
                    )
                    return as_object(found)
                except Exception as error:
                    # Another write came between; only an apply that is refused is meant so.
                    if status_of(error) != 409 or how == "APPLY" or tried == CONFLICT_TRIES:
                        raise
            raise AssertionError("unreachable")

    async def close(self) -> None:
        """Close its connections. It is not used afterwards."""
        await self._api.close()


def connect(settings: KubernetesSettings) -> KubernetesClient:
    """A client of the cluster that the settings name. Raises ``KubernetesError`` where there is no
    access to one, or what it takes is not installed."""
    try:
        return KubernetesClient(settings.kubeconfig)
    except ImportError as error:
        text = f"the package {error.name} is missing: pip install 'tidegate[kubernetes]'"
        raise KubernetesError(text) from None


def status_of(error: Exception) -> int | None:
    """The HTTP status of an error of lightkube."""
    status = getattr(getattr(error, "status", None), "code", None)
    if isinstance(status, int):
        return status
    code = getattr(getattr(error, "response", None), "status_code", None)
    return code if isinstance(code, int) else None


def as_object(found: Any) -> Object:
    """What lightkube returned, as a dict."""
    return cast(Object, found.to_dict())


def describe(kind: Any) -> str:
    """A kind in words, for errors."""
    info = kind._api_info
    return f"{info.plural}/{info.action}" if info.action else str(info.plural)
