"""``tidegate replay``: what a policy would have cost on the past, and whom it would have hurt."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.cli import tables
from gateway.cli.base import (
    AsJson,
    Config,
    Plot,
    Sets,
    as_text,
    check_plot,
    load,
    numeric_imports,
    screen,
    write_plot,
)
from gateway.cli.client import ValueRefused
from gateway.terminal import complain, count, duration, figure, out, utc

if TYPE_CHECKING:
    from autoscaler.replay.run import Cut, ReplayedPool
    from autoscaler.replay.score import Score
    from autoscaler.replay.traces import Trace
    from autoscaler.signals.decisions import DecisionFigures

USUAL = ("auto", "reactive", "hpa", "knative", "ahpa", "oracle")
"""Replayed where no policy is named."""
ABOUT_REPLICAS = 12.0
COLD_START_S = 60.0
MOST_REPLICAS = 100_000


def replay(
    context: typer.Context,
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE|POOL",
            help="A CSV or parquet file of demand, or the name of a pool with a stored history.",
        ),
    ],
    policy: Annotated[
        list[str] | None,
        typer.Option(
            "--policy",
            "-p",
            metavar="NAME",
            help="A policy to replay; may be repeated. `all` for every one, `static:N` for N "
            "replicas, `auto:PRICE` for ours with another `prices.violated_second` than 12, "
            "`oracle` for one that knows the future.",
        ),
    ] = None,
    cold_start_s: Annotated[
        float | None,
        typer.Option(
            "--cold-start",
            metavar="SECONDS",
            help="How long a start takes. Without it: as measured of a pool, else 60.",
        ),
    ] = None,
    capacity: Annotated[
        float | None,
        typer.Option(
            metavar="TOKENS/S",
            help="Tokens per second one replica sustains within the SLO. Without it: as learned of "
            "a pool, else of a modelled engine.",
        ),
    ] = None,
    replicas: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Scale the demand to a pool of about N replicas (12 where the engine is "
            "modelled).",
        ),
    ] = None,
    ttft_s: Annotated[
        float, typer.Option("--ttft", metavar="SECONDS", help="TTFT of the SLO.")
    ] = 2,
    itl_s: Annotated[
        float, typer.Option("--itl", metavar="SECONDS", help="ITL of the SLO.")
    ] = 0.05,
    days: Annotated[
        float | None, typer.Option(metavar="N", help="Days to score; without it: all but history.")
    ] = None,
    history_days: Annotated[
        float, typer.Option(metavar="N", help="Days before them that policies may learn from.")
    ] = 7.0,
    min_replicas: Annotated[int, typer.Option("--min", help="Fewest replicas.")] = 1,
    max_replicas: Annotated[
        int | None,
        typer.Option("--max", help="Most replicas; without it: more than the peak needs."),
    ] = None,
    price: Annotated[float, typer.Option(help="Price of a replica-hour.")] = 1.0,
    column: Annotated[
        str | None, typer.Option(metavar="NAME", help="The file's column of requests.")
    ] = None,
    spread: Annotated[
        Literal["even", "poisson"],
        typer.Option(help="How a minute's requests are spread over its seconds."),
    ] = "even",
    seed: Annotated[int, typer.Option(help="Of `--spread poisson`.")] = 0,
    plot: Plot = None,
    as_json: AsJson = False,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Replay past demand through scaling policies: what each would have cost, and whom it would
    have hurt.

    A simulated pool plays the trace second by second. `auto` and `reactive` are the policies that
    `tidegate up` runs; the others are our re-implementations of other products' formulas. A request
    is hurt when its TTFT or its ITL misses the SLO. Rows marked `*` are the frontier: no other has
    both fewer hurt and a lower cost.

    **Examples:** `tidegate replay requests.csv`, `tidegate replay smollm2 -p auto -p hpa`,
    `tidegate replay requests.parquet -p all --cold-start 300 --plot replay.html`
    """
    with numeric_imports("replay"):
        from autoscaler.replay import run, traces
        from autoscaler.replay.engine import ReplicaModel, Slo
        from autoscaler.replay.policies import registry
        from autoscaler.replay.supply import Starts
    check_plot(plot)
    check_range("--cold-start", cold_start_s, 0.0, 86_400.0)
    check_range("--capacity", capacity, 0.001, 1e9)
    check_range("--replicas", replicas, 0.01, MOST_REPLICAS)
    check_range("--ttft", ttft_s, 0.001, 86_400.0)
    check_range("--itl", itl_s, 0.0001, 3_600.0)
    check_range("--days", days, 0.001, 3_650.0)
    check_range("--history-days", history_days, 0.0, 3_650.0)
    check_range("--min", min_replicas, 0, MOST_REPLICAS)
    check_range("--max", max_replicas, max(1, min_replicas), MOST_REPLICAS)
    check_range("--price", price, 0.0, 1e6)
    check_range("--seed", seed, 0, 2**32)
    names = chosen(policy, registry)
    try:
        demand, learned = find_trace(trace, column, config, sets, context.obj.now_s())
        if capacity is None and learned is not None and not demand.counted:
            capacity = learned.capacity_tokens_per_s
        if cold_start_s is None:
            cold_start_s = (learned and learned.lead_s) or COLD_START_S
        slo = Slo(ttft_s=ttft_s, itl_s=itl_s)
        engine: ReplicaModel = run.engine_for(demand)
        if capacity is not None:
            demand, engine = run.at_capacity(demand, capacity)
        pool = run.ReplayedPool(
            engine=engine,
            slo=slo,
            starts=Starts.flat(cold_start_s),
            min_replicas=min_replicas,
            price_per_hour=price,
        )
        part = run.cut(demand, history_days=history_days, days=days)
        if replicas is None and capacity is None:
            replicas = ABOUT_REPLICAS
        if replicas is not None:
            part = run.scale_to(part, pool, replicas)
        pool = run.bounded(part, pool, max_replicas)
        if pool.max_replicas > MOST_REPLICAS:
            raise ValueRefused(
                f"this demand asks for up to {pool.max_replicas:,} replicas, and {MOST_REPLICAS:,} "
                "can be replayed: give a larger --capacity, a smaller --replicas, or a --max"
            )
        known = [one for one in names if not (engine.after_s and one in registry.TOKENS_ONLY)]
        for name in known:
            if name != registry.ORACLE:
                registry.build(name, run.facts_of(part, pool))
    except (traces.TraceError, registry.UnknownPolicyError, ValueError) as error:
        raise ValueRefused(str(error)) from None
    for name in sorted(set(names) - set(known)):
        complain(f"{name} watches tokens, and this trace only counts requests: left out")

    with progress(known) as show:
        scores = [
            play(name, part, pool, spread, seed, lambda done, name=name: show(name, done))  # type: ignore[misc]
            for name in known
        ]
    if as_json:
        out(as_text({"trace": part.played.name, "scores": [as_plain(one) for one in scores]}))
    else:
        out(heading(part, pool, cold_start_s, replicas))
        out(frontier_table(scores).render(screen()))
    if plot is not None:
        write_plot(plot, draw(part, scores, plot.suffix))
    return 0


def check_range(option: str, value: float | None, least: float, most: float) -> None:
    """Refuse a number that is beyond it."""
    if value is not None and not least <= value <= most:
        raise ValueRefused(f"{option} {value:g}: a number from {least:,g} to {most:,g}")


def chosen(policy: Sequence[str] | None, registry: Any) -> list[str]:
    """The names asked for, each once."""
    if not policy:
        known = {*registry.POLICIES, registry.ORACLE}
        return [name for name in USUAL if name in known]
    names: dict[str, None] = {}
    for name in policy:
        every = [*registry.POLICIES, registry.ORACLE] if name == "all" else [name]
        names |= dict.fromkeys(every)
    return list(names)


def find_trace(
    name: str, column: str | None, config: Path | None, sets: list[str] | None, now_s: float
) -> tuple[Trace, DecisionFigures | None]:
    """Demand from a file, or of a pool, with its newest decision that knew a replica's capacity."""
    from autoscaler.replay import traces

    path = Path(name)
    if path.is_file():
        try:
            found = traces.read(path, column)
        except OSError as error:
            raise ValueRefused(f"{path}: {error.strerror or error}") from None
        return (found.binned() if isinstance(found, traces.RequestTrace) else found), None
    if path.suffix in (".csv", ".parquet", ".pq"):
        raise traces.TraceError(f"there is no file {name}")
    return pool_history(name, config, sets, now_s)


def pool_history(
    pool: str, config: Path | None, sets: list[str] | None, now_s: float
) -> tuple[Trace, DecisionFigures | None]:
    """A pool's stored history, and what is known of its replicas."""
    import numpy as np

    from autoscaler.replay import traces
    from autoscaler.signals.decisions import newest_known
    from autoscaler.signals.history import FILE_NAME, HistoryStore

    settings = load(config, sets).settings
    path = settings.state_dir / FILE_NAME
    if not path.is_file():
        raise traces.TraceError(
            f"there is no file {pool}, and no history of pools in {path.parent}"
        )
    kept = settings.autoscaler.history
    store = HistoryStore(path, max_age_s=kept.max_age_s, max_bytes=kept.max_bytes)
    try:
        known = sorted(one.pool for one in store.extents())
        if pool not in known:
            pools = ", ".join(known) or "none"
            raise traces.TraceError(
                f"there is no file {pool}, and pools with a history are: {pools}"
            )
        window = store.read(pool, ("arrivals", "input_tokens", "output_tokens"), None, now_s)
        learned = store.transact(lambda connection: newest_known(connection, pool))
    finally:
        store.close()
    requests, prompts, outputs = (
        np.asarray(window.values[name]) for name in ("arrivals", "input_tokens", "output_tokens")
    )
    counted = not (np.isfinite(prompts).any() and np.isfinite(outputs).any())
    trace = traces.from_rates(
        pool,
        requests,
        None if counted else prompts,
        None if counted else outputs,
        start_s=window.start_s,
    )
    return trace, learned


def play(
    name: str,
    part: Cut,
    pool: ReplayedPool,
    spread: str,
    seed: int,
    show: Callable[[float], None],
) -> Score:
    """One policy's score."""
    from autoscaler.replay import run, traces
    from autoscaler.replay.policies import registry

    how = traces.Spread(spread)
    if name == registry.ORACLE:
        return run.find_oracle(part, pool, spread=how, seed=seed, progress=show)
    policy = registry.build(name, run.facts_of(part, pool))
    return run.replay(
        part.played, policy, pool, run_in_s=part.run_in_s, spread=how, seed=seed, progress=show
    )


@contextmanager
def progress(names: Sequence[str]) -> Iterator[Callable[[str, float], None]]:
    """A bar on standard error, where that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield lambda name, done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    with Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        expand=True,
    ) as bars:
        task = bars.add_task("replaying", total=float(len(names)))
        yield lambda name, done: bars.update(
            task, description=f"replaying {name}", completed=names.index(name) + done
        )


# ── What is printed ───────────────────────────────────────────────────────────────────────────────


def heading(part: Cut, pool: ReplayedPool, cold_start_s: float, replicas: float | None) -> str:
    """What was replayed, in two lines; ``replicas``: that it was scaled to about so many."""
    scored = part.played.part(part.run_in_s, part.played.seconds)
    before = 0 if part.history is None else part.history.seconds
    capacity = pool.capacity_tokens_per_s(scored)
    unit = "requests" if scored.counted and pool.engine.after_s else "tokens"
    scaled = "" if replicas is None else f", scaled to about {count(round(replicas), 'replica')}"
    return (
        f"{scored.name}: {duration(scored.seconds)} scored, {duration(before)} of history before; "
        f"{figure(scored.requests.sum())} requests{scaled}.\n"
        f"A replica sustains {capacity:,.1f} {unit}/s within TTFT {pool.slo.ttft_s:g} s and ITL "
        f"{pool.slo.itl_s:g} s, and starts in {cold_start_s:g} s; "
        f"{pool.min_replicas} to {count(pool.max_replicas, 'replica')}.\n\n"
    )


def frontier_table(scores: Sequence[Score]) -> tables.Table:
    """A row for each policy, in the order asked for."""
    from autoscaler.replay.score import frontier

    best = frontier(scores)
    table = tables.Table(
        ("POLICY", "HURT", "SECONDS", "REPLICA-HOURS", "COST", "GOODPUT/REPLICA-HOUR")
        + ("WAIT P99", "LONGEST", "STARTS")
    )
    for score in scores:
        table.add(
            score.policy + (" *" if score.policy in best else ""),
            f"{100 * score.violated_fraction:.3f} %",
            f"{100 * score.violated_s / max(1, score.seconds):.2f} %",
            f"{score.replica_hours:,.1f}",
            f"{score.cost:,.1f}",
            f"{score.goodput_per_replica_hour:,.0f}",
            duration(score.wait_s["p99"]),
            duration(score.wait_s["max"]),
            f"{score.started:,}",
        )
    return table


def as_plain(score: Score) -> dict[str, Any]:
    """A score for scripts, without its minutes."""
    return {
        "policy": score.policy,
        "requests": score.requests,
        "violations": score.violations,
        "violated_fraction": score.violated_fraction,
        "seconds": score.seconds,
        "violated_s": score.violated_s,
        "replica_hours": score.replica_hours,
        "cost": score.cost,
        "goodput_per_replica_hour": score.goodput_per_replica_hour,
        "wait_s": score.wait_s,
        "started": score.started,
        "cancelled": score.cancelled,
    }


# ── What is drawn ─────────────────────────────────────────────────────────────────────────────────


def draw(part: Cut, scores: Sequence[Score], suffix: str) -> str:
    """The frontier and each policy's course: one SVG, or an HTML page."""
    from autoscaler.replay.score import frontier
    from gateway import charts

    start_s = part.played.start_s
    if start_s is not None:
        start_s += part.run_in_s
    best = frontier(scores)
    dots = [
        charts.Dot(
            name=score.policy,
            x=score.cost,
            y=100 * score.violated_fraction,
            colour=charts.COLOURS[0 if score.policy in best else 6],
            strong=score.policy in best,
        )
        for score in scores
    ]
    title = f"{part.played.name}: violations against cost"
    overview = charts.scatter(
        dots, title=title, x_name="cost (replica-hours at their price)", y_name="requests hurt, %"
    )
    courses = [course(score, start_s) for score in scores]
    if suffix == ".svg":
        return charts.stacked([overview, *courses])
    table = frontier_table(scores)
    blocks = [("Frontier", overview + charts.html_table(table.headings, table.texts()))]
    blocks += [(score.policy, picture) for score, picture in zip(scores, courses, strict=True)]
    return charts.page(f"Replay of {html.unescape(part.played.name)}", blocks)


def course(score: Score, start_s: float | None) -> str:
    """Demand, forecast, replicas and violations of one policy over time."""
    from gateway import charts

    minutes = score.minutes
    all_ready = [a + b for a, b in zip(minutes.ready, minutes.starting, strict=True)]
    series: list[charts.Line | charts.Band] = [
        charts.Line(name="with starting", values=all_ready, colour=charts.COLOURS[6], steps=True),
        charts.Line(
            name="ready", values=minutes.ready, colour=charts.COLOURS[0], steps=True, filled=True
        ),
    ]
    if minutes.provisioned:
        series.append(
            charts.Band(
                name="forecast",
                low=minutes.expected,
                high=minutes.provisioned,
                colour=charts.COLOURS[1],
            )
        )
    series.append(charts.Line(name="demand", values=minutes.demand, colour=charts.INK))
    # Those of a minute are hurt in a later one, so they are no part of that one's requests.
    hurt = [violations / 60 for violations in minutes.violations]
    panels = [
        charts.Panel(title="replicas", series=series),
        charts.Panel(
            title="requests hurt",
            unit="a second",
            series=[charts.Line(name="hurt", values=hurt, colour=charts.COLOURS[4], filled=True)],
            height=70,
        ),
    ]
    title = (
        f"{score.policy}: {100 * score.violated_fraction:.3f} % hurt, "
        f"{score.replica_hours:,.1f} replica-hours"
    )

    def moment(at_s: float) -> str:
        return utc((start_s or 0.0) + at_s, "%d %b %H:%M")

    return charts.over_time(
        panels, step_s=60.0, title=title, label=None if start_s is None else moment
    )
