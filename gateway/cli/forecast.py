"""``tidegate forecast``: the demand of a pool to come, and how good forecasts of its past were."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoscaler.signals.rates import FINE_STEP_S, MINUTES_MOST
from autoscaler.signals.series import MINUTE_S, WORK, arrived_tokens_per_s
from gateway.cli import tables
from gateway.cli.base import (
    Admin,
    AsJson,
    Config,
    Plot,
    PoolName,
    Sets,
    as_text,
    check_plot,
    load,
    numeric_imports,
    screen,
    write_plot,
)
from gateway.cli.client import RequestRefused, ValueRefused
from gateway.cli.history import open_history, read_all, span
from gateway.terminal import NONE, ago, complain, count, duration, one_line, out, rounded, utc

if TYPE_CHECKING:
    from autoscaler.policy.outlook import Ahead, OutlookMaker
    from autoscaler.types import Outlook
    from forecaster.backtest import BacktestScore
    from forecaster.types import Floats, History
    from gateway.admin.schema import DecisionEntry
    from gateway.cli.history import History as StoredHistory

LEAD_S = 60.0
"""Assumed as long as no start was measured."""
MOST_HORIZON_S = 86_400.0
SHOWN_STEPS = (1, 5, 15, 60, 180, 360, 720, 1_440)
SHOWN_LEVELS = (0.05, 0.5, 0.95, 0.99)
HIGHEST_LEVELS = (0.5, 0.95)
BACKTEST_LEVELS = (0.05, 0.5, 0.95)
BACKTEST_LEADS = (1, 15, 60)
BACKTEST_LEAST_STEPS = 180
TRUSTED_FROM_STEPS = 2 * 1_440
"""Where a backtest begins, if there is as much of the history after it."""
NEWEST_S = 300.0
"""A decision that is older says nothing of now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAhead:
    """All that is said of a pool."""

    pool: str
    unit: str
    demand: History
    """What the forecast was made of: as much of the past as production looks at."""
    lead_s: float
    measured: bool
    """Whether the lead is, of the pool's starts."""
    outlook: Outlook
    ahead: Ahead
    horizon_steps: int
    decision: DecisionEntry | None
    """The newest, if it is of now."""
    scores: Sequence[BacktestScore] = ()
    no_backtest: str = ""


def forecast(
    context: typer.Context,
    pool: PoolName,
    horizon: Annotated[
        str, typer.Option(metavar="TIME", help="How far ahead: 30m, 6h, 24h at most.")
    ] = "24h",
    lead: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="How long a replica takes until it serves: 90s, 5m. Without it: as the newest "
            "decision has it, which is measured.",
        ),
    ] = None,
    backtest: Annotated[
        bool,
        typer.Option("--backtest", help="Also forecast points of its past, and say how it was."),
    ] = False,
    origins: Annotated[
        int, typer.Option(help="Points of the past of `--backtest`.", min=10, max=2_000)
    ] = 60,
    plot: Plot = None,
    as_json: AsJson = False,
    admin: Admin = None,
    config: Config = None,
    sets: Sets = None,
) -> int:
    """Show what demand is expected of a pool, and whether that is trusted.

    It is what `tidegate up` makes of the same history, with the same models: which periods it finds
    in it, which models have how much of the say, the quantiles of the demand of each minute ahead,
    and of the highest until then, which is what replicas are started for. As long as the forecast
    is not trusted the pool is scaled by reaction alone, and TRUSTED says why. It works beside a
    running Tidegate and without one, from the file.

    `--backtest` asks the forecast, the last value and the value of a day ago at points spread over
    the past, with what was known then. In % of the mean demand: WAPE is the error of the median,
    PINBALL the loss of a quantile. COVERED is how often what came was within the quantile 0.95, and
    should be 95%; HIGHEST is the same for the highest demand until then.

    **Examples:** `tidegate forecast smollm2`, `tidegate forecast smollm2 --horizon 6h --backtest`,
    `tidegate forecast smollm2 --plot forecast.html`, `tidegate forecast smollm2 --json`
    """
    horizon_s = _span("--horizon", horizon, MINUTE_S, MOST_HORIZON_S)
    lead_s = None if lead is None else _span("--lead", lead, 1.0, MOST_HORIZON_S / 4)
    check_plot(plot)
    now_s = context.obj.now_s()
    with numeric_imports("forecast"):
        from autoscaler.control.slow_models import fit, missing
        from autoscaler.policy.outlook import OutlookMaker
        from autoscaler.settings import hints_of
    settings = load(config, sets).settings
    try:
        stored = open_history(context.obj.now_s, admin, config, sets)
        name, unit, past = demand_of(stored, pool, now_s, all_of_it=backtest)
    except RequestRefused as error:
        raise ValueRefused(str(error)) from None
    decision = newest_decision(stored, name, now_s, past)
    maker = OutlookMaker(settings.autoscaler.forecast.history_least_s)
    maker.hints = hints_of(settings.pools).get(name, ())
    slow = settings.autoscaler.forecast.slow_models
    for line in missing(slow):
        complain(line)
    maker.slow = fit(slow, past)
    found = look(
        name, unit, past, decision, maker, now_s, lead_s, round(horizon_s / MINUTE_S),
        origins if backtest else 0,
    )  # fmt: skip
    out(as_text(as_plain(found)) if as_json else forecast_text(found, screen(), now_s))
    if plot is not None:
        write_plot(plot, draw(found, plot.suffix))
    return 0


def _span(option: str, text: str, least_s: float, most_s: float) -> float:
    found = span(text)
    if found is None or not least_s <= found <= most_s:
        raise typer.BadParameter(
            f"{option} {text}: a time like 15m or 6h, from {duration(least_s)} to "
            f"{duration(most_s)}"
        )
    return found


# ── What it is made of ────────────────────────────────────────────────────────────────────────────


def demand_of(
    stored: StoredHistory, pool: str, now_s: float, *, all_of_it: bool
) -> tuple[str, str, History]:
    """A pool's name, the unit of its demand, and the demand by minute: until the last minute that
    is known. Where only requests were counted it is of requests."""
    import numpy as np

    from forecaster.types import History

    from_s = 0.0 if all_of_it else now_s - (MINUTES_MOST + 1) * MINUTE_S
    series = ",".join(("arrivals", *WORK))
    name, start_s, found = read_all(stored, pool, from_s, now_s, series)
    columns = {
        one: [math.nan if value is None else value for value in values]
        for one, values in found.items()
    }
    unit, values = "tokens/s", np.array(arrived_tokens_per_s(columns) if columns else [])
    if not np.isfinite(values).any() and columns:
        unit, values = "requests/s", np.array(columns["arrivals"]) / MINUTE_S
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        raise ValueRefused(f"{name}: no minute of its demand is known; see `tidegate history`")
    first, end = int(known[0]), int(known[-1]) + 1
    return name, unit, History(values=values[first:end], start_s=start_s + first * MINUTE_S)


def newest_decision(
    stored: StoredHistory, pool: str, now_s: float, past: History
) -> DecisionEntry | None:
    """The newest decision; where none is of now, that at the end of the history."""
    for at_s in (now_s, past.end_s or now_s):
        try:
            return stored.decisions(pool, at_s, 1).decision
        except (RequestRefused, ValueRefused):
            continue
    return None


def look(
    pool: str,
    unit: str,
    past: History,
    decision: DecisionEntry | None,
    maker: OutlookMaker,
    now_s: float,
    lead_s: float | None,
    horizon_steps: int,
    origins: int,
) -> PoolAhead:
    """What production would expect at the end of this history; with ``origins``, what it would have
    expected at so many points of it."""
    import numpy as np

    from forecaster.types import History

    measured_s = None if decision is None or decision.inputs is None else decision.inputs.lead_s
    used_s = lead_s or measured_s or LEAD_S
    values = past.values[-MINUTES_MOST:]
    demand = History(values=values, start_s=(past.end_s or now_s) - len(values) * past.step_s)
    # The grid of seconds, of which short leads are forecast, is not kept: then it is by minute.
    nothing = History(values=np.empty(0), step_s=FINE_STEP_S)
    outlook = maker.make(demand, nothing, max(used_s, MINUTE_S), now_s)
    while maker.rehearsing:
        outlook = maker.make(demand, nothing, max(used_s, MINUTE_S), now_s)
    scores: Sequence[BacktestScore] = ()
    missing = ""
    if origins and np.isfinite(past.values).sum() < BACKTEST_LEAST_STEPS:
        missing = (
            f"{duration(float(np.isfinite(past.values).sum()) * MINUTE_S)} of demand are known; a "
            f"backtest needs {duration(BACKTEST_LEAST_STEPS * MINUTE_S)}"
        )
    elif origins:
        scores = score_past(past, math.ceil(max(used_s, MINUTE_S) / MINUTE_S), origins)
    return PoolAhead(
        pool=pool,
        unit=unit,
        demand=demand,
        lead_s=used_s,
        measured=lead_s is None and measured_s is not None,
        outlook=outlook,
        ahead=maker.ahead(demand, horizon_steps),
        horizon_steps=horizon_steps,
        decision=decision if decision and now_s - decision.at_s < NEWEST_S else None,
        scores=scores,
        no_backtest=missing,
    )


def score_past(past: History, lead_steps: int, origins: int) -> list[BacktestScore]:
    """Of the models that the mix begins with, the last value, and the value of a day ago."""
    from forecaster.backtest import backtest
    from forecaster.models.automatic import Automatic
    from forecaster.models.last_value import LastValue
    from forecaster.models.seasonal import SeasonalNaive

    length = len(past.values)
    if sys.stderr.isatty():
        complain(f"forecasting {origins} points of the past; that takes up to a minute")
    leads = {lead for lead in (*BACKTEST_LEADS, lead_steps) if lead <= length // 8}
    return backtest(
        past,
        [Automatic(), LastValue(), SeasonalNaive()],
        leads=sorted(leads),
        levels=BACKTEST_LEVELS,
        origins=origins,
        first_step=min(max(length // 4, TRUSTED_FROM_STEPS), length // 2),
        train_steps=MINUTES_MOST,
    )


# ── As text ───────────────────────────────────────────────────────────────────────────────────────


def forecast_text(found: PoolAhead, screen: tables.Screen, now_s: float) -> str:
    """What is expected, by what, and whether it is trusted."""
    begins_s = found.demand.end_s or now_s
    known_s = float(sum(map(math.isfinite, found.demand.values.tolist()))) * MINUTE_S
    made, outlook = found.ahead, found.outlook
    periods = ", ".join(duration(one * MINUTE_S) for one in made.periods)
    parts = sorted(outlook.weights.items(), key=lambda one: -one[1])
    models = ", ".join(f"{name} {weight:.0%}" for name, weight in parts if weight >= 0.005)
    lines = [
        f"{found.pool}: {found.unit} from {utc(begins_s)} "
        f"({ago(begins_s, now_s)}) on, by {duration(known_s)} of known demand",
        f"  period   {periods or 'none is significant'}",
        f"  models   {models}",
        f"  trusted  {trust_text(found)}",
        f"  lead     {lead_text(found)}",
    ]
    middle, high = _at(HIGHEST_LEVELS, outlook.levels, outlook.tokens_per_s)
    lines.append(
        f"  expects  at most {rounded(middle)} {found.unit} within it in half of all cases, "
        f"{rounded(high)} in 95%"
    )
    if found.decision is not None:
        lines.append(f"  newest   {decision_text(found.decision, now_s)}")
    text = "\n".join(lines) + "\n\n" + ahead_table(found).render(screen)
    if found.no_backtest:
        text += f"\nNo backtest: {found.no_backtest}.\n"
    if found.scores:
        text += "\n" + backtest_table(found.scores).render(screen)
        text += backtest_note(found.scores)
    return text


def trust_text(found: PoolAhead) -> str:
    """Whether production would scale by it, or why not."""
    one = found.outlook
    if found.unit != "tokens/s":
        return "no: its history has requests, but no tokens, and pools are scaled by tokens"
    if one.distrust:
        return f"no, it reacts alone: {one.distrust}"
    if one.coverage is None or one.loss_ratio is None:
        return "yes: too little of its past could be scored to speak against it"
    return (
        f"yes: {count(one.scored, 'forecast')} of its last days scored, {one.coverage:.1%} of them "
        f"covered what came (95% should), {one.loss_ratio:.2f} of the last value's loss"
    )


def lead_text(found: PoolAhead) -> str:
    """How long a start takes, and where that is from."""
    text = duration(found.lead_s)
    if not found.measured:
        return f"{text} (assumed: {'--lead' if found.lead_s != LEAD_S else 'none was measured'})"
    if found.lead_s < MINUTE_S:
        text += "; so short a one is forecast by seconds while it runs, by a minute here"
    return text


def decision_text(one: DecisionEntry, now_s: float) -> str:
    """What the newest decision made of its forecast."""
    text = f"decision {ago(one.at_s, now_s)}: "
    if one.fallback:
        return f"{text}it reacted alone: {one_line(one.fallback)}"
    if one.forecast is None:
        return f"{text}it needed no forecast"
    return f"{text}the forecast asked for {count(one.forecast, 'replica')}"


def ahead_table(found: PoolAhead) -> tables.Table:
    """The forecast at a few steps: of each, and of the highest demand until it."""
    made = found.ahead.forecast
    begins_s = found.demand.end_s or 0.0
    table = tables.Table(
        ("AHEAD", "AT", "MEAN", *(f"{level:.0%}" for level in SHOWN_LEVELS))
        + tuple(f"HIGHEST {level:.0%}" for level in HIGHEST_LEVELS)
    )
    steps = [step for step in SHOWN_STEPS if step < found.horizon_steps]
    for step in (*steps, found.horizon_steps):
        table.add(
            duration(step * made.step_s),
            utc(begins_s + (step - 1) * made.step_s, "%H:%M"),
            rounded(float(made.mean[step - 1])),
            *map(rounded, _at(SHOWN_LEVELS, made.levels, made.quantiles[:, step - 1])),
            *map(rounded, _at(HIGHEST_LEVELS, made.levels, made.maximum(step))),
        )
    return table


def _at(
    wanted: Sequence[float], levels: Sequence[float], quantiles: Floats | Sequence[float]
) -> list[float]:
    """The quantiles at the levels that are wanted, between those that there are."""
    import numpy as np

    found: list[float] = np.interp(wanted, levels, quantiles).tolist()
    return found


def backtest_table(scores: Sequence[BacktestScore]) -> tables.Table:
    """How forecasts of the past were: a row for each lead and model."""
    table = tables.Table(
        ("MODEL", "AHEAD", "WAPE", "PINBALL 0.5", "PINBALL 0.95", "COVERED")
        + ("HIGHEST: PINBALL 0.95", "COVERED")
    )
    for one in sorted(scores, key=lambda one: one.lead_steps):
        figures = [math.nan] * 6
        if one.origins:
            figures = [
                *(one.wape, one.pinball[0.5], one.pinball[0.95], one.coverage[0.95]),
                *(one.maximum_pinball[0.95], one.maximum_coverage[0.95]),
            ]
        cells = (f"{part:.1%}" if math.isfinite(part) else NONE for part in figures)
        table.add(one.model, duration(one.lead_steps * MINUTE_S), *cells)
    return table


def backtest_note(scores: Sequence[BacktestScore]) -> str:
    """How much of it is chance."""
    points = max(one.origins for one in scores)
    chance = 2 * math.sqrt(0.95 * 0.05 / max(1, points))
    text = (
        f"{count(points, 'point')} of the past; {chance:.0%} more or less covered may be chance. "
        "Errors and losses are in % of the mean.\n"
    )
    failed = {one.model: one.failed for one in scores if one.failed}
    for model, times in failed.items():
        text += f"{model} had too little history at {count(times, 'point')}: not comparable.\n"
    return text


# ── For scripts ───────────────────────────────────────────────────────────────────────────────────


def as_plain(found: PoolAhead) -> dict[str, Any]:
    """All of it; what is unknown is ``null``."""
    made, outlook = found.ahead.forecast, found.outlook
    steps = found.horizon_steps

    def rows(values: Floats) -> list[list[float]]:
        return [[float(f"{one:.6g}") for one in row[:steps]] for row in values.tolist()]

    return {
        "pool": found.pool,
        "unit": "tokens_per_s" if found.unit == "tokens/s" else "requests_per_s",
        "start_s": found.demand.end_s,
        "step_s": made.step_s,
        "levels": made.levels,
        "quantiles": rows(made.quantiles),
        "maximum_quantiles": rows(made.maxima),
        "mean": rows(made.mean[None])[0],
        "periods_s": [one * made.step_s for one in found.ahead.periods],
        "weights": outlook.weights,
        "trusted": found.unit == "tokens/s" and not outlook.distrust,
        "trust": trust_text(found),
        "lead_s": found.lead_s,
        "lead_measured": found.measured,
        "lead_maximum_quantiles": outlook.tokens_per_s,
        "scored": outlook.scored,
        "coverage": outlook.coverage,
        "loss_ratio": outlook.loss_ratio,
        "backtest": [
            {name: part for name, part in asdict(one).items() if name != "refit_s"}
            for one in found.scores
        ],
        "no_backtest": found.no_backtest,
    }


# ── What is drawn ─────────────────────────────────────────────────────────────────────────────────


def draw(found: PoolAhead, suffix: str) -> str:
    """The past and what is expected to follow it: one SVG, or an HTML page."""
    import numpy as np

    from gateway import charts

    made, steps = found.ahead.forecast, found.horizon_steps
    past = found.demand.values[-max(3 * steps, 360) :].tolist()
    before, after = [math.nan] * len(past), [math.nan] * steps
    low, middle, high = (
        [*before, *(float(np.interp(level, made.levels, one)) for one in made.quantiles.T[:steps])]
        for level in (0.05, 0.5, 0.95)
    )
    panel = charts.Panel(
        title="demand",
        unit=found.unit,
        height=300,
        series=[
            charts.Band(name="5% to 95%", low=low, high=high, colour=charts.COLOURS[1]),
            charts.Line(name="median", values=middle, colour=charts.COLOURS[2]),
            charts.Line(
                name="mean", values=[*before, *made.mean[:steps].tolist()], colour=charts.COLOURS[0]
            ),
            charts.Line(name="past", values=[*past, *after], colour=charts.INK),
        ],
    )
    ends_s = found.demand.end_s or 0.0
    begins_s = ends_s - len(past) * made.step_s
    until = f"{duration(steps * made.step_s)} from {utc(ends_s, '%d %b %H:%M')} UTC on"
    picture = charts.over_time(
        [panel],
        step_s=made.step_s,
        title=f"{found.pool}: {until}",
        label=lambda at_s: utc(begins_s + at_s, "%d %b %H:%M"),
    )
    if suffix == ".svg":
        return picture
    table = ahead_table(found)
    blocks = [("Forecast", picture), ("Ahead", charts.html_table(table.headings, table.texts()))]
    if found.scores:
        scores = backtest_table(found.scores)
        blocks.append(("Backtest", charts.html_table(scores.headings, scores.texts())))
    return charts.page(f"Forecast of {found.pool}", blocks)
