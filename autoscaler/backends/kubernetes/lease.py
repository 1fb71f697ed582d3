"""Which of several Tidegates leads: a Lease of coordination.k8s.io, as Kubernetes' own controllers
use it (client-go's leader election).

A lease of another is taken when it has not been renewed for as long as it lasts, by this process's
own clock since it last saw it change: clocks of nodes differ. One that cannot be renewed because
the API server is away stops being a permission to write when it has run out; the process serves on,
and leads again if no other process has taken it meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from autoscaler.backends.kubernetes.client import (
    KubernetesClient,
    KubernetesError,
    Object,
    resource,
)

LOG = logging.getLogger("tidegate.kubernetes")

RENEWALS = 5
"""Renewals within the time that a lease lasts."""
LOOK_S = 1.0
"""Between two looks of one that waits, at the most: after the leader has given the lease back, no
pool is scaled until then."""


class LeaseStep(StrEnum):
    """What is to be done about the lease."""

    CREATE = "create"
    TAKE = "take"
    RENEW = "renew"
    WAIT = "wait"


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenLease:
    """The lease as it was last seen to have changed: who held it, and when that was seen."""

    holder: str
    renewed: str
    lasts_s: float
    at_s: float


def decide_step(seen: SeenLease | None, identity: str, now_s: float) -> LeaseStep:
    """What is to be done about a lease (``None``: there is none)."""
    if seen is None:
        return LeaseStep.CREATE
    if seen.holder == identity:
        return LeaseStep.RENEW
    return (
        LeaseStep.TAKE if not seen.holder or now_s >= seen.at_s + seen.lasts_s else LeaseStep.WAIT
    )


def see(found: Object | None, before: SeenLease | None, now_s: float) -> SeenLease | None:
    """A lease as it is now; its age counts from when it was first seen so."""
    if found is None:
        return None
    spec = found.get("spec") or {}
    seen = SeenLease(
        holder=spec.get("holderIdentity") or "",
        renewed=str(spec.get("renewTime") or ""),
        lasts_s=float(spec.get("leaseDurationSeconds") or 0),
        at_s=now_s,
    )
    if before is not None and (before.holder, before.renewed) == (seen.holder, seen.renewed):
        return before
    return seen


class Election:
    """Takes part in the election of a leader. ``on_lead`` is called when this process has come to
    lead, ``on_lost`` when another has taken its place."""

    def __init__(
        self,
        client: Callable[[], KubernetesClient],
        *,
        name: str,
        namespace: str | None,
        identity: str,
        lasts_s: float,
        clock: Callable[[], float],
        on_lead: Callable[[], None] = lambda: None,
        on_lost: Callable[[str], None] = lambda holder: None,
    ) -> None:
        self._client, self._name, self._namespace = client, name, namespace
        self._identity, self._lasts_s, self._clock = identity, lasts_s, clock
        self._on_lead, self._on_lost = on_lead, on_lost
        self._seen: SeenLease | None = None
        self._renewed_at_s: float | None = None
        self._has_led = False
        self._kind = resource("coordination.k8s.io/v1", "Lease")

    @property
    def leads(self) -> bool:
        """Whether no other process can lead now."""
        renewed_at_s = self._renewed_at_s
        return renewed_at_s is not None and self._clock() < renewed_at_s + self._lasts_s

    @property
    def holder(self) -> str:
        """Who was last seen to hold the lease; empty where no process was."""
        return "" if self._seen is None else self._seen.holder

    async def run(self) -> None:
        """Take part, until cancelled."""
        failing = False
        while True:
            try:
                async with asyncio.timeout(self._lasts_s / 2):
                    await self._step()
                failing = False
            except (KubernetesError, TimeoutError) as error:
                if isinstance(error, KubernetesError) and error.status == 409:
                    continue  # another one was quicker: see who
                if not failing:
                    LOG.warning("lease %s: %s", self._name, describe(error))
                failing = True
            pause_s = self._lasts_s / RENEWALS
            await asyncio.sleep(pause_s if self.leads else min(pause_s, LOOK_S))

    async def _step(self) -> None:
        client, now_s = self._client(), self._clock()
        found = await client.get(self._kind, self._name, self._namespace)
        self._seen = see(found, self._seen, now_s)
        step = decide_step(self._seen, self._identity, now_s)
        if step is LeaseStep.WAIT:
            if self._has_led:
                self._has_led, self._renewed_at_s = False, None
                self._on_lost(self.holder)
            return
        lease = self._lease(found)
        if step is LeaseStep.CREATE:
            await client.create(self._kind, lease, self._namespace)
        else:
            await client.replace(self._kind, lease, self._namespace)
        # From before the write, so that it runs out here no later than for the others.
        self._renewed_at_s = now_s
        if not self._has_led:
            self._has_led = True
            LOG.info("%s leads (lease %s)", self._identity, self._name)
            self._on_lead()

    def _lease(self, found: Object | None) -> Object:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        metadata: Object = {"name": self._name}
        spec: Object = {}
        if found is not None:
            metadata = found["metadata"]
            spec = found.get("spec") or {}
        if spec.get("holderIdentity") != self._identity:
            spec = {**spec, "acquireTime": now}
            spec["leaseTransitions"] = (spec.get("leaseTransitions") or 0) + 1
        spec = {
            **spec,
            "holderIdentity": self._identity,
            # Whole seconds, by the API: never less than it is held here.
            "leaseDurationSeconds": math.ceil(self._lasts_s),
            "renewTime": now,
        }
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": metadata,
            "spec": spec,
        }

    async def release(self) -> None:
        """Give it back, so that another takes it at once; nothing to do for one that does not lead.
        What fails is only logged: the lease runs out."""
        if not self.leads:
            return
        self._renewed_at_s = None
        try:
            async with asyncio.timeout(self._lasts_s / 2):
                found = await self._client().get(self._kind, self._name, self._namespace)
                if found is not None and found["spec"].get("holderIdentity") == self._identity:
                    found["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                    await self._client().replace(self._kind, found, self._namespace)
        except (KubernetesError, TimeoutError) as error:
            LOG.warning("lease %s is not given back: %s", self._name, describe(error))


def describe(error: Exception) -> str:
    """An error in words; one of the time limit has none."""
    return str(error) or "the API server did not answer in time"
