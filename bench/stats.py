"""Medians, spreads and paired ratios of interleaved rounds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """What several rounds of one measure gave."""

    median: float
    low: float
    high: float
    rounds: int


def spread(values: Sequence[float]) -> Spread | None:
    """Median, lowest and highest; ``None`` when there is no value."""
    if not values:
        return None
    return Spread(
        median=statistics.median(values), low=min(values), high=max(values), rounds=len(values)
    )


def paired_ratio(numerator: Mapping[int, float], denominator: Mapping[int, float]) -> Spread | None:
    """Spread of numerator / denominator over the rounds that have both.

    Contenders take turns within a round, so what slows the machine down for a while slows both
    sides of a round's ratio, and the median of such ratios is steadier than a ratio of medians.
    """
    shared = sorted(numerator.keys() & denominator.keys())
    return spread([numerator[r] / denominator[r] for r in shared if denominator[r] > 0])


def percentile(values: Sequence[float], fraction: float) -> float | None:
    """The value at ``fraction`` (0..1) of the sorted values, the nearest rank above."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def best(costs: Mapping[str, Spread | None]) -> str | None:
    """The name with the lowest median cost; ``None`` when nothing was measured."""
    known = {name: s.median for name, s in costs.items() if s is not None}
    return min(known, key=lambda name: known[name]) if known else None


def inversions(order: Sequence[int]) -> float:
    """How far from first come, first served an order is: 0 exactly, 0.5 random, 1 reversed.

    The fraction of pairs that come in the wrong order.
    """
    count = len(order)
    if count < 2:
        return 0.0
    wrong = sum(order[i] > order[j] for i in range(count) for j in range(i + 1, count))
    return wrong / (count * (count - 1) / 2)
