"""How long an idle pool is worth keeping, and how warm: the plan of least expected price.

A pool that has just become idle begins a gap, which its next request ends. Each tier has a price
for each second that it is held, and a price of the wake out of it (the seconds a request waits,
at the price of a waited second). From the gaps of the past the expected price of every way down
the ladder is known, and the cheapest is found by one backward pass over the sorted gaps: at each
gap length the tier for the gaps that last longer. It may lead up again: where gaps end at about the
same length, it pays to go down at once, and to be back a wake before they end.

How far the gaps are trusted. Without any, a tier is left when holding it has cost as much as the
next one's dearer wake would (the lower envelope of the tiers' lines): never more than twice the
price of knowing the gap (Irani, Shukla and Gupta, "Online strategies for dynamic power management
in systems with multiple power-saving states", 2003; two tiers are the ski-rental problem). With
``n`` gaps that lasted longer than a moment ``t``, a tier may be left ``n + 1`` times earlier than
that, or later. So the plan begins at the safe one and moves to the cheapest with what was seen.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from autoscaler.types import Gap
from modelcache.types import Tier

MOST_LENGTHS = 128
"""Different gap lengths that are told apart; neighbours are put together beyond that."""
EARLY = 0.02
"""A pool comes up ahead of a request by this share of the gap too: timers are not exact."""
DOUBT = 2.0
"""``k`` gaps that ended in a stretch are evidence of ``k - DOUBT * sqrt(k)``: what happened a few
times is no pattern."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPrice:
    """What a tier costs. ``wake_s``: seconds from a request until the pool is ready."""

    tier: Tier
    hold_price_s: float
    """Price of a second in it."""
    wake_s: float
    wake_price: float
    """Price of one wake out of it: what the requests' waits are worth."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleStep:
    """From ``at_s`` seconds into a gap on the pool is in ``tier``. ``hold_price`` and
    ``wake_price`` are what this step is expected to cost, per gap."""

    at_s: float
    tier: Tier
    hold_price: float
    wake_price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class IdlePlan:
    """Where an idle pool is, second by second, until its next request.

    ``gaps`` are those it is made of. ``price`` is what it is expected to cost per gap,
    ``safe_price`` what the plan without any gap would, ``kept_price`` what staying in the warmest
    tier would.
    """

    steps: tuple[IdleStep, ...]
    gaps: int
    price: float
    safe_price: float
    kept_price: float

    def tier_at(self, idle_s: float) -> Tier:
        """The tier of a pool that has been idle for so long."""
        place = bisect_right(self.steps, idle_s, key=lambda step: step.at_s)
        return self.steps[max(0, place - 1)].tier


def plan_idle(gaps: Sequence[Gap], tiers: Sequence[TierPrice]) -> IdlePlan:
    """The cheapest plan for a gap like those of the past. ``tiers`` are those that there are, from
    hot to cold, at least one; what is above the lower envelope of the others is left out."""
    ladder = lower_envelope(tiers)
    breaks = break_evens(ladder)
    points = merge(gaps)
    total = sum(one.weight for one in points) or 1.0
    grid = make_grid(points, breaks)
    safe = [bisect_right(breaks, one.from_s) - 1 for one in grid]
    chosen = cheapest(grid, ladder, breaks)
    stretches = list(zip(grid, chosen, strict=True))
    come_up(stretches, ladder)
    return IdlePlan(
        steps=make_steps(stretches, ladder, breaks, total),
        gaps=len(gaps),
        price=price_of(stretches, ladder) / total,
        safe_price=price_of(list(zip(grid, safe, strict=True)), ladder) / total,
        kept_price=ladder[0].hold_price_s
        * sum(one.length_s * one.weight for one in points)
        / total,
    )


def lower_envelope(tiers: Sequence[TierPrice]) -> list[TierPrice]:
    """The tiers that are the cheapest for gaps of some length, from hot to cold."""
    found: list[TierPrice] = []
    for tier in sorted(tiers, key=lambda one: (-one.hold_price_s, one.wake_price)):
        if found and tier.hold_price_s == found[-1].hold_price_s:
            continue
        while found and tier.wake_price <= found[-1].wake_price:
            found.pop()
        while len(found) > 1 and break_even_s(found[-1], tier) <= break_even_s(*found[-2:]):
            found.pop()
        found.append(tier)
    return found


def break_even_s(warm: TierPrice, cold: TierPrice) -> float:
    """Seconds after which holding the warmer tier has cost what its cheaper wake saves."""
    saved_s = warm.hold_price_s - cold.hold_price_s
    return (cold.wake_price - warm.wake_price) / saved_s


def break_evens(ladder: Sequence[TierPrice]) -> list[float]:
    """When each tier of an envelope begins, without any gap known."""
    return [0.0, *(break_even_s(warm, cold) for warm, cold in pairwise(ladder))]


@dataclass(slots=True, kw_only=True)
class Point:
    """Gaps of about one length: their number, and their weights' sum."""

    length_s: float
    count: int
    weight: float


def merge(gaps: Sequence[Gap]) -> list[Point]:
    """The gaps as about ``MOST_LENGTHS`` points at most, the shortest first. A point is as long as
    the longest of its gaps, so that no step comes before one of them ends."""
    found: list[Point] = []
    most = -(-len(gaps) // MOST_LENGTHS)
    for gap in sorted(gaps):
        last = found[-1] if found else None
        if last is not None and (last.length_s == gap.length_s or last.count < most):
            last.length_s = gap.length_s
            last.count += 1
            last.weight += gap.weight
        else:
            found.append(Point(length_s=gap.length_s, count=1, weight=gap.weight))
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleStretch:
    """A stretch of a gap in which the tier does not change. ``weight`` is that of the gaps that
    outlast its beginning, ``ended`` that of those that end at its end; ``count`` are they."""

    from_s: float
    to_s: float
    weight: float
    ended: float
    count: int

    @property
    def held_s(self) -> float:
        """Seconds that all gaps together spend in it."""
        return (self.to_s - self.from_s) * self.weight


def make_grid(points: Sequence[Point], breaks: Sequence[float]) -> list[IdleStretch]:
    """The stretches between all moments at which a change of tier can pay, or becomes allowed."""
    weight = sum(one.weight for one in points)
    found: list[IdleStretch] = []
    from_s = 0.0
    for point in points:
        trust = 1.0 + weight
        between = {at_s * by for at_s in breaks for by in (1.0 / trust, 1.0, trust)}
        between.add(point.length_s * (1.0 - EARLY))
        moments = sorted(one for one in between if from_s < one < point.length_s)
        for to_s in moments:
            found.append(IdleStretch(from_s=from_s, to_s=to_s, weight=weight, ended=0.0, count=0))
            from_s = to_s
        found.append(
            IdleStretch(
                from_s=from_s,
                to_s=point.length_s,
                weight=weight,
                ended=point.weight,
                count=point.count,
            )
        )
        from_s = point.length_s
        weight = max(0.0, weight - point.weight)
    return found


def cheapest(
    grid: Sequence[IdleStretch], ladder: Sequence[TierPrice], breaks: Sequence[float]
) -> list[int]:
    """The place in the ladder for each stretch, never up: one pass from the last to the first."""
    places = range(len(ladder))
    ahead = [0.0] * len(ladder)
    choices: list[list[int]] = []
    for one in reversed(grid):
        trust = 1.0 + one.weight
        warmest = bisect_right(breaks, one.from_s / trust) - 1
        coldest = bisect_right(breaks, one.from_s * trust) - 1
        within = [
            tier.hold_price_s * one.held_s + tier.wake_price * one.ended + ahead[place]
            for place, tier in enumerate(ladder)
        ]
        choice = [
            min(range(max(place, warmest), max(place, coldest) + 1), key=within.__getitem__)
            for place in places
        ]
        ahead = [within[best] for best in choice]
        choices.append(choice)
    found, place = [], 0
    for choice in reversed(choices):
        place = choice[place]
        found.append(place)
    return found


def come_up(stretches: list[tuple[IdleStretch, int]], ladder: Sequence[TierPrice]) -> None:
    """Put the pool into its warmest tier for the run of stretches that saves most by it, if any.

    Coming up costs the warmest tier's price while it loads, for all gaps that last so long. Wakes
    are saved only as far as the gaps that end there are evidence (``DOUBT``).
    """
    best, best_saved = (0, 0), 0.0
    for sure in (0.8, 0.6, 0.4, 0.2):
        begun, count, saved = 0, 0, -math.inf
        for now, (one, below) in enumerate(stretches):
            tier = ladder[below]
            fee = ladder[0].hold_price_s * tier.wake_s * one.weight
            if below == 0:
                begun, count, saved = now + 1, 0, -math.inf
                continue
            if saved <= -fee:
                begun, count, saved = now, 0, -fee
            saved -= (ladder[0].hold_price_s - tier.hold_price_s) * one.held_s
            saved += sure * (tier.wake_price - ladder[0].wake_price) * one.ended
            count += one.count
            if saved > best_saved and count - DOUBT * math.sqrt(count) >= sure * count:
                best, best_saved = (begun, now + 1), saved
    for place in range(*best):
        stretches[place] = (stretches[place][0], 0)


def make_steps(
    stretches: Sequence[tuple[IdleStretch, int]],
    ladder: Sequence[TierPrice],
    breaks: Sequence[float],
    total: float,
) -> tuple[IdleStep, ...]:
    """The steps of a plan. After the longest gap known it goes on as if none were."""
    found: list[IdleStep] = [
        IdleStep(at_s=0.0, tier=ladder[0].tier, hold_price=0.0, wake_price=0.0)
    ]
    before = end = 0
    end_s = 0.0
    for one, place in stretches:
        hold = ladder[place].hold_price_s * one.held_s / total
        wake = ladder[place].wake_price * one.ended / total
        at_s = one.from_s
        if place < before:
            at_s -= ladder[before].wake_s
            hold += ladder[0].hold_price_s * ladder[before].wake_s * one.weight / total
        add_step(found, at_s, ladder[place].tier, hold, wake)
        before, end, end_s = place, place, one.to_s
    for place in range(end + 1, len(ladder)):
        add_step(found, max(end_s, breaks[place]), ladder[place].tier, 0.0, 0.0)
    return tuple(found)


def add_step(
    steps: list[IdleStep], at_s: float, tier: Tier, hold_price: float, wake_price: float
) -> None:
    """Go on in the last step where its tier is the same, else with another one."""
    last = steps[-1]
    if last.tier is not tier:
        if at_s <= last.at_s:
            steps.pop()  # it would last for no time
        at_s = max(at_s, last.at_s)
    if steps and steps[-1].tier is tier:
        last = steps.pop()
        at_s = last.at_s
        hold_price, wake_price = last.hold_price + hold_price, last.wake_price + wake_price
    steps.append(IdleStep(at_s=at_s, tier=tier, hold_price=hold_price, wake_price=wake_price))


def price_of(stretches: Sequence[tuple[IdleStretch, int]], ladder: Sequence[TierPrice]) -> float:
    """What being in these tiers, stretch by stretch, costs over all gaps."""
    before, price = 0, 0.0
    for one, place in stretches:
        price += ladder[place].hold_price_s * one.held_s + ladder[place].wake_price * one.ended
        if place < before:
            price += ladder[0].hold_price_s * ladder[before].wake_s * one.weight
        before = place
    return price
