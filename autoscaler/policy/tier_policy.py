"""How warm a pool is kept while nobody asks: a pure function of how long nobody has.

The tiers are steps of a ladder, hottest first. A pool that has gone to zero stays on each step for
the time its settings give that step, then goes one down. Steps that are given no time, or that the
pool does not have here, are left out and take none of it; the coldest there is has no end. A step
that comes back before its time is spent is taken again. Going up is nobody's decision here: who
asks brings the pool up from wherever it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from modelcache.types import TIERS, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class LadderPolicy:
    """Seconds a pool at zero stays on each step; 0 leaves it out, ``None`` is for ever."""

    sleeping_s: float | None = 0.0
    forked_s: float | None = None
    paged_s: float | None = None
    on_disk_s: float | None = None

    def stays_s(self, tier: Tier) -> float | None:
        """The time on one step. ``remote`` is the floor; ``running`` is ``decide``'s to end."""
        match tier:
            case Tier.SLEEPING:
                return self.sleeping_s
            case Tier.FORKED:
                return self.forked_s
            case Tier.PAGED:
                return self.paged_s
            case Tier.ON_DISK:
                return self.on_disk_s
            case _:
                return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """How far down a pool is: the seconds it has spent on each step since it went to zero.

    Only time between two looks that both found nobody there counts. ``on`` is the step it is on,
    ``seen_at_s`` the last look that found nobody; both ``None`` where the last look did not.
    """

    spent_s: Mapping[Tier, float] = field(default_factory=dict)
    on: Tier | None = None
    seen_at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """The step a pool belongs on, and in how many seconds the next is due (``None``: never)."""

    tier: Tier
    left_s: float | None = None


def descend(
    policy: LadderPolicy,
    available: Set[Tier],
    descent: Descent,
    idle: bool | None,
    now_s: float,
) -> tuple[Rung | None, Descent]:
    """Where a pool belongs at ``now_s``, if it is known to be idle, and what to remember.

    ``available`` are the tiers it can be in, here and now. ``idle`` is whether it is at zero with
    nobody there: somebody (``False``) puts it back on top, and unknown (``None``) stops the time.
    """
    if idle is None:
        return None, replace(descent, on=None, seen_at_s=None)
    if not idle:
        return None, Descent()
    spent_s = dict(descent.spent_s)
    if descent.on is not None and descent.seen_at_s is not None:
        gap_s = max(0.0, now_s - descent.seen_at_s)
        spent_s[descent.on] = spent_s.get(descent.on, 0.0) + gap_s
    rung = choose_rung(policy, available, spent_s)
    return rung, Descent(spent_s=spent_s, on=rung.tier, seen_at_s=now_s)


def choose_rung(policy: LadderPolicy, available: Set[Tier], spent_s: Mapping[Tier, float]) -> Rung:
    """The hottest step that is there and has time left, else the coldest that is there; without
    any a pool is as cold as can be."""
    below = [tier for tier in TIERS if tier in available and tier is not Tier.RUNNING]
    if not below:
        return Rung(tier=Tier.REMOTE)
    for tier in below[:-1]:
        stays_s = policy.stays_s(tier)
        if stays_s is None:
            return Rung(tier=tier)
        left_s = stays_s - spent_s.get(tier, 0.0)
        if left_s > 0.0:
            return Rung(tier=tier, left_s=left_s)
    return Rung(tier=below[-1])
