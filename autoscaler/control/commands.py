"""What others ask of the pools: a request that waits, a replica in trouble, an operator's orders.

Orders change what the control loop decides from, or take replicas a step further; how many there
are stays the loop's to say. Everything here happens on the loop's event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from autoscaler.backends.base import Unsupported
from autoscaler.control.actuator import Actuator
from autoscaler.control.lifecycle import Event, State
from autoscaler.control.replicas import PoolRecord, report_pool
from autoscaler.types import Observation, PoolReport

SLEEP_POLL_S = 0.1
SLEEP_LEVELS = (1, 2)
GOING_TO_SLEEP = frozenset({State.SETTLING, State.FALLING_ASLEEP})


class Orders:
    """The part of the control loop that others call; it is one with the loop."""

    _pools: Mapping[str, PoolRecord]
    _actuator: Actuator
    _observation: Observation
    _awake: asyncio.Event
    _sleep: Callable[[float], Awaitable[None]]
    _closing: bool

    def _publish_changes(self) -> None:
        raise AssertionError("the control loop publishes")

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

        Returns when they sleep, or did already, or when one has gone back to work because a
        request came. Raises ``KeyError`` for an unknown pool, ``ValueError`` for a level other
        than 1 or 2 or a pool with none ready, ``Unsupported`` where the backend or the engine
        cannot, ``BackendError`` where it failed.
        """
        record = self._pools[pool]
        if level not in SLEEP_LEVELS:
            raise ValueError(f"level must be 1 or 2, not {level}")
        if not record.backend.owns_replicas:
            raise Unsupported(f"{pool} is static: its servers are somebody else's")
        tired = [one for one in record.replicas.values() if one.state is State.READY]
        if not tired and any(one.state is State.SLEEPING for one in record.replicas.values()):
            record.resting = True
            return report_pool(record, self._observation.replicas)
        if not tired:
            raise ValueError(f"{pool} has no ready replica that could be put to sleep")
        record.resting = True
        for one in tired:
            one.sleep_level, one.sleep_error = level, None
            one.recallable = True
            self._actuator.apply(record, one, Event.REST)
        while not self._closing and any(one.state in GOING_TO_SLEEP for one in tired):
            await self._sleep(SLEEP_POLL_S)
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
