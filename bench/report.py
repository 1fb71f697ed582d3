"""Writes a run as JSON (everything), Markdown (to read) and SVG (to see)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import bars, contenders, datapath, scenarios, summary
from bench.plot import svg

GLUED = 1.15
"""Chunks in one read of a stream from which on the cost of a chunk is flattered."""


def _number(value: float) -> str:
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}"


def _cell(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "–"
    text = f"**{_number(spread['median'])}**"
    if spread["rounds"] > 1:
        text += f" ({_number(spread['low'])}–{_number(spread['high'])})"
    return text


def _ratio(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{found['median']:.2f}x"


def _title(name: str) -> str:
    known = contenders.CONTENDERS.get(name)
    return known.title if known else name


def document(
    results: datapath.Results,
    *,
    options: datapath.Options,
    command: str,
    date: str,
    machine: Mapping[str, Any],
    noise: Mapping[str, float],
) -> dict[str, Any]:
    """The whole run, figures first, what the load generator said last."""
    peaks = summary.memory(results.memory)
    verdicts = summary.verdicts(results.rounds, results.held, peaks, results.body_bytes)
    return {
        "date": date,
        "command": command,
        "machine": dict(machine),
        "noise": dict(noise),
        "elapsed_s": round(results.elapsed_s, 1),
        "rounds": options.rounds,
        "quick": options.quick,
        "versions": results.versions,
        "missing": results.missing,
        "body_bytes": results.body_bytes,
        "verdicts": [dataclasses.asdict(v) for v in verdicts],
        "figures": summary.table(results.rounds),
        "latency_us": summary.added_latency(results.rounds, datapath.DIRECT),
        "memory_peak_kib": peaks,
        "held": results.held,
        "raw": {"rounds": results.rounds, "memory": results.memory},
    }


def _verdict_lines(verdicts: Sequence[Mapping[str, Any]]) -> list[str]:
    mark = {True: "met", False: "**MISSED**", None: "not measured"}
    lines = ["| bar | limit | measured | |", "|---|---|---|---|"]
    lines += [
        f"| {v['text']} | {v['limit']} | {v['measured']} | {mark[v['passed']]} |" for v in verdicts
    ]
    return lines


def _scenario_lines(made: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for scenario in scenarios.ROUNDS:
        rows = made["figures"].get(scenario.name, {})
        if not rows:
            continue
        unit = f"{scenario.unit}s"
        lines += [
            f"\n### {scenario.title}\n",
            f"| | CPU ms per 1,000 {unit} | {unit}/s per core | {unit}/s seen "
            "| core used | to nginx | to the better peer | errors |",
            "|---|---|---|---|---|---|---|---|",
        ]
        notes: list[str] = []
        for name, row in rows.items():
            used = row["router_core_use"]
            lines.append(
                f"| {_title(name)} | {_cell(row['cpu_ms_per_1000'])} "
                f"| {_cell(row['per_cpu_s'])} | {_cell(row['per_s'])} "
                f"| {'–' if used is None else format(used['median'], '.0%')} "
                f"| {_ratio(row['ratio_to_nginx'])} | {_ratio(row['ratio_to_better_peer'])} "
                f"| {row['errors']} |"
            )
            glued = row["chunks_per_read"]
            if glued and glued["median"] > GLUED:
                notes.append(f"{_title(name)}: {glued['median']:.1f} chunks in a read: the machine "
                             "was too busy to move them one by one; trust this less.")  # fmt: skip
        lines += ["", *notes] if notes else []
    return lines


def _latency_lines(made: Mapping[str, Any]) -> list[str]:
    if not made["latency_us"]:
        return []
    lines = [
        "\n## Added latency\n",
        "Microseconds, small bodies at 300 requests/s on a fixed schedule; added: beyond the "
        "same load sent to a replica itself, in the same round.\n",
        "| | p50 | p99 | added p50 | added p99 |",
        "|---|---|---|---|---|",
    ]
    for name, row in made["latency_us"].items():
        cells = " | ".join(_cell(row[k]) for k in ("p50", "p99", "added_p50", "added_p99"))
        lines.append(f"| {_title(name)} | {cells} |")
    return lines


def _held_lines(made: Mapping[str, Any]) -> list[str]:
    if not made["held"]:
        return []
    lines = [
        f"\n## {scenarios.HELD_STREAMS:,} concurrent streams\n",
        "| | whole | errors | open at once | resident MiB before | peak | KiB per stream |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seen in made["held"].items():
        data = seen["watch"]["data"]
        grown_kib = (data["rss_peak_kib"] - data["rss_start_kib"]) / max(seen["peak_active"], 1)
        lines.append(
            f"| {_title(name)} | {seen['done']:,} | {seen['errors']['total']} "
            f"| {seen['peak_active']:,} | {data['rss_start_kib'] / 1024:.0f} "
            f"| {data['rss_peak_kib'] / 1024:.0f} | {grown_kib:.1f} |"
        )
    return lines


def _memory_lines(made: Mapping[str, Any]) -> list[str]:
    peaks = made["memory_peak_kib"]
    if not peaks:
        return []
    lines = [
        "\n## Memory by body size\n",
        f"Highest resident MiB, {scenarios.MEMORY_CONNECTIONS} requests in flight together (the "
        f"replica answers {scenarios.MEMORY_THINK_MS} ms after it has the whole body), each "
        "contender freshly started, loads in this order.\n",
        "| | small | 220 kB, model first | 220 kB, messages first | 880 kB, model first |",
        "|---|---|---|---|---|",
    ]
    loads = ("rss-small", "rss-220kB", "rss-220kB-messages-first", "rss-880kB")
    for name, by_load in peaks.items():
        cells = " | ".join(f"{by_load[x] / 1024:.0f}" if x in by_load else "–" for x in loads)
        lines.append(f"| {_title(name)} | {cells} |")
    return lines


def markdown(made: Mapping[str, Any], plot: str | None) -> str:
    """The report to read."""
    machine, noise = made["machine"], made["noise"]
    versions = ", ".join(f"{_title(n)} {v}" for n, v in made["versions"].items())
    lines = [
        f"# Data path, {made['date']}",
        "",
        f"`{made['command']}` · {made['rounds']} rounds, {made['elapsed_s']:.0f} s"
        + (" · a quick run: short windows, trust it less" if made["quick"] else ""),
        "",
        f"{machine['cpu']}, {machine['cores']} cores"
        f"{' (virtual)' if machine['virtual'] else ''}, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}. Beside the benchmark the machine was busy for "
        f"{noise['other_busy_fraction']:.0%} of one core; the host took {noise['stolen_s']:.1f} s.",
        "",
        f"Versions: {versions}.",
        "",
        "The router is alone on one core; load generator and four mock replicas share the other. "
        "CPU is that of all the router's data-path threads, user and system. Medians over the "
        "rounds, lowest and highest in brackets; ratios are medians of per-round ratios of "
        "requests per CPU second (above 1 is cheaper). Every byte of every answer was compared "
        "with what the replica sent.",
        "",
        "## The bars",
        "",
        *_verdict_lines(made["verdicts"]),
    ]
    for name, why in made["missing"].items():
        lines += ["", f"**{_title(name)} did not start**: {'; '.join(why.splitlines()[::-1][:2])}"]
    if plot:
        lines += ["", f"![CPU per unit of work, by contender]({plot})"]
    lines += ["", "## Cost of the work", *_scenario_lines(made), *_latency_lines(made)]
    lines += [*_held_lines(made), *_memory_lines(made)]
    control = made["figures"].get("small", {}).get(bars.SUBJECT, {}).get("control_cpu_fraction")
    if control:
        lines += ["", f"Tidegate's control process used {control['median']:.1%} of the other core "
                  "meanwhile; it is not part of the cost of a request."]  # fmt: skip
    return "\n".join(lines) + "\n"


def terminal(made: Mapping[str, Any]) -> str:
    """The few lines to print at the end of a run."""
    lines = []
    for scenario, rows in made["figures"].items():
        for name, row in rows.items():
            cost = row["cpu_ms_per_1000"]
            if cost:
                lines.append(
                    f"{scenario:18} {_title(name):28} {cost['median']:9.1f} ms CPU per 1,000  "
                    f"{_ratio(row['ratio_to_nginx']):>7} nginx "
                    f"{_ratio(row['ratio_to_better_peer']):>7} better peer  {row['errors']} errors"
                )
    mark = {True: "met   ", False: "MISSED", None: "  –   "}
    lines += ["", *(f"{mark[v['passed']]} {v['text']}: {v['measured']} (bar {v['limit']})"
                    for v in made["verdicts"])]  # fmt: skip
    return "\n".join(lines) + "\n"


def write(made: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.json, .md and .svg into ``folder``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}{ending}" for ending in (".json", ".md", ".svg")]
    # One line for each part: small enough to keep, and a later run still differs readably.
    parts = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in made.items())
    paths[0].write_text("{\n" + ",\n".join(parts) + "\n}\n")
    paths[2].write_text(svg(made))
    paths[1].write_text(markdown(made, paths[2].name))
    return paths
