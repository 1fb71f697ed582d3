"""The metrics page: what is unknown is left out, and what the cache takes is told now and then."""

from __future__ import annotations

import asyncio
import os
import re
import threading
from dataclasses import replace
from typing import Any

import pytest

from autoscaler.types import (
    Decision,
    EngineObservation,
    FleetReport,
    ForecastTally,
    HistogramCounts,
    PoolReport,
    ReplicaReport,
    ScaleReason,
    TierReport,
)
from gateway.admin.metrics_page import (
    FRESH_S,
    STALE_S,
    UsagePoller,
    render,
    render_cache,
    render_forecasts,
)
from gateway.datapath.shared import Shared
from loaders.engines.base import EngineLoad
from modelcache.types import Progress, Tier
from router.types import ReplicaState


def test_bytes_to_fetch_that_are_not_known_are_left_out() -> None:
    def page(*totals: int | None) -> str:
        replicas = tuple(
            ReplicaReport(
                id=f"p-{number}",
                pool="p",
                state=ReplicaState.STARTING,
                since_s=0.0,
                progress=Progress(phase="fetching", bytes_done=3, bytes_total=total),
            )
            for number, total in enumerate(totals)
        )
        pool = PoolReport(
            name="p", desired=1, override=None, ready=0, starting=1, unhealthy=0, draining=0,
            sleeping=0, wake_eta_s=None, last_decision=None, replicas=replicas,
        )  # fmt: skip
        shared = Shared.create(workers=1, max_replicas=4, max_pools=1)
        report = FleetReport(at_s=0.0, pools=(pool,), decisions={}, errors={})
        text = render(
            shared=shared, pools={}, report=report, version="1", traffic={}, replicas={}, workers=()
        )
        shared.close()
        return text.decode()

    assert 'tidegate_prepare_bytes{pool="p"} 7.0' in page(7, None)
    assert 'tidegate_prepared_bytes{pool="p"} 3.0' in page(None)
    assert "tidegate_prepare_bytes" not in page(None)


def test_starts_and_crashes_of_a_pool() -> None:
    tier = TierReport(
        tier=Tier.SLEEPING,
        available=True,
        start_times=HistogramCounts(bounds_s=(0.5, 1.0), counts=(1, 0, 2), sum_s=7.25),
        failed_starts=3,
    )
    pool = PoolReport(
        name="p", desired=1, override=None, ready=0, starting=1, unhealthy=0, draining=0,
        sleeping=0, wake_eta_s=None, last_decision=None, replicas=(), tier=Tier.SLEEPING,
        tiers=(tier,), max_replicas=5, crashes=2,
    )  # fmt: skip
    shared = Shared.create(workers=1, max_replicas=4, max_pools=1)

    def samples(pool: PoolReport) -> dict[str, float]:
        report = FleetReport(at_s=0.0, pools=(pool,), decisions={}, errors={})
        text = render(
            shared=shared, pools={}, report=report, version="1", traffic={}, replicas={}, workers=()
        )
        lines = (line for line in text.decode().splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    seen = samples(pool)
    labels = 'pool="p",tier="sleeping"'
    assert seen['tidegate_starts_total{outcome="ready",' + labels + "}"] == 3
    assert seen['tidegate_starts_total{outcome="failed",' + labels + "}"] == 3
    assert seen['tidegate_start_time_seconds_bucket{le="0.5",' + labels + "}"] == 1
    assert seen['tidegate_start_time_seconds_bucket{le="1",' + labels + "}"] == 1
    assert seen['tidegate_start_time_seconds_bucket{le="+Inf",' + labels + "}"] == 3
    assert seen["tidegate_start_time_seconds_sum{" + labels + "}"] == 7.25
    assert seen['tidegate_replica_crashes_total{pool="p"}'] == 2
    assert seen['tidegate_max_replicas{pool="p"}'] == 5
    external = samples(replace(pool, tier=None, tiers=()))
    assert 'tidegate_max_replicas{pool="p"}' not in external
    shared.close()


def test_what_engines_say_is_on_the_page_and_what_they_do_not_say_is_not() -> None:
    replicas = tuple(
        ReplicaReport(id=name, pool="p", state=ReplicaState.READY, since_s=0.0)
        for name in ("p-1", "p-2")
    )
    pool = PoolReport(
        name="p", desired=2, override=None, ready=2, starting=0, unhealthy=0, draining=0,
        sleeping=0, wake_eta_s=None, last_decision=None, replicas=replicas,
    )  # fmt: skip
    load = EngineLoad(running_requests=3, waiting_requests=0, generation_tokens=7.0)
    seen = EngineObservation(observed_at_s=90.0, load=load, prefix_cache_hit_fraction=0.25)
    shared = Shared.create(workers=1, max_replicas=4, max_pools=1)
    report = FleetReport(at_s=92.5, pools=(pool,), decisions={}, errors={})
    text = render(
        shared=shared, pools={}, report=report, version="1", traffic={}, replicas={}, workers=(),
        engines={"p-1": seen, "gone-1": seen},
    ).decode()  # fmt: skip
    shared.close()
    lines = {line for line in text.splitlines() if line.startswith("tidegate_engine_")}
    labels = '{pool="p",replica="p-1"}'
    assert lines == {
        f"tidegate_engine_running_requests{labels} 3.0",
        f"tidegate_engine_waiting_requests{labels} 0.0",
        f"tidegate_engine_generation_tokens_total{labels} 7.0",
        f"tidegate_engine_prefix_cache_hit_fraction{labels} 0.25",
        f"tidegate_engine_metrics_age_seconds{labels} 2.5",
    }


def test_processes_are_measured_and_a_worker_that_is_down_is_not() -> None:
    shared = Shared.create(workers=2, max_replicas=4, max_pools=1)
    workers = [
        {"index": 0, "pid": os.getpid(), "restarts": 2},
        {"index": 1, "pid": None, "restarts": 9},
    ]
    text = render(
        shared=shared, pools={}, report=None, version="1", traffic={}, replicas={}, workers=workers
    ).decode()
    shared.close()
    assert 'tidegate_worker_restarts_total{worker="0"} 2.0' in text
    assert 'tidegate_worker_restarts_total{worker="1"} 9.0' in text
    assert 'tidegate_worker_resident_memory_bytes{worker="0"}' in text
    assert 'tidegate_worker_resident_memory_bytes{worker="1"}' not in text
    own = next(line for line in text.splitlines() if line.startswith("process_resident_memory"))
    assert float(own.split()[1]) > 1_000_000
    assert "tidegate_tls_certificate" not in text  # no TLS here


class CountingShared(Shared):
    rows_read = 0

    def pool_rows(self, worker: int, pool_slot: int) -> tuple[Any, Any]:
        self.rows_read += 1
        return super().pool_rows(worker, pool_slot)


def test_a_pools_counters_are_read_together() -> None:
    """And not one by one: there are hundreds, of each worker, for each of a thousand pools."""
    made = Shared.create(workers=2, max_replicas=4, max_pools=1)
    shared = CountingShared(made.fd, workers=2, max_replicas=4, max_pools=1)
    render(
        shared=shared,
        pools={"p": 0},
        report=None,
        version="1",
        traffic={},
        replicas={},
        workers=(),
    )
    shared.close()
    assert shared.rows_read < 20


class Disk:
    """Answers with a new number each time, unless it is broken or hangs."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.looks = 0
        self.error: Exception | None = None
        self.gate = threading.Event()
        self.gate.set()

    def usage(self) -> int:
        self.looks += 1
        self.gate.wait(60.0)
        if self.error is not None:
            raise self.error
        return self.looks

    def poller(self, **options: float) -> UsagePoller:
        return UsagePoller(self.usage, clock=lambda: self.now_s, **options)


def test_a_figure_is_kept_for_a_while() -> None:
    async def story() -> None:
        disk = Disk()
        poller = disk.poller()
        assert await asyncio.gather(*(poller.get() for _ in range(5))) == [1] * 5
        disk.now_s = FRESH_S - 0.1
        assert await poller.get() == 1
        disk.now_s = FRESH_S
        assert await poller.get() == 2
        assert disk.looks == 2

    asyncio.run(story())


def test_an_error_is_counted_and_what_was_known_is_told_until_it_is_stale() -> None:
    async def story() -> None:
        disk = Disk()
        poller = disk.poller()
        assert await poller.get() == 1
        disk.error = OSError(5, "Input/output error")
        disk.now_s = FRESH_S
        assert await poller.get() == 1
        assert poller.failures == 1
        disk.now_s = STALE_S
        assert await poller.get() is None
        assert poller.failures == 2
        disk.error = None
        assert await poller.get() == 4

    asyncio.run(story())


def test_a_disk_that_hangs_takes_one_thread_and_no_page() -> None:
    async def story() -> None:
        disk = Disk()
        disk.gate.clear()
        poller = disk.poller(wait_s=0.05)
        for _ in range(10):
            assert await poller.get() is None
        assert disk.looks == 1
        assert await asyncio.to_thread(lambda: 7) == 7  # the loop's own threads are free
        assert poller.failures == 0
        disk.gate.set()
        while (seen := await poller.get()) is None:
            pass
        assert seen == 1

    asyncio.run(story())


def test_a_page_without_a_figure_is_a_page() -> None:
    page = render_cache(None, 3).decode()
    assert "tidegate_cache_look_failures_total 3.0" in page
    assert "tidegate_cache_bytes" not in page


@pytest.mark.parametrize(
    ("reason", "recommended", "shown"),
    [(ScaleReason.STEADY, None, "1.0"), (ScaleReason.ADVISE, 3, "3.0"),
     (ScaleReason.OBSERVE, 3, None)],
)  # fmt: skip
def test_what_is_only_observed_is_no_recommendation(
    reason: ScaleReason, recommended: int | None, shown: str | None
) -> None:
    decision = Decision(
        pool="p", at_s=0.0, desired=1, supply=1, reason=reason, detail="", recommended=recommended
    )
    pool = PoolReport(
        name="p", desired=1, override=None, ready=1, starting=0, unhealthy=0, draining=0,
        sleeping=0, wake_eta_s=None, last_decision=decision, replicas=(), tier=Tier.RUNNING,
    )  # fmt: skip
    shared = Shared.create(workers=1, max_replicas=4, max_pools=1)
    report = FleetReport(at_s=0.0, pools=(pool,), decisions={}, errors={})
    text = render(
        shared=shared, pools={}, report=report, version="1", traffic={}, replicas={}, workers=()
    ).decode()
    shared.close()
    assert 'tidegate_desired_replicas{pool="p"} 1.0' in text
    found = re.findall(r'^tidegate_recommended_replicas{pool="p"} (.*)$', text, re.MULTILINE)
    assert found == ([] if shown is None else [shown])


def test_what_came_of_forecasts_is_counted_by_pool() -> None:
    tallies = {"chat": ForecastTally(scored=9, covered=8, loss=2.5, last_value_loss=4.0)}
    page = render_forecasts(tallies).decode()
    for line in (
        'tidegate_forecasts_scored_total{pool="chat"} 9.0',
        'tidegate_forecasts_covered_total{pool="chat"} 8.0',
        'tidegate_forecast_loss_tokens_per_second_total{pool="chat"} 2.5',
        'tidegate_last_value_loss_tokens_per_second_total{pool="chat"} 4.0',
    ):
        assert line in page
    assert render_forecasts({}) == b""
