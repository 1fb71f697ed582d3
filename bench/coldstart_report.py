"""The cold start's report: JSON, Markdown, and the phases as stacked bars."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

PLAIN = "plain"
BAR_FRACTION = 0.85
AIM_FRACTION = 0.90
FORKED = ("on_disk", "paged", "forked")
PHASES = (
    "deciding",
    "fetching",
    "paging",
    "importing",
    "loading",
    "compiling",
    "warming",
    "answering",
)
COLOURS = {
    "deciding": "#8a8f98",
    "fetching": "#4f9d4f",
    "paging": "#9bbf5a",
    "importing": "#c9a227",
    "loading": "#0b7a75",
    "compiling": "#7a4b94",
    "warming": "#c4553b",
    "answering": "#3465a4",
}
_LABEL_PX, _BAR_PX, _ROW_PX = 280, 420, 30

Rounds = Mapping[str, Sequence[Mapping[str, Any]]]


def document(rounds: Rounds, *, titles: Mapping[str, str], **facts: Any) -> dict[str, Any]:
    """The whole run, figures first."""
    figures = {name: figure(found) for name, found in rounds.items() if found}
    facts = {**facts, "noise": dict(facts["noise"]), "machine": dict(facts["machine"])}
    return {
        "date": facts.pop("date"),
        "command": facts.pop("command"),
        "figures": figures,
        "verdicts": verdicts(figures, rounds),
        "titles": dict(titles),
        **facts,
        "raw": {name: list(found) for name, found in rounds.items()},
    }


def figure(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest time to first token; of each phase the median."""
    times = [one["ttft_s"] for one in found]
    names = [name for name in PHASES if any(name in one["phases_s"] for one in found)]
    phases = {
        name: round(statistics.median(one["phases_s"].get(name, 0.0) for one in found), 3)
        for name in names
    }
    return {
        "ttft_s": round(statistics.median(times), 3),
        "low_s": min(times),
        "high_s": max(times),
        "rounds": len(times),
        "phases_s": phases,
    }


def verdicts(figures: Mapping[str, Any], rounds: Rounds) -> list[dict[str, Any]]:
    """Whether each tier is so much quicker than plain, and all answers the same."""
    found = []
    plain = figures.get(PLAIN)
    for name in FORKED:
        less = None
        if plain is not None and name in figures:
            less = 1.0 - figures[name]["ttft_s"] / plain["ttft_s"]
        found.append(
            {
                "text": f"{name}: request at zero to first token, less than plain",
                "limit": f"≥ {BAR_FRACTION:.0%} (aim {AIM_FRACTION:.0%})",
                "measured": "not measured" if less is None else f"{less:.1%}",
                "passed": None if less is None else less >= BAR_FRACTION,
            }
        )
    texts = {one["text"] for one_name in rounds.values() for one in one_name}
    found.append(
        {
            "text": "every answer is the same text",
            "limit": "1 text",
            "measured": f"{len(texts)}: {sorted(texts)[:2]}",
            "passed": len(texts) == 1,
        }
    )
    return found


def markdown(made: Mapping[str, Any], plot: str) -> str:
    """The report to read."""
    machine, noise = made["machine"], made["noise"]
    plain = made["figures"].get(PLAIN)
    lines = [
        f"# Cold start, {made['date']}",
        "",
        f"`{made['command']}` · {made['elapsed_s']:.0f} s",
        "",
        f"{machine['cpu']}, {machine['cores']} cores"
        f"{' (virtual)' if machine['virtual'] else ''}, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}. Beside the benchmark the machine was busy for "
        f"{noise['other_busy_fraction']:.0%} of one core; the host took {noise['stolen_s']:.1f} s.",
        "",
        "Real vLLM (CPU build), the default model, one streaming request to a pool at zero, "
        "through `tidegate up`: seconds from sending it to its first token. Medians, lowest and "
        "highest in brackets; phases as `/status` showed them, their medians. Cold disk: pages of "
        "the engine's environment, its Python and the model dropped before each start. "
        "`sleeping` is missing: vLLM's CPU build cannot sleep.",
        "",
        "| | seconds | less than plain | " + " | ".join(PHASES) + " | waits with (PSS) |",
        "|---|---|---|" + "---|" * (len(PHASES) + 1),
    ]
    for name, row in made["figures"].items():
        less = "–" if plain is None else f"{1 - row['ttft_s'] / plain['ttft_s']:.1%}"
        cells = " | ".join(
            f"{row['phases_s'][phase]:.2f}" if phase in row["phases_s"] else "–" for phase in PHASES
        )
        memory = made["memory"].get(name, {}).get("pss_bytes", 0)
        lines.append(
            f"| {made['titles'][name]} | **{row['ttft_s']:.2f}** ({row['low_s']:.2f}–"
            f"{row['high_s']:.2f}) | {less} | {cells} | {memory / 1e6:,.0f} MB |"
        )
    mark = {True: "met", False: "**MISSED**", None: "not measured"}
    lines += ["", "| bar | limit | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {one['text']} | {one['limit']} | {one['measured']} | {mark[one['passed']]} |"
        for one in made["verdicts"]
    ]
    lines += [f"\n**{name} was not measured**: {why}" for name, why in made["missing"].items()]
    return "\n".join([*lines, "", f"![Phases of each start]({plot})"]) + "\n"


def svg(made: Mapping[str, Any]) -> str:
    """Stacked bars of the phases, longest first; the figure at the end is the first token."""
    rows = made["figures"]
    longest = max((row["ttft_s"] for row in rows.values()), default=1.0)
    parts = []
    for index, (name, row) in enumerate(rows.items()):
        y, x = 40 + index * _ROW_PX, float(_LABEL_PX)
        title = escape(made["titles"][name])
        parts.append(f'<text x="{_LABEL_PX - 8}" y="{y + 14}" class="l">{title}</text>')
        scale = row["ttft_s"] / max(sum(row["phases_s"].values()), 1e-9)
        for phase, seconds in row["phases_s"].items():
            width = seconds * scale / longest * _BAR_PX
            parts.append(
                f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" '
                f'fill="{COLOURS[phase]}"><title>{phase} {seconds:.2f} s</title></rect>'
            )
            x += width
        parts.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{row["ttft_s"]:.2f} s</text>')
    shown = [name for name in PHASES if any(name in row["phases_s"] for row in rows.values())]
    for index, phase in enumerate(shown):
        x = index * 115
        parts.append(f'<rect x="{x}" y="8" width="12" height="12" fill="{COLOURS[phase]}"/>')
        parts.append(f'<text x="{x + 17}" y="18">{phase}</text>')
    height = 50 + len(rows) * _ROW_PX
    width_px = _LABEL_PX + _BAR_PX + 80
    style = "text{font:12px sans-serif;fill:#222}.l{text-anchor:end}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width_px}" height="{height}" '
        f'viewBox="-10 0 {width_px + 20} {height}" role="img" '
        f'aria-label="Seconds from a request at zero to its first token, by phase">'
        f'<style>{style}</style><rect x="-10" width="{width_px + 20}" height="{height}" '
        'fill="#fff"/>' + "".join(parts) + "</svg>\n"
    )


def terminal(made: Mapping[str, Any]) -> str:
    """The few lines to print at the end of a run."""
    lines = [
        f"{made['titles'][name]:44}{row['ttft_s']:8.2f} s  ({row['low_s']:.2f}–{row['high_s']:.2f})"
        for name, row in made["figures"].items()
    ]
    mark = {True: "met   ", False: "MISSED", None: "  –   "}
    lines += ["", *(f"{mark[one['passed']]} {one['text']}: {one['measured']} (bar {one['limit']})"
                    for one in made["verdicts"])]  # fmt: skip
    return "\n".join(lines) + "\n"


def write(made: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.json, .md and .svg into ``folder``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}{ending}" for ending in (".json", ".md", ".svg")]
    parts = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in made.items())
    paths[0].write_text("{\n" + ",\n".join(parts) + "\n}\n")
    paths[2].write_text(svg(made))
    paths[1].write_text(markdown(made, paths[2].name))
    return paths
