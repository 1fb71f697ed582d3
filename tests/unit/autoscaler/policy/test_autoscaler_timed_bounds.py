"""Bounds by the clock, in the pool's own time zone."""

from __future__ import annotations

import datetime as dt
from dataclasses import replace
from zoneinfo import ZoneInfo

import pytest

from autoscaler.policy.timed_bounds import bound_by_time
from autoscaler.settings import AutoscalerSettings, PoolSettings, make_policy
from autoscaler.types import TimedBounds
from forecaster.cron import RecurringWindow

POLICY = replace(
    make_policy(
        PoolSettings.model_validate({"name": "m", "engine": "simulated", "model": "m"}),
        AutoscalerSettings(),
    ),
    min_replicas=1,
    max_replicas=4,
)
OFFICE = TimedBounds(
    name="office",
    window=RecurringWindow.parse("0 8 * * mon-fri", 10 * 3600, "Europe/Berlin"),
    min_replicas=3,
    max_replicas=20,
)
NIGHT = TimedBounds(
    name="night",
    window=RecurringWindow.parse("0 22 * * *", 8 * 3600, "Europe/Berlin"),
    min_replicas=0,
    max_replicas=2,
)
NOON = TimedBounds(
    name="noon",
    window=RecurringWindow.parse("0 12 * * *", 3600, "Europe/Berlin"),
    min_replicas=5,
)


def at(day: int, hour: int, minute: int = 0, second: int = 0) -> float:
    """In November 2026, whose second day is a Monday."""
    zone = ZoneInfo("Europe/Berlin")
    return dt.datetime(2026, 11, day, hour, minute, second, tzinfo=zone).timestamp()


@pytest.mark.parametrize(
    ("wall_s", "bounds"),
    [
        pytest.param(at(2, 7), (1, 4), id="before"),
        pytest.param(at(2, 7, 59, 1), (3, 4), id="the least counts a start ahead"),
        pytest.param(at(2, 8), (3, 20), id="begins"),
        pytest.param(at(2, 12, 30), (5, 20), id="two at once"),
        pytest.param(at(2, 17, 59, 59), (3, 20), id="about to end"),
        pytest.param(at(2, 18), (1, 4), id="ended"),
        pytest.param(at(2, 23), (0, 2), id="night"),
        pytest.param(at(3, 5), (0, 2), id="past midnight"),
        pytest.param(at(7, 9), (1, 4), id="Saturday"),
        pytest.param(at(7, 12), (5, 5), id="the least wins over the most"),
    ],
)
def test_bounds(wall_s: float, bounds: tuple[int, int]) -> None:
    found = bound_by_time(POLICY, [OFFICE, NIGHT, NOON], wall_s, 60.0)
    assert (found.min_replicas, found.max_replicas) == bounds
