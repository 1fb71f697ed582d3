"""A pool's demand over the last while: time-weighted means over the stable and panic windows.

An observation holds until the next one, for ``demand_stale_s`` at most; time without an
observation is left out of the mean instead of counting as zero. What is kept are sums since the
beginning at points in time, so that a mean is a difference of two of them, whatever the length of
its window. Their number is bounded: points closer together than ``bucket_s`` become one.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import deque
from dataclasses import dataclass

from autoscaler.types import PoolDemand, PoolPolicy, WindowedDemand

BUCKETS_PER_PANIC_WINDOW = 12
LEAST_WINDOWS = 3
LEAST_RATE_S = 1.0
"""Shortest time that tokens are counted over before they are called a rate."""


@dataclass(frozen=True, slots=True)
class Sums:
    """Until ``at_s``: tokens times seconds and the seconds in which they were known, and the same
    of requests."""

    at_s: float
    token_s: float = 0.0
    token_known_s: float = 0.0
    request_s: float = 0.0
    request_known_s: float = 0.0

    def held(self, demand: PoolDemand, until_s: float) -> Sums:
        """With this demand until then."""
        length_s = until_s - self.at_s
        tokens, requests = totals(demand)
        return Sums(
            until_s,
            self.token_s + (tokens or 0) * length_s,
            self.token_known_s + (0.0 if tokens is None else length_s),
            self.request_s + (requests or 0) * length_s,
            self.request_known_s + (0.0 if requests is None else length_s),
        )

    def between(self, later: Sums, at_s: float) -> Sums:
        """The sums at a time between these and later ones."""
        part = (at_s - self.at_s) / (later.at_s - self.at_s)
        return Sums(
            at_s,
            self.token_s + part * (later.token_s - self.token_s),
            self.token_known_s + part * (later.token_known_s - self.token_known_s),
            self.request_s + part * (later.request_s - self.request_s),
            self.request_known_s + part * (later.request_known_s - self.request_known_s),
        )


class DemandWindow:
    """The recent demand of one pool. One owner writes it; time only moves forward."""

    def __init__(self, policy: PoolPolicy) -> None:
        self._sums: deque[Sums] = deque()
        """Oldest first. The first is at or before the begin of the stable window, or the oldest
        there was; the last is when the newest observation was made."""
        self._arrived: deque[tuple[float, int]] = deque()
        """Readings of the counter of tokens that came, likewise."""
        self._latest: PoolDemand | None = None
        self.resize(policy)

    def resize(self, policy: PoolPolicy) -> None:
        """Use the windows of this policy from now on, with what was observed so far."""
        self._stable_window_s = policy.stable_window_s
        self._panic_window_s = policy.panic_window_s
        self._stale_s = policy.demand_stale_s
        self._bucket_s = policy.panic_window_s / BUCKETS_PER_PANIC_WINDOW
        if self._latest is not None:
            self._expire(self._latest.observed_at_s)
        while len(self._sums) > self._most():
            self._sums.popleft()

    def add(self, demand: PoolDemand) -> None:
        """Take in an observation. One that is older than the newest is ignored."""
        last, now_s = self._latest, demand.observed_at_s
        if last is not None and now_s < last.observed_at_s:
            return
        if last is None:
            self._sums.append(Sums(now_s))
        elif now_s > last.observed_at_s:
            sums = self._sums[-1]
            stale_at_s = last.observed_at_s + self._stale_s
            if now_s > stale_at_s:
                sums = sums.held(last, stale_at_s)
                self._append(sums)
                self._append(sums.held(UNKNOWN, now_s))
            else:
                self._append(sums.held(last, now_s))
        self._latest = demand
        self._count(demand)
        self._expire(now_s)

    def read(self, now_s: float) -> WindowedDemand:
        """The demand as known at ``now_s``."""
        last = self._latest
        if last is None:
            return WindowedDemand()
        fresh = now_s - last.observed_at_s <= self._stale_s
        tokens, requests = totals(last) if fresh else (None, None)
        queued = above_zero(last.queued_requests, last.queued_tokens)
        inflight = above_zero(last.inflight_requests, last.inflight_tokens)
        newest = self._sums[-1]
        until_s = min(now_s, last.observed_at_s + self._stale_s)
        if until_s > newest.at_s:
            newest = newest.held(last, until_s)
        stable_s, panic_s = now_s - self._stable_window_s, now_s - self._panic_window_s
        stable_tokens, stable_requests = means(self._before(stable_s, newest), newest)
        panic_tokens, panic_requests = means(self._before(panic_s, newest), newest)
        return WindowedDemand(
            tokens=tokens,
            requests=requests,
            stable_tokens=otherwise(stable_tokens, tokens),
            panic_tokens=otherwise(panic_tokens, tokens),
            stable_requests=otherwise(stable_requests, requests),
            panic_requests=otherwise(panic_requests, requests),
            stable_tokens_per_s=self._rate(stable_s) if fresh else None,
            panic_tokens_per_s=self._rate(panic_s) if fresh else None,
            panic_deviation_tokens_per_s=self._deviation(now_s) if fresh and queued else None,
            queued_tokens=last.queued_tokens if fresh else None,
            arrivals_total=last.arrivals_total,
            some_requests=fresh and (queued or inflight),
            some_queued=fresh and queued,
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless all is in order of time, and bounded in number."""
        for before, after in itertools.pairwise(self._sums):
            assert before.at_s < after.at_s, (before, after)
        for earlier, later in itertools.pairwise(self._arrived):
            assert earlier[0] < later[0], (earlier, later)
        assert len(self._sums) <= self._most(), f"{len(self._sums)} sums are kept"
        assert len(self._arrived) <= self._most(), f"{len(self._arrived)} readings are kept"

    def _most(self) -> int:
        return 2 * int(self._stable_window_s / self._bucket_s) + 5

    def _append(self, sums: Sums) -> None:
        kept = self._sums
        if len(kept) > 1 and sums.at_s - kept[-2].at_s <= self._bucket_s:
            kept[-1] = sums
        else:
            kept.append(sums)

    def _expire(self, now_s: float) -> None:
        since_s = now_s - self._stable_window_s
        while len(self._sums) > 1 and self._sums[1].at_s <= since_s:
            self._sums.popleft()
        while len(self._arrived) > 1 and self._arrived[1][0] <= since_s:
            self._arrived.popleft()

    def _before(self, at_s: float, newest: Sums) -> Sums:
        """The sums at a time, or the oldest there are after it."""
        if newest.at_s <= at_s:
            return newest
        later = newest
        for sums in reversed(self._sums):
            if sums.at_s <= at_s:
                return sums.between(later, at_s)
            later = sums
        return later

    def _count(self, demand: PoolDemand) -> None:
        total, at_s, arrived = demand.arrived_tokens_total, demand.observed_at_s, self._arrived
        if total is None:
            return
        if arrived and total < arrived[-1][1]:
            arrived.clear()  # the counter was reset
        if not arrived or at_s - arrived[-1][0] >= self._bucket_s:
            arrived.append((at_s, total))

    def _rate(self, since_s: float) -> float | None:
        """Tokens that came per second since then; ``None`` before there is a second of it."""
        last = self._latest
        if last is None or last.arrived_tokens_total is None or not self._arrived:
            return None
        begin_s, total = next(
            (reading for reading in reversed(self._arrived) if reading[0] <= since_s),
            self._arrived[0],
        )
        if last.observed_at_s - begin_s < LEAST_RATE_S:
            return None
        return (last.arrived_tokens_total - total) / (last.observed_at_s - begin_s)

    def _deviation(self, now_s: float) -> float | None:
        """How much the rate varied over the panic windows before the newest; ``None`` of fewer than
        three."""
        rates: list[float] = []
        end_s, width_s = now_s - self._panic_window_s, self._panic_window_s
        later: tuple[float, int] | None = None
        for at_s, total in reversed(self._arrived):
            if later is None:
                later = (at_s, total) if at_s <= end_s else None
            elif later[0] - at_s >= width_s:
                rates.append((later[1] - total) / (later[0] - at_s))
                later = (at_s, total)
        return statistics.pstdev(rates) if len(rates) >= LEAST_WINDOWS else None


def totals(demand: PoolDemand) -> tuple[int | None, int | None]:
    """Tokens and requests, in flight and queued together; no requests are no tokens."""
    requests = total(demand.inflight_requests, demand.queued_requests)
    tokens = total(demand.inflight_tokens, demand.queued_tokens)
    return (0 if requests == 0 else tokens), requests


def above_zero(*figures: int | None) -> bool:
    """Whether any of the figures is known to be above zero."""
    return any(figure is not None and figure > 0 for figure in figures)


def total(inflight: int | None, queued: int | None) -> int | None:
    """The sum; unknown unless both parts are known, and numbers that can be."""
    if inflight is None or queued is None:
        return None
    both = inflight + queued
    return both if math.isfinite(both) and inflight >= 0 and queued >= 0 else None


def otherwise(mean: float | None, latest: int | None) -> float | None:
    """The mean where there is one; else the newest figure, whose time has no length yet."""
    return latest if mean is None else mean


def means(before: Sums, now: Sums) -> tuple[float | None, float | None]:
    """Mean tokens and requests of the time between, as far as they were known."""
    token_known_s = now.token_known_s - before.token_known_s
    request_known_s = now.request_known_s - before.request_known_s
    return (
        (now.token_s - before.token_s) / token_known_s if token_known_s > 0.0 else None,
        (now.request_s - before.request_s) / request_known_s if request_known_s > 0.0 else None,
    )


UNKNOWN = PoolDemand(observed_at_s=0.0)
