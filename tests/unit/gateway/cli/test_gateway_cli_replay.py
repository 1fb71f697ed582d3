"""``tidegate replay``: a file or a pool through policies; what is printed, drawn and refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from autoscaler.signals.decisions import DecisionFigures, DecisionRecord, put_decisions
from autoscaler.signals.history import FILE_NAME, HistoryStore
from autoscaler.signals.series import PoolMinute
from autoscaler.types import CapacitySource, ScaleReason, Signal
from gateway.cli.base import Effects
from gateway.cli.main import main

NOW_S = 1_800_000_000.0
MINUTES = 60
ROOT = Path(__file__).resolve().parents[4]


def waves(minute: int) -> float:
    return 600 + 400 * math.sin(minute / 10)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "tide.csv"
    rows = "".join(f"{60 * i},{waves(i):.0f}\n" for i in range(MINUTES))
    path.write_text(f"t_s,requests\n{rows}")
    return path


def run(*arguments: str) -> int:
    return main(["replay", *arguments], Effects(now_s=lambda: NOW_S))


def test_policies_are_compared_in_a_table(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(trace), "-p", "hpa", "-p", "static:30", "-p", "oracle") == 0
    text = capsys.readouterr().out
    rows = {line.split()[0]: line for line in text.splitlines() if " %" in line}
    assert list(rows) == ["hpa", "static-30", "oracle"]
    assert rows["oracle"].split()[1] == "*"
    assert "0.000 %" in rows["static-30"]
    assert "tide: 30 min scored" in text


def test_json_has_the_same_figures(trace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(trace), "-p", "static:3", "--replicas", "6", "--price", "2", "--json") == 0
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert score["replica_hours"] == pytest.approx(3 * 0.5)
    assert score["cost"] == pytest.approx(2 * score["replica_hours"])
    assert 0 < score["violations"] <= score["requests"]


def test_a_capacity_takes_the_trace_as_it_is(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(trace), "-p", "oracle", "--capacity", "5", "--json") == 0
    score = json.loads(capsys.readouterr().out)["scores"][0]
    assert score["requests"] == pytest.approx(sum(round(waves(i)) for i in range(30, 60)), rel=0.01)
    # 4 to 14 a second, 5 of them a replica's.
    assert 0.5 < score["replica_hours"] < 2.0


def test_it_is_drawn(trace: Path, tmp_path: Path) -> None:
    for name in ("a.svg", "a.html"):
        assert run(str(trace), "-p", "hpa", "-p", "ahpa", "--plot", str(tmp_path / name)) == 0
    assert (tmp_path / "a.svg").read_text().startswith("<svg")
    page = (tmp_path / "a.html").read_text()
    assert page.count("<svg") == 3
    assert not re.search(r"(src|href)=|<script", page)


def note(directory: Path, capacity: float, source: CapacitySource, *, lead_s: float) -> None:
    """Keep a decision of the pool that was made with these."""
    seen = DecisionFigures(
        desired=1,
        supply=1,
        reason=ScaleReason.STEADY,
        detail="",
        signal=Signal.NONE,
        bound=None,
        panicking=False,
        reactive=None,
        forecast=None,
        level=None,
        fallback="",
        recommended=None,
        capacity_tokens_per_s=capacity,
        capacity_source=source,
        lead_s=lead_s,
    )
    at_s = NOW_S - 1_000.0 / lead_s
    record = DecisionRecord(pool="llama", at_s=at_s, until_s=NOW_S, count=1, figures=seen)
    store = HistoryStore(directory / FILE_NAME, max_age_s=1e9, max_bytes=10**8)
    store.transact(lambda connection: put_decisions(connection, [record]), writes=True)
    store.close()


def test_a_pool_is_replayed_from_its_history(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = HistoryStore(tmp_path / FILE_NAME, max_age_s=1e9, max_bytes=10**8)
    first = int(NOW_S / 60) - MINUTES
    minutes = [
        PoolMinute(
            pool="llama",
            minute=first + i,
            values={
                "arrivals": waves(i),
                "input_tokens": 300 * waves(i),
                "output_tokens": 100 * waves(i),
            },
        )
        for i in range(MINUTES)
    ]
    store.fill(minutes, NOW_S)
    store.close()
    sets = ("--set", f"state_dir={tmp_path}")
    assert run("llama", "-p", "hpa", "--json", *sets) == 0
    assert json.loads(capsys.readouterr().out)["trace"] == "llama"
    assert run("llama", "-p", "hpa", *sets) == 0
    assert "about 12 replicas" in capsys.readouterr().out
    note(tmp_path, 4_000.0, CapacitySource.SATURATED, lead_s=30.0)
    note(tmp_path, 9_000.0, CapacitySource.DERIVED, lead_s=90.0)
    assert run("llama", "-p", "hpa", *sets) == 0
    printed = capsys.readouterr().out
    assert "sustains 4,000.0 tokens/s" in printed
    assert "starts in 30 s" in printed
    assert "scaled to" not in printed
    assert run("llama", "-p", "hpa", "--capacity", "500", "--cold-start", "9", *sets) == 0
    printed = capsys.readouterr().out
    assert "sustains 500.0 tokens/s" in printed
    assert "starts in 9 s" in printed
    assert run("lama", "-p", "hpa", *sets) == 2
    assert "llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("-p", "hap"), "there is no policy 'hap'"),
        (("--plot", "a.png"), ".svg or .html"),
        (("--plot", "/none/a.svg", "-p", "hpa"), "there is no directory"),
        (("--spread", "odd", "-p", "hpa"), "'even', 'poisson'"),
        (("--column", "clients", "-p", "hpa"), "no column 'clients'"),
        (("--plot", "nowhere/a.svg"), "no directory nowhere"),
        (("--plot", "/proc/a.svg", "-p", "static", "--json"), "--plot /proc/a.svg"),
        (("--cold-start", "nan"), "--cold-start nan: a number from 0"),
        (("--capacity", "0"), "--capacity 0: a number from 0.001"),
        (("--capacity", "0.001", "--replicas", "90000"), "larger --capacity"),
        (("--replicas", "0"), "--replicas 0"),
        (("--ttft", "0"), "--ttft 0"),
        (("--itl", "nan"), "--itl nan"),
        (("--days", "-1"), "--days -1"),
        (("--history-days", "-1"), "--history-days -1"),
        (("--min", "5", "--max", "2"), "--max 2: a number from 5"),
        (("--price", "-1"), "--price -1: a number from 0"),
        (("--seed", "-1"), "--seed -1"),
    ],
)
def test_what_is_wrong_is_one_line(
    trace: Path,
    arguments: tuple[str, ...],
    problem: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(str(trace), *arguments) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"t_s,requests\n0,5\n60,x\n", "column requests: 'x' in row 2 is no number"),
        (b"t_s,requests\n0,5\n60,-4\n", "column requests: -4 in row 2 is below 0"),
        (b"t_s,requests\nnoon,5\n60,4\n", "column t_s: 'noon' in row 1 is no time"),
        (b"t_s,requests\n0,5\nnan,4\n", "column t_s: there is no time in row 2"),
        (b"t_s,requests\n0,5\n", "two rows"),
        (b"\xff\xfe,requests\n0,5\n", "no CSV file"),
    ],
)
def test_a_file_that_is_no_trace_is_named_with_what_is_wrong_in_it(
    tmp_path: Path, content: bytes, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    assert run(str(path), "-p", "hpa") == 2
    error = capsys.readouterr().err
    assert f"{path}" in error
    assert problem in error
    assert len(error.splitlines()) == 1


def test_a_file_with_a_byte_order_mark_is_read(trace: Path) -> None:
    trace.write_bytes(b"\xef\xbb\xbf" + trace.read_bytes())
    assert run(str(trace), "-p", "static") == 0


def test_a_policy_that_watches_tokens_is_left_out_where_there_are_none(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(trace), "-p", "llm-d-slo", "-p", "hpa", "--json") == 0
    captured = capsys.readouterr()
    assert "llm-d-slo" in captured.err
    assert [one["policy"] for one in json.loads(captured.out)["scores"]] == ["hpa"]


def test_the_examples_of_the_reference_run(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "reference" / "replay.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 3
    for example in examples:
        exec(compile(example, "replay.md", "exec"), {})
    assert "replica-hours" in capsys.readouterr().out
