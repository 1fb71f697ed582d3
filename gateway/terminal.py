"""What is said on a terminal: lines to standard output and error, figures, the version."""

from __future__ import annotations

import contextlib
import math
import sys
from datetime import UTC, datetime

UNKNOWN = "?"
NONE = "-"
BYTE_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def out(text: str) -> None:
    """Text on standard output, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def complain(line: str) -> None:
    """One line on standard error, with whose it is."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"tidegate: {line}\n")


def version() -> str:
    """The installed version; ``(not installed)`` from a bare checkout."""
    from importlib import metadata

    try:
        return metadata.version("tidegate")
    except metadata.PackageNotFoundError:
        return "(not installed)"


def figure(value: float | None) -> str:
    """A count, thousands apart; ``?`` where it is unknown, which is not zero."""
    return UNKNOWN if value is None else f"{value:,.0f}"


def rounded(value: float) -> str:
    """A measured value: whole from a hundred on, thousands apart; else to three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(fraction: float | None) -> str:
    """A share of 0 to 1: ``43 %``."""
    return UNKNOWN if fraction is None else f"{100 * fraction:.0f} %"


def count(number: float | None, one: str, many: str | None = None) -> str:
    """A number of things: ``1 server``, ``2 servers``; ``many`` where that is no s at the end."""
    return f"{figure(number)} {one if number == 1 else many or f'{one}s'}"


def size(value: float | None) -> str:
    """Bytes as disks and networks count them: ``0 B``, ``412 kB``, ``14.9 GB``."""
    if value is None:
        return UNKNOWN
    number = float(value)
    for unit in BYTE_UNITS:
        if abs(number) < 999.5 or unit == BYTE_UNITS[-1]:
            break
        number /= 1000
    digits = 0 if unit in ("B", "kB") or number >= 99.95 else 1
    return f"{number:.{digits}f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: ``0.4 s``, ``31 s``, ``3 min 12 s``, ``2 h 5 min``."""
    if seconds is None or not math.isfinite(seconds):
        return UNKNOWN
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    return f"{hours // 24} days {hours % 24} h"


def ago(at_s: float | None, now_s: float) -> str:
    """How long since a moment."""
    seconds = None if at_s is None else now_s - at_s
    return "now" if seconds is not None and seconds < 0.95 else f"{duration(seconds)} ago"


def utc(at_s: float, form: str = "%Y-%m-%d %H:%M UTC") -> str:
    """A Unix time in UTC, as ``strftime`` has it."""
    return datetime.fromtimestamp(at_s, UTC).strftime(form)


def one_line(text: str) -> str:
    """One line of printable characters: text of engines and files must not steer a terminal."""
    return "".join(char if char.isprintable() else " " for char in text).strip()
