"""``tidegate explain`` of the past: what it says, of the one that runs and of the file."""

from __future__ import annotations

import json
from functools import partial

import pytest
from decision_rig import record
from history_cli import AtNow, Cli

from autoscaler.signals.decisions import DecisionRecord, put_decisions
from autoscaler.signals.history import HistoryStore
from autoscaler.types import ForecastTally, ScaleReason
from gateway.admin import schema
from gateway.cli import main
from gateway.cli.explain import score_text
from gateway.cli.tables import Screen

NOW_S = 1_700_000_000.0
AT_NOW = AtNow(now_s=lambda: NOW_S)


def run(*words: str) -> int:
    return main.main(["explain", *words], AT_NOW)


def keep(store: HistoryStore, *records: DecisionRecord) -> None:
    store.write([partial(put_decisions, records=records)], NOW_S)


def test_a_moment_of_the_past(
    cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    at_zero = record(
        NOW_S - 900, until_s=NOW_S - 660, desired=0, supply=0, reason=ScaleReason.AT_ZERO,
        detail="scaled to zero, no demand", rate=0.0, ready=0, forecast=None, level=None,
        fallback="there is no forecast yet",
    )  # fmt: skip
    keep(store, at_zero, *(record(NOW_S - 60 * ago) for ago in range(10, 0, -1)))
    assert cli("c", "--at", "5m") == 0
    out = capsys.readouterr().out
    for text in (
        "chat at 2023-11-14 22:08:20 UTC (5 min ago): 3 desired, 2 ready\n",
        "  why     612 tokens/s at most within 60 s\n",
        "  signal  the highest demand until a new replica would serve, by the forecast\n",
        "  bound   none\n",
        "  ahead   the forecast asks for 3, which covers 95.0% of what may come; demand by itself "
        "for 2\n",
        "  each    200 tokens/s per replica (saturated)\n",
        "  demand  4 requests, 900 tokens in flight and queued; 250 tokens/s came over 60 s, "
        "250 over the short window\n",
        "  expects at most 420 tokens/s within 1 min in half of all cases, 612 in 95% (direct)",
        "  rules   stable_tokens_per_s 2, forecast 3, reaction alone 2\n",
        "  limits  0 to 8\n",
        "SINCE",
    ):
        assert text in out, out
    assert cli("chat", "--at", "12 min ago") == 0
    out = capsys.readouterr().out
    assert "  ahead   it reacts alone: there is no forecast yet\n" in out
    assert "15 min ago  10 min ago  60     0" in out
    assert cli("chat", "--at", "22:08", "--json", "--limit", "3") == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["decisions"]) == 3
    assert found["decision"]["first_at_s"] == NOW_S - 360


def test_the_score(cli: Cli, store: HistoryStore, capsys: pytest.CaptureFixture[str]) -> None:
    tally = ForecastTally(scored=2, covered=1, loss=30.0, last_value_loss=40.0)
    keep(store, *(record(NOW_S - 60 * ago, ready=3, tally=tally) for ago in range(61, 0, -1)))
    assert cli("chat", "--score", "--since", "2h") == 0
    out = capsys.readouterr().out
    for text in (
        "chat: 1 h from 1 h 1 min ago on, 1 h of it scored\n",
        "122 lead windows scored, 50.0% within its quantile 0.95; its pinball loss is 0.75 of",
        "used      100% of the time",
        "reaction alone: 1.00 replica-hours above it, 0.00 below it",
        "as it ran                  3.00",
        "reaction alone (computed)  2.00",
    ):
        assert text in out, out
    assert "mode auto" not in out
    assert cli("chat", "--score", "--json") == 0
    assert json.loads(capsys.readouterr().out)["ran"]["replica_s"] == 3 * 3_600.0


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (
            ["chat", "--limit", "0"],
            2,
            "'--limit': Input should be greater than or equal to 1, not 0",
        ),
        (["none", "--at", "5m"], 2, "There is no pool 'none'; the pools are chat."),
        (["chat", "--at", "1h"], 1, "the nearest is at 2023-11-14T22:11:50Z"),
        (["chat", "--score", "--since", "10s"], 1, "There are no decisions of chat"),
        (["chat", "--at", "2030-01-01"], 2, "that is to come"),
        (["chat", "--at", "soon"], 2, "'soon' is no time"),
        (["chat", "--at", "25:99"], 2, "'25:99' is no time"),
        (["chat", "--at", "5m", "--score"], 2, "two questions"),
    ],
)
def test_what_cannot_be_said(
    cli: Cli,
    store: HistoryStore,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    status: int,
    said: str,
) -> None:
    keep(store, record(NOW_S - 60), record(NOW_S - 90))
    assert cli(*words) == status
    assert said in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_score_of_what_is_not_known() -> None:
    nothing = schema.CostEntry(replica_s=0.0, short_s=0.0)
    answer = schema.ScoreAnswer(
        pool="chat", from_s=NOW_S - 600, until_s=NOW_S, scored_s=0.0, unknown_s=600.0,
        trusted_s=0.0, ran=nothing, reactive=nothing, auto=None, above_replica_s=0.0,
        below_replica_s=0.0, forecasts=0, coverage=None, loss_ratio=None,
    )  # fmt: skip
    text = score_text(answer, Screen(), NOW_S)
    assert "none was scored" in text
    assert "nothing can be said" in text
    cost = schema.CostEntry(replica_s=7_200.0, short_s=60.0)
    some = answer.model_copy(update={"scored_s": 600.0, "auto": cost})
    assert "mode auto (computed)       2.00           1 min  10.00%" in score_text(
        some, Screen(), NOW_S
    )


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        (ScaleReason.STATIC, "  scaled  not by Tidegate, which would have 4"),
        (ScaleReason.ADVISE, "  mode    advise: in the mode auto it would have 4"),
    ],
)
def test_what_it_would_have(
    reason: ScaleReason,
    said: str,
    cli: Cli,
    store: HistoryStore,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keep(store, record(NOW_S - 60, reason=reason, recommended=4))
    assert cli("chat", "--at", "30s") == 0
    assert said in capsys.readouterr().out.splitlines()
