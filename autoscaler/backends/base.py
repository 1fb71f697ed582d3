"""What a backend is: one place where replicas run. It starts, stops and watches them.

A backend does what the control loop asks and says what it sees. It never decides, never retries on
its own, and never changes the number of replicas. What an engine is (its command line, health,
sleep) is asked of ``loaders.engines``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from autoscaler.policy.packing import Device
from autoscaler.settings import PoolSettings
from autoscaler.types import Decision, PoolDemand
from loaders.engines.base import EngineCommand, Placement


class BackendError(Exception):
    """A backend could not do what it was asked; the message says why, for people."""


class Unsupported(BackendError):
    """This backend, or this engine, has no such ability. Asking again will not help."""


class NoCapacity(BackendError):
    """Another replica cannot be started now, which is no fault of its engine: no GPU is free, or
    what would start it is away. Later it may be."""


class StillRunning(BackendError):
    """A process survived SIGKILL for longer than it may (it hangs in the kernel)."""


class StateInUse(BackendError):
    """Another Tidegate that is alive owns this state directory and the engines in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """One replica to be started. ``url`` is set where the engine runs already (``static``).
    ``digest`` is that of what the pool's replicas are started with. ``gpus`` are those it was given
    by the control loop (``None``: the backend chooses)."""

    id: str
    pool: PoolSettings
    url: str | None = None
    digest: str = ""
    gpus: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What a look at a replica showed. ``None`` is unknown: neither well nor ill.

    ``alive`` is false when the process is gone, ``ready`` when the engine does not answer as
    healthy. ``detail`` explains a false, ``phase`` says what a starting engine is at, ``cause`` why
    one has ended, in a line. ``listed`` are the models that the engine lists. ``stream_usage`` is
    as of a ``ServedModel``. ``starting``: it has not been ready yet, where it is now. ``certain``:
    one look that shows it not ready is enough. ``ordinal``: its place, where only the highest can
    be ended. ``failed_starts``: how often in a row its engine has ended before it was ready, where
    not the control loop but something else starts it again. ``start_s``: how long the start took
    that something else than the control loop asked for; told once. ``ran_before``: it is older than
    this process, so that it may have been ready before.
    """

    alive: bool | None = None
    ready: bool | None = None
    detail: str = ""
    phase: str = ""
    cause: str = ""
    url: str | None = None
    served_model: str | None = None
    listed: tuple[str, ...] = ()
    max_model_len_tokens: int | None = None
    pid: int | None = None
    gpus: tuple[int, ...] = ()
    cpus: tuple[int, ...] = ()
    headers: tuple[tuple[str, str], ...] = ()
    stream_usage: bool = False
    starting: bool = False
    failed_starts: int = 0
    start_s: float | None = None
    ran_before: bool = False
    certain: bool = False
    pod: str = ""
    node: str = ""
    ordinal: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class AdoptedReplica:
    """A living replica of an earlier control process, which is ours now. It may be unhealthy."""

    spec: ReplicaSpec
    probe: Probe


@runtime_checkable
class Backend(Protocol):
    """One way of running engines. Calls for one replica never overlap, except ``probe``."""

    @property
    def owns_replicas(self) -> bool:
        """Whether it starts and stops engines. If not, they are only watched and routed to."""
        ...

    @property
    def outlives_us(self) -> bool:
        """Whether its replicas run on when the control process has ended, whatever ended it."""
        ...

    def set_pools(self, pools: Sequence[PoolSettings]) -> None:
        """Its pools from now on, as they are set now. Where replicas outlive us, those of any other
        run on as they are: ``stop`` of one only forgets it."""
        ...

    def urls(self, pool: PoolSettings) -> Sequence[str]:
        """The addresses of an externally managed pool's servers as they are now; those that come
        become replicas, those that are gone end. Not used where it owns replicas."""
        ...

    def recommend(self, pool: PoolSettings, decision: Decision, demand: PoolDemand | None) -> None:
        """What Tidegate would have of an externally managed pool, at each tick, and its demand as
        it was seen last. Returns at once; a backend that has a part in its scaling does that
        beside."""
        ...

    def devices(self) -> Sequence[Device]:
        """What its replicas share, as far as it knows now: GPUs (``gpu0``, …), and ``host`` where
        their host memory is limited. Empty where nothing is, or it is not this backend's to say."""
        ...

    async def measure_memory(self, replica_id: str) -> int | None:
        """Bytes that a replica holds of each of its GPUs, else of host memory, at most; ``None``
        where that cannot be told."""
        ...

    async def start(self, spec: ReplicaSpec) -> None:
        """Begin to start a replica; returns when its process runs, long before it is ready.

        Raises ``NoCapacity`` when it cannot be started now, ``BackendError`` when it cannot at all.
        Leaves nothing behind when it raises.
        """
        ...

    async def probe(self, replica_id: str) -> Probe:
        """Look at a replica, within the health check's time limit. Never raises for a replica
        that is ill or gone; one that was never started is ``alive=False``."""
        ...

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        """End a replica: ask, wait ``grace_s`` seconds, then force, all its processes.

        Returns when they are gone; nothing to do for one that is. Raises ``StillRunning``.
        """
        ...

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        """Before the first start of these pools: take over the replicas of an earlier control
        process, and begin to end those that do not serve, or are not what would be started now.
        ``wanted`` has one replica of each pool, as it would be started; its id does not matter.

        Raises ``StateInUse`` when that control process is alive, ``BackendError`` where it is not
        known what there is.
        """
        ...

    async def close(self, *, keep: bool = False) -> None:
        """End everything it started and give back what it holds; with ``keep`` replicas go on, for
        a later control process to adopt. It is not used afterwards."""
        ...


MakeCommand = Callable[[ReplicaSpec, Placement], EngineCommand]
"""Makes the command line of a replica. Raises ``ValueError`` for settings it cannot run."""
