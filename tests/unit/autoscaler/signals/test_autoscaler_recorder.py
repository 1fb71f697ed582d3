"""What the control loop sees becomes the history, and the last minute of each pool."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from autoscaler.signals.history import HistoryStore, HistoryWriter
from autoscaler.signals.recorder import Recorder
from autoscaler.signals.series import PoolTotals
from autoscaler.types import HistogramCounts, Observation, PoolDemand

START_S = 29_000_000 * 60.0
NONE = HistogramCounts(bounds_s=(1.0,), counts=(0, 0), sum_s=0.0)


class Site:
    """Pools with counters of their own, seen once a second."""

    def __init__(self, path: Path) -> None:
        self.now_s = 0.0
        self.arrivals: dict[str, int] = {}
        self.store = HistoryStore(path, max_age_s=86_400.0, max_bytes=1 << 24)
        self.recorder = Recorder(
            read=self.totals,
            writer=HistoryWriter(self.store, lambda: START_S + self.now_s),
            clock=lambda: self.now_s,
            wall_s=lambda: START_S + self.now_s,
        )

    def totals(self, pool: str) -> PoolTotals | None:
        if pool not in self.arrivals:
            return None
        count = self.arrivals[pool]
        return PoolTotals(
            arrivals=count, input_tokens=0, predicted_output_tokens=0, prompt_tokens=0,
            output_tokens=0, ended=count, errors=0, queue_wait=NONE, ttft=NONE, itl=NONE, e2e=NONE,
        )  # fmt: skip

    def run(self, seconds: int, **each_s: int) -> None:
        for _ in range(seconds):
            pools = {
                name: PoolDemand(
                    observed_at_s=self.now_s, arrivals_total=count, queued_requests=0,
                    queued_tokens=0, inflight_requests=0,
                )
                for name, count in self.arrivals.items()
            }  # fmt: skip
            self.recorder.observe(Observation(pools=pools))
            self.now_s += 1
            for name, count in each_s.items():
                self.arrivals[name] += count

    def kept(self, pool: str, minutes: int) -> list[float]:
        """What the history has of a pool, when it has so many minutes of it."""
        deadline_s = time.monotonic() + 30
        while time.monotonic() < deadline_s:
            window = self.store.read(pool, ["arrivals"], None, START_S + self.now_s)
            found = [value for value in window.values["arrivals"] if value == value]
            if len(found) >= minutes:
                return found
            time.sleep(0.01)
        raise AssertionError(f"{minutes} minutes of {pool} were not written")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path / "history.sqlite3")
    yield made
    made.recorder.close()


def test_minutes_are_written_as_they_end(site: Site) -> None:
    site.arrivals = {"a": 0, "b": 5}
    site.run(185, a=1, b=2)
    assert site.kept("a", 3) == [60.0] * 3
    assert site.kept("b", 3) == [120.0] * 3
    recent = site.recorder.recent("a")
    assert recent is not None
    assert recent.requests_per_s == pytest.approx(1.0, abs=0.02)


def test_a_pool_that_comes_again_begins_anew(site: Site) -> None:
    site.arrivals = {"a": 0}
    site.run(90, a=1)
    assert site.recorder.recent("a") is not None
    site.arrivals = {}
    site.run(1)
    assert site.recorder.recent("a") is None
    site.arrivals = {"a": 1_000_000}
    site.run(150, a=1)
    assert site.kept("a", 3) == [60.0] * 3
