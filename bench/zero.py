"""Scale to zero on a trace of many small models: what each rule for the idle time costs.

Each client of a ``*_clients_minute.parquet`` (columns ``t_s`` and one per client, requests per
minute) is a model with one replica. A second that it is held idle costs 1, a cold start as much as
``break-even`` seconds: the price of the wait over that of a replica-second. Busy minutes cost the
same under every rule and are left out. The gaps are the minutes without requests, as they came: a
rule sees none before it has ended. A model that comes up ahead of a request pays for the seconds of
its load too, and half a wait where the request comes during it.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoscaler.policy.idle_cost import IdlePlan, TierPrice, plan_idle
from autoscaler.signals.gaps import GapRecord
from modelcache.types import Tier

BREAK_EVENS_S = (60.0, 300.0, 900.0, 3_600.0, 14_400.0)
LOAD_S = 30.0
LIMIT = 1.03
"""Most that ours may cost, of the best fixed idle time in hindsight."""
HISTOGRAM_MINUTES = 240
HEAD, TAIL, MARGIN = 0.05, 0.99, 0.1
"""Of "Serverless in the Wild" (Shahrad et al., 2020): percentiles of the idle time, and margins."""
MOST_OUTSIDE = 0.5
LEAST_VARIED = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallModel:
    """One model's gaps, seconds, and when each ended."""

    name: str
    gaps_s: Sequence[float]
    ends_s: Sequence[float]


def read_models(data: Path) -> list[SmallModel]:
    """The models of all traces in a directory."""
    import pyarrow.parquet as parquet

    models = []
    for path in sorted(data.glob("*_clients_minute.parquet")):
        table = parquet.read_table(path).to_pydict()
        starts_s = table.pop("t_s")
        for client, counts in table.items():
            gaps_s, ends_s, last_s = [], [], None
            for start_s, count in zip(starts_s, counts, strict=True):
                if not count:
                    continue
                if last_s is not None and start_s > last_s:
                    gaps_s.append(float(start_s - last_s))
                    ends_s.append(float(start_s))
                last_s = start_s + 60.0
            if gaps_s:
                name = f"{path.name.removesuffix('_clients_minute.parquet')} {client}"
                models.append(SmallModel(name=name, gaps_s=gaps_s, ends_s=ends_s))
    return models


def fixed_price(gaps_s: Sequence[float], idle_s: float, break_even_s: float) -> float:
    """What one fixed idle time costs."""
    return sum(one if one <= idle_s else idle_s + break_even_s for one in gaps_s)


def best_fixed(gaps_s: Sequence[float], break_even_s: float) -> tuple[float, float]:
    """The idle time that would have cost least, and what it would have cost."""
    ordered = sorted(gaps_s)
    best = (0.0, len(ordered) * break_even_s)
    below = 0.0
    for place, gap_s in enumerate(ordered):
        below += gap_s
        price = below + (len(ordered) - place - 1) * (gap_s + break_even_s)
        if price < best[1]:
            best = (gap_s, price)
    return best


def plan_price(plan: IdlePlan, gap_s: float, break_even_s: float) -> float:
    """What one gap costs under a plan of two tiers."""
    price = 0.0
    ends = [one.at_s for one in plan.steps[1:]] + [math.inf]
    for place, (step, end_s) in enumerate(zip(plan.steps, ends, strict=True)):
        over = gap_s <= end_s
        if step.tier is Tier.RUNNING:
            price += min(gap_s, end_s) - step.at_s
            if over:
                loading = place > 0 and gap_s < step.at_s + LOAD_S
                return price + (break_even_s / 2 if loading else 0.0)
        elif over:
            return price + break_even_s
    raise AssertionError("the last step has no end")


def learned_price(model: SmallModel, break_even_s: float) -> float:
    """What our plan costs, made anew before each gap of those that have ended."""
    tiers = (
        TierPrice(tier=Tier.RUNNING, hold_price_s=1.0, wake_s=0.0, wake_price=0.0),
        TierPrice(tier=Tier.ON_DISK, hold_price_s=0.0, wake_s=LOAD_S, wake_price=break_even_s),
    )
    record, price = GapRecord(), 0.0
    for gap_s, end_s in zip(model.gaps_s, model.ends_s, strict=True):
        price += plan_price(plan_idle(record.read(end_s - gap_s), tiers), gap_s, break_even_s)
        record.add(gap_s, end_s)
    return price


def histogram_price(model: SmallModel, break_even_s: float) -> float:
    """What the histogram policy of "Serverless in the Wild" costs, re-implemented without ARIMA."""
    counts, outside, price = [0] * HISTOGRAM_MINUTES, 0, 0.0
    for gap_s in model.gaps_s:
        inside = sum(counts)
        mean = inside / HISTOGRAM_MINUTES
        varied = statistics.pstdev(counts) / mean if mean else 0.0
        if varied < LEAST_VARIED or outside > MOST_OUTSIDE * (inside + outside):
            from_s, to_s = 0.0, HISTOGRAM_MINUTES * 60.0
        else:
            from_s = percentile(counts, HEAD) * 60.0 * (1 - MARGIN)
            to_s = (percentile(counts, TAIL) + 1) * 60.0 * (1 + MARGIN)
        if gap_s < from_s:
            price += break_even_s
        elif gap_s <= to_s:
            price += gap_s - from_s + (LOAD_S if from_s else 0.0)
        else:
            price += to_s - from_s + (LOAD_S if from_s else 0.0) + break_even_s
        minute = int(gap_s // 60) - 1
        if minute < HISTOGRAM_MINUTES:
            counts[max(0, minute)] += 1
        else:
            outside += 1
    return price


def percentile(counts: Sequence[int], share: float) -> int:
    """The place at which so much of all counts is reached."""
    reached, whole = 0, share * sum(counts)
    for place, count in enumerate(counts):
        reached += count
        if reached >= whole:
            return place
    return len(counts) - 1


RULES: dict[str, Callable[[SmallModel, float], float]] = {
    "ours": learned_price,
    "ski rental (break-even)": lambda model, even_s: fixed_price(model.gaps_s, even_s, even_s),
    "5 minutes": lambda model, even_s: fixed_price(model.gaps_s, 300.0, even_s),
    "histogram": histogram_price,
    "best fixed of each model": lambda model, even_s: best_fixed(model.gaps_s, even_s)[1],
    "clairvoyant": lambda model, even_s: sum(min(one, even_s) for one in model.gaps_s),
}


def measure(models: Sequence[SmallModel], break_evens_s: Sequence[float]) -> dict[str, Any]:
    """The price of each rule over that of the best fixed idle time, by break-even."""
    every = [gap_s for model in models for gap_s in model.gaps_s]
    rows = []
    for even_s in break_evens_s:
        idle_s, least = best_fixed(every, even_s)
        prices = {
            name: sum(rule(model, even_s) for model in models) / least
            for name, rule in RULES.items()
        }
        rows.append({"break_even_s": even_s, "best_fixed_s": idle_s, "prices": prices})
    return {"models": len(models), "gaps": len(every), "rows": rows}


def render(made: dict[str, Any]) -> str:
    """The record as Markdown."""
    heads = " | ".join(f"{row['break_even_s']:g} s" for row in made["rows"])
    lines = [
        f"# Scale to zero, {made['date']}",
        "",
        f"`{made['command']}` · {made['seconds']:.0f} s · {made['models']} models with gaps, "
        f"{made['gaps']:,} gaps",
        "",
        "Price of holding and of cold starts, over that of the one idle time for all models that "
        "would have cost least (found in hindsight for each column). A column is the price of a "
        "cold start, in seconds of a replica. Nothing is tuned; every rule sees a gap only when it "
        "has ended.",
        "",
        f"| a cold start costs | {heads} |",
        "|---|" + "---|" * len(made["rows"]),
        "| best fixed idle time | "
        + " | ".join(f"{row['best_fixed_s']:g} s" for row in made["rows"])
        + " |",
    ]
    for name in RULES:
        cells = " | ".join(f"{row['prices'][name]:.3f}" for row in made["rows"])
        lines.append(f"| {name} | {cells} |")
    worst = max(row["prices"]["ours"] for row in made["rows"])
    verdict = "met" if worst <= LIMIT else "missed"
    lines += ["", f"Ours is at most {worst:.3f} (limit {LIMIT}): {verdict}.", ""]
    return "\n".join(lines)


def run(data: Path, out: Path, command: str, date: str) -> int:
    """Measure, write the report, and say whether the limit is met."""
    models = read_models(data)
    if not models:
        print(f"bench: no *_clients_minute.parquet in {data}", file=sys.stderr)
        return 2
    begun_s = time.monotonic()
    made = {"command": command, "date": date, **measure(models, BREAK_EVENS_S)}
    made["seconds"] = time.monotonic() - begun_s
    text = render(made)
    out.mkdir(parents=True, exist_ok=True)
    (out / f"zero-{date}.md").write_text(text)
    (out / f"zero-{date}.json").write_text(json.dumps(made, indent=1) + "\n")
    print(text)
    return 0 if all(row["prices"]["ours"] <= LIMIT for row in made["rows"]) else 1
