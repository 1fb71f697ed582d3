"""A pool's demand over the last while: time-weighted means over the stable and panic windows.

An observation holds until the next one, for ``demand_stale_s`` at most; time without an
observation is left out of the mean instead of counting as zero. What is kept is bounded:
observations that follow each other within ``bucket_s`` are merged into one span.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from dataclasses import dataclass

from autoscaler.types import PoolDemand, PoolPolicy, WindowedDemand

BUCKETS_PER_PANIC_WINDOW = 12
LEAST_RATE_S = 1.0
"""Shortest time that tokens are counted over before they are called a rate."""


@dataclass(slots=True, kw_only=True)
class DemandSpan:
    """A stretch of time and the mean demand in it; ``None`` is unknown."""

    start_s: float
    end_s: float
    tokens: float | None
    requests: float | None


class DemandWindow:
    """The recent demand of one pool. One owner writes it; time only moves forward."""

    def __init__(self, policy: PoolPolicy) -> None:
        self._arrived: deque[tuple[float, int]] = deque()
        """Readings of the counter of tokens that came, a bucket apart; the first is before the
        stable window, or the first there was."""
        self._spans: deque[DemandSpan] = deque()
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
        self._trim()

    def add(self, demand: PoolDemand) -> None:
        """Take in an observation. One that is older than the newest is ignored."""
        last = self._latest
        if last is not None:
            if demand.observed_at_s < last.observed_at_s:
                return
            self._append(self._held(last, demand.observed_at_s))
        self._latest = demand
        self._expire(demand.observed_at_s)
        self._count(demand)

    def read(self, now_s: float) -> WindowedDemand:
        """The demand as known at ``now_s``."""
        last = self._latest
        if last is None:
            return WindowedDemand()
        fresh = now_s - last.observed_at_s <= self._stale_s
        tokens, requests = totals(last) if fresh else (None, None)
        queued = above_zero(last.queued_requests, last.queued_tokens)
        inflight = above_zero(last.inflight_requests, last.inflight_tokens)
        stable_tokens, stable_requests = self._means(now_s, self._stable_window_s)
        panic_tokens, panic_requests = self._means(now_s, self._panic_window_s)
        return WindowedDemand(
            tokens=tokens,
            requests=requests,
            stable_tokens=otherwise(stable_tokens, tokens),
            panic_tokens=otherwise(panic_tokens, tokens),
            stable_requests=otherwise(stable_requests, requests),
            panic_requests=otherwise(panic_requests, requests),
            stable_tokens_per_s=self._rate(now_s, self._stable_window_s) if fresh else None,
            panic_tokens_per_s=self._rate(now_s, self._panic_window_s) if fresh else None,
            queued_tokens=last.queued_tokens if fresh else None,
            arrivals_total=last.arrivals_total,
            some_requests=fresh and (queued or inflight),
            some_queued=fresh and queued,
        )

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` unless the spans are in order, apart, and bounded in number."""
        spans = list(self._spans)
        for span in spans:
            assert span.start_s < span.end_s, span
        for before, after in itertools.pairwise(spans):
            assert before.end_s <= after.start_s, (before, after)
        limit = 2 * (self._stable_window_s / self._bucket_s) + 4
        assert len(self._arrived) <= limit, f"{len(self._arrived)} readings are kept"
        assert len(spans) <= limit, f"{len(spans)} spans are kept, {limit:g} are allowed"

    def _count(self, demand: PoolDemand) -> None:
        total, at_s = demand.arrived_tokens_total, demand.observed_at_s
        arrived = self._arrived
        if total is None:
            return
        if arrived and total < arrived[-1][1]:
            arrived.clear()  # the counter was reset
        if not arrived or at_s - arrived[-1][0] >= self._bucket_s:
            arrived.append((at_s, total))
        since_s = at_s - self._stable_window_s
        while len(arrived) > 1 and arrived[1][0] <= since_s:
            arrived.popleft()

    def _rate(self, now_s: float, window_s: float) -> float | None:
        """Tokens that came per second of the window; ``None`` before there is a second of it."""
        last = self._latest
        if last is None or last.arrived_tokens_total is None:
            return None
        since_s = now_s - window_s
        begin: tuple[float, int] | None = None
        for reading in self._arrived:
            if begin is not None and reading[0] > since_s:
                break
            begin = reading
        if begin is None or last.observed_at_s - begin[0] < LEAST_RATE_S:
            return None
        return (last.arrived_tokens_total - begin[1]) / (last.observed_at_s - begin[0])

    def _held(self, demand: PoolDemand, until_s: float) -> DemandSpan:
        start_s = demand.observed_at_s
        end_s = min(until_s, start_s + self._stale_s)
        tokens, requests = totals(demand)
        return DemandSpan(start_s=start_s, end_s=end_s, tokens=tokens, requests=requests)

    def _append(self, span: DemandSpan) -> None:
        if span.end_s <= span.start_s:
            return
        if self._spans:
            last = self._spans[-1]
            adjacent = last.end_s == span.start_s
            if adjacent and span.end_s - last.start_s <= self._bucket_s and alike(last, span):
                last.tokens = merged(last, span, last.tokens, span.tokens)
                last.requests = merged(last, span, last.requests, span.requests)
                last.end_s = span.end_s
                return
        self._spans.append(span)
        self._trim()

    def _trim(self) -> None:
        limit = 2 * int(self._stable_window_s / self._bucket_s) + 4
        while len(self._spans) > limit:
            self._spans.popleft()

    def _expire(self, now_s: float) -> None:
        while self._spans and self._spans[0].end_s <= now_s - self._stable_window_s:
            self._spans.popleft()

    def _means(self, now_s: float, window_s: float) -> tuple[float | None, float | None]:
        since_s = now_s - window_s
        token_s = token_time_s = request_s = request_time_s = 0.0
        spans = [*self._spans]
        if self._latest is not None:
            spans.append(self._held(self._latest, now_s))
        for span in spans:
            length_s = min(span.end_s, now_s) - max(span.start_s, since_s)
            if length_s <= 0.0:
                continue
            if span.tokens is not None:
                token_s += span.tokens * length_s
                token_time_s += length_s
            if span.requests is not None:
                request_s += span.requests * length_s
                request_time_s += length_s
        return (
            token_s / token_time_s if token_time_s else None,
            request_s / request_time_s if request_time_s else None,
        )


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


def alike(one: DemandSpan, other: DemandSpan) -> bool:
    """Whether two spans know the same figures, so that their means can be merged."""
    return (one.tokens is None) == (other.tokens is None) and (
        (one.requests is None) == (other.requests is None)
    )


def merged(
    one: DemandSpan, other: DemandSpan, one_value: float | None, other_value: float | None
) -> float | None:
    """The time-weighted mean of two values of adjoining spans."""
    if one_value is None or other_value is None:
        return None
    one_s = one.end_s - one.start_s
    other_s = other.end_s - other.start_s
    return (one_value * one_s + other_value * other_s) / (one_s + other_s)
