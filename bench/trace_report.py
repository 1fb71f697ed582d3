"""What the benches over a folder of traces share: its files, and how a report is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

NOT_TRACES = ("_lengths", "_native10min", "_clients_minute")
"""Files beside the traces: statistics of clients, and the same traffic client by client."""


def find(folder: Path, words: Sequence[str]) -> list[Path]:
    """The traces of a folder by name: those with one of these words in it, or all."""
    paths = sorted([*folder.glob("*.parquet"), *folder.glob("*.csv")])
    paths = [one for one in paths if not one.stem.endswith(NOT_TRACES)]
    return [one for one in paths if not words or any(word in one.stem for word in words)]


def short(trace: str) -> str:
    """A trace's name without what most have."""
    return trace.removeprefix("servegen_").removeprefix("nab_").removesuffix("_minute")


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def write(
    made: Mapping[str, Any], folder: Path, name: str, *, markdown: str, picture: str
) -> list[Path]:
    """The three files of a report; what is NaN is ``null``."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{kind}" for kind in ("json", "md", "svg")]
    paths[0].write_text(json.dumps(without_nan(made), indent=1, allow_nan=False) + "\n")
    paths[1].write_text(markdown + "\n")
    paths[2].write_text(picture)
    return paths


def without_nan(value: Any) -> Any:
    """The same with ``None`` for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: without_nan(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
