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

from autoscaler.actuator import Actuator, Troubles
from autoscaler.backends.base import Backend, Leftover, Unsupported
from autoscaler.decide import decide
from autoscaler.fleet import PoolRecord, make_slugs, make_views, report_pool
from autoscaler.history import DecisionHistory
from autoscaler.lifecycle import Event, State
from autoscaler.plan import make_plan
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.timers import Timers
from autoscaler.types import (
    Decision,
    FleetReport,
    Observation,
    PastDecision,
    PoolReport,
    Reason,
    ReplicaView,
)

LOG = logging.getLogger("tidegate.autoscaler")

POKE_GAP_S = 0.01
"""Shortest time between two ticks: pokes that come faster are answered together."""
CLOSE_POLL_S = 0.1
SLEEP_LEVELS = (1, 2)
GOING_TO_SLEEP = frozenset({State.SETTLING, State.FALLING_ASLEEP})

Publish = Callable[[tuple[ReplicaView, ...], Mapping[str, float | None]], None]


class ControlLoop:
    """Keeps every pool at the number of replicas its demand asks for."""

    def __init__(
        self,
        *,
        pools: Sequence[PoolSettings],
        settings: AutoscalerSettings,
        backends: Mapping[str, Backend],
        observe: Callable[[], Observation],
        publish: Publish,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """``backends`` by the name pools call them. ``observe`` looks at the data path now, on
        the same clock; ``publish`` is told the replicas and wake times whenever they change."""
        self._settings = settings
        self._observe = observe
        self._publish = publish
        self._clock = clock
        self._sleep = sleep
        self._backends = {pool.backend: backends[pool.backend] for pool in pools}
        slugs = make_slugs(pool.name for pool in pools)
        self._pools = {
            pool.name: PoolRecord(pool, settings, backends[pool.backend], slugs[pool.name])
            for pool in pools
        }
        self._troubles = Troubles()
        self._actuator = Actuator(
            settings=settings,
            clock=clock,
            sleep=sleep,
            on_change=self._note_change,
            troubles=self._troubles,
        )
        self._timers = Timers(settings, self._actuator)
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
        for name, backend in self._backends.items():
            try:
                async with asyncio.timeout(settings.terminate_s + settings.call_timeout_s):
                    await backend.close()
            except Exception as error:  # noqa: BLE001 -- the other backends must be closed too
                self._troubles.add(f"close of {name}", error)
        self._publish_changes()

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
        pool.forget(self._settings.failed_kept)

    def _decide(self, pool: PoolRecord, now_s: float) -> Decision:
        name, supply = pool.pool.name, pool.make_status().supply
        if not pool.backend.owns_replicas:
            number = len(pool.replicas)
            text = f"{number} servers that somebody else runs"
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
        )
        for replica_id, event in plan.events:
            record = pool.replicas[replica_id]
            record.recallable = event is Event.STOP and record.state is State.READY
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

    def _publish_changes(self) -> None:
        if not self._changed:
            return
        views = make_views(self._pools.values())
        etas = {name: pool.estimate_wake_s() for name, pool in self._pools.items()}
        if (views, etas) != self._published:
            try:
                self._publish(views, etas)
            except Exception as error:  # noqa: BLE001 -- told again at the next tick
                self._troubles.add("publish", error)
                return
            self._published = (views, etas)
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

    # -- what others ask -------------------------------------------------------------------

    def poke(self, pool: str) -> None:
        """A request for this pool is held: decide now. Remembered until the next decision, so
        the wake is not lost if the request goes again. A name that is no pool's is ignored."""
        record = self._pools.get(pool)
        if record is not None:
            record.poked = True
            self._awake.set()

    def look(self, replica_id: str) -> None:
        """The data path met trouble with a replica: probe it now, not at its next health check.
        A name that is no replica's is ignored, and so is one that is being looked at."""
        for pool in self._pools.values():
            record = pool.replicas.get(replica_id)
            if record is not None:
                self._actuator.look(pool, record)

    def set_replicas(self, pool: str, replicas: int | None) -> PoolReport:
        """Ask for a fixed number of replicas; ``None`` gives it back to demand.

        0 is "at zero while nobody asks". Raises ``KeyError`` for an unknown pool, ``ValueError``
        for a number outside 0 to ``max_replicas``.
        """
        record = self._pools[pool]
        if replicas is not None:
            if not record.backend.owns_replicas:
                raise ValueError(f"{pool} is static: its servers are started by somebody else")
            if not 0 <= replicas <= record.pool.max_replicas:
                raise ValueError(
                    f"replicas must be 0 to {record.pool.max_replicas} (max_replicas of {pool}), "
                    f"not {replicas}"
                )
        if replicas is None and record.override == 0 and record.make_status().supply == 0:
            # It was put at zero, and the demand of before is no reason to start it again.
            record.forget_demand()
        record.override = replicas
        record.resting = False
        self._awake.set()
        return report_pool(record, self._observation.replicas)

    async def sleep(self, pool: str, level: int = 1) -> PoolReport:
        """Put a pool's ready replicas to sleep once they are idle; it wakes when somebody asks.

        Returns when they sleep, or when one has gone back to work because a request came. Raises
        ``KeyError`` for an unknown pool, ``ValueError`` for a level other than 1 or 2 or a pool
        with none ready, ``Unsupported`` where the backend or the engine cannot, ``BackendError``
        where it failed.
        """
        record = self._pools[pool]
        if level not in SLEEP_LEVELS:
            raise ValueError(f"level must be 1 or 2, not {level}")
        if not record.backend.owns_replicas:
            raise Unsupported(f"{pool} is static: its servers are somebody else's")
        tired = [one for one in record.replicas.values() if one.state is State.READY]
        if not tired:
            raise ValueError(f"{pool} has no ready replica that could be put to sleep")
        record.resting = True
        for one in tired:
            one.sleep_level, one.sleep_error = level, None
            one.recallable = True
            self._actuator.apply(record, one, Event.REST)
        while not self._closing and any(one.state in GOING_TO_SLEEP for one in tired):
            await self._sleep(CLOSE_POLL_S)
        for one in tired:
            if one.sleep_error is not None and one.state is not State.SLEEPING:
                record.resting = False
                raise one.sleep_error
        return report_pool(record, self._observation.replicas)

    async def wake(self, pool: str) -> PoolReport:
        """Wake what sleeps, or start one at zero; take drained static servers back into use.

        Returns at once. Raises ``KeyError`` for an unknown pool, ``ValueError`` while an operator
        keeps it at zero.
        """
        record = self._pools[pool]
        if record.override == 0:
            raise ValueError(f"{pool} is scaled to 0; give it back with `scale {pool} auto`")
        record.resting = False
        record.poked = True
        static = not record.backend.owns_replicas
        for one in list(record.replicas.values()):
            if one.state is State.SLEEPING:
                self._actuator.apply(record, one, Event.WAKE)
            elif one.state is State.SETTLING or (one.state is State.DRAINING and static):
                self._actuator.apply(record, one, Event.KEEP)
        self._awake.set()
        return report_pool(record, self._observation.replicas)

    async def drain(self, replica_id: str) -> PoolReport:
        """Give a replica no more requests, and stop it when it has none left (a static one is
        only kept out of use, until ``wake``). Returns at once. Raises ``KeyError`` for an unknown
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
            return report_pool(pool, self._observation.replicas)
        raise KeyError(replica_id)
