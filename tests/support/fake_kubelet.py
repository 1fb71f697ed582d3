"""Scheduler and kubelet of a control plane without machines: pods become ready, and go.

``with running(plane) as kubelet`` registers nodes and then looks after every pod: it binds the pod
to a node, gives it an address, and takes it through the phases a kubelet reports (image pulled,
init containers done, running, ready), each after a delay. A pod that is being deleted is ended
within its grace period, and removed.

``kubelet.treat(namespace, ...)`` says for the pods of one namespace how long that takes, and what
runs in them: ``on_pod(pod)`` is an asynchronous context manager, entered when the containers start
and left when they end, on the kubelet's event loop.

    @asynccontextmanager
    async def on_pod(pod):
        async with serve_engine(pod_network.loopback(pod.status.podIP), 8000):
            yield

Pods have addresses in 10.244.0.0/14: Kubernetes (since 1.20.7) refuses loopback addresses as
endpoints. ``pod_network`` has what makes these addresses loopback ones on this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import math
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec
import pod_network
from cluster_objects import GPU
from control_plane import ControlPlane, wait
from lightkube import ApiError, AsyncClient
from lightkube.models.core_v1 import (
    EventSource,
    NodeAddress,
    NodeCondition,
    NodeStatus,
    ObjectReference,
)
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import Event, Node, Pod, PodBinding
from lightkube.types import PatchType

OnPod = Callable[[Pod], AbstractAsyncContextManager[None]]

NODES = 2
POLL_S = 0.05
RETRY_S = 0.2
HOLD = math.inf
"""A delay of a step that is not to happen before the test says otherwise."""

GONE = (404, 409)
"""Answers about a pod that is not there any more, or was replaced by one of its name."""


@dataclass(frozen=True, kw_only=True)
class Delays:
    """Seconds that each step of a pod takes; ``run_s`` is how long a pod of a job runs."""

    schedule_s: float = 0.0
    pull_s: float = 0.0
    init_s: float = 0.0
    start_s: float = 0.0
    ready_s: float = 0.0
    run_s: float = 0.0
    terminate_s: float = 0.0


@dataclass
class Treatment:
    """How the pods of a namespace are treated; may be changed at any moment."""

    delays: Delays = field(default_factory=Delays)
    on_pod: OnPod | None = None

    def change(self, **delays: float) -> None:
        """Other delays, from now on; for pods in such a step too."""
        self.delays = dataclasses.replace(self.delays, **delays)


@dataclass
class PodLife:
    """What is known of one pod: its newest state, the node it has, and whether it is to end."""

    pod: Pod
    node: str | None
    ending: asyncio.Event = field(default_factory=asyncio.Event)
    gone: bool = False
    task: asyncio.Task[None] | None = None


class FakeKubelet:
    """Looks after all nodes and pods of a control plane, on a thread of its own."""

    def __init__(self, plane: ControlPlane, *, nodes: int = NODES, gpus: int = 8) -> None:
        self.nodes = [f"node-{number}" for number in range(nodes)]
        self.gpus = gpus
        self.errors: list[BaseException] = []
        self._plane = plane
        self._default = Treatment()
        self._treatments: dict[str, Treatment] = {}
        self._lives: dict[str, PodLife] = {}
        self._addresses: dict[str, int] = dict.fromkeys(self.nodes, 1)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="kubelet", daemon=True)

    def treat(self, namespace: str, *, on_pod: OnPod | None = None, **delays: float) -> Treatment:
        """How the pods of a namespace are treated; what is returned can be changed later."""
        self._treatments[namespace] = Treatment(Delays(**delays), on_pod)
        return self._treatments[namespace]

    def start(self) -> None:
        """Register the nodes and begin; they are ready when this returns."""
        self._thread.start()
        with self._plane.client() as client:

            def are_there() -> bool:
                return {node.metadata.name for node in client.list(Node)} >= set(self.nodes)

            wait("nodes", are_there)

    def stop(self) -> None:
        """End, with what runs in pods; raises what went wrong meanwhile."""
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(60)
        if self.errors:
            raise self.errors[0]

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        client = self._plane.async_client()
        watching = asyncio.create_task(self._watch(client))
        watching.add_done_callback(self._note)
        await self._stopping.wait()
        tasks = [life.task for life in self._lives.values() if life.task is not None]
        for task in (watching, *tasks):
            task.cancel()
        await asyncio.gather(watching, *tasks, return_exceptions=True)
        await client.close()

    async def _watch(self, client: AsyncClient) -> None:
        """List and watch, anew where the apiserver went away."""
        while True:
            try:
                await self._register(client)
                listed = client.list(Pod, namespace="*")
                pods = [pod async for pod in listed]
                known = {pod.metadata.uid for pod in pods}
                for uid in self._lives.keys() - known:
                    _end(self._lives.pop(uid))
                for pod in pods:
                    self._see(client, pod)
                version = listed.resourceVersion
                async for kind, pod in client.watch(Pod, namespace="*", resource_version=version):
                    self._see(client, pod, deleted=kind == "DELETED")
            except (httpx2.HTTPError, ApiError):
                await asyncio.sleep(RETRY_S)

    def _see(self, client: AsyncClient, pod: Pod, *, deleted: bool = False) -> None:
        uid = pod.metadata.uid
        life = self._lives.get(uid)
        if life is None:
            if deleted or _phase(pod) in ENDED:
                return
            life = self._lives[uid] = PodLife(pod, pod.spec.nodeName)
            life.task = asyncio.create_task(self._keep(client, life))
            life.task.add_done_callback(self._note)
        life.pod = pod
        if deleted:
            _end(life)
            del self._lives[uid]
        elif pod.metadata.deletionTimestamp is not None:
            life.ending.set()

    def _note(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    async def _keep(self, client: AsyncClient, life: PodLife) -> None:
        """A pod's life from its first sight to its removal."""
        async with contextlib.AsyncExitStack() as running:
            starting = asyncio.create_task(self._start(client, life, running))
            ending = asyncio.create_task(life.ending.wait())
            try:
                await asyncio.wait((starting, ending), return_when=asyncio.FIRST_COMPLETED)
                if starting.done():
                    starting.result()
                    await ending
            finally:
                starting.cancel()
                ending.cancel()
                await asyncio.gather(starting, ending, return_exceptions=True)
            if not life.gone and life.node is not None:
                await self._until_terminated(life)
        if not life.gone:
            await self._call(client.delete, Pod, **_named(life.pod), grace_period=0)

    async def _start(
        self, client: AsyncClient, life: PodLife, running: contextlib.AsyncExitStack
    ) -> None:
        pod = life.pod
        if life.node is None:
            await self._pause(pod, "schedule_s")
            life.node = await self._wait_for_node(client, pod)
            await self._bind(client, pod, life.node)
        state = PodState(pod, self._address(life.node))
        await self._report(client, pod, state)
        await self._tell(client, pod, "Pulling", f"Pulling image {pod.spec.containers[0].image}")
        await self._pause(pod, "pull_s")
        await self._tell(client, pod, "Pulled", "Successfully pulled the image")
        if pod.spec.initContainers:
            state.inits = "running"
            await self._report(client, pod, state)
            await self._pause(pod, "init_s")
        state.inits = "done"
        await self._report(client, pod, state)
        await self._pause(pod, "start_s")
        on_pod = self._treatment(pod).on_pod
        if on_pod is not None:
            pod.status.podIP = state.address
            await running.enter_async_context(on_pod(pod))
        state.containers = "running"
        await self._report(client, pod, state)
        await self._tell(client, pod, "Started", "Started the containers")
        await self._pause(pod, "ready_s")
        if on_pod is not None:
            await _until_probed(life, state.address)
        state.containers = "ready"
        await self._report(client, pod, state)
        if pod.spec.restartPolicy != "Always":
            await self._pause(pod, "run_s")
            await running.aclose()
            state.containers = "done"
            await self._report(client, pod, state)

    async def _wait_for_node(self, client: AsyncClient, pod: Pod) -> str:
        """A node that a pod may run on and that has GPUs left for it; where there is none, the pod
        says so meanwhile."""
        said = False
        while (node := self._choose_node(pod)) is None:
            if not said:
                said = True
                condition = _condition("PodScheduled", False, reason="Unschedulable")
                await self._patch(client, pod, {"conditions": [condition]})
                text = f"0/{len(self.nodes)} nodes are available"
                await self._tell(client, pod, "FailedScheduling", text, kind="Warning")
            await asyncio.sleep(POLL_S)
        return node

    async def _bind(self, client: AsyncClient, pod: Pod, node: str) -> None:
        binding = PodBinding(
            metadata=ObjectMeta(name=pod.metadata.name, uid=pod.metadata.uid),
            target=ObjectReference(kind="Node", name=node),
        )
        # The answer is a Status, which lightkube takes for a binding without a target.
        with contextlib.suppress(msgspec.ValidationError):
            await self._call(
                client.create, binding, pod.metadata.name, namespace=pod.metadata.namespace
            )
        await self._tell(client, pod, "Scheduled", f"Successfully assigned to {node}")

    def _choose_node(self, pod: Pod) -> str | None:
        """The node with the fewest pods of those that fit."""
        wanted = _gpus(pod)
        taken = dict.fromkeys(self.nodes, 0)
        pods = dict.fromkeys(self.nodes, 0)
        for life in self._lives.values():
            if life.node in taken and _phase(life.pod) not in ENDED:
                taken[life.node] += _gpus(life.pod)
                pods[life.node] += 1
        fits = [
            node for node in self.nodes if _may_run(pod, node) and taken[node] + wanted <= self.gpus
        ]
        return min(fits, key=pods.__getitem__, default=None)

    def _address(self, node: str) -> str:
        """An address that no pod had before."""
        self._addresses[node] += 1
        number = self._addresses[node]
        return f"10.{244 + self.nodes.index(node)}.{number // 250}.{number % 250 + 1}"

    async def _pause(self, pod: Pod, step: str) -> None:
        """As long as the step takes, by what is said of it meanwhile."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        while True:
            left_s = began_s + getattr(self._treatment(pod).delays, step) - loop.time()
            if left_s <= 0:
                return
            await asyncio.sleep(min(left_s, POLL_S))

    async def _until_terminated(self, life: PodLife) -> None:
        """As long as its end takes, but not longer than its grace period."""
        grace_s = life.pod.metadata.deletionGracePeriodSeconds
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._pause(life.pod, "terminate_s")

    def _treatment(self, pod: Pod) -> Treatment:
        return self._treatments.get(pod.metadata.namespace, self._default)

    async def _register(self, client: AsyncClient) -> None:
        for number, name in enumerate(self.nodes):
            sizes = {"cpu": "64", "memory": "512Gi", "pods": "250", GPU: self.gpus}
            sizes = {key: str(value) for key, value in sizes.items()}
            labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}
            await self._call(client.create, Node(metadata=ObjectMeta(name=name, labels=labels)))
            ready = NodeCondition(type="Ready", status="True", reason="KubeletReady")
            address = NodeAddress(address=f"10.{244 + number}.0.1", type="InternalIP")
            status = NodeStatus(
                capacity=sizes, allocatable=sizes, conditions=[ready], addresses=[address]
            )
            await self._call(client.patch, Node.Status, name, {"status": status.to_dict()})
            # A new node is tainted as not ready; that is for the missing node controller to end.
            await self._call(client.patch, Node, name, {"spec": {"taints": None}})

    async def _report(self, client: AsyncClient, pod: Pod, state: PodState) -> None:
        await self._patch(client, pod, state.status())

    async def _patch(self, client: AsyncClient, pod: Pod, status: dict[str, Any]) -> None:
        body = {"metadata": {"uid": pod.metadata.uid}, "status": status}
        await self._call(
            client.patch, Pod.Status, obj=body, patch_type=PatchType.STRATEGIC, **_named(pod)
        )

    async def _tell(
        self, client: AsyncClient, pod: Pod, reason: str, text: str, *, kind: str = "Normal"
    ) -> None:
        """An event of a pod."""
        now = datetime.datetime.now(datetime.UTC)
        name = f"{pod.metadata.name}.{secrets.token_hex(6)}"
        event = Event(
            metadata=ObjectMeta(name=name, namespace=pod.metadata.namespace),
            involvedObject=ObjectReference(
                apiVersion="v1", kind="Pod", name=pod.metadata.name,
                namespace=pod.metadata.namespace, uid=pod.metadata.uid,
            ),
            reason=reason, message=text, type=kind, count=1, firstTimestamp=now, lastTimestamp=now,
            source=EventSource(component="kubelet"),
        )  # fmt: skip
        with contextlib.suppress(ApiError):  # a namespace that is being deleted takes none
            await self._call(client.create, event)

    async def _call(self, call: Callable[..., Any], *arguments: Any, **named: Any) -> None:
        """Repeated until the apiserver answers; that the object is gone is an answer."""
        while True:
            try:
                await call(*arguments, **named)
            except ApiError as error:
                if error.status.code in GONE:
                    return
                if error.status.code not in (429, 500, 503, 504):
                    raise
            except httpx2.HTTPError:
                pass
            else:
                return
            await asyncio.sleep(RETRY_S)


ENDED = ("Succeeded", "Failed")
PHASES = {"waiting": "Pending", "done": "Succeeded"}
"""By the state of its containers; otherwise it is running."""


class PodState:
    """How far a pod is, as its status says it."""

    def __init__(self, pod: Pod, address: str) -> None:
        self.pod = pod
        self.address = address
        self.inits = "waiting"
        self.containers = "waiting"
        self._began = _now()

    def status(self) -> dict[str, Any]:
        """The part of a pod's status that a kubelet writes."""
        spec = self.pod.spec
        ready = self.containers == "ready"
        status: dict[str, Any] = {
            "phase": PHASES.get(self.containers, "Running"),
            "hostIP": "127.0.0.1",
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "startTime": self._began,
            "conditions": [
                _condition("PodScheduled", True),
                _condition("Initialized", self.inits == "done", reason="ContainersNotInitialized"),
                _condition("ContainersReady", ready, reason="ContainersNotReady"),
                _condition("Ready", ready, reason="ContainersNotReady"),
            ],
            "containerStatuses": [self._container(one) for one in spec.containers],
        }
        if spec.initContainers:
            status["initContainerStatuses"] = [self._init(one) for one in spec.initContainers]
        return status

    def _container(self, container: Any) -> dict[str, Any]:
        reason = "PodInitializing" if self.inits == "running" else "ContainerCreating"
        states: dict[str, dict[str, Any]] = {
            "waiting": {"waiting": {"reason": reason}},
            "done": {"terminated": {"exitCode": 0, "reason": "Completed"}},
        }
        return {
            **_container_status(container),
            "ready": self.containers == "ready",
            "started": self.containers in ("running", "ready"),
            "state": states.get(self.containers, {"running": {"startedAt": self._began}}),
        }

    def _init(self, container: Any) -> dict[str, Any]:
        states: dict[str, dict[str, Any]] = {
            "waiting": {"waiting": {"reason": "PodInitializing"}},
            "running": {"running": {"startedAt": self._began}},
            "done": {"terminated": {"exitCode": 0, "reason": "Completed"}},
        }
        done = self.inits == "done"
        return {**_container_status(container), "ready": done, "state": states[self.inits]}


@contextlib.contextmanager
def running(plane: ControlPlane, **options: Any) -> Iterator[FakeKubelet]:
    """One that looks after the nodes and pods of this control plane."""
    kubelet = FakeKubelet(plane, **options)
    kubelet.start()
    try:
        yield kubelet
    finally:
        kubelet.stop()


async def _until_probed(life: PodLife, address: str) -> None:
    """Until the readiness probe of the first container passes, where it has one by HTTP."""
    probe = life.pod.spec.containers[0].readinessProbe
    if probe is None or probe.httpGet is None:
        return
    url = f"http://{pod_network.loopback(address)}:{probe.httpGet.port}{probe.httpGet.path or '/'}"
    async with httpx2.AsyncClient(trust_env=False, timeout=probe.timeoutSeconds or 1) as http:
        while True:
            with contextlib.suppress(httpx2.HTTPError):
                if (await http.get(url)).is_success:
                    return
            await asyncio.sleep(RETRY_S)


def _end(life: PodLife) -> None:
    life.gone = True
    life.ending.set()


def _phase(pod: Pod) -> str | None:
    return None if pod.status is None else pod.status.phase


def _named(pod: Pod) -> dict[str, Any]:
    return {"name": pod.metadata.name, "namespace": pod.metadata.namespace}


def _gpus(pod: Pod) -> int:
    """What its containers want."""
    limits = [one.resources.limits for one in pod.spec.containers if one.resources is not None]
    return sum(int(some.get(GPU, 0)) for some in limits if some)


def _may_run(pod: Pod, node: str) -> bool:
    """By the node selector and the affinity that a DaemonSet writes; a node's only label of its
    own is its name."""
    wanted = (pod.spec.nodeSelector or {}).get("kubernetes.io/hostname", node)
    affinity = pod.spec.affinity and pod.spec.affinity.nodeAffinity
    required = affinity and affinity.requiredDuringSchedulingIgnoredDuringExecution
    terms = required.nodeSelectorTerms if required else []
    names = [
        value
        for term in terms
        for one in term.matchFields or []
        if one.key == "metadata.name"
        for value in one.values or []
    ]
    return wanted == node and (not names or node in names)


def _condition(kind: str, true: bool, *, reason: str | None = None) -> dict[str, Any]:
    condition = {"type": kind, "status": str(true), "lastTransitionTime": _now()}
    return condition if true or reason is None else {**condition, "reason": reason}


def _container_status(container: Any) -> dict[str, Any]:
    return {
        "name": container.name,
        "image": container.image,
        "imageID": "",
        "restartCount": 0,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
