"""Cron expressions, and the windows of time that begin when they are due."""

from __future__ import annotations

import datetime as dt
from zoneinfo import ZoneInfo

import pytest

from forecaster.cron import Cron, RecurringWindow


def unix(text: str, zone: str = "UTC") -> float:
    return dt.datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()


def starts(expression: str, first: str, last: str, zone: str = "UTC") -> list[str]:
    window = RecurringWindow.parse(expression, 60, zone)
    found = window.starts(unix(first, zone), unix(last, zone))
    return [
        dt.datetime.fromtimestamp(at, ZoneInfo(zone)).strftime("%m-%d %H:%M %z") for at in found
    ]


@pytest.mark.parametrize(
    ("expression", "first", "last", "zone", "expected"),
    [
        ("30 8 * * mon-fri", "2026-11-27", "2026-12-01", "UTC",
         ["11-27 08:30 +0000", "11-30 08:30 +0000"]),
        ("*/25 1 * * *", "2026-01-01", "2026-01-02", "UTC",
         ["01-01 01:00 +0000", "01-01 01:25 +0000", "01-01 01:50 +0000"]),
        # Either day will do where both are restricted: the 1st, and each Sunday.
        ("0 0 1 * 7", "2026-11-30", "2026-12-07", "UTC",
         ["12-01 00:00 +0000", "12-06 00:00 +0000"]),
        # AHPA's way to write "at each of these hours".
        ("0 0-23/12 ? * FRI-MON", "2026-11-26", "2026-11-28", "UTC",
         ["11-27 00:00 +0000", "11-27 12:00 +0000"]),
        ("@monthly", "2026-01-15", "2026-03-15", "UTC", ["02-01 00:00 +0000", "03-01 00:00 +0000"]),
        # The night in which 02:30 does not exist, and the one in which it comes twice.
        ("30 2 * * *", "2026-03-28", "2026-03-31", "Europe/Berlin",
         ["03-28 02:30 +0100", "03-29 03:30 +0200", "03-30 02:30 +0200"]),
        ("30 2 * * *", "2026-10-25", "2026-10-26", "Europe/Berlin", ["10-25 02:30 +0200"]),
    ],
)  # fmt: skip
def test_when_it_is_due(
    expression: str, first: str, last: str, zone: str, expected: list[str]
) -> None:
    assert starts(expression, first, last, zone) == expected


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        ("* * * *", "5"),
        ("61 * * * *", "minute"),
        ("*/0 * * * *", "minute"),
        ("* 24 * * *", "hour"),
        ("* * 0 * *", "day of month"),
        ("* * * octember *", "month"),
        ("* * * * 8", "day of week"),
        ("5-2 * * * *", "minute"),
        (", * * * *", "minute"),
        ("0 0 31 2 *", "never"),
    ],
)
def test_what_is_wrong_is_named(expression: str, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        Cron.parse(expression)


def test_a_leap_day_is_years_away() -> None:
    window = RecurringWindow.parse("0 0 29 2 *", 3600)
    assert list(window.starts(unix("2026-01-01"), unix("2029-01-01"))) == [unix("2028-02-29")]


def test_a_window_over_midnight_has_an_end_that_is_not_part_of_it() -> None:
    window = RecurringWindow.parse("0 22 * * *", 8 * 3600, "America/New_York")
    start_s = unix("2026-06-01 22:00", "America/New_York")
    assert [window.active(start_s + hours * 3600) for hours in (-1, 0, 7.999, 8)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert next(window.starts(start_s + 1, start_s + 7 * 86400)) == start_s + 86400


@pytest.mark.parametrize("duration_s", [0, -1, 32 * 86400])
def test_a_duration_has_bounds(duration_s: float) -> None:
    with pytest.raises(ValueError, match="duration"):
        RecurringWindow.parse("* * * * *", duration_s)


def test_a_time_zone_is_known() -> None:
    with pytest.raises(ValueError, match="Europe/Atlantis"):
        RecurringWindow.parse("* * * * *", 60, "Europe/Atlantis")
