"""The times without requests between those with some: how long a pool's were, bounded in number.

A busy pool has thousands of gaps of seconds for each of hours, and it is the long ones that say
when to let go of it. So the newest are kept of each doubling of length apart, and where older ones
were dropped the kept ones count for them too, by the time they span.
"""

from __future__ import annotations

import math
from array import array

from autoscaler.types import Gap

KEPT = 128
"""Gaps that are kept of each doubling of length."""
LONGEST_S = 28 * 86_400.0
"""Gaps that ended longer ago than this are forgotten."""
OCTAVES = 24
"""Doublings from a second on; longer gaps are with the last, shorter ones with the first."""


class GapRecord:
    """The newest gaps of one pool. Times are on any clock that only goes forward."""

    def __init__(self) -> None:
        self._octaves: dict[int, tuple[array[float], array[float]]] = {}
        self._begun_at_s: float | None = None

    def add(self, length_s: float, ended_at_s: float) -> None:
        """Remember a gap that ended at this time."""
        if length_s <= 0.0:
            return
        if self._begun_at_s is None:
            self._begun_at_s = ended_at_s - length_s
        octave = min(OCTAVES, max(0, math.frexp(length_s)[1]))
        lengths_s, ends_s = self._octaves.setdefault(octave, (array("d"), array("d")))
        if len(lengths_s) == KEPT:
            del lengths_s[0], ends_s[0]
        lengths_s.append(length_s)
        ends_s.append(ended_at_s)

    def read(self, now_s: float) -> tuple[Gap, ...]:
        """The gaps that count now, each with its weight."""
        since_s = now_s - LONGEST_S
        begun_at_s = now_s if self._begun_at_s is None else max(self._begun_at_s, since_s)
        found: list[Gap] = []
        for lengths_s, ends_s in self._octaves.values():
            weight = 1.0
            if len(ends_s) == KEPT:
                weight = max(1.0, (now_s - begun_at_s) / max(1.0, now_s - ends_s[0]))
            while ends_s and ends_s[0] < since_s:
                del lengths_s[0], ends_s[0]
            found += [Gap(length_s, weight) for length_s in lengths_s]
        return tuple(found)
