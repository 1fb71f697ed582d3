"""The control loop: observe, decide, act; once per tick, and at once when somebody waits.

It is the only writer of the number of replicas. A tick is one synchronous step, so nobody sees it
half done; the calls it sets off run beside it (``actuator``) and come back as events. Everything
here happens on one event loop; the methods are called from it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from autoscaler.backends.base import Backend, Leftover
from autoscaler.control.actuator import Actuator, Troubles
from autoscaler.control.commands import Orders
from autoscaler.control.decision_log import DecisionHistory
from autoscaler.control.lifecycle import Event, State
from autoscaler.control.replicas import PoolRecord, make_slugs, make_views, report_pool, view_pool
from autoscaler.control.timers import Timers
from autoscaler.policy.decide import decide
from autoscaler.policy.plan import make_plan
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.tiers.manager import Stepper
from autoscaler.tiers.preparer import AsItLies, Preparer
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import (
    Decision,
    FleetReport,
    Observation,
    PastDecision,
    PoolView,
    Reason,
    ReplicaView,
)

LOG = logging.getLogger("tidegate.autoscaler")

POKE_GAP_S = 0.01
"""Shortest time between two ticks: pokes that come faster are answered together."""
CLOSE_POLL_S = 0.1

Publish = Callable[[tuple[ReplicaView, ...], Mapping[str, PoolView]], None]


class ControlLoop(Orders):
    """Keeps every pool at the number of replicas its demand asks for."""

    def __init__(
        self,
        *,
        pools: Sequence[PoolSettings],
        settings: AutoscalerSettings,
        backends: Mapping[str, Backend],
        observe: Callable[[], Observation],
        publish: Publish,
        preparer: Preparer | None = None,
        wake_times: WakeTimes | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``backends`` by the name pools call them. ``observe`` looks at the data path now, on
        the same clock; ``publish`` is told the replicas, and of the pools what clients may know,
        whenever they change. Without a ``preparer`` models are used as they lie; without
        ``wake_times`` what was measured is forgotten at the end."""
        self._settings = settings
        self._observe = observe
        self._publish = publish
        self._clock = clock
        self._sleep = sleep
        self._backends = {pool.backend: backends[pool.backend] for pool in pools}
        as_it_lies = AsItLies()
        self._preparer = preparer or as_it_lies
        self._wake_times = wake_times or WakeTimes(samples=settings.wake_samples)
        slugs = make_slugs(pool.name for pool in pools)
        self._pools = {
            pool.name: PoolRecord(
                pool,
                settings,
                backends[pool.backend],
                slugs[pool.name],
                # What somebody else runs is not ours to bring near, or to keep warm.
                preparer=self._preparer if backends[pool.backend].owns_replicas else as_it_lies,
                wake_times=self._wake_times,
            )
            for pool in pools
        }
        self._troubles = Troubles()
        self._actuator = Actuator(
            settings=settings,
            clock=clock,
            sleep=sleep,
            on_change=self._note_change,
            on_progress=self._note_progress,
            troubles=self._troubles,
        )
        self._timers = Timers(settings, self._actuator)
        self._stepper = Stepper(settings, self._actuator, self._troubles, self._note_change)
        self._history = DecisionHistory(settings.history_size)
        self._observation = Observation()
        self._awake = asyncio.Event()
        self._changed = True
        self._published: tuple[object, object] | None = None
        self._opened = False
        self._runner: asyncio.Task[Any] | None = None
        self._closing = False

    # -- running ---------------------------------------------------------------------------

    async def open(self) -> list[Leftover]:
        """End what an earlier Tidegate left. Raises ``StateInUse`` when it is alive; without
        this having succeeded nothing is started."""
        leftovers: list[Leftover] = []
        if not self._opened:
            for backend in self._backends.values():
                leftovers += await backend.adopt()
            self._opened = True
            self._register_static()
        return leftovers

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
        """Sleep until the next tick, or until somebody waits."""
        gap_s = min(POKE_GAP_S, seconds)
        await self._sleep(gap_s)
        timer = asyncio.ensure_future(self._sleep(seconds - gap_s))
        poke = asyncio.ensure_future(self._awake.wait())
        try:
            await asyncio.wait({timer, poke}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            timer.cancel()
            poke.cancel()

    async def close(self, *, drain_s: float | None = None) -> None:
        """Drain and stop everything owned, then close the backends. Ends within ``drain_s``
        (unset: the setting), ``terminate_s`` and ``call_timeout_s`` together."""
        if self._closing:
            return
        settings = self._settings
        self._closing = True
        if drain_s is not None:
            self._timers.drain_s = drain_s
        self._awake.set()
        if self._runner is not None and self._runner is not asyncio.current_task():
            await asyncio.wait({self._runner})
        limit_s = self._timers.drain_s + settings.terminate_s + settings.call_timeout_s
        deadline_s = self._clock() + limit_s
        while self._owned_alive() and self._clock() < deadline_s:
            self._tick()
            await self._sleep(min(CLOSE_POLL_S, settings.tick_s))
        await self._actuator.close()
        await self._close_preparer()
        for name, backend in self._backends.items():
            try:
                async with asyncio.timeout(settings.terminate_s + settings.call_timeout_s):
                    await backend.close()
            except Exception as error:  # noqa: BLE001 -- the other backends must be closed too
                self._troubles.add(f"close of {name}", error)
        self._publish_changes()

    async def _close_preparer(self) -> None:
        try:
            async with asyncio.timeout(self._settings.call_timeout_s):
                await self._preparer.close()
        except Exception as error:  # noqa: BLE001 -- the backends must be closed all the same
            self._troubles.add("close of models", error)

    def _owned_alive(self) -> bool:
        for pool in self._pools.values():
            if not pool.backend.owns_replicas:
                continue
            pool.forget(self._settings.failed_kept)
            for record in pool.replicas.values():
                done = record.operation is None or record.operation.done()
                if not (done and (record.ended or record.state is State.FAILED)):
                    return True
        return False

    # -- one tick --------------------------------------------------------------------------

    def _tick(self) -> None:
        now_s = self._clock()
        try:
            self._observation = self._observe()
        except Exception as error:  # noqa: BLE001 -- an unknown demand is handled, an end is not
            self._troubles.add("observe", error)
            self._observation = Observation()
        for pool in self._pools.values():
            try:
                self._tick_pool(pool, now_s)
            except Exception as error:  # noqa: BLE001 -- one pool's bug must not stop the rest
                self._troubles.add(f"pool {pool.pool.name}", error)
        self._publish_changes()

    def _tick_pool(self, pool: PoolRecord, now_s: float) -> None:
        demand = self._observation.pools.get(pool.pool.name)
        if demand is not None:
            pool.window.add(demand)
        self._timers.advance(pool, self._observation.replicas, now_s)
        decision = self._decide(pool, now_s)
        self._note_decision(pool, decision)
        if pool.backend.owns_replicas:
            self._carry_out(pool, decision, now_s)
        self._timers.start_due(pool, now_s)
        if pool.backend.owns_replicas and not self._closing:
            self._stepper.advance(pool, decision, now_s)
        pool.forget(self._settings.failed_kept)

    def _decide(self, pool: PoolRecord, now_s: float) -> Decision:
        name, supply = pool.pool.name, pool.make_status().supply
        if not pool.backend.owns_replicas:
            number = len(pool.replicas)
            text = f"{number} server{'' if number == 1 else 's'} that somebody else runs"
            return Decision(
                pool=name,
                at_s=now_s,
                desired=number,
                supply=supply,
                reason=Reason.STATIC,
                detail=text,
            )
        if self._closing:
            text = "Tidegate is closing"
            return Decision(
                pool=name, at_s=now_s, desired=0, supply=supply, reason=Reason.CLOSING, detail=text
            )
        demand = pool.window.read(now_s)
        status = pool.make_status()
        decision, pool.decide_state = decide(pool.policy, status, demand, pool.decide_state, now_s)
        pool.poked = False
        pool.resting = decision.reason is Reason.RESTING
        return decision

    def _note_decision(self, pool: PoolRecord, decision: Decision) -> None:
        earlier = pool.decision
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
        pool.decision = decision
        self._history.add(decision)

    def _carry_out(self, pool: PoolRecord, decision: Decision, now_s: float) -> None:
        closing = self._closing
        to_zero = pool.override == 0 and decision.reason is not Reason.RESTING
        plan = make_plan(
            decision.desired,
            pool.make_candidates(self._observation.replicas),
            may_stop_loading=closing or decision.reason is Reason.OVERRIDE,
            may_stop_sleeping=closing or to_zero,
            may_rest=decision.reason is Reason.IDLE_TO_ZERO and self._stepper.may_rest(pool),
        )
        for replica_id, event in plan.events:
            record = pool.replicas[replica_id]
            record.recallable = event in {Event.STOP, Event.REST} and record.state is State.READY
            if event is Event.REST:
                record.sleep_level, record.sleep_error = pool.pool.warmth.sleep_level, None
            self._actuator.apply(pool, record, event)
        for _ in range(plan.starts):
            pool.add_replica(now_s)
        if closing:
            for record in list(pool.replicas.values()):
                if record.state in {State.SETTLING, State.FALLING_ASLEEP}:
                    self._actuator.apply(pool, record, Event.STOP)

    def _register_static(self) -> None:
        now_s = self._clock()
        for pool in self._pools.values():
            if not pool.backend.owns_replicas:
                for url in pool.pool.urls:
                    pool.add_replica(now_s, url=url)

    # -- what others see -------------------------------------------------------------------

    def _note_change(self) -> None:
        """Have the tick of this moment, or the next, publish."""
        self._changed = True
        self._awake.set()

    def _note_progress(self) -> None:
        """Have the next tick publish; a download is a little further all the time."""
        self._changed = True

    def _publish_changes(self) -> None:
        if not self._changed:
            return
        views = make_views(self._pools.values())
        pools = {name: view_pool(pool) for name, pool in self._pools.items()}
        if (views, pools) != self._published:
            try:
                self._publish(views, pools)
            except Exception as error:  # noqa: BLE001 -- told again at the next tick
                self._troubles.add("publish", error)
                return
            self._published = (views, pools)
        self._changed = False

    def status(self) -> FleetReport:
        """All pools as they are now. Times in it are on the loop's clock; ``at_s`` is now."""
        return FleetReport(
            at_s=self._clock(),
            pools=tuple(
                report_pool(pool, self._observation.replicas) for pool in self._pools.values()
            ),
            decisions=self._history.counts(),
            troubles=dict(self._troubles.counts),
            last_trouble=self._troubles.last,
        )

    def decisions(self, pool: str) -> list[PastDecision]:
        """The newest decisions of a pool, newest last. Raises ``KeyError`` for an unknown one."""
        return self._history.of(self._pools[pool].pool.name)
