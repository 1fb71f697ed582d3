"""Measured wake times: which one is believed, and that they survive on disk, whatever is there."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path

import pytest

from autoscaler.tiers.wake_times import MODELS, WakeTimes
from modelcache.types import Tier

M = "vllm:/models/m"


def test_median_is_shown_and_the_longest_is_promised() -> None:
    times = WakeTimes(samples=3)
    for seconds in (50.0, 2.0, 3.0, 4.0):
        times.add(M, Tier.PAGED, seconds)
    assert times.measured(M, Tier.PAGED) == (2.0, 3.0, 4.0)
    assert times.median_s(M, Tier.PAGED) == 3.0
    assert times.estimate_s(M, Tier.PAGED) == 4.0
    assert times.median_s(M, Tier.FORKED) is None
    assert times.median_s("vllm:other", Tier.PAGED) is None


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (Tier.SLEEPING, 1.0),
        (Tier.FORKED, 9.0),  # not measured: the next colder one, which is no promise too short
        (Tier.PAGED, 9.0),
        (Tier.ON_DISK, 9.0),
        (Tier.REMOTE, 9.0),  # nothing colder: the nearest there is
    ],
)
def test_a_tier_that_was_not_measured_takes_as_long_as_the_next_colder(
    asked: Tier, expected: float
) -> None:
    times = WakeTimes(samples=8)
    times.add(M, Tier.SLEEPING, 1.0)
    times.add(M, Tier.ON_DISK, 9.0)
    assert times.estimate_s(M, asked) == expected


def test_nothing_is_known_before_the_first() -> None:
    assert WakeTimes(samples=8).estimate_s(M, Tier.PAGED) is None


def test_they_survive_a_restart_and_nodes_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "wake_times.json"
    one = WakeTimes(node="one", path=path, samples=8)
    one.add(M, Tier.PAGED, 3.25)
    one.add(M, Tier.FORKED, 1.5)
    asyncio.run(one.save())
    other = WakeTimes(node="other", path=path, samples=8)
    assert other.estimate_s(M, Tier.PAGED) is None
    other.add(M, Tier.PAGED, 7.0)
    asyncio.run(other.save())
    again = WakeTimes(node="one", path=path, samples=8)
    assert again.measured(M, Tier.PAGED) == (3.25,)
    assert again.measured(M, Tier.FORKED) == (1.5,)
    assert os.listdir(path.parent) == [path.name]


GOOD = {"model": M, "node": "", "tier": "paged", "seconds": [1.5, 2]}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        '{"version": 2, "wakes": []}',
        "[" * 100_000,
        '{"version": 1, "wakes": 7}',
        '{"version": 1}',
        json.dumps({"version": 1, "wakes": [GOOD, {**GOOD, "seconds": [-1]}]}),
        json.dumps({"version": 1, "wakes": [7, {}, {**GOOD, "tier": "lukewarm"}]}),
        json.dumps({"version": 1, "wakes": [{**GOOD, "tier": ["paged"]}, {**GOOD, "node": 1}]}),
        json.dumps({"version": 1, "wakes": [{**GOOD, "seconds": [True, -1, 10**400, "1", None]}]}),
        '{"version": 1, "wakes": [{"model": "vllm:/models/m", "node": "", "tier": "paged", '
        '"seconds": [NaN, Infinity]}]}',
    ],
)
def test_what_makes_no_sense_is_as_good_as_not_measured(tmp_path: Path, text: str) -> None:
    path = tmp_path / "wake_times.json"
    path.write_text(text)
    times = WakeTimes(path=path, samples=8)
    assert times.estimate_s(M, Tier.PAGED) is None
    times.add(M, Tier.PAGED, 1.0)
    asyncio.run(times.save())
    assert json.loads(path.read_text())["wakes"] == [{**GOOD, "seconds": [1.0]}]


def test_models_that_are_gone_are_forgotten_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "wake_times.json"
    times = WakeTimes(path=path, samples=8)
    for number in range(MODELS + 5):
        times.add("old", Tier.PAGED, 1.0)
        times.add(f"m{number}", Tier.PAGED, 1.0)
    assert times.measured("old", Tier.PAGED)
    assert not times.measured("m0", Tier.PAGED)
    asyncio.run(times.save())
    assert len(json.loads(path.read_text())["wakes"]) == MODELS
