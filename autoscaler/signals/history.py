"""The past of every pool, minute by minute, in one SQLite file: ``history.sqlite3`` in the state
directory.

A row is a pool's minute, with a column for each series (``series.SERIES``); NULL is unknown, which
is not zero, and a minute without a row is unknown as a whole. The file is bounded by the age of its
minutes and by its size, and survives a kill at any moment. One that is damaged is set aside and
begun anew. Other records of the past go into the same file: a table in ``TABLES`` is bounded too.

The file is written and read in threads, never on the event loop (``HistoryWriter``); several
processes may have it open.
"""

from __future__ import annotations

import logging
import math
import os
import sqlite3
import threading
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autoscaler.signals.series import MINUTE_S, SERIES, PoolMinute

LOG = logging.getLogger("tidegate.history")

FILE_NAME = "history.sqlite3"
VERSION = 1
BUSY_S = 5.0
"""Seconds that a call waits for another process to finish writing."""
EXPIRED_AT_ONCE = 10
"""Minutes of a pool that one write removes for their age at most. The wall clock may be wrong for a
while: then little is lost, and with the right time as much is removed as comes."""
SHED_AT_ONCE = 60
"""Oldest minutes that are removed in one step while the file is too large."""
MOST_STEPS = 48
"""Such steps of one write."""
FREE_PAGES = 256
"""Unused pages that stay in the file."""
GIVEN_BACK_AT_ONCE = 4_096
"""Unused pages that one write gives back to the disk at most."""
LAST_MINUTE = 1 << 40
MOST_MINUTES = 4 * 366 * 24 * 60
"""That one reading has at most."""
PENDING = 64
"""Writes that wait while the file cannot be written: an hour, and a few more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HistoryTable:
    """Records of pools. ``columns`` beside ``pool`` (of ``pools``) and ``minute`` (Unix time / 60),
    with which its ``key`` begins. Columns that a file does not have are added to it. Where the file
    is too large, what is older than ``spared_minutes`` goes before anything of the other tables."""

    columns: tuple[str, ...]
    key: str = "pool, minute"
    spared_minutes: int | None = None


TABLES: Mapping[str, HistoryTable] = {
    "minutes": HistoryTable(columns=tuple(f"{name} REAL" for name in SERIES)),
    "decisions": HistoryTable(  # autoscaler.signals.decisions
        columns=(
            "at_s REAL",
            "until_s REAL",
            "count INTEGER",
            "before INTEGER",
            "scored INTEGER",
            "covered INTEGER",
            "loss REAL",
            "last_loss REAL",
            "record BLOB",
        ),
        key="pool, minute, at_s",
        spared_minutes=24 * 60,
    ),
    "loads": HistoryTable(  # autoscaler.control.learned_history
        columns=(
            "setup TEXT",
            "accelerator TEXT",
            "tokens_per_s REAL",
            "prompt_tokens REAL",
            "output_tokens REAL",
            "within_slo INTEGER",
            "waited INTEGER",
        ),
    ),
    "gaps": HistoryTable(columns=("record BLOB",)),  # the same
}
"""Tables by name; all are bounded by the age of their minutes and by the size of the file."""

Done = TypeVar("Done")
Change = Callable[[sqlite3.Connection], None]


class HistoryError(Exception):
    """The history could not be read or written now; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SeriesWindow:
    """Series of one pool on an even grid of minutes: ``values[name][i]`` is that of the minute
    which began at ``start_s + 60 * i`` (Unix time), NaN where it is unknown."""

    pool: str
    start_s: float
    values: Mapping[str, array[float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolExtent:
    """From when to when (Unix time) there is anything of a pool, and how many minutes are known."""

    pool: str
    from_s: float
    until_s: float
    minutes: int


class HistoryStore:
    """The file. Every method may be called from any thread, blocks, and raises ``HistoryError``.

    ``max_age_s`` and ``max_bytes`` may be changed at any time; the next write heeds them.
    """

    def __init__(self, path: Path, *, max_age_s: float, max_bytes: int) -> None:
        self.path = path
        self.max_age_s = max_age_s
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None

    def close(self) -> None:
        """Let go of the file; the next call opens it again."""
        with self._lock:
            self._drop()

    # -- what is kept ----------------------------------------------------------------------

    def record(self, minutes: Iterable[PoolMinute], now_s: float) -> None:
        """Keep these minutes, over what was known of them before, and forget what is too old at
        ``now_s`` (Unix time) or too much."""
        self.write([lambda connection: put_minutes(connection, minutes)], now_s)

    def fill(self, minutes: Iterable[PoolMinute], now_s: float) -> int:
        """Keep of these minutes what was unknown before. Returns how many of them there are that
        have passed and are not too old."""
        first, now = minute_of(now_s - self.max_age_s) + 1, minute_of(now_s)
        kept = [one for one in minutes if first <= one.minute < now]
        self.write([lambda connection: put_minutes(connection, kept, over=False)], now_s)
        return len(kept)

    def write(self, changes: Iterable[Change], now_s: float) -> None:
        """Make all changes in one transaction, then forget what is too old or too much."""

        def work(connection: sqlite3.Connection) -> None:
            for change in changes:
                change(connection)
            self._expire(connection, minute_of(now_s - self.max_age_s))
            self._shed(connection, minute_of(now_s))

        self.transact(work, writes=True)

    def read(
        self, pool: str, names: Sequence[str], from_s: float | None, until_s: float
    ) -> SeriesWindow:
        """These series of a pool, of the minutes that lie whole from ``from_s`` (``None``: from the
        oldest that there is) to ``until_s``; it begins with the oldest that there is, where that is
        later. ``ValueError`` for a series that there is not, and for too many minutes."""
        unknown = [name for name in names if name not in SERIES]
        if unknown:
            raise ValueError(f"no series {unknown[0]!r}; there are {', '.join(SERIES)}")
        first = -LAST_MINUTE if from_s is None else math.ceil(clamp(from_s) / MINUTE_S)
        end = minute_of(until_s)

        def work(connection: sqlite3.Connection) -> list[tuple[float | None, ...]]:
            columns = ", ".join(("minute", *names))
            return connection.execute(
                f"SELECT {columns} FROM minutes WHERE pool = (SELECT id FROM pools WHERE name = ?) "
                "AND minute >= ? AND minute < ? ORDER BY minute",
                (pool, first, end),
            ).fetchall()

        rows = self.transact(work)
        start = int(rows[0][0] or 0) if rows else end
        if end - start > MOST_MINUTES:
            raise ValueError(f"more than {MOST_MINUTES} minutes")
        values = {name: array("d", [math.nan]) * (end - start) for name in names}
        for row in rows:
            at = int(row[0] or 0) - start
            for name, value in zip(names, row[1:], strict=True):
                if value is not None:
                    values[name][at] = value
        return SeriesWindow(pool=pool, start_s=float(start * MINUTE_S), values=values)

    def extents(self) -> list[PoolExtent]:
        """What there is, by pool."""

        def work(connection: sqlite3.Connection) -> list[tuple[str, int, int, int]]:
            return connection.execute(
                "SELECT name, min(minute), max(minute), count(*) FROM minutes "
                "JOIN pools ON pools.id = pool GROUP BY pool ORDER BY name"
            ).fetchall()

        return [
            PoolExtent(
                pool=name,
                from_s=float(first * MINUTE_S),
                until_s=float((last + 1) * MINUTE_S),
                minutes=count,
            )
            for name, first, last, count in self.transact(work)
        ]

    def size_bytes(self) -> int:
        """What the file takes."""
        return self.transact(lambda connection: _pages(connection)[0] * _page_bytes(connection))

    # -- the file --------------------------------------------------------------------------

    def transact(self, work: Callable[[sqlite3.Connection], Done], *, writes: bool = False) -> Done:
        """Do it in one transaction, all of it or nothing. In a file that turns out to be damaged it
        is done again in a new one."""
        begin = "BEGIN IMMEDIATE" if writes else "BEGIN"
        with self._lock:
            try:
                return self._attempt(work, begin)
            except sqlite3.Error as error:
                self._drop()  # whatever it was, the next call opens the file again
                if not _is_damage(error):
                    raise HistoryError(f"{self.path}: {error}") from error
                self._set_aside(str(error))
            try:
                return self._attempt(work, begin)
            except sqlite3.Error as error:
                self._drop()
                raise HistoryError(f"{self.path}: {error}") from error

    def _attempt(self, work: Callable[[sqlite3.Connection], Done], begin: str) -> Done:
        if self._connection is None:
            self._connection = self._open()
        with self._connection as connection:
            connection.execute(begin)
            return work(connection)

    def _open(self) -> sqlite3.Connection:
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            if not self.path.is_file():
                raise HistoryError(f"{self.path}: {error.strerror}") from error
        connection = sqlite3.connect(
            self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False
        )
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version > VERSION:
                raise _NewerFile(f"a newer Tidegate made it, version {version} of the file")
            if version < VERSION or _missing_columns(connection):
                connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
                with connection:
                    connection.execute("BEGIN IMMEDIATE")
                    _make_tables(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _set_aside(self, why: str) -> None:
        aside = self.path.with_name(f"{self.path.name}.damaged")
        LOG.warning(
            "%s cannot be used (%s): it is set aside as %s, and the history begins anew",
            self.path, why, aside.name,
        )  # fmt: skip
        try:
            os.replace(self.path, aside)
            journal = self.path.with_name(f"{self.path.name}-journal")
            journal.unlink(missing_ok=True)  # it is the old file's
        except OSError as error:
            raise HistoryError(f"{self.path}: {error.strerror}") from error

    def _drop(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            connection.close()

    def _expire(self, connection: sqlite3.Connection, before: int) -> None:
        for pool, oldest in _oldest(connection):
            if oldest < before:
                _remove(connection, pool, min(before, oldest + EXPIRED_AT_ONCE))

    def _shed(self, connection: sqlite3.Connection, now: int) -> None:
        """Remove the oldest minutes until the file has no more than its bytes."""
        page_bytes = _page_bytes(connection)
        spared = {name: one.spared_minutes for name, one in TABLES.items()}
        for _ in range(MOST_STEPS):
            total, free = _pages(connection)
            if (total - free) * page_bytes <= self.max_bytes:
                break
            for tables, until in (
                *(((name,), now - kept) for name, kept in spared.items() if kept is not None),
                (tuple(TABLES), LAST_MINUTE),
            ):
                oldest = [one for one in _oldest(connection, tables) if one[1] < until]
                if not oldest:
                    continue
                before = min(until, min(minute for _, minute in oldest) + SHED_AT_ONCE)
                for pool, minute in oldest:
                    if minute < before:
                        _remove(connection, pool, before, tables)
                break
            else:
                break
        total, free = _pages(connection)
        if free > FREE_PAGES or total * page_bytes > self.max_bytes:
            for _ in range(min(free, GIVEN_BACK_AT_ONCE)):  # sqlite3 frees one with each call
                connection.execute("PRAGMA incremental_vacuum(1)")


class HistoryWriter:
    """Writes beside the event loop, in a thread, in the order of the calls.

    What cannot be written now is kept, ``PENDING`` changes of it, and tried again with the next;
    the log says when that begins and when it is over.
    """

    def __init__(self, store: HistoryStore, wall_s: Callable[[], float]) -> None:
        self._store = store
        self._wall_s = wall_s
        self._pending: deque[Change] = deque(maxlen=PENDING)
        self._lock = threading.Lock()
        self._failed = False
        self._thread: threading.Thread | None = None
        self.failures = 0
        """Writes that failed since the process began."""
        self.error: str | None = None
        """Why the newest write failed; ``None`` where it did not."""
        self.size_bytes: int | None = None
        """What the file took after the newest write."""

    def put(self, change: Change) -> None:
        """Make this change soon, in a transaction with others that wait."""
        with self._lock:
            self._pending.append(change)
            if self._thread is not None:
                return
            # A daemon, and none of the loop's: a disk that hangs holds up nothing else.
            self._thread = threading.Thread(target=self._run, name="history", daemon=True)
            self._thread.start()

    def close(self, timeout_s: float) -> None:
        """Wait for what is being written, and close the file. Blocks."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout_s)
        if thread is None or not thread.is_alive():
            self._store.close()

    def _run(self) -> None:
        """Write what waits until nothing does, or it cannot be written."""
        while True:
            with self._lock:
                changes = list(self._pending)
                if not changes or self._failed:
                    self._failed, self._thread = False, None
                    return
            self._failed = not self._write(changes)

    def _write(self, changes: Sequence[Change]) -> bool:
        try:
            self._store.write(changes, self._wall_s())
            self.size_bytes = self._store.size_bytes()
        except Exception as error:  # noqa: BLE001 -- nothing may come of it but a warning
            self.failures += 1
            if self.error is None:
                LOG.warning("the history is not kept for now: %s", error)
            self.error = str(error)
            return False
        if self.error is not None:
            LOG.info("the history is kept again")
            self.error = None
        with self._lock:
            for change in changes:
                if self._pending and self._pending[0] is change:
                    self._pending.popleft()
        return True


# -- rows --------------------------------------------------------------------------------------


def put_minutes(
    connection: sqlite3.Connection, minutes: Iterable[PoolMinute], *, over: bool = True
) -> None:
    """Keep these minutes: ``over`` what was known before, or only what was unknown."""
    columns, marks = ", ".join(SERIES), ", ".join("?" * len(SERIES))
    old_new = "excluded.{0}, {0}" if over else "{0}, excluded.{0}"
    updates = ", ".join(f"{name} = coalesce({old_new.format(name)})" for name in SERIES)
    ids: dict[str, int] = {}
    rows = []
    for one in minutes:
        figures = [finite(one.values.get(name)) for name in SERIES]
        if any(figure is not None for figure in figures):
            rows.append((pool_id(connection, one.pool, ids), one.minute, *figures))
    connection.executemany(
        f"INSERT INTO minutes (pool, minute, {columns}) VALUES (?, ?, {marks}) "
        f"ON CONFLICT (pool, minute) DO UPDATE SET {updates}",
        rows,
    )


def pool_id(connection: sqlite3.Connection, pool: str, ids: dict[str, int]) -> int:
    """The key of a pool in every table; ``ids`` remembers those that were asked for."""
    if pool not in ids:
        connection.execute("INSERT OR IGNORE INTO pools (name) VALUES (?)", (pool,))
        found = connection.execute("SELECT id FROM pools WHERE name = ?", (pool,))
        (ids[pool],) = found.fetchone()
    return ids[pool]


def finite(value: float | None) -> float | None:
    """A figure as it is kept: what is no number is unknown."""
    return value if value is not None and math.isfinite(value) else None


def minute_of(at_s: float) -> int:
    """The minute (Unix time / 60) in which a moment is."""
    return int(clamp(at_s) // MINUTE_S)


def clamp(at_s: float) -> float:
    """A moment within what the file can have."""
    return min(max(at_s, 0.0), float(LAST_MINUTE))


def _make_tables(connection: sqlite3.Connection) -> None:
    connection.execute(
        "CREATE TABLE IF NOT EXISTS pools (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)"
    )
    for name, table in TABLES.items():
        columns = ", ".join(("pool INTEGER NOT NULL", "minute INTEGER NOT NULL", *table.columns))
        connection.execute(
            f"CREATE TABLE IF NOT EXISTS {name} ({columns}, PRIMARY KEY ({table.key})) "
            "WITHOUT ROWID"
        )
    for name, column in _missing_columns(connection):
        connection.execute(f"ALTER TABLE {name} ADD COLUMN {column}")
    connection.execute(f"PRAGMA user_version = {VERSION}")


def _missing_columns(connection: sqlite3.Connection) -> list[tuple[str, str]]:
    """Columns, of a table that is not there all of them, that a file of before does not have."""
    missing = []
    for name, table in TABLES.items():
        present = {row[1] for row in connection.execute(f"PRAGMA table_info({name})").fetchall()}
        missing += [(name, one) for one in table.columns if one.partition(" ")[0] not in present]
    return missing


def _oldest(
    connection: sqlite3.Connection, tables: Iterable[str] | None = None
) -> list[tuple[int, int]]:
    """Each pool's oldest minute, in any of these tables (``None``: of all)."""
    oldest: dict[int, int] = {}
    for (pool,) in connection.execute("SELECT id FROM pools").fetchall():
        for table in tables or TABLES:
            query = f"SELECT min(minute) FROM {table} WHERE pool = ?"
            (minute,) = connection.execute(query, (pool,)).fetchone()
            if minute is not None:
                oldest[pool] = min(minute, oldest.get(pool, minute))
    return list(oldest.items())


def _remove(
    connection: sqlite3.Connection,
    pool: int,
    before: int,
    tables: Iterable[str] | None = None,
) -> None:
    for table in tables or TABLES:
        connection.execute(f"DELETE FROM {table} WHERE pool = ? AND minute < ?", (pool, before))


def _pages(connection: sqlite3.Connection) -> tuple[int, int]:
    """Pages of the file, and those of them that are not used."""
    (total,) = connection.execute("PRAGMA page_count").fetchone()
    (free,) = connection.execute("PRAGMA freelist_count").fetchone()
    return total, free


def _page_bytes(connection: sqlite3.Connection) -> int:
    (size,) = connection.execute("PRAGMA page_size").fetchone()
    return int(size)


class _NewerFile(sqlite3.DatabaseError):
    """This version cannot read the file."""


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is what is wrong: for no other reason is it set aside."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    is_damaged = code in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
    return is_damaged or isinstance(error, _NewerFile)
