"""The file with the past: what comes back of it, its bounds, and what it survives."""

from __future__ import annotations

import logging
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.synchronize
import os
import resource
import shutil
import signal
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from autoscaler.signals import history
from autoscaler.signals.history import (
    EXPIRED_AT_ONCE,
    HistoryError,
    HistoryStore,
    HistoryWriter,
    put_minutes,
)
from autoscaler.signals.series import MINUTE_S, SERIES, PoolMinute

NOW = 29_000_000
"""A minute of the year 2025."""
DAY = 24 * 60
MIB = 1 << 20
MEMORY = Path("/dev/shm")
"""Where many small writes cost least."""


def at_s(minute: float) -> float:
    return minute * MINUTE_S


def row(minute: int, pool: str = "a", **values: float) -> PoolMinute:
    return PoolMinute(pool=pool, minute=minute, values=values)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "history.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[HistoryStore]:
    made = make(path)
    yield made
    made.close()


def make(path: Path, *, days: float = 7, max_bytes: int = 64 * MIB) -> HistoryStore:
    return HistoryStore(path, max_age_s=at_s(days * DAY), max_bytes=max_bytes)


def arrivals(store: HistoryStore, pool: str = "a", until: int = NOW + 1) -> list[float]:
    return store.read(pool, ["arrivals"], None, at_s(until)).values["arrivals"].tolist()


def same(found: list[float], expected: list[float]) -> bool:
    return np.array_equal(found, expected, equal_nan=True)


# -- what comes back ---------------------------------------------------------------------------


def test_missing_minutes_are_unknown_and_zero_is_not(store: HistoryStore) -> None:
    rows = [row(NOW - 5, arrivals=0.0), row(NOW - 2, arrivals=3.5, errors=1), row(NOW - 2, "b")]
    store.record(rows, at_s(NOW))
    window = store.read("a", ("arrivals", "errors"), at_s(NOW - 60), at_s(NOW))
    assert window.start_s == at_s(NOW - 5)
    nan = math.nan
    assert same(window.values["arrivals"].tolist(), [0.0, nan, nan, 3.5, nan])
    assert same(window.values["errors"].tolist(), [nan, nan, nan, 1.0, nan])


@pytest.mark.parametrize(
    ("from_s", "until_s", "expected"),
    [
        (None, at_s(NOW), [1.0, 2.0, 3.0]),
        (at_s(NOW - 2), at_s(NOW - 1), [2.0]),
        (at_s(NOW - 3) + 1, at_s(NOW) - 1, [2.0]),
        (at_s(NOW - 2) + 1, at_s(NOW - 1) + 1, []),
        (at_s(NOW), at_s(NOW - 5), []),
        (-1e300, 1.0, []),
        (0.0, at_s(NOW - 3), []),
    ],
)
def test_a_window_has_the_minutes_that_lie_in_it(
    store: HistoryStore, from_s: float | None, until_s: float, expected: list[float]
) -> None:
    store.record([row(NOW - 3 + n, arrivals=n + 1) for n in range(3)], at_s(NOW))
    assert store.read("a", ["arrivals"], from_s, until_s).values["arrivals"].tolist() == expected


def test_what_cannot_be_read_is_said(store: HistoryStore) -> None:
    store.record([row(NOW - 1, arrivals=1)], at_s(NOW))
    assert arrivals(store, "nobody") == []
    with pytest.raises(ValueError, match="no series 'sales'"):
        store.read("a", ["sales"], None, at_s(NOW))
    with pytest.raises(ValueError, match="minutes"):
        store.read("a", ["arrivals"], None, 1e300)


def test_a_recorded_minute_replaces_and_an_imported_one_fills(store: HistoryStore) -> None:
    store.record([row(NOW - 1, arrivals=5, errors=1)], at_s(NOW))
    store.record([row(NOW - 1, arrivals=6, ttft_p90_s=math.nan)], at_s(NOW))
    rows = [row(NOW - 1, arrivals=7, itl_mean_s=0.5), row(NOW - 2, arrivals=8), row(NOW)]
    assert store.fill([*rows, row(NOW - 8 * DAY, arrivals=1)], at_s(NOW)) == 2
    window = store.read("a", SERIES, None, at_s(NOW))
    assert window.values["arrivals"].tolist() == [8.0, 6.0]
    assert same(window.values["errors"].tolist(), [math.nan, 1.0])
    assert same(window.values["itl_mean_s"].tolist(), [math.nan, 0.5])
    assert same(window.values["ttft_p90_s"].tolist(), [math.nan, math.nan])


def test_extents_of_pools(store: HistoryStore) -> None:
    assert store.extents() == []
    store.record([row(NOW - 9, "b", errors=0), row(NOW - 4, "b", errors=0)], at_s(NOW))
    (found,) = store.extents()
    assert (found.pool, found.minutes) == ("b", 2)
    assert (found.from_s, found.until_s) == (at_s(NOW - 9), at_s(NOW - 3))


class StoreAgainstDict(RuleBasedStateMachine):
    """What is not too old is as in a plain dict, whatever is done; what is, is that or nothing."""

    @initialize()
    def begin(self) -> None:
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY if MEMORY.is_dir() else None))
        self.now = NOW
        self.known: dict[tuple[str, int, str], float] = {}
        self.store = make(self.folder / "history.sqlite3", days=0.25)

    rows = st.lists(
        st.builds(
            lambda pool, ago, values: (pool, ago, values),
            st.sampled_from(["a", "b"]),
            st.integers(1, 500),
            st.dictionaries(
                st.sampled_from(["arrivals", "errors"]),
                st.floats(allow_nan=True, allow_infinity=True),
                max_size=2,
            ),
        ),
        max_size=5,
    )

    @rule(rows=rows, over=st.booleans())
    def put(self, rows: list[tuple[str, int, dict[str, float]]], over: bool) -> None:
        minutes = [row(self.now - ago, pool, **values) for pool, ago, values in rows]
        (self.store.record if over else self.store.fill)(minutes, at_s(self.now))
        for one in minutes:
            for name, value in one.values.items():
                key = (one.pool, one.minute, name)
                if math.isfinite(value) and (over or key not in self.known):
                    self.known[key] = value

    @rule(minutes=st.integers(1, 300))
    def wait(self, minutes: int) -> None:
        self.now += minutes

    @rule()
    def open_again(self) -> None:
        self.store.close()
        self.store = make(self.store.path, days=0.25)

    @invariant()
    def is_as_the_dict(self) -> None:
        first = self.now - DAY // 4
        for pool in ("a", "b"):
            window = self.store.read(pool, ("arrivals", "errors"), None, at_s(self.now))
            start = int(window.start_s) // MINUTE_S
            found = {
                (pool, start + index, name): value
                for name, values in window.values.items()
                for index, value in enumerate(values)
                if not math.isnan(value)
            }
            expected = {key: value for key, value in self.known.items() if key[0] == pool}
            assert found.items() <= expected.items()
            assert {key for key in expected if key[1] > first} <= set(found)

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


TestStoreAgainstDict = StoreAgainstDict.TestCase
TestStoreAgainstDict.settings = settings(stateful_step_count=20)


# -- bounds ------------------------------------------------------------------------------------


def test_minutes_go_when_they_are_too_old(store: HistoryStore) -> None:
    oldest = NOW - 7 * DAY
    store.record([row(oldest + n, pool, arrivals=n) for n in range(5) for pool in "ab"], at_s(NOW))
    store.record([], at_s(NOW + 2))
    assert arrivals(store)[0] == 2.0
    for _ in range(2):
        store.record([], at_s(NOW + 100 * DAY))
    assert store.extents() == []


def test_a_wrong_clock_costs_little(store: HistoryStore) -> None:
    minutes = [row(NOW - n, arrivals=1) for n in range(1, 1001)]
    store.record(minutes, at_s(NOW))
    store.record([row(NOW + 999 * DAY, arrivals=1)], at_s(NOW + 1000 * DAY))  # set forward
    store.record([row(1, arrivals=1)], at_s(2))  # set back to 1970
    store.record([row(NOW, arrivals=1)], at_s(NOW + 1))  # and put right
    assert len([one for one in arrivals(store)[-1001:] if one == 1]) >= 1001 - EXPIRED_AT_ONCE
    assert len(arrivals(store, until=NOW)) <= 1001


def test_the_file_stays_within_its_bytes(path: Path) -> None:
    store = make(path, days=60, max_bytes=2 * MIB)
    full = {name: 0.1 + index for index, name in enumerate(SERIES)}
    for day in range(12):
        minutes = [
            row(NOW + day * DAY + n, pool, **full) for n in range(0, DAY, 3) for pool in "abc"
        ]
        store.record(minutes, at_s(NOW + (day + 1) * DAY))
        assert path.stat().st_size <= 3 * MIB
    assert path.stat().st_size <= 2 * MIB + history.FREE_PAGES * 4096
    window = store.read("a", ["errors"], None, at_s(NOW + 12 * DAY))
    assert window.start_s > at_s(NOW + 2 * DAY)  # the oldest went
    newest = window.values["errors"][-3:]
    assert newest[0] == full["errors"]
    store.max_bytes = MIB
    for _ in range(3):
        store.record([], at_s(NOW + 12 * DAY))
    assert path.stat().st_size <= MIB + history.FREE_PAGES * 4096
    store.close()


def test_a_pool_without_requests_takes_little(path: Path) -> None:
    store = make(path, days=60)
    idle = {name: 0.0 for name in SERIES if not name.endswith("_s")}
    store.record([row(NOW + n, **idle) for n in range(DAY)], at_s(NOW + DAY))
    assert store.size_bytes() < 64 * DAY
    store.close()


# -- what it survives --------------------------------------------------------------------------


def _write_until_killed(path: Path, begun: multiprocessing.synchronize.Event) -> None:
    store = make(path)
    for n in range(1_000_000):
        store.record([row(NOW - 9_000 + n % 9_000, pool, arrivals=1) for pool in "abc"], at_s(NOW))
        if n == 20:
            begun.set()


def test_a_kill_in_the_middle_of_writing_loses_no_minute_that_was_kept(path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    begun = spawn.Event()
    writer = spawn.Process(target=_write_until_killed, args=(path, begun))
    writer.start()
    assert begun.wait(60)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join(60)
    store = make(path)
    for pool in "abc":
        assert len(arrivals(store, pool)) >= 20
    assert len({one.minutes for one in store.extents()}) == 1  # a transaction is whole or not there
    store.record([row(NOW - 1, arrivals=1)], at_s(NOW))
    assert not path.with_name(f"{path.name}.damaged").exists()
    store.close()


def damage_text(path: Path) -> None:
    path.write_text("a spreadsheet, perhaps\n" * 1000)


def damage_half(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_pages(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = os.urandom(len(data) - 4096)
    path.write_bytes(data)


def make_newer(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()


@pytest.mark.parametrize("damage", [damage_text, damage_half, damage_pages, make_newer])
def test_a_file_that_cannot_be_used_is_set_aside(
    path: Path, damage: object, caplog: pytest.LogCaptureFixture
) -> None:
    store = make(path)
    store.record([row(NOW - n, arrivals=n) for n in range(1, 3000)], at_s(NOW))
    store.close()
    assert callable(damage)
    damage(path)
    with caplog.at_level(logging.WARNING):
        store.record([row(NOW - 1, arrivals=7)], at_s(NOW))
        assert arrivals(store, until=NOW) == [7.0]
    assert [one.levelname for one in caplog.records] == ["WARNING"]
    assert "set aside as history.sqlite3.damaged" in caplog.text
    assert path.with_name("history.sqlite3.damaged").exists()
    store.close()


def test_damage_found_while_it_is_open_is_no_end(path: Path) -> None:
    store = make(path)
    store.record([row(NOW - n, arrivals=n) for n in range(1, 3000)], at_s(NOW))
    damage_text(path)
    for _ in range(2):
        store.record([row(NOW - 1, arrivals=7)], at_s(NOW))
    assert arrivals(store, until=NOW) == [7.0]
    store.close()


def test_only_its_user_reads_it(store: HistoryStore, path: Path) -> None:
    store.record([], at_s(NOW))
    assert path.stat().st_mode & 0o777 == 0o600


def test_series_that_a_file_does_not_have_yet_are_added(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE pools (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)")
        connection.execute(
            "CREATE TABLE minutes (pool INTEGER, minute INTEGER, arrivals REAL, "
            "PRIMARY KEY (pool, minute)) WITHOUT ROWID"
        )
        connection.execute("INSERT INTO pools VALUES (1, 'a')")
        connection.execute("INSERT INTO minutes VALUES (1, ?, 4.0)", (NOW - 1,))
        connection.execute("PRAGMA user_version = 1")
    connection.close()
    store = make(path)
    store.record([row(NOW - 1, errors=2)], at_s(NOW))
    window = store.read("a", ("arrivals", "errors"), None, at_s(NOW))
    assert [values.tolist() for values in window.values.values()] == [[4.0], [2.0]]
    store.close()


def test_other_records_go_into_the_same_file_and_are_bounded_with_it(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(path)
    store.record([row(NOW - 1, arrivals=1)], at_s(NOW))
    store.close()
    table = history.HistoryTable(
        columns=("number INTEGER NOT NULL", "text TEXT"), key="pool, minute, number"
    )
    monkeypatch.setattr(history, "TABLES", {**history.TABLES, "notes": table})
    store = make(path)

    def put_notes(connection: sqlite3.Connection) -> None:
        pool = history.pool_id(connection, "a", {})
        rows = [(pool, minute, n, "why") for minute in (NOW - 7 * DAY - 5, NOW) for n in range(2)]
        connection.executemany("INSERT INTO notes VALUES (?, ?, ?, ?)", rows)

    store.write([put_notes], at_s(NOW))
    query = "SELECT minute, number FROM notes"
    found = store.transact(lambda connection: connection.execute(query).fetchall())
    assert found == [(NOW, 0), (NOW, 1)]
    assert arrivals(store, until=NOW) == [1.0]
    store.close()


def test_processes_write_one_after_the_other(path: Path) -> None:
    stores = [make(path), make(path)]

    def write(store: HistoryStore, pool: str) -> None:
        for n in range(50):
            store.record([row(NOW - 50 + n, pool, arrivals=1)], at_s(NOW))

    threads = [
        threading.Thread(target=write, args=(store, pool))
        for store, pool in zip(stores, "ab", strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [sum(arrivals(stores[0], pool, NOW)) for pool in "ab"] == [50.0, 50.0]
    for store in stores:
        store.close()


# -- beside the event loop ---------------------------------------------------------------------


def put(writer: HistoryWriter, *minutes: PoolMinute) -> None:
    """Have them written, or not, before it returns."""
    writer.put(partial(put_minutes, minutes=minutes))
    for thread in threading.enumerate():
        if thread.name == "history":
            thread.join(30)


def test_what_cannot_be_written_waits(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = path.parent / "later"
    store = make(folder / "history.sqlite3")
    writer = HistoryWriter(store, lambda: at_s(NOW))
    with caplog.at_level(logging.INFO):
        for n in range(3):
            put(writer, row(NOW - 9 + n, arrivals=n))
        assert (writer.failures, writer.size_bytes) == (3, None)
        assert writer.error is not None
        assert "later" in writer.error
        folder.mkdir()
        put(writer, row(NOW - 6, arrivals=3))
    assert arrivals(store, until=NOW - 5) == [0.0, 1.0, 2.0, 3.0]
    assert (writer.failures, writer.error) == (3, None)
    assert writer.size_bytes == store.size_bytes()
    assert [one.levelname for one in caplog.records] == ["WARNING", "INFO"]
    writer.close(5.0)


def test_what_waits_is_bounded(path: Path) -> None:
    store = make(path.parent / "later" / "history.sqlite3")
    writer = HistoryWriter(store, lambda: at_s(NOW))
    for n in range(200):
        put(writer, row(NOW - 200 + n, arrivals=1))
    store.path.parent.mkdir()
    put(writer, row(NOW, arrivals=1))
    assert len(arrivals(store)) == history.PENDING
    writer.close(5.0)


def _fill_the_disk(path: Path, told: multiprocessing.connection.Connection) -> None:
    """A file of at most 64 KiB is what this process may have: as on a disk that is full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    store = make(path)
    writer = HistoryWriter(store, lambda: at_s(NOW))
    put(writer, row(NOW - 3000, arrivals=1))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, most))
    put(writer, *(row(NOW - n, arrivals=1, ttft_p90_s=0.123) for n in range(2999, 0, -1)))
    full = (writer.failures, writer.error, len(arrivals(store, until=NOW - 2999)))
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    put(writer)
    told.send((*full, writer.error, sum(arrivals(store, until=NOW))))
    writer.close(5.0)


def test_a_full_disk_is_a_warning_and_no_loss(path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    told, tells = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_fill_the_disk, args=(path, tells))
    child.start()
    assert told.poll(60)
    failures, error, kept, after, total = told.recv()
    child.join(60)
    assert (failures, kept, after, total) == (1, 1, None, 3000.0)
    assert error


def test_a_file_that_cannot_be_written_can_be_read(
    store: HistoryStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.record([row(NOW - 1, arrivals=5)], at_s(NOW))
    store.close()
    connect = sqlite3.connect

    def read_only(database: Path, **options: object) -> sqlite3.Connection:
        return connect(f"file:{database}?mode=ro", uri=True, **options)  # type: ignore[call-overload, no-any-return]

    monkeypatch.setattr(sqlite3, "connect", read_only)  # tests run as root too, which writes all
    with pytest.raises(HistoryError, match="readonly"):
        store.record([row(NOW - 2, arrivals=5)], at_s(NOW))
    assert arrivals(store, until=NOW) == [5.0]
