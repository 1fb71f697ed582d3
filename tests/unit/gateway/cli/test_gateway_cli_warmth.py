"""The lines of ``tidegate status`` on tiers of warmth."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.cli.tier_tables import fork_lines, warmth_lines


def tier(name: str, **fields: Any) -> dict[str, Any]:
    return {"tier": name, "available": True, "wake_s": None, "why_not": "", **fields}


@pytest.mark.parametrize(
    ("pool", "line"),
    [
        (
            {"tiers": [tier("forked", wake_s=3.14), tier("paged", wake_s=5.2), tier("on_disk")]},
            "m: wakes from forked in 3.1 s, paged in 5.2 s, on_disk",
        ),
        (
            {"tiers": [tier("sleeping", wake_s=0.4)], "step_down_in_s": 250.0},
            "m: wakes from sleeping in 0.4 s; colder in 4 min 10 s",
        ),
        (
            {
                "tiers": [
                    tier("sleeping", available=False, why_not="the engine\nhas no \x1b[1m/sleep"),
                    tier("on_disk"),
                ]
            },
            "m: wakes from on_disk; not sleeping: the engine has no  [1m/sleep",
        ),
    ],
)
def test_a_line_for_each_pool(pool: dict[str, Any], line: str) -> None:
    assert warmth_lines([{"name": "m", **pool}]) == [line]


@pytest.mark.parametrize("pool", [{}, {"tiers": []}, {"tiers": [tier("forked", available=False)]}])
def test_nothing_is_said_of_pools_without_tiers(pool: dict[str, Any]) -> None:
    assert warmth_lines([{"name": "static", **pool}]) == []


@pytest.mark.parametrize(
    ("server", "line"),
    [
        (None, []),
        (
            {"state": "unfit", "reason": "another vLLM"},
            ["fork server: unfit (another vLLM): engines start plainly"],
        ),
        (
            {"state": "importing", "reason": "it imports vLLM"},
            ["fork server: importing (it imports vLLM)"],
        ),
        (
            {
                "state": "ready",
                "pss_bytes": 630_000_000,
                "standbys": [
                    {"pool": "a", "parked": True, "pss_bytes": 560_000_000},
                    {"pool": "b", "parked": False, "pss_bytes": None},
                ],
            },
            ["fork server: ready, 630 MB; a stands by, 560 MB; b is on its way to stand by, ?"],
        ),
    ],
)
def test_the_fork_server_is_told_of(server: dict[str, Any] | None, line: list[str]) -> None:
    assert fork_lines(server) == line
