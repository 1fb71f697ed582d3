"""``tidegate history import``: the past of a pool from a Prometheus, a file or another Tidegate.

It comes to this process first, and goes into the history in parts.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaler.signals.backfill.queries import PRESETS, Queries, make_queries
from autoscaler.signals.series import MINUTE_S, SERIES
from gateway.cli import client, tables
from gateway.cli.base import Admin, AsJson, Config, PoolName, Sets, as_text, load, screen
from gateway.cli.client import RequestRefused, Unreachable, ValueRefused
from gateway.cli.history import (
    History,
    RemoteHistory,
    Until,
    moment,
    open_history,
    read_all,
)
from gateway.cli.history_files import BadTable, Points, read_points
from gateway.cli.model import ProgressBar
from gateway.terminal import count, figure, out, utc

if TYPE_CHECKING:
    from autoscaler.signals.backfill.prometheus import Prometheus

FILL_MINUTES = 720
"""Of what goes into the history at once: half a day."""
PROMETHEUS_TOKEN = "TIDEGATE_PROMETHEUS_TOKEN"


def history_import(
    context: typer.Context,
    pool: PoolName,
    prometheus: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="From this Prometheus, or what speaks its API. Its bearer token is in "
            "`TIDEGATE_PROMETHEUS_TOKEN`.",
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="From a CSV or parquet file: what `history export` wrote, requests and tokens by "
            "time, or a row for each request.",
        ),
    ] = None,
    tidegate: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="From another Tidegate, by its admin listener; its token is in "
            "`TIDEGATE_ADMIN_TOKEN`.",
        ),
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long ago (36h, 30d, 4w), or a date. Default: 30d of a Prometheus, else all.",
        ),
    ] = None,
    until: Until = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"Whose metrics to look for: {', '.join(PRESETS)}. Without it: each in turn.",
        ),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="MATCHERS",
            help='Which of them are the pool\'s, as PromQL selects: `model_name="m",env="prod"`. '
            "Default: its name as `pool` (Tidegate) or `model_name` (vLLM).",
        ),
    ] = None,
    query: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SERIES=PROMQL",
            help="A query of one's own for a series, whose value is that of the minute that ends "
            "then: `arrivals=sum(increase(my_requests_total[1m]))`. May be repeated.",
        ),
    ] = None,
    header: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME:VALUE", help="A header for the Prometheus. May be repeated."),
    ] = None,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The file's column with the requests.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="When the file begins, where its times do not say."),
    ] = None,
    from_pool: Annotated[
        str | None,
        typer.Option(metavar="POOL", help="The pool's name in the other Tidegate, if another."),
    ] = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Add to a pool's past what a Prometheus, a file or another Tidegate knows of it.

    What the pool's own history knows stays as it is, and what neither knows stays unknown. What is
    older than `autoscaler.history.max_age_s` is left out.

    **Examples:**
    `tidegate history import smollm2 --prometheus http://prometheus:9090 --since 14d`,
    `tidegate history import chat --prometheus http://mimir/prometheus --match
    'model_name="Qwen/Qwen3-8B"' --header X-Scope-OrgID:team`,
    `tidegate history import smollm2 --file smollm2.parquet`,
    `tidegate history import chat --tidegate http://node-2:8001`
    """
    if sum(one is not None for one in (prometheus, file, tidegate)) != 1:
        raise typer.BadParameter("one of --prometheus, --file and --tidegate is needed")
    now_s = context.obj.now_s()
    until_s = now_s if until is None else moment(until, now_s)
    from_s = moment(since or ("30d" if prometheus else "520w"), now_s)
    first, end = math.ceil(max(0.0, from_s) / MINUTE_S), int(until_s // MINUTE_S)
    if first >= end:
        raise typer.BadParameter("--since is not before --until")
    history = open_history(context.obj.now_s, admin, config, sets, make=True)
    with ProgressBar(f"import {pool}") as bar:
        if prometheus is not None:
            own = _pairs(query, "=", "--query SERIES=PROMQL")
            headers = _pairs(header, ":", "--header NAME:VALUE")
            found = _from_prometheus(
                prometheus, headers, pool, metrics, match, own, first, end, bar
            )
        elif file is not None:
            found = _from_file(file, column, None if start is None else moment(start, now_s))
        else:
            there = RemoteHistory(
                client.find_listener(tidegate, lambda: load(config, sets).settings)
            )
            try:
                found = _from_tidegate(there, from_pool or pool, first * MINUTE_S, end * MINUTE_S)
            except Unreachable:
                raise ValueRefused(
                    f"--tidegate {tidegate}: no admin listener of a Tidegate answers there"
                ) from None
        found = {
            series: kept
            for series, points in found.items()
            if (kept := {at: value for at, value in points.items() if first <= at < end})
        }
        if not found:
            raise RequestRefused(f"nothing is known there of {pool} in that time")
        name, minutes = _write(history, pool, found, bar)
    at = [minute for points in found.values() for minute in points]
    answer = {
        "pool": name,
        "from_s": float(min(at) * MINUTE_S),
        "until_s": float((max(at) + 1) * MINUTE_S),
        "minutes": minutes,
        "series": {series: len(points) for series, points in found.items()},
    }
    out(as_text(answer) if as_json else imported_text(answer, screen()))
    return 0


def _pairs(given: list[str] | None, sign: str, form: str) -> dict[str, str]:
    """Names and values; a usage error where one is not of that form."""
    found = {}
    for text in given or ():
        name, middle, value = text.partition(sign)
        if not middle or not name.strip() or not value.strip():
            raise typer.BadParameter(f"{text!r} is not {form}")
        found[name.strip()] = value.strip()
    return found


def _from_prometheus(
    url: str,
    headers: Mapping[str, str],
    pool: str,
    metrics: str | None,
    match: str | None,
    own: Mapping[str, str],
    first: int,
    end: int,
    bar: ProgressBar,
) -> dict[str, Points]:
    from autoscaler.signals.backfill.prometheus import Prometheus, PrometheusError

    if metrics is not None and metrics not in PRESETS:
        raise typer.BadParameter(f"--metrics: {metrics!r} is none of {', '.join(PRESETS)}")
    if unknown := sorted(own.keys() - set(SERIES)):
        raise typer.BadParameter(
            f"--query: there is no series {unknown[0]!r}; there are {', '.join(SERIES)}"
        )

    def show(series: str, done: int, count: int) -> None:
        bar.show_part(series, done, count, f"{done} of {count} series")

    token = os.environ.get(PROMETHEUS_TOKEN, "").strip() or None
    try:
        with contextlib.closing(Prometheus(url, token=token, headers=headers)) as server:
            queries = _choose(server, pool, metrics, match, own, first, end)
            return server.read(queries, first, end, show)
    except PrometheusError as error:
        raise RequestRefused(str(error)) from None


def _choose(
    server: Prometheus,
    pool: str,
    metrics: str | None,
    match: str | None,
    own: Mapping[str, str],
    first: int,
    end: int,
) -> Queries:
    """The queries of the metrics that are meant, or that the server has."""
    if metrics is not None:
        return make_queries(metrics, pool, match=match, own=own)
    for preset in PRESETS:
        if server.find(make_queries(preset, pool, match=match)["arrivals"], first, end):
            return make_queries(preset, pool, match=match, own=own)
    if not own:
        raise RequestRefused(
            f"it has no metrics of {pool} in that time, neither Tidegate's nor an engine's: "
            "--match says how they are labelled, --query which others to use"
        )
    return make_queries(None, pool, own=own)


def _from_file(file: Path, column: str | None, start_s: float | None) -> dict[str, Points]:
    try:
        return read_points(file, column=column, start_s=start_s)
    except BadTable as error:
        raise ValueRefused(str(error)) from None
    except OSError as error:
        raise ValueRefused(f"--file {file}: {error.strerror or error}") from None


def _from_tidegate(
    there: RemoteHistory, pool: str, from_s: float, until_s: float
) -> dict[str, Points]:
    _, start_s, series = read_all(there, pool, from_s, until_s, None)
    first = round(start_s / MINUTE_S)
    return {
        name: {first + at: value for at, value in enumerate(values) if value is not None}
        for name, values in series.items()
    }


def _write(
    history: History, pool: str, found: Mapping[str, Points], bar: ProgressBar
) -> tuple[str, int]:
    """Put it into the history, in parts. Returns the pool's name and how many minutes were new
    enough."""
    minutes = sorted({minute for points in found.values() for minute in points})
    parts = sorted({minute // FILL_MINUTES for minute in minutes})
    name, kept = pool, 0
    for done, part in enumerate(parts):
        bar.show_part("writing", done, len(parts), f"{done} of {len(parts)} parts")
        first = part * FILL_MINUTES
        grid = range(first, first + FILL_MINUTES)
        series = {one: [points.get(at) for at in grid] for one, points in found.items()}
        answer = history.fill(pool, {"start_s": float(first * MINUTE_S), "series": series})
        name, kept = answer.pool, kept + answer.minutes
    return name, kept


def imported_text(answer: Mapping[str, Any], screen: tables.Screen) -> str:
    """What ``tidegate history import`` brought."""
    table = tables.Table(("SERIES", "MINUTES"))
    for name, minutes in answer["series"].items():
        table.add(name, figure(minutes))
    return (
        f"{answer['pool']}: {count(answer['minutes'], 'minute')} of {utc(answer['from_s'])} to "
        f"{utc(answer['until_s'])}\n\n{table.render(screen)}"
    )
