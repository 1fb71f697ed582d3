"""What a policy makes of what it sees: rates over a while, means over a while, minutes."""

from __future__ import annotations

import math
from collections import deque

import numpy as np

from autoscaler.signals.series import MINUTE_S
from forecaster.types import Floats, History


class Rate:
    """A counter's rate per second over the last ``window_s``."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, float]] = deque()

    def add(self, now_s: float, total: float) -> float | None:
        """The counter stands at ``total``; the rate, ``None`` at the first look."""
        seen = self._seen
        seen.append((now_s, total))
        # The newest reading that is a whole window old is kept: the window begins there.
        while len(seen) > 2 and seen[1][0] <= now_s - self._window_s:
            seen.popleft()
        since_s, before = seen[0]
        return (total - before) / (now_s - since_s) if now_s > since_s else None


class Mean:
    """The mean of what was seen in the last ``window_s``."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._seen: deque[tuple[float, float]] = deque()
        self._sum = 0.0

    def add(self, now_s: float, value: float) -> float:
        """One more value; the mean with it."""
        seen = self._seen
        seen.append((now_s, value))
        self._sum += value
        while seen[0][0] <= now_s - self._window_s:
            self._sum -= seen.popleft()[1]
        return self._sum / len(seen)


class Largest:
    """The largest of what was seen in the last ``window_s`` (or the smallest of its negatives)."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._falling: deque[tuple[float, int]] = deque()

    def add(self, now_s: float, value: int) -> int:
        """One more value; the largest with it."""
        falling = self._falling
        while falling and falling[-1][1] <= value:
            falling.pop()
        falling.append((now_s, value))
        while falling[0][0] <= now_s - self._window_s:
            falling.popleft()
        return falling[0][1]


class MinuteSeries:
    """Tokens per second of each minute: the history, and the minutes seen since."""

    def __init__(self, history: History | None, keep_minutes: int) -> None:
        values = [] if history is None else history.values[-keep_minutes:].tolist()
        self._values: deque[float] = deque(values, maxlen=keep_minutes)
        self._minute_s: float | None = None
        self._total = 0.0

    def add(self, now_s: float, tokens_total: float) -> int:
        """The counter stands at ``tokens_total``; how many minutes are complete since the last
        look."""
        if self._minute_s is None:
            self._minute_s = now_s
            self._total = tokens_total
            return 0
        complete = int((now_s - self._minute_s) // MINUTE_S)
        if complete:
            mean = (tokens_total - self._total) / (complete * MINUTE_S)
            self._values.extend([mean] * complete)
            self._minute_s += complete * MINUTE_S
            self._total = tokens_total
        return complete

    def __len__(self) -> int:
        return len(self._values)

    def values(self) -> Floats:
        """Oldest first."""
        return np.array(self._values, dtype=np.float64)


def replicas_for(load: float, each: float) -> int:
    """Replicas that carry ``load`` at ``each``; a part that is an error of rounding asks for
    none."""
    return math.ceil(load / each - 1e-9)
