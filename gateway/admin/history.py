"""The past of pools, as the admin API and the command line read it and add to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from autoscaler.settings import PoolSettings
from autoscaler.signals.history import HistoryError, HistoryStore, minute_of
from autoscaler.signals.series import MINUTE_S, SERIES, PoolMinute
from gateway.admin import schema
from gateway.admin.schema import AdminError

MOST_MINUTES = 14 * 24 * 60
"""That one answer has."""


class Histories:
    """The verbs over the file. They block, may be called from any thread, and raise ``AdminError``.
    ``pools`` gives those that are configured."""

    def __init__(
        self,
        store: HistoryStore,
        pools: Callable[[], Sequence[PoolSettings]],
        now_s: Callable[[], float],
    ) -> None:
        self._store = store
        self._pools = pools
        self._now_s = now_s

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
        unknown = [name for name in names if name not in SERIES]
        if unknown:
            text = f"series: there is no {unknown[0]!r}; there are {', '.join(SERIES)}."
            raise AdminError("bad_value", text, param="series")
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
        unknown = [series for series in given.series if series not in SERIES]
        if unknown:
            text = f"series: there is no {unknown[0]!r}; there are {', '.join(SERIES)}."
            raise AdminError("bad_value", text, param="series")
        if len({len(values) for values in given.series.values()}) > 1:
            raise AdminError("bad_value", "series: they are not equally long.", param="series")
        try:
            kept = self._store.fill(_minutes(name, given), self._now_s())
        except HistoryError as error:
            raise AdminError("history_failed", str(error)) from None
        return schema.FillAnswer(pool=name, minutes=kept)

    def _find(self, pool: str) -> str | None:
        """The name of the configured pool that is called so."""
        return next((one.name for one in self._pools() if pool in one.names), None)

    def _not_found(self, pool: str) -> str:
        names = ", ".join(one.name for one in self._pools()[:20])
        return f"There is no pool {pool!r}; the pools are {names or 'none'}."


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
