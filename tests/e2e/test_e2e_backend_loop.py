"""The real loop with real processes on real time: from zero to one, through a crash, to the end."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from fake_models import NullPreparer
from process_fixtures import SETTINGS, ask, children_of, is_alive, tiny_backend, tiny_pool

from autoscaler.control.loop import ControlLoop
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import Observation, PoolDemand, PoolReport, ReplicaLoad
from router.types import Pool, Replica, ReplicaState

QUICK = SETTINGS.model_copy(
    update={
        "tick_s": 0.1,
        "health_interval_s": 0.1,
        "start_poll_s": 0.05,
        "backoff_initial_s": 0.1,
        "backoff_max_s": 0.2,
        "idle_to_zero_s": 0.5,
        "drain_settle_s": 0.0,
    }
)


class Gateway:
    """What the loop sees of the data path: no request, unless the test says so."""

    def __init__(self) -> None:
        self.views: tuple[Replica, ...] = ()
        self.held = 0

    def observe(self) -> Observation:
        demand = PoolDemand(
            observed_at_s=time.monotonic(),
            inflight_requests=0,
            inflight_tokens=0,
            queued_requests=self.held,
            queued_tokens=self.held * 10,
            arrivals_total=0,
        )
        idle = ReplicaLoad(inflight_requests=0, inflight_tokens=0)
        return Observation(pools={"tiny": demand}, replicas={v.id: idle for v in self.views})

    def publish(self, pools: tuple[Pool, ...]) -> None:
        self.views = tuple(replica for pool in pools for replica in pool.replicas)

    def ready(self) -> list[Replica]:
        return [view for view in self.views if view.state is ReplicaState.READY]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1_200):
        if condition():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it never came to that")


def test_from_zero_to_one_through_a_crash_to_sleep_to_zero_to_the_end(tmp_path: Path) -> None:
    async def story() -> None:
        gateway, pool = Gateway(), tiny_pool(max_replicas=2)
        before = set(children_of(os.getpid()))  # an earlier test's, if any
        backend = tiny_backend(tmp_path, settings=QUICK)
        loop = ControlLoop(
            pools=[pool],
            settings=QUICK,
            backends={"process": backend},
            observe=gateway.observe,
            publish=gateway.publish,
            digests={"tiny": "as it is"},
            preparer=NullPreparer(),
            wake_times=WakeTimes(samples=8),
        )
        running = asyncio.create_task(loop.run())
        await asyncio.sleep(0.3)
        assert set(children_of(os.getpid())) <= before

        gateway.held = 5
        loop.signal_wake("tiny")
        await until(lambda: len(gateway.ready()) == 1)
        (view,) = gateway.ready()
        assert (view.served_model, view.max_model_len_tokens) == ("tiny", 2048)
        first = ask(f"{view.url}/facts")["pid"]

        os.kill(first, signal.SIGKILL)
        await until(lambda: [v.id for v in gateway.ready()] == ["tiny-2"])
        report = look(loop)
        assert report.error is not None
        assert "was ended by SIGKILL" in report.error
        assert report.wake_eta_s is not None
        second = ask(f"{gateway.ready()[0].url}/facts")["pid"]

        gateway.held = 0
        await loop.sleep("tiny", 1)
        assert ask(f"{gateway.views[0].url}/facts")["asleep"] is True
        gateway.held = 1
        loop.signal_wake("tiny")
        await until(lambda: len(gateway.ready()) == 1)
        facts = ask(f"{gateway.ready()[0].url}/facts")
        assert (facts["asleep"], facts["pid"]) == (False, second)

        gateway.held = 0
        await until(lambda: not gateway.views)
        assert not is_alive(second)
        gateway.held = 1
        loop.signal_wake("tiny")
        await until(lambda: len(gateway.ready()) == 1)
        await loop.close()
        await running
        assert set(children_of(os.getpid())) <= before
        assert list((tmp_path / "replicas").glob("*.json")) == []
        assert gateway.views == ()

    asyncio.run(story())


def test_an_engine_that_cannot_start_is_quoted_in_the_status(tmp_path: Path) -> None:
    async def story() -> None:
        gateway = Gateway()
        before = set(children_of(os.getpid()))
        backend = tiny_backend(tmp_path, settings=QUICK)
        loop = ControlLoop(
            pools=[tiny_pool("--fail", min_replicas=1)],
            settings=QUICK,
            backends={"process": backend},
            observe=gateway.observe,
            publish=gateway.publish,
            digests={"tiny": "as it is"},
            preparer=NullPreparer(),
            wake_times=WakeTimes(samples=8),
        )
        running = asyncio.create_task(loop.run())
        await until(lambda: look(loop).failures >= 3)
        report = look(loop)
        assert report.error is not None
        assert "exited with status 3" in report.error
        assert "the weights are not there" in report.error
        assert len(report.replicas) <= QUICK.failed_kept + 2
        await loop.close()
        await running
        assert set(children_of(os.getpid())) <= before

    asyncio.run(story())


def look(loop: ControlLoop) -> PoolReport:
    return loop.status().pools[0]
