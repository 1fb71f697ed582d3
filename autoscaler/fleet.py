"""What the control loop remembers of each pool and replica, and the pictures it gives of them."""

from __future__ import annotations

import asyncio
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autoscaler.backends.base import Backend, BackendError, Probe, ReplicaSpec
from autoscaler.decide import DecideState
from autoscaler.lifecycle import ENDED_STATES, PUBLIC, State
from autoscaler.plan import Candidate
from autoscaler.settings import AutoscalerSettings, PoolSettings, first, make_policy
from autoscaler.types import (
    Decision,
    PoolReport,
    PoolStatus,
    ReplicaLoad,
    ReplicaReport,
    ReplicaView,
)
from autoscaler.window import DemandWindow
from router.types import ReplicaState


@dataclass(slots=True, kw_only=True, eq=False)
class ReplicaRecord:
    """One replica. ``*_at_s`` are times on the loop's clock, ``None`` where it never happened.

    ``begun_at_s`` is when its start or wake began, ``drain_at_s`` when its drain did.
    ``not_before_s`` is the earliest time of its start. ``ended`` says that its processes are gone
    for sure, ``launched`` that the backend has taken it. ``operation`` is its newest call to the
    backend; calls follow one another.
    """

    id: str
    spec: ReplicaSpec
    since_s: float
    not_before_s: float
    state: State = State.SCHEDULED
    probe: Probe = field(default_factory=Probe)
    error: str | None = None
    health_failures: int = 0
    begun_at_s: float | None = None
    ready_at_s: float | None = None
    drain_at_s: float | None = None
    recallable: bool = False
    sleep_level: int = 1
    sleep_error: BackendError | None = None
    stop_failures: int = 0
    launched: bool = False
    ended: bool = False
    operation: asyncio.Task[None] | None = None

    @property
    def pool(self) -> str:
        """The name of its pool."""
        return self.spec.pool.name


class PoolRecord:
    """One pool: its settings, its demand, its replicas, and how its engine has been doing."""

    def __init__(
        self, pool: PoolSettings, settings: AutoscalerSettings, backend: Backend, slug: str
    ) -> None:
        self.pool = pool
        self.policy = make_policy(pool, settings)
        self.start_timeout_s = first(pool.start_timeout_s, settings.start_timeout_s)
        self.backend = backend
        self.window = DemandWindow(self.policy)
        self.decide_state = DecideState()
        self.decision: Decision | None = None
        self.replicas: dict[str, ReplicaRecord] = {}
        self.override: int | None = None
        self.resting = False
        """Put to sleep by an operator: at zero until somebody asks."""
        self.poked = False
        self.failures = 0
        self.retry_at_s: float | None = None
        self.error: str | None = None
        self.ready_at_s: float | None = None
        self.start_times_s: deque[float] = deque(maxlen=settings.wake_samples)
        self.wake_times_s: deque[float] = deque(maxlen=settings.wake_samples)
        self._slug = slug
        self._numbers = 0

    def forget_demand(self) -> None:
        """Begin anew with what was asked of it: only what comes from now on counts."""
        self.window = DemandWindow(self.policy)
        self.decide_state = DecideState(arrivals_total=self.decide_state.arrivals_total)

    def add_replica(self, now_s: float, *, url: str | None = None) -> ReplicaRecord:
        """A new replica, scheduled, with an id this loop has not used before."""
        self._numbers += 1
        name = f"{self._slug}-{self._numbers}"
        not_before_s = now_s if self.retry_at_s is None else max(now_s, self.retry_at_s)
        record = ReplicaRecord(
            id=name,
            spec=ReplicaSpec(id=name, pool=self.pool, url=url),
            since_s=now_s,
            not_before_s=not_before_s,
        )
        self.replicas[name] = record
        return record

    def count(self, *states: State) -> int:
        """How many replicas are in one of these states."""
        return sum(record.state in states for record in self.replicas.values())

    def make_status(self) -> PoolStatus:
        """What ``decide`` is told."""
        return PoolStatus(
            scheduled=self.count(State.SCHEDULED),
            starting=self.count(State.STARTING),
            waking=self.count(State.WAKING),
            ready=self.count(State.READY),
            unhealthy=self.count(State.UNHEALTHY),
            sleeping=self.count(State.SLEEPING),
            ready_at_s=self.ready_at_s,
            poked=self.poked,
            resting=self.resting,
            override=self.override,
        )

    def make_candidates(self, loads: Mapping[str, ReplicaLoad]) -> list[Candidate]:
        """What the plan is told, oldest first."""
        return [
            Candidate(
                id=record.id,
                state=record.state,
                recallable=record.recallable,
                inflight_requests=(
                    loads[record.id].inflight_requests if record.id in loads else None
                ),
            )
            for record in self.replicas.values()
        ]

    def estimate_wake_s(self) -> float | None:
        """How long the next wake will take, from those measured; ``None`` before the first."""
        measured = self.start_times_s
        if self.wake_times_s and self.count(State.SLEEPING, State.WAKING):
            measured = self.wake_times_s
        return max(measured, default=None)

    def forget(self, failed_kept: int) -> None:
        """Drop the replicas that are gone, except the newest failures."""
        gone = [
            record
            for record in self.replicas.values()
            if record.state in ENDED_STATES
            and (record.ended or not record.launched)
            and (record.operation is None or record.operation.done())
        ]
        failed = [record for record in gone if record.state is State.FAILED]
        kept = failed[-failed_kept:] if failed_kept else []
        for record in gone:
            if record not in kept:
                del self.replicas[record.id]


PUBLISHED = frozenset(State) - {State.SCHEDULED} - ENDED_STATES


def make_views(pools: Iterable[PoolRecord]) -> tuple[ReplicaView, ...]:
    """What the data path is told: every replica that has an address and is not gone."""
    views = []
    for pool in pools:
        for record in pool.replicas.values():
            probe = record.probe
            if record.state not in PUBLISHED or probe.url is None:
                continue
            views.append(
                ReplicaView(
                    id=record.id,
                    pool=record.pool,
                    url=probe.url,
                    state=PUBLIC[record.state],
                    served_model=probe.served_model,
                    max_model_len_tokens=probe.max_model_len_tokens,
                    max_inflight_requests=pool.pool.max_inflight_requests,
                    max_inflight_tokens=pool.pool.max_inflight_tokens,
                    headers=probe.headers,
                )
            )
    return tuple(views)


def report_pool(pool: PoolRecord, loads: Mapping[str, ReplicaLoad]) -> PoolReport:
    """One pool as ``tidegate status`` shows it."""
    states = Counter(PUBLIC[record.state] for record in pool.replicas.values())
    return PoolReport(
        name=pool.pool.name,
        desired=0 if pool.decision is None else pool.decision.desired,
        override=pool.override,
        ready=states[ReplicaState.READY],
        starting=states[ReplicaState.STARTING] + states[ReplicaState.WAKING],
        unhealthy=states[ReplicaState.UNHEALTHY],
        draining=states[ReplicaState.DRAINING],
        sleeping=states[ReplicaState.SLEEPING],
        wake_eta_s=pool.estimate_wake_s(),
        demand=pool.window.latest,
        last_decision=pool.decision,
        replicas=tuple(report_replica(one, loads.get(one.id)) for one in pool.replicas.values()),
        failures=pool.failures,
        retry_at_s=pool.retry_at_s if pool.failures else None,
        error=pool.error,
    )


def report_replica(record: ReplicaRecord, load: ReplicaLoad | None) -> ReplicaReport:
    """One replica as ``tidegate status`` shows it."""
    probe = record.probe
    return ReplicaReport(
        id=record.id,
        pool=record.pool,
        state=PUBLIC[record.state],
        since_s=record.since_s,
        phase=describe_phase(record),
        url=probe.url,
        pid=probe.pid,
        served_model=probe.served_model,
        gpus=probe.gpus,
        cpus=probe.cpus,
        inflight_requests=None if load is None else load.inflight_requests,
        inflight_tokens=None if load is None else load.inflight_tokens,
        error=record.error,
    )


def describe_phase(record: ReplicaRecord) -> str:
    """What a replica is at, where its state alone does not say."""
    if record.state is State.SCHEDULED:
        return "waits for its start"
    if record.state is State.STARTING:
        return record.probe.phase
    if record.state in {State.SETTLING, State.FALLING_ASLEEP}:
        return record.state.value.replace("_", " ")
    return ""


def make_slugs(names: Iterable[str]) -> dict[str, str]:
    """A name for each pool that is fit for ids, paths and files; no two are the same."""
    slugs: dict[str, str] = {}
    for name in names:
        slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "pool"
        number = 1
        unique = slug
        while unique in slugs.values():
            number += 1
            unique = f"{slug}.{number}"
        slugs[name] = unique
    return slugs
