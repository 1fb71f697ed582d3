"""Lists of objects that are kept up to date, over outages of the API server too.

What is known stays known while the API server is away: replicas serve on. When it is back, the list
is read again, so nothing that happened meanwhile is missed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from autoscaler.backends.kubernetes.client import (
    KubernetesClient,
    KubernetesError,
    Object,
    describe,
)

LOG = logging.getLogger("tidegate.kubernetes")

LASTS_S = 240
"""Longest life of one watch: one whose connection hangs is noticed at its end."""
RETRY_S, RETRY_MAX_S = 0.5, 5.0
GATHER_S = 0.1
"""Changes within it are one."""

Key = tuple[str, str]
"""The namespace and the name of an object."""


def key_of(found: Object) -> Key:
    """By what an object is known in a list of its kind."""
    metadata = found["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


class Watch:
    """The objects of one kind in one namespace (``*``: in all), as they are now.

    ``keep`` takes from an object what is kept of it, so that large lists take little memory.
    ``on_change`` is called after each change, with the key of what has changed; ``None`` when the
    list was read anew.
    """

    def __init__(
        self,
        client: KubernetesClient,
        kind: Any,
        namespace: str | None,
        *,
        labels: Mapping[str, str] | None = None,
        keep: Callable[[Object], Object] = lambda found: found,
        on_change: Callable[[Key | None], None] = lambda key: None,
        sleep: Callable[[float], Any] = asyncio.sleep,
    ) -> None:
        self._client, self._kind, self._namespace = client, kind, namespace
        self._labels, self._keep, self._on_change = labels, keep, on_change
        self._sleep = sleep
        self.objects: dict[Key, Object] = {}
        self.error: KubernetesError | None = None
        """Why it is not up to date, while it is not."""
        self._read, self._answered = asyncio.Event(), asyncio.Event()

    async def wait_read(self) -> None:
        """Until the list has been read once."""
        await self._read.wait()

    async def wait_answered(self) -> None:
        """The same, or until the API server has said that there is no such kind, or that this
        process may not read it."""
        await self._answered.wait()

    async def run(self) -> None:
        """Keep it up to date, until cancelled."""
        pause_s = RETRY_S
        while True:
            try:
                version = await self._list()
                pause_s = RETRY_S
                await self._follow(version)
            except KubernetesError as error:
                if self.error is None:
                    LOG.warning("%s; what is known is used meanwhile", error)
                self.error = error
                if error.status in {403, 404}:
                    self._answered.set()
                if error.status == 410:  # the version is too old: read again at once
                    continue
                await self._sleep(pause_s)
                pause_s = min(2 * pause_s, RETRY_MAX_S)
            except Exception as error:  # an answer that cannot be read must not end it
                LOG.exception("%s: the list could not be kept up to date", describe(self._kind))
                self.error = KubernetesError(f"list {describe(self._kind)}: {error}")
                await self._sleep(RETRY_MAX_S)

    async def _list(self) -> str:
        found, version = await self._client.read_all(self._kind, self._namespace, self._labels)
        self.objects = {key_of(one): self._keep(one) for one in found}
        if self.error is not None:
            LOG.info("%s: read again, after: %s", describe(self._kind), self.error)
        self.error = None
        self._read.set()
        self._answered.set()
        self._on_change(None)
        return version

    async def _follow(self, version: str) -> None:
        """Apply changes, for ``LASTS_S`` seconds."""
        changes = self._client.watch(
            self._kind, self._namespace, version, self._labels, lasts_s=LASTS_S
        )
        try:
            async with asyncio.timeout(LASTS_S):
                async for event, found in changes:
                    key = key_of(found)
                    if event == "DELETED":
                        self.objects.pop(key, None)
                    else:
                        self.objects[key] = self._keep(found)
                    self._on_change(key)
        except TimeoutError:
            pass  # it is read anew, which also mends whatever was missed
        finally:
            await changes.aclose()  # type: ignore[attr-defined]


async def on_each_change(
    changed: asyncio.Event, compare: Callable[[], Awaitable[None]], *, at_least_every_s: float
) -> None:
    """Call ``compare`` now, after each change and at least so often, until cancelled. What it
    raises is in the log, and it is called again."""
    while True:
        changed.clear()
        try:
            await compare()
        except Exception:
            LOG.exception("a comparison has failed; again within %g s", at_least_every_s)
        try:
            async with asyncio.timeout(at_least_every_s):
                await changed.wait()
            await asyncio.sleep(GATHER_S)
        except TimeoutError:
            pass
