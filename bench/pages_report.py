"""Writes a run of ``bench pages`` as JSON and Markdown, and judges it."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.pages import Results

PREHEAT_MOST_CPU_S_GB = 0.05
LOOK_MOST_MS = 5.0

TITLES = {
    "tidegate": "**Tidegate prewarm** (`sendfile` to `/dev/null`, two threads)",
    "tidegate, background": "**Tidegate prewarm**, standing back for others (one thread)",
    "sendfile": "`sendfile` to `/dev/null`, plain loop",
    "populate": "`MADV_POPULATE_READ`, 64 MiB at a time",
    "read": "one thread reading into one buffer",
    "8 threads": "8 threads reading blocks of 16 MiB (as vLLM's prefetch)",
    "readahead": "`POSIX_FADV_WILLNEED`, 8 MiB at a time",
    "willneed": "`POSIX_FADV_WILLNEED` on whole files",
    "touch": "mapped, a byte of each page read",
    "vmtouch": "vmtouch -t",
}


def verdicts(results: Results) -> list[dict[str, Any]]:
    """The bars, and whether they were met."""
    cpu = statistics.median(one.cpu_s_gb for one in results.ways["tidegate"])
    cached = min(one.cached_fraction for one in results.ways["tidegate"])
    look = max(statistics.median(times) for times in results.looks_ms["tidegate"].values())
    gb = results.size_bytes / 1e9
    look_at_four = look * 4 / gb
    return [
        {
            "text": "preheat, CPU-s/GB (median)",
            "limit": f"at most {PREHEAT_MOST_CPU_S_GB}",
            "measured": f"{cpu:.3f}",
            "passed": cpu <= PREHEAT_MOST_CPU_S_GB,
        },
        {
            "text": "of it in the page cache afterwards",
            "limit": "at least 99 %",
            "measured": f"{cached:.1%}",
            "passed": cached >= 0.99,
        },
        {
            "text": "residency of 4 GB",
            "limit": f"under {LOOK_MOST_MS:g} ms",
            "measured": f"{look_at_four:.2f} ms",
            "passed": look_at_four < LOOK_MOST_MS,
        },
    ]


def document(
    results: Results,
    *,
    command: str,
    date: str,
    machine: Mapping[str, Any],
    noise: Mapping[str, float],
) -> dict[str, Any]:
    """The whole run."""
    return {
        "date": date,
        "command": command,
        "machine": dict(machine),
        "noise": dict(noise),
        "verdicts": verdicts(results),
        **dataclasses.asdict(results),
    }


def markdown(made: Mapping[str, Any]) -> str:
    """The report to read."""
    gb = made["size_bytes"] / 1e9
    machine, noise = made["machine"], made["noise"]
    lines = [
        f"# Page cache, {made['date']}",
        "",
        f"`{made['command']}` · {gb:.2f} GB in 4 files, {made['elapsed_s']:.0f} s · "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, kernel "
        f"{machine['kernel']} · others used {noise['other_busy_fraction']:.2f} cores meanwhile",
        "",
        "| bar | limit | measured | |",
        "|---|---|---|---|",
    ]
    mark = {True: "met", False: "**MISSED**"}
    lines += [
        f"| {v['text']} | {v['limit']} | {v['measured']} | {mark[v['passed']]} |"
        for v in made["verdicts"]
    ]
    lines += ["", "## Into the page cache", "", *_ways(made["ways"])]
    lines += ["", "## What is cached", "", *_looks(made["looks_ms"])]
    lines += ["", "## Beside a foreground reader", "", *_foreground(made["foreground"])]
    if made["decay"]:
        lines += ["", "## Whether it stays", "", *_decay(made)]
    lines += ["", *(f"{name}: {why}." for name, why in made["missing"].items())]
    return "\n".join(lines).rstrip() + "\n"


def _ways(ways: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    lines = ["| | GB/s | CPU-s/GB | cached when it returned |", "|---|---|---|---|"]
    for name, passes in ways.items():
        speeds, costs, parts = (
            [one[key] for one in passes] for key in ("gb_s", "cpu_s_gb", "cached_fraction")
        )
        lines.append(
            f"| {TITLES.get(name, name)} | {_cell(speeds, 2)} | {_cell(costs, 3)} "
            f"| {statistics.median(parts):.0%} |"
        )
    return lines


def _looks(looks: Mapping[str, Mapping[str, Sequence[float]]]) -> list[str]:
    titles = {"tidegate": "**Tidegate** (`cachestat`)", "mincore": "`mincore`, its fallback"}
    lines = ["| ms | nothing cached | all cached |", "|---|---|---|"]
    lines += [
        f"| {titles[name]} | {_cell(by['cold'], 2)} | {_cell(by['warm'], 2)} |"
        for name, by in looks.items()
    ]
    return lines


def _foreground(found: Mapping[str, Sequence[float]]) -> list[str]:
    lines = [
        "A reader of one file past the page cache, 4 MiB at a time, while others are prewarmed.",
        "",
        "| the reader | GB/s |",
        "|---|---|",
    ]
    return lines + [f"| {name} | {_cell(speeds, 2)} |" for name, speeds in found.items()]


def _decay(made: Mapping[str, Any]) -> list[str]:
    names = list(made["decay"][0]["cached"])
    lines = ["| after | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for sample in made["decay"]:
        cells = " | ".join(f"{sample['cached'][name]:.1%}" for name in names)
        lines.append(f"| {sample['at_s']:.0f} s | {cells} |")
    used = made["keeper_cpu_fraction"]
    if used is not None:
        lines += ["", f"Touching every 10 s took {used:.2%} of a core."]
    return lines


def _cell(values: Sequence[float], digits: int) -> str:
    median = statistics.median(values)
    return f"**{median:.{digits}f}** ({min(values):.{digits}f}–{max(values):.{digits}f})"


def write(made: Mapping[str, Any], folder: Path) -> list[Path]:
    """Both files; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"pages-{made['date']}"
    Path(f"{stem}.json").write_text(json.dumps(made, indent=1) + "\n")
    Path(f"{stem}.md").write_text(markdown(made))
    return [Path(f"{stem}.json"), Path(f"{stem}.md")]
