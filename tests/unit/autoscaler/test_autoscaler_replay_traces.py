"""Traces from files of each shape, and cut, scaled and spread."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from autoscaler.replay.traces import RequestTrace, Spread, Trace, TraceError, from_rates, read


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def rates(path: Path, column: str | None = None) -> Trace:
    found = read(path, column)
    assert isinstance(found, Trace)
    return found


def test_minutes_with_tokens(tmp_path: Path) -> None:
    lines = [f"{60 * i},{i + 1},{10 * (i + 1)},{5 * (i + 1)}" for i in range(4)]
    text = "\n".join(["t_s,requests,input_tokens,output_tokens", *lines]) + "\n"
    trace = rates(write_csv(tmp_path / "a.csv", text))
    assert trace.requests.tolist() == [1, 2, 3, 4]
    assert trace.means == (10.0, 5.0)
    assert (trace.step_s, trace.start_s, trace.counted) == (60.0, None, False)
    assert trace.tokens_per_s == pytest.approx(150 / 240)


def test_counts_with_dates_and_a_gap(tmp_path: Path) -> None:
    """Each request counts as one token; a step that is missing lies between its neighbours."""
    text = "timestamp,value\n2026-01-01 00:00:00,10\n2026-01-01 00:01:00,20\n"
    text += "2026-01-01 00:03:00,40\n2026-01-01 00:04:00,50\n"
    trace = rates(write_csv(tmp_path / "b.csv", text))
    assert trace.requests.tolist() == [10, 20, 30, 40, 50]
    assert trace.counted
    assert trace.prompt_tokens.tolist() == trace.requests.tolist()
    assert trace.start_s == 1767225600.0


def test_steps_of_five_minutes_become_minutes(tmp_path: Path) -> None:
    text = "t_s,value\n" + "".join(f"{300 * i},{100 * (i + 1)}\n" for i in range(3))
    trace = rates(write_csv(tmp_path / "c.csv", text))
    assert (trace.step_s, len(trace.requests)) == (60.0, 15)
    assert trace.requests[2] == pytest.approx(20.0)  # the middle of the first
    assert trace.requests[7] == pytest.approx(40.0)
    assert trace.requests[4] == pytest.approx(28.0)  # on the line between


def test_clients_side_by_side_are_added_or_taken_alone(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "d.csv", "t_s,c0,c1\n0,1,5\n60,2,6\n120,3,7\n")
    assert rates(path).requests.tolist() == [6, 8, 10]
    assert rates(path, "c1").requests.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("head", "scale"),
    [("t_s,input_tokens,output_tokens", 1), ("t_ms,input_length,output_length", 1000)],
)
def test_one_row_per_request(tmp_path: Path, head: str, scale: int) -> None:
    rows = [(5.0, 100, 10), (5.5, 200, 20), (7.25, 300, 30)]
    lines = "".join(f"{at * scale:g},{a},{b}\n" for at, a, b in rows)
    trace = read(write_csv(tmp_path / "e.csv", f"{head}\n{lines}"))
    assert isinstance(trace, RequestTrace)
    assert trace.at_s.tolist() == [0.0, 0.5, 2.25]
    binned = trace.binned()
    assert binned.requests.tolist() == [2, 0, 1]
    assert binned.prompt_tokens.tolist() == [300, 0, 300]


def test_parquet_with_lists_beside(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "t_ms": [0, 1500],
            "input_length": [10, 20],
            "output_length": [1, 2],
            "hash_ids": [[1, 2], [3]],
        }
    )
    path = tmp_path / "f.parquet"
    parquet.write_table(table, path)
    trace = read(path)
    assert isinstance(trace, RequestTrace)
    assert trace.at_s.tolist() == [0.0, 1.5]


@pytest.mark.parametrize(
    "times",
    [
        ["2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"],
        [datetime(2026, 1, 1, 0, minute, tzinfo=UTC) for minute in (0, 1)],
        [1767225600, 1767225660],
        ["1767225600", "1767225660"],
    ],
    ids=["text", "times", "numbers", "numbers as text"],
)
def test_times_in_parquet(tmp_path: Path, times: list[object]) -> None:
    parquet.write_table(pyarrow.table({"time": times, "requests": [1, 2]}), tmp_path / "g.parquet")
    trace = rates(tmp_path / "g.parquet")
    assert (trace.start_s, trace.step_s) == (1767225600.0, 60.0)
    assert trace.requests.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "empty"),
        ("t_s,requests\n", "no rows"),
        ("a,requests\n0,1\n60,2\n", "no column of times"),
        ("t_s,requests\n0,1\n60\n", "line 3"),
        ("t_s,requests\n0,x\n60,2\n", "'x' in row 1 is no number"),
        ("t_s,requests\nyesterday,1\n60,2\n", "'yesterday' in row 1 is no time"),
        ("t_s,requests\n0,0\n60,0\n", "no request"),
        ("t_s\n0\n60\n", "no column of requests"),
        ("t_s,requests\n0,1\n", "two rows"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(TraceError, match=problem):
        read(write_csv(tmp_path / "g.csv", text))


def test_unknown_demand_lies_between_what_is_known() -> None:
    trace = from_rates("h", np.array([1.0, math.nan, 3.0, math.nan]))
    assert trace.requests.tolist() == [1.0, 2.0, 3.0, 3.0]


def test_a_part_a_multiple_and_the_history() -> None:
    trace = from_rates("i", np.arange(1.0, 11.0), start_s=600.0)
    part = trace.part(120.0, 300.0).scaled(2.0)
    assert part.requests.tolist() == [6.0, 8.0, 10.0]
    assert part.start_s == 720.0
    history = part.history()
    assert history.values.tolist() == pytest.approx([0.1, 8 / 60, 10 / 60])
    assert history.start_s == 720.0


def test_a_minute_is_spread_evenly_or_by_chance() -> None:
    trace = from_rates(
        "j", np.array([60.0, 120.0]), np.array([600.0, 0.0]), np.array([60.0, 120.0])
    )
    rate, prompt, output = trace.per_second()
    assert rate.tolist() == [1.0] * 60 + [2.0] * 60
    assert (prompt[0], prompt[-1], output[-1]) == (10.0, 0.0, 1.0)
    drawn, _, _ = trace.per_second(Spread.POISSON, seed=3)
    again, _, _ = trace.per_second(Spread.POISSON, seed=3)
    assert drawn.tolist() == again.tolist() != rate.tolist()
    assert abs(drawn.sum() - 180) < 5 * math.sqrt(180)
