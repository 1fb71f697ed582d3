"""Bars: judged by paired ratios against the right opponent, and never passed by silence."""

from __future__ import annotations

import pytest

from bench import bars

SMALL_PEER, SMALL_NGINX, _, LARGE, STREAM = bars.BARS


def costs(scenario: str, **by_contender: float) -> dict[str, dict[str, dict[int, float]]]:
    """The same cost in three rounds; ``sglang__round_robin`` names ``sglang:round_robin``."""
    rounds = {
        name.replace("__", ":"): dict.fromkeys(range(3), cost)
        for name, cost in by_contender.items()
    }
    return {scenario: rounds}


@pytest.mark.parametrize(("tidegate", "passed"), [(25.0, True), (26.0, False)])
def test_small_bodies_are_held_against_the_cheapest_peer_of_any_policy(
    tidegate: float, passed: bool
) -> None:
    given = costs("small", tidegate=tidegate, nginx=15.0, sglang__round_robin=57.0,
                  sglang__cache_aware=41.0, vllm__round_robin=60.0)  # fmt: skip
    verdict = bars.judge(SMALL_PEER, given, {})
    assert verdict.passed is passed
    assert "sglang:cache_aware" in verdict.measured


def test_large_bodies_are_held_against_round_robin_even_if_cache_aware_is_cheaper() -> None:
    given = costs("220kB", tidegate=100.0, sglang__round_robin=120.0, vllm__cache_aware=50.0)
    verdict = bars.judge(LARGE, given, {})
    assert verdict.passed is True
    assert "sglang:round_robin" in verdict.measured


@pytest.mark.parametrize(("tidegate", "passed"), [(11.4, True), (11.6, False)])
def test_streaming_may_cost_115_percent_of_nginx(tidegate: float, passed: bool) -> None:
    given = costs("stream", tidegate=tidegate, nginx=10.0)
    assert bars.judge(STREAM, given, {}).passed is passed


def test_an_error_fails_the_bar_however_cheap_the_rest_was() -> None:
    given = costs("small", tidegate=1.0, nginx=15.0)
    verdict = bars.judge(SMALL_NGINX, given, {("small", "tidegate"): 3})
    assert verdict.passed is False
    assert "3 errors" in verdict.measured


@pytest.mark.parametrize(
    "given", [{}, costs("small", nginx=1.0), costs("small", tidegate=1.0), costs("32kB", nginx=1.0)]
)
def test_what_was_not_measured_is_neither_met_nor_missed(
    given: dict[str, dict[str, dict[int, float]]],
) -> None:
    assert bars.judge(SMALL_NGINX, given, {}).passed is None


@pytest.mark.parametrize(("grown_kib", "passed"), [(0, True), (8_000, True), (9_000, False)])
def test_memory_may_grow_by_a_tenth_of_the_added_bodies(grown_kib: int, passed: bool) -> None:
    peaks = {"rss-220kB": 50_000.0, "rss-880kB": 50_000.0 + grown_kib}
    assert bars.judge_memory(peaks, 660_000, 128).passed is passed


def test_memory_without_both_loads_is_unknown() -> None:
    assert bars.judge_memory({"rss-220kB": 1.0}, 660_000, 128).passed is None


@pytest.mark.parametrize(
    ("result", "passed"),
    [
        ({"done": 2000, "errors": 0, "peak_active": 2000}, True),
        ({"done": 1999, "errors": 1, "peak_active": 2000}, False),
        ({"done": 2000, "errors": 0, "peak_active": 1024}, False),
        (None, None),
    ],
)
def test_held_streams_must_be_whole_and_open_at_one_moment(
    result: dict[str, object] | None, passed: bool | None
) -> None:
    assert bars.judge_held(result, 2000).passed is passed
