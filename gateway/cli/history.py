"""``tidegate history``: the past of pools, shown and exported (``history_import`` imports it).

Where a Tidegate runs with this state directory it is asked, else the verbs work on the file
themselves.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaler.signals.series import MINUTE_S
from gateway.cli import client, tables
from gateway.cli.base import Admin, AsJson, Config, PoolName, Sets, as_text, load, screen
from gateway.cli.client import Listener, RequestRefused, ValueRefused
from gateway.cli.history_files import BadTable, write_table
from gateway.terminal import NONE, ago, count, duration, figure, out, rounded, size

if TYPE_CHECKING:
    from gateway.admin.history import Histories
    from gateway.admin.schema import (
        DecisionsAnswer,
        FillAnswer,
        HistoryAnswer,
        HistoryListing,
        ScoreAnswer,
    )

READ_MINUTES = 7 * 24 * 60
BARS = "▁▂▃▄▅▆▇█"
_UNITS_S = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3_600.0, "d": 86_400.0, "w": 604_800.0}

history_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown")

Since = Annotated[
    str,
    typer.Option(
        "--since", metavar="TIME", help="How long ago (90m, 36h, 30d, 4w), or a date: from then on."
    ),
]
Until = Annotated[
    str | None,
    typer.Option("--until", metavar="TIME", help="The same, for the end. Without it: now."),
]
SeriesNames = Annotated[
    str | None,
    typer.Option("--series", metavar="NAME,NAME", help="Only these series."),
]


# ── Whose history ─────────────────────────────────────────────────────────────────────────────────


class RemoteHistory:
    """That of a Tidegate that runs."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener

    def listing(self) -> HistoryListing:
        """Of which pools there is anything."""
        from gateway.admin.operations import HISTORY

        found: HistoryListing = client.ask(self._listener, HISTORY)
        return found

    def read(self, pool: str, query: dict[str, Any]) -> HistoryAnswer:
        """A part of a pool's past, no longer than an answer may be."""
        from gateway.admin.operations import POOL_HISTORY

        found: HistoryAnswer = client.ask(self._listener, POOL_HISTORY, query=query, pool=pool)
        return found

    def fill(self, pool: str, body: dict[str, Any]) -> FillAnswer:
        """Add to a pool's past."""
        from gateway.admin.operations import FILL_HISTORY

        found: FillAnswer = client.ask(self._listener, FILL_HISTORY, body, pool=pool)
        return found

    def decisions(self, pool: str, at_s: float, limit: int) -> DecisionsAnswer:
        """The decision that held at a moment, and those around it."""
        from gateway.admin.operations import DECISIONS

        query = {"at_s": at_s, "limit": limit}
        found: DecisionsAnswer = client.ask(self._listener, DECISIONS, query=query, pool=pool)
        return found

    def score(self, pool: str, from_s: float) -> ScoreAnswer:
        """What its decisions cost and brought since then."""
        from gateway.admin.operations import SCORE

        found: ScoreAnswer = client.ask(self._listener, SCORE, query={"from_s": from_s}, pool=pool)
        return found


class LocalHistory:
    """The file, in this process."""

    def __init__(self, histories: Histories) -> None:
        self._histories = histories

    def listing(self) -> HistoryListing:
        """Of which pools there is anything."""
        found: HistoryListing = self._do(self._histories.listing)
        return found

    def read(self, pool: str, query: dict[str, Any]) -> HistoryAnswer:
        """A part of a pool's past."""
        from gateway.admin.schema import HistoryQuery

        asked = HistoryQuery.model_validate(query)
        found: HistoryAnswer = self._do(lambda: self._histories.read(pool, asked))
        return found

    def fill(self, pool: str, body: dict[str, Any]) -> FillAnswer:
        """Add to a pool's past."""
        from gateway.admin.schema import FillRequest

        asked = FillRequest.model_validate(body)
        found: FillAnswer = self._do(lambda: self._histories.fill(pool, asked))
        return found

    def decisions(self, pool: str, at_s: float, limit: int) -> DecisionsAnswer:
        """The decision that held at a moment, and those around it."""
        from gateway.admin.schema import DecisionsQuery

        query = DecisionsQuery(at_s=at_s, limit=limit)
        found: DecisionsAnswer = self._do(lambda: self._histories.decisions(pool, query))
        return found

    def score(self, pool: str, from_s: float) -> ScoreAnswer:
        """What its decisions cost and brought since then."""
        from gateway.admin.schema import ScoreQuery

        query = ScoreQuery(from_s=from_s)
        found: ScoreAnswer = self._do(lambda: self._histories.score(pool, query))
        return found

    def _do(self, call: Callable[[], Any]) -> Any:
        from gateway.admin.schema import AdminError

        try:
            return call()
        except AdminError as problem:
            kind = ValueRefused if problem.code in client.MISTAKES else RequestRefused
            raise kind(str(problem)) from None


History = RemoteHistory | LocalHistory


def open_history(
    now_s: Callable[[], float],
    admin: str | None,
    config: Path | None,
    sets: list[str] | None,
    *,
    make: bool = False,
) -> History:
    """That of the listener that is named, of what runs with this state directory, or else the
    file in it. ``make``: the directory, where it is not there yet."""
    from gateway.compose.listeners import find_running
    from gateway.compose.process import check_writable

    loaded = load(config, sets)
    settings = loaded.settings
    if admin is not None or find_running(settings.state_dir) is not None:
        return RemoteHistory(client.find_listener(admin, lambda: settings))
    from autoscaler.signals.history import FILE_NAME, HistoryStore
    from gateway.admin.history import Histories

    if not settings.state_dir.is_dir() and make:
        check_writable(loaded, "state_dir", settings.state_dir)
    elif not settings.state_dir.is_dir():
        raise RequestRefused(f"there is no history: there is no directory {settings.state_dir}")
    kept = settings.autoscaler.history
    store = HistoryStore(
        settings.state_dir / FILE_NAME, max_age_s=kept.max_age_s, max_bytes=kept.max_bytes
    )
    return LocalHistory(Histories(store, lambda: settings.pools, now_s))


def read_all(
    history: History, pool: str, from_s: float, until_s: float, series: str | None
) -> tuple[str, float, dict[str, list[float | None]]]:
    """A pool's name, the Unix time of its first minute, and its series; read in parts."""
    span_s = READ_MINUTES * MINUTE_S
    extents = history.listing().pools
    oldest_s = min((one.from_s for one in extents), default=until_s)
    from_s = max(from_s, oldest_s)
    name, start_s = pool, until_s
    found: dict[str, list[float | None]] = {}
    while True:
        query = {"from_s": from_s, "until_s": min(from_s + span_s, until_s)}
        part = history.read(pool, query | ({"series": series} if series else {}))
        name = part.pool
        length = max(map(len, part.series.values()), default=0)
        if not found and length:
            start_s = part.start_s
        for one, values in part.series.items():
            kept = found.setdefault(one, [])
            # A part may begin later than it was asked for: nothing is known between.
            missing = round((part.start_s - start_s) / MINUTE_S) - len(kept) if length else 0
            kept += [None] * max(0, missing) + list(values)
        from_s += span_s
        if from_s >= until_s:
            return name, start_s, found


def span(text: str) -> float | None:
    """The seconds of ``90m``, ``36h`` or ``30d``; ``None`` for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(s|m|min|h|d|w)", text.strip())
    return None if match is None else float(match[1]) * _UNITS_S[match[2]]


def moment(text: str, now_s: float) -> float:
    """Unix time of ``30d`` (ago), of a date, of a time of day (the last one, UTC), or as it is. A
    usage error for anything else."""
    said = text.strip()
    if (before_s := span(said.removesuffix(" ago"))) is not None:
        return now_s - before_s
    try:
        if re.fullmatch(r"\d{1,2}:\d\d(:\d\d)?", said):
            clock = time.fromisoformat(f"0{said}" if said[1] == ":" else said)
            at = datetime.combine(datetime.fromtimestamp(now_s, UTC), clock, UTC)
            return at.timestamp() - (86_400.0 if at.timestamp() > now_s else 0.0)
        at = datetime.fromisoformat(said)
    except ValueError:
        pass
    else:
        return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if not 0 <= number < 1e12:
        raise typer.BadParameter(
            f"{text!r} is no time: 90m, 36h, 30d, 4w, 14:05, or 2026-11-30T09:00Z"
        )
    return number


# ── show, export ──────────────────────────────────────────────────────────────────────────────────


@history_app.command("show")
def history_show(
    context: typer.Context,
    pool: Annotated[
        str | None, typer.Argument(metavar="POOL", help="Without it: all pools.")
    ] = None,
    since: Since = "1d",
    until: Until = None,
    series: SeriesNames = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Show of which pools there is a past, or what it is of one.

    A minute that Tidegate did not see whole is unknown, which is not zero. KNOWN is the share of
    minutes that are known; TREND goes from the oldest to the newest.

    **Examples:** `tidegate history show`, `tidegate history show smollm2 --since 7d`,
    `tidegate history show smollm2 --series arrivals --json`
    """
    history = open_history(context.obj.now_s, admin, config, sets)
    now_s = context.obj.now_s()
    if pool is None:
        listing = history.listing()
        out(as_text(listing) if as_json else listing_text(listing, screen(), now_s))
        return 0
    until_s = now_s if until is None else moment(until, now_s)
    name, start_s, found = read_all(history, pool, moment(since, now_s), until_s, series)
    if as_json:
        shown = {"pool": name, "start_s": start_s, "step_s": 60.0, "series": found}
        out(json.dumps(shown) + "\n")
    else:
        out(history_text(name, start_s, found, screen(), now_s))
    return 0


@history_app.command("export")
def history_export(
    context: typer.Context,
    pool: PoolName,
    file: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="NAME.csv or NAME.parquet. Without it: CSV, here."),
    ] = None,
    since: Since = "520w",
    until: Until = None,
    series: SeriesNames = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Write a pool's past to a file, a row a minute; what is unknown is empty.

    `tidegate history import POOL --file FILE` reads it again.

    **Examples:** `tidegate history export smollm2 smollm2.parquet`,
    `tidegate history export smollm2 --since 7d --series arrivals > arrivals.csv`
    """
    if as_json and file is None:
        raise typer.BadParameter("--json says what was written to FILE, and there is none")
    history = open_history(context.obj.now_s, admin, config, sets)
    now_s = context.obj.now_s()
    until_s = now_s if until is None else moment(until, now_s)
    name, start_s, found = read_all(history, pool, moment(since, now_s), until_s, series)
    minutes = max(map(len, found.values()), default=0)
    try:
        write_table(file, start_s, found)
    except (BadTable, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ValueRefused(f"{file}: {reason}") from None
    if as_json:
        out(as_text({"pool": name, "file": str(file), "start_s": start_s, "minutes": minutes}))
    elif file is not None:
        out(f"{file}: {minutes:,} minutes of {name}.\n")
    return 0


# ── as text ──────────────────────────────────────────────────────────────────────────────────────


def listing_text(listing: HistoryListing, screen: tables.Screen, now_s: float) -> str:
    """Of which pools ``tidegate history show`` knows the past."""
    head = (
        f"{listing.path}  {size(listing.size_bytes)} of {size(listing.max_bytes)}, kept for "
        f"{duration(listing.max_age_s)}\n"
    )
    if not listing.pools:
        return f"{head}\nNothing is kept yet: the first whole minute is the first entry.\n"
    table = tables.Table(("POOL", "FROM", "UNTIL", "MINUTES", "KNOWN"))
    for one in listing.pools:
        total = max(1.0, (one.until_s - one.from_s) / 60)
        table.add(
            one.pool, ago(one.from_s, now_s), ago(one.until_s, now_s), figure(one.minutes),
            f"{100 * one.minutes / total:.0f}%",
        )  # fmt: skip
    return f"{head}\n{table.render(screen)}"


def history_text(
    pool: str,
    start_s: float,
    series: Mapping[str, Sequence[float | None]],
    screen: tables.Screen,
    now_s: float,
) -> str:
    """A pool's past: each series in a line."""
    length = max(map(len, series.values()), default=0)
    if not length:
        return f"{pool}: nothing is known of that time.\n"
    table = tables.Table(("SERIES", "KNOWN", "MEAN", "MAX", "LAST", "TREND"))
    for name, values in series.items():
        known = [value for value in values if value is not None]
        if not known:
            table.add(name, "0%", NONE, NONE, NONE, "")
            continue
        table.add(
            name, f"{100 * len(known) / length:.0f}%", rounded(sum(known) / len(known)),
            rounded(max(known)), rounded(known[-1]), sparkline(values),
        )  # fmt: skip
    title = f"{pool}: {count(length, 'minute')} from {ago(start_s, now_s)} on"
    return f"{title}\n\n{table.render(screen)}"


def sparkline(values: Sequence[float | None], width: int = 40) -> str:
    """Means of parts as bars from zero to the largest; nothing where none is known."""
    width = min(width, len(values))
    means = []
    for part in range(width):
        piece = values[part * len(values) // width : (part + 1) * len(values) // width]
        known = [value for value in piece if value is not None]
        means.append(sum(known) / len(known) if known else None)
    most = max((mean for mean in means if mean is not None), default=0.0) or 1.0
    return "".join(
        " " if mean is None else BARS[min(len(BARS) - 1, int(max(0.0, mean) / most * len(BARS)))]
        for mean in means
    )
