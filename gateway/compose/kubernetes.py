"""The Kubernetes parts of ``tidegate up``: the backends of pools in a cluster, and who leads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

from autoscaler.adapters.types import KubernetesObject
from autoscaler.backends.base import Backend
from autoscaler.backends.kubernetes.backend import KubernetesBackend
from autoscaler.backends.kubernetes.client import (
    KubernetesError,
    connect,
    pluralize,
    resource,
)
from autoscaler.backends.kubernetes.cluster import Cluster
from autoscaler.backends.kubernetes.external import ExternalBackend
from autoscaler.backends.kubernetes.knative import UNCOUNTED
from autoscaler.backends.kubernetes.leader import keep_marked, unmark, wait_unmarked
from autoscaler.backends.kubernetes.lease import Election
from autoscaler.backends.kubernetes.stat_stream import StatStream
from autoscaler.backends.kubernetes.workloads import WorkloadRef
from autoscaler.operator.controller import ModelPoolController
from autoscaler.operator.knative import PodAutoscalerController
from autoscaler.operator.model_pool import GROUP, KIND, PLURAL
from autoscaler.operator.node_cache import NodeCacheAccess
from autoscaler.operator.pod_autoscaler import CLASS
from autoscaler.settings import EXTERNAL_KUBERNETES, PoolSettings
from autoscaler.types import PoolReport
from gateway.settings.schema import Settings
from loaders.engines.client import EngineClient

log = logging.getLogger("tidegate.kubernetes")

READ_S = 10.0
"""How long the pools that are resources are waited for, before requests are taken without them."""
HAND_OVER_S = 10.0
"""How long a leader that ends goes on taking requests, for another to be found in its place."""

CONTAINER = "tidegate"
"""The name of Tidegate's container in the manifests."""


def find_second_writers(
    pools: Sequence[PoolSettings],
    settled: Sequence[PoolSettings],
    ref: Callable[[PoolSettings], WorkloadRef],
) -> dict[str, str]:
    """Why some of these pools cannot be, by name: an earlier one, or one of the ``settled``, has
    the same workload, and Tidegate writes its number for both."""
    first: dict[WorkloadRef, str] = {}
    found = {}
    for pool in (*settled, *pools):
        if pool.backend == "kubernetes" and pool.kubernetes.is_written:
            owner = first.setdefault(ref(pool), pool.name)
            if owner != pool.name:
                found[pool.name] = f"{ref(pool)} is the workload of pool {owner!r} already"
    return found


class KubernetesParts:
    """Everything of this process that talks to a Kubernetes API. Nothing is connected before a pool
    or the settings need it."""

    def __init__(self, settings: Settings, *, on_news: Callable[[str], None]) -> None:
        """``on_news`` is called with a replica whose pod has changed."""
        self._settings = settings
        given, timeout_s = settings.kubernetes, settings.autoscaler.health_timeout_s
        self.cluster = Cluster(
            lambda: connect(given), namespace=given.namespace, on_change=self._pods_changed
        )
        self.backend = KubernetesBackend(
            cluster=self.cluster,
            client=EngineClient(timeout_s=timeout_s),
            may_write=self.may_write,
            on_news=on_news,
            clock=time.monotonic,
        )
        url = given.knative.autoscaler_url
        self.external = ExternalBackend(
            cluster=self.cluster,
            client=EngineClient(timeout_s=timeout_s, headers=UNCOUNTED),
            may_write=self.may_write,
            stats=StatStream(url) if url else None,
            begun_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        )
        self._host = os.environ.get("HOSTNAME") or socket.gethostname()
        self._identity = f"{self._host}_{os.getpid()}"
        self.lost = asyncio.Event()
        """Set when another process has taken the lead."""
        self._led = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._election: Election | None = None
        self._controller: ModelPoolController | None = None
        self._compared: list[asyncio.Event] = []
        self.pools_known = not given.has_pools
        """Whether the pools that are resources have been read: a request for one is not refused as
        unknown."""
        self._image: str | None = None

    def backends(self) -> dict[str, Backend]:
        """By the names that pools call them."""
        return {"kubernetes": self.backend, EXTERNAL_KUBERNETES: self.external}

    def may_write(self) -> bool:
        """Whether this process is the one that scales."""
        return self._election is None or self._election.leads

    def standby_reason(self) -> str:
        """Why this process does not serve: another one leads. Empty where it does."""
        if self._election is None or self._led.is_set():
            return ""
        holder = self._election.holder
        return f"{holder} leads; this one takes its place" if holder else "nobody leads yet"

    def standby_is_ready(self) -> bool:
        """Whether one that waits to lead is ready: it sees who leads, and requests find the leader
        by its label."""
        election = self._election
        labelled = self._settings.kubernetes.label_leader
        return labelled and election is not None and bool(election.holder)

    @property
    def elects(self) -> bool:
        """Whether this process takes part in an election before it serves."""
        return self._settings.kubernetes.lease is not None

    async def lead(self) -> None:
        """Until this process leads. Raises ``KubernetesError`` where there is no access to a
        cluster."""
        given = self._settings.kubernetes
        if given.lease is None:
            return
        self._election = Election(
            lambda: self.cluster.client,
            name=given.lease,
            namespace=self.cluster.namespace,
            identity=self._identity,
            lasts_s=given.lease_s,
            clock=time.monotonic,
            on_lead=self._led.set,
            on_lost=lambda holder: self.lost.set(),
        )
        if given.label_leader:
            # Left from a process that led in this very pod, and has crashed.
            with contextlib.suppress(KubernetesError):
                await unmark(self.cluster.client, pod=self._host, namespace=self.cluster.namespace)
        self.spawn(self._election.run())
        await self._led.wait()

    def serve(self) -> None:
        """This process takes requests from now on: have a Service find its pod, where it is to be
        found by a label."""
        given = self._settings.kubernetes
        if given.lease is not None and given.label_leader:
            self.spawn(
                keep_marked(
                    lambda: self.cluster.client,
                    lease=given.lease,
                    pod=self._host,
                    namespace=self.cluster.namespace,
                )
            )

    def operate(
        self,
        *,
        set_pools: Callable[[Sequence[PoolSettings]], Awaitable[Mapping[str, str]]],
        reserved: Callable[[], Mapping[str, str]],
        report: Callable[[str], PoolReport | None],
        set_replicas: Callable[[str, int | None], object],
    ) -> None:
        """Watch what resources are pools, until ``close``. The arguments are those of
        ``ModelPoolController``."""
        given = self._settings.kubernetes
        namespace = "*" if given.all_namespaces else self.cluster.namespace
        parts: dict[str, tuple[PoolSettings, ...]] = {}

        async def set_part(part: str, pools: Sequence[PoolSettings]) -> Mapping[str, str]:
            parts[part] = tuple(pools)
            return await set_pools([one for pools in parts.values() for one in pools])

        def reserved_for(part: str) -> dict[str, str]:
            others = [pool for other, pools in parts.items() if other != part for pool in pools]
            names = (name for pool in others for name in pool.names)
            return {**dict.fromkeys(names, "another resource"), **reserved()}

        if given.model_pools:
            self._controller = ModelPoolController(
                self.cluster,
                namespace=namespace,
                set_pools=partial(set_part, KIND),
                reserved=partial(reserved_for, KIND),
                report=report,
                set_replicas=set_replicas,
                may_write=self.may_write,
                node_cache=self._find_node_cache,
                identity=self._identity,
                ahpa_pools=given.ahpa_pools,
            )
            self._compared.append(self._controller.compared)
            self.spawn(self._controller.run())
        if given.knative.pod_autoscalers:
            revisions = PodAutoscalerController(
                self.cluster,
                namespace=namespace,
                set_pools=partial(set_part, CLASS),
                reserved=partial(reserved_for, CLASS),
                report=report,
                may_write=self.may_write,
            )
            self._compared.append(revisions.compared)
            self.spawn(revisions.run())

    async def wait_pools(self) -> None:
        """Until the pools that are resources are known; not for long, where they cannot be read."""
        try:
            async with asyncio.timeout(READ_S):
                for one in self._compared:
                    await one.wait()
        except TimeoutError:
            log.warning("pools of the cluster are not read yet; requests are taken without them")
        self.pools_known = True

    async def _find_node_cache(self) -> NodeCacheAccess:
        """How pods use the cache of their node: by Tidegate's own image, which is looked up once.
        Raises ``KubernetesError`` where that is not known."""
        given = self._settings.kubernetes
        if self._image is None and given.node_cache_image is None:
            kind, namespace = resource("v1", "Pod"), self.cluster.namespace
            pod = await self.cluster.client.get(kind, self._host, namespace)
            if pod is None:
                raise KubernetesError(
                    f"kubernetes.node_cache_image is missing: there is no pod {namespace}/"
                    f"{self._host} of this Tidegate whose image could be taken"
                )
            containers = pod["spec"]["containers"]
            own = [one for one in containers if one["name"] == CONTAINER] or containers
            self._image = str(own[0]["image"])
        image = given.node_cache_image or self._image
        assert image is not None
        return NodeCacheAccess(image=image, directory=given.node_cache_dir)

    def find_objects(self, pool: PoolSettings) -> tuple[KubernetesObject, ...]:
        """What a pool is in the cluster: its workload, its Service, its ModelPool."""
        if pool.backend != "kubernetes":
            return ()
        ref, cluster = self.cluster.ref(pool), self.cluster
        group, namespace = ref.api_version.rpartition("/")[0], ref.namespace
        labels = cluster.workload_labels(ref)
        objects = [(group, pluralize(ref.kind), ref.name, labels)]
        service = pool.kubernetes.service
        if service is not None:
            labels = cluster.service_labels(namespace, service)
            objects.append(("", "services", service, labels))
        own = None if self._controller is None else self._controller.find(pool.name)
        if own is not None:
            metadata = own["metadata"]
            objects.append((GROUP, PLURAL, metadata["name"], metadata.get("labels") or {}))
        return tuple(
            KubernetesObject(
                group=group, resource=kind, namespace=namespace, name=name, labels=labels
            )
            for group, kind, name, labels in objects
        )

    def find_pod(self, workload: KubernetesObject, pod: str) -> KubernetesObject:
        """A pod of a workload, with its labels."""
        namespace = workload.namespace
        return KubernetesObject(
            resource="pods",
            namespace=namespace,
            name=pod,
            labels=self.cluster.pod_labels(namespace, pod),
        )

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside, until ``close``. One that ends by an error is in the log."""

        async def logged() -> None:
            try:
                await work
            except Exception:
                log.exception("a part that talks to Kubernetes has ended")

        self._tasks.append(asyncio.create_task(logged()))

    async def release(self) -> None:
        """Let another lead: this process scales nothing any more."""
        if self._election is not None:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._election.release()

    async def hand_over(self) -> None:
        """After ``release``, where a Service finds the leader by its label: until it finds another
        one, or there is none in time. A pod that ends gets requests until then."""
        given = self._settings.kubernetes
        if given.lease is None or not given.label_leader or not self._led.is_set():
            return
        with contextlib.suppress(KubernetesError, TimeoutError):
            async with asyncio.timeout(HAND_OVER_S):
                await wait_unmarked(
                    self.cluster.client, pod=self._host, namespace=self.cluster.namespace
                )

    async def close(self) -> None:
        """End all of it. It is not used afterwards."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.cluster.close()

    def _pods_changed(self, namespace: str) -> None:
        self.backend.pods_changed(namespace)
