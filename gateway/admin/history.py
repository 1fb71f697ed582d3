"""The past of pools, as the admin API and the command line read it and add to it."""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial

from autoscaler.settings import PoolSettings
from autoscaler.signals.decisions import (
    DecisionRecord,
    pools_with_decisions,
    read_around,
    read_between,
)
from autoscaler.signals.history import HistoryError, HistoryStore, minute_of
from autoscaler.signals.series import MINUTE_S, SERIES, PoolMinute
from gateway.admin import schema
from gateway.admin.decisions import entry_of, in_force, joined, merge, score
from gateway.admin.schema import AdminError
from gateway.terminal import utc

MOST_MINUTES = 14 * 24 * 60
"""That one answer has."""
DAY_S = 86_400.0
MOST_SCORED = 200_000
"""Decisions that are scored at once: a quiet pool has 1,440 a day."""


class Histories:
    """The verbs over the file. They block, may be called from any thread, and raise ``AdminError``.
    ``pools`` gives those that are configured, ``waiting`` decisions of one that may not be in the
    file yet; ``filled`` is told the pool whose past was added to (on the event loop)."""

    def __init__(
        self,
        store: HistoryStore,
        pools: Callable[[], Sequence[PoolSettings]],
        now_s: Callable[[], float],
        waiting: Callable[[str], Sequence[DecisionRecord]] = lambda pool: (),
        filled: Callable[[str], None] = lambda pool: None,
    ) -> None:
        self._store = store
        self._pools = pools
        self._now_s = now_s
        self._waiting = waiting
        self.filled = filled

    def listing(self) -> schema.HistoryListing:
        """Of which pools there is anything, and what the file takes."""
        store = self._store
        try:
            extents, size_bytes = store.extents(), store.size_bytes()
        except HistoryError as error:
            raise AdminError("history_failed", str(error)) from None
        return schema.HistoryListing(
            path=str(store.path),
            size_bytes=size_bytes,
            max_bytes=store.max_bytes,
            max_age_s=store.max_age_s,
            series=SERIES,
            pools=tuple(schema.HistoryExtent.model_validate(one) for one in extents),
        )

    def read(self, pool: str, query: schema.HistoryQuery) -> schema.HistoryAnswer:
        """A part of a pool's past; of one that is configured no more too."""
        names = SERIES if query.series is None else tuple(query.series.split(","))
        _check_series(names)
        until_s = self._now_s() if query.until_s is None else query.until_s
        name = self._find(pool)
        try:
            known = {one.pool: one for one in self._store.extents()}
            if name is None and pool not in known:
                raise AdminError("pool_not_found", self._not_found(pool), param="pool")
            name = name or pool
            from_s = query.from_s
            if name in known:  # what lies before it need not be counted
                from_s = max(known[name].from_s, -math.inf if from_s is None else from_s)
                if minute_of(until_s) - minute_of(from_s) > MOST_MINUTES:
                    text = f"from_s to until_s are more than {MOST_MINUTES} minutes: ask for parts."
                    raise AdminError("bad_value", text, param="until_s")
            window = self._store.read(name, names, from_s, until_s)
        except HistoryError as error:
            raise AdminError("history_failed", str(error)) from None
        return schema.HistoryAnswer(
            pool=name,
            start_s=window.start_s,
            series={
                series: tuple(None if math.isnan(value) else value for value in values)
                for series, values in window.values.items()
            },
        )

    def fill(self, pool: str, given: schema.FillRequest) -> schema.FillAnswer:
        """Add to the past of a configured pool what is unknown in it."""
        name = self._find(pool)
        if name is None:
            raise AdminError("pool_not_found", self._not_found(pool), param="pool")
        _check_series(given.series)
        if len({len(values) for values in given.series.values()}) > 1:
            raise AdminError("bad_value", "series: they are not equally long.", param="series")
        try:
            kept = self._store.fill(_minutes(name, given), self._now_s())
        except HistoryError as error:
            raise AdminError("history_failed", str(error)) from None
        return schema.FillAnswer(pool=name, minutes=kept)

    def waiting(self, pool: str) -> Sequence[DecisionRecord]:
        """Decisions of a pool that may not be in the file yet. For the control loop's thread."""
        return self._waiting(self._find(pool) or pool)

    def decisions(
        self, pool: str, query: schema.DecisionsQuery, waiting: Sequence[DecisionRecord] = ()
    ) -> schema.DecisionsAnswer:
        """The decision that held at a moment, and those around it."""
        at_s = self._now_s() if query.at_s is None else query.at_s
        name = self._find(pool) or pool
        before = query.limit - query.limit // 2
        work = partial(read_around, pool=name, at_s=at_s, before=before, after=query.limit // 2 + 1)
        records = joined(merge(self._read_decisions(pool, work), waiting))
        found = in_force(records, at_s)
        if found is None:
            raise AdminError("decision_not_found", _no_decision(name, at_s, records), param="at_s")
        index = records.index(found)
        first = max(0, index + 1 - before)
        return schema.DecisionsAnswer(
            pool=name,
            at_s=at_s,
            decision=entry_of(found),
            decisions=tuple(map(entry_of, records[first : first + query.limit])),
        )

    def score(
        self, pool: str, query: schema.ScoreQuery, waiting: Sequence[DecisionRecord] = ()
    ) -> schema.ScoreAnswer:
        """What a pool's decisions cost and brought."""
        name = self._find(pool) or pool
        until_s = self._now_s() if query.until_s is None else query.until_s
        from_s = max(0.0, until_s - DAY_S) if query.from_s is None else query.from_s
        work = partial(
            read_between, pool=name, from_s=from_s, until_s=until_s, most=MOST_SCORED + 1
        )
        records = merge(
            self._read_decisions(pool, work),
            [one for one in waiting if from_s <= one.at_s < until_s],
        )
        if len(records) > MOST_SCORED:
            text = f"from_s to until_s have more than {MOST_SCORED} records: ask for less."
            raise AdminError("bad_value", text, param="from_s")
        if len(records) < 2:
            text = f"There are no decisions of {name} from {_moment(from_s)} on."
            raise AdminError("decision_not_found", text, param="from_s")
        found = score(records)
        return schema.ScoreAnswer.model_validate(
            asdict(found)
            | {
                "pool": name,
                "from_s": records[0].at_s,
                "until_s": records[-1].until_s,
                "forecasts": found.tally.scored,
                "coverage": found.coverage,
                "loss_ratio": found.loss_ratio,
            }
        )

    def _read_decisions(
        self, pool: str, work: Callable[[sqlite3.Connection], list[DecisionRecord]]
    ) -> list[DecisionRecord]:
        """Of a pool that is configured, or was."""
        try:
            found = self._store.transact(work)
            if found or self._find(pool) is not None:
                return found
            if pool not in self._store.transact(pools_with_decisions):
                raise AdminError("pool_not_found", self._not_found(pool), param="pool")
        except HistoryError as error:
            raise AdminError("history_failed", str(error)) from None
        return found

    def _find(self, pool: str) -> str | None:
        """The name of the configured pool that is called so."""
        return next((one.name for one in self._pools() if pool in one.names), None)

    def _not_found(self, pool: str) -> str:
        names = ", ".join(one.name for one in self._pools()[:20])
        return f"There is no pool {pool!r}; the pools are {names or 'none'}."


def _check_series(names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in SERIES]
    if unknown:
        text = f"series: there is no {unknown[0]!r}; there are {', '.join(SERIES)}."
        raise AdminError("bad_value", text, param="series")


def _no_decision(pool: str, at_s: float, records: Sequence[DecisionRecord]) -> str:
    """That nothing is known of a moment, and of which one near it something is."""
    text = f"No decision of {pool} is known at {_moment(at_s)}"
    moments = [moment for one in records for moment in (one.at_s, one.until_s)]
    if not moments:
        return f"{text}, nor at any other time."
    nearest = min(moments, key=lambda moment: abs(moment - at_s))
    return f"{text}; the nearest is at {_moment(nearest)}."


def _moment(at_s: float) -> str:
    return utc(at_s, "%Y-%m-%dT%H:%M:%SZ")


def _minutes(pool: str, given: schema.FillRequest) -> Iterator[PoolMinute]:
    start = round(given.start_s / MINUTE_S)
    for index in range(max(map(len, given.series.values()), default=0)):
        values = {
            series: value
            for series, values in given.series.items()
            if (value := values[index]) is not None
        }
        if values:
            yield PoolMinute(pool=pool, minute=start + index, values=values)
