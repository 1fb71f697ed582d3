"""Scales the revisions of Knative Services whose autoscaler class is ours.

Level-triggered, as the controller of ModelPools. Objects are written only by the process that
leads.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from autoscaler.backends.kubernetes.client import KubernetesError, Object, resource
from autoscaler.backends.kubernetes.cluster import Cluster
from autoscaler.backends.kubernetes.knative import PA_API
from autoscaler.backends.kubernetes.watch import Key, Watch, key_of, on_each_change
from autoscaler.operator.controller import owner
from autoscaler.operator.pod_autoscaler import (
    SKS_API,
    SKS_KIND,
    InvalidPodAutoscaler,
    RevisionOutcome,
    find_serving,
    has_status,
    is_ours,
    make_serverless_service,
    make_status,
    to_pool,
)
from autoscaler.settings import PoolSettings
from autoscaler.types import PoolReport

LOG = logging.getLogger("tidegate.knative")

PERIOD_S = 1.0
"""Longest time between two comparisons: what the control loop has done is no event."""


@dataclass(slots=True, kw_only=True, eq=False)
class Revision:
    """A PodAutoscaler as it was last compared. ``problem`` says why it is no pool."""

    found: Object
    pool: PoolSettings | None = None
    problem: str = ""
    error: str = ""
    """Why it could not be written, as the log has it."""


class PodAutoscalerController:
    """The reconciler of PodAutoscalers of the class ``tidegate.dev``."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        set_pools: Callable[[Sequence[PoolSettings]], Awaitable[Mapping[str, str]]],
        reserved: Callable[[], Mapping[str, str]],
        report: Callable[[str], PoolReport | None],
        may_write: Callable[[], bool],
    ) -> None:
        """The arguments are those of ``ModelPoolController``."""
        self._cluster, self._namespace = cluster, namespace
        self._set_pools, self._reserved, self._report = set_pools, reserved, report
        self._may_write = may_write
        self._known: dict[Key, Revision] = {}
        self._changed = asyncio.Event()
        self.compared = asyncio.Event()
        """Set when the pools of all revisions were first made."""
        self._kind, self._sks = resource(PA_API, "PodAutoscaler"), resource(SKS_API, SKS_KIND)

    async def run(self) -> None:
        """Until cancelled. Raises ``KubernetesError`` where there is no access to a cluster."""
        note = lambda key: self._changed.set()  # noqa: E731
        client = self._cluster.client
        revisions = Watch(client, self._kind, self._namespace, on_change=note)
        services = Watch(client, self._sks, self._namespace, on_change=note)
        async with asyncio.TaskGroup() as group:
            group.create_task(revisions.run())
            group.create_task(services.run())
            await revisions.wait_read()
            await services.wait_read()

            async def compare() -> None:
                await self._compare(revisions.objects, services.objects)
                self.compared.set()

            await on_each_change(self._changed, compare, at_least_every_s=PERIOD_S)

    async def _compare(self, objects: Mapping[Key, Object], services: Mapping[Key, Object]) -> None:
        """Bring everything to what the PodAutoscalers say."""
        ours = {key: found for key, found in sorted(objects.items()) if is_ours(found)}
        serving = set(find_serving(ours.values()).values())
        taken = dict(self._reserved())
        known = {}
        for key, found in ours.items():
            one = known[key] = self._known.get(key) or Revision(found=found)
            one.found = found
            self._judge(one, serves="/".join(key) in serving, taken=taken)
        self._known = known
        errors = await self._set_pools([one.pool for one in known.values() if one.pool is not None])
        for error in set(errors.values()):
            LOG.debug("%s", error)
        if not self._may_write():
            return
        for key, one in known.items():
            try:
                await self._write(one, services.get(key))
            except KubernetesError as error:
                if error.status in {404, 409}:  # it has just gone, or changed: seen next time
                    continue
                if one.error != str(error):
                    LOG.log(error.level, "revision %s/%s: %s", *key, error)
                one.error = str(error)
            else:
                one.error = ""

    def _judge(self, one: Revision, *, serves: bool, taken: dict[str, str]) -> None:
        """Which pool it is, if it is one."""
        try:
            pool = to_pool(one.found, serves=serves)
            conflict = next((name for name in pool.names if name in taken), None)
            if conflict is not None:
                text = f"{taken[conflict]} has the name {conflict!r} already"
                raise InvalidPodAutoscaler(text)
        except InvalidPodAutoscaler as error:
            if one.problem != str(error):
                LOG.warning("revision %s/%s is no pool: %s", *key_of(one.found), error)
            one.pool, one.problem = None, str(error)
            return
        taken |= dict.fromkeys(pool.names, f"revision {'/'.join(key_of(one.found))}")
        one.pool, one.problem = pool, ""

    async def _write(self, one: Revision, services: Object | None) -> None:
        """Have its ServerlessService, and say back what became of it."""
        found, client = one.found, self._cluster.client
        namespace, name = key_of(found)
        report = None if one.pool is None else self._report(one.pool.name)
        problem = one.problem
        if one.pool is not None or services is not None:
            wanted = make_serverless_service(found, report)
            if services is None:
                services = await client.create(self._sks, wanted, namespace)
            elif owner(services) != found["metadata"]["uid"]:
                problem, services = f"{SKS_KIND} {namespace}/{name} is not its own", {}
            elif any(services["spec"].get(key) != value for key, value in wanted["spec"].items()):
                await client.merge(self._sks, name, {"spec": wanted["spec"]}, namespace)
        outcome = RevisionOutcome(
            problem=problem, report=report, services=(services or {}).get("status")
        )
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        status = make_status(found, outcome, now)
        if not has_status(found, status):
            await client.merge(self._kind.Status, name, {"status": status}, namespace)
