"""The table of real clients: what is summed, and what is judged."""

from __future__ import annotations

from typing import Any

import pytest

from bench.real_clients import CLIENTS, Counts, find_problem, terminal

ROW: dict[str, Any] = {
    "client": "openai",
    "exit_status": 0,
    "outcomes": {"ok": 3},
    "engine_requests": 3,
    "prompt_tokens": {"tidegate": 1000, "engine": 1000},
    "prompt_off_percent": 0.0,
    "output_tokens": {"tidegate": 101, "engine": 100},
    "output_off_percent": 1.0,
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, ""),
        ({"exit_status": 1}, "exit status 1"),
        ({"exit_status": None}, "did not end"),
        ({"outcomes": {}}, "no request"),
        ({"outcomes": {"ok": 2, "cancelled": 1}}, ""),
        ({"outcomes": {"ok": 2, "engine_error": 1}}, "engine_error"),
        ({"prompt_off_percent": -1.1}, "prompt tokens"),
        ({"output_off_percent": None}, ""),
        ({"outcomes": {"cancelled": 3}, "output_off_percent": -100.0}, ""),
        ({"outcomes": {"ok": 1, "cancelled": 3}, "output_off_percent": -9.0}, "output tokens"),
        ({"unavailable": "pip: no such package"}, ""),
    ],
)
def test_a_client_is_judged_by_its_end_its_outcomes_and_its_tokens(
    change: dict[str, Any], problem: str
) -> None:
    row = {**ROW, **change}
    assert bool(find_problem(row)) is bool(problem)
    shown = terminal([row])
    assert ("<-" in shown) is bool(problem)
    assert problem in shown.partition("<-")[2]


def test_the_table_has_every_client_and_says_what_could_not_be_run() -> None:
    missing = {"client": "oha", "unavailable": "oha is not installed"}
    text = terminal([ROW, missing])
    assert "openai" in text
    assert "101 / 100" in text
    assert "oha is not installed" in text


def test_what_was_counted_before_is_taken_off() -> None:
    def counts(ok: int, tokens: int) -> Counts:
        tokens_of = {"prompt": tokens, "output": 0}
        outcomes = {"ok": ok, "cancelled": 4}
        return Counts(outcomes=outcomes, tidegate=tokens_of, engine=tokens_of, busy=0)

    since = counts(9, 50).since(counts(2, 20))
    assert since.outcomes == {"ok": 7}
    assert since.tidegate == {"prompt": 30, "output": 0}


def test_the_names_are_unique_and_only_the_engine_environment_is_not_installed_into() -> None:
    names = [client.name for client in CLIENTS]
    assert len(set(names)) == len(names)
    assert all(bool(client.packages) != bool(client.program) for client in CLIENTS)
