"""How warm a pool at zero is kept: a pure function of how long it has been without demand.

A pool that has gone to zero stays in each tier, hottest first, for the seconds its settings give
that tier, then goes one colder. Tiers that are given no time, or that the pool does not have here,
are left out and take none of it; the coldest there is has no end. A tier that comes back before
its time is spent is taken again. Going up is not decided here: a request starts the pool from
whichever tier it is in.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from modelcache.types import TIERS, Tier

TierTimes = Mapping[Tier, float | None]
"""Seconds a pool at zero stays in each tier: 0 leaves it out, ``None`` or no entry is for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierState:
    """The seconds a pool has spent in each tier since it went to zero.

    Only time between two readings that both found it idle counts. ``tier`` is the one it is in,
    ``seen_at_s`` the last reading that found it idle; both ``None`` where the last one did not.
    """

    spent_s: Mapping[Tier, float] = field(default_factory=dict)
    tier: Tier | None = None
    seen_at_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierChoice:
    """The tier a pool belongs in, and in how many seconds the next is due (``None``: never)."""

    tier: Tier
    left_s: float | None = None


def choose_tier(
    stays_s: TierTimes,
    available: Set[Tier],
    state: TierState,
    idle: bool | None,
    now_s: float,
) -> tuple[TierChoice | None, TierState]:
    """The tier a pool belongs in at ``now_s``, if it is known to be idle, and what to remember.

    ``available`` are the tiers it can be in, here and now. ``idle`` is whether it is at zero
    without demand: demand (``False``) begins anew, and unknown (``None``) stops the time.
    """
    if idle is None:
        return None, replace(state, tier=None, seen_at_s=None)
    if not idle:
        return None, TierState()
    spent_s = dict(state.spent_s)
    if state.tier is not None and state.seen_at_s is not None:
        gap_s = max(0.0, now_s - state.seen_at_s)
        spent_s[state.tier] = spent_s.get(state.tier, 0.0) + gap_s
    choice = pick_tier(stays_s, available, spent_s)
    return choice, TierState(spent_s=spent_s, tier=choice.tier, seen_at_s=now_s)


def pick_tier(
    stays_s: TierTimes, available: Set[Tier], spent_s: Mapping[Tier, float]
) -> TierChoice:
    """The hottest available tier that has time left, else the coldest; ``remote`` without any."""
    below = [tier for tier in TIERS if tier in available and tier is not Tier.RUNNING]
    if not below:
        return TierChoice(tier=Tier.REMOTE)
    for tier in below[:-1]:
        limit_s = stays_s.get(tier)
        if limit_s is None:
            return TierChoice(tier=tier)
        left_s = limit_s - spent_s.get(tier, 0.0)
        if left_s > 0.0:
            return TierChoice(tier=tier, left_s=left_s)
    return TierChoice(tier=below[-1])
