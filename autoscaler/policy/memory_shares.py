"""Which pools at zero keep their models in memory, where the memory is not enough for all.

Each pool bids for the memory of its warm tiers what they save it: the price of the wake that is
spared, over the seconds until it is expected. Memory goes to the most saved per byte first. What is
left out by that is worth at most as much as the one that did not fit any more: the better of the
two is taken, which saves at least half of what the best choice would. What is in memory already
bids more, so that two pools of about the same worth do not take it from each other.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from autoscaler.types import Gap

STAY = 1.25
"""What is in memory bids so many times its worth: bringing it back would cost reading it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBid:
    """What a pool saves per second by keeping ``size_bytes`` of memory."""

    pool: str
    size_bytes: int
    saved_price_s: float
    held: bool = False

    @property
    def worth(self) -> float:
        """What it saves, and more where it is held already."""
        return self.saved_price_s * (STAY if self.held else 1.0)


def share_memory(budget_bytes: int, bids: Sequence[MemoryBid]) -> Set[str]:
    """The pools that have the memory they bid for. Nothing saved is nothing gained: no memory."""
    fitting = [one for one in bids if one.size_bytes <= budget_bytes and one.saved_price_s > 0.0]
    fitting.sort(key=lambda one: (-one.worth / max(1, one.size_bytes), one.pool))
    chosen: list[MemoryBid] = []
    left_bytes = budget_bytes
    for one in fitting:
        if one.size_bytes <= left_bytes:
            chosen.append(one)
            left_bytes -= one.size_bytes
    best = max(fitting, key=lambda one: one.worth, default=None)
    if best is not None and best.worth > sum(one.worth for one in chosen):
        return frozenset({best.pool})
    return frozenset(one.pool for one in chosen)


def expect_left_s(gaps: Sequence[Gap], idle_s: float) -> float:
    """Seconds until the next request of a pool that has been idle for so long: the mean of what was
    left of gaps that lasted longer, and of one that lasts as long again, for the next may be longer
    than all before."""
    longer = [one for one in gaps if one.length_s > idle_s]
    weight = sum(one.weight for one in longer)
    left_s = sum((one.length_s - idle_s) * one.weight for one in longer)
    return max(1.0, (left_s + max(1.0, idle_s)) / (weight + 1.0))
