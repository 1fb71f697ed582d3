"""How long one pool is kept warm without requests: its gaps, what its tiers cost, and the plan.

The plan (``policy.idle_cost``) is made when the pool becomes idle, of the gaps it has had, the wake
times measured here and the prices in the settings; at most once a minute where it has many gaps.
What the settings say in seconds goes before it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Set

from autoscaler.policy.idle_cost import IdlePlan, TierPrice, plan_idle
from autoscaler.policy.memory_shares import expect_left_s
from autoscaler.settings import PriceSettings
from autoscaler.signals.gaps import GapRecord
from autoscaler.types import Outlook
from modelcache.types import TIERS, Tier

LOG = logging.getLogger("tidegate.autoscaler")
AGAIN_S = 60.0
KEEP_S = 300.0
FEW_GAPS = 16
HOUR_S = 3_600.0
GIB = 1 << 30
STANDBY_BYTES = 300 << 20
"""What an engine that stands by has for itself."""
ASLEEP_SHARE = 0.03
"""Of a replica's price, what one that sleeps keeps of its GPU."""
WAKE_SHARES: Mapping[Tier, float] = {Tier.SLEEPING: 0.2, Tier.FORKED: 0.6, Tier.PAGED: 0.9}
"""A wake out of a tier, of one out of the next colder tier that was measured, until it was measured
itself."""
LEAST_SAVING_S = 1e-9
"""Of a pool of which nothing is known: it gets memory that is left."""


class IdlePlanner:
    """The gaps and the plan of one pool. Times are readings of the control loop's clock."""

    def __init__(self) -> None:
        self.gaps = GapRecord()
        self.recalled = False
        """Whether the gaps of earlier control processes are among them."""
        self.plan: IdlePlan | None = None
        self._prices: dict[Tier, TierPrice] = {}
        self._keep_at_s = -math.inf
        self._idle_since_s: float | None = None
        self._doubtful = False
        self._planned_at_s: float | None = None
        self._expected_until_s = -math.inf
        """A forecast that starts a replica keeps it for its whole window: one that changes its mind
        meanwhile would stop it just before it is needed."""

    def observe(self, active_at_s: float | None, now_s: float, *, known: bool) -> bool:
        """Take note of whether there are requests: ``active_at_s`` is when one was last known of.
        Whether the pool has just become idle. A gap in which demand was unknown is none."""
        if active_at_s == now_s:
            if self._idle_since_s is not None and not self._doubtful:
                self.gaps.add(now_s - self._idle_since_s, now_s)
            self._idle_since_s, self._doubtful = None, not known
            self._expected_until_s = -math.inf
            return False
        self._doubtful = self._doubtful or not known
        begins = self._idle_since_s is None and active_at_s is not None
        if begins:
            self._idle_since_s = active_at_s
        return begins or (self.plan is None and self._planned_at_s is None)

    def recall(self, packed: bytes | None, ahead_s: float) -> None:
        """Remember gaps that were packed with times so far ahead, if there are any, and plan
        anew."""
        self.recalled = True
        if packed is not None:
            try:
                self.gaps.recall(packed, ahead_s)
            except ValueError as error:
                LOG.warning("the gaps that were kept are forgotten: %s", error)
            self.plan, self._planned_at_s = None, None

    def may_keep(self, now_s: float) -> bool:
        """Whether there are gaps to keep for the next control process: at once after the first,
        then at most once in ``KEEP_S``."""
        return self.recalled and self.gaps.is_new and now_s >= self._keep_at_s

    def keep(self, now_s: float, ahead_s: float) -> bytes:
        """All gaps, on a clock that is so far ahead."""
        self._keep_at_s = now_s + KEEP_S
        return self.gaps.pack(ahead_s)

    def make_plan(
        self,
        tiers: Set[Tier],
        wake_s: Mapping[Tier, float],
        prices: PriceSettings,
        *,
        replica_hour: float,
        model_bytes: int | None,
        now_s: float,
    ) -> None:
        """Plan the gap that begins. ``tiers`` are those below ``running`` that there are,
        ``wake_s`` the measured wakes. Without any of these there is no plan."""
        gaps = self.gaps.read(now_s)
        planned_s = self._planned_at_s
        if planned_s is not None and len(gaps) > FEW_GAPS and now_s - planned_s < AGAIN_S:
            return
        self._planned_at_s = now_s
        found = price_tiers(
            tiers, wake_s, prices, replica_hour=replica_hour, model_bytes=model_bytes
        )
        self._prices = {one.tier: one for one in found}
        self.plan = plan_idle(gaps, found) if len(found) > 1 else None

    @property
    def idle_to_zero_s(self) -> float | None:
        """Seconds that it runs without a request; ``None`` without a plan."""
        if self.plan is None:
            return None
        return next((one.at_s for one in self.plan.steps if one.tier is not Tier.RUNNING), None)

    @property
    def stays_s(self) -> dict[Tier, float | None]:
        """Seconds in each tier below ``running``; empty without a plan."""
        if self.plan is None:
            return {}
        stays: dict[Tier, float | None] = dict.fromkeys(TIERS[1:], 0.0)
        steps = self.plan.steps
        for place, one in enumerate(steps):
            if one.tier is not Tier.RUNNING:
                end_s = steps[place + 1].at_s if place + 1 < len(steps) else None
                stays[one.tier] = None if end_s is None else end_s - one.at_s
        return stays

    def page_saving_s(self, now_s: float) -> float:
        """The price of a second without its pages in memory: of what a wake from the disk takes
        longer, over the seconds until one is expected."""
        disk, paged = self._prices.get(Tier.ON_DISK), self._prices.get(Tier.PAGED)
        if disk is None or paged is None or self._idle_since_s is None:
            return LEAST_SAVING_S
        left_s = expect_left_s(self.gaps.read(now_s), now_s - self._idle_since_s)
        return max(LEAST_SAVING_S, (disk.wake_price - paged.wake_price) / left_s)

    def describe(self) -> str:
        """Why it is this long, in words."""
        plan = self.plan
        if plan is None:
            return ""
        if not plan.gaps:
            return "as long as a wake is worth, for no gap between its requests is known yet"
        return (
            f"of least price over {plan.gaps} gaps: {plan.price:.2g} a gap, "
            f"{plan.kept_price:.2g} if it were kept, {plan.safe_price:.2g} at break-even"
        )

    def prewarm(
        self, outlook: Outlook | None, current: Tier, now_s: float, *, planned: bool = True
    ) -> str:
        """Why an idle pool shall run now, ahead of a request; empty where it need not. ``planned``:
        it goes to zero by its plan, and so comes up by it too; else by the forecast alone."""
        since_s, plan = self._idle_since_s, self.plan
        if since_s is None or plan is None:
            return ""
        idle_s = now_s - since_s
        begun_s = max((one.at_s for one in plan.steps if one.at_s <= idle_s), default=0.0)
        if planned and begun_s > 0.0 and plan.tier_at(idle_s) is Tier.RUNNING:
            return f"its gaps often end about now, {idle_s:.0f} s after its last request"
        if current is Tier.RUNNING:  # what it would be in without a reason to run
            current = next((one.tier for one in plan.steps if one.tier is not current), current)
        running, cold = self._prices.get(Tier.RUNNING), self._prices.get(current)
        cold = cold or next(iter(reversed(self._prices.values())), None)
        if outlook is None or outlook.distrust or running is None or cold is None:
            return ""
        chance = chance_of_requests(outlook)
        # A request that comes would have started it too: it runs a step too long, as when it comes
        # in its step is not known. One that does not come has kept it for nothing.
        spared = chance * (cold.wake_price - running.hold_price_s * outlook.step_s)
        window_s = outlook.lead_s + outlook.step_s
        if spared > (1.0 - chance) * running.hold_price_s * window_s:
            self._expected_until_s = max(self._expected_until_s, now_s + window_s)
            return f"a request is expected within {outlook.lead_s:.0f} s ({chance:.0%})"
        if now_s < self._expected_until_s:
            return f"a request was expected within the next {self._expected_until_s - now_s:.0f} s"
        return ""


def chance_of_requests(outlook: Outlook) -> float:
    """The chance that there is demand within the lead, as far as quantiles say."""
    below = [
        level
        for level, rate in zip(outlook.levels, outlook.tokens_per_s, strict=True)
        if rate < outlook.least_tokens_per_s
    ]
    return 1.0 - max(below, default=0.0)


def price_tiers(
    tiers: Set[Tier],
    wake_s: Mapping[Tier, float],
    prices: PriceSettings,
    *,
    replica_hour: float,
    model_bytes: int | None,
) -> list[TierPrice]:
    """What each tier costs, from hot to cold; only ``running`` where no wake was measured. A model
    of unknown size is taken to cost no memory. What goes from the disk is the model cache's to say:
    ``remote`` is not among them unless the model can be nowhere else."""
    size = model_bytes or 0
    gib_s = prices.memory_gib_hour / HOUR_S / GIB
    replica_s = replica_hour / HOUR_S
    held = {
        Tier.SLEEPING: replica_s * ASLEEP_SHARE + size * gib_s,
        Tier.FORKED: (size + STANDBY_BYTES) * gib_s,
        Tier.PAGED: size * gib_s,
    }
    found = [TierPrice(tier=Tier.RUNNING, hold_price_s=replica_s, wake_s=0.0, wake_price=0.0)]
    known = [tier for tier in TIERS[1:] if tier in tiers]
    if len(known) > 1 and Tier.REMOTE in known:
        known.remove(Tier.REMOTE)
    for tier in known:
        seconds = expect_wake_s(tier, wake_s)
        if seconds is not None:
            found.append(
                TierPrice(
                    tier=tier,
                    hold_price_s=held.get(tier, 0.0),
                    wake_s=seconds,
                    wake_price=seconds * prices.waited_second,
                )
            )
    return found


def expect_wake_s(tier: Tier, wake_s: Mapping[Tier, float]) -> float | None:
    """Seconds a wake out of a tier takes: measured, else by the nearest colder tier that was, else
    by the nearest warmer one; ``None`` where nothing was measured."""
    place = TIERS.index(tier)
    share = 1.0
    for near in TIERS[place:]:
        if near in wake_s:
            return wake_s[near] * share
        share *= WAKE_SHARES.get(near, 1.0)
    share = 1.0
    for near in reversed(TIERS[:place]):
        share *= WAKE_SHARES.get(near, 1.0)
        if near in wake_s:
            return wake_s[near] / share
    return None
