"""Moves one pool at zero from tier to tier, and reports on its tiers.

``tier_policy`` says where a pool belongs; here it is brought there, beside the control loop, one
move at a time. A request for the pool does not wait for a move: it is cancelled.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from autoscaler.backends.base import Unsupported
from autoscaler.policy.tier_policy import (
    TierChoice,
    TierState,
    TierTimes,
    choose_tier,
    pick_tier,
)
from autoscaler.settings import PoolSettings, PriceSettings
from autoscaler.tiers.idle_planner import IdlePlanner
from autoscaler.tiers.preparer import Preparer
from autoscaler.tiers.wake_times import WakeTimes
from autoscaler.types import HistogramCounts, TierReport
from modelcache.types import TIERS, Tier

START_BOUNDS_S = (0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 240, 480, 960, 1920)
"""From a wake out of sleep to the download of a large model."""

Spawn = Callable[[Awaitable[None], str], asyncio.Task[None]]
"""Runs work beside the loop under a name; its errors are recorded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unavailable:
    """Why a pool cannot be in a tier: until a time on the loop's clock, or always (``None``)."""

    reason: str
    until_s: float | None


class TierManager:
    """The tiers of one pool: those it can be in, the one it is in, and how long wakes took.

    A move that failed is tried again after ``retry_s``. ``on_error`` records an error by where it
    was raised and returns its text; ``on_change`` is called after every move.
    """

    def __init__(
        self,
        pool: PoolSettings,
        *,
        preparer: Preparer,
        wake_times: WakeTimes,
        retry_s: float,
        spawn: Spawn,
        on_error: Callable[[str, BaseException], str],
        on_change: Callable[[], None],
        planner: IdlePlanner | None = None,
    ) -> None:
        self.planner = planner or IdlePlanner()
        self._pool = pool
        self._preparer = preparer
        self._wake_times = wake_times
        self.retry_s = retry_s
        self._spawn = spawn
        self._on_error = on_error
        self._on_change = on_change
        self._model = f"{pool.engine or pool.backend}:{pool.model or pool.name}"
        self._state = TierState()
        self._choice: TierChoice | None = None
        self._unavailable: dict[Tier, Unavailable] = {}
        self._refreshed_at_s: float | None = None
        self._move: asyncio.Task[None] | None = None
        self._moved_to: Tier | None = None
        self._retry_at_s = 0.0
        self._start_counts: dict[Tier, list[int]] = {}
        self._start_sums_s: dict[Tier, float] = {}
        self._failed_starts: Counter[Tier] = Counter()

    @property
    def _stays_s(self) -> TierTimes:
        """Seconds in each tier: what the settings say, else what is planned."""
        planned = self.planner.stays_s
        return {
            tier: planned.get(tier) if given is None else given
            for tier, given in self._pool.tiers.stays_s.items()
        }

    def plan_idle(self, prices: PriceSettings, replica_hour: float, now_s: float) -> None:
        """Plan the gap without requests that begins."""
        tiers = set(self.model_tiers)
        if self._pool.tiers.sleeps:
            tiers.add(Tier.SLEEPING)
        wakes_s = {
            tier: median_s
            for tier in TIERS[1:]
            if (median_s := self._wake_times.median_s(self._model, tier)) is not None
        }
        self.planner.make_plan(
            tiers - set(self._unavailable),
            wakes_s,
            prices,
            replica_hour=replica_hour,
            model_bytes=self._preparer.size_bytes(self._pool),
            now_s=now_s,
        )

    @property
    def model_tier(self) -> Tier:
        """The warmest tier below ``sleeping`` that the model is in: what a start begins from."""
        return self._preparer.tier(self._pool)

    @property
    def model_tiers(self) -> frozenset[Tier]:
        """The tiers below ``sleeping`` that the model can be in."""
        return self._preparer.tiers(self._pool)

    @property
    def step_down_at_s(self) -> float | None:
        """When a pool at zero will be a tier colder without a request; ``None`` for never."""
        if self._choice is None or self._choice.left_s is None or self._state.seen_at_s is None:
            return None
        return self._state.seen_at_s + self._choice.left_s

    def may_sleep(self) -> bool:
        """Whether an engine that is idle shall sleep, rather than end."""
        if Tier.SLEEPING in self._unavailable:
            return False
        available = self.model_tiers | {Tier.SLEEPING}
        return pick_tier(self._stays_s, available, {}).tier is Tier.SLEEPING

    def exclude(self, tier: Tier, reason: str, until_s: float | None) -> None:
        """Leave out a tier, until a time or (``None``) permanently."""
        self._unavailable[tier] = Unavailable(reason=reason, until_s=until_s)

    def choose(
        self, *, idle: bool | None, can_sleep: bool, hold_asleep: bool, now_s: float
    ) -> Tier | None:
        """The tier the pool belongs in now; ``None`` while it has demand, or may have.

        ``can_sleep``: an engine sleeps, or is about to. ``hold_asleep``: it shall go on sleeping
        until the next request, for an operator asked for it.
        """
        self._unavailable = {
            tier: one
            for tier, one in self._unavailable.items()
            if one.until_s is None or now_s < one.until_s
        }
        available = set(self.model_tiers)
        if can_sleep:
            available.add(Tier.SLEEPING)
        self._choice, self._state = choose_tier(
            self._stays_s, available - set(self._unavailable), self._state, idle, now_s
        )
        if idle is False:
            self.cancel_move()
        if self._choice is not None and hold_asleep:
            self._choice = TierChoice(tier=Tier.SLEEPING)
        return None if self._choice is None else self._choice.tier

    def cancel_move(self) -> None:
        """End the move that is under way."""
        if self._move is not None:
            self._move.cancel()
            self._move = self._moved_to = None

    def move(self, tier: Tier, now_s: float) -> None:
        """Begin to bring the pool, which has no process, to a tier, unless a move is under way."""
        if self._move is not None and not self._move.done():
            return
        seen_s = None if self._refreshed_at_s is None else now_s - self._refreshed_at_s
        retry_at_s = now_s + self.retry_s
        # What was there may be gone: a standby dies, an operator evicts a model.
        if seen_s is None or seen_s >= self.retry_s:
            self._refreshed_at_s = now_s
            work = self._refresh()
        elif self.model_tier is not tier and (
            self._moved_to is not tier or now_s >= self._retry_at_s
        ):
            self._moved_to, self._retry_at_s = tier, retry_at_s
            work = self._move_to(tier, retry_at_s)
        else:
            return
        self._move = self._spawn(work, f"tier of {self._pool.name}")

    async def _refresh(self) -> None:
        try:
            await self._preparer.refresh(self._pool)
        finally:
            self._on_change()

    async def _move_to(self, tier: Tier, retry_at_s: float) -> None:
        try:
            await self._preparer.move_to(self._pool, tier)
        except Unsupported as error:
            self.exclude(tier, str(error), None)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the pool is not in that tier
            self.exclude(tier, self._on_error(f"tier of {self._pool.name}", error), retry_at_s)
        finally:
            self._on_change()

    def record_wake(self, tier: Tier, seconds: float) -> None:
        """Remember that a start or wake from ``tier`` took so long."""
        counts = self._start_counts.setdefault(tier, [0] * (len(START_BOUNDS_S) + 1))
        counts[bisect_left(START_BOUNDS_S, seconds)] += 1
        self._start_sums_s[tier] = self._start_sums_s.get(tier, 0.0) + seconds
        self._wake_times.add(self._model, tier, seconds)
        self._spawn(self._wake_times.save(), "wake times")

    def record_failed_start(self, tier: Tier) -> None:
        """Count a start or wake from ``tier`` that failed."""
        self._failed_starts[tier] += 1

    def estimate_wake_s(self, tier: Tier) -> float | None:
        """How long a wake from ``tier`` takes at most; ``None`` before the first."""
        return self._wake_times.estimate_s(self._model, tier)

    def lead_s(self, tier: Tier) -> float | None:
        """How long before demand a replica out of ``tier`` is to be asked for; ``None`` before the
        first start."""
        return self._wake_times.lead_s(self._model, tier)

    def report(self, current: Tier | None) -> tuple[TierReport, ...]:
        """The tiers the pool knows here, from hot to cold: those it can be in, those it has been
        woken from, those that were excluded. ``current`` is the one it is in."""
        reports = []
        for tier in TIERS[1:]:
            excluded = self._unavailable.get(tier)
            times_s = self._wake_times.measured(self._model, tier)
            stays_s = self._stays_s.get(tier)
            configured = tier is Tier.SLEEPING and stays_s != 0
            available = excluded is None and (
                tier in self.model_tiers or configured or current is tier
            )
            if available or excluded is not None or times_s or self._failed_starts[tier]:
                reports.append(
                    TierReport(
                        tier=tier,
                        available=available,
                        wake_s=self._wake_times.median_s(self._model, tier),
                        wakes=len(times_s),
                        stays_s=stays_s,
                        why_not="" if excluded is None else excluded.reason,
                        start_times=self._start_times(tier),
                        failed_starts=self._failed_starts[tier],
                    )
                )
        return tuple(reports)

    def _start_times(self, tier: Tier) -> HistogramCounts | None:
        counts = self._start_counts.get(tier)
        if counts is None:
            return None
        sum_s = self._start_sums_s[tier]
        return HistogramCounts(bounds_s=START_BOUNDS_S, counts=tuple(counts), sum_s=sum_s)
