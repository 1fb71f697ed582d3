"""The times without requests between those with some: how long a pool's were, bounded in number.

A busy pool has thousands of gaps of seconds for each of hours, and it is the long ones that say
when to let go of it. So the newest are kept of each doubling of length apart, and where older ones
were dropped the kept ones count for them too, by the time they span.
"""

from __future__ import annotations

import math
from array import array

import msgspec

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
        self.is_new = False
        """Whether some are not packed yet."""

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
        self.is_new = True

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

    def pack(self, ahead_s: float) -> bytes:
        """All that is remembered, on a clock that is so far ahead of this one's."""
        self.is_new = False
        gaps = [(one, end_s + ahead_s) for end_s, one in self._by_end()]
        begun_at_s = None if self._begun_at_s is None else self._begun_at_s + ahead_s
        return msgspec.msgpack.encode(PackedGaps(begun_at_s=begun_at_s, gaps=gaps))

    def recall(self, packed: bytes, ahead_s: float) -> None:
        """Put these gaps before the own. Raises ``ValueError`` where they are none."""
        earlier, own = DECODER.decode(packed), self._by_end()
        new = GapRecord()
        for length_s, end_s in earlier.gaps:
            new.add(length_s, end_s - ahead_s)
        for end_s, length_s in own:
            new.add(length_s, end_s)
        if earlier.begun_at_s is not None:
            new._begun_at_s = earlier.begun_at_s - ahead_s
        self._octaves, self._begun_at_s = new._octaves, new._begun_at_s

    def _by_end(self) -> list[tuple[float, float]]:
        """The end and the length of each, in the order of the ends."""
        kept = self._octaves.values()
        return sorted(pair for lengths, ends in kept for pair in zip(ends, lengths, strict=True))


class PackedGaps(msgspec.Struct, array_like=True):
    """Gaps as they are kept, each with its length and its end, in seconds."""

    begun_at_s: float | None
    gaps: list[tuple[float, float]]


DECODER = msgspec.msgpack.Decoder(PackedGaps)
