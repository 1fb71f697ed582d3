"""Forecasts of traces, scored at points of their past: each model beside the last value.

Every model is asked at the same points, spread evenly over what follows a week of history (over the
second half of a shorter trace), with the week before each. Losses are shares of the mean of what
came; a mean over traces counts each alike.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.replay import traces
from bench import trace_report
from bench.trace_report import find, short, table
from forecaster.backtest import BacktestScore, backtest
from forecaster.models.automatic import Automatic
from forecaster.models.direct import Direct
from forecaster.models.last_value import LastValue
from forecaster.models.prophet import ProphetModel
from forecaster.models.seasonal import PeriodicQuantile, SeasonalNaive
from forecaster.models.statistical import HoltWinters, StlEts
from forecaster.types import DAY_S, Forecaster, History
from gateway import charts

MODELS: Mapping[str, Callable[[], Forecaster]] = {
    "automatic": Automatic,
    "direct": Direct,
    "last_value": LastValue,
    "seasonal_naive": SeasonalNaive,
    "periodic_quantile": PeriodicQuantile,
    "stl_ets": StlEts,
    "holt_winters": HoltWinters,
    "prophet": ProphetModel,
}
USUAL = tuple(name for name in MODELS if name not in ("prophet", "direct"))
SUBJECT = "automatic"
LEADS_S = (60.0, 300.0, 900.0, 3600.0)
LEVELS = (0.05, 0.5, 0.9, 0.95, 0.975)
LEVEL, LEAD_S = 0.95, 900.0
HISTORY_DAYS = 7
NOT_REQUESTS = "twitter"
"""Mentions of a company are no requests: they are reported, and no bar is for them."""

RATIO_BARS = {"last_value": 0.80, "stl_ets": 0.85, "holt_winters": 0.85}
COVERAGE_BARS = (0.93, 0.97)
REFIT_BAR_S = 0.3


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured. Prophet only where it is named: it takes seconds a forecast."""

    data: Path
    models: tuple[str, ...] = USUAL
    only: tuple[str, ...] = ()
    origins: int = 150


def load(path: Path) -> History | None:
    """Requests on the trace's own grid (its usual step; a step without a row is unknown), in
    minutes where it has each request; ``None`` where it is shorter than a day or coarser than a
    quarter of an hour."""
    columns = traces.read_parquet(path) if path.suffix == ".parquet" else traces.read_csv(path)
    names = {one.lower(): one for one in columns}
    time_name, count = traces.first(names, traces.TIMES), traces.first(names, traces.COUNTS)
    if time_name is None:
        raise traces.TraceError(f"no column of times (one of {', '.join(traces.TIMES)})")
    at_s, absolute = traces.to_seconds(columns[time_name], milliseconds=time_name == "t_ms")
    order = np.argsort(at_s, kind="stable")
    at_s = at_s[order]
    step_s = float(np.median(np.diff(at_s))) if count else 60.0
    if at_s[-1] - at_s[0] < DAY_S - 2 * step_s or step_s > LEAD_S:
        return None
    places = np.round((at_s - at_s[0]) / step_s).astype(int)
    if count:
        values = np.full(places[-1] + 1, np.nan)
        values[places] = traces.numbers(columns[count])[order]
    else:
        values = np.bincount(places).astype(float)
    return History(values=values, step_s=step_s, start_s=float(at_s[0]) if absolute else None)


def measure(options: Options) -> list[dict[str, Any]]:
    """A row for each trace, model and lead."""
    rows: list[dict[str, Any]] = []
    for path in find(options.data, options.only):
        try:
            history = load(path)
        except (OSError, traces.TraceError) as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            continue
        if history is None:
            continue
        week = round(HISTORY_DAYS * DAY_S / history.step_s)
        count = len(history.values)
        leads = [round(one / history.step_s) for one in LEADS_S if one >= history.step_s]
        began_s = time.monotonic()
        scores = backtest(
            history,
            [MODELS[name]() for name in options.models],
            leads=leads,
            levels=LEVELS,
            origins=options.origins,
            first_step=week if count > week + DAY_S / history.step_s else count // 2,
            train_steps=week,
            clock=time.process_time,
        )
        rows += [_row(path.stem, history.step_s, score) for score in scores]
        print(f"{path.stem}: {time.monotonic() - began_s:.0f} s", file=sys.stderr)
    return rows


def _row(trace: str, step_s: float, score: BacktestScore) -> dict[str, Any]:
    return {"trace": trace, "lead_s": score.lead_steps * step_s, **asdict(score)}


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over traces of requests at the lead and level that the bars are for, and the bars."""
    here = [
        row
        for row in rows
        if row["lead_s"] == LEAD_S
        and row["origins"]
        and not row["failed"]
        and NOT_REQUESTS not in row["trace"]
    ]
    names = list(dict.fromkeys(row["model"] for row in here))
    by_model = {}
    for name in names:
        own = {row["trace"]: row for row in here if row["model"] == name}
        if len(own) < len({row["trace"] for row in here}):
            continue  # it could not forecast all of them: its mean would be of other traces
        by_model[name] = {
            "pinball": statistics.mean(row["pinball"][LEVEL] for row in own.values()),
            "coverage": statistics.mean(row["coverage"][LEVEL] for row in own.values()),
            "maximum_pinball": statistics.mean(
                row["maximum_pinball"][LEVEL] for row in own.values()
            ),
            "maximum_coverage": statistics.mean(
                row["maximum_coverage"][LEVEL] for row in own.values()
            ),
            "wape": statistics.mean(row["wape"] for row in own.values()),
            "refit_s": statistics.median(row["refit_s"] for row in own.values()),
        }
    ours = by_model.get(SUBJECT)
    verdicts: list[dict[str, Any]] = []
    ratios = {}
    if ours:
        for name, one in by_model.items():
            pairs = [
                (mine["pinball"][LEVEL], theirs["pinball"][LEVEL])
                for mine in here
                for theirs in here
                if mine["model"] == SUBJECT
                and theirs["model"] == name
                and mine["trace"] == theirs["trace"]
            ]
            ratios[name] = {
                "of_means": ours["pinball"] / one["pinball"],
                "mean": statistics.mean(mine / theirs for mine, theirs in pairs),
            }
            if name in RATIO_BARS:
                bar = RATIO_BARS[name]
                value = ratios[name]["mean"]
                verdicts.append(_verdict(f"pinball over {name}", value, value <= bar, f"≤ {bar}"))
        low, high = COVERAGE_BARS
        verdicts.append(
            _verdict("coverage", ours["coverage"], low <= ours["coverage"] <= high, f"{low}–{high}")
        )
        refit_s = ours["refit_s"]
        verdicts.append(_verdict("refit, s", refit_s, refit_s < REFIT_BAR_S, f"< {REFIT_BAR_S}"))
    return {"models": by_model, "ratios": ratios, "verdicts": verdicts}


def _verdict(what: str, value: float, passed: bool, bar: str) -> dict[str, Any]:
    return {"what": what, "value": value, "bar": bar, "passed": passed}


def markdown(made: Mapping[str, Any]) -> str:
    """The report."""
    rows, found = made["rows"], made["summary"]
    parts = [
        f"# Forecasts of traces, {made['date']}\n",
        f"`{made['command']}`, {made['machine']['cpu']}, {made['machine']['cores']} cores.\n",
        f"{made['options']['origins']} points of each trace, {HISTORY_DAYS} days of history before "
        f"each (less where the trace is shorter). Losses in % of the mean.\n",
        "## 0.95, 15 minutes ahead, mean over the traces of requests\n",
        table(
            ("model", "pinball", "coverage", "of the maximum", "coverage", "WAPE", "CPU ms",
             "ours over it", "of means"),
            [
                (
                    f"`{name}`",
                    percent(one["pinball"]),
                    f"{one['coverage']:.3f}",
                    percent(one["maximum_pinball"]),
                    f"{one['maximum_coverage']:.3f}",
                    percent(one["wape"]),
                    f"{1000 * one['refit_s']:.0f}",
                    f"{found['ratios'][name]['mean']:.3f}" if found["ratios"] else "–",
                    f"{found['ratios'][name]['of_means']:.3f}" if found["ratios"] else "–",
                )
                for name, one in found["models"].items()
            ],
        ),
        "\n".join(
            f"- {one['what']}: {one['value']:.3f}, bar {one['bar']}: "
            + ("met" if one["passed"] else "**missed**")
            for one in found["verdicts"]
        )
        + "\n",
    ]  # fmt: skip
    for lead_s in sorted({row["lead_s"] for row in rows}):
        here = [row for row in rows if row["lead_s"] == lead_s and row["origins"]]
        names = list(dict.fromkeys(row["trace"] for row in here))
        models = list(dict.fromkeys(row["model"] for row in here))
        cells = {(row["model"], row["trace"]): row for row in here}
        parts += [
            f"## {lead_s / 60:g} min ahead: pinball at 0.95 / coverage / WAPE\n",
            table(
                ("model", *(short(name) for name in names)),
                [
                    (f"`{model}`", *(cell(cells.get((model, name))) for name in names))
                    for model in models
                ],
            ),
        ]
    return "\n".join(parts)


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    return (
        f"{percent(row['pinball'][LEVEL])} / {row['coverage'][LEVEL]:.2f} / {percent(row['wape'])}"
    )


def terminal(made: Mapping[str, Any]) -> str:
    """The short of it."""
    found = made["summary"]
    lines = ["0.95, 15 min ahead, mean over the traces of requests"]
    lines.append(f"{'model':18} pinball %  coverage  of maximum  coverage  CPU ms  ours over it")
    for name, one in found["models"].items():
        ratio = found["ratios"][name]["mean"] if found["ratios"] else float("nan")
        lines.append(
            f"{name:18} {percent(one['pinball']):>9}  {one['coverage']:8.3f}"
            f"  {percent(one['maximum_pinball']):>10}  {one['maximum_coverage']:8.3f}"
            f"  {1000 * one['refit_s']:6.0f}  {ratio:12.3f}"
        )
    lines += [
        f"{'met' if one['passed'] else 'MISSED':7} {one['what']} {one['value']:.3f} ({one['bar']})"
        for one in found["verdicts"]
    ]
    return "\n".join(lines)


def picture(made: Mapping[str, Any]) -> str:
    """Mean loss against the time of a forecast, by model."""
    dots = [
        charts.Dot(
            name=name,
            x=1000 * one["refit_s"],
            y=100 * one["pinball"],
            colour=charts.COLOURS[0 if name == SUBJECT else 6],
            strong=name == SUBJECT,
        )
        for name, one in made["summary"]["models"].items()
    ]
    return charts.scatter(
        dots,
        title="Pinball at 0.95, 15 min ahead, % of the mean",
        x_name="CPU ms",
        y_name="%",
        floor=1.0,
    )


def write(made: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """The report's files."""
    return trace_report.write(made, folder, stem, markdown=markdown(made), picture=picture(made))
