"""What one tick of the control loop costs, by pools and replicas, and one forecast.

The control side as `tidegate up` has it: counters in shared memory, what engines said, series,
forecasts, decisions, tiers, devices and states; the clock is a counter, replicas are a backend's
that answers at once, and their health checks wait for ever. Every pool has ten ready replicas and
traffic of its own, a learned capacity and a trusted outlook of as much as they carry; half of them
may go to zero. In one of ten traffic changes from minute to minute. A tick is the CPU time from its
first look at the counters to its end. Beside ticks go what threads write to the history, and what
became of calls; the first publication of all replicas comes before the first tick. Reading engines'
metrics and making forecasts are not in it: the first has a limit per second of its own, the second
a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx

from autoscaler.backends.base import AdoptedReplica, Probe, ReplicaSpec
from autoscaler.control.decision_log import DecisionLog
from autoscaler.control.forecast_worker import ForecastResult
from autoscaler.control.forecasts import Forecasts
from autoscaler.control.loop import ControlLoop
from autoscaler.policy.outlook import LEVELS
from autoscaler.policy.packing import Device
from autoscaler.settings import AutoscalerSettings, PoolSettings
from autoscaler.signals.history import HistoryStore, HistoryWriter
from autoscaler.signals.recorder import Recorder
from autoscaler.tiers.preparer import NodePreparer
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import EngineObservation, Observation, Outlook
from gateway.compose.fleet import FleetBook
from gateway.compose.process import settle
from gateway.datapath import metrics
from gateway.datapath.shared import Shared
from loaders.engines.base import EngineLoad
from loaders.engines.client import EngineClient
from modelcache.types import Tier
from router.types import Pool

POOLS = (100, 300, 1_000)
REPLICAS_EACH = 10
BAR_S = 1.0
"""Most CPU seconds of a tick of the most pools."""
BAR_GROWTH = 1.3
"""Most that a pool's share of a tick may be with the most pools, over that with the fewest."""
FORECAST_BAR_S = 0.3
WARM_TICKS = 75
"""Windows are full, and a minute has ended."""
TICKS = 60
WORKERS = 2
LEAD_S = 90.0
TOKENS = 1_000


class _Backend:
    """Replicas that were there before, and are well."""

    owns_replicas = True

    def __init__(self, each: int) -> None:
        self._each = each

    def devices(self) -> Sequence[Device]:
        return ()

    def set_pools(self, pools: Sequence[PoolSettings]) -> None:
        return None

    async def measure_memory(self, replica_id: str) -> int | None:
        return None

    async def start(self, spec: ReplicaSpec) -> None:
        return None

    async def probe(self, replica_id: str) -> Probe:
        return _probe(replica_id)

    async def stop(self, replica_id: str, *, grace_s: float) -> None:
        return None

    async def adopt(self, wanted: Sequence[ReplicaSpec]) -> list[AdoptedReplica]:
        names = [(spec, f"{spec.id}-{number}") for spec in wanted for number in range(self._each)]
        return [
            AdoptedReplica(spec=replace(spec, id=name), probe=_probe(name)) for spec, name in names
        ]

    async def close(self, *, keep: bool = False) -> None:
        return None


def _probe(replica_id: str) -> Probe:
    return Probe(alive=True, ready=True, url=f"http://127.0.0.1:1/{replica_id}", pid=1)


class _Fleet:
    """A control loop with so many pools, on a clock of its own."""

    def __init__(self, pools: int, each: int, place: Path) -> None:
        self._now_s = 1_000_000.0
        self._settings = AutoscalerSettings()
        self._shared = Shared.create(
            workers=WORKERS, max_replicas=2 * pools * each, max_pools=pools + 16
        )
        self._book = FleetBook(self._shared, self.clock)
        self._writer = HistoryWriter(
            HistoryStore(place / "history.sqlite", max_age_s=1e7, max_bytes=1 << 30), self.clock
        )
        self._recorder = Recorder(
            read=self._book.totals, writer=self._writer, clock=self.clock, wall_s=self.clock
        )
        self.forecasts = Forecasts(history_least_s=0.0, clock=self.clock, wall_s=self.clock)
        self._decision_log = DecisionLog(
            writer=self._writer, tally=self.forecasts.tally, wall_s=self.clock
        )
        self._engines: Mapping[str, EngineObservation] = {}
        self._each = each
        self._begun_s = 0.0
        self.samples_s: list[float] = []
        self.publish_s = math.nan
        """CPU seconds of the first publication."""
        self.work_s = 0.0
        """Those that the bench has taken to count as workers do."""
        self.warm_cpu_s = self.all_cpu_s = 0.0
        """Those of the process before the ticks that count, and in them."""
        made = [
            PoolSettings.model_validate(
                {
                    "name": f"org/model-{number}",
                    "engine": "vllm",
                    "model": f"/models/{number}",
                    "max_replicas": each,
                    "min_replicas": each * (number % 2),
                }
            )
            for number in range(pools)
        ]
        wakes = WakeTimes(samples=8)
        for pool in made:
            for tier in (Tier.ON_DISK, Tier.PAGED):
                wakes.add(f"{pool.engine}:{pool.model}", tier, LEAD_S)
        self.loop = ControlLoop(
            pools=made,
            settings=self._settings,
            backends={"process": _Backend(each)},
            digests={pool.name: "same" for pool in made},
            observe=self._observe,
            record=self._record,
            note=self._decision_log.add,
            outlook=self.forecasts.outlook,
            recent=self._recorder.recent,
            publish=self._publish,
            preparer=NodePreparer(
                cache=None,  # type: ignore[arg-type]  # models are directories: it is not asked
                prewarm=_no_prewarm,
                prewarm_behind=_no_prewarm,
            ),
            wake_times=wakes,
            engine_client=EngineClient(
                timeout_s=1.0, transport=httpx.MockTransport(lambda _: httpx.Response(404))
            ),
            clock=self.clock,
            wall_s=self.clock,
            sleep=self._sleep,
        )
        self.pools = [pool.name for pool in made]

    def clock(self) -> float:
        """Seconds; a tick is one."""
        return self._now_s

    async def _sleep(self, seconds: float) -> None:
        """The loop's own pauses end at once, and move the clock; all others never do."""
        tick_s = self._settings.tick_s
        if seconds >= tick_s:
            await asyncio.Event().wait()
        if seconds < tick_s / 2 and self._begun_s:
            self.samples_s.append(time.thread_time() - self._begun_s)
        await asyncio.sleep(0)
        self._now_s += seconds

    def _observe(self) -> Observation:
        begun_s = time.thread_time()
        self._work()
        self._begun_s = time.thread_time()
        self.work_s += self._begun_s - begun_s
        return replace(self._book.observe(), engines=dict(self._engines))

    def _record(self, observation: Observation) -> None:
        self._recorder.observe(observation)
        self.forecasts.observe(observation)

    def _publish(self, pools: Sequence[Pool]) -> None:
        begun_s = time.thread_time()
        self._book.publish(pools)
        if math.isnan(self.publish_s):
            self.publish_s = time.thread_time() - begun_s
            settle()
        load = EngineLoad(running_requests=4, waiting_requests=0, kv_cache_tokens=100_000)
        self._engines = {
            one.id: EngineObservation(observed_at_s=self._now_s, load=load)
            for pool in pools
            for one in pool.replicas
        }

    def _work(self) -> None:
        """What the workers count in a second."""
        minute = int(self._now_s // 60)
        for number, slot in enumerate(self._book.pool_slots().values()):
            requests = 1 + (minute % 3 if number % 10 == 0 else 1)
            for worker in range(WORKERS):
                row, sums = self._shared.pool_rows(worker, slot)
                row[metrics.INFLIGHT_REQUESTS] = 2 * requests
                row[metrics.INFLIGHT_TOKENS] = 2 * requests * TOKENS
                row[metrics.ARRIVALS] += requests
                row[metrics.OK] += requests
                row[metrics.ARRIVED_PROMPT_TOKENS] += requests * TOKENS
                row[metrics.PROMPT_TOKENS] += requests * TOKENS
                row[metrics.OUTPUT_TOKENS] += requests * TOKENS // 4
                for histogram in (metrics.TTFT + 1, metrics.E2E, metrics.ITL):
                    buckets = metrics.POOL_HISTOGRAMS[histogram].bounds
                    row[_bucket(histogram, len(buckets) // 2)] += requests
                    sums[histogram] += requests * buckets[len(buckets) // 2]

    def foretell(self) -> None:
        """A forecast of each pool, as the process beside makes them."""
        for name in self.pools:
            rate = 1e5 * TOKENS
            outlook = Outlook(
                made_at_s=self._now_s,
                model="automatic",
                lead_s=LEAD_S,
                levels=LEVELS,
                tokens_per_s=tuple(rate * (1.0 + level) for level in LEVELS),
            )
            self.forecasts.take(name, ForecastResult(pool=name, found=outlook))

    async def run(self) -> None:
        """Tick until there are enough samples."""
        ticking = asyncio.ensure_future(self.loop.run())
        try:
            while len(self.samples_s) < WARM_TICKS + TICKS:
                if len(self.samples_s) % 60 == 59:
                    self.foretell()
                if len(self.samples_s) == WARM_TICKS and not self.warm_cpu_s:
                    self.warm_cpu_s, self.work_s = time.process_time(), 0.0
                done, _ = await asyncio.wait({ticking}, timeout=0)
                if done:
                    ticking.result()
            self.all_cpu_s = time.process_time() - self.warm_cpu_s
        finally:
            ticking.cancel()
            await asyncio.wait({ticking})
            self._recorder.close()
            self._shared.close()


def _no_prewarm(*_: object) -> int:
    raise AssertionError("nothing is read ahead")


def _bucket(histogram: int, place: int) -> int:
    from gateway.datapath.shared import buckets_of

    start: int = buckets_of(histogram).start
    return start + place


def measure(pools: int, each: int) -> dict[str, Any]:
    """Ticks with so many pools of so many replicas each."""
    with tempfile.TemporaryDirectory() as folder:
        fleet = _Fleet(pools, each, Path(folder))
        asyncio.run(fleet.run())
    samples_s = fleet.samples_s[WARM_TICKS:]
    report = fleet.loop.status()
    decided = [one.last_decision for one in report.pools if one.last_decision is not None]
    return {
        "pools": pools,
        "replicas": sum(one.ready for one in report.pools),
        "with_forecast": sum(one.forecast is not None for one in decided),
        "errors": sum(report.errors.values()),
        "last_error": report.last_error,
        "median_s": statistics.median(samples_s),
        "most_s": max(samples_s),
        "first_s": fleet.samples_s[0],
        "publish_s": fleet.publish_s,
        "beside_s": (fleet.all_cpu_s - fleet.work_s - sum(samples_s)) / len(samples_s),
        "pool_us": statistics.median(samples_s) / pools * 1e6,
    }


def measure_forecasts(series: int = 12) -> dict[str, Any]:
    """What is learned of a week of minutes and a forecast by it, and a forecast alone."""
    import numpy as np

    from forecaster.models.automatic import Automatic
    from forecaster.types import History

    rng = np.random.default_rng(1)
    refits_s: list[float] = []
    forecasts_s: list[float] = []
    for number in range(series):
        minutes = np.arange(8 * 1_440)
        tide = 1.0 + 0.6 * np.sin(2 * math.pi * minutes / 1_440 + number)
        noise = np.exp(0.2 * rng.standard_normal(len(minutes)))
        bursts = 1.0 + 3.0 * (minutes % (30 + 7 * number) == 0) * (number % 3 == 0)
        values = rng.poisson(30.0 * 10 ** (number % 3) * tide * noise * bursts).astype(float)
        history, steps = History(values=values, start_s=0.0), math.ceil(LEAD_S / 60.0) + 1
        begun_s = time.process_time()
        fit = Automatic().fit(history, steps)
        learned_s = time.process_time()
        fit.parts(history, steps, LEVELS)
        ended_s = time.process_time()
        refits_s.append(ended_s - begun_s)
        forecasts_s.append(ended_s - learned_s)
    return {
        "series": series,
        "refit_median_s": statistics.median(refits_s),
        "refit_most_s": max(refits_s),
        "forecast_median_s": statistics.median(forecasts_s),
    }


def run(counts: Sequence[int], out: Path, command: str, date: str) -> int:
    """Measure, write the report to the folder ``out``, and say whether all bars are met."""
    from bench import machine

    # The fewest before and after the most: what else the machine does changes in these minutes.
    sizes = sorted(set(counts))
    made: dict[str, Any] = {
        "command": command,
        "date": date,
        "machine": machine.describe(),
        "ticks": [measure(count, REPLICAS_EACH) for count in [*sizes, sizes[0]]],
        "forecasts": measure_forecasts(),
    }
    made["verdicts"] = find_verdicts(made)
    text = render(made)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"tick-{date}.md").write_text(text)
    (out / f"tick-{date}.json").write_text(json.dumps(made, indent=1) + "\n")
    print(text)
    return 0 if all(one["passed"] for one in made["verdicts"]) else 1


def find_verdicts(made: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Whether the figures are below their bars, and the runs were what they should be."""
    first, *_, most, last = made["ticks"]
    growth = most["pool_us"] / statistics.mean([first["pool_us"], last["pool_us"]])
    figures = [
        (f"a tick of {most['pools']} pools and {most['replicas']} replicas, s",
         most["median_s"], BAR_S),
        (f"its share of a pool over that with {first['pools']} pools", growth, BAR_GROWTH),
        ("a refit and forecast, s", made["forecasts"]["refit_median_s"], FORECAST_BAR_S),
    ]  # fmt: skip
    found = [
        {"text": text, "value": value, "bar": bar, "passed": value < bar}
        for text, value, bar in figures
    ]
    wrong = [
        row
        for row in made["ticks"]
        if row["errors"]
        or row["with_forecast"] != row["pools"]
        or row["replicas"] != row["pools"] * REPLICAS_EACH
    ]
    found.append(
        {
            "text": "runs with errors, other replicas, or pools that react alone",
            "value": len(wrong),
            "bar": 1,
            "passed": not wrong,
        }
    )
    return found


def render(made: Mapping[str, Any]) -> str:
    """The report."""
    forecasts, where = made["forecasts"], made["machine"]
    lines = [
        f"# One tick of the control loop, {made['date']}",
        "",
        f"`{made['command']}`, {where['cpu']}, one of {where['cores']} cores. "
        "CPU milliseconds; a tick is once a second.",
        "",
        "| pools | replicas | tick, median | at most | µs a pool | the first | first publication "
        "| beside a tick |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in made["ticks"]:
        figures = [row[f"{name}_s"] * 1e3 for name in ("median", "most")]
        others = [row[f"{name}_s"] * 1e3 for name in ("first", "publish", "beside")]
        lines.append(
            f"| {row['pools']:,} | {row['replicas']:,} | {figures[0]:.0f} | {figures[1]:.0f} "
            f"| {row['pool_us']:.0f} | " + " | ".join(f"{one:.0f}" for one in others) + " |"
        )
    lines += [
        "",
        f"A refit and forecast of a week of minutes, in a process of its own: "
        f"{forecasts['refit_median_s'] * 1e3:.0f} ms median, {forecasts['refit_most_s'] * 1e3:.0f} "
        f"at most, of {forecasts['series']} series; a forecast without a refit "
        f"{forecasts['forecast_median_s'] * 1e3:.0f} ms.",
        "",
    ]
    lines += [
        f"- {one['text']}: {one['value']:.3g}, bar < {one['bar']:g}: "
        + ("met" if one["passed"] else "**missed**")
        for one in made["verdicts"]
    ]
    return "\n".join(lines) + "\n"
