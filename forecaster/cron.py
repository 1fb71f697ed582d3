"""Recurring windows of time: a cron expression, a duration, a time zone.

Both users of them import nothing else from here: hints of recurring bursts for a forecast, and
timed bounds of a pool. The expression has the five fields of crontab(5): minute, hour, day of
month, month, day of week (0 and 7 are Sunday), with ``*``, ``?``, lists, ranges, steps and
English names. As in cron, where day of month and day of week are both restricted, either will do.

Local time may repeat or skip an hour. A window that would start in a skipped hour starts an hour
later; in a repeated hour it starts once, the first time.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from zoneinfo import ZoneInfo

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of month", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("day of week", 0, 7, _DAYS),
)
_SHORT = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}
MOST_DURATION_S = 31 * 86400.0
_MOST_DAYS_AHEAD = 8 * 366
"""29 February may be eight years away."""


def _number(text: str, low: int, names: tuple[str, ...], what: str) -> int:
    if text.lower() in names:
        return names.index(text.lower()) + low
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"cron field {what}: {text!r} is not a number")
    return int(text)


def _values(text: str, what: str, low: int, high: int, names: tuple[str, ...]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.split(","):
        span, slash, step_text = part.partition("/")
        step = _number(step_text, 0, (), what) if slash else 1
        if span in ("*", "?"):
            first, last = low, high
        else:
            first_text, dash, last_text = span.partition("-")
            first = _number(first_text, low, names, what)
            last = _number(last_text, low, names, what) if dash else (high if slash else first)
        if last < first and what == "day of week":
            last += 7  # fri-mon
        elif last < first:
            raise ValueError(f"cron field {what}: {part!r} runs backwards")
        if (
            not low <= first <= high
            or last > high + (7 if what == "day of week" else 0)
            or not step
        ):
            raise ValueError(f"cron field {what}: {part!r} is not within {low}-{high}")
        found |= set(range(first, last + 1, step))
    return frozenset(value % 7 for value in found) if what == "day of week" else frozenset(found)


@dataclass(frozen=True, slots=True)
class Cron:
    """A parsed cron expression. :meth:`parse` makes one."""

    text: str
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: frozenset[int]
    months: frozenset[int]
    weekdays: frozenset[int]
    either_day: bool
    """Day of month and day of week are both restricted."""

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Raises ``ValueError``, which names the field."""
        parts = _SHORT.get(text.strip().lower(), text).split()
        if len(parts) != len(_FIELDS):
            raise ValueError(f"cron expression {text!r} has {len(parts)} fields, not 5")
        minutes, hours, days, months, weekdays = (
            _values(part, *one) for part, one in zip(parts, _FIELDS, strict=True)
        )
        cron = cls(
            text=text,
            minutes=tuple(sorted(minutes)),
            hours=tuple(sorted(hours)),
            days=days,
            months=months,
            weekdays=weekdays,
            either_day=parts[2][0] not in "*?" and parts[4][0] not in "*?",
        )
        if not any(
            cron.on(dt.date(2000, 1, 1) + dt.timedelta(day)) for day in range(_MOST_DAYS_AHEAD)
        ):
            raise ValueError(f"cron expression {text!r} is never due")
        return cron

    def on(self, day: dt.date) -> bool:
        """Whether it is due at all on this local day."""
        by_month = day.day in self.days
        by_week = day.isoweekday() % 7 in self.weekdays
        return day.month in self.months and (
            by_month or by_week if self.either_day else by_month and by_week
        )


@dataclass(frozen=True, slots=True)
class RecurringWindow:
    """From each time that ``cron`` is due, ``duration_s`` long. Times are Unix time; a window's
    end is not part of it. Raises ``ValueError`` for a duration or a time zone that is none."""

    cron: Cron
    duration_s: float
    timezone: str = "UTC"
    _zone: dt.tzinfo = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.duration_s <= MOST_DURATION_S:
            raise ValueError(
                f"a window's duration is {self.duration_s} s, not above 0 and at most 31 days"
            )
        object.__setattr__(self, "_zone", _time_zone(self.timezone))

    @classmethod
    def parse(cls, text: str, duration_s: float, timezone: str = "UTC") -> RecurringWindow:
        """``RecurringWindow.parse("30 8 * * mon-fri", 3600, "Europe/Berlin")``."""
        return cls(Cron.parse(text), duration_s, timezone)

    def starts(self, from_s: float, until_s: float) -> Iterator[float]:
        """The starts in ``[from_s, until_s)``, in order."""
        day = self._local_day(from_s) - dt.timedelta(days=1)
        last = self._local_day(until_s)
        while day <= last:
            if self.cron.on(day):
                for start_s in self._starts_of(day):
                    if from_s <= start_s < until_s:
                        yield start_s
            day += dt.timedelta(days=1)

    def active(self, at_s: float) -> bool:
        """Whether ``at_s`` is inside of a window."""
        return next(self.starts(at_s - self.duration_s + 1e-6, at_s + 1e-6), None) is not None

    def _local_day(self, at_s: float) -> dt.date:
        return dt.datetime.fromtimestamp(at_s, self._zone).date()

    def _starts_of(self, day: dt.date) -> list[float]:
        found = {
            dt.datetime(day.year, day.month, day.day, hour, minute, tzinfo=self._zone).timestamp()
            for hour in self.cron.hours
            for minute in self.cron.minutes
        }
        return sorted(found)


@lru_cache(maxsize=64)
def _time_zone(name: str) -> dt.tzinfo:
    if name.upper() == "UTC":
        return dt.UTC  # also where the machine has no time zone data
    try:
        return ZoneInfo(name)
    except (OSError, ValueError, LookupError) as error:
        raise ValueError(f"time zone {name!r} is not known to this machine") from error
