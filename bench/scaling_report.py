"""The report of the scaling bench: JSON, Markdown and a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import trace_report
from bench.scaling import geometric_mean, ratios
from bench.trace_report import short, table
from gateway import charts

SUBJECTS = ("auto", "reactive", "hpa")
"""The first of these that was played is compared with all others."""
NOT_PEERS = frozenset({"oracle", "static"})
CLASSES = ("no", "weak", "strong")
AT_LEAST = 0.98


def subject_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Whose ratios are reported."""
    played = set(names_of(rows))
    return next(name for name in (*SUBJECTS, *sorted(played)) if name in played)


def names_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """All policies, in the order they were played."""
    return list(dict.fromkeys(name for row in rows for name in row["scores"]))


def document(rows: Sequence[dict[str, Any]], **facts: Any) -> dict[str, Any]:
    """The whole run, what it says first."""
    subject = subject_of(rows)
    against = {}
    for other in names_of(rows):
        if other == subject:
            continue
        pairs = list(ratios(rows, subject, other))
        values = [value for _, value in pairs]
        worst = min(pairs, key=lambda pair: pair[1])
        against[other] = {
            "mean": geometric_mean(values),
            "least": worst[1],
            "least_on": f"{worst[0]['trace']} at {worst[0]['cold_start_s']:g} s",
            "by_class": {
                name: geometric_mean([value for row, value in pairs if row["class"] == name])
                for name in CLASSES
            },
        }
    return {"subject": subject, "against": against, **facts, "rows": list(rows)}


def markdown(made: Mapping[str, Any]) -> str:
    """Tables: the ratios, then each trace."""
    rows = made["rows"]
    subject = made["subject"]
    parts = [
        f"# Scaling policies on traces, {made['date']}\n",
        f"`{made['command']}`, {made['machine']['cpu']}, {made['machine']['cores']} cores.\n",
        f"About {made['options']['replicas']:g} replicas, SLO TTFT 2 s and ITL 50 ms, up to a week "
        f"of history, {made['options']['days']:g} days scored. Others' policies are our "
        "re-implementations (docs/reference/replay.md). Classes are of the seasonal strength of "
        "the day: no (below 0.1), weak, strong (from 0.64).\n",
        f"## Goodput per replica-hour: `{subject}` over each\n",
        "Requests within the SLO per replica-hour; geometric means, and the least of all traces "
        f"and cold starts. **Bold** is below {AT_LEAST}.\n",
        table(
            ("against", "mean", "no", "weak", "strong", "least", "on"),
            [
                (
                    f"`{name}`",
                    ratio(one["mean"]),
                    *(ratio(one["by_class"][kind]) for kind in CLASSES),
                    ratio(one["least"], bar=name not in NOT_PEERS),
                    one["least_on"],
                )
                for name, one in made["against"].items()
            ],
        ),
    ]
    for cold_start_s in sorted({row["cold_start_s"] for row in rows}):
        parts.append(f"## Cold start {cold_start_s:g} s: violations % @ replica-hours\n")
        here = [row for row in rows if row["cold_start_s"] == cold_start_s]
        here.sort(key=lambda row: (CLASSES.index(row["class"]), row["trace"], row["window"]))
        parts.append(
            table(
                ("policy", *(title(row) for row in here)),
                [
                    (f"`{name}`", *(cell(row["scores"].get(name)) for row in here))
                    for name in names_of(rows)
                ],
            )
        )
    return "\n".join(parts)


def title(row: Mapping[str, Any]) -> str:
    """A column's name: the trace, its class, the window where there are several."""
    window = f" #{row['window'] + 1}" if row["window"] else ""
    return f"{short(row['trace'])}{window} ({row['class']})"


def cell(score: Mapping[str, Any] | None) -> str:
    """``2.07 @ 759``."""
    if score is None:
        return "–"
    return f"{100 * score['violated_fraction']:.2f} @ {score['replica_hours']:.0f}"


def ratio(value: float, *, bar: bool = False) -> str:
    """A ratio, bold where it misses the bar."""
    if math.isnan(value):
        return "–"
    text = f"{value:.3f}"
    return f"**{text}**" if bar and value < AT_LEAST else text


def picture(made: Mapping[str, Any]) -> str:
    """For each cold start: the mean of violations against the mean cost over the oracle's."""
    rows = made["rows"]
    reference = "oracle" if any("oracle" in row["scores"] for row in rows) else made["subject"]
    pictures = []
    for cold_start_s in sorted({row["cold_start_s"] for row in rows}):
        here = [row for row in rows if row["cold_start_s"] == cold_start_s]
        dots = []
        for name in names_of(here):
            found = [row["scores"] for row in here if name in row["scores"]]
            costs = [one[name]["replica_hours"] / one[reference]["replica_hours"] for one in found]
            hurt = [100 * one[name]["violated_fraction"] for one in found]
            ours = name in SUBJECTS[:2]
            dots.append(
                charts.Dot(
                    name=name,
                    x=geometric_mean(costs),
                    y=sum(hurt) / len(hurt),
                    colour=charts.COLOURS[0 if ours else 6],
                )
            )
        pictures.append(
            charts.scatter(
                [dot for dot in dots if dot.x < 6.0],
                title=f"cold start {cold_start_s:g} s: means over {len(here)} traces",
                x_name=f"replica-hours over those of {reference} (beyond 6 left out)",
                y_name="requests hurt, %",
                floor=0.01,
            )
        )
    return charts.stacked(pictures)


def write(made: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """The three files."""
    return trace_report.write(made, folder, name, markdown=markdown(made), picture=picture(made))


def terminal(made: Mapping[str, Any]) -> str:
    """The ratios, short."""
    lines = [f"goodput per replica-hour of {made['subject']} over"]
    for name, one in made["against"].items():
        lines.append(
            f"  {name:<20} mean {one['mean']:.3f}  least {one['least']:.3f} ({one['least_on']})"
        )
    return "\n".join(lines)
