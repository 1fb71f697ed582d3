"""What is asked of the cluster: who has a token, who may do what, who the front proxy is.

The one module that knows lightkube, which the extra ``kubernetes`` brings.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from autoscaler.adapters.metrics_api.access import Attributes, ClusterError
from autoscaler.adapters.metrics_api.identity import FrontProxy, Identity, with_authenticated

if TYPE_CHECKING:
    from lightkube import AsyncClient

CALL_S = 5.0
"""Seconds that a question may take."""
CONFIG_MAP = "extension-apiserver-authentication"
CONFIG_MAP_NAMESPACE = "kube-system"
MISSING = (
    "the extra `kubernetes` (lightkube) is not installed: install Tidegate with it, or set "
    'adapter.authorization = "none" on loopback'
)

Found = TypeVar("Found")


class ClusterReviews:
    """One API server: that of the pod this runs in, or of a ``kubeconfig``. Raises ``ClusterError``
    where it cannot be told which."""

    def __init__(self, kubeconfig: Path | None = None) -> None:
        try:
            from lightkube import AsyncClient, KubeConfig
            from lightkube.core.exceptions import ConfigError
        except ModuleNotFoundError as error:
            raise ClusterError(MISSING) from error
        try:
            config = (
                KubeConfig.from_env() if kubeconfig is None else KubeConfig.from_file(kubeconfig)
            )
            self._client: AsyncClient = AsyncClient(config=config, trust_env=False)
        except (ConfigError, OSError, ValueError, KeyError) as error:
            raise ClusterError(f"no cluster to ask: {' '.join(str(error).split())}") from error

    async def review_access(self, who: Identity, what: Attributes) -> bool:
        """Whether they may do it (SubjectAccessReview)."""
        from lightkube.models.authorization_v1 import ResourceAttributes, SubjectAccessReviewSpec
        from lightkube.resources.authorization_v1 import SubjectAccessReview

        review = SubjectAccessReview(
            spec=SubjectAccessReviewSpec(
                user=who.user,
                groups=list(who.groups),
                uid=who.uid or None,
                extra={name: list(values) for name, values in who.extra.items()} or None,
                resourceAttributes=ResourceAttributes(
                    verb=what.verb,
                    group=what.group,
                    version=what.version,
                    resource=what.resource,
                    subresource=what.subresource or None,
                    namespace=what.namespace or None,
                    name=what.name or None,
                ),
            )
        )
        answer = await self._ask(self._client.create(review))
        return answer.status is not None and bool(answer.status.allowed)

    async def review_token(self, token: str) -> Identity | None:
        """Whose token it is (TokenReview)."""
        from lightkube.models.authentication_v1 import TokenReviewSpec
        from lightkube.resources.authentication_v1 import TokenReview

        answer = await self._ask(
            self._client.create(TokenReview(spec=TokenReviewSpec(token=token)))
        )
        status = answer.status
        if status is None or not status.authenticated or status.user is None:
            return None
        user = status.user
        return Identity(
            user=user.username or "",
            groups=with_authenticated(user.groups or ()),
            uid=user.uid or "",
            extra={name: tuple(values) for name, values in (user.extra or {}).items()},
        )

    async def front_proxy(self) -> FrontProxy:
        """What the cluster says of its front proxy."""
        from lightkube.resources.core_v1 import ConfigMap

        found = await self._ask(
            self._client.get(ConfigMap, CONFIG_MAP, namespace=CONFIG_MAP_NAMESPACE)
        )
        return read_front_proxy(found.data or {})

    async def _ask(self, call: Awaitable[Found]) -> Found:
        import httpx2
        from lightkube import ApiError

        try:
            async with asyncio.timeout(CALL_S):
                return await call
        except ApiError as error:
            raise ClusterError(f"the API server refused it: {error}") from error
        except (TimeoutError, httpx2.HTTPError, OSError, ValueError) as error:
            why = f"{type(error).__name__} {error}".strip()
            raise ClusterError(f"the API server does not answer: {why}") from error

    async def close(self) -> None:
        """Close its connections."""
        await self._client.close()


def read_front_proxy(data: Mapping[str, str]) -> FrontProxy:
    """The front proxy of that ConfigMap. Raises ``ClusterError`` where it has none."""
    ca = data.get("requestheader-client-ca-file", "")
    if not ca.strip():
        raise ClusterError(
            f"ConfigMap {CONFIG_MAP_NAMESPACE}/{CONFIG_MAP} has no requestheader-client-ca-file: "
            "the API server runs without an aggregation layer"
        )
    plain = FrontProxy(ca=ca)
    return FrontProxy(
        ca=ca,
        names=_names(data, "requestheader-allowed-names", ()),
        user_headers=_names(data, "requestheader-username-headers", plain.user_headers),
        group_headers=_names(data, "requestheader-group-headers", plain.group_headers),
        uid_headers=_names(data, "requestheader-uid-headers", plain.uid_headers),
        extra_prefixes=_names(data, "requestheader-extra-headers-prefix", plain.extra_prefixes),
    )


def _names(data: Mapping[str, str], key: str, otherwise: tuple[str, ...]) -> tuple[str, ...]:
    """A list of names; those of headers are in lower case then."""
    if key not in data:
        return otherwise
    try:
        found = json.loads(data[key])
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ClusterError(f"{key} of ConfigMap {CONFIG_MAP} is no list of names")
    is_header = key != "requestheader-allowed-names"
    return tuple(one.lower() if is_header else one for one in found)
