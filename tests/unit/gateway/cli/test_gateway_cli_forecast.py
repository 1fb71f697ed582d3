"""``tidegate forecast``: what it says of the one that runs and of the file, draws, and refuses."""

from __future__ import annotations

import json
import math
import random
import re
from functools import partial
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from decision_rig import record
from history_cli import AtNow, Cli

from autoscaler.signals.decisions import put_decisions
from autoscaler.signals.history import HistoryStore
from autoscaler.signals.series import PoolMinute
from gateway.cli import main

DAY = 1_440
MINUTE = 30_000_000
NOW_S = 60.0 * MINUTE + 5
AT_NOW = AtNow(now_s=lambda: NOW_S)


def run(*words: str) -> int:
    return main.main(["forecast", *words], AT_NOW)


def waves(minute: int) -> float:
    """Tokens in a minute: a day's course."""
    chance = random.Random(minute).random()
    return round(60_000 + 30_000 * math.sin(2 * math.pi * minute / DAY) + 4_000 * chance)


def fill(store: HistoryStore, minutes: int, ago: int = 0, tokens: bool = True) -> None:
    """Known demand until so many minutes ago."""
    end = MINUTE - ago
    rows = [
        PoolMinute(
            pool="chat",
            minute=minute,
            values={"arrivals": 30.0}
            | ({"input_tokens": waves(minute), "output_tokens": 0.0} if tokens else {}),
        )
        for minute in range(end - minutes, end)
    ]
    store.record(rows, NOW_S)


def shown(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_what_is_expected_and_why_it_is_trusted(
    cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 3 * DAY)
    assert cli("c") == 0
    text = capsys.readouterr().out
    assert text.startswith("chat: tokens/s from 2027-01-15 08:00 UTC (5.0 s ago) on, by 3 days 0 h")
    assert re.search(r"^  period   24 h$", text, re.MULTILINE), text
    assert re.search(r"^  models   direct \d+%", text, re.MULTILINE), text
    assert re.search(r"^  trusted  yes: \d+ forecasts", text, re.MULTILINE), text
    assert "1 min (assumed" in text
    assert [line.split("  ")[0] for line in text.splitlines()[-8:]] == [
        "1 min", "5 min", "15 min", "1 h", "3 h", "6 h", "12 h", "24 h",
    ]  # fmt: skip
    assert cli("chat", "--json", "--horizon", "12h") == 0
    found = shown(capsys)
    assert found["trusted"] is True
    assert found["unit"] == "tokens_per_s"
    assert found["start_s"] == 60.0 * MINUTE
    assert found["periods_s"] == [86_400.0]
    assert len(found["quantiles"]) == len(found["levels"]) == len(found["lead_maximum_quantiles"])
    assert {len(row) for row in found["quantiles"]} == {len(found["mean"])} == {720}
    middle = found["quantiles"][found["levels"].index(0.5)]
    for ahead in (60, 360, 720):
        assert middle[ahead - 1] == pytest.approx(waves(MINUTE + ahead) / 60, rel=0.25)
    assert sum(found["weights"].values()) == pytest.approx(1.0)


def test_the_lead_is_that_of_the_newest_decision(
    store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 200)
    made = record(NOW_S - 30, forecast=None, level=None, fallback="too little history")
    store.write([partial(put_decisions, records=[made])], NOW_S)
    assert run("chat", "--horizon", "15m") == 0
    text = capsys.readouterr().out
    assert "lead     1 min\n" in text
    assert "newest   decision 30 s ago: it reacted alone: too little history\n" in text
    assert run("chat", "--horizon", "15m", "--lead", "5m", "--json") == 0
    found = shown(capsys)
    assert found["lead_s"] == 300.0
    assert found["lead_measured"] is False
    short = found["maximum_quantiles"][-1][0]
    assert found["lead_maximum_quantiles"][-1] > short


def test_a_short_history_is_not_trusted_and_not_tried(
    cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 90, ago=120)
    assert cli("chat", "--backtest") == 0
    text = capsys.readouterr().out
    assert "trusted  no, it reacts alone: 1.5 h of history, 48 h are needed\n" in text
    assert "(2 h ago)" in text
    assert "No backtest: 1 h 30 min of demand are known; a backtest needs 3 h" in text
    assert cli("chat", "-s", "autoscaler.forecast.history_least_s=3600", "--json") == 0
    assert shown(capsys)["trusted"] is True


def test_demand_that_the_operator_expects(
    store: HistoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 2 * DAY)
    burst = [
        PoolMinute(pool="chat", minute=minute, values={"input_tokens": 1e6, "output_tokens": 0.0})
        for minute in range(MINUTE - DAY, MINUTE - DAY + 10)
    ]
    store.record(burst, NOW_S)
    with (tmp_path / "tidegate.toml").open("a") as file:
        file.write('[[pools.schedules]]\nname = "job"\ncron = "0 8 * * *"\nduration_s = 600\n')
        file.write("expect_demand = true\n")
    assert run("chat", "--json", "--horizon", "15m") == 0
    mean = shown(capsys)["mean"]
    assert min(mean[:10]) > 10_000.0
    assert max(mean[11:]) < 3_000.0


def test_requests_without_tokens_are_forecast_but_not_trusted(
    store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 300, tokens=False)
    assert run("chat", "--json", "--horizon", "5m") == 0
    found = shown(capsys)
    assert found["unit"] == "requests_per_s"
    assert found["mean"] == pytest.approx([0.5] * 5, rel=0.2)
    assert found["trusted"] is False


def test_points_of_the_past_are_tried(
    store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 3 * DAY)
    assert run("chat", "--backtest", "--origins", "10", "--lead", "5m", "--horizon", "1h") == 0
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    models = ("automatic", "last_value", "seasonal_naive")
    tried = [(row[0], *row[1:3]) for row in rows if row and row[0] in models and row[1].isdigit()]
    assert tried == [
        (model, *lead) for lead in (("1", "min"), ("5", "min"), ("15", "min"), ("1", "h"))
        for model in models
    ]  # fmt: skip
    assert "10 points of the past; 14% more or less covered may be chance" in text
    assert "seasonal_naive had too little history at" in text
    assert run("chat", "--backtest", "--origins", "10", "--horizon", "1h", "--json") == 0
    scores = {(one["model"], one["lead_steps"]): one for one in shown(capsys)["backtest"]}
    ours, last = scores["automatic", 60], scores["last_value", 60]
    assert ours["origins"] == 10
    assert ours["wape"] < last["wape"]
    assert set(ours["pinball"]) == {"0.05", "0.5", "0.95"}


@pytest.mark.parametrize("minutes", [1, 300])
def test_a_pool_without_requests(
    store: HistoryStore, capsys: pytest.CaptureFixture[str], minutes: int
) -> None:
    values = {"input_tokens": 0.0, "output_tokens": 0.0}
    rows = [
        PoolMinute(pool="chat", minute=MINUTE - ago, values=values) for ago in range(1, minutes + 1)
    ]
    store.record(rows, NOW_S)
    words = ("chat", "--horizon", "5m", "--backtest", "--origins", "10")
    assert run(*words) == 0
    text = capsys.readouterr().out
    assert "nan" not in text
    assert ("No backtest" in text) is (minutes == 1)
    assert run(*words, "--json") == 0
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert found["mean"] == [0.0] * 5


def test_it_is_drawn(
    store: HistoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 500)
    for name in ("a.svg", "a.html"):
        words = ("--plot", str(tmp_path / name), "--horizon", "2h", "--backtest", "--origins", "10")
        assert run("chat", *words) == 0
        assert f"wrote {tmp_path / name}" in capsys.readouterr().err
    picture = ElementTree.fromstring((tmp_path / "a.svg").read_text())
    texts = [one.text for one in picture.iter() if one.tag.endswith("text")]
    assert {"past", "mean", "median", "5% to 95%", "demand (tokens/s)"} <= set(texts)
    assert "NaN" not in (tmp_path / "a.svg").read_text()
    page = (tmp_path / "a.html").read_text()
    assert page.count("<table>") == 2
    assert not re.search(r"(src|href)=|<script", page)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none"], "There is no pool 'none'; the pools are chat."),
        (["chat"], "chat: no minute of its demand is known"),
        (["chat", "--horizon", "2d"], "--horizon 2d: a time like 15m or 6h, from 1 min to 24 h"),
        (["chat", "--horizon", "soon"], "--horizon soon: a time like"),
        (["chat", "--lead", "0s"], "--lead 0s: a time like"),
        (["chat", "--plot", "a.png"], "a file that ends in .svg or .html"),
    ],
)
def test_what_cannot_be_said(
    cli: Cli, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert cli(*words) == 2
    text = capsys.readouterr().err
    assert said in text
    assert len(text.splitlines()) == 1


def test_a_picture_that_cannot_be_written(
    store: HistoryStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(store, 60)
    assert run("chat", "--horizon", "5m", "--plot", str(tmp_path / "none" / "a.svg")) == 2
    assert "there is no directory" in capsys.readouterr().err


def test_without_a_state_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("chat", "-s", f"state_dir={tmp_path / 'none'}") == 2
    assert "there is no directory" in capsys.readouterr().err
