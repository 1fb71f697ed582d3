"""Pools whose workload another autoscaler scales: its ready pods are watched and routed to.

Where the pool says so, Tidegate still takes the workload to zero and back; the other (an HPA) is
disabled while it is at zero. Knative's autoscaler is asked for what Tidegate would have, ahead of
demand.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from autoscaler.backends.base import AdoptedReplica, BackendError, Probe, ReplicaSpec
from autoscaler.backends.kubernetes.client import KubernetesError
from autoscaler.backends.kubernetes.cluster import Cluster, remember
from autoscaler.backends.kubernetes.pods import Pod, make_url
from autoscaler.backends.kubernetes.stat_stream import StatStream
from autoscaler.backends.servers import Server
from autoscaler.policy.packing import Device
from autoscaler.settings import PoolSettings
from autoscaler.types import Decision, PoolDemand, ScaleReason
from loaders.engines.client import EngineClient

LOG = logging.getLogger("tidegate.kubernetes")

RESYNC_S = 5.0
"""Between two readings of what the workloads are told to have."""
MOST_PODS = 16_384


class ExternalBackend:
    """Backend for ``kubernetes`` pools that Tidegate does not scale."""

    owns_replicas = False
    outlives_us = True

    def __init__(
        self,
        *,
        cluster: Cluster,
        client: EngineClient,
        may_write: Callable[[], bool] = lambda: True,
        stats: StatStream | None = None,
        begun_at: str = "",
    ) -> None:
        """``may_write``: this process is the one that takes workloads to zero and back.
        ``stats``: by which Knative is asked for replicas ahead of demand. ``begun_at``: when this
        process began, as the times of objects are written."""
        self._cluster, self._client, self._may_write = cluster, client, may_write
        self._begun_at = begun_at
        self._stats = stats
        self._servers: dict[str, Server] = {}
        self._pools: dict[str, PoolSettings] = {}
        """Those that there were since the last reading."""
        self._started: dict[tuple[str, str, str], None] = {}
        """The newest pods that were seen well: one that becomes ready again has not started."""
        self._crossing: dict[str, asyncio.Task[None]] = {}
        self._resync: asyncio.Task[None] | None = None

    def set_pools(self, pools: Sequence[PoolSettings]) -> None:
        """Nothing of them is kept: they are seen at each ``recommend``."""

    def devices(self) -> Sequence[Device]:
        """None of ours."""
        return ()

    async def measure_memory(self, replica_id: str) -> int | None:
        """Not ours to tell."""
        return None

    def urls(self, pool: PoolSettings) -> Sequence[str]:
        """Those of the pods, or of the Service's endpoints, that are ready."""
        if pool.kubernetes.service_url is not None:
            return (pool.kubernetes.service_url,)
        endpoints = self._cluster.endpoints(pool)
        if endpoints is not None:
            return [make_url(one.address, one.port) for one in endpoints if one.ready]
        return list(self._pods(pool))

    def _pods(self, pool: PoolSettings) -> dict[str, Pod]:
        """The pods that are ready by the addresses of their engines: one for each port."""
        scale = self._cluster.scale(pool)
        ports = () if scale is None else scale.ports
        found = {}
        for pod in self._cluster.pods(pool):
            if pod.terminating or not pod.ready or pod.url is None or pod.address is None:
                continue
            for url in [make_url(pod.address, port) for port in ports] or [pod.url]:
                found[url] = pod
        return found

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        """Begin to watch their pods. Nothing is taken over: servers are found by ``urls``. Raises
        ``KubernetesError`` where they cannot be read."""
        if self._resync is None and wanted:
            self._resync = asyncio.create_task(self._read_numbers())
        await asyncio.gather(*(self._cluster.track(spec.pool) for spec in wanted))
        return []

    def number(self, pool: PoolSettings) -> int | None:
        """How many its workload was last seen to be told to have; ``None`` is unknown."""
        scale = self._cluster.scale(pool)
        return None if scale is None else scale.replicas

    def recommend(self, pool: PoolSettings, decision: Decision, demand: PoolDemand | None) -> None:
        """Take its workload from zero to one, or to zero, where the pool says that this is
        Tidegate's, one such call at a time; or ask Knative for replicas."""
        self._pools[pool.name] = pool
        if not self._may_write():
            return
        self._ask_knative(pool, decision, demand)
        replicas, number = decision.desired, self.number(pool)
        running = self._crossing.get(pool.name)
        if number is None or pool.kubernetes.owner_of_zero != "tidegate":
            return
        if (number == 0) != (replicas == 0) and (running is None or running.done()):
            self._crossing[pool.name] = asyncio.create_task(self._cross(pool, min(1, replicas)))

    def _ask_knative(
        self, pool: PoolSettings, decision: Decision, demand: PoolDemand | None
    ) -> None:
        scale = self._cluster.scale(pool)
        if self._stats is None or scale is None or scale.revision is None:
            return
        replicas = decision.desired
        if decision.reason in {ScaleReason.ADVISE, ScaleReason.OBSERVE}:
            # What there is stays is not to be asked for; a request that waits is.
            replicas = min(1, replicas) if scale.replicas == 0 else 0
        namespace = self._cluster.ref(pool).namespace
        self._stats.prewarm(pool.name, namespace, scale.revision, replicas, demand)

    async def _cross(self, pool: PoolSettings, replicas: int) -> None:
        ref = self._cluster.ref(pool)
        try:
            await self._cluster.write_scale(pool, replicas)
            LOG.info("%s: told to have %d replicas", ref, replicas)
        except KubernetesError as error:
            LOG.warning("%s", error)
            await asyncio.sleep(1.0)  # the next tick asks again

    async def start(self, spec: ReplicaSpec) -> None:
        """Begin to watch a server."""
        if spec.url is None:
            raise BackendError(f"{spec.id} has no URL")
        path = spec.pool.kubernetes.health_path
        self._servers[spec.id] = Server(url=spec.url, pool=spec.pool, health_path=path)

    async def probe(self, replica_id: str) -> Probe:
        """Check a server's health, and learn its model when it has just become well."""
        server = self._servers.get(replica_id)
        if server is None:
            return Probe(alive=False, ready=False, detail="it is not watched")
        seen = await server.probe(self._client)
        pod = self._pods(server.pool).get(server.url)
        if pod is None:
            return seen
        key = self._cluster.ref(server.pool).namespace, pod.name, pod.created
        start_s = None if key in self._started else pod.start_s
        if seen.ready:
            remember(self._started, key, None, most=MOST_PODS)
        return replace(
            seen,
            pod=pod.name,
            node=pod.node,
            start_s=start_s if seen.ready else None,
            ran_before=pod.created < self._begun_at,
        )

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """Stop watching a server. Its pod is left alone."""
        self._servers.pop(replica_id, None)

    async def close(self, *, keep: bool = False) -> None:
        """Stop watching."""
        tasks = [*self._crossing.values(), *([self._resync] if self._resync else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._servers.clear()
        if self._stats is not None:
            await self._stats.close()
        await self._client.close()

    async def _read_numbers(self) -> None:
        """Know what workloads are told to have: the other autoscaler changes it."""
        while True:
            await asyncio.sleep(RESYNC_S)
            pools, self._pools = self._pools, {}
            for pool in pools.values():
                try:
                    await self._cluster.read_scale(pool)
                except KubernetesError as error:
                    LOG.log(error.level, "%s", error)
                except Exception:  # the others are read too
                    LOG.exception("the number of %s", self._cluster.ref(pool))
