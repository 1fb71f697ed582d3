"""From the load generator's answers to figures, Markdown and SVG."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import datapath, report, summary
from bench.plot import svg
from bench.profile import shares


def answer(cpu_s: float, done: int, *, events: int = 0, errors: int = 0, p50: float = 100.0,
           data: bool = True) -> dict[str, Any]:  # fmt: skip
    watch = {"data": {"cpu_s": cpu_s, "rss_start_kib": 1, "rss_end_kib": 2, "rss_peak_kib": 3}}
    return {
        "window_s": 2.0,
        "done": done,
        "events": events,
        "peak_active": 1,
        "errors": {"total": errors},
        "first_error": "",
        "latency_us": {"count": done, "p50": p50, "p99": p50 * 3},
        "watch": watch if data else {},
    }


@pytest.fixture
def results() -> datapath.Results:
    made = datapath.Results()
    for number in range(3):
        factor = 1 + number * 0.1
        for name, cost_us in (("tidegate", 24), ("nginx", 15), ("sglang:round_robin", 57)):
            made.rounds["small"][name][number] = answer(cost_us * 1e-6 * 1000 * factor, 1000)
            made.rounds["stream"][name][number] = answer(0.1 * factor, 0, events=10_000)
            made.rounds["latency"][name][number] = answer(0.01, 600, p50=100 + cost_us)
        made.rounds["small"]["direct"][number] = answer(0, 9000, data=False)
        made.rounds["latency"]["direct"][number] = answer(0, 600, p50=80.0 + number, data=False)
    made.versions = {"tidegate": "commit abc", "nginx": "nginx/1.22.1"}
    made.body_bytes = {"rss-220kB": 221_000, "rss-880kB": 885_000}
    made.memory = {"tidegate": {k: answer(0, 1) for k in ("rss-small", "rss-220kB", "rss-880kB")}}
    made.held = {"tidegate": answer(1.0, 2000) | {"peak_active": 2000}}
    return made


def document(results: datapath.Results) -> dict[str, Any]:
    machine = {"cpu": "a <cpu>", "cores": 2, "virtual": True, "memory_gib": 4, "kernel": "6"}
    return report.document(
        results, options=datapath.Options(rounds=3), command="python -m bench datapath",
        date="2026-01-02", machine=machine, noise={"other_busy_fraction": 0.1, "stolen_s": 0.0},
    )  # fmt: skip


def test_cost_is_cpu_per_request_or_per_chunk(results: datapath.Results) -> None:
    cost = summary.costs(results.rounds)
    assert cost["small"]["tidegate"][0] == pytest.approx(24e-6)
    assert cost["stream"]["nginx"][0] == pytest.approx(10e-6)


def test_a_replica_itself_has_no_router_cost(results: datapath.Results) -> None:
    assert "direct" not in summary.costs(results.rounds)["small"]
    assert summary.table(results.rounds)["small"]["direct"]["cpu_ms_per_1000"] is None


def test_a_round_without_an_answer_is_left_out_not_free(results: datapath.Results) -> None:
    results.rounds["small"]["tidegate"][1] = answer(0.5, 0, errors=9)
    row = summary.table(results.rounds)["small"]["tidegate"]
    assert row["cpu_ms_per_1000"]["rounds"] == 2
    assert row["errors"] == 9


def test_ratios_and_bars(results: datapath.Results) -> None:
    made = document(results)
    row = made["figures"]["small"]["tidegate"]
    assert row["ratio_to_nginx"]["median"] == pytest.approx(15 / 24)
    assert row["ratio_to_better_peer"] == pytest.approx(
        {"of": "sglang:round_robin", "median": 57 / 24, "low": 57 / 24, "high": 57 / 24}
    )
    states = [verdict["passed"] for verdict in made["verdicts"]]
    assert states == [True, True, None, None, True, True, True]


def test_added_latency_is_beyond_the_same_rounds_direct_one(results: datapath.Results) -> None:
    row = summary.added_latency(results.rounds, datapath.DIRECT)["tidegate"]
    assert row["p50"]["median"] == 124
    assert (row["added_p50"]["low"], row["added_p50"]["high"]) == (42, 44)


def test_markdown_says_what_was_missed_and_what_did_not_start(results: datapath.Results) -> None:
    results.rounds["small"]["tidegate"][0]["errors"]["total"] = 1
    results.missing["vllm:round_robin"] = "not ready after 40 s\nlog"
    text = report.markdown(document(results), "plot.svg")
    assert "**MISSED**" in text
    assert "**vllm-router round_robin did not start**: log; not ready after 40 s" in text
    assert "| Tidegate | **26.4** (24.0–28.8) |" in text
    assert "with 1 errors" in text


def test_svg_is_well_formed_and_has_a_bar_for_each_contender(results: datapath.Results) -> None:
    root = ElementTree.fromstring(svg(document(results)))
    bars_drawn = [
        e for e in root.iter("{http://www.w3.org/2000/svg}rect") if e.get("height") == "14"
    ]
    assert len(bars_drawn) == 6


def test_shares_of_folded_stacks() -> None:
    leaf, within, total = shares("main;read;recv 3\nmain;write 1\nbroken line\n")
    assert total == 4
    assert leaf["recv"] == 3
    assert within["main"] == 4


def test_written_files_say_the_same(results: datapath.Results, tmp_path: Path) -> None:
    made = document(results)
    paths = report.write(made, tmp_path, "datapath-2026-01-02")
    assert [path.suffix for path in paths] == [".json", ".md", ".svg"]
    read = json.loads(paths[0].read_text())
    assert read["verdicts"] == made["verdicts"]
    assert read["raw"]["rounds"]["small"]["nginx"]["2"]["done"] == 1000
    assert "(datapath-2026-01-02.svg)" in paths[1].read_text()
