"""The scaling bench: which traces, how daily they are, what is made of the scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from autoscaler.replay.traces import from_rates
from bench import scaling, scaling_report, trace_report

DAY = 1440


def daily(days: int, tide: float, noise: float) -> np.ndarray:
    minutes = np.arange(days * DAY)
    rng = np.random.default_rng(5)
    hours = np.repeat(rng.normal(0.0, noise, days * 24), 60)
    return np.maximum(0.0, 100 + tide * np.sin(2 * np.pi * minutes / DAY) + hours)


@pytest.mark.parametrize(
    ("days", "tide", "noise", "expected"),
    [
        (7, 50.0, 5.0, "strong"),
        (7, 20.0, 15.0, "weak"),
        (7, 0.0, 15.0, "no"),
        (3, 0.0, 15.0, "no"),
        (1, 50.0, 0.0, "no"),
    ],
)
def test_how_daily_a_trace_is(days: int, tide: float, noise: float, expected: str) -> None:
    strength = scaling.seasonal_strength(from_rates("t", daily(days, tide, noise)))
    assert scaling.season_class(strength) == expected
    assert (strength is None) == (days == 1)


def test_windows_lie_evenly_over_a_long_trace() -> None:
    options = scaling.Options(data=Path(), days=2.0, windows=2)
    trace = from_rates("t", np.arange(20.0 * DAY))
    parts = [scaling.window_of(trace, window, options) for window in range(2)]
    begins = [part.requests[0] / DAY for part, _ in parts]
    assert begins == [pytest.approx(11 / 4), pytest.approx(33 / 4)]
    assert {part.seconds / 86_400 for part, _ in parts} == {9.0}
    short = from_rates("t", np.ones(5 * DAY))
    assert scaling.window_of(short, 0, options) == (short, 1)


def write_trace(folder: Path, name: str) -> None:
    rows = "".join(f"{60 * i},{600 + 300 * np.sin(i / 9):.0f}\n" for i in range(90))
    (folder / f"{name}.csv").write_text(f"t_s,requests\n{rows}")


def test_a_run_is_reported(tmp_path: Path) -> None:
    for name in ("one", "two", "two_lengths"):
        write_trace(tmp_path, name)
    (tmp_path / "broken.csv").write_text("t_s,requests\n0,0\n60,0\n")
    options = scaling.Options(
        data=tmp_path, cold_starts_s=(10.0,), policies=("hpa", "static:30", "oracle"), jobs=1
    )
    rows = scaling.run_all(options)
    assert [row["trace"] for row in rows] == ["one", "two"]
    made = scaling_report.document(
        rows, date="d", command="c", machine={"cpu": "m", "cores": 2},
        options=scaling.as_plain(options),
    )  # fmt: skip
    assert made["subject"] == "hpa"
    scores = rows[0]["scores"]
    assert made["against"]["oracle"]["least"] == pytest.approx(
        min(
            row["scores"]["hpa"]["goodput_per_replica_hour"]
            / row["scores"]["oracle"]["goodput_per_replica_hour"]
            for row in rows
        )
    )
    paths = scaling_report.write(made, tmp_path / "out", "scaling")
    assert json.loads(paths[0].read_text())["rows"][0]["scores"].keys() == scores.keys()
    text = paths[1].read_text()
    assert f"{100 * scores['hpa']['violated_fraction']:.2f} @ " in text
    assert ElementTree.fromstring(paths[2].read_text()).tag.endswith("svg")


def row(ours: float, theirs: float, kind: str = "weak") -> dict[str, Any]:
    scores = {"auto": ours, "hpa": theirs}
    return {
        "trace": kind,
        "cold_start_s": 60.0,
        "class": kind,
        "window": 0,
        "scores": {
            name: {
                "goodput_per_replica_hour": value,
                "violated_fraction": 0.0,
                "replica_hours": 1.0,
            }
            for name, value in scores.items()
        },
    }


def test_what_is_below_the_bar_is_marked() -> None:
    made = scaling_report.document(
        [row(200.0, 100.0), row(95.0, 100.0, "no")], date="d", command="c",
        machine={"cpu": "m", "cores": 2}, options={"replicas": 12.0, "days": 2.0},
    )  # fmt: skip
    against = made["against"]["hpa"]
    assert against["mean"] == pytest.approx((2 * 0.95) ** 0.5)
    assert against["least_on"] == "no at 60 s"
    assert against["by_class"]["weak"] == pytest.approx(2.0)
    assert "**0.950**" in scaling_report.markdown(made)
    assert (
        json.loads(json.dumps(trace_report.without_nan(made)))["against"]["hpa"]["by_class"][
            "strong"
        ]
        is None
    )
