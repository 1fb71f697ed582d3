"""A trace replayed through a policy."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from autoscaler.replay.engine import COUNTED, ReplicaModel, Slo
from autoscaler.replay.fleet import FluidPool
from autoscaler.replay.policies.bounds import Oracle, needed_replicas
from autoscaler.replay.policies.facts import PoolFacts
from autoscaler.replay.score import Minutes, Score
from autoscaler.replay.supply import Starts
from autoscaler.replay.traces import Spread, Trace
from autoscaler.replay.types import ForecastingPolicy, ScalingPolicy

DAY_S = 86_400
HISTORY_DAYS = 7.0
ORACLE_MARGINS = (1.0, 1.02, 1.05, 1.1, 1.2, 1.4)
TYPICAL_LOAD = 0.7
RUN_IN_S = 900
"""Simulated before what is scored, so that no policy is judged by how it begins. Longer than the
longest delay of a peer (Ray Serve: 600 s)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayedPool:
    """What a trace is replayed on. Every policy is given the same."""

    engine: ReplicaModel
    slo: Slo = field(default_factory=Slo)
    starts: Starts
    min_replicas: int = 1
    max_replicas: int = 1_000
    price_per_hour: float = 1.0

    def capacity_tokens_per_s(self, trace: Trace) -> float:
        """What one replica sustains within the SLO of this trace's mean request."""
        return self.engine.capacity_tokens_per_s(*trace.means, self.slo)


def engine_for(trace: Trace, engine: ReplicaModel | None = None) -> ReplicaModel:
    """The given engine, or the default for this trace: a trace without tokens has its own."""
    return COUNTED if trace.counted else (engine or ReplicaModel())


def at_capacity(trace: Trace, tokens_per_s: float) -> tuple[Trace, ReplicaModel]:
    """The trace and a replica that serves so many of its tokens per second, prompt and output
    alike: what can be said where nothing but a capacity is known."""
    whole = replace(
        trace,
        prompt_tokens=trace.prompt_tokens + trace.output_tokens,
        output_tokens=np.zeros_like(trace.output_tokens),
    )
    return whole, replace(COUNTED, prefill_tokens_per_s=tokens_per_s, chunk_tokens=tokens_per_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A trace cut in two: what a policy may know before, and what it is scored on.

    ``history`` ends where ``played`` begins; the first ``run_in_s`` of ``played`` are not scored.
    """

    history: Trace | None
    played: Trace
    run_in_s: int


def cut(trace: Trace, *, history_days: float = HISTORY_DAYS, days: float | None = None) -> Cut:
    """Keep up to ``history_days`` before the scored part, which is ``days`` long, or the rest (a
    day at least). Of a trace that is shorter than two of these the first half is history.
    """
    total_s = float(trace.seconds)
    scored_s = DAY_S if days is None else days * DAY_S
    history_s = min(history_days * DAY_S, max(total_s - scored_s, total_s / 2))
    history_s = history_s // trace.step_s * trace.step_s
    end_s = total_s if days is None else min(total_s, history_s + scored_s)
    run_in_s = min(RUN_IN_S, history_s) // trace.step_s * trace.step_s
    before_s = history_s - run_in_s
    return Cut(
        history=trace.part(0.0, before_s) if before_s > 0 else None,
        played=trace.part(before_s, end_s),
        run_in_s=round(run_in_s),
    )


def scale_to(part: Cut, pool: ReplayedPool, replicas: float) -> Cut:
    """With as many requests as make it a pool of about ``replicas``: so many are loaded to 0.7 of
    what the SLO allows, in the mean of the scored part."""
    scored = part.played.part(part.run_in_s, part.played.seconds)
    factor = replicas * TYPICAL_LOAD * pool.capacity_tokens_per_s(scored) / scored.tokens_per_s
    return Cut(
        history=None if part.history is None else part.history.scaled(factor),
        played=part.played.scaled(factor),
        run_in_s=part.run_in_s,
    )


def bounded(part: Cut, pool: ReplayedPool, max_replicas: int | None) -> ReplayedPool:
    """The pool with this bound, or one that leaves a quarter over the busiest minute, and four
    times the mean: more than is needed, and not so many that a policy could run away."""
    if max_replicas is None:
        capacity = pool.capacity_tokens_per_s(part.played)
        busy = part.played.history().values / capacity
        max_replicas = math.ceil(max(4 * float(busy.mean()) / TYPICAL_LOAD, 1.25 * busy.max()))
    return replace(pool, max_replicas=max(max_replicas, pool.min_replicas, 1))


def facts_of(part: Cut, pool: ReplayedPool) -> PoolFacts:
    """What every policy is told of this pool before it is played."""
    prompt, output = part.played.means
    return PoolFacts(
        capacity_tokens_per_s=pool.engine.capacity_tokens_per_s(prompt, output, pool.slo),
        concurrency=pool.engine.in_flight(prompt, output, pool.slo),
        target_concurrency=pool.engine.in_flight(prompt, output, pool.slo, TYPICAL_LOAD),
        cold_start_s=pool.starts.cold_start_s,
        prompt_tokens=prompt,
        output_tokens=output,
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
        history=None if part.history is None else part.history.history(),
        engine=pool.engine,
        slo=pool.slo,
    )


def find_oracle(
    part: Cut,
    pool: ReplayedPool,
    *,
    spread: Spread = Spread.EVEN,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Score:
    """The score of the clairvoyant policy for this trace: with the least margin over the work that
    comes with which no request is late, or as few as may be (one may be too long for any)."""
    trace = part.played
    rate, prompts, outputs = trace.per_second(spread, seed)
    best: Score | None = None
    for margin in ORACLE_MARGINS:
        needed = needed_replicas(rate, prompts, outputs, pool.engine, pool.slo, margin)
        bounded = np.clip(needed, pool.min_replicas, pool.max_replicas)
        oracle = Oracle(bounded, pool.starts.cold_start_s, start_s=trace.start_s or 0.0)
        score = replay(
            trace,
            oracle,
            pool,
            run_in_s=part.run_in_s,
            spread=spread,
            seed=seed,
            progress=progress,
        )
        if best is None or score.violations < best.violations * (1.0 - 1e-9):
            best = score
        if best.violations <= 1e-9 * best.requests:
            break
    assert best is not None
    return best


def replay(
    trace: Trace,
    policy: ScalingPolicy,
    pool: ReplayedPool,
    *,
    run_in_s: int = 0,
    ready: int | None = None,
    spread: Spread = Spread.EVEN,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> Score:
    """Play ``trace`` on ``pool`` with ``policy``, and score all but the first ``run_in_s``.

    It begins with ``ready`` replicas, or those that the first minute asks for at a load of 0.7. A
    policy is stepped every ``interval_s``, and each second while requests wait for a pool that has
    no replica: what holds requests at zero wakes the autoscaler in every product. ``progress`` is
    told the part that is done.
    """
    rate, prompts, outputs = (values.tolist() for values in trace.per_second(spread, seed))
    seconds = len(rate)
    first = trace.part(0.0, max(trace.step_s, 60.0))
    capacity = pool.capacity_tokens_per_s(trace)
    asked = first.tokens_per_s / capacity / TYPICAL_LOAD
    if ready is None:
        ready = min(pool.max_replicas, max(pool.min_replicas, round(asked + 0.5)))
    fleet = FluidPool(
        pool.engine, pool.slo, pool.starts, ready=ready, seconds=seconds, scored_from=run_in_s
    )
    supply = fleet.supply
    start_s = trace.start_s or 0.0
    least, most = pool.min_replicas, pool.max_replicas
    interval_s, next_s = policy.interval_s, 0.0
    minutes = Minutes()
    minute = Minute(fleet)
    paid_s = held_s = 0.0
    started = cancelled = 0
    for second in range(seconds):
        if second == run_in_s:
            paid_s, held_s = supply.replica_s, supply.holding_s
            started, cancelled = supply.started, supply.cancelled
            minute = Minute(fleet)
        if second >= next_s or (fleet.queued_requests and not supply.ready + supply.starting):
            desired = policy.step(start_s + second, fleet.observe())
            fleet.scale(least if desired < least else most if desired > most else desired)
            if second >= next_s:
                next_s += interval_s * max(1.0, (second - next_s) // interval_s + 1.0)
        fleet.advance(rate[second], prompts[second], outputs[second])
        if second >= run_in_s:
            minute.add(fleet)
            if (second + 1 - run_in_s) % 60 == 0:
                minute.close(fleet, minutes)
                if isinstance(policy, ForecastingPolicy):
                    middle, upper = policy.band() or (math.nan, math.nan)
                    minutes.expected.append(middle / capacity)
                    minutes.provisioned.append(upper / capacity)
                minute = Minute(fleet)
                if progress is not None and (second + 1) % 3600 < 60:
                    progress((second + 1) / seconds)
    before = fleet.violations
    fleet.close()
    if minutes.violations:
        minutes.violations[-1] += fleet.violations - before
    replica_hours = (supply.replica_s - paid_s) / 3600
    return Score(
        policy=policy.name,
        trace=trace.name,
        requests=fleet.scored_requests,
        violations=fleet.violations,
        seconds=seconds - run_in_s,
        violated_s=sum(fleet.violated),
        replica_hours=replica_hours,
        cost=(replica_hours + (supply.holding_s - held_s) / 3600) * pool.price_per_hour,
        wait_s={
            "p50": fleet.waits.quantile(0.5),
            "p90": fleet.waits.quantile(0.9),
            "p99": fleet.waits.quantile(0.99),
            "max": fleet.longest_wait_s,
        },
        started=supply.started - started,
        cancelled=supply.cancelled - cancelled,
        minutes=minutes,
    )


class Minute:
    """The sums of one minute of a replay."""

    __slots__ = (
        "arrivals", "draining", "queued", "ready", "starting", "violations", "work_s",
    )  # fmt: skip

    def __init__(self, fleet: FluidPool) -> None:
        self.arrivals = fleet.arrivals_total
        self.work_s = fleet.work_arrived_s
        self.violations = fleet.violations
        self.ready = self.starting = self.draining = 0
        self.queued = 0.0

    def add(self, fleet: FluidPool) -> None:
        """A second has passed."""
        supply = fleet.supply
        self.ready += supply.ready
        self.starting += supply.starting
        self.draining += supply.draining
        if fleet.queued_requests > self.queued:
            self.queued = fleet.queued_requests

    def close(self, fleet: FluidPool, minutes: Minutes) -> None:
        """The minute is over."""
        minutes.demand.append((fleet.work_arrived_s - self.work_s) / 60)
        minutes.requests.append(fleet.arrivals_total - self.arrivals)
        minutes.violations.append(fleet.violations - self.violations)
        minutes.ready.append(self.ready / 60)
        minutes.starting.append(self.starting / 60)
        minutes.draining.append(self.draining / 60)
        minutes.queued.append(self.queued)
