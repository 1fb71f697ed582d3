"""Pools whose workload Tidegate scales: each replica is one of the number that it is told to have.

The control loop starts and ends replicas; here a start is one more of the workload's number, an end
one less, and ``binding`` says which pod stands for which replica. Restarts, rollouts and evictions
are Kubernetes' own, and a replica gets the pod that has taken the place of its own.

Nothing is written for a pool before its pods are known (``adopt``), and nothing while ``may_write``
says no. While the API server is away, replicas serve on as they were last seen.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from autoscaler.backends.base import AdoptedReplica, BackendError, NoCapacity, Probe, ReplicaSpec
from autoscaler.backends.kubernetes.binding import bind
from autoscaler.backends.kubernetes.client import KubernetesError, resource
from autoscaler.backends.kubernetes.cluster import Cluster
from autoscaler.backends.kubernetes.pods import Pod
from autoscaler.backends.kubernetes.workloads import DELETION_COST, WorkloadRef
from autoscaler.backends.servers import Server
from autoscaler.policy.packing import Device
from autoscaler.settings import PoolSettings
from autoscaler.types import Decision, PoolDemand
from loaders.engines.client import EngineClient

LOG = logging.getLogger("tidegate.kubernetes")

Place = tuple[str, WorkloadRef]
"""A pool by its name, and its workload: with another workload it is another."""

RESYNC_S = 15.0
"""Between two looks at whether a workload still has the number that it was told."""
POLL_S = 0.1
LOWEST_COST = "-1000"


@dataclass(slots=True, kw_only=True, eq=False)
class Claims:
    """The replicas of one pool, oldest first, each with the name of its pod. As many as these its
    workload is to have."""

    pool: PoolSettings
    bound: dict[str, str | None] = field(default_factory=dict)
    servers: dict[str, Server] = field(default_factory=dict)
    served: dict[str, int] = field(default_factory=dict)
    """Replicas whose pod of now has been ready, and how often its containers had been started again
    by then: one that is started again since has its whole start before it."""
    writing: asyncio.Lock = field(default_factory=asyncio.Lock)
    drifted: bool = False


class KubernetesBackend:
    """Backend for pools with ``backend = "kubernetes"`` that Tidegate scales."""

    owns_replicas = True
    outlives_us = True

    def __init__(
        self,
        *,
        cluster: Cluster,
        client: EngineClient,
        may_write: Callable[[], bool] = lambda: True,
        on_news: Callable[[str], None] = lambda replica_id: None,
        clock: Callable[[], float],
    ) -> None:
        """``on_news`` is called with a replica whose pod has changed. ``may_write``: this process
        is the one that scales."""
        self._cluster, self._client = cluster, client
        self._may_write, self._on_news, self._clock = may_write, on_news, clock
        self._pools: dict[Place, Claims] = {}
        self._mine: set[Place] = set()
        """The pools that are Tidegate's to scale. For others nothing is written: their workloads
        keep the number that they have."""
        self._adopted: set[Place] = set()
        """Those whose replicas were found, and which are not known yet to be Tidegate's."""
        self._resync: asyncio.Task[None] | None = None

    def set_pools(self, pools: Sequence[PoolSettings]) -> None:
        """Scale these, as they are set now, and no others."""
        now = {self._place_of(pool): pool for pool in pools}
        self._mine = set(now)
        self._adopted.clear()
        for place, claims in list(self._pools.items()):
            if place not in now:
                if not claims.bound:
                    del self._pools[place]
            elif claims.pool != now[place]:
                claims.pool = now[place]
                claims.servers.clear()

    def _place_of(self, pool: PoolSettings) -> Place:
        return pool.name, self._cluster.ref(pool)

    def recommend(self, pool: PoolSettings, decision: Decision, demand: PoolDemand | None) -> None:
        """Not used: its replicas are started."""

    def devices(self) -> Sequence[Device]:
        """The scheduler's to share, not ours."""
        return ()

    async def measure_memory(self, replica_id: str) -> int | None:
        """Not known here."""
        return None

    def urls(self, pool: PoolSettings) -> Sequence[str]:
        """Not used: replicas have theirs from their pods."""
        return ()

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        """Take over the pods of the workloads, started by Tidegate or not; those that are known
        go by their ids. Raises ``KubernetesError`` where they cannot be read: unknown is not
        none."""
        if self._resync is None and wanted:
            self._resync = asyncio.create_task(self._keep_numbers())
        found = await asyncio.gather(*map(self._adopt_pool, wanted))
        return [replica for replicas in found for replica in replicas]

    async def _adopt_pool(self, spec: ReplicaSpec) -> list[AdoptedReplica]:
        scale = await self._cluster.track(spec.pool)
        if scale.replicas is None:
            ref = self._cluster.ref(spec.pool)
            raise BackendError(f"{ref} has no number of replicas; scaled_by says who scales it")
        if scale.replicas and scale.selector is None:
            ref = self._cluster.ref(spec.pool)
            raise BackendError(f"{ref} does not say which pods it has (its selector is empty)")
        place = self._place_of(spec.pool)
        claims = self._pools.setdefault(place, Claims(pool=spec.pool))
        self._adopted.add(place)
        self._bind(claims)
        if not self._is_mine(claims):  # its number was another's to set meanwhile
            spare = sorted(claims.bound, key=lambda one: claims.bound[one] is not None)
            for replica_id in spare[: max(0, len(spare) - scale.replicas)]:
                self._forget(claims, replica_id)
        taken = set(claims.bound.values())
        free = [pod for pod in self._cluster.pods(spec.pool) if not pod.terminating]
        free = [pod for pod in free if pod.name not in taken]
        free.sort(key=lambda pod: (pod.created, pod.name))
        names = [pod.name for pod in free]
        missing = scale.replicas - len(claims.bound)
        for name in [*names, *[None] * missing][: max(0, missing)]:
            claims.bound[self._make_id(spec.id, name)] = name
        found = list(claims.bound)
        probes = await asyncio.gather(*map(self.probe, found))
        return [
            AdoptedReplica(spec=replace(spec, id=replica_id), probe=probe)
            for replica_id, probe in zip(found, probes, strict=True)
        ]

    def _make_id(self, slug: str, pod: str | None) -> str:
        """An id that no replica has, by its pod where it has one. Those that the control loop makes
        end in a number, as do the pods of a StatefulSet."""
        suffix = "coming" if pod is None else pod.rpartition("-")[2]
        first = f"{slug}-pod{suffix}" if suffix.isdecimal() else f"{slug}-{suffix}"
        names = itertools.chain([first], (f"{first}.{number}" for number in itertools.count(2)))
        return next(name for name in names if self._find(name) is None)

    async def start(self, spec: ReplicaSpec) -> None:
        """Have one more. Raises ``NoCapacity`` while the API server is away, ``KubernetesError``
        where it refuses."""
        claims = self._pools.get(self._place_of(spec.pool))
        if claims is None:
            raise BackendError(f"the pods of {spec.pool.name} are not known yet")
        if spec.id in claims.bound:
            raise BackendError(f"{spec.id} has been started already")
        claims.bound[spec.id] = None
        try:
            await self._write(claims)
        except BaseException as error:
            self._forget(claims, spec.id)
            if isinstance(error, KubernetesError) and error.is_passing:
                raise NoCapacity(str(error)) from None
            raise

    async def probe(self, replica_id: str) -> Probe:
        """See what its pod is at and, where that is ready, ask its engine."""
        claims = self._find(replica_id)
        if claims is None:
            return Probe(alive=False, ready=False, detail="it was not started")
        pod = self._place(claims, replica_id)
        old = self._cluster.error(claims.pool)
        if pod is None:
            detail = old or "its workload has not made a pod for it"
            return Probe(
                ready=False, starting=True, certain=not old, phase="waits for a pod", detail=detail
            )
        if not pod.ready or pod.url is None:
            served = claims.served.get(replica_id)
            return Probe(
                ready=False,
                starting=served != pod.restarts,
                certain=not old,
                phase=pod.phase,
                detail=pod.cause or pod.phase or "its pod is not ready",
                cause=pod.cause,
                failed_starts=max(0, pod.failed_starts - (served or 0)),
                pod=pod.name,
                node=pod.node,
                ordinal=pod.ordinal,
            )
        server = claims.servers.get(replica_id)
        if server is None or server.url != pod.url:
            server = Server(
                url=pod.url, pool=claims.pool, health_path=claims.pool.kubernetes.health_path
            )
            claims.servers[replica_id] = server
        seen = await server.probe(self._client)
        if seen.ready:
            claims.served[replica_id] = pod.restarts
        return replace(
            seen,
            alive=None,  # that it has ended is Kubernetes' to say
            starting=claims.served.get(replica_id) != pod.restarts,
            phase="" if seen.ready else "loading",
            served_model=seen.served_model or claims.pool.model,
            pod=pod.name,
            node=pod.node,
            ordinal=pod.ordinal,
        )

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """Have one less, and of all pods that of this replica where its workload lets that be
        chosen; the replica whose pod it ends instead goes on with this one's. Returns when a pod is
        terminating: Kubernetes ends it within its own time. Raises ``BackendError`` where none is
        in time. The pod of a pool that is not Tidegate's to scale any more is left alone."""
        claims = self._find(replica_id)
        if claims is None:
            return
        if not self._is_mine(claims):
            if self._place_of(claims.pool) in self._adopted:
                return  # it is about to be taken over again
            self._forget(claims, replica_id)
            if not claims.bound:
                self._pools.pop(self._place_of(claims.pool), None)
            return
        pod = self._place(claims, replica_id)
        if pod is not None and claims.pool.kubernetes.kind in {"Deployment", "ReplicaSet"}:
            await self._mark_cheapest(claims.pool, pod)
        place = list(claims.bound).index(replica_id)
        del claims.bound[replica_id]
        try:
            await self._write(claims)
        except BaseException:  # it is still there
            ids = list(claims.bound)
            before = claims.bound | {replica_id: None if pod is None else pod.name}
            claims.bound = {one: before[one] for one in [*ids[:place], replica_id, *ids[place:]]}
            raise
        self._forget(claims, replica_id)
        if pod is not None:
            await self._see_shrunk(claims, self._clock() + grace_s)

    async def close(self, *, keep: bool = False) -> None:
        """Leave the workloads as they are: they serve for the next control process."""
        if self._resync is not None:
            self._resync.cancel()
            await asyncio.gather(self._resync, return_exceptions=True)
        await self._client.close()
        self._pools.clear()

    def pods_changed(self, namespace: str) -> None:
        """Something has changed in a namespace: replicas there get their pods, and are probed."""
        for claims in self._pools.values():
            if self._cluster.ref(claims.pool).namespace == namespace:
                for replica_id in self._bind(claims):
                    self._on_news(replica_id)

    def _is_mine(self, claims: Claims) -> bool:
        return self._place_of(claims.pool) in self._mine

    def _find(self, replica_id: str) -> Claims | None:
        return next((one for one in self._pools.values() if replica_id in one.bound), None)

    def _forget(self, claims: Claims, replica_id: str) -> None:
        claims.bound.pop(replica_id, None)
        claims.servers.pop(replica_id, None)
        claims.served.pop(replica_id, None)

    def _bind(self, claims: Claims) -> list[str]:
        """Give replicas their pods; returns all that may have changed."""
        pods = {pod.name: pod for pod in self._cluster.pods(claims.pool)}
        before, claims.bound = claims.bound, bind(claims.bound, pods.values())
        for replica_id, pod in claims.bound.items():
            if before[replica_id] != pod:
                claims.servers.pop(replica_id, None)
                if pod is None or not pods[pod].ready:
                    claims.served.pop(replica_id, None)
        return list(claims.bound)

    def _place(self, claims: Claims, replica_id: str) -> Pod | None:
        self._bind(claims)
        name = claims.bound[replica_id]
        return next((pod for pod in self._cluster.pods(claims.pool) if pod.name == name), None)

    async def _mark_cheapest(self, pool: PoolSettings, pod: Pod) -> None:
        """Have the ReplicaSet choose this pod, among those that are as far."""
        patch = {"metadata": {"annotations": {DELETION_COST: LOWEST_COST}}}
        namespace = self._cluster.ref(pool).namespace
        try:
            await self._cluster.client.merge(resource("v1", "Pod"), pod.name, patch, namespace)
        except KubernetesError as error:
            if error.status not in {403, 404}:  # it may choose another then, which is seen
                raise

    async def _write(self, claims: Claims) -> None:
        """Tell the workload its number, if that is another than it has."""
        async with claims.writing:
            if not self._may_write():
                raise KubernetesError("this Tidegate does not lead, so it scales nothing")
            if not self._is_mine(claims):
                ref = self._cluster.ref(claims.pool)
                raise KubernetesError(f"{ref} is not Tidegate's to scale any more")
            number = len(claims.bound)
            known = self._cluster.scale(claims.pool)
            if known is None or known.replicas != number:
                await self._cluster.write_scale(claims.pool, number)
                LOG.info("%s: told to have %d replicas", self._cluster.ref(claims.pool), number)

    async def _see_shrunk(self, claims: Claims, until_s: float) -> None:
        """Until no more pods live than the workload is to have."""
        while True:
            pods = self._cluster.pods(claims.pool)
            if sum(not pod.terminating for pod in pods) <= len(claims.bound):
                return
            if self._clock() > until_s:
                ref = self._cluster.ref(claims.pool)
                raise BackendError(f"{ref} is to have {len(claims.bound)} pods, and has more")
            await asyncio.sleep(POLL_S)

    async def _keep_numbers(self) -> None:
        """See that workloads keep the number that they were told: nothing else is to scale them."""
        while True:
            await asyncio.sleep(RESYNC_S)
            for claims in list(self._pools.values()):
                if self._is_mine(claims) and self._may_write():
                    try:
                        await self._keep_number(claims)
                    except KubernetesError as error:
                        LOG.log(error.level, "%s", error)
                    except Exception:  # the others are kept too
                        LOG.exception("the number of %s", self._cluster.ref(claims.pool))

    async def _keep_number(self, claims: Claims) -> None:
        async with claims.writing:
            scale = await self._cluster.read_scale(claims.pool)
        drifted = scale.replicas != len(claims.bound)
        if drifted and claims.drifted and self._is_mine(claims):
            LOG.warning(
                "%s: something else has set %d replicas; it is to have %d",
                self._cluster.ref(claims.pool),
                scale.replicas,
                len(claims.bound),
            )
            await self._write(claims)
        claims.drifted = drifted and not claims.drifted
