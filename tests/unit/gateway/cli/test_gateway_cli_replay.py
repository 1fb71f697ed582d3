"""``tidegate replay``: a file or a pool through policies; what is printed, drawn and refused."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest

from autoscaler.signals.history import FILE_NAME, HistoryStore
from autoscaler.signals.series import PoolMinute
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
    assert run("lama", "-p", "hpa", *sets) == 2
    assert "llama" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("-p", "hap"), "there is no policy 'hap'"),
        (("--plot", "a.png"), ".svg or .html"),
        (("--plot", "/none/a.svg", "-p", "hpa"), "No such file or directory"),
        (("--spread", "odd", "-p", "hpa"), "'even', 'poisson'"),
        (("--column", "clients", "-p", "hpa"), "no column 'clients'"),
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
