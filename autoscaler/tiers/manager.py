"""Takes pools at zero down the ladder, one step at a time, and warms what cooled by itself.

``ladder`` says where a pool belongs; here it is brought there, beside the loop, one change of a
pool at a time. Whoever asks for the pool meanwhile does not wait for that: it is called off.
"""

from __future__ import annotations

from collections.abc import Callable

from autoscaler.backends.base import Unsupported
from autoscaler.control.actuator import Actuator, ErrorCounts
from autoscaler.control.lifecycle import ENDED_STATES, Event, State
from autoscaler.control.replicas import ASLEEP, PoolRecord
from autoscaler.policy.tier_policy import Rung, choose_rung, descend
from autoscaler.settings import AutoscalerSettings
from autoscaler.types import Decision
from modelcache.types import Tier


class Stepper:
    """The ladder's hands. A change that did not succeed is tried again after
    ``backoff_max_s``."""

    def __init__(
        self,
        settings: AutoscalerSettings,
        actuator: Actuator,
        errors: ErrorCounts,
        on_change: Callable[[], None],
    ) -> None:
        self._again_s = settings.backoff_max_s
        self._actuator = actuator
        self._errors = errors
        self._on_change = on_change

    def may_sleep(self, pool: PoolRecord) -> bool:
        """Whether an engine that is idle shall sleep, rather than end."""
        if Tier.SLEEPING in pool.barred:
            return False
        tiers = pool.preparer.tiers(pool.pool) | {Tier.SLEEPING}
        return choose_rung(pool.ladder, tiers, {}).tier is Tier.SLEEPING

    def advance(self, pool: PoolRecord, decision: Decision, now_s: float) -> None:
        """Look at a pool after its decision has been carried out."""
        pool.lift_bars(now_s)
        idle = is_idle(pool, decision, now_s)
        tiers = set(pool.preparer.tiers(pool.pool))
        if pool.count(State.DRAINING_TO_SLEEP, *ASLEEP):
            tiers.add(Tier.SLEEPING)
        pool.rung, pool.descent = descend(
            pool.ladder, tiers - set(pool.barred), pool.descent, idle, now_s
        )
        if idle is False:
            self.call_off(pool)
        if pool.rung is not None and pool.sleep_requested and pool.count(*ASLEEP):
            pool.rung = Rung(tier=Tier.SLEEPING)  # until somebody asks: an operator wants it so
        if pool.rung is None or pool.rung.tier is Tier.SLEEPING:
            return
        for record in list(pool.replicas.values()):
            if record.state is State.SLEEPING:
                self._actuator.apply(pool, record, Event.STOP)
        if all(record.state in ENDED_STATES for record in pool.replicas.values()):
            self._settle(pool, pool.rung.tier, now_s)

    def call_off(self, pool: PoolRecord) -> None:
        """End the change of a pool that is under way."""
        if pool.settling is not None:
            pool.settling.cancel()
            pool.settling = pool.settled_for = None

    def _settle(self, pool: PoolRecord, tier: Tier, now_s: float) -> None:
        if pool.settling is not None and not pool.settling.done():
            return
        where = pool.preparer.tier(pool.pool)
        looked_s = None if pool.looked_at_s is None else now_s - pool.looked_at_s
        # What was there may be gone: a standby dies, somebody evicts by hand.
        if looked_s is None or looked_s >= self._again_s:
            pool.looked_at_s = now_s
            work = self._look(pool)
        elif where is not tier and (pool.settled_for is not tier or now_s >= pool.settle_again_s):
            pool.settled_for, pool.settle_again_s = tier, now_s + self._again_s
            work = self._bring(pool, tier, again_s=now_s + self._again_s)
        else:
            return
        pool.settling = self._actuator.spawn(work, f"warmth of {pool.pool.name}")

    async def _look(self, pool: PoolRecord) -> None:
        try:
            await pool.preparer.look(pool.pool)
        finally:
            self._on_change()

    async def _bring(self, pool: PoolRecord, tier: Tier, again_s: float) -> None:
        try:
            await pool.preparer.settle(pool.pool, tier)
        except Unsupported as error:
            pool.bar(tier, str(error), None)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the pool is not in that tier
            text = self._errors.add(f"warmth of {pool.pool.name}", error)
            pool.bar(tier, text, again_s)
        finally:
            self._on_change()


def is_idle(pool: PoolRecord, decision: Decision, now_s: float) -> bool | None:
    """Whether a pool is at zero with nobody there; ``None`` where that is not known."""
    demand = pool.window.read(now_s)
    if decision.desired > 0 or pool.make_status().supply or pool.wake_signal:
        return False
    if demand.some_requests or demand.some_queued:
        return False
    if None in (demand.tokens, demand.requests, demand.arrivals_total):
        return None
    return True
