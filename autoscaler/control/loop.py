"""The control loop: observe, decide, act; once per tick, and at once on a wake signal.

It is the only writer of the number of replicas. A tick is one synchronous step, so its result is
never seen half done; the calls it sets off run beside it (``actuator``) and come back as events.
Commands of operators and of the data path change what the loop decides from, or take replicas a
step further; how many there are stays the loop's to say. Everything here happens on one event
loop; the methods are called from it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from autoscaler.backends.base import AdoptedReplica, Backend, ReplicaSpec, Unsupported
from autoscaler.control.actuator import Actuator, ErrorCounts
from autoscaler.control.device_turns import DeviceTurns, share_pages
from autoscaler.control.disabled_pools import DisabledPools
from autoscaler.control.learned_history import (
    LearnedHistory,
    PoolLoad,
    recall_capacities,
    recall_gaps,
)
from autoscaler.control.replica_numbers import ReplicaNumbers
from autoscaler.control.replicas import ASLEEP, PoolRecord
from autoscaler.control.reports import publish_pool, report_pool
from autoscaler.policy.decide import decide, decide_removed, hold_back, note_replacement
from autoscaler.policy.lifecycle import ENDED_STATES, Event, State
from autoscaler.policy.plan import make_plan
from autoscaler.policy.timed_bounds import bound_by_time
from autoscaler.settings import AutoscalerSettings, PoolSettings, make_slug
from autoscaler.tiers.idle_planner import IdlePlanner
from autoscaler.tiers.manager import TierManager
from autoscaler.tiers.preparer import Preparer
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import (
    Decision,
    FleetReport,
    NotKnown,
    Observation,
    Outlook,
    PastDecision,
    PoolReport,
    PoolStatus,
    RecentTraffic,
    ReplicaLoad,
    ScaleReason,
    TargetFigures,
)
from loaders.engines.base import engine_of
from loaders.engines.client import EngineClient
from modelcache.types import Tier
from router.types import Pool

LOG = logging.getLogger("tidegate.autoscaler")

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
MIN_TICK_S = 0.01
"""Shortest time between two ticks: wake signals that come faster are answered together."""
CLOSE_POLL_S = 0.1
SHARE_S = 10.0
"""Between two looks at whose pages are kept in memory."""
KEPT_PER_TICK = 8
"""Pools whose gaps are kept at once: that of a busy one takes a third of a millisecond."""
SLEEP_POLL_S = 0.1
GOING_TO_SLEEP = frozenset({State.DRAINING_TO_SLEEP, State.FALLING_ASLEEP})

Publish = Callable[[tuple[Pool, ...]], None]


class ControlLoop:
    """Keeps every pool at the number of replicas its demand asks for."""

    def __init__(
        self,
        *,
        pools: Sequence[PoolSettings],
        settings: AutoscalerSettings,
        backends: Mapping[str, Backend],
        digests: Mapping[str, str],
        observe: Callable[[], Observation],
        publish: Publish,
        preparer: Preparer,
        wake_times: WakeTimes,
        disabled_pools: DisabledPools | None = None,
        numbers: ReplicaNumbers | None = None,
        engine_client: EngineClient | None = None,
        record: Callable[[Observation], None] = lambda seen: None,
        note: Callable[[Decision], None] = lambda decision: None,
        outlook: Callable[[str, float | None], Outlook | None] = lambda pool, lead_s: None,
        recent: Callable[[str], RecentTraffic | None] = lambda pool: None,
        learned_history: LearnedHistory | None = None,
        earlier_drain_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        wall_s: Callable[[], float] = time.time,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``backends`` by the name pools call them. ``digests`` are those of what each pool's
        replicas are started with: replicas with another are replaced. ``observe`` reads the data
        path now, on the same clock; ``publish`` is called with the pools and their replicas
        whenever they change. ``preparer`` brings models near, and is closed with the loop.
        ``disabled_pools`` are those out of service from the start, ``numbers`` those of replicas.
        ``record`` is given what each tick observed, ``note`` what was decided. ``outlook`` is what
        is expected of a pool whose replicas need so long to be ready, ``recent`` what it was asked
        and answered in the last minute; ``learned_history`` has what earlier control processes
        learned of the pools.
        ``earlier_drain_s`` is how long the workers of an earlier control process finish requests
        with replicas that are taken over."""
        self._settings = settings
        self._observe = observe
        self._record = record
        self._note = note
        self._outlook = outlook
        self._recent = recent
        self._learned_history = learned_history
        self._loads: list[PoolLoad] = []
        self._publish = publish
        self._clock = clock
        self._wall_s = wall_s
        self._sleep = sleep
        self._engine_client = engine_client or EngineClient(timeout_s=settings.call_timeout_s)
        self._backends = dict(backends)
        self._preparer = preparer
        self._wake_times = wake_times
        self._disabled_pools = disabled_pools or DisabledPools()
        self._earlier_drain_s = earlier_drain_s
        self._errors = ErrorCounts()
        self._actuator = Actuator(
            settings=settings,
            clock=clock,
            sleep=sleep,
            on_change=self._note_change,
            on_progress=self._note_progress,
            engine_client=self._engine_client,
            preparer=preparer,
            errors=self._errors,
        )
        self._pools: dict[str, PoolRecord] = {}
        self._numbers = numbers or ReplicaNumbers()
        self._turns = DeviceTurns(self._actuator.spawn)
        self._share_at_s = -math.inf
        for pool in pools:
            self._pools[pool.name] = self._make_pool(pool, digests[pool.name])
        self._observation = Observation()
        self._awake = asyncio.Event()
        self._changed = True
        self._published: tuple[Pool, ...] | None = None
        self._opened = False
        self._runner: asyncio.Task[Any] | None = None
        self._closing = False

    def _make_pool(self, pool: PoolSettings, digest: str) -> PoolRecord:
        record = PoolRecord(
            pool,
            self._settings,
            self._backends[pool.backend_key],
            make_slug(pool.name, {one.slug for one in self._pools.values()}),
            self._numbers,
            digest=digest,
            tiers=self._make_tiers(pool),
        )
        record.disabled = pool.name in self._disabled_pools
        return record

    def _make_tiers(self, pool: PoolSettings, planner: IdlePlanner | None = None) -> TierManager:
        return TierManager(
            pool,
            planner=planner,
            preparer=self._preparer,
            wake_times=self._wake_times,
            retry_s=self._settings.backoff_max_s,
            spawn=self._actuator.spawn,
            on_error=self._errors.add,
            on_change=self._note_change,
        )

    # -- which pools there are -------------------------------------------------------------

    async def find_replicas(
        self, pools: Sequence[PoolSettings], digests: Mapping[str, str]
    ) -> list[AdoptedReplica]:
        """The replicas that run already of those of these pools that are new here, were removed
        before, or have them elsewhere now, where a backend's replicas outlive control processes.
        Some may be known. Raises ``BackendError`` where it is not known what there is."""
        found: list[AdoptedReplica] = []
        taken = {one.slug for one in self._pools.values()}
        for pool in pools:
            known = self._pools.get(pool.name)
            backend = self._backends[pool.backend_key]
            if not backend.outlives_us or (
                known is not None
                and known.backend is backend
                and known.digest == digests[pool.name]
                and not known.removed
            ):
                continue
            slug = make_slug(pool.name, taken) if known is None else known.slug
            taken.add(slug)
            spec = ReplicaSpec(id=slug, pool=pool, digest=digests[pool.name])
            found += await backend.adopt([spec])
        return found

    def set_pools(
        self,
        pools: Sequence[PoolSettings],
        digests: Mapping[str, str],
        settings: AutoscalerSettings | None = None,
        found: Sequence[AdoptedReplica] = (),
    ) -> None:
        """Have these pools from now on, and these settings (``None``: as before); in one step.
        ``found`` are the replicas of new ones that run already (``find_replicas``).

        A pool that is not among them serves the requests it has, and ends. Replicas that were
        started with other arguments than their pool has now (by its digest) are replaced, a new
        one first.
        """
        if settings is not None:
            self._settings = self._actuator.settings = settings
        for pool in pools:
            if pool.name in self._pools:
                self._configure_pool(self._pools[pool.name], pool, digests[pool.name])
            else:
                self._pools[pool.name] = self._make_pool(pool, digests[pool.name])
        names = [pool.name for pool in pools]
        gone = [name for name in self._pools if name not in set(names)]
        for name in gone:
            if not self._pools[name].removed:
                LOG.info("%s: removed; it serves the requests it has, and ends", name)
            self._pools[name].remove()
            self._pools[name].tiers.cancel_move()
        self._pools = {name: self._pools[name] for name in [*names, *gone]}
        self._tell_backends()
        for replica in found:
            record = self._pools[replica.spec.pool.name]
            known = record.replicas.get(replica.spec.id)
            if known is None or known.state in ENDED_STATES:
                self._adopt(replica, record.backend, asleep=False)
                continue
            # It runs where the pool has its replicas now, so it is one of them as it is.
            known.spec = replace(known.spec, pool=record.pool, digest=record.digest)
            if known.state is State.DRAINING:
                self._actuator.apply(record, known, Event.KEEP)
        if self._opened:
            self._register_static()
            self._recall([self._pools[name] for name in names])
        self._note_change()

    def _configure_pool(self, record: PoolRecord, pool: PoolSettings, digest: str) -> None:
        old = record.pool
        same_start = digest == record.digest
        comes_back = record.removed or not same_start
        record.configure(pool, self._settings, self._backends[pool.backend_key], digest)
        record.tiers.retry_s = self._settings.backoff_max_s
        if not same_start or (old.tiers, old.model) != (pool.tiers, pool.model):
            record.tiers.cancel_move()
            self._actuator.spawn(self._preparer.forget(old), f"change of {pool.name}")
            record.tiers = self._make_tiers(pool, record.tiers.planner)
        if not same_start:
            LOG.info("%s: other start-up arguments; its replicas are replaced", pool.name)
        for one in list(record.replicas.values()) if comes_back else ():
            # It drained because the pool was gone, or was another: how many are needed is decided
            # anew.
            if one.state is State.DRAINING and one.recallable and not record.is_outdated(one):
                self._actuator.apply(record, one, Event.KEEP)

    def _tell_backends(self) -> None:
        """Say to each backend which pools it has."""
        for backend in self._backends.values():
            mine = [one for one in self._pools.values() if one.backend is backend]
            backend.set_pools([one.pool for one in mine if not one.removed])

    def _drop_pool(self, pool: PoolRecord) -> None:
        """Nothing of a removed pool is left."""
        name = pool.pool.name
        LOG.info("%s: removed", name)
        pool.tiers.cancel_move()
        del self._pools[name]
        self._actuator.spawn(self._preparer.forget(pool.pool), f"removal of {name}")
        self._note_change()

    # -- running ---------------------------------------------------------------------------

    async def open(self) -> None:
        """Take over what an earlier control process left, and publish the pools. Raises
        ``StateInUse`` when that is alive; without this having succeeded nothing is started."""
        if self._opened:
            return
        self._tell_backends()
        for backend in self._backends.values():
            pools = [one for one in self._pools.values() if one.backend is backend]
            wanted = [ReplicaSpec(id=one.slug, pool=one.pool, digest=one.digest) for one in pools]
            found = await backend.adopt(wanted)
            asleep = await asyncio.gather(*map(self._actuator.is_asleep, found))
            for replica, sleeps in zip(found, asleep, strict=True):
                self._adopt(replica, backend, asleep=sleeps)
        self._opened = True
        self._recall(list(self._pools.values()))
        self._register_static()
        self._publish_changes()

    def _adopt(self, replica: AdoptedReplica, backend: Backend, *, asleep: bool) -> None:
        pool = self._pools[replica.spec.pool.name]
        record = pool.adopt_replica(
            replica,
            backend,
            self._clock(),
            asleep=asleep,
            earlier_drain_s=self._earlier_drain_s,
        )
        self._actuator.adopt(pool, record)

    async def run(self) -> None:
        """Tick until ``close``. Raises ``RuntimeError`` when it runs already: there is one
        writer."""
        if self._runner is not None and not self._runner.done():
            raise RuntimeError("this control loop runs already; there is one writer")
        self._runner = asyncio.current_task()
        await self.open()
        while not self._closing:
            self._awake.clear()
            self._tick()
            await self._pause(self._settings.tick_s)

    async def _pause(self, seconds: float) -> None:
        """Sleep until the next tick, or until a wake signal or a change."""
        gap_s = min(MIN_TICK_S, seconds)
        await self._sleep(gap_s)
        timer = asyncio.ensure_future(self._sleep(seconds - gap_s))
        awake = asyncio.ensure_future(self._awake.wait())
        try:
            await asyncio.wait({timer, awake}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            awake.cancel()

    async def close(self, *, drain_s: float | None = None, keep: bool = False) -> None:
        """Drain and stop everything owned, then close the backends. Ends within ``drain_s``
        (unset: the setting), ``terminate_s`` and ``call_timeout_s`` together. With ``keep``
        replicas go on, for the next control process to adopt."""
        if self._closing:
            return
        settings = self._settings
        if drain_s is not None:
            settings = settings.model_copy(update={"drain_s": drain_s})
            self._settings = self._actuator.settings = settings
        self._closing = True
        self._awake.set()
        if self._runner is not None and self._runner is not asyncio.current_task():
            await asyncio.wait({self._runner})
        limit_s = settings.drain_s + settings.terminate_s + settings.call_timeout_s
        deadline_s = self._clock() + limit_s
        while not keep and self._owned_alive() and self._clock() < deadline_s:
            self._tick()
            await self._sleep(min(CLOSE_POLL_S, settings.tick_s))
        await self._actuator.close()
        with self._errors.survive("close of models"):  # backends must be closed all the same
            async with asyncio.timeout(settings.call_timeout_s):
                await self._preparer.close()
        for name, backend in self._backends.items():
            with self._errors.survive(f"close of {name}"):  # the others must be closed too
                async with asyncio.timeout(settings.terminate_s + settings.call_timeout_s):
                    await backend.close(keep=keep)
        await self._engine_client.close()
        self._publish_changes()

    def _recall(self, pools: Sequence[PoolRecord]) -> None:
        """Read what earlier control processes learned of these, where that was not read yet."""
        history = self._learned_history
        if history is None:
            return
        learners = {one.pool.name: one.capacity for one in pools if not one.capacity.recalled}
        if learners:
            self._actuator.spawn(recall_capacities(history, learners), "capacity history")
        planners = {one.pool.name: one.tiers.planner for one in pools}
        planners = {name: one for name, one in planners.items() if not one.recalled}
        if planners:
            ahead_s = self._wall_s() - self._clock()
            self._actuator.spawn(recall_gaps(history, planners, ahead_s), "gaps of the past")

    def _keep_learned(self, now_s: float) -> None:
        """Hand over what was learned since: the newest minutes, and the gaps of a few pools."""
        history = self._learned_history
        if history is not None and self._loads:
            history.add_loads(self._loads)
        self._loads.clear()
        if history is not None:
            planners = {name: one.tiers.planner for name, one in self._pools.items()}
            due = [name for name, one in planners.items() if one.may_keep(now_s)]
            ahead_s = self._wall_s() - now_s
            packed = {name: planners[name].keep(now_s, ahead_s) for name in due[:KEPT_PER_TICK]}
            if packed:
                history.put_gaps(packed)

    def _owned_alive(self) -> bool:
        for pool in self._pools.values():
            pool.forget(self._settings.failed_kept)
            for record in pool.replicas.values():
                if not record.backend.owns_replicas or record.backend.outlives_us:
                    continue
                done = record.operation is None or record.operation.done()
                if not (done and (record.ended or record.state is State.FAILED)):
                    return True
        return False

    # -- one tick --------------------------------------------------------------------------

    def _tick(self) -> None:
        now_s = self._clock()
        self._observation = Observation()
        with self._errors.survive("observe"):  # an unknown demand is handled, an end is not
            self._observation = self._observe()
        with self._errors.survive("record"):  # pools are scaled without a history too
            self._record(self._observation)
        decided = []
        for pool in list(self._pools.values()):
            with self._errors.survive(f"pool {pool.pool.name}"):  # the others go on
                decided.append(self._decide_for(pool, now_s))
        bounded = self._take_turns(decided, now_s)
        for pool, decision, loads in decided:
            with self._errors.survive(f"pool {pool.pool.name}"):
                self._act(pool, bounded.get(pool.pool.name, decision), loads, now_s)
        if now_s >= self._share_at_s:
            self._share_at_s = now_s + SHARE_S
            share_pages(self._pools.values(), self._preparer, now_s)
        self._keep_learned(now_s)
        if self._numbers.are_new:
            self._actuator.spawn(self._numbers.save(), "replica numbers")
        self._publish_changes()

    def _decide_for(
        self, pool: PoolRecord, now_s: float
    ) -> tuple[PoolRecord, Decision, Mapping[str, ReplicaLoad]]:
        demand = self._observation.pools.get(pool.pool.name)
        if demand is not None:
            pool.window.add(demand)
        load = pool.capacity.observe(
            pool.pool,
            ready=pool.count(State.READY),
            demand=demand,
            engines=pool.engines(self._observation),
            recent=partial(self._recent, pool.pool.name),
            accelerator=partial(pool.accelerator, self._observation.gpus),
            now_s=now_s,
        )
        if load is not None:
            self._loads.append(PoolLoad(pool.pool.name, pool.capacity.setup, load))
        loads = pool.known_loads(self._observation.replicas, now_s)
        self._actuator.apply_time_limits(pool, loads, now_s)
        return pool, self._decide(pool, now_s), loads

    def _take_turns(
        self,
        decided: Sequence[tuple[PoolRecord, Decision, Mapping[str, ReplicaLoad]]],
        now_s: float,
    ) -> dict[str, Decision]:
        """The decisions that are bounded by the devices there are, and what makes room for them."""
        if self._closing:
            return {}
        owned = [one for one in decided if one[0].backend.owns_replicas]
        try:
            bounded, events = self._turns.step(owned, self._settings, now_s)
        except Exception as error:  # noqa: BLE001 -- the backend has a bound of its own
            self._errors.add("turns", error)
            return {}
        for pool, record, event in events:
            record.makes_room, record.recallable = True, record.state is State.READY
            if event is Event.SLEEP:
                record.sleep_level, record.sleep_error = pool.pool.tiers.sleep_level, None
            self._actuator.apply(pool, record, event)
            if not pool.window.read(now_s).some_requests:
                pool.forget_demand()  # it was idle, and comes back with its next request
        return bounded

    def _act(
        self,
        pool: PoolRecord,
        decision: Decision,
        loads: Mapping[str, ReplicaLoad],
        now_s: float,
    ) -> None:
        self._note_decision(pool, decision)
        self._carry_out(pool, decision, loads, now_s)
        self._actuator.start_due(pool, now_s)
        if pool.backend.owns_replicas and not pool.removed and not self._closing:
            self._advance_tiers(pool, decision, now_s)
        pool.forget(0 if pool.removed else self._settings.failed_kept)
        if pool.is_finished(now_s):
            self._drop_pool(pool)

    def _decide(self, pool: PoolRecord, now_s: float) -> Decision:
        status = pool.make_status(now_s)
        fixed = partial(Decision, pool=pool.pool.name, at_s=now_s, supply=status.supply)
        if self._closing and pool.backend.outlives_us:
            text = "Tidegate is closing; its replicas run on"
            return fixed(desired=status.supply, reason=ScaleReason.CLOSING, detail=text)
        if not pool.backend.owns_replicas and not pool.removed:
            return self._decide_external(pool, status, now_s)
        if self._closing:
            return fixed(desired=0, reason=ScaleReason.CLOSING, detail="Tidegate is closing")
        if pool.disabled and not pool.removed:
            text = "an operator has taken it out of service; what runs is finished"
            return fixed(desired=0, reason=ScaleReason.DISABLED, detail=text)
        if pool.removed:
            demand = pool.window.read(now_s)
            decision, pool.decide_state = decide_removed(
                pool.policy, status, demand, pool.decide_state, now_s
            )
        else:
            decision = self._decide_by_demand(pool, status, now_s)
        pool.wake_signal = False
        pool.sleep_requested = decision.reason is ScaleReason.SLEEP_REQUESTED
        living = [one for one in pool.replicas.values() if one.state not in ENDED_STATES]
        outdated = [one for one in living if pool.is_outdated(one)]
        no_capacity = any(one.no_capacity for one in living if one not in outdated)
        return note_replacement(decision, len(outdated), no_capacity=no_capacity)

    def _decide_by_demand(self, pool: PoolRecord, status: PoolStatus, now_s: float) -> Decision:
        demand = pool.window.read(now_s)
        lead_s = status.lead_s
        policy = pool.policy
        if pool.timed_bounds:
            policy = bound_by_time(policy, pool.timed_bounds, self._wall_s(), lead_s or 0.0)
        outlook = self._outlook(pool.pool.name, lead_s)
        if pool.goes_to_zero:
            policy = pool.plan_to_zero(policy, self._settings)
            why = pool.tiers.planner.prewarm(
                outlook, pool.tier() or Tier.RUNNING, now_s, planned=bool(policy.idle_reason)
            )
            status = replace(status, prewarm=why) if why else status
        decision, pool.decide_state = decide(
            policy,
            status,
            demand,
            pool.decide_state,
            now_s,
            capacity=pool.capacity.capacity(pool.pool, policy.target_utilization_fraction),
            outlook=outlook,
            seen=self._target_figures(pool),
        )
        decision = hold_back(decision, status, policy, pool.mode)
        if pool.goes_to_zero:
            pool.note_idle(demand, self._settings, now_s)
        return decision

    def _decide_external(self, pool: PoolRecord, status: PoolStatus, now_s: float) -> Decision:
        """As many as there are; what Tidegate would have is recommended to what scales them."""
        for url in pool.see_urls():
            pool.add_replica(now_s, url=url)
        number = len(pool.urls)
        text = f"{number} externally managed server{'' if number == 1 else 's'}"
        decision = Decision(
            pool=pool.pool.name,
            at_s=now_s,
            desired=number,
            supply=status.supply,
            reason=ScaleReason.STATIC,
            detail=text,
        )
        pool.wake_signal = False
        if pool.pool.backend != "kubernetes":
            return decision
        wanted = self._decide_by_demand(pool, status, now_s)
        demand = self._observation.pools.get(pool.pool.name)
        pool.backend.recommend(pool.pool, wanted, demand)
        would_have = wanted.desired if wanted.recommended is None else wanted.recommended
        return replace(wanted, desired=number, recommended=would_have, reason=decision.reason)

    def _target_figures(self, pool: PoolRecord) -> TargetFigures:
        """Those that the pool has targets for are read only where it has any."""
        if pool.policy.targets == TargetFigures():
            return pool.policy.targets
        return pool.target_figures(self._observation, self._recent(pool.pool.name))

    def _note_decision(self, pool: PoolRecord, decision: Decision) -> None:
        earlier = pool.history.latest
        if earlier is None or earlier.desired != decision.desired:
            before = "-" if earlier is None else earlier.desired
            LOG.info(
                "%s: desired %s -> %d (%s: %s)",
                decision.pool,
                before,
                decision.desired,
                decision.reason,
                decision.detail,
            )
        pool.history.add(decision)
        with self._errors.survive("note"):  # it is carried out all the same
            self._note(decision)

    def _carry_out(
        self,
        pool: PoolRecord,
        decision: Decision,
        loads: Mapping[str, ReplicaLoad],
        now_s: float,
    ) -> None:
        closing = self._closing or pool.disabled
        to_zero = pool.override == 0 and decision.reason is not ScaleReason.SLEEP_REQUESTED
        plan = make_plan(
            decision.desired,
            pool.make_statuses(loads),
            max_replicas=pool.pool.max_replicas if pool.backend.owns_replicas else None,
            may_stop_loading=closing or pool.removed or decision.reason is ScaleReason.OVERRIDE,
            may_stop_sleeping=closing or pool.removed or to_zero,
            may_sleep=decision.reason is ScaleReason.IDLE_TO_ZERO and pool.tiers.may_sleep(),
        )
        for replica_id, event in plan.events:
            record = pool.replicas[replica_id]
            record.recallable = event in {Event.STOP, Event.SLEEP} and record.state is State.READY
            if event is Event.SLEEP:
                record.sleep_level, record.sleep_error = pool.pool.tiers.sleep_level, None
            self._actuator.apply(pool, record, event)
        may_start = pool.backend.owns_replicas
        if pool.removed and pool.backend.outlives_us:
            may_start = False  # what runs on without us is not ours to start any more
        for _ in range(plan.starts if may_start else 0):
            pool.add_replica(now_s)
        if closing:  # nothing that runs is kept for later
            for record in list(pool.replicas.values()):
                if record.state in GOING_TO_SLEEP:
                    self._actuator.apply(pool, record, Event.STOP)

    def _advance_tiers(self, pool: PoolRecord, decision: Decision, now_s: float) -> None:
        tier = pool.tiers.choose(
            idle=pool.is_idle(decision, now_s),
            can_sleep=pool.count(State.DRAINING_TO_SLEEP, *ASLEEP) > 0,
            hold_asleep=pool.sleep_requested and pool.count(*ASLEEP) > 0,
            now_s=now_s,
        )
        if tier is None or tier is Tier.SLEEPING:
            return
        for record in list(pool.replicas.values()):
            if record.state is State.SLEEPING:
                self._actuator.apply(pool, record, Event.STOP)
        if all(record.state in ENDED_STATES for record in pool.replicas.values()):
            pool.tiers.move(tier, now_s)

    def _register_static(self) -> None:
        now_s = self._clock()
        for pool in self._pools.values():
            if not pool.backend.owns_replicas and not pool.removed:
                for url in pool.see_urls():
                    pool.add_replica(now_s, url=url)

    # -- commands: of operators, and of the data path --------------------------------------

    def signal_wake(self, pool: str) -> None:
        """A request for this pool is held: decide now. Remembered until the next decision, so
        the wake is not lost if the request goes again. An unknown pool is ignored."""
        record = self._pools.get(pool)
        if record is not None:
            record.wake_signal = True
            self._awake.set()

    def probe_now(self, replica_id: str) -> None:
        """The data path met an error of a replica: probe it now, not at its next health check.
        An unknown id is ignored, and so is that of a replica under such a probe already."""
        for pool in self._pools.values():
            record = pool.replicas.get(replica_id)
            if record is not None:
                self._actuator.probe_now(pool, record)

    def _find(self, name: str) -> PoolRecord:
        """The pool of this name or alias."""
        for record in self._pools.values():
            if name in (record.pool.name, *record.pool.aliases) and not record.removed:
                return record
        names = [one.pool.name for one in self._pools.values() if not one.removed]
        raise NotKnown("pool", name, names)

    async def disable(self, pool: str) -> PoolReport:
        """Take a pool out of service, over restarts too, until ``enable``: its requests are
        refused, those under way are finished, then its replicas end. It is kept on disk when this
        returns; where it cannot be, that is an error recorded. Raises ``NotKnown`` for an unknown
        pool."""
        return await self._set_disabled(pool, disabled=True)

    async def enable(self, pool: str) -> PoolReport:
        """Take a pool back into service. Otherwise as ``disable``."""
        return await self._set_disabled(pool, disabled=False)

    async def _set_disabled(self, pool: str, *, disabled: bool) -> PoolReport:
        record = self._find(pool)
        self._disabled_pools.set(record.pool.name, disabled=disabled)
        if record.disabled and not disabled:
            record.forget_demand()  # what it had before is no reason to start it
        record.disabled = disabled
        record.wake_signal = record.sleep_requested = False
        self._note_change()
        self._publish_changes()
        await self._actuator.spawn(self._disabled_pools.save(), "disabled pools")
        return report_pool(record)

    def set_replicas(self, pool: str, replicas: int | None) -> PoolReport:
        """Override the number of replicas; ``None`` gives it back to demand.

        0 is "at zero until a request comes". Raises ``NotKnown`` for an unknown pool,
        ``ValueError`` for a number outside 0 to ``max_replicas``.
        """
        record = self._find(pool)
        if replicas is not None:
            if not record.backend.owns_replicas:
                raise ValueError(f"{pool} is static: its servers are externally managed")
            if not 0 <= replicas <= record.pool.max_replicas:
                name, most = record.pool.name, record.pool.max_replicas
                key = name if _BARE_KEY.fullmatch(name) else json.dumps(name, ensure_ascii=False)
                more = shlex.quote(f"pools.{key}.max_replicas={replicas}")
                advice = f"; raise it in tidegate.toml, or start with `--set {more}`"
                raise ValueError(
                    f"replicas must be 0 to {most} (max_replicas of {name}), not {replicas}"
                    f"{advice if replicas > most else ''}"
                )
        if replicas is None and record.override == 0 and record.supply() == 0:
            # It was put at zero, and the demand of before is no reason to start it again.
            record.forget_demand()
        record.override = replicas
        record.sleep_requested = False
        self._awake.set()
        return report_pool(record)

    async def sleep(self, pool: str, level: int = 1) -> PoolReport:
        """Put a pool's ready replicas to sleep once they are idle; the next request wakes it.

        Returns when they sleep, or did already, or when one has gone back to work because a
        request came. Raises ``NotKnown`` for an unknown pool, ``ValueError`` for a level that its
        engine does not have or a pool with none ready, ``Unsupported`` where the backend or the
        engine cannot, ``BackendError`` where it failed.
        """
        record = self._find(pool)
        if not record.backend.owns_replicas:
            raise Unsupported(f"{pool} is static: its servers are externally managed")
        levels = sorted(engine_of(record.pool.engine).capabilities.sleep_levels)
        if level not in levels:
            allowed = " or ".join(map(str, levels)) or "nothing: this engine does not sleep"
            raise ValueError(f"level must be {allowed}, not {level}")
        ready = [one for one in record.replicas.values() if one.state is State.READY]
        if not ready and any(one.state is State.SLEEPING for one in record.replicas.values()):
            record.sleep_requested = True
            return report_pool(record)
        if not ready:
            raise ValueError(f"{pool} has no ready replica that could be put to sleep")
        record.sleep_requested = True
        for one in ready:
            one.sleep_level, one.sleep_error = level, None
            one.recallable = True
            self._actuator.apply(record, one, Event.SLEEP)
        while not self._closing and any(one.state in GOING_TO_SLEEP for one in ready):
            await self._sleep(SLEEP_POLL_S)
        for one in ready:
            if one.sleep_error is not None and one.state is not State.SLEEPING:
                record.sleep_requested = False
                raise one.sleep_error
        return report_pool(record)

    async def wake(self, pool: str) -> PoolReport:
        """Wake what sleeps, or start one at zero; take drained static servers back into use.

        Returns at once. Raises ``NotKnown`` for an unknown pool, ``ValueError`` while an operator
        keeps it at zero.
        """
        record = self._find(pool)
        if record.disabled:
            raise ValueError(f"{pool} is disabled; take it back with `tidegate pool enable {pool}`")
        if record.override == 0:
            raise ValueError(
                f"{pool} is scaled to 0; give it back with `tidegate scale {pool} auto`"
            )
        record.sleep_requested = False
        record.wake_signal = True
        static = not record.backend.owns_replicas
        for one in list(record.replicas.values()):
            if one.state is State.SLEEPING:
                self._actuator.apply(record, one, Event.WAKE)
            elif one.state is State.DRAINING_TO_SLEEP or (one.state is State.DRAINING and static):
                self._actuator.apply(record, one, Event.KEEP)
        self._awake.set()
        return report_pool(record)

    async def drain(self, replica_id: str) -> None:
        """Give a replica no more requests, and stop it when it has none left (a static one is
        only kept out of use, until ``wake``). Returns at once. Raises ``NotKnown`` for an unknown
        replica, ``ValueError`` for one that has failed."""
        for pool in self._pools.values():
            record = pool.replicas.get(replica_id)
            if record is None:
                continue
            if record.state is State.FAILED:
                raise ValueError(f"{replica_id} has failed; there is nothing to drain")
            record.recallable = False
            self._actuator.apply(pool, record, Event.STOP)
            self._publish_changes()
            return
        known = [one for pool in self._pools.values() for one in pool.replicas]
        raise NotKnown("replica", replica_id, known)

    # -- reports ---------------------------------------------------------------------------

    def _note_change(self) -> None:
        """Have the tick of this moment, or the next, publish."""
        self._changed = True
        self._awake.set()

    def _note_progress(self) -> None:
        """Have the next tick publish; a download makes progress all the time."""
        self._changed = True

    def _publish_changes(self) -> None:
        if not self._changed:
            return
        pools = tuple(publish_pool(pool) for pool in self._pools.values())
        if pools == self._published:
            self._changed = False
            return
        with self._errors.survive("publish"):  # else tried again at the next tick
            self._publish(pools)
            self._published, self._changed = pools, False

    def status(self) -> FleetReport:
        """All pools as they are now. Times in it are on the loop's clock; ``at_s`` is now."""
        return FleetReport(
            at_s=self._clock(),
            pools=tuple(map(report_pool, self._pools.values())),
            decisions={
                (name, reason): count
                for name, record in self._pools.items()
                for reason, count in record.history.counts.items()
            },
            errors=dict(self._errors.counts),
            last_error=self._errors.last,
        )

    def report(self, pool: str) -> PoolReport | None:
        """One pool as it is now, by its name; ``None`` for an unknown one."""
        record = self._pools.get(pool)
        return None if record is None else report_pool(record)

    def pools(self) -> dict[str, PoolSettings]:
        """The settings of the pools there are by name, of those that were removed too."""
        return {name: record.pool for name, record in self._pools.items()}

    def digests(self) -> dict[str, str]:
        """What the replicas of each pool are started with now, as digests by the pool's name."""
        return {name: record.digest for name, record in self._pools.items()}

    def decisions(self, pool: str) -> list[PastDecision]:
        """The newest decisions of a pool, newest last. Raises ``NotKnown`` for an unknown one."""
        return list((self._pools.get(pool) or self._find(pool)).history.past)
