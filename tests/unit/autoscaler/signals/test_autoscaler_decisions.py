"""Past decisions in the history's file: what comes back, their bounds, and files of before."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import msgspec
import pytest
from decision_rig import OUTLOOK, decision, record

from autoscaler.signals import history
from autoscaler.signals.decisions import (
    DecisionFigures,
    DecisionRecord,
    make_figures,
    pack,
    put_decisions,
    read_around,
    read_between,
    unpack,
)
from autoscaler.signals.history import HistoryStore, put_minutes
from autoscaler.signals.series import SERIES, PoolMinute
from autoscaler.types import ForecastTally, ScaleReason

NOW_S = 1_700_000_000.0
DAY_S = 86_400.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HistoryStore]:
    made = HistoryStore(tmp_path / "history.sqlite3", max_age_s=30 * DAY_S, max_bytes=1 << 26)
    yield made
    made.close()


def put(store: HistoryStore, *records: DecisionRecord, now_s: float = NOW_S) -> None:
    store.write([partial(put_decisions, records=records)], now_s)


def every(store: HistoryStore) -> list[DecisionRecord]:
    return store.transact(
        partial(read_between, pool="chat", from_s=0.0, until_s=2 * NOW_S, most=10_000)
    )


def test_a_decision_comes_back_with_all_it_was_made_from(store: HistoryStore) -> None:
    tally = ForecastTally(scored=3, covered=2, loss=1.5, last_value_loss=4.0)
    put(store, record(NOW_S - 60, tally=tally))
    (found,) = every(store)
    assert found == record(NOW_S - 60, tally=tally)
    figures = found.figures
    assert (figures.ready, figures.min_replicas, figures.max_replicas, figures.lead_s) == (
        2,
        0,
        8,
        60.0,
    )
    assert (figures.stable_tokens_per_s, figures.requests, figures.tokens) == (250.0, 4, 900)
    ahead = (figures.forecast_median_tokens_per_s, figures.forecast_high_tokens_per_s)
    assert (figures.model, ahead) == ("direct", (420.0, 612.0))
    assert figures.rules == (("stable_tokens_per_s", 2), ("forecast", 3))
    assert figures.alone == 2  # 250 tokens/s, 200 a replica, at 0.7 of it


@pytest.mark.parametrize(("value", "kept"), [(None, None), (float("nan"), None), (0.0, 0.0)])
def test_unknown_is_not_zero(value: float | None, kept: float | None) -> None:
    assert make_figures(decision(rate=value), None).stable_tokens_per_s == kept


def test_a_forecast_without_a_quantile_says_nothing_of_it() -> None:
    outlook = replace(OUTLOOK, levels=(0.25,), tokens_per_s=(3.0,))
    figures = make_figures(decision(outlook=outlook), None)
    assert figures.forecast_median_tokens_per_s is None
    assert figures.forecast_high_tokens_per_s is None


def test_one_that_lasts_is_one_row_and_its_sums_grow(store: HistoryStore) -> None:
    tally = ForecastTally(scored=1, covered=1, loss=0.5, last_value_loss=1.0)
    put(store, record(NOW_S - 600, count=1, tally=tally))
    for minute in (540, 480):
        put(store, record(NOW_S - 600, until_s=NOW_S - minute, count=60, tally=tally))
    (found,) = every(store)
    assert (found.at_s, found.until_s, found.count) == (NOW_S - 600, NOW_S - 480, 121)
    assert found.tally == ForecastTally(scored=3, covered=3, loss=1.5, last_value_loss=3.0)


def test_those_around_a_moment(store: HistoryStore) -> None:
    put(store, *(record(NOW_S - 60 * ago) for ago in range(10, 0, -1)))
    found = store.transact(partial(read_around, pool="chat", at_s=NOW_S - 290, before=3, after=2))
    assert [round((NOW_S - one.at_s) / 60) for one in found] == [7, 6, 5, 4, 3]
    none = store.transact(partial(read_around, pool="other", at_s=NOW_S, before=3, after=2))
    assert none == []


def test_what_a_newer_one_has_written_is_left_out(store: HistoryStore) -> None:
    put(store, record(NOW_S - 120), record(NOW_S - 60))
    tomorrow = msgspec.structs.replace(record(NOW_S).figures, reason="later")  # type: ignore[arg-type]
    newer = pack(tomorrow)

    def spoil(connection: sqlite3.Connection) -> None:
        connection.execute("UPDATE decisions SET record = ? WHERE at_s < ?", (newer, NOW_S - 90))

    store.transact(spoil, writes=True)
    assert [one.at_s for one in every(store)] == [NOW_S - 60]


def test_a_record_may_gain_fields() -> None:
    figures = record(NOW_S).figures
    packed = msgspec.to_builtins(figures)
    assert msgspec.convert([*packed, "more"], DecisionFigures) == figures
    older = msgspec.convert(packed[:14], DecisionFigures)
    assert (older.reason, older.ready) == (ScaleReason.FORECAST, None)


def test_a_record_is_small() -> None:
    assert len(pack(record(NOW_S).figures)) < 120
    assert unpack(pack(record(NOW_S).figures)) == record(NOW_S).figures
    assert unpack(b"no record") is None


def test_a_file_of_before_gains_them_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "history.sqlite3"
    minute = PoolMinute(pool="chat", minute=int(NOW_S // 60) - 1, values={"arrivals": 5.0})
    only = {"minutes": history.TABLES["minutes"]}
    with monkeypatch.context() as before:
        before.setattr(history, "TABLES", only)
        old = HistoryStore(path, max_age_s=30 * DAY_S, max_bytes=1 << 26)
        old.record([minute], NOW_S)
        old.close()
    store = HistoryStore(path, max_age_s=30 * DAY_S, max_bytes=1 << 26)
    put(store, record(NOW_S - 60))
    assert len(every(store)) == 1
    assert store.read("chat", ["arrivals"], None, NOW_S).values["arrivals"].tolist() == [5.0]
    store.close()


def test_they_are_forgotten_with_the_minutes(store: HistoryStore) -> None:
    store.max_age_s = DAY_S
    put(store, *(record(NOW_S - 60 * ago) for ago in range(9, 0, -1)))
    put(store, record(NOW_S + DAY_S - 300), now_s=NOW_S + DAY_S - 300)
    assert min(one.at_s for one in every(store)) >= NOW_S - 360


def test_a_file_that_is_too_large_loses_old_decisions_before_any_minute(
    store: HistoryStore,
) -> None:
    first = int(NOW_S // 60) - 3 * 1440
    minutes = [
        PoolMinute(pool="chat", minute=first + at, values=dict.fromkeys(SERIES, at + 0.5))
        for at in range(3 * 1440)
    ]
    chance = Random(1)
    kept = [
        record(60.0 * (first + at), detail=str(chance.getrandbits(400))) for at in range(3 * 1440)
    ]
    store.write(
        [partial(put_minutes, minutes=minutes), partial(put_decisions, records=kept)], NOW_S
    )
    whole = store.size_bytes()
    assert len(every(store)) == 3 * 1440
    store.max_bytes = round(0.75 * whole)
    for _ in range(3):
        put(store, now_s=NOW_S)
    assert store.size_bytes() <= store.max_bytes
    assert store.extents()[0].minutes == 3 * 1440
    left = every(store)
    assert 1440 <= len(left) < 2 * 1440 + 60
    assert left[-1].at_s == kept[-1].at_s
    store.max_bytes = 1 << 20
    for _ in range(9):
        put(store, now_s=NOW_S)
    assert store.size_bytes() <= store.max_bytes
    assert 0 < store.extents()[0].minutes < 3 * 1440
    assert every(store)[-1].at_s == kept[-1].at_s
