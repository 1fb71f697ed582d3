"""What a run of the loaders came to: bars, tables, JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import loading, stats

Rows = Mapping[str, Mapping[str, Sequence[tuple[float, float]]]]

COLD_OF_RAW = 0.9
COLD_CPU_S_GB = 0.3
WARM_OF_PEER = 1.5
IN_PLACE_OF_PEER = 1.0
OURS = "tidegate"
LIMITS = ("raw-direct", "fio", "memcpy")

TITLES = {
    "tidegate": "Tidegate, checksums on",
    "tidegate-unverified": "Tidegate, checksums off",
    "tidegate-iterate": "Tidegate `iterate`, tensors in reused memory, checksums on",
    "tidegate-load": "Tidegate `load`, tensors in fresh memory, checksums on",
    "load_file": "safetensors `load_file`",
    "safe_open": "safetensors `safe_open`, tensor by tensor",
    "vllm-lazy": "vLLM lazy (its default)",
    "vllm-eager": "vLLM eager",
    "vllm-prefetch": "vLLM prefetch",
    "runai": "runai-model-streamer",
    "runai-1gb": "runai-model-streamer, 1 GB of memory",
    "fastsafetensors": "fastsafetensors (no GPUDirect, CPU)",
    "instanttensor": "InstantTensor",
    "tensorizer": "tensorizer (its own format)",
    "raw-direct": "raw: O_DIRECT, 8 threads × 8 MiB",
    "fio": "raw: fio, libaio, 8 × 8 MiB",
    "memcpy": "memcpy, a thread a core",
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One bar; ``passed`` is ``None`` where the run did not measure it."""

    text: str
    limit: str
    measured: str
    passed: bool | None


def _by_round(rows: Rows, name: str, kind: str, index: int = 0) -> dict[int, float]:
    return {n: pair[index] for n, pair in enumerate(rows.get(name, {}).get(kind, ()))}


def _best(rows: Rows, names: Sequence[str], kind: str) -> str | None:
    """The fastest by median."""
    speeds = {name: stats.spread(list(_by_round(rows, name, kind).values())) for name in names}
    known = {name: found.median for name, found in speeds.items() if found is not None}
    return max(known, key=lambda name: known[name]) if known else None


def _ratio(text: str, rows: Rows, kind: str, against: Sequence[str], at_least: float) -> Verdict:
    other = _best(rows, against, kind)
    limit = f"≥ {at_least:.2f}x"
    if other is None or not rows.get(OURS, {}).get(kind):
        return Verdict(text=text, limit=limit, measured="not measured", passed=None)
    found = stats.paired_ratio(_by_round(rows, OURS, kind), _by_round(rows, other, kind))
    assert found is not None
    measured = f"{found.median:.2f}x {other} ({found.low:.2f}–{found.high:.2f})"
    return Verdict(text=text, limit=limit, measured=measured, passed=found.median >= at_least)


def _peers(rows: Rows) -> list[str]:
    return [name for name in rows if not name.startswith(OURS) and name not in LIMITS]


def verdicts(figures: Mapping[str, Rows]) -> list[Verdict]:
    """The bars, checksums on: three for reading into host memory that is used again, one for the
    model's own memory."""
    rows, in_place = figures.get("ring", {}), figures.get("model", {})
    cost = stats.spread(list(_by_round(rows, OURS, "cold", 1).values()))
    return [
        _ratio("cold, against the raw disk", rows, "cold", LIMITS[:2], COLD_OF_RAW),
        Verdict(
            text="cold, CPU",
            limit=f"≤ {COLD_CPU_S_GB} CPU-s/GB",
            measured="not measured" if cost is None else f"{cost.median:.3f} CPU-s/GB",
            passed=None if cost is None else cost.median <= COLD_CPU_S_GB,
        ),
        _ratio("warm, against the best peer", rows, "warm", _peers(rows), WARM_OF_PEER),
        _ratio(
            "warm and in place on a CPU, against the best peer", in_place, "warm",
            _peers(in_place), IN_PLACE_OF_PEER,
        ),
    ]  # fmt: skip


def _cell(pairs: Sequence[tuple[float, float]] | None) -> str:
    if not pairs:
        return "–"
    speed, cost = loading.medians(pairs)
    low, high = min(p[0] for p in pairs), max(p[0] for p in pairs)
    spread = f" [{low:.2f}–{high:.2f}]" if len(pairs) > 1 else ""
    return f"**{speed:.2f}**{spread} ({cost:.3f})"


def _table(made: Mapping[str, Any], sink: str, names: Sequence[str]) -> list[str]:
    rows, missing = made["figures"].get(sink, {}), made["missing"]
    lines = ["| GB/s [lowest–highest] (CPU-s per GB) | cold | warm |", "|---|---|---|"]
    for name in names:
        if name in rows:
            cells = f"{_cell(rows[name].get('cold'))} | {_cell(rows[name].get('warm'))}"
        elif f"{sink}/{name}" in missing:
            cells = f"– | – {missing[f'{sink}/{name}']}"
        else:
            continue
        lines.append(f"| {TITLES[name]} | {cells} |")
    return lines


def document(
    results: loading.Results,
    *,
    options: loading.Options,
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
        "elapsed_s": round(results.elapsed_s, 1),
        "rounds": options.rounds,
        "gb": results.gb,
        "versions": results.versions,
        "missing": results.missing,
        "wrong": results.wrong,
        "verdicts": [dataclasses.asdict(v) for v in verdicts(results.figures)],
        "figures": results.figures,
    }


def markdown(made: Mapping[str, Any]) -> str:
    """The report to read."""
    machine, noise = made["machine"], made["noise"]
    mark = {True: "met", False: "**MISSED**", None: "not measured"}
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines = [
        f"# Loading weights, {made['date']}",
        "",
        f"`{made['command']}` · {made['gb']:.2f} GB of BF16 tensors in safetensors files, "
        f"{made['rounds']} rounds, {made['elapsed_s']:.0f} s",
        "",
        f"{machine['cpu']}, {machine['cores']} cores"
        f"{' (virtual)' if machine['virtual'] else ''}, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}. The machine was busy for {noise['busy_fraction']:.1f} cores "
        "on average, others' work included, and waited to run for "
        f"{noise['pressure_fraction']:.0%} of the time: trust ratios more than figures, and CPU "
        "per GB more than GB/s.",
        "",
        f"Versions: {versions}.",
        "",
        "Each contender is a process of its own, in every round but in the short form; the order "
        "turns from round to round. Cold: none of the files' pages is cached. Warm: all are; the "
        f"middle one of {loading.WARM_PASSES} passes after one to warm up (the short form: one "
        "pass a round, all contenders in turn). CPU is user and system of the whole process. No "
        "GPU was there: a pinned copy is not among the limits.",
        "",
        "## The bars",
        "",
        "| bar | limit | measured | |",
        "|---|---|---|---|",
        *(
            f"| {v['text']} | {v['limit']} | {v['measured']} | {mark[v['passed']]} |"
            for v in made["verdicts"]
        ),
        "",
        "## To host memory that is used again",
        "",
        "Where a copy to a GPU would start. Loaders that give maps of the file copy each tensor "
        "to 8 MiB of such memory; the others' own buffers count as they are.",
        "",
        *_table(made, "ring", (*loading.RAW, *loading.RING)),
        "",
        "## To the model's own memory",
        "",
        "Every tensor copied to its place in memory that is there already, as vLLM does on a CPU "
        "(`load`: its own, fresh memory; `iterate`: without `in_place_copies`). The libraries map "
        "files, which ends the process when one is cut short.",
        "",
        *_table(made, "model", loading.MODEL),
    ]
    if made["wrong"]:
        lines += ["", "**Wrong**: " + "; ".join(made["wrong"])]
    return "\n".join(lines) + "\n"


def write(made: Mapping[str, Any], folder: Path, stem: str) -> list[Path]:
    """Write ``stem``.json and .md into ``folder``; returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.json", folder / f"{stem}.md"]
    parts = (f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in made.items())
    paths[0].write_text("{\n" + ",\n".join(parts) + "\n}\n")
    paths[1].write_text(markdown(made))
    return paths


def terminal(made: Mapping[str, Any]) -> str:
    """The few lines to print at the end of a run."""
    mark = {True: "met   ", False: "MISSED", None: "  –   "}
    return "".join(
        f"{mark[v['passed']]} {v['text']}: {v['measured']} (bar {v['limit']})\n"
        for v in made["verdicts"]
    )
