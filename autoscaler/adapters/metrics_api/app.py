"""The server side of the metrics APIs: an ASGI application over the newest signals.

Discovery and probes are answered whatever is known, and to everybody: an API that cannot be
discovered blocks the deletion of namespaces in the whole cluster. Metrics are answered to those who
may read them, from memory; stale ones with an error.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import msgspec

from autoscaler.adapters.feed import SignalFeed, StaleSignals
from autoscaler.adapters.measures import TEXT_TYPE, AdapterMeasures
from autoscaler.adapters.metrics_api import documents
from autoscaler.adapters.metrics_api.access import Access, ClusterError
from autoscaler.adapters.metrics_api.documents import Json, status
from autoscaler.adapters.metrics_api.identity import (
    CERTIFICATE,
    FrontProxy,
    Identity,
    bearer_token,
    common_name,
    is_front_proxy,
    proxied_identity,
)
from autoscaler.adapters.metrics_api.lookup import (
    BadSelector,
    NotAvailable,
    find_custom,
    find_external,
    find_namespace,
)
from autoscaler.adapters.metrics_api.paths import (
    CUSTOM,
    EXTERNAL,
    BadRequest,
    CustomQuery,
    ExternalQuery,
    MetricQuery,
    NamespaceQuery,
    Page,
    read_path,
    served,
)

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

LOG = logging.getLogger("tidegate.adapter")

FAULT = "Tidegate's adapter failed at this; its log says how."


class Refused(Exception):
    """An error as it is answered."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Guarded(Protocol):
    """Who is let in. ``None`` in its place lets everybody in."""

    @property
    def access(self) -> Access:
        """Whom a token is of, and who may read what."""
        ...

    @property
    def front_proxy(self) -> FrontProxy | None:
        """The front proxies whose word for a client's identity is believed; ``None``: none yet."""
        ...


class MetricsApi:
    """The application. ``apis`` are those that are served, ``guard`` says who may read them."""

    def __init__(
        self,
        feed: SignalFeed,
        *,
        apis: Sequence[str],
        guard: Guarded | None,
        measures: AdapterMeasures,
        wall_s: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._feed = feed
        self._served = served(apis)
        self._guard = guard
        self._measures = measures
        self._wall_s = wall_s
        self._clock = clock
        self._pages = self._make_pages()

    def _make_pages(self) -> dict[str, bytes]:
        """What is answered to everybody, by path."""
        pages: dict[str, Json] = {
            "/apis": documents.group_list(self._served),
            "/openapi/v2": documents.openapi_v2(),
            "/openapi/v3": documents.openapi_v3(),
        }
        for group, versions in self._served.items():
            pages[f"/apis/{group}"] = documents.group(group, versions)
            for version in versions:
                pages[f"/apis/{group}/{version}"] = documents.resource_list(group, version)
        paths = sorted([*pages, "/healthz", "/livez", "/readyz", "/metrics"])
        pages["/"] = {"paths": paths}
        return {path: _encode(page) for path, page in pages.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            return
        begun_s = self._clock()
        code, media, body, api = await self._answer(scope)
        if api:
            verb = str(scope["method"])
            self._measures.answered(api, verb, str(code), self._clock() - begun_s)
        headers = [
            (b"content-type", media.encode()),
            (b"content-length", str(len(body)).encode()),
            (b"cache-control", b"no-store"),
        ]
        if code == 401:
            # A connection that was made before the front proxy was known has been asked for no
            # certificate, and the API aggregator would use it on and on.
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": code, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Scope) -> tuple[int, str, bytes, str]:
        """Status, media type and body, and the API that it is of."""
        api = ""
        try:
            raw: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
            query = read_path(raw.decode("latin-1"), scope["query_string"].decode("latin-1"))
            if scope["method"] != "GET":
                raise Refused(405, f"{scope['method']} is not served; GET is")
            if isinstance(query, Page):
                return *self._page(query.path), ""
            if query is not None:
                group = EXTERNAL if isinstance(query, ExternalQuery) else CUSTOM
                if query.version in self._served.get(group, ()):
                    api = f"{group}/{query.version}"
                    return 200, "application/json", _encode(await self._read(scope, query)), api
            raise Refused(404, f"there is nothing at {raw.decode('latin-1')[:512]}")
        except Refused as error:
            code, message = error.code, str(error)
        except (BadRequest, BadSelector) as error:
            code, message = 400, str(error)
        except NotAvailable as error:
            code, message = 404, str(error)
        except StaleSignals as error:
            code, message = 503, str(error)
        except ClusterError as error:
            code, message = 503, f"who may read this is not known: {error}"
        except Exception:
            LOG.exception("a request could not be answered")
            code, message = 500, FAULT
        return code, "application/json", _encode(status(code, message)), api

    def _page(self, path: str) -> tuple[int, str, bytes]:
        if path in ("/healthz", "/livez", "/readyz"):
            # Whatever is known of the pools: discovery must go on.
            return 200, "text/plain; charset=utf-8", b"ok"
        if path == "/metrics":
            return 200, TEXT_TYPE, self._measures.page()
        try:
            return 200, "application/json", self._pages[path]
        except KeyError:
            raise Refused(404, f"there is nothing at {path[:512]}") from None

    async def _read(self, scope: Scope, query: MetricQuery) -> Json:
        await self._check(scope, query)
        catalog = self._feed.catalog()
        at_s = self._wall_s() - (self._feed.age_s or 0.0)
        at = datetime.fromtimestamp(int(at_s), UTC).isoformat().removesuffix("+00:00") + "Z"
        if isinstance(query, ExternalQuery):
            return documents.external_list(query, find_external(query, catalog), at)
        if isinstance(query, NamespaceQuery):
            return documents.custom_list(query, find_namespace(query, catalog), at)
        return documents.custom_list(query, find_custom(query, catalog), at)

    async def _check(self, scope: Scope, query: MetricQuery) -> None:
        if self._guard is None:
            return
        who = await self._identify(self._guard, scope)
        if who is None:
            raise Refused(401, "no front proxy, and no bearer token that the cluster knows")
        if not await self._guard.access.may_read(who, query):
            kind = query.metric
            if isinstance(query, CustomQuery):
                kind = f"{query.metric} of {query.resource}"
            raise Refused(
                403, f"user {who.user!r} may not read {kind} in namespace {query.namespace!r}"
            )

    @staticmethod
    async def _identify(guard: Guarded, scope: Scope) -> Identity | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        certificate: dict[str, Any] | None = scope.get("state", {}).get(CERTIFICATE)
        proxy = guard.front_proxy
        if proxy is not None and is_front_proxy(proxy, common_name(certificate)):
            return proxied_identity(proxy, headers)
        token = bearer_token(headers)
        return None if token is None else await guard.access.identify(token)


def _encode(document: Json) -> bytes:
    return msgspec.json.encode(document)
