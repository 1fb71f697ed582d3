"""Writes a run of the remote benchmark as JSON (everything) and Markdown (to read)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TITLES = {
    "http": "HTTP",
    "https": "HTTPS",
    "s3": "S3 (http, signed requests)",
    "oss": "OSS (http, signed requests)",
}
MARK = {True: "met", False: "**MISSED**", None: "not measured"}


def _cell(spread: Mapping[str, float], scale: float = 1.0, digits: int = 2) -> str:
    median, low, high = (spread[name] / scale for name in ("median", "low", "high"))
    return f"**{median:.{digits}f}** ({low:.{digits}f}–{high:.{digits}f})"


def markdown(made: Mapping[str, Any]) -> str:
    """The report to read."""
    machine, noise = made["machine"], made["noise"]
    gb = made["size_bytes"] / 1e9
    lines = [
        f"# From the store to the disk, {made['date']}",
        "",
        f"`{made['command']}` · {gb:.2f} GB in {made['files']} files, {made['rounds']} rounds · "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB, {machine['cpu']}, Linux "
        f"{machine['kernel']}, Python {machine['python']} · other work beside: "
        f"{noise['other_busy_fraction']:.2f} cores",
        "",
        "Each download in a process of its own from nginx on the same machine, 16 ranges of 8 MiB "
        "where a client lets one choose, the BLAKE3 and XXH3 of every piece taken and compared; "
        "`tidegate` lists, plans and journals too. CPU is the client's process alone. Median "
        "(lowest–highest).",
        "",
        "| bar | limit | measured | |",
        "|---|---|---|---|",
        *(
            f"| {v['text']} | {v['limit']} | {v['measured']} | {MARK[v['passed']]} |"
            for v in made["verdicts"]
        ),
    ]
    for kind, title in TITLES.items():
        rows = {c: f for c, f in made["figures"].items() if c.startswith(f"{kind}:")}
        if not rows:
            continue
        lines += ["", f"## {title}", "", "| | GB/s | CPU-s/GB | peak resident MiB | digests |",
                  "|---|---|---|---|---|"]  # fmt: skip
        ordered = sorted(rows, key=lambda client: -float(rows[client]["gb_s"]["median"]))
        lines += [
            f"| {client.partition(':')[2]} | {_cell(rows[client]['gb_s'])} "
            f"| {_cell(rows[client]['cpu_s_per_gb'])} "
            f"| {_cell(rows[client]['peak_kib'], 1024, 0)} "
            f"| {'right' if rows[client]['right'] else '**WRONG**'} |"
            for client in ordered
        ]
    lines += ["", "Versions: " + ", ".join(f"{n} {v}" for n, v in made["versions"].items()) + "."]
    return "\n".join(lines) + "\n"


def write(made: Mapping[str, Any], folder: Path) -> tuple[Path, ...]:
    """Both files; where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"remote-{made['date']}"
    text = markdown(made)
    stem.with_suffix(".json").write_text(json.dumps(made, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    print("\n" + text)
    return stem.with_suffix(".json"), stem.with_suffix(".md")
