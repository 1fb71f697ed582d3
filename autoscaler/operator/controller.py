"""Watches ModelPools: makes pools of them, keeps their workloads, and says what became of them.

Level-triggered: each change, and each few seconds, everything is compared as it is now. Objects are
written only by the process that leads. While the API server is away, the pools stay as they are.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from autoscaler.backends.base import BackendError
from autoscaler.backends.kubernetes.client import (
    FIELD_MANAGER,
    KubernetesError,
    Object,
    resource,
)
from autoscaler.backends.kubernetes.cluster import Cluster
from autoscaler.backends.kubernetes.watch import Key, Watch, key_of, on_each_change
from autoscaler.operator.imports.ahpa import AHPA_API_VERSION, AHPA_KIND, map_ahpa
from autoscaler.operator.imports.fields import InvalidResource
from autoscaler.operator.manifests import MANAGED, make_workload
from autoscaler.operator.model_pool import (
    API_VERSION,
    KIND,
    InvalidModelPool,
    ModelPoolSpec,
    parse_spec,
    to_settings,
)
from autoscaler.operator.node_cache import NodeCacheAccess, digest_of, image_to_keep
from autoscaler.operator.node_labels import label_of
from autoscaler.operator.preload_job import find_preloaded, job_name, make_preload_job
from autoscaler.operator.status import Scaling, Verdict, make_status
from autoscaler.settings import PoolSettings
from autoscaler.types import PoolReport

LOG = logging.getLogger("tidegate.operator")

RETRY_S = 5.0
"""Between two comparisons without a change: what failed is tried again."""
STATUS_S = 1.0
NO_SIDECARS = re.compile(r"""initContainers\[(0|name=\W*model\W*)\]""")
"""What an API server older than sidecars complains of, in either way of naming it."""
TEXT_S = 15.0
"""Between two statuses of which only the decision's text differs: it has figures that change."""


@dataclass(slots=True, kw_only=True, eq=False)
class KnownPool:
    """A ModelPool as it was last compared, and what was written of it. ``error`` says why its
    workload could not be written, ``left_out`` why it is no pool although its spec is one.
    ``is_others``: the workload of its name is not its own. ``override`` is the number that was
    taken from its ``spec.replicas``."""

    found: Object
    spec: ModelPoolSpec | None = None
    pool: PoolSettings | None = None
    verdict: Verdict = field(default_factory=Verdict)
    applied: str = ""
    error: str = ""
    is_others: bool = False
    left_out: str = ""
    job: Object | None = None
    job_error: str = ""
    override: int | None = None
    status: Object | None = None
    written_s: float = -math.inf
    desired: int | None = None


class ModelPoolController:
    """The operator of ModelPools."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        namespace: str,
        set_pools: Callable[[Sequence[PoolSettings]], Awaitable[Mapping[str, str]]],
        reserved: Callable[[], Mapping[str, str]],
        report: Callable[[str], PoolReport | None],
        set_replicas: Callable[[str, int | None], object],
        may_write: Callable[[], bool],
        node_cache: Callable[[], Awaitable[NodeCacheAccess]],
        identity: str = "tidegate",
        ahpa_pools: bool = False,
    ) -> None:
        """``namespace`` ``*``: all of them. ``set_pools`` has these pools of ModelPools from now
        on, and returns why some are not, by name. ``reserved`` are the names of other pools, with
        whose they are. ``set_replicas`` overrides a pool's number (``None``: by demand).
        ``node_cache`` tells how pods use the cache of their node, or raises ``KubernetesError``.
        ``ahpa_pools``: AdvancedHorizontalPodAutoscalers are pools too, which they scale."""
        self._cluster, self._namespace = cluster, namespace
        self._set_pools, self._reserved = set_pools, reserved
        self._report, self._set_replicas = report, set_replicas
        self._may_write, self._identity = may_write, identity
        self._node_cache = node_cache
        self._known: dict[Key, KnownPool] = {}
        self._changed = asyncio.Event()
        self.compared = asyncio.Event()
        """Set when the pools of all ModelPools were first made."""
        self._kind = resource(API_VERSION, KIND)
        self._ahpa_pools = ahpa_pools
        self._said: dict[Key, str] = {}
        """What was last said of each AdvancedHorizontalPodAutoscaler."""

    def find(self, pool: str) -> Object | None:
        """The ModelPool that a pool is; ``None`` for a pool of the settings."""
        for one in self._known.values():
            if one.pool is not None and one.pool.name == pool:
                return one.found
        return None

    async def run(self) -> None:
        """Until cancelled. Raises ``KubernetesError`` where there is no access to a cluster."""
        note = lambda key: self._changed.set()  # noqa: E731
        pools = Watch(self._cluster.client, self._kind, self._namespace, on_change=note)
        scalers = Watch(
            self._cluster.client,
            resource("autoscaling/v1", "HorizontalPodAutoscaler"),
            self._namespace,
            keep=keep_scaler,
            on_change=note,
        )
        ahpas = Watch(
            self._cluster.client,
            resource(AHPA_API_VERSION, AHPA_KIND),
            self._namespace,
            on_change=note,
        )
        jobs = Watch(
            self._cluster.client,
            resource("batch/v1", "Job"),
            self._namespace,
            labels=MANAGED,
            on_change=note,
        )
        async with asyncio.TaskGroup() as group:
            watching_jobs: asyncio.Task[None] | None = None
            group.create_task(pools.run())
            group.create_task(scalers.run())
            group.create_task(self._write_statuses())
            await pools.wait_read()
            # Not before it is known who else scales; where that may not be read, nothing does.
            await scalers.wait_answered()
            if self._ahpa_pools:
                group.create_task(ahpas.run())
                await ahpas.wait_answered()

            async def compare() -> None:
                nonlocal watching_jobs
                if watching_jobs is None and any(map(wants_job, pools.objects.values())):
                    watching_jobs = group.create_task(jobs.run())
                    await jobs.wait_answered()
                await self._compare(
                    pools.objects,
                    list(scalers.objects.values()),
                    list(ahpas.objects.values()),
                    jobs.objects,
                )
                self.compared.set()

            await on_each_change(self._changed, compare, at_least_every_s=RETRY_S)

    async def _compare(
        self,
        objects: Mapping[Key, Object],
        scalers: Sequence[Object],
        ahpas: Sequence[Object],
        jobs: Mapping[Key, Object],
    ) -> None:
        """Bring everything to what the resources say."""
        names = dict(self._reserved())
        scalers = [*scalers, *(keep_scaler({**one, "kind": AHPA_KIND}) for one in ahpas)]
        living = [one for one in objects.values() if "deletionTimestamp" not in one["metadata"]]
        oldest = sorted(living, key=lambda one: (one["metadata"]["creationTimestamp"], key_of(one)))
        known = {}
        for found in oldest:
            key = key_of(found)
            one = known[key] = self._known.get(key) or KnownPool(found=found)
            one.found = found
            self._judge(one, names, scalers)
            if one.pool is not None and one.spec is not None and one.spec.template is not None:
                await self._apply(one, one.spec)
            if one.pool is not None and one.spec is not None:
                await self._preload(one, one.spec, jobs)
        self._known = known
        wanted = [one.pool for one in known.values() if one.pool is not None and not one.is_others]
        wanted += self._pools_of_ahpas(ahpas, names)
        errors = await self._set_pools(wanted)
        for one in known.values():
            if one.pool is not None:
                one.left_out = errors.get(one.pool.name, "")
            self._override(one)

    def _judge(self, one: KnownPool, names: dict[str, str], scalers: Sequence[Object]) -> None:
        """Whether it is a pool, and which. ``names`` are those that are taken; it adds its own."""
        found = one.found
        mine = "/".join(key_of(found))
        try:
            spec = parse_spec(found)
            scaler = ""
            if spec.scaled_by == "tidegate":
                scaler = find_scaler(found, spec, scalers)
            pool = to_settings(found, spec, taken_over=scaler)
        except InvalidModelPool as error:
            one.verdict, one.pool = Verdict(problem=str(error), reason="InvalidSpec"), None
            return
        taken = next((name for name in pool.names if name in names), None)
        if taken is not None:
            text = f"{names[taken]} has the name {taken!r} already"
            one.verdict, one.pool = Verdict(problem=text, reason="NameConflict"), None
            return
        names |= dict.fromkeys(pool.names, f"ModelPool {mine}")
        one.spec, one.pool, one.verdict = spec, pool, Verdict(scaler=scaler)

    def _pools_of_ahpas(self, ahpas: Sequence[Object], names: dict[str, str]) -> list[PoolSettings]:
        """The pools of those whose workload is no ModelPool's. AHPA scales them. ``names`` are
        those that are taken; it adds its own."""
        taken = {workload_of(one.pool) for one in self._known.values() if one.pool is not None}
        found = []
        said = {}
        for ahpa in sorted(ahpas, key=key_of):
            mine = f"AdvancedHorizontalPodAutoscaler {'/'.join(key_of(ahpa))}"
            try:
                made = map_ahpa(ahpa, now=datetime.now(UTC).replace(tzinfo=None)).model_pool
                pool = to_settings(made, parse_spec(made), taken_over=mine)
            except (InvalidResource, InvalidModelPool) as error:
                said[key_of(ahpa)] = f"{mine} is no pool: {error}"
                continue
            if workload_of(pool) in taken:
                continue
            if pool.name in names:
                text = f"{mine} is no pool: {names[pool.name]} has the name {pool.name!r} already"
                said[key_of(ahpa)] = text
                continue
            names[pool.name] = mine
            found.append(pool)
            said[key_of(ahpa)] = (
                f"{mine} is a pool that it scales itself; to hand it over apply what `tidegate "
                "import ahpa` prints, and delete it"
            )
        for key, text in said.items():
            if self._said.get(key) != text:
                LOG.info("%s", text)
        self._said = said
        return found

    async def _apply(self, one: KnownPool, spec: ModelPoolSpec) -> None:
        """Have its workload as the template says."""
        if not self._may_write() or one.pool is None:
            return
        client = self._cluster.client
        namespace, name = key_of(one.found)
        try:
            access = await self._node_cache() if spec.use_node_cache else None
            label = label_of(one.pool.model or "")
            workload = make_workload(one.found, spec, node_label=label, access=access)
            text = json.dumps(workload, sort_keys=True)
            # One that is gone has no number any more: it is made again.
            if text == one.applied and self._cluster.scale(one.pool) is not None:
                return
            kind = resource(workload["apiVersion"], workload["kind"])
            there = await client.get(kind, name, namespace)
            one.is_others = there is not None and owner(there) != one.found["metadata"]["uid"]
            if there is None:
                await self._create_at_zero(kind, workload, namespace)
            elif text == one.applied:
                return
            elif one.is_others:
                raise KubernetesError(
                    f"{workload['kind']} {namespace}/{name} is there and is not this ModelPool's; "
                    "name it in targetRef, or delete it"
                )
            elif access is not None and (image := image_to_keep(there, workload)) is not None:
                kept = replace(access, image=image)
                workload = make_workload(one.found, spec, node_label=label, access=kept)
            await client.apply(kind, workload, namespace, force=True)
            if there is None:
                await self._cluster.read_scale(one.pool)
        except KubernetesError as error:
            text = str(error)
            if spec.use_node_cache and NO_SIDECARS.search(text):
                text = (
                    f"the API server refuses the container beside the engine by which "
                    f"{namespace}/{name} would use the node's cache; useNodeCache needs "
                    "Kubernetes 1.29"
                )
            before, one.error = one.error, text
            if text != before:
                await self._event(one.found, "Warning", "ApplyFailed", text)
        else:
            one.applied, one.error = text, ""

    async def _create_at_zero(self, kind: Any, workload: Object, namespace: str) -> None:
        """Make a workload of no replicas: how many it has is decided, and set by /scale.

        Without ``create``, whose fields would be owned for good: what a later apply leaves out
        would stay. The number has a second manager, so that it stays when the first leaves it out.
        """
        client, number = self._cluster.client, {"replicas": 0}
        whole = {**workload, "spec": {**workload["spec"], **number}}
        await client.apply(kind, whole, namespace, force=True)
        bare = {key: workload[key] for key in ("apiVersion", "kind")}
        bare["metadata"] = {"name": workload["metadata"]["name"], "namespace": namespace}
        bare["spec"] = number
        await client.apply(kind, bare, namespace, force=True, manager=f"{FIELD_MANAGER}-number")

    async def _preload(
        self, one: KnownPool, spec: ModelPoolSpec, jobs: Mapping[Key, Object]
    ) -> None:
        """Have the Job that brings its model to nodes as the ModelPool says now. The spec of a Job
        cannot be changed, so one of another is deleted, and made anew when it is gone."""
        namespace, name = key_of(one.found)
        one.job = jobs.get((namespace, job_name(name)))
        if not self._may_write() or not (spec.preload_nodes or one.job):
            return
        client, kind = self._cluster.client, resource("batch/v1", "Job")
        try:
            made = make_preload_job(one.found, spec, await self._node_cache())
            if one.job is None:
                await client.create(kind, made, namespace)
            elif owner(one.job) != one.found["metadata"]["uid"]:
                raise KubernetesError(
                    f"Job {namespace}/{job_name(name)} is there and is not this ModelPool's"
                )
            elif not spec.preload_nodes or digest_of(one.job) != digest_of(made):
                await client.delete(kind, job_name(name), namespace)
            one.job_error = ""
        except KubernetesError as error:
            one.job_error = str(error)

    def _override(self, one: KnownPool) -> None:
        """What /scale of the ModelPool itself asks for, for as long as it does."""
        if one.pool is None or one.spec is None:
            return
        number = one.spec.replicas
        wanted = None if number is None else min(number, one.pool.max_replicas)
        report = self._report(one.pool.name)
        if report is None or wanted == one.override == report.override:
            return
        if wanted is None and one.override is None:
            return  # an operator's, by `tidegate scale`
        try:
            self._set_replicas(one.pool.name, wanted)
        except (LookupError, ValueError):  # it is no pool yet, or another autoscaler's
            return
        one.override = wanted

    async def _write_statuses(self) -> None:
        """Say back what became of them, once a second where it has changed, and more seldom where
        only figures in the decision's text have."""
        while True:
            await asyncio.sleep(STATUS_S)
            if not self._may_write():
                continue
            for key, one in list(self._known.items()):
                try:
                    await self._write_status(key, one)
                except KubernetesError as error:
                    if error.status != 404:
                        LOG.debug("status of %s/%s: %s", *key, error)
                except Exception:  # of the others it is still to be written
                    LOG.exception("status of %s/%s", *key)

    async def _write_status(self, key: Key, one: KnownPool) -> None:
        report = None if one.pool is None else self._report(one.pool.name)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        preloaded = None
        if one.spec is not None and one.spec.preload_nodes:
            preloaded = find_preloaded(one.spec, one.job, one.job_error)
        status = make_status(one.found, one.verdict, report, self._scaling(one), now, preloaded)
        if status == (one.found.get("status") or {}) or status == one.status:
            return
        now_s = asyncio.get_running_loop().time()
        text_alone = one.status is not None and {**status, "message": ""} == {
            **one.status,
            "message": "",
        }
        if text_alone and now_s - one.written_s < TEXT_S:
            return
        gone = dict.fromkeys((one.found.get("status") or {}).keys() - status.keys())
        written = await self._cluster.client.merge(
            self._kind.Status, key[1], {"status": {**gone, **status}}, key[0]
        )
        one.status, one.written_s = status, now_s
        one.found = {**one.found, "status": written.get("status")}
        desired = status.get("desiredReplicas")
        if one.desired is not None and desired is not None and desired != one.desired:
            reason = "ScaledUp" if desired > one.desired else "ScaledDown"
            change = None if report is None else report.last_change
            why = status.get("message", "") if change is None else change.detail
            text = f"desired replicas {one.desired} -> {desired}: {why}"
            await self._event(one.found, "Normal", reason, text)
        if desired is not None:
            one.desired = desired

    def _scaling(self, one: KnownPool) -> Scaling:
        if one.pool is None:
            return Scaling()
        scale = None if one.is_others else self._cluster.scale(one.pool)
        return Scaling(
            replicas=None if scale is None else scale.replicas,
            selector="" if scale is None or scale.selector is None else scale.selector,
            scaled_by=one.pool.kubernetes.scaled_by,
            error=one.error or one.left_out or self._cluster.error(one.pool),
        )

    async def _event(self, found: Object, kind: str, reason: str, text: str) -> None:
        """An Event of the ModelPool, for ``kubectl describe``. One that cannot be written is no
        reason for anything."""
        metadata = found["metadata"]
        now = datetime.now(UTC)
        event = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {
                "name": f"{metadata['name']}.{now.timestamp():.6f}".replace(".", "-"),
                "namespace": metadata["namespace"],
            },
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "uid": metadata["uid"],
                "resourceVersion": metadata.get("resourceVersion", ""),
            },
            "type": kind,
            "reason": reason,
            "message": text[:1_024],
            "source": {"component": "tidegate"},
            "reportingComponent": "tidegate.dev/operator",
            "reportingInstance": self._identity,
            "firstTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "lastTimestamp": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "count": 1,
        }
        try:
            await self._cluster.client.create(resource("v1", "Event"), event, metadata["namespace"])
        except BackendError as error:
            LOG.debug("event of %s: %s", metadata["name"], error)


def wants_job(found: Object) -> bool:
    """Whether a ModelPool has a Job that brings its model to nodes."""
    return bool((found.get("spec") or {}).get("preloadNodes"))


def keep_scaler(found: Object) -> Object:
    """What is kept of an autoscaler; lists of HorizontalPodAutoscalers do not say their kind."""
    metadata = found["metadata"]
    return {
        "kind": found.get("kind") or "HorizontalPodAutoscaler",
        "metadata": {name: metadata.get(name, "") for name in ("name", "namespace")},
        "target": (found.get("spec") or {}).get("scaleTargetRef") or {},
    }


def find_scaler(found: Object, spec: ModelPoolSpec, scalers: Sequence[Object]) -> str:
    """The autoscaler that scales a ModelPool's workload already; empty where there is none."""
    metadata = found["metadata"]
    kind = spec.template.kind if spec.template else spec.target_ref and spec.target_ref.kind
    name = spec.target_ref.name if spec.target_ref else metadata["name"]
    for one in scalers:
        target: Any = one["target"]
        same = (target.get("kind"), target.get("name")) == (kind, name)
        if same and one["metadata"]["namespace"] == metadata["namespace"]:
            return f"{one['kind']} {one['metadata']['name']}"
    return ""


def workload_of(pool: PoolSettings) -> tuple[str | None, str, str | None]:
    """Which workload a pool has."""
    return pool.kubernetes.namespace, pool.kubernetes.kind, pool.kubernetes.name


def owner(found: Object) -> str:
    """The uid of an object's controller; empty where it has none."""
    for one in found["metadata"].get("ownerReferences") or ():
        if one.get("controller"):
            return str(one["uid"])
    return ""
