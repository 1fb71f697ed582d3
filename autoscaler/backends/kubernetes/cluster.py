"""What is known of a cluster: the pods and endpoints of the pools that are tracked, up to date.

One watch of pods and one of EndpointSlices for each namespace that a pool is in, however many pools
there are.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

from autoscaler.backends.kubernetes.client import KubernetesClient, KubernetesError, resource
from autoscaler.backends.kubernetes.pods import (
    SERVICE_LABEL,
    Pod,
    ServiceEndpoint,
    keep_pod,
    keep_slice,
    place,
    read_endpoints,
    read_pod,
    read_service_labels,
)
from autoscaler.backends.kubernetes.watch import Key, Watch
from autoscaler.backends.kubernetes.workloads import (
    WorkloadRef,
    WorkloadScale,
    lever_of,
    read_object,
)
from autoscaler.label_selectors import SelectorError, parse_selector
from autoscaler.settings import PoolSettings

READ_S = 30.0
"""Longest wait for the first reading of a namespace."""
GATHER_S = 0.05
"""Changes of a namespace within this time are handed on as one."""
LABELS_S = 60.0
"""Age from which the labels of a workload are read again: nothing tells of their change."""
MOST_WORKLOADS = 4_096
"""Workloads of which something is remembered, those that were read last: four times as many as
there may be pools."""

Labels = Mapping[str, str]
Name = TypeVar("Name")
Value = TypeVar("Value")


@dataclass(slots=True, kw_only=True, eq=False)
class Namespace:
    """What is watched of one namespace. ``tasks`` keep it up to date."""

    pods: Watch
    slices: Watch
    tasks: tuple[asyncio.Task[None], ...]


class Cluster:
    """The pods and endpoints of pools. ``on_change`` is called with the namespace of a change."""

    def __init__(
        self,
        connect: Callable[[], KubernetesClient],
        *,
        namespace: str | None = None,
        on_change: Callable[[str], None] = lambda namespace: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``connect`` makes the client, at the first use; raises ``KubernetesError``.
        ``namespace`` is that of pools that name none; unset: that of the client."""
        self._connect = connect
        self._given_namespace = namespace
        self._slices: Any = None
        self._on_change = on_change
        self._namespaces: dict[str, Namespace] = {}
        self._clock = clock
        self._scales: dict[WorkloadRef, WorkloadScale] = {}
        self._labels: dict[WorkloadRef, tuple[float, Labels | None]] = {}
        """With when they were read; ``None`` where they may not be."""
        self._service_labels: dict[str, Mapping[str, Labels]] = {}
        """Of the Services of each namespace, until an EndpointSlice there changes."""
        self._changed: set[str] = set()

    @cached_property
    def client(self) -> KubernetesClient:
        """The API server. Raises ``KubernetesError`` where there is no access to one."""
        return self._connect()

    @property
    def namespace(self) -> str:
        """That of pools that name none."""
        return self._given_namespace or self.client.namespace

    def ref(self, pool: PoolSettings) -> WorkloadRef:
        """The workload of a pool."""
        given = pool.kubernetes
        return WorkloadRef(
            namespace=given.namespace or self.namespace,
            api_version=given.api_version,
            kind=given.kind,
            name=given.name or "",
            part=given.worker_group,
        )

    async def track(self, pool: PoolSettings) -> WorkloadScale:
        """Know the pods and endpoints of a pool from now on; returns what its workload is told to
        have. Raises ``KubernetesError`` where that cannot be read within half a minute."""
        ref = self.ref(pool)
        try:
            async with asyncio.timeout(READ_S):
                if self._slices is None:
                    self._slices = await self._find_slices(ref.namespace)
                there = self._namespaces.get(ref.namespace) or self._watch(ref.namespace)
                scale = await self.read_scale(pool)
                await there.pods.wait_read()
                await there.slices.wait_read()
        except TimeoutError:
            text = self.error(pool) or "the API server does not answer"
            raise KubernetesError(f"the pods of {ref} are not known: {text}") from None
        return scale

    async def read_scale(self, pool: PoolSettings) -> WorkloadScale:
        """What a pool's workload is told to have. Raises ``KubernetesError``."""
        ref = self.ref(pool)
        try:
            scale = await lever_of(ref).read(self.client, ref)
            if scale.selector is not None:
                parse_selector(scale.selector)
        except SelectorError as error:
            raise KubernetesError(f"the selector of {ref} cannot be read: {error}") from None
        except KubernetesError as error:
            if error.status == 404:
                self._scales.pop(ref, None)
            raise
        remember(self._scales, ref, scale, most=MOST_WORKLOADS)
        await self._read_labels(ref)
        return scale

    async def _read_labels(self, ref: WorkloadRef) -> None:
        """Know a workload's labels, not older than ``LABELS_S``."""
        read_s, labels = self._labels.get(ref, (None, None))
        now_s = self._clock()
        if read_s is None or now_s - read_s >= LABELS_S:
            try:
                found = await read_object(self.client, ref)
                labels = dict(found["metadata"].get("labels") or {})
            except KubernetesError as error:
                if not error.is_passing:
                    labels = None
            read_s = now_s
        remember(self._labels, ref, (read_s, labels), most=MOST_WORKLOADS)

    async def write_scale(self, pool: PoolSettings, replicas: int) -> None:
        """Tell a pool's workload how many replicas to have. Raises ``KubernetesError``."""
        ref = self.ref(pool)
        await lever_of(ref).write(self.client, ref, replicas)
        known = self._scales.get(ref)
        if known is not None:
            self._scales[ref] = replace(known, replicas=replicas)

    def scale(self, pool: PoolSettings) -> WorkloadScale | None:
        """What its workload was last told to have, as far as it is known."""
        return self._scales.get(self.ref(pool))

    def pods(self, pool: PoolSettings) -> list[Pod]:
        """The pods that are a pool's replicas, with the addresses of their engines."""
        ref, given = self.ref(pool), pool.kubernetes
        there, scale = self._namespaces.get(ref.namespace), self._scales.get(ref)
        if there is None or scale is None or scale.selector is None:
            return []
        selector = parse_selector(scale.selector)
        found = [
            read_pod(one)
            for one in there.pods.objects.values()
            if selector.matches(one["metadata"].get("labels") or {})
        ]
        return place(found, self.endpoints(pool), given.port, given.service_url)

    def pod_labels(self, namespace: str, name: str) -> Labels | None:
        """The labels of a pod; ``None`` where it is not known."""
        there = self._namespaces.get(namespace)
        found = None if there is None else there.pods.objects.get((namespace, name))
        return None if found is None else dict(found["metadata"].get("labels") or {})

    def workload_labels(self, ref: WorkloadRef) -> Labels | None:
        """The labels of a workload; ``None`` where they are not known."""
        return self._labels.get(ref, (0.0, None))[1]

    def service_labels(self, namespace: str, service: str) -> Labels | None:
        """The labels of a Service, which its EndpointSlices have too; ``None`` where it has
        none."""
        there = self._namespaces.get(namespace)
        if there is None:
            return None
        if namespace not in self._service_labels:
            self._service_labels[namespace] = read_service_labels(there.slices.objects.values())
        return self._service_labels[namespace].get(service)

    def endpoints(self, pool: PoolSettings) -> list[ServiceEndpoint] | None:
        """The addresses of a pool's Service; ``None`` where it has none."""
        ref, service = self.ref(pool), pool.kubernetes.service
        there = self._namespaces.get(ref.namespace)
        if service is None:
            return None
        if there is None:
            return []
        slices = (
            one
            for one in there.slices.objects.values()
            if (one["metadata"].get("labels") or {}).get(SERVICE_LABEL) == service
        )
        return read_endpoints(slices, pool.kubernetes.port)

    def error(self, pool: PoolSettings) -> str:
        """Why what is known of a pool may be old; empty while it is not."""
        there = self._namespaces.get(self.ref(pool).namespace)
        found = there and (there.pods.error or there.slices.error)
        return str(found) if found else ""

    async def _find_slices(self, namespace: str) -> Any:
        """The version of EndpointSlices that this API server has: v1 from 1.21 on."""
        kinds = [resource(f"discovery.k8s.io/{one}", "EndpointSlice") for one in ("v1", "v1beta1")]
        try:
            await self.client.read_all(kinds[0], namespace)
        except KubernetesError as error:
            if error.status != 404:
                raise
            return kinds[1]
        return kinds[0]

    def _watch(self, namespace: str) -> Namespace:
        def change(key: Key | None) -> None:
            self._service_labels.pop(namespace, None)
            if namespace not in self._changed:
                self._changed.add(namespace)
                asyncio.get_running_loop().call_later(GATHER_S, self._hand_on, namespace)

        pods = Watch(self.client, resource("v1", "Pod"), namespace, keep=keep_pod, on_change=change)
        slices = Watch(
            self.client,
            self._slices,
            namespace,
            keep=keep_slice,
            on_change=change,
        )
        there = Namespace(
            pods=pods,
            slices=slices,
            tasks=tuple(asyncio.create_task(one.run()) for one in (pods, slices)),
        )
        self._namespaces[namespace] = there
        return there

    def _hand_on(self, namespace: str) -> None:
        self._changed.discard(namespace)
        self._on_change(namespace)

    async def close(self) -> None:
        """End the watches. It is not used afterwards."""
        tasks = [task for one in self._namespaces.values() for task in one.tasks]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._namespaces.clear()
        if "client" in self.__dict__:
            await self.client.close()


def remember(known: dict[Name, Value], name: Name, value: Value, *, most: int) -> None:
    """Have this as the newest; the oldest of too many is forgotten."""
    known.pop(name, None)
    known[name] = value
    if len(known) > most:
        del known[next(iter(known))]
