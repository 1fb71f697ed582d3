"""Load that is reported to Knative's autoscaler, as its activator does: ahead of demand.

The autoscaler takes protobuf messages over a websocket, each the load of one revision in the last
second, and adds them to what pods report. Whichever of several autoscalers is asked hands them on
to the one that has the revision.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from autoscaler.backends.kubernetes.knative import RevisionScaling, find_extra_load
from autoscaler.types import PoolDemand

LOG = logging.getLogger("tidegate.knative")

PACKAGE = "metrics"
FIELDS = {
    "Stat": {
        "pod_name": ("string", 1),
        "average_concurrent_requests": ("double", 2),
        "average_proxied_concurrent_requests": ("double", 3),
        "request_count": ("double", 4),
        "proxied_request_count": ("double", 5),
        "process_uptime": ("double", 6),
        "timestamp": ("int64", 7),
    },
    "WireStatMessage": {"namespace": ("string", 1), "name": ("string", 2), "stat": ("Stat", 3)},
    "WireStatMessages": {"messages": ("repeated WireStatMessage", 1)},
}
"""Of the protocol's messages, in ``pkg/autoscaler/metrics/stat.proto``."""

PERIOD_S = 1.0
"""Between two reports of a revision: the autoscaler adds up what comes within a second."""
LASTS_S = 5.0
"""A load that is not confirmed for so long is reported no more."""
TIMEOUT_S = 10.0
RETRY_S, RETRY_MAX_S = 0.5, 15.0


@dataclass(slots=True, kw_only=True)
class ReportedLoad:
    """The load of a revision. ``due_s`` is when it is reported next."""

    load: float
    until_s: float
    due_s: float


@dataclass(slots=True, kw_only=True)
class Arrivals:
    """The requests of a pool that had come at a moment, and how many came per second before."""

    at_s: float
    total: int
    per_s: float | None = None


class StatStream:
    """Reports to one autoscaler, while there is anything to report."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``url`` is the autoscaler's ``ws://`` address."""
        self._url, self._clock = url, clock
        self._reports: dict[tuple[str, str], ReportedLoad] = {}
        self._arrivals: dict[str, Arrivals] = {}
        self._changed = asyncio.Event()
        self._socket: Any = None
        self._make: Any = None
        self._task: asyncio.Task[None] | None = None
        self._pod = f"tidegate-{socket.gethostname()}"
        self.failing = False
        """Whether the autoscaler was not reached when it was tried last."""

    def prewarm(
        self,
        pool: str,
        namespace: str,
        scaling: RevisionScaling,
        replicas: int,
        demand: PoolDemand | None,
    ) -> None:
        """Have Knative's autoscaler have at least so many replicas of a revision, from now until
        this has not been said for some seconds."""
        seen = self._find_seen(pool, scaling, demand)
        self._report((namespace, scaling.revision), find_extra_load(scaling, replicas, seen))

    def _find_seen(
        self, pool: str, scaling: RevisionScaling, demand: PoolDemand | None
    ) -> float | None:
        """The load of a pool's pods, which they report themselves: what is sent to them."""
        if demand is None or scaling.metric != "rps":
            return None if demand is None else demand.inflight_requests
        total, at_s = demand.arrivals_total, demand.observed_at_s
        before = self._arrivals.get(pool)
        if total is None:
            return None
        if before is None or total < before.total:
            self._arrivals[pool] = Arrivals(at_s=at_s, total=total)
        elif at_s - before.at_s >= PERIOD_S:
            per_s = (total - before.total) / (at_s - before.at_s)
            self._arrivals[pool] = Arrivals(at_s=at_s, total=total, per_s=per_s)
        held = bool(demand.queued_requests) and not demand.inflight_requests
        return 0.0 if held else self._arrivals[pool].per_s

    def _report(self, key: tuple[str, str], load: float | None) -> None:
        now_s = self._clock()
        if not load:
            self._reports.pop(key, None)
            return
        known = self._reports.get(key)
        if known is None:
            self._changed.set()
        self._reports[key] = ReportedLoad(
            load=load, until_s=now_s + LASTS_S, due_s=now_s if known is None else known.due_s
        )
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        """Until cancelled."""
        pause_s = RETRY_S
        while True:
            self._changed.clear()
            if self._due():
                try:
                    await self._send()
                    if self.failing:
                        LOG.info("Knative's autoscaler at %s is reached again", self._url)
                    pause_s, self.failing = RETRY_S, False
                except ImportError as error:
                    LOG.error(
                        "Knative is not asked for replicas ahead of demand: the package %s is "
                        "missing: pip install 'tidegate[knative]'",
                        error.name,
                    )
                    return
                except OSError as error:
                    if not self.failing:
                        LOG.warning(
                            "Knative's autoscaler at %s is not reached, and is not asked for "
                            "replicas ahead of demand meanwhile: %s",
                            self._url,
                            str(error) or type(error).__name__,
                        )
                    self.failing = True
                    await self._disconnect()
                    await asyncio.sleep(pause_s)
                    pause_s = min(2 * pause_s, RETRY_MAX_S)
                    continue
            next_s = min((one.due_s for one in self._reports.values()), default=None)
            try:
                async with asyncio.timeout(
                    None if next_s is None else max(0.0, next_s - self._clock())
                ):
                    await self._changed.wait()
            except TimeoutError:
                pass

    def _due(self) -> list[tuple[str, str]]:
        """What is to be reported now; what has not been confirmed is forgotten."""
        now_s = self._clock()
        self._reports = {key: one for key, one in self._reports.items() if one.until_s > now_s}
        return [key for key, one in self._reports.items() if one.due_s <= now_s]

    async def _send(self) -> None:
        """Report what is due. Raises ``OSError``; ``ImportError`` where a package is missing."""
        from websockets.exceptions import WebSocketException

        try:
            async with asyncio.timeout(TIMEOUT_S):
                if self._socket is None:
                    await self._connect()
                due = self._due()  # connecting took time
                if due:
                    await self._socket.send(self._encode(due))
        except WebSocketException as error:
            raise OSError(str(error)) from None
        now_s = self._clock()
        for one in (self._reports[key] for key in due if key in self._reports):
            # In step, so that no second has two; but nothing is made up for.
            late = now_s - one.due_s > PERIOD_S / 2
            one.due_s = (now_s if late else one.due_s) + PERIOD_S

    def _encode(self, due: list[tuple[str, str]]) -> bytes:
        messages = self._make["WireStatMessages"]()
        for namespace, name in due:
            load = self._reports[namespace, name].load
            # The autoscaler reads one of the two, by the metric of the revision; at zero, that the
            # first is not 0 wakes it whatever the metric. It sets the time itself.
            messages.messages.add(
                namespace=namespace,
                name=name,
                stat={
                    "pod_name": self._pod,
                    "average_concurrent_requests": load,
                    "request_count": load,
                },
            )
        return bytes(messages.SerializeToString())

    async def _connect(self) -> None:
        from websockets.asyncio.client import connect

        if self._make is None:
            from autoscaler.protobuf import make_messages

            self._make = make_messages(PACKAGE, FIELDS)
        self._socket = await connect(
            self._url, proxy=None, compression=None, max_size=65_536, open_timeout=TIMEOUT_S
        )

    async def _disconnect(self) -> None:
        if self._socket is not None:
            opened, self._socket = self._socket, None
            opened.transport.abort()

    async def close(self) -> None:
        """Report no more. It is not used afterwards."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self._disconnect()
