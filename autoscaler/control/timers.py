"""Raises the lifecycle events that come with time: starts that are due, time limits reached."""

from __future__ import annotations

from collections.abc import Mapping

from autoscaler.backends.base import BackendError
from autoscaler.control.actuator import Actuator
from autoscaler.control.replicas import PoolRecord, ReplicaRecord, describe_phase
from autoscaler.policy.lifecycle import Event, State
from autoscaler.settings import AutoscalerSettings
from autoscaler.types import ReplicaLoad


class Timers:
    """Time limits and due starts of replicas. ``drain_s`` is how long a drain may take."""

    def __init__(self, settings: AutoscalerSettings, actuator: Actuator) -> None:
        self.drain_s = settings.drain_s
        self.settings = settings
        self._actuator = actuator

    def advance(self, pool: PoolRecord, loads: Mapping[str, ReplicaLoad], now_s: float) -> None:
        """Apply the time limits that replicas of a pool have reached."""
        for record in list(pool.replicas.values()):
            # An externally managed server that is drained by hand stays so until it is taken back.
            leaving = pool.removed or pool.is_outdated(record)
            if record.backend.owns_replicas or leaving:
                self._advance_one(pool, record, loads.get(record.id), now_s)

    def _advance_one(
        self, pool: PoolRecord, record: ReplicaRecord, load: ReplicaLoad | None, now_s: float
    ) -> None:
        in_state_s = now_s - record.since_s
        match record.state:
            case State.PREPARING if in_state_s >= pool.prepare_timeout_s:
                text = (
                    f"its model is not here after {pool.prepare_timeout_s:g} s "
                    f"(prepare_timeout_s); it was at: {describe_phase(record)}"
                )
                self._actuator.apply(pool, record, Event.TIMED_OUT, text)
            case State.STARTING if in_state_s >= pool.start_timeout_s:
                last = f"; it was at: {record.probe.phase}" if record.probe.phase else ""
                text = f"not ready after {pool.start_timeout_s:g} s (start_timeout_s){last}"
                self._actuator.apply(pool, record, Event.TIMED_OUT, text)
            case State.UNHEALTHY if in_state_s >= self.settings.unhealthy_restart_s:
                text = f"unhealthy for {in_state_s:.0f} s: {record.error or 'no answer'}"
                self._actuator.apply(pool, record, Event.TIMED_OUT, text)
            case State.DRAINING | State.DRAINING_TO_SLEEP if self._is_drained(record, load, now_s):
                self._actuator.apply(pool, record, Event.DRAINED)
            case State.DRAINING if in_state_s >= self.drain_s:
                self._actuator.apply(pool, record, Event.DRAINED)
            case State.DRAINING_TO_SLEEP if in_state_s >= self.drain_s:
                # Sleep can be cancelled, so no answer is cut for it.
                text = f"{record.id} still has requests after {self.drain_s:g} s (drain_s)"
                record.sleep_error = BackendError(text)
                pool.sleep_requested = False
                self._actuator.apply(pool, record, Event.KEEP)
            case State.READY if (
                in_state_s >= self.settings.backoff_reset_s and not pool.is_outdated(record)
            ):
                pool.failures, pool.retry_at_s, pool.error = 0, None, None
            case _:
                pass

    def _is_drained(self, record: ReplicaRecord, load: ReplicaLoad | None, now_s: float) -> bool:
        """Whether a replica surely has no request left. Unknown is not none."""
        draining_s = 0.0 if record.drain_at_s is None else now_s - record.drain_at_s
        known = load is not None and load.inflight_requests == 0
        return known and draining_s >= self.settings.drain_settle_s

    def start_due(self, pool: PoolRecord, now_s: float) -> None:
        """Start what is due. While an engine keeps failing, one start at a time is enough."""
        for record in list(pool.replicas.values()):
            if record.state is not State.SCHEDULED or now_s < record.not_before_s:
                continue
            if not record.backend.owns_replicas:
                self._actuator.apply(pool, record, Event.FOUND)
                continue
            waiting = pool.retry_at_s is not None and now_s < pool.retry_at_s
            if pool.failures and (waiting or pool.count(State.PREPARING, State.STARTING)):
                continue
            self._actuator.apply(pool, record, Event.DUE)
