"""Counters become minutes and the traffic of the last minute, on a virtual clock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest

from autoscaler.signals.series import PoolMinute, PoolSeries, PoolTotals, quantile
from autoscaler.types import HistogramCounts, PoolDemand

BOUNDS_S = (0.1, 1.0, 10.0)
START_S = 29_000_000 * 60.0
"""Unix time of a full minute."""


def histogram(*values: float) -> HistogramCounts:
    counts = [0] * (len(BOUNDS_S) + 1)
    for value in values:
        counts[sum(value > bound for bound in BOUNDS_S)] += 1
    return HistogramCounts(bounds_s=BOUNDS_S, counts=tuple(counts), sum_s=sum(values))


@dataclass
class Site:
    """One pool's counters, and the clocks."""

    now_s: float = 1_000.0
    wall_s: float = START_S
    values: dict[str, int] = field(default_factory=dict)
    waits: dict[str, list[float]] = field(default_factory=dict)
    queued: int | None = 0
    inflight: int | None = 0
    unknown: bool = False
    reads: int = 0
    minutes: list[PoolMinute] = field(default_factory=list)
    series: PoolSeries = field(default_factory=lambda: PoolSeries("a"))

    def count(self, name: str, number: int = 1) -> None:
        self.values[name] = self.values.get(name, 0) + number

    def totals(self) -> PoolTotals:
        self.reads += 1
        plain = ("arrivals", "input_tokens", "predicted_output_tokens", "prompt_tokens")
        plain += ("output_tokens", "ended", "errors")
        waits = {
            name: histogram(*self.waits.get(name, ()))
            for name in ("queue_wait", "ttft", "itl", "e2e")
        }
        return PoolTotals(**{name: self.values.get(name, 0) for name in plain}, **waits)

    def look(self) -> None:
        demand = PoolDemand(observed_at_s=self.now_s)
        if not self.unknown:
            demand = replace(
                demand,
                arrivals_total=self.values.get("arrivals", 0),
                queued_requests=self.queued,
                queued_tokens=None if self.queued is None else 100 * self.queued,
                inflight_requests=self.inflight,
            )
        ended = self.series.observe(demand, self.wall_s, self.totals)
        if ended is not None:
            self.minutes.append(ended)

    def wait(self, seconds: int, each: Callable[[], None] = lambda: None, step_s: int = 1) -> None:
        for _ in range(0, seconds, step_s):
            self.now_s += step_s
            self.wall_s += step_s
            each()
            self.look()

    def arrivals(self) -> list[tuple[int, float]]:
        first = int(START_S // 60)
        return [(one.minute - first, one.values["arrivals"]) for one in self.minutes]


@pytest.fixture
def site() -> Site:
    made = Site()
    made.look()
    return made


def test_a_minute_has_what_came_and_what_ended_in_it(site: Site) -> None:
    for name, number in (("arrivals", 3), ("input_tokens", 300), ("predicted_output_tokens", 60)):
        site.count(name, number)
    site.wait(30)
    site.count("output_tokens", 50)
    site.count("errors", 1)
    site.waits = {"ttft": [0.05] * 8 + [0.5, 0.5], "e2e": [20.0]}
    site.queued = 4
    site.wait(30)
    (minute,) = site.minutes
    assert (minute.pool, minute.minute) == ("a", START_S // 60)
    assert minute.values == {
        "arrivals": 3.0, "input_tokens": 300.0, "predicted_output_tokens": 60.0,
        "output_tokens": 50.0, "errors": 1.0,
        "queued_requests": pytest.approx(2.0, abs=0.1),
        "queued_tokens": pytest.approx(200.0, abs=10),
        "ttft_mean_s": pytest.approx(0.14), "ttft_p90_s": pytest.approx(0.55),
        "e2e_mean_s": 20.0, "e2e_p90_s": 10.0,
    }  # fmt: skip
    site.wait(60)
    assert site.minutes[1].values == {  # nothing was asked: that is known
        "arrivals": 0.0, "input_tokens": 0.0, "predicted_output_tokens": 0.0,
        "output_tokens": 0.0, "errors": 0.0, "queued_requests": 4.0, "queued_tokens": 400.0,
    }  # fmt: skip


def test_no_request_is_lost_between_two_minutes(site: Site) -> None:
    site.wait(600, lambda: site.count("arrivals"))
    assert [minute for minute, _ in site.arrivals()] == list(range(10))
    assert sum(count for _, count in site.arrivals()) == pytest.approx(600, abs=1)


def test_late_and_rare_looks_make_minutes_too(site: Site) -> None:
    site.wait(300, lambda: site.count("arrivals", 7), step_s=7)
    assert [minute for minute, _ in site.arrivals()] == list(range(5))
    site = Site(wall_s=START_S + 20)
    site.look()
    site.wait(300, lambda: site.count("arrivals", 60), step_s=60)
    assert site.arrivals() == [(minute, 60.0) for minute in range(5)]


def set_clock(by_s: float) -> Callable[[Site], None]:
    def change(site: Site) -> None:
        site.wall_s += by_s

    return change


def stand_still(seconds: float, wall_s: float | None = None) -> Callable[[Site], None]:
    """The process is stopped, or the machine sleeps: the monotonic clock may not go on then."""

    def change(site: Site) -> None:
        site.now_s += seconds
        site.wall_s += seconds if wall_s is None else wall_s

    return change


def lose_counters(site: Site) -> None:
    site.values["arrivals"] = 2


def forget(site: Site) -> None:
    site.unknown = True
    site.wait(10)
    site.unknown = False


@pytest.mark.parametrize(
    ("change", "missing", "next_minute"),
    [
        (set_clock(+3600), [2], 63),
        (set_clock(-3600), [2], -57),
        (set_clock(+20), [2], 3),
        (set_clock(-20), [2], 3),
        (set_clock(+1), [], 3),
        (stand_still(200), [2, 3, 4, 5], 6),
        (stand_still(0, 3600), [2], 63),
        (lose_counters, [2], 3),
        (forget, [], 3),
    ],
)
def test_a_minute_that_was_not_seen_whole_is_unknown(
    site: Site, change: Callable[[Site], None], missing: Sequence[int], next_minute: int
) -> None:
    each = lambda: site.count("arrivals")  # noqa: E731
    site.wait(150, each)
    change(site)
    site.wait(150, each)
    minutes = [minute for minute, _ in site.arrivals()]
    assert minutes[:2] == [0, 1]
    assert not set(missing) & set(minutes)
    assert next_minute in minutes
    assert all(48 <= count <= 75 for _, count in site.arrivals())


@pytest.mark.parametrize("by_s", [3600, -3600])
def test_of_which_minute_it_was_is_unknown_where_the_clock_was_set_at_its_end(
    site: Site, by_s: float
) -> None:
    site.wait(178)
    site.wall_s += by_s
    site.wait(60)
    assert [minute for minute, _ in site.arrivals()] == [0, 1]


def test_the_first_and_the_last_minute_are_unknown() -> None:
    site = Site(wall_s=START_S + 30)
    site.look()
    site.wait(30 + 60 + 59)
    assert [minute for minute, _ in site.arrivals()] == [1]


def test_a_queue_that_was_mostly_unknown_has_no_mean(site: Site) -> None:
    site.queued = None
    site.wait(30)
    site.queued = 2
    site.wait(30)
    assert "queued_requests" not in site.minutes[0].values
    site.wait(10)
    site.queued = None
    site.wait(5)
    site.queued = 2
    site.wait(45)
    assert site.minutes[1].values["queued_requests"] == 2.0


def test_quiet_pools_are_read_seldom(site: Site) -> None:
    site.wait(600)
    assert site.reads <= 4
    site.count("arrivals")
    site.count("ended")
    site.wait(60)
    assert site.minutes[-1].values["arrivals"] == 1.0
    site.inflight, site.reads = 1, 0
    site.wait(60)
    assert site.reads >= 12


def test_what_a_pool_answered_in_the_last_minute(site: Site) -> None:
    def recent() -> object:
        return site.series.recent(site.now_s, site.totals())

    assert recent() is None
    site.count("ended", 1000)  # an hour ago
    site.wait(3600)
    for name, number in (("ended", 66), ("arrivals", 132), ("errors", 6), ("prompt_tokens", 660)):
        site.count(name, number)
    site.waits = {"itl": [0.5] * 3, "queue_wait": [0.05]}
    site.wait(1)
    seen = site.series.recent(site.now_s, site.totals())
    assert seen is not None
    assert 60 <= seen.window_s <= 66
    assert seen.requests_per_s * seen.window_s == pytest.approx(66, abs=0.1)
    assert seen.arrivals_per_s is not None
    assert seen.arrivals_per_s * seen.window_s == pytest.approx(132, abs=0.1)
    assert seen.errors_per_s * seen.window_s == pytest.approx(6, abs=0.1)
    assert seen.prompt_tokens_per_s * seen.window_s == pytest.approx(660, abs=0.1)
    assert (seen.itl_count, seen.itl_mean_s, seen.itl_p50_s) == (3, 0.5, pytest.approx(0.55))
    assert (seen.ttft_count, seen.ttft_mean_s, seen.ttft_p50_s) == (0, None, None)
    assert seen.queue_wait_p95_s == pytest.approx(0.095)


@pytest.mark.parametrize(
    ("values", "q", "expected"),
    [
        ([], 0.5, None),
        ([0.7], 0.5, 0.55),  # halfway from 0.1 to 1
        ([0.01] * 3 + [5000.0], 0.5, 0.1 * 2 / 3),
        ([0.01, 5000.0], 0.95, 10.0),
    ],
)
def test_a_quantile_by_buckets(values: list[float], q: float, expected: float | None) -> None:
    found = quantile(histogram(*values), q)
    assert found == (None if expected is None else pytest.approx(expected))
