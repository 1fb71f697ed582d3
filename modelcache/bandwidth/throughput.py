"""How fast pieces come, and which reading is far behind the others. Pure.

A pace is kept by size: what a file of a few hundred bytes took says nothing of a piece of 8 MiB.
And a reading is behind only where others move many times as much at the same time: where all are
slow together it is the line, and to begin again would be to read twice over a line that is slow.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from modelcache.ports import ANNOUNCE_BYTES

SAMPLES = 32

WINDOW_S = 10.0
"""A reading's rate is that of the last five to ten seconds, or of all its time if that is less."""

BEHIND_FACTOR = 4.0
"""What moves at less than others' rate over this is behind."""


@dataclass(slots=True)
class Throughput:
    """How long the last pieces took, by their size to the next power of two."""

    last: dict[int, deque[float]] = field(default_factory=dict)
    """Seconds a byte."""

    def learn(self, size_bytes: int, took_s: float) -> None:
        """A piece of so many bytes took so long."""
        kind = self.last.setdefault(size_bytes.bit_length(), deque(maxlen=SAMPLES))
        kind.append(took_s / max(1, size_bytes))

    def expected_s(self, size_bytes: int) -> float | None:
        """Seconds such a piece takes, by the median of its size, or of the next larger one that
        there was; of smaller ones nothing follows."""
        found = self._like(size_bytes)
        return statistics.median(found) * size_bytes if found else None

    def slowest_s(self, size_bytes: int) -> float | None:
        """The same, if they have become slower of late and it goes on as with the last."""
        found = self._like(size_bytes)
        return max(statistics.median(found), found[-1]) * size_bytes if found else None

    def _like(self, size_bytes: int) -> deque[float] | None:
        kind = min((k for k in self.last if k >= size_bytes.bit_length()), default=None)
        return None if kind is None else self.last[kind]


@dataclass(slots=True, kw_only=True, eq=False)
class PieceRead:
    """One reading under way."""

    size_bytes: int
    began_s: float
    moved_bytes: int = 0
    given_up: bool = False
    asked: bool = False
    """Whether bytes have been asked for; before, it waits for memory."""
    others_bytes_s: float | None = None
    """What others moved a second, since this is behind them; ``None`` while it is not. With nothing
    left to compare with it stays as it was."""
    _older: tuple[float, int] = (0.0, 0)
    _newer: tuple[float, int] = (0.0, 0)
    _last: tuple[float, int] = (0.0, 0)
    """When bytes were last seen to have come, and how many there were then."""

    def begin(self, now_s: float) -> None:
        """Bytes are asked for from now on."""
        self.began_s, self.asked = now_s, True
        self._older = self._newer = self._last = (now_s, self.moved_bytes)

    def note(self, now_s: float) -> None:
        """Remember how far it is. Called a few times in a ``WINDOW_S`` at the least."""
        if self.moved_bytes != self._last[1]:
            self._last = (now_s, self.moved_bytes)
        if now_s - self._newer[0] >= WINDOW_S / 2:
            self._older, self._newer = self._newer, (now_s, self.moved_bytes)

    def least_bytes_s(self, now_s: float) -> float:
        """What it moves a second at the least: the first bytes may have come in one burst."""
        at_s, at_bytes = self._older
        if now_s <= at_s:
            return 0.0
        lately = (self.moved_bytes - at_bytes) / (now_s - at_s)
        always = max(0, self.moved_bytes - ANNOUNCE_BYTES) / (now_s - self.began_s)
        return min(lately, always, self.most_bytes_s(now_s))

    def most_bytes_s(self, now_s: float) -> float:
        """What it moves a second at the most: bytes are reported only ``ANNOUNCE_BYTES`` later."""
        may_be = self.moved_bytes + min(ANNOUNCE_BYTES, self.size_bytes - self.moved_bytes)
        since = ((self.began_s, 0), self._older, self._last)
        rates = [(may_be - bytes_) / (now_s - at_s) for at_s, bytes_ in since if at_s < now_s]
        return min(rates, default=math.inf)

    def left_s(self, now_s: float) -> float:
        """Seconds until its end, if it goes on like this and with the benefit of the doubt."""
        if self.moved_bytes >= self.size_bytes:
            return 0.0
        rate = self.most_bytes_s(now_s)
        return (self.size_bytes - self.moved_bytes) / rate if rate > 0 else math.inf

    def fresh_s(self) -> float | None:
        """Seconds a new reading of it would take, going by the others; ``None`` where this one is
        not behind them."""
        return self.size_bytes / self.others_bytes_s if self.others_bytes_s else None

    def lost(self, now_s: float, most_left_s: float, limit_s: float) -> bool:
        """Whether it has had ``limit_s``, and needs more than ``most_left_s`` from now on."""
        return now_s - self.began_s > limit_s and self.left_s(now_s) > most_left_s


def compare(readings: Iterable[PieceRead], now_s: float) -> None:
    """Note which of them are behind the others now."""
    under_way = [
        one
        for one in readings
        if one.asked and not one.given_up and one.moved_bytes < one.size_bytes
    ]
    for one in under_way:
        one.note(now_s)
    known = sorted(one.least_bytes_s(now_s) for one in under_way)
    usual = known[len(known) // 2] if len(known) > 1 else 0.0
    for one in under_way:
        enough = one.most_bytes_s(now_s) * BEHIND_FACTOR
        if enough < usual:
            one.others_bytes_s = max(usual, one.others_bytes_s or 0.0)
        elif one.others_bytes_s is not None and enough >= one.others_bytes_s:
            one.others_bytes_s = None
