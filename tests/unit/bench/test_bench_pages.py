"""Every way into the page cache brings the files in, and the report judges what was measured."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench import pages, pages_report
from bench.pages import Pass, Results, Sample
from modelcache.pagecache import residency
from modelcache.types import FileRange

MIB = 1024 * 1024


@pytest.fixture
def files() -> Iterator[list[FileRange]]:
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-", dir="/var/tmp") as folder:
        paths = [Path(folder, name) for name in ("a", "b")]
        for path in paths:
            path.write_bytes(os.urandom(9 * MIB + 5))
        yield [FileRange(path=str(path)) for path in paths]


@pytest.mark.parametrize("way", [way for way in pages.WAYS if way not in ("willneed", "vmtouch")])
def test_every_way_brings_the_files_in(files: list[FileRange], way: str) -> None:
    pages.make_cold(files)
    pages.WAYS[way](files)
    assert residency.residency(files).bytes_cached == 2 * (9 * MIB + 5)


def results() -> Results:
    good = Pass(gb_s=2.0, cpu_s_gb=0.04, cached_fraction=1.0)
    return Results(
        size_bytes=4_000_000_000,
        ways={"tidegate": [good, replace(good, cpu_s_gb=0.2), good], "read": [good]},
        looks_ms={"tidegate": {"cold": [0.2], "warm": [0.4, 4.9, 50.0]}},
        decay=[Sample(at_s=0.0, cached={"left alone": 1.0, "kept, touched": 1.0})],
        keeper_cpu_fraction=0.004,
        foreground={"alone": [1.0], "beside prewarm": [0.5]},
        missing={"vmtouch": "not installed"},
        elapsed_s=12.0,
    )


def passed(given: Results) -> list[bool]:
    return [verdict["passed"] for verdict in pages_report.verdicts(given)]


def test_bars() -> None:
    assert passed(results()) == [True, True, True]
    dear = results()
    dear.ways["tidegate"] = [Pass(gb_s=2.0, cpu_s_gb=0.051, cached_fraction=0.5)]
    dear.looks_ms["tidegate"]["warm"] = [5.0]
    assert passed(dear) == [False, False, False]
    # Files of half the size: what is measured counts for 4 GB.
    small = results()
    small.size_bytes //= 2
    assert passed(small) == [True, True, False]


def test_report(tmp_path: Path) -> None:
    made = pages_report.document(
        results(),
        command="python -m bench pages",
        date="2026-11-24",
        machine={"cpu": "c", "cores": 2, "memory_gib": 8, "kernel": "6"},
        noise={"other_busy_fraction": 0.5},
    )
    paths = pages_report.write(made, tmp_path)
    assert [path.name for path in paths] == ["pages-2026-11-24.json", "pages-2026-11-24.md"]
    text = paths[1].read_text()
    assert "| preheat, CPU-s/GB (median) | at most 0.05 | 0.040 | met |" in text
    assert "vmtouch: not installed." in text
    assert "| 0 s | 100.0% | 100.0% |" in text
    assert "0.40% of a core" in text
