"""Who may read which metric: asked of the cluster, remembered for a few seconds.

HPA reads hundreds of metrics as one user that may read all of a group. So the cluster is asked for
all of it first, and only where that is not allowed for the one metric. Everything is on one event
loop.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from autoscaler.adapters.metrics_api.identity import Identity
from autoscaler.adapters.metrics_api.paths import (
    CUSTOM,
    EXTERNAL,
    ExternalQuery,
    MetricQuery,
    NamespaceQuery,
)

MASTERS = "system:masters"
MAX_ENTRIES = 4_096
MAX_AT_ONCE = 32
"""Questions to the cluster."""
ALL = "*"

Answer = TypeVar("Answer")


class ClusterError(Exception):
    """The cluster did not answer; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """What a client asks to do, as roles name it, and as the API server reads the same path: the
    metrics of an object are a subresource of it, an external metric is a resource whose values are
    listed, a namespace's is one of its ``metrics`` by name."""

    verb: str
    group: str
    version: str = ALL
    resource: str = ALL
    subresource: str = ""
    namespace: str = ""
    name: str = ""


def attributes_of(query: MetricQuery) -> tuple[Attributes, Attributes]:
    """What a query needs: all metrics of its group everywhere, or else itself."""
    if isinstance(query, ExternalQuery):
        return Attributes(verb="list", group=EXTERNAL), Attributes(
            verb="list",
            group=EXTERNAL,
            version=query.version,
            resource=query.metric,
            namespace=query.namespace,
        )
    if isinstance(query, NamespaceQuery):
        # Below a namespace one word is a resource that is listed, two are a resource and a name.
        verb = "list" if query.is_root_scoped else "get"
        return Attributes(verb=verb, group=CUSTOM), Attributes(
            verb=verb,
            group=CUSTOM,
            version=query.version,
            resource=query.metric if query.is_root_scoped else "metrics",
            namespace=query.namespace,
            name="" if query.is_root_scoped else query.metric,
        )
    return Attributes(verb="get", group=CUSTOM), Attributes(
        verb="get",
        group=CUSTOM,
        version=query.version,
        resource=query.resource,
        subresource=query.metric,
        namespace=query.namespace,
        name=query.name,
    )


class Remembered(Generic[Answer]):
    """Answers to questions, kept for ``seconds``, the newest ``MAX_ENTRIES``. A question that is
    being asked is not asked again meanwhile."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._kept: OrderedDict[Hashable, tuple[float, asyncio.Future[Answer]]] = OrderedDict()
        self._places = asyncio.Semaphore(MAX_AT_ONCE)

    async def get(self, key: Hashable, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer; ``ask`` is called where it is not known. An error is not kept."""
        found = self._kept.get(key)
        if found is not None and (not found[1].done() or self._clock() < found[0]):
            return await asyncio.shield(found[1])
        future = asyncio.ensure_future(self._ask(key, ask))
        future.add_done_callback(lambda one: one.cancelled() or one.exception())  # is seen by all
        self._kept[key] = self._clock() + self._seconds, future
        self._kept.move_to_end(key)
        while len(self._kept) > MAX_ENTRIES:
            self._kept.popitem(last=False)
        return await asyncio.shield(future)

    async def _ask(self, key: Hashable, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        try:
            async with self._places:
                answer = await ask()
        except BaseException:
            self._kept.pop(key, None)
            raise
        if key in self._kept:  # from when it is known
            self._kept[key] = self._clock() + self._seconds, self._kept[key][1]
        return answer


class Access:
    """Who asks, and whether they may. ``review_access`` and ``review_token`` ask the cluster, and
    raise ``ClusterError``; ``on_review`` hears what was asked, and what became of it."""

    def __init__(
        self,
        *,
        review_access: Callable[[Identity, Attributes], Awaitable[bool]],
        review_token: Callable[[str], Awaitable[Identity | None]],
        cache_s: float,
        on_review: Callable[[str, str], None] = lambda kind, outcome: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._review_access = review_access
        self._review_token = review_token
        self._on_review = on_review
        self._accesses = Remembered[bool](cache_s, clock)
        self._tokens = Remembered[Identity | None](cache_s, clock)

    async def identify(self, token: str) -> Identity | None:
        """Whose token it is; ``None``: the API server does not know it."""
        key = hashlib.sha256(token.encode()).digest()
        return await self._tokens.get(
            key, lambda: self._counted("token", self._review_token(token))
        )

    async def may_read(self, who: Identity, query: MetricQuery) -> bool:
        """Whether they may."""
        if MASTERS in who.groups:
            return True
        every, this = attributes_of(query)
        return await self._allows(who, every) or await self._allows(who, this)

    async def _allows(self, who: Identity, what: Attributes) -> bool:
        return await self._accesses.get(
            (who.key, what), lambda: self._counted("access", self._review_access(who, what))
        )

    async def _counted(self, kind: str, review: Awaitable[Answer]) -> Answer:
        try:
            answer = await review
        except ClusterError:
            self._on_review(kind, "failed")
            raise
        self._on_review(kind, "allowed" if answer else "denied")
        return answer
