"""What a pool's counters come to, minute by minute and over the last minute. Pure.

The data path counts; here counters become figures. A sample of them is taken at every full minute
of the wall clock, and every ``SAMPLE_S`` between. Two samples a minute apart make the row of that
minute for the history, and the newest with the one of a minute ago make the recent traffic. A
minute that was not seen whole (the process began or stood still in it, the wall clock was set, a
counter went back) is unknown.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from autoscaler.types import HistogramCounts, PoolDemand, RecentTraffic

MINUTE_S = 60

SERIES: tuple[str, ...] = (
    "arrivals",
    "input_tokens",
    "predicted_output_tokens",
    "output_tokens",
    "queued_requests",
    "queued_tokens",
    "queue_wait_mean_s",
    "queue_wait_p90_s",
    "ttft_mean_s",
    "ttft_p90_s",
    "itl_mean_s",
    "itl_p90_s",
    "e2e_mean_s",
    "e2e_p90_s",
    "errors",
)
"""The series of a pool, by name. ``arrivals``, ``errors`` and tokens are sums of a minute: input
tokens (estimated) and predicted output tokens of the requests that came in it, output tokens of the
answers that ended in it. ``queued_…`` are means over the minute, the others of what ended in it."""

WORK = ("input_tokens", "predicted_output_tokens", "output_tokens")
"""Those that ``arrived_tokens_per_s`` takes."""

RECENT_S = 60.0
SAMPLE_S = 5.0
LEAST_S, MOST_S = 48.0, 75.0
"""What may lie between two samples that make a minute: ticks may be late, or a minute apart."""
KNOWN_SHARE = 0.8
"""Of a minute that a gauge must have been known."""


def arrived_tokens_per_s(series: Mapping[str, Sequence[float]]) -> list[float]:
    """The tokens per second that came in each minute, of the series ``WORK``; NaN is unknown. What
    comes from an engine's own metrics has no prediction, but the tokens of answers."""
    columns = zip(*(series[name] for name in WORK), strict=True)
    return [
        (prompt + (answered if math.isnan(expected) else expected)) / MINUTE_S
        for prompt, expected, answered in columns
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolMinute:
    """Figures of one pool in one minute (Unix time / 60), by series; what is missing is unknown."""

    pool: str
    minute: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolTotals:
    """What a pool's counters had come to at one moment. ``ended`` counts answers however they
    ended, ``errors`` those of them that were an engine's or the gateway's errors; ``ttft`` and
    ``itl`` are of streams."""

    arrivals: int
    input_tokens: int
    predicted_output_tokens: int
    prompt_tokens: int
    output_tokens: int
    ended: int
    errors: int
    queue_wait: HistogramCounts
    ttft: HistogramCounts
    itl: HistogramCounts
    e2e: HistogramCounts


@dataclass(frozen=True, slots=True)
class _Sample:
    at_s: float
    counters: PoolTotals


class PoolSeries:
    """One pool's samples. ``observe`` is called about once a second."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._samples: deque[_Sample] = deque()
        self._minute: int | None = None
        self._opened: _Sample | None = None
        """The first sample in the minute that runs."""
        self._gauges = (_Mean(), _Mean())
        self._quiet = 0
        """Samples in a row that found nothing going on, and no request come since."""

    def observe(
        self, demand: PoolDemand, wall_s: float, read: Callable[[], PoolTotals | None]
    ) -> PoolMinute | None:
        """Take in what there is, at a Unix time. Returns the minute that has just ended, where it
        is known. ``read`` is called where a sample is due; it gives ``None`` for the unknown."""
        now_s = demand.observed_at_s
        self._gauges[0].add(now_s, demand.queued_requests)
        self._gauges[1].add(now_s, demand.queued_tokens)
        minute = int(wall_s // MINUTE_S)
        ended: PoolMinute | None = None
        if minute != self._minute:
            sample = self._take(demand, read)
            if self._minute is not None and minute == self._minute + 1:
                ended = self._close(self._minute, sample)
            self._minute, self._opened = minute, sample
            for gauge in self._gauges:
                gauge.begin(now_s)
        elif not self._samples or now_s - self._samples[-1].at_s >= SAMPLE_S:
            self._take(demand, read)
        while self._samples and now_s - self._samples[0].at_s > RECENT_S + SAMPLE_S:
            self._samples.popleft()
        return ended

    def recent(self, now_s: float, counters: PoolTotals) -> RecentTraffic | None:
        """What the last minute was, by the counters of now; ``None`` where it is too new to say."""
        if not self._samples or now_s - self._samples[0].at_s < 1.0:
            return None
        oldest = self._samples[0]
        window_s, old = now_s - oldest.at_s, oldest.counters

        def rate(now: int, before: int) -> float:
            return round((now - before) / window_s, 3)

        ttft, itl = since(counters.ttft, old.ttft), since(counters.itl, old.itl)
        wait, e2e = since(counters.queue_wait, old.queue_wait), since(counters.e2e, old.e2e)
        return RecentTraffic(
            window_s=round(window_s, 3),
            arrivals_per_s=rate(counters.arrivals, old.arrivals),
            requests_per_s=rate(counters.ended, old.ended),
            errors_per_s=rate(counters.errors, old.errors),
            arrived_prompt_tokens_per_s=rate(counters.input_tokens, old.input_tokens),
            arrived_output_tokens_per_s=rate(
                counters.predicted_output_tokens, old.predicted_output_tokens
            ),
            prompt_tokens_per_s=rate(counters.prompt_tokens, old.prompt_tokens),
            generation_tokens_per_s=rate(counters.output_tokens, old.output_tokens),
            ttft_count=sum(ttft.counts),
            ttft_mean_s=mean(ttft),
            ttft_p50_s=quantile(ttft, 0.5),
            ttft_p95_s=quantile(ttft, 0.95),
            ttft_p99_s=quantile(ttft, 0.99),
            itl_count=sum(itl.counts),
            itl_mean_s=mean(itl),
            itl_p50_s=quantile(itl, 0.5),
            itl_p95_s=quantile(itl, 0.95),
            itl_p99_s=quantile(itl, 0.99),
            queue_wait_mean_s=mean(wait),
            queue_wait_p50_s=quantile(wait, 0.5),
            queue_wait_p95_s=quantile(wait, 0.95),
            queue_wait_p99_s=quantile(wait, 0.99),
            e2e_mean_s=mean(e2e),
            e2e_p50_s=quantile(e2e, 0.5),
            e2e_p95_s=quantile(e2e, 0.95),
            e2e_p99_s=quantile(e2e, 0.99),
        )

    def _take(self, demand: PoolDemand, read: Callable[[], PoolTotals | None]) -> _Sample | None:
        """A sample of now; ``None`` where the counters are not known."""
        last = self._samples[-1].counters if self._samples else None
        idle = demand.inflight_requests == demand.queued_requests == 0
        same = last is not None and last.arrivals == demand.arrivals_total
        self._quiet = self._quiet + 1 if idle and same else 0
        # Reading costs most of what a sample does, and most of many pools are quiet. The second
        # quiet sample is read still: it has what was published just after the first.
        if last is None or self._quiet <= 2:
            last = None if demand.arrivals_total is None else read()
        if last is None:
            self._samples.clear()
            return None
        sample = _Sample(demand.observed_at_s, last)
        self._samples.append(sample)
        return sample

    def _close(self, minute: int, end: _Sample | None) -> PoolMinute | None:
        """The minute between the sample that opened it and this one, where it is known."""
        begin = self._opened
        if begin is None or end is None or not LEAST_S <= end.at_s - begin.at_s <= MOST_S:
            return None
        new, old = end.counters, begin.counters
        values: dict[str, float | None] = {
            name: float(getattr(new, name) - getattr(old, name))
            for name in (
                *("arrivals", "input_tokens", "predicted_output_tokens", "output_tokens"),
                "errors",
            )
        }
        for name in ("queue_wait", "ttft", "itl", "e2e"):
            histogram = since(getattr(new, name), getattr(old, name))
            values[f"{name}_mean_s"] = mean(histogram)
            values[f"{name}_p90_s"] = quantile(histogram, 0.9)
        if any(value is not None and value < 0 for value in values.values()):
            return None  # other counters than before: the pool was made anew
        for name, gauge in zip(("queued_requests", "queued_tokens"), self._gauges, strict=True):
            values[name] = gauge.mean(end.at_s - begin.at_s)
        known = {name: value for name, value in values.items() if value is not None}
        return PoolMinute(pool=self._pool, minute=minute, values=known)


class _Mean:
    """A gauge's mean over time: a value holds until the next."""

    def __init__(self) -> None:
        self._sum = self._known_s = self._at_s = 0.0
        self._value: int | None = None

    def add(self, now_s: float, value: int | None) -> None:
        if self._value is not None:
            self._sum += self._value * (now_s - self._at_s)
            self._known_s += now_s - self._at_s
        self._at_s, self._value = now_s, value

    def begin(self, now_s: float) -> None:
        self._sum = self._known_s = 0.0
        self._at_s = now_s

    def mean(self, span_s: float) -> float | None:
        return self._sum / self._known_s if self._known_s >= KNOWN_SHARE * span_s else None


def since(now: HistogramCounts, before: HistogramCounts) -> HistogramCounts:
    """What has come into a histogram."""
    counts = tuple(new - old for new, old in zip(now.counts, before.counts, strict=True))
    return HistogramCounts(bounds_s=now.bounds_s, counts=counts, sum_s=now.sum_s - before.sum_s)


def mean(histogram: HistogramCounts) -> float | None:
    """The mean of a histogram's values; ``None`` of none."""
    count = sum(histogram.counts)
    return histogram.sum_s / count if count > 0 else None


def quantile(histogram: HistogramCounts, q: float) -> float | None:
    """The quantile of a histogram's values, by its buckets, as Prometheus' ``histogram_quantile``
    has it: values lie evenly in a bucket, those beyond the last bound at it. ``None`` of none."""
    bounds: Sequence[float] = histogram.bounds_s
    total = sum(histogram.counts)
    if total <= 0:
        return None
    rank, below, start = q * total, 0, 0.0
    for bound, count in zip(bounds, histogram.counts, strict=False):
        if below + count >= rank:
            return start + (bound - start) * (rank - below) / count if count else bound
        below, start = below + count, bound
    return bounds[-1]
