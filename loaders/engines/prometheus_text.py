"""A few samples out of a page in Prometheus' text format, by their names. Pure.

An engine's page has a thousand lines of histograms of which a dozen are wanted, every few seconds,
of each replica. For a page of 25 kB prometheus-client's parser takes 14 ms; one search for the
names, and reading what it finds, takes a thirtieth, and is bounded whatever a server sends.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping

MAX_FOUND_BYTES = 1 << 19
"""Of the lines that are wanted, together."""
MAX_VALUE = 1e18
"""A larger figure is no count, size or share of anything, and taken for unknown."""

_SAMPLE = re.compile(
    rb'(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\]|\\.)*",?[ ]*)*)\})?[ \t]+([^ \t]+)(?:[ \t].*)?\r?'
)
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPED = re.compile(r"\\(.)")
_RANKS = frozenset({"tp_rank", "pp_rank", "moe_ep_rank", "pid"})
"""Labels of which each value says the same of the whole engine again."""

Labels = Mapping[str, str]


def lines_named(names: Iterable[str]) -> re.Pattern[bytes]:
    """What finds the lines of metrics with these names."""
    by_prefix: dict[str, list[str]] = {}
    for name in sorted(names):
        prefix, rest = re.fullmatch("([^:_]*[:_]?)(.*)", name, re.ASCII).groups()  # type: ignore[union-attr]
        by_prefix.setdefault(re.escape(prefix), []).append(re.escape(rest))
    # Grouped, most lines are passed over without a try of each name: a third of the time.
    found = "|".join(f"{prefix}(?:{'|'.join(rests)})" for prefix, rests in by_prefix.items())
    return re.compile(rb"\n(" + found.encode() + rb")(?=[{ \t])([^\n]*)")


class MetricsPage:
    """The lines of one page that ``wanted`` finds. Raises ``ValueError`` for a page that was cut
    short (the last line of a whole one ends in a line feed), or has too many of them."""

    def __init__(self, body: bytes, wanted: re.Pattern[bytes]) -> None:
        if not body.endswith(b"\n"):
            raise ValueError("the page was cut short")
        self._lines: dict[str, list[bytes]] = {}
        found_bytes = 0
        for match in wanted.finditer(b"\n" + body):
            found_bytes += match.end() - match.start()
            if found_bytes > MAX_FOUND_BYTES:
                raise ValueError("the page has too many of these lines")
            self._lines.setdefault(match[1].decode(), []).append(match[2])

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def names(self) -> Iterable[str]:
        """The names that were found."""
        return self._lines

    def samples(self, name: str) -> Iterator[tuple[Labels, float]]:
        """The samples of a metric: labels and value. Lines that cannot be read, and values that are
        not finite, negative or absurd, are left out: they say nothing that is known."""
        for line in self._lines.get(name, ()):
            match = _SAMPLE.fullmatch(line)
            value = None if match is None else _number(match[2])
            if match is not None and value is not None:
                yield _labels(match[1]), value

    def total(self, *names: str) -> float | None:
        """The sum over all series of the first of these metrics that is there; ``None`` where none
        is. Ranks that report the same thing count once."""
        for name in names:
            series: dict[frozenset[tuple[str, str]], float] = {}
            for labels, value in self.samples(name):
                key = frozenset(one for one in labels.items() if one[0] not in _RANKS)
                series[key] = max(value, series.get(key, 0.0))
            if series:
                return sum(series.values())
        return None

    def mean(self, *names: str) -> float | None:
        """The mean over all series of the first of these metrics that is there."""
        for name in names:
            values = [value for _, value in self.samples(name)]
            if values:
                return sum(values) / len(values)
        return None


def _number(text: bytes) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and 0.0 <= value <= MAX_VALUE else None


def _labels(text: bytes | None) -> dict[str, str]:
    if not text:
        return {}
    found: dict[str, str] = dict(_LABEL.findall(text.decode(errors="replace")))
    if b"\\" in text:
        return {name: _ESCAPED.sub(_unescape, value) for name, value in found.items()}
    return found


def _unescape(match: re.Match[str]) -> str:
    return "\n" if match[1] == "n" else match[1]
