"""Which pools may load replicas now, where the devices of a backend have no room for all; and whose
models are kept in the page cache, where it has none.

``policy.packing`` says so; here the pools are described to it, and what it says becomes a bound of
their decisions. What replicas hold of a device is what their pool's settings say, else what was
measured. A backend without devices, or one that does not know them yet, bounds nothing: it answers
``NoCapacity`` itself.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from autoscaler.backends.base import Backend
from autoscaler.control.replicas import PoolRecord, ReplicaRecord
from autoscaler.policy.lifecycle import Event, State
from autoscaler.policy.memory_shares import MemoryBid, share_memory
from autoscaler.policy.packing import (
    HOST,
    Device,
    Eviction,
    Need,
    PackPlan,
    PackState,
    Phase,
    PoolOnDevices,
    Resident,
    gpu_name,
    pack,
)
from autoscaler.settings import AutoscalerSettings
from autoscaler.tiers.preparer import Preparer
from autoscaler.types import Bound, Decision, ReplicaLoad, ScaleReason

ASLEEP_BYTES = 2 << 30
"""GPU memory that a sleeping engine is taken to keep until it was measured: its CUDA context, its
compiled graphs."""
MEASURE_S = 30.0
"""Between two measurements of a replica's memory."""

PHASES: Mapping[State, Phase] = {
    State.PREPARING: Phase.LOADING,
    State.STARTING: Phase.LOADING,
    State.WAKING: Phase.LOADING,
    State.READY: Phase.LOADED,
    State.UNHEALTHY: Phase.LOADED,
    State.DRAINING: Phase.LEAVING,
    State.DRAINING_TO_SLEEP: Phase.LEAVING,
    State.FALLING_ASLEEP: Phase.LEAVING,
    State.SLEEPING: Phase.ASLEEP,
    State.STOPPING: Phase.LEAVING,
}
TO_SLEEP = frozenset({State.DRAINING_TO_SLEEP, State.FALLING_ASLEEP})
DRAINING = frozenset({State.DRAINING, State.DRAINING_TO_SLEEP})


class DeviceTurns:
    """The turns of the pools of one control loop."""

    def __init__(self, spawn: Callable[[Awaitable[None], str], object]) -> None:
        self._spawn = spawn
        self._states: dict[int, PackState] = {}
        self._measured_at_s: dict[str, float] = {}

    def step(
        self,
        pools: Sequence[tuple[PoolRecord, Decision, Mapping[str, ReplicaLoad]]],
        settings: AutoscalerSettings,
        now_s: float,
    ) -> tuple[dict[str, Decision], list[tuple[PoolRecord, ReplicaRecord, Event]]]:
        """The decisions of pools that do not get all they want, as they are bounded now, and which
        replicas make room."""
        decisions: dict[str, Decision] = {}
        events: list[tuple[PoolRecord, ReplicaRecord, Event]] = []
        backends: dict[int, Backend] = {id(pool.backend): pool.backend for pool, _, _ in pools}
        for key, backend in backends.items():
            devices = backend.devices()
            mine = [one for one in pools if one[0].backend is backend]
            seen = {
                pool.pool.name: self._describe(pool, need, decision, loads, now_s)
                for pool, decision, loads in mine
                if (need := find_need(pool, devices)) is not None
            }
            plan, self._states[key] = pack(
                devices,
                list(seen.values()),
                self._states.get(key, PackState()),
                now_s,
                min_loaded_s=settings.min_loaded_s,
                turn_s=settings.turn_s,
            )
            for pool, decision, _ in mine:
                name = pool.pool.name
                if name in seen:
                    give(pool, plan.starts.get(name, ()))
                    self._measure(pool, backend, now_s)
                    if name in plan.limits:
                        decisions[name] = bound(decision, plan, seen[name])
                    events += evictions(pool, plan)
                else:
                    pool.grants = None
        return decisions, events

    def _describe(
        self,
        pool: PoolRecord,
        need: Need,
        decision: Decision,
        loads: Mapping[str, ReplicaLoad],
        now_s: float,
    ) -> PoolOnDevices:
        demand = pool.window.read(now_s)
        held = demand.some_queued or demand.requests is None
        residents = tuple(
            Resident(
                id=one.id,
                devices=one.devices or placed(one, need),
                phase=PHASES[one.state],
                since_s=one.since_s,
                busy=held or one.id not in loads or loads[one.id].inflight_requests > 0,
                to_sleep=one.state in TO_SLEEP,
                recallable=one.recallable and one.state in DRAINING,
            )
            for one in pool.replicas.values()
            if one.state in PHASES or (one.state is State.FAILED and one.launched and not one.ended)
        )
        loaded = sum(one.phase in {Phase.LOADING, Phase.LOADED} for one in residents)
        backing_off = pool.retry_at_s is not None and now_s < pool.retry_at_s
        kept = max(pool.pool.min_replicas, pool.override or 0)
        if pool.mode != "auto":  # what it has is not ours to change
            kept = len(pool.replicas)
        idle_s = (
            0.0
            if pool.decide_state.active_at_s is None
            else (now_s - pool.decide_state.active_at_s)
        )
        return PoolOnDevices(
            name=pool.pool.name,
            desired=min(decision.desired, loaded) if backing_off else decision.desired,
            pressing=demand.some_queued
            or decision.reason in {ScaleReason.WAKE, ScaleReason.OVERRIDE}
            or loaded < kept,
            need=need,
            residents=residents,
            kept=kept,
            worth=max(1.0, demand.stable_requests or 0.0)
            * (pool.estimate_wake_s() or 1.0)
            / max(1.0, idle_s),
        )

    def _measure(self, pool: PoolRecord, backend: Backend, now_s: float) -> None:
        """Measure what replicas hold, where the settings do not say."""
        for one in pool.replicas.values():
            asleep = one.state is State.SLEEPING
            known = pool.pool.process.memory_bytes or pool.pool.process.gpus_per_replica
            if not (asleep or (one.state is State.READY and not known)):
                continue
            if now_s - self._measured_at_s.get(one.id, -MEASURE_S) < MEASURE_S:
                continue
            self._measured_at_s[one.id] = now_s
            self._spawn(measure(pool, one, backend), f"memory of {one.id}")
        while len(self._measured_at_s) > 10_000:
            del self._measured_at_s[next(iter(self._measured_at_s))]


async def measure(pool: PoolRecord, one: ReplicaRecord, backend: Backend) -> None:
    """Remember the most that a replica was seen to hold of one device, awake or asleep."""
    before = one.state
    size = await backend.measure_memory(one.id)
    if size is None or one.state is not before:
        return
    if before is State.SLEEPING:
        pool.asleep_bytes = size
    elif before is State.READY:
        pool.memory_bytes = max(size, pool.memory_bytes or 0)


def find_need(pool: PoolRecord, devices: Sequence[Device]) -> Need | None:
    """What a replica of a pool takes of these devices; ``None`` where they do not limit it."""
    wanted = pool.pool.process
    if wanted.gpus_per_replica:
        known = [one.name for one in devices if one.name != HOST]
        allowed = [gpu_name(index) for index in wanted.gpus] or known
        names = tuple(name for name in known if name in allowed)
        kept = pool.asleep_bytes if pool.asleep_bytes is not None else ASLEEP_BYTES
        return (
            Need(
                devices=names,
                count=wanted.gpus_per_replica,
                memory_bytes=wanted.gpu_memory_bytes,
                asleep_bytes=kept
                if pool.tiers.may_sleep() or pool.asleep_bytes is not None
                else None,
            )
            if names
            else None
        )
    if all(one.name != HOST for one in devices):
        return None
    return Need(devices=(HOST,), memory_bytes=wanted.memory_bytes or pool.memory_bytes)


def placed(one: ReplicaRecord, need: Need) -> tuple[str, ...]:
    """Where a replica is that was not given its devices here: one that was taken over."""
    if need.devices == (HOST,):
        return (HOST,)
    return tuple(gpu_name(index) for index in one.probe.gpus)


def give(pool: PoolRecord, grants: Sequence[tuple[str, ...]]) -> None:
    """Have the replicas that wait for their start use these devices, and no other one start."""
    left = list(grants)
    pool.grants = left
    for one in pool.replicas.values():
        if one.state is State.SCHEDULED:
            one.devices = left.pop(0) if left else ()


def bound(decision: Decision, plan: PackPlan, pool: PoolOnDevices) -> Decision:
    """A decision with what there is room for."""
    most = plan.limits[pool.name]
    if most >= decision.desired:
        return decision
    gone = [one.id for one in pool.residents if one.id in plan.evict]
    text = plan.waits.get(pool.name, "")
    if gone:
        text = f"{', '.join(gone)} makes room for another pool"
    return replace(
        decision,
        desired=most,
        reason=ScaleReason.NO_CAPACITY,
        bound=Bound.NO_CAPACITY,
        detail=f"{text or 'no memory is free'}; {decision.detail}",
    )


def evictions(pool: PoolRecord, plan: PackPlan) -> list[tuple[PoolRecord, ReplicaRecord, Event]]:
    """What is asked of the replicas that make room."""
    found = []
    for one in pool.replicas.values():
        if one.id in plan.evict:
            sleeps = plan.evict[one.id] is Eviction.SLEEP and one.state is State.READY
            found.append((pool, one, Event.SLEEP if sleeps else Event.STOP))
    return found


def share_pages(pools: Iterable[PoolRecord], preparer: Preparer, now_s: float) -> None:
    """Deny pages to the pools at zero that save least by them, as far as memory is short."""
    budget_bytes = preparer.page_budget_bytes
    if budget_bytes is None:
        return
    at_zero: list[tuple[PoolRecord, int]] = []
    for pool in pools:
        size = preparer.size_bytes(pool.pool)
        if size is None or not pool.backend.owns_replicas:
            continue
        if not pool.make_status(now_s).supply:
            at_zero.append((pool, size))
        elif preparer.has_pages(pool.pool):
            budget_bytes -= size
    if sum(size for _, size in at_zero) <= budget_bytes:
        preparer.deny_pages(frozenset())
        return
    bids = [
        MemoryBid(
            pool=pool.pool.name,
            size_bytes=size,
            saved_price_s=pool.tiers.planner.page_saving_s(now_s),
            held=preparer.has_pages(pool.pool),
        )
        for pool, size in at_zero
    ]
    kept = share_memory(max(0, budget_bytes), bids)
    preparer.deny_pages({one.pool for one in bids} - kept)
