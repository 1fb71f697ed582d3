"""The control loop's state: a record of each pool and replica."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autoscaler.backends.base import AdoptedReplica, Backend, BackendError, Probe, ReplicaSpec
from autoscaler.control.capacity_learner import CapacityLearner, describe_setup
from autoscaler.control.replica_numbers import ReplicaNumbers
from autoscaler.policy.decide import DecideState, remember_recommendation
from autoscaler.policy.lifecycle import ENDED_STATES, State
from autoscaler.policy.plan import LOADING, SERVING, ReplicaStatus
from autoscaler.settings import AutoscalerSettings, PoolSettings, first, make_policy
from autoscaler.signals.gpus.figures import gpu_utilization
from autoscaler.signals.window import DemandWindow
from autoscaler.tiers.manager import TierManager
from autoscaler.types import (
    Bound,
    Decision,
    EngineObservation,
    GpuReport,
    Observation,
    PastDecision,
    PoolPolicy,
    PoolStatus,
    RecentTraffic,
    ReplicaLoad,
    ScaleReason,
    Signal,
    TargetFigures,
    WindowedDemand,
)
from modelcache.types import Progress, Tier

SYNC_S = 15.0
"""Between two looks of another autoscaler at its metrics: what HPAs do unless told otherwise."""


@dataclass(slots=True, kw_only=True, eq=False)
class ReplicaRecord:
    """One replica. ``*_at_s`` are times on the loop's clock, ``None`` where it never happened.

    ``begun_at_s`` is when its start or wake began, ``drain_at_s`` when its drain did.
    ``not_before_s`` is the earliest time of its start. ``ended`` says that its processes are gone
    for sure, ``launched`` that the backend has taken it. ``operation`` is its newest call to the
    backend; calls follow one another. ``prepared`` is its spec with the model on this node,
    ``woken_from`` the tier its start or wake began from. ``no_capacity``: its start was put off
    because no GPU is free. ``load_known_at_s`` is when its load begins to be known: before that,
    workers of an earlier control process may have requests with it that no other process sees.
    """

    id: str
    spec: ReplicaSpec
    backend: Backend
    since_s: float
    not_before_s: float
    state: State = State.SCHEDULED
    probe: Probe = field(default_factory=Probe)
    error: str | None = None
    health_failures: int = 0
    begun_at_s: float | None = None
    drain_at_s: float | None = None
    no_capacity: bool = False
    devices: tuple[str, ...] = ()
    """What it was given by ``device_turns``."""
    makes_room: bool = False
    """It drains for another pool: however long its requests take, they are not cut."""
    recallable: bool = False
    sleep_level: int = 1
    sleep_error: BackendError | None = None
    stop_failures: int = 0
    launched: bool = False
    ended: bool = False
    operation: asyncio.Task[None] | None = None
    starting: asyncio.Task[None] | None = None
    preparation: asyncio.Task[None] | None = None
    prepared: ReplicaSpec | None = None
    progress: Progress | None = None
    woken_from: Tier | None = None
    load_known_at_s: float = -math.inf

    @property
    def pool(self) -> str:
        """The name of its pool."""
        return self.spec.pool.name


class DecisionHistory:
    """The newest decisions of a pool, bounded in number, for ``tidegate explain``. Equal ones in a
    row count as one. ``counts`` has all there were since the start, by reason."""

    def __init__(self, size: int) -> None:
        self.past: deque[PastDecision] = deque(maxlen=size)
        self.counts: Counter[ScaleReason] = Counter()
        self.change: Decision | None = None
        """The newest one that wanted another number than the one before it."""

    @property
    def latest(self) -> Decision | None:
        """The newest one."""
        return self.past[-1].decision if self.past else None

    def add(self, decision: Decision) -> None:
        """Take in a decision, as a repetition of the newest where it says the same.

        A repetition keeps the time of the first and shows the figures of the last.
        """
        count, first_at_s = 1, decision.at_s
        if self.latest is None or wanted(self.latest) != wanted(decision):
            self.change = replace(decision, inputs=None)
        if self.past and same(self.past[-1].decision) == same(decision):
            last = self.past.pop()
            count, first_at_s = last.count + 1, last.first_at_s
        elif self.past:  # what it was made from is in the history
            last = self.past.pop()
            self.past.append(replace(last, decision=replace(last.decision, inputs=None)))
        self.counts[decision.reason] += 1
        self.past.append(
            PastDecision(
                decision=decision, count=count, first_at_s=first_at_s, last_at_s=decision.at_s
            )
        )


def wanted(decision: Decision) -> int:
    """The number that it wants: in a mode which only publishes, what it would have."""
    return decision.desired if decision.recommended is None else decision.recommended


def same(decision: Decision) -> tuple[int, int, ScaleReason, Signal, Bound | None, bool]:
    """What two decisions must share to say the same: all but their time and their figures."""
    return (
        decision.desired,
        decision.supply,
        decision.reason,
        decision.signal,
        decision.bound,
        decision.panicking,
    )


class PoolRecord:
    """One pool: its settings, its demand, its replicas, and how its engine has been doing.

    ``digest`` is that of what its replicas are started with; those with another are outdated.
    ``removed``: the settings have it no more, and it ends when its last request is answered.
    ``disabled``: an operator has taken it out of service.
    ``numbers`` are those of replicas, for all pools of the control loop.
    """

    def __init__(
        self,
        pool: PoolSettings,
        settings: AutoscalerSettings,
        backend: Backend,
        slug: str,
        numbers: ReplicaNumbers,
        *,
        digest: str,
        tiers: TierManager,
    ) -> None:
        self.pool = pool
        self.digest = digest
        self.backend = backend
        self.slug = slug
        self.tiers = tiers
        self.urls: tuple[str, ...] = ()
        """The servers of an externally managed pool."""
        self.removed = False
        self.disabled = False
        self._use(settings)
        self.window = DemandWindow(self.policy)
        self.capacity = CapacityLearner(describe_setup(pool, digest))
        self.decide_state = DecideState()
        self.history = DecisionHistory(settings.history_size)
        self.replicas: dict[str, ReplicaRecord] = {}
        self.override: int | None = None
        self.sleep_requested = False
        """Put to sleep by an operator: at zero until the next request."""
        self.wake_signal = False
        self.failures = 0
        self.crashes = 0
        self.retry_at_s: float | None = None
        self.error: str | None = None
        self.cause = ""
        """Why it failed last, in a line for clients: without what is of this machine."""
        self.failed_starts = 0
        """Engines that did not come up, in a row."""
        self.ready_at_s: float | None = None
        self.reported_len_tokens: int | None = None
        """What a replica reported last as its longest prompt and answer together."""
        self.grants: list[tuple[str, ...]] | None = None
        """Devices of the replicas that may start now; ``None``: nothing limits it."""
        self.memory_bytes: int | None = None
        """The most that a replica was measured to hold of a device, ``asleep_bytes`` asleep."""
        self.asleep_bytes: int | None = None
        self._numbers = numbers

    def _use(self, settings: AutoscalerSettings) -> None:
        self.policy = make_policy(self.pool, settings)
        self.mode = self.pool.mode or settings.mode
        self.timed_bounds = tuple(one.bounds for one in self.pool.schedules)
        self.start_timeout_s = first(self.pool.start_timeout_s, settings.start_timeout_s)
        self.prepare_timeout_s = first(self.pool.prepare_timeout_s, settings.prepare_timeout_s)

    def configure(
        self, pool: PoolSettings, settings: AutoscalerSettings, backend: Backend, digest: str
    ) -> None:
        """Take other settings. Replicas that would be started alike go on as they are."""
        if digest != self.digest:
            self.failures, self.retry_at_s, self.error = 0, None, None
            self.reported_len_tokens = None
            self.failed_starts = 0
        setup = describe_setup(pool, digest)
        if setup != self.capacity.setup:
            self.capacity = CapacityLearner(setup)
        self.pool, self.backend, self.digest = pool, backend, digest
        self.urls = tuple(backend.urls(pool))
        self._use(settings)
        self.window.resize(self.policy)
        if not backend.owns_replicas:
            self.override, self.sleep_requested = None, False
        elif self.override is not None:
            self.override = min(self.override, pool.max_replicas)
        for record in self.replicas.values():
            if record.spec.digest == digest:
                record.spec = replace(record.spec, pool=pool)
            if self.removed and record.state is State.DRAINING:
                record.recallable = True  # it drains because the pool was removed
        goes_on = self.removed and self.count(State.DRAINING) > 0
        self.removed = False
        if self.supply() == 0 and not goes_on:
            self.forget_demand()  # at zero it waits for a request, whatever the settings

    def remove(self) -> None:
        """It is in the settings no more: what an operator asked of it is void."""
        self.removed = True
        self.override, self.sleep_requested = None, False

    def is_outdated(self, record: ReplicaRecord) -> bool:
        """Whether a replica that has not ended is not what would be started for the pool now."""
        if record.state in ENDED_STATES:
            return False
        return record.spec.digest != self.digest or (
            record.spec.url is not None and record.spec.url not in self.urls
        )

    def failing(self) -> tuple[int, str]:
        """How many starts have failed in a row, ours or those of what runs its engines, and why the
        last did."""
        probes = (record.probe for record in self.replicas.values())
        worst = max(probes, key=lambda one: one.failed_starts, default=None)
        if worst is not None and worst.failed_starts > self.failed_starts:
            return worst.failed_starts, worst.cause
        return self.failed_starts, self.cause if self.failed_starts else ""

    def is_finished(self, now_s: float) -> bool:
        """Whether the pool was removed and has nothing left."""
        return self.removed and not self.replicas and self.window.read(now_s).requests == 0

    def see_urls(self) -> list[str]:
        """See which servers an externally managed pool has now; returns those that no replica
        stands for yet."""
        self.urls = tuple(self.backend.urls(self.pool))
        there = {
            one.spec.url
            for one in self.replicas.values()
            if not self.is_outdated(one) and one.state not in {State.STOPPING, *ENDED_STATES}
        }
        return [url for url in self.urls if url not in there]

    @property
    def goes_to_zero(self) -> bool:
        """Whether it has no replica of its own without requests."""
        return self.backend.owns_replicas and self.pool.min_replicas == 0

    def note_idle(self, demand: WindowedDemand, settings: AutoscalerSettings, now_s: float) -> None:
        """Take note of the gaps between its requests, and plan the one that begins."""
        known = demand.requests is not None and demand.arrivals_total is not None
        active_at_s = self.decide_state.active_at_s
        if self.tiers.planner.observe(active_at_s, now_s, known=known):
            hour = first(self.pool.replica_hour_price, settings.prices.replica_hour)
            self.tiers.plan_idle(settings.prices, hour, now_s)

    def plan_to_zero(self, policy: PoolPolicy, settings: AutoscalerSettings) -> PoolPolicy:
        """The policy with the idle time that was learned, where the settings give none."""
        idle_s = self.tiers.planner.idle_to_zero_s
        given = self.pool.idle_to_zero_s is not None or settings.idle_to_zero_s is not None
        if given or idle_s is None:
            return policy
        return replace(policy, idle_to_zero_s=idle_s, idle_reason=self.tiers.planner.describe())

    def forget_demand(self) -> None:
        """Begin anew: only demand from now on counts."""
        self.window = DemandWindow(self.policy)
        self.decide_state = DecideState(arrivals_total=self.decide_state.arrivals_total)

    def add_replica(self, now_s: float, *, url: str | None = None) -> None:
        """A new replica, scheduled, with an id that was not used before."""
        name = self._numbers.make_id(self.slug)
        not_before_s = now_s if self.retry_at_s is None else max(now_s, self.retry_at_s)
        self.replicas[name] = ReplicaRecord(
            id=name,
            spec=ReplicaSpec(id=name, pool=self.pool, url=url, digest=self.digest),
            backend=self.backend,
            since_s=now_s,
            not_before_s=not_before_s,
            devices=self.grants.pop(0) if self.grants else (),
        )

    def adopt_replica(
        self,
        found: AdoptedReplica,
        backend: Backend,
        now_s: float,
        *,
        asleep: bool,
        earlier_drain_s: float,
    ) -> ReplicaRecord:
        """A replica that an earlier control process started, as it is, under the id it has. That
        one's workers finish their requests with it within ``earlier_drain_s``."""
        is_current = found.spec.digest == self.digest  # a reload may have come meanwhile
        self._numbers.note(found.spec.id)
        awake = State.READY if found.probe.ready else State.UNHEALTHY
        if found.probe.starting:
            awake = State.STARTING
        record = ReplicaRecord(
            id=found.spec.id,
            spec=replace(found.spec, pool=self.pool) if is_current else found.spec,
            backend=backend,
            since_s=now_s,
            not_before_s=now_s,
            state=State.SLEEPING if asleep else awake,
            sleep_level=2,  # how deep it sleeps is not known, and waking from 2 serves for both
            probe=found.probe,
            launched=True,
            prepared=found.spec,
            load_known_at_s=now_s + earlier_drain_s,
        )
        self.replicas[record.id] = record
        # Until the scale-down delay has passed, what the earlier one found necessary counts.
        count = self.count(State.READY, State.UNHEALTHY)
        self.ready_at_s = now_s if self.count(State.READY) else None
        delay_s = self.policy.delay_s(self.lead_s())
        self.decide_state = remember_recommendation(self.decide_state, count, delay_s, now_s)
        return record

    def known_loads(
        self, loads: Mapping[str, ReplicaLoad], now_s: float
    ) -> Mapping[str, ReplicaLoad]:
        """The loads of its replicas, as far as they are known."""
        return {
            record.id: loads[record.id]
            for record in self.replicas.values()
            if record.id in loads and now_s >= record.load_known_at_s
        }

    def count(self, *states: State) -> int:
        """How many replicas are in one of these states."""
        return sum(record.state in states for record in self.replicas.values())

    def engines(self, seen: Observation) -> list[EngineObservation]:
        """What the engines of its replicas say of themselves, as far as that is known."""
        return [seen.engines[one] for one in self.replicas if one in seen.engines]

    def target_figures(self, seen: Observation, traffic: RecentTraffic | None) -> TargetFigures:
        """The figures that it may have targets for, as they are now; ``None`` is unknown."""
        demand = seen.pools.get(self.pool.name)
        waiting = [one.load.waiting_requests for one in self.engines(seen)]
        queued: float | None = None
        if demand is not None and demand.queued_requests is not None and None not in waiting:
            queued = demand.queued_requests + sum(one or 0 for one in waiting)
        return TargetFigures(
            requests_per_s=None if traffic is None else traffic.arrivals_per_s,
            queued_requests=queued,
            ttft_s=None if traffic is None else traffic.ttft_p95_s,
            itl_s=None if traffic is None else traffic.itl_p95_s,
            e2e_s=None if traffic is None else traffic.e2e_p95_s,
            gpu_utilization_fraction=gpu_utilization(seen.gpus, self._ready_gpus()),
        )

    def _ready_gpus(self) -> set[int]:
        """The GPUs of its ready replicas."""
        ready = [one for one in self.replicas.values() if one.state is State.READY]
        return {gpu for one in ready for gpu in one.probe.gpus}

    def accelerator(self, seen: GpuReport | None) -> str:
        """What its ready replicas compute on: GPUs by their names, or ``cpu``; empty where that is
        not known."""
        ready = [one for one in self.replicas.values() if one.state is State.READY]
        readings = () if seen is None else seen.gpus or ()
        known = {one.gpu.index: one.gpu.name for one in readings}
        names = {known.get(gpu, "") for one in ready for gpu in one.probe.gpus}
        if not ready or "" in names:
            return ""
        return ", ".join(sorted(names)) or "cpu"

    def lead_s(self) -> float | None:
        """How long before demand one more replica is to be asked for; ``None`` before the first
        start, and for servers whose starts are not seen. Another autoscaler has to see it first."""
        if self.pool.backend == "static":
            return None
        tier = Tier.SLEEPING if self.count(State.SLEEPING) else self.start_tier()
        start_s = self.tiers.lead_s(tier)
        if start_s is None or self.backend.owns_replicas:
            return start_s
        return start_s + SYNC_S

    def _arriving_s(self, now_s: float) -> tuple[float, ...]:
        """In how many seconds each replica on its way is expected to be ready."""
        found = []
        for one in self.replicas.values():
            if one.state not in LOADING | {State.SCHEDULED} or self.is_outdated(one):
                continue
            whole_s = self.tiers.lead_s(one.woken_from or self.tiers.model_tier) or 0.0
            begun_at_s = max(now_s, one.not_before_s) if one.begun_at_s is None else one.begun_at_s
            found.append(max(0.0, begun_at_s + whole_s - now_s))
        return tuple(found)

    def make_status(self, now_s: float) -> PoolStatus:
        """The pool as ``decide`` sees it: an outdated replica and its successor are one."""
        states = Counter(self._states())
        return PoolStatus(
            scheduled=states[State.SCHEDULED],
            preparing=states[State.PREPARING],
            starting=states[State.STARTING],
            waking=states[State.WAKING],
            ready=states[State.READY],
            unhealthy=states[State.UNHEALTHY],
            ready_at_s=self.ready_at_s,
            wake_signal=self.wake_signal,
            sleep_requested=self.sleep_requested,
            override=self.override,
            arriving_s=self._arriving_s(now_s),
            lead_s=self.lead_s(),
        )

    def supply(self) -> int:
        """Replicas that are there or on their way."""
        return self.make_status(0.0).supply

    def _states(self) -> list[State]:
        """The states of the replicas that count. An outdated one that serves counts until one that
        is ready has taken its place, and meanwhile its successor does not."""
        current, serving = [], []
        for one in self.replicas.values():
            if not self.is_outdated(one):
                current.append(one.state)
            elif one.state in SERVING:
                serving.append(one.state)
        decision = self.history.latest
        if serving and decision is not None:
            serving = serving[: max(0, decision.desired - current.count(State.READY))]
        for _ in serving:
            loading = LOADING | {State.SCHEDULED}
            successor = next((state for state in current if state in loading), None)
            if successor is not None:
                current.remove(successor)
        return current + serving

    def make_statuses(self, loads: Mapping[str, ReplicaLoad]) -> list[ReplicaStatus]:
        """The replicas as the plan sees them, oldest first."""
        return [
            ReplicaStatus(
                id=record.id,
                state=record.state,
                recallable=record.recallable,
                outdated=self.is_outdated(record),
                no_capacity=record.no_capacity,
                ordinal=record.probe.ordinal,
                inflight_requests=(
                    loads[record.id].inflight_requests if record.id in loads else None
                ),
            )
            for record in self.replicas.values()
        ]

    def is_idle(self, decision: Decision, now_s: float) -> bool | None:
        """Whether the pool is at zero without demand; ``None`` where that is not known."""
        if decision.desired > 0 or self.supply() or self.wake_signal:
            return False
        demand = self.window.read(now_s)
        if demand.some_requests or demand.some_queued:
            return False
        if None in (demand.tokens, demand.requests, demand.arrivals_total):
            return None
        return True

    def tier(self) -> Tier | None:
        """How warm it is now; ``None`` for externally managed servers."""
        if not self.backend.owns_replicas:
            return None
        if self.count(State.READY, State.UNHEALTHY, State.DRAINING, State.DRAINING_TO_SLEEP):
            return Tier.RUNNING
        if self.count(*ASLEEP, State.WAKING):
            return Tier.SLEEPING
        return self.tiers.model_tier

    def start_tier(self) -> Tier:
        """The tier one more start begins from. A standby is there for one start only."""
        tier = self.tiers.model_tier
        taken = any(
            one.state in LOADING and one.woken_from is Tier.FORKED for one in self.replicas.values()
        )
        if tier is not Tier.FORKED or not taken:
            return tier
        return Tier.PAGED if Tier.PAGED in self.tiers.model_tiers else Tier.ON_DISK

    def estimate_wake_s(self) -> float | None:
        """How long the wake under way, or else the next, takes at most, by those measured;
        ``None`` before the first, and for externally managed servers."""
        if not self.backend.owns_replicas:
            return None
        loading = [one.woken_from for one in self.replicas.values() if one.state in LOADING]
        known = [tier for tier in loading if tier is not None]
        if known:
            tier = known[0]
        elif self.count(*ASLEEP):
            tier = Tier.SLEEPING
        else:
            tier = self.tiers.model_tier
        return self.tiers.estimate_wake_s(tier)

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


ASLEEP = (State.FALLING_ASLEEP, State.SLEEPING)
