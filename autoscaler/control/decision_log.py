"""Keeps past decisions in the history: one of each pool a minute, and one at each change.

The control loop decides every second, and nearly all of that says the same. What is kept is bounded
per pool and minute, and written once a minute for all pools together.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial

from autoscaler.policy.recommend import recommend
from autoscaler.signals.decisions import DecisionRecord, make_figures, put_decisions
from autoscaler.signals.history import HistoryWriter
from autoscaler.signals.series import MINUTE_S
from autoscaler.types import NO_TALLY, Decision, ForecastTally

MOST_CHANGES = 10
"""Changes of one pool that are kept in a minute; the others are counted with the next."""
LONGEST_S = 3_600.0
"""A row holds for as long at most: then another begins, so that old ones can be forgotten."""
MOST_WAITING = 20_000
"""Records of all pools that wait for the next write, or until one is possible; the newest."""


class PoolLog:
    """What was last kept of one pool. Times are on the loop's clock, but for ``newest``."""

    __slots__ = ("changes", "count", "due_s", "key", "minute_s", "newest", "tally")

    def __init__(self, due_s: float, tally: ForecastTally) -> None:
        self.key: object = None
        self.due_s = due_s
        self.minute_s = due_s - MINUTE_S
        self.changes = 0
        self.count = 0
        self.tally = tally
        self.newest: DecisionRecord | None = None


class DecisionLog:
    """``tally`` gives what came of a pool's forecasts so far; ``wall_s`` is Unix time. For one
    event loop's thread."""

    def __init__(
        self,
        *,
        writer: HistoryWriter,
        tally: Callable[[str], ForecastTally] = lambda pool: NO_TALLY,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._writer = writer
        self._tally = tally
        self._wall_s = wall_s
        self._pools: dict[str, PoolLog] = {}
        self._waiting: deque[DecisionRecord] = deque(maxlen=MOST_WAITING)
        self._written: tuple[DecisionRecord, ...] = ()
        self._write_s: float | None = None

    def add(self, decision: Decision) -> None:
        """Take in a decision; it is kept where it is another, or a minute has passed."""
        now_s, inputs = decision.at_s, decision.inputs
        ready = None if inputs is None else inputs.status.ready
        key = (decision.desired, decision.supply, decision.reason, ready)
        pool = self._pools.get(decision.pool)
        if pool is None:
            # Spread over the minute, so that not all pools' are made in one tick.
            due_s = now_s + MINUTE_S - len(self._pools) % MINUTE_S
            pool = self._pools[decision.pool] = PoolLog(due_s, self._tally(decision.pool))
        pool.count += 1
        if now_s - pool.minute_s >= MINUTE_S:
            pool.minute_s, pool.changes = now_s, 0
        if now_s >= pool.due_s:
            pool.due_s = now_s + MINUTE_S
        elif key == pool.key or pool.changes >= MOST_CHANGES:
            return
        else:
            pool.changes += 1
        pool.key = key
        self._keep(pool, decision)
        if self._write_s is None:
            self._write_s = now_s + MINUTE_S
        elif now_s >= self._write_s:
            self._write_s = now_s + MINUTE_S
            self.flush()
            for name in [name for name, one in self._pools.items() if now_s - one.due_s > MINUTE_S]:
                del self._pools[name]  # it is gone: one that is there is kept every minute

    def _keep(self, pool: PoolLog, decision: Decision) -> None:
        newest, tally = pool.newest, self._tally(decision.pool)
        wall_s = round(self._wall_s(), 3)
        if newest is not None and 0.0 <= newest.until_s - wall_s < 1.0:
            wall_s = round(newest.until_s + 0.001, 3)  # no two at one moment
        figures = make_figures(decision, find_alone(decision))
        lasts = (
            newest is not None
            and newest.figures == figures
            and 0.0 <= wall_s - newest.at_s < LONGEST_S
        )
        pool.newest = DecisionRecord(
            pool=decision.pool,
            at_s=newest.at_s if newest is not None and lasts else wall_s,
            until_s=wall_s,
            count=pool.count if lasts else 1,
            before=0 if lasts else pool.count - 1,
            figures=figures,
            tally=tally.since(pool.tally),
        )
        pool.count, pool.tally = 0, tally
        self._waiting.append(pool.newest)

    def flush(self) -> None:
        """Write what waits. While nothing can be written it waits on."""
        if self._waiting and self._writer.error is None:
            self._written = tuple(self._waiting)
            self._waiting.clear()
            self._writer.put(partial(put_decisions, records=self._written))

    def waiting(self, pool: str) -> list[DecisionRecord]:
        """The newest records of a pool, which may not be in the file yet."""
        return [one for one in (*self._written, *self._waiting) if one.pool == pool]


def find_alone(decision: Decision) -> int | None:
    """What reaction without a forecast recommends: the stable window at the target utilization, in
    a panic the panic window too."""
    inputs = decision.inputs
    if inputs is None:
        return None
    policy = inputs.policy
    found = recommend(policy, inputs.demand, decision.capacity, policy.target_utilization_fraction)
    if found.stable is None:
        return None
    if decision.panicking and found.panic is not None:
        return max(found.stable.replicas, found.panic.replicas)
    return found.stable.replicas
