"""Keeps what was learned of pools in the history, for the next control process.

What replicas carry: a row of ``loads`` is one minute of a pool. ``setup`` stands for all that it
depends on beside the accelerator: how the replicas were started, what they are given at once, and
the SLO. Rows of another setup are not read. The gaps between requests: all that are remembered of a
pool are its one row of ``gaps``.
"""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

from autoscaler.control.capacity_learner import CapacityLearner
from autoscaler.policy.capacity import SAMPLES, LoadSample, Mix
from autoscaler.signals.history import HistoryStore, HistoryWriter, minute_of, pool_id
from autoscaler.tiers.idle_planner import IdlePlanner


class PoolLoad(NamedTuple):
    """A minute of a pool's replicas."""

    pool: str
    setup: str
    sample: LoadSample


class LearnedHistory:
    """``wall_s`` is Unix time. For one event loop's thread."""

    def __init__(
        self,
        *,
        store: HistoryStore,
        writer: HistoryWriter,
        wall_s: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._writer = writer
        self._wall_s = wall_s

    async def read_loads(self, setups: Mapping[str, str]) -> dict[str, tuple[LoadSample, ...]]:
        """What is there of each pool with the setup that it has now, oldest first, by the pool's
        name. Raises ``HistoryError``."""
        work = partial(read_loads, setups=setups)
        return await asyncio.to_thread(self._store.transact, work)

    def add_loads(self, loads: Sequence[PoolLoad]) -> None:
        """Keep these of the minute that has just passed. While nothing can be written they are
        dropped: those of other minutes say the same."""
        if self._writer.error is None:
            minute = minute_of(self._wall_s())
            self._writer.put(partial(put_loads, loads=tuple(loads), minute=minute))

    async def read_gaps(self, pools: Iterable[str]) -> dict[str, bytes]:
        """The packed gaps of each of these pools that has some. Raises ``HistoryError``."""
        work = partial(read_gaps, pools=tuple(pools))
        return await asyncio.to_thread(self._store.transact, work)

    def put_gaps(self, records: Mapping[str, bytes]) -> None:
        """Keep these in place of those that there are; as ``add_loads``."""
        if self._writer.error is None:
            minute = minute_of(self._wall_s())
            self._writer.put(partial(put_gaps, records=dict(records), minute=minute))


async def recall_capacities(
    history: LearnedHistory, learners: Mapping[str, CapacityLearner]
) -> None:
    """Tell these, by their pools' names, what earlier control processes saw. Raises
    ``HistoryError``."""
    found = await history.read_loads({pool: one.setup for pool, one in learners.items()})
    for pool, samples in found.items():
        learners[pool].recall(samples)


async def recall_gaps(
    history: LearnedHistory, planners: Mapping[str, IdlePlanner], ahead_s: float
) -> None:
    """Tell these, by their pools' names, what gaps earlier control processes saw. Unix time is
    ``ahead_s`` ahead of their clock. Raises ``HistoryError``."""
    found = await history.read_gaps(planners)
    for pool, planner in planners.items():
        planner.recall(found.get(pool), ahead_s)


def put_loads(connection: sqlite3.Connection, loads: Sequence[PoolLoad], minute: int) -> None:
    """Keep these, and of each of their pools the newest ``SAMPLES``."""
    ids: dict[str, int] = {}
    for pool, setup, one in loads:
        key = pool_id(connection, pool, ids)
        connection.execute(
            "INSERT OR REPLACE INTO loads (pool, minute, setup, accelerator, tokens_per_s, "
            "prompt_tokens, output_tokens, within_slo, waited) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key, minute, setup, one.accelerator, one.tokens_per_s, *one.mix)
            + (int(one.within_slo), int(one.waited)),
        )
        connection.execute(
            "DELETE FROM loads WHERE pool = ? AND minute <= (SELECT minute FROM loads "
            "WHERE pool = ? ORDER BY minute DESC LIMIT 1 OFFSET ?)",
            (key, key, SAMPLES),
        )


def read_loads(
    connection: sqlite3.Connection, setups: Mapping[str, str]
) -> dict[str, tuple[LoadSample, ...]]:
    """See ``LearnedHistory.read_loads``."""
    found = {}
    for pool, setup in setups.items():
        rows = connection.execute(
            "SELECT tokens_per_s, prompt_tokens, output_tokens, within_slo, waited, accelerator "
            "FROM loads WHERE pool = (SELECT id FROM pools WHERE name = ?) AND setup = ? "
            "ORDER BY minute",
            (pool, setup),
        ).fetchall()
        found[pool] = tuple(
            LoadSample(
                tokens_per_s=rate,
                mix=Mix(prompt, output),
                within_slo=bool(within),
                waited=bool(waited),
                accelerator=accelerator,
            )
            for rate, prompt, output, within, waited, accelerator in rows
        )
    return found


def put_gaps(connection: sqlite3.Connection, records: Mapping[str, bytes], minute: int) -> None:
    """Keep these, one of each pool."""
    ids: dict[str, int] = {}
    for pool, packed in records.items():
        key = pool_id(connection, pool, ids)
        connection.execute("DELETE FROM gaps WHERE pool = ?", (key,))
        connection.execute(
            "INSERT INTO gaps (pool, minute, record) VALUES (?, ?, ?)", (key, minute, packed)
        )


def read_gaps(connection: sqlite3.Connection, pools: Sequence[str]) -> dict[str, bytes]:
    """See ``LearnedHistory.read_gaps``."""
    found = {}
    for pool in pools:
        row = connection.execute(
            "SELECT record FROM gaps WHERE pool = (SELECT id FROM pools WHERE name = ?)", (pool,)
        ).fetchone()
        if row is not None and isinstance(row[0], bytes):
            found[pool] = row[0]
    return found
