"""When a cron expression holds, as windows that begin and last.

AHPA's bounds hold in every minute that their expression matches (``* 9-15 ? * MON-FRI``: from 9:00
until 16:00 on these days); a schedule here begins when its expression is due, and lasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from forecaster.cron import Cron

MINUTES, HOURS = 60, 24


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldWindow:
    """A schedule's expression, and how long it lasts."""

    cron: str
    duration_s: float


def windows_of(text: str) -> list[HeldWindow]:
    """The windows that together are all minutes which the expression matches, and no other (in a
    time zone whose clock does not change). Raises ``ValueError`` for what is no cron expression."""
    cron = Cron.parse(text)
    _, hours, day, month, weekday = ("*" if one == "?" else one for one in _five(text))
    days = f"{day} {month} {weekday}".lower()
    if len(cron.minutes) == MINUTES:
        return [
            HeldWindow(cron=f"0 {_join(starts)} {days}", duration_s=3_600.0 * length)
            for length, starts in _runs(cron.hours, HOURS)
        ]
    return [
        HeldWindow(cron=f"{_join(starts)} {hours} {days}", duration_s=60.0 * length)
        for length, starts in _runs(cron.minutes, MINUTES)
    ]


def minutes_of(text: str) -> set[tuple[int, int, int]]:
    """The minutes of a week in which it may hold: day of week (0 is Sunday), hour, minute."""
    cron = Cron.parse(text)
    weekdays = range(7) if cron.either_day else cron.weekdays
    return {
        (day, hour, minute) for day in weekdays for hour in cron.hours for minute in cron.minutes
    }


def _five(text: str) -> Sequence[str]:
    parts = text.split()
    if len(parts) != 5:  # @daily and its like
        raise ValueError(f"cron expression {text!r} has {len(parts)} fields, not 5")
    return parts


def _runs(values: Sequence[int], most: int) -> list[tuple[int, list[int]]]:
    """Where values follow each other, by how long: the length, and the firsts."""
    found: dict[int, list[int]] = {}
    first = None
    for value in range(most + 1):
        inside = value < most and value in values
        if inside and first is None:
            first = value
        elif not inside and first is not None:
            found.setdefault(value - first, []).append(first)
            first = None
    return sorted(found.items())


def _join(values: Sequence[int]) -> str:
    return ",".join(str(one) for one in values)
