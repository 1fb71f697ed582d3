"""Scaling policies on real traces: violations, cost, goodput per replica-hour, by cold start.

Every policy plays every trace at every cold start (``autoscaler.replay``), on a pool of about a
dozen replicas, after a week of history where the trace has one. Several parts of a long trace may
be scored (``windows``).
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoscaler.replay import run, traces
from autoscaler.replay.policies import registry
from autoscaler.replay.supply import Starts
from autoscaler.replay.traces import RequestTrace, Trace, TraceError
from bench.trace_report import find
from forecaster.types import DAY_S

QUICK = ("nasa", "m_large", "twitter_volume_goog")
TEN_MINUTES = 10
WEAK, STRONG = 0.1, 0.64
"""Seasonal strengths: noise has next to none; 0.64 is where Hyndman's ``nsdiffs`` takes a season
as given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is measured. ``policies`` empty: all."""

    data: Path
    cold_starts_s: tuple[float, ...] = (10.0, 60.0, 300.0)
    policies: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    days: float = 2.0
    windows: int = 1
    replicas: float = 12.0
    jobs: int = 2
    quick: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One trace, one part of it, one cold start; all policies."""

    path: Path
    window: int
    cold_start_s: float
    options: Options


# ── Traces ───────────────────────────────────────────────────────────────────────────────────────


def load(path: Path) -> Trace:
    """A trace as rates: requests are counted by the second."""
    found = traces.read(path)
    return found.binned() if isinstance(found, RequestTrace) else found


def window_of(trace: Trace, window: int, options: Options) -> tuple[Trace, int]:
    """The part of a trace that a window needs (a week of history and the scored days), evenly over
    it, and how many windows it has: one, where it is not longer than that."""
    needs_s = (run.HISTORY_DAYS + options.days) * DAY_S
    if trace.seconds < needs_s + DAY_S:
        return trace, 1
    spare_s = trace.seconds - needs_s
    begin_s = spare_s * (window + 0.5) / options.windows // trace.step_s * trace.step_s
    return trace.part(begin_s, begin_s + needs_s), options.windows


def seasonal_strength(trace: Trace) -> float | None:
    """How daily a trace is: 1 - var(remainder) / var(seasonal + remainder) of ten-minute means
    without their daily trend (Wang, Smith and Hyndman 2006), where the season is the mean day and
    the remainder's variance allows for the days it is made of. ``None`` under two days."""
    values = trace.history().values
    steps = DAY_S // 60 // TEN_MINUTES
    means = values[: len(values) // TEN_MINUTES * TEN_MINUTES].reshape(-1, TEN_MINUTES).mean(axis=1)
    days = len(means) // steps
    if days < 2:
        return None
    means = means[-days * steps :]
    kernel = np.ones(steps) / steps
    inner = np.convolve(means, kernel, mode="valid")
    trend = np.interp(np.arange(len(means)), np.arange(len(inner)) + steps // 2, inner)
    table = (means - trend).reshape(days, steps)
    remainder = (table - table.mean(axis=0)).var() * days / (days - 1)
    whole = table.var()
    return float(max(0.0, 1.0 - remainder / whole)) if whole > 0.0 else 0.0


def season_class(strength: float | None) -> str:
    """The three classes that AHPA's paper reports apart."""
    if strength is None or strength < WEAK:
        return "no"
    return "strong" if strength >= STRONG else "weak"


# ── Playing ──────────────────────────────────────────────────────────────────────────────────────


def play(job: Job) -> dict[str, Any] | None:
    """The scores of all policies; ``None`` where the trace has not so many windows."""
    options = job.options
    whole = load(job.path)
    trace, windows = window_of(whole, job.window, options)
    if job.window >= windows:
        return None
    pool = run.ReplayedPool(engine=run.engine_for(trace), starts=Starts.flat(job.cold_start_s))
    part = run.scale_to(run.cut(trace, days=options.days), pool, options.replicas)
    pool = run.bounded(part, pool, None)
    facts = run.facts_of(part, pool)
    names = options.policies or (*registry.POLICIES, registry.ORACLE)
    scores = {}
    for name in names:
        if trace.counted and name in registry.TOKENS_ONLY:
            continue
        began_s = time.process_time()
        if name == registry.ORACLE:
            score = run.find_oracle(part, pool)
        else:
            policy = registry.build(name, facts)
            score = run.replay(part.played, policy, pool, run_in_s=part.run_in_s)
        scores[name] = {
            "violated_fraction": score.violated_fraction,
            "violated_s": score.violated_s,
            "replica_hours": score.replica_hours,
            "goodput_per_replica_hour": score.goodput_per_replica_hour,
            "wait_p99_s": score.wait_s["p99"],
            "started": score.started,
            "cpu_s": round(time.process_time() - began_s, 2),
        }
    strength = seasonal_strength(trace)
    return {
        "trace": job.path.stem,
        "window": job.window,
        "cold_start_s": job.cold_start_s,
        "days": (part.played.seconds - part.run_in_s) / DAY_S,
        "history_days": 0.0 if part.history is None else part.history.seconds / DAY_S,
        "seasonal_strength": strength,
        "class": season_class(strength),
        "counted": trace.counted,
        "scores": scores,
    }


def attempt(job: Job) -> tuple[Job, dict[str, Any] | None, str]:
    """The same with its job, and what is wrong with its trace."""
    try:
        return job, play(job), ""
    except TraceError as error:
        return job, None, f": {error}; left out"


def run_all(options: Options) -> list[dict[str, Any]]:
    """All jobs, over ``jobs`` processes; a line on standard error for each that is done."""
    paths = find(options.data, options.only or (QUICK if options.quick else ()))
    if not paths:
        raise RuntimeError(f"no traces in {options.data}")
    cold_starts_s = (60.0,) if options.quick else options.cold_starts_s
    jobs = [
        Job(path=path, window=window, cold_start_s=cold_start_s, options=options)
        for path in paths
        for window in range(options.windows)
        for cold_start_s in cold_starts_s
    ]
    rows = []
    began_s = time.monotonic()
    # A pool ends its processes when it is left, however that comes about.
    with multiprocessing.Pool(options.jobs) as processes:
        for count, (job, row, problem) in enumerate(processes.imap_unordered(attempt, jobs), 1):
            if row is not None:
                rows.append(row)
            print(
                f"{count}/{len(jobs)} {job.path.stem} at {job.cold_start_s:g} s "
                f"({time.monotonic() - began_s:.0f} s){problem}",
                file=sys.stderr,
                flush=True,
            )
    return sorted(rows, key=lambda row: (row["trace"], row["window"], row["cold_start_s"]))


def as_plain(options: Options) -> dict[str, Any]:
    """The options for the record."""
    plain = dataclasses.asdict(options)
    plain["data"] = options.data.name
    return plain


# ── What the rows say ────────────────────────────────────────────────────────────────────────────


def ratios(
    rows: Sequence[dict[str, Any]], subject: str, other: str
) -> Iterator[tuple[dict[str, Any], float]]:
    """Goodput per replica-hour of one policy over another's, for each row that has both."""
    for row in rows:
        scores = row["scores"]
        if subject in scores and other in scores:
            theirs = scores[other]["goodput_per_replica_hour"]
            ours = scores[subject]["goodput_per_replica_hour"]
            yield row, ours / theirs if theirs > 0.0 else math.inf


def geometric_mean(values: Sequence[float]) -> float:
    """Of ratios; NaN of none."""
    known = [value for value in values if 0.0 < value < math.inf]
    return math.exp(sum(map(math.log, known)) / len(known)) if known else math.nan
