"""What a pool's decisions cost and brought, against reaction alone. Pure.

What there was is known. What reaction alone would have had is computed from the same demand: it
asks for what the stable window recommends at the target utilization, or did within the scale-down
delay, and a replica serves one lead after it was asked for. It begins with what there was, and has
a replica where there was one without demand: how a pool goes to zero and wakes is the same for
both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from autoscaler.types import NO_TALLY, ForecastTally


@dataclass(frozen=True, slots=True, kw_only=True)
class PastMoment:
    """What was known and decided at one moment (``at_s``, Unix time). ``until_s``: for how long
    that is known to have held, where no later moment says otherwise. ``tokens_per_s`` is demand
    over the stable window before it. ``alone`` is what reaction alone recommended, ``recommended``
    what the autoscaler would have done, where it was not to. ``trusted``: the forecast was used.
    """

    at_s: float
    until_s: float
    supply: int
    ready: int | None
    tokens_per_s: float | None
    capacity_tokens_per_s: float | None
    alone: int | None
    recommended: int | None = None
    trusted: bool = False
    lead_s: float | None = None
    scale_down_delay_s: float = 0.0
    min_replicas: int = 0
    max_replicas: int = 1 << 31


@dataclass(slots=True, kw_only=True)
class Cost:
    """Seconds that replicas were there or on their way, summed over them, and seconds in which
    demand was above what the ready ones carry."""

    replica_s: float = 0.0
    short_s: float = 0.0


@dataclass(slots=True, kw_only=True)
class Hindsight:
    """``scored_s`` could be judged, ``unknown_s`` not. ``above_replica_s`` and ``below_replica_s``
    are the replica-seconds beyond those of reaction alone, and those saved. ``auto`` is what would
    have been in the mode ``auto``, where the mode was another; ``None`` where it never was."""

    scored_s: float = 0.0
    unknown_s: float = 0.0
    trusted_s: float = 0.0
    above_replica_s: float = 0.0
    below_replica_s: float = 0.0
    ran: Cost = field(default_factory=Cost)
    reactive: Cost = field(default_factory=Cost)
    auto: Cost | None = None
    tally: ForecastTally = NO_TALLY

    @property
    def coverage(self) -> float | None:
        """The part of forecasts that covered what came."""
        return self.tally.covered / self.tally.scored if self.tally.scored else None

    @property
    def loss_ratio(self) -> float | None:
        """Their pinball loss in parts of that of the last value."""
        last = self.tally.last_value_loss
        return self.tally.loss / last if last > 0.0 else None


class Replicas:
    """Replicas of a policy that was not run: those asked for, and those that serve a lead later."""

    def __init__(self) -> None:
        self._asked: deque[tuple[float, int]] = deque()
        self._held: deque[tuple[float, int]] = deque()

    def begin(self, at_s: float, ready: int) -> None:
        """Only these have been there for ever."""
        self._asked.clear()
        self._held.clear()
        self._held.append((at_s - 1e12, ready))

    def ask(self, at_s: float, replicas: int, delay_s: float, least: int, most: int) -> int:
        """It recommends so many from now on. Returns how many there are: the most of the delay."""
        self._asked.append((at_s, replicas))
        past(self._asked, at_s - delay_s)
        held = min(most, max(least, max(number for _, number in self._asked)))
        self._held.append((at_s, held))
        return held

    def ready(self, at_s: float, lead_s: float) -> int:
        """How many serve: those that were asked for a lead ago, and have been since."""
        past(self._held, at_s - lead_s)
        return min(number for _, number in self._held)


def past(known: deque[tuple[float, int]], since_s: float) -> None:
    """Forget what did not hold any more at this time."""
    while len(known) > 1 and known[1][0] <= since_s:
        known.popleft()


def judge(moments: Sequence[PastMoment], tally: ForecastTally = NO_TALLY) -> Hindsight:
    """The hindsight of a stretch, from what is known of it, oldest first.

    From one moment to the next there was what the first says; demand was what the second saw, for
    its window lies between them.
    """
    found = Hindsight(tally=tally)
    alone, auto = Replicas(), Replicas()
    has_mode = any(one.recommended is not None for one in moments)
    found.auto = Cost() if has_mode else None
    begun = False
    asked = wanted = 0
    for now, then in pairwise(moments):
        length_s = then.at_s - now.at_s
        known_s = length_s if then.at_s <= now.until_s else 0.0
        rate, each = then.tokens_per_s, now.capacity_tokens_per_s
        if not known_s or now.ready is None or now.alone is None or rate is None or not each:
            found.unknown_s += max(0.0, length_s)
            begun = False
            continue
        lead_s = now.lead_s or 0.0
        if not begun:
            alone.begin(now.at_s, now.ready)
            auto.begin(now.at_s, now.ready)
            begun = True
        floor = max(now.min_replicas, min(1, now.supply))
        most = max(floor, now.max_replicas)
        asked = alone.ask(now.at_s, now.alone, now.scale_down_delay_s, floor, most)
        found.scored_s += length_s
        found.trusted_s += length_s * now.trusted
        charge(found.ran, now.supply, now.ready, rate / each, length_s)
        charge(found.reactive, asked, alone.ready(then.at_s, lead_s), rate / each, length_s)
        if found.auto is not None:
            wanted = now.supply if now.recommended is None else now.recommended
            auto.ask(now.at_s, wanted, 0.0, 0, wanted)
            charge(found.auto, wanted, auto.ready(then.at_s, lead_s), rate / each, length_s)
        more = (now.supply - asked) * length_s
        found.above_replica_s += max(0.0, more)
        found.below_replica_s += max(0.0, -more)
    return found


def charge(cost: Cost, there: int, ready: int, needed: float, length_s: float) -> None:
    """Add a stretch of time to it."""
    cost.replica_s += there * length_s
    if needed > ready:
        cost.short_s += length_s
