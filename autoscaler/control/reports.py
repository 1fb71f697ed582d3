"""Pools and replicas as others see them: the data path, and ``tidegate status``."""

from __future__ import annotations

from collections import Counter

from autoscaler.backends.base import Probe
from autoscaler.control import start_steps
from autoscaler.control.replicas import PoolRecord, ReplicaRecord
from autoscaler.policy.lifecycle import ENDED_STATES, PUBLIC, State
from autoscaler.settings import PoolSettings
from autoscaler.types import PoolReport, ReplicaReport
from router.types import Pool, Replica, ReplicaState

PUBLISHED = frozenset(State) - {State.SCHEDULED, State.PREPARING} - ENDED_STATES
NEAREST_FIRST = tuple(reversed(start_steps.STEPS_TO_READY))


def publish_pool(pool: PoolRecord) -> Pool:
    """A pool as the data path sees it, with every replica that has an address and has not ended.
    Its phase is that of the replica nearest to ready."""
    coming = [
        (step_of(one), one)
        for one in pool.replicas.values()
        if step_of(one) in start_steps.STEPS_TO_READY
    ]
    step, nearest = min(coming, key=lambda one: NEAREST_FIRST.index(one[0]), default=("", None))
    failures = pool.failures
    failed_starts, cause = pool.failing()
    phase = "" if nearest is None else start_steps.describe_step(step, nearest.progress, failures)
    return Pool(
        name=pool.pool.name,
        aliases=pool.pool.aliases,
        adapters=pool.pool.adapters,
        max_model_len_tokens=pool.pool.max_model_len_tokens or pool.reported_len_tokens,
        replicas=tuple(
            Replica(
                id=record.id,
                pool=record.pool,
                url=record.probe.url,
                state=PUBLIC[record.state],
                served_model=record.probe.served_model,
                max_model_len_tokens=record.probe.max_model_len_tokens,
                max_inflight_requests=pool.pool.max_inflight_requests,
                max_inflight_tokens=pool.pool.max_inflight_tokens,
                headers=record.probe.headers,
                stream_usage=record.probe.stream_usage,
                names=find_own_names(pool.pool, record.probe),
            )
            for record in pool.replicas.values()
            if record.state in PUBLISHED and record.probe.url is not None
        ),
        wake_eta_s=pool.estimate_wake_s(),
        phase=phase,
        failed_starts=failed_starts,
        cause=cause,
        draining=pool.removed,
        disabled=pool.disabled,
    )


def find_own_names(pool: PoolSettings, probe: Probe) -> tuple[str, ...]:
    """The names of a pool that a replica knows models by: its adapters, and those it lists."""
    return tuple(name for name in pool.names if name in pool.adapters or name in probe.listed)


def report_pool(pool: PoolRecord) -> PoolReport:
    """One pool as ``tidegate status`` shows it."""
    states = Counter(PUBLIC[record.state] for record in pool.replicas.values())
    decision = pool.history.latest
    return PoolReport(
        name=pool.pool.name,
        desired=0 if decision is None else decision.desired,
        override=pool.override,
        ready=states[ReplicaState.READY],
        starting=states[ReplicaState.STARTING] + states[ReplicaState.WAKING],
        unhealthy=states[ReplicaState.UNHEALTHY],
        draining=states[ReplicaState.DRAINING],
        sleeping=states[ReplicaState.SLEEPING],
        wake_eta_s=pool.estimate_wake_s(),
        last_decision=decision,
        replicas=tuple(
            report_replica(one, outdated=pool.is_outdated(one)) for one in pool.replicas.values()
        ),
        failures=pool.failures,
        retry_at_s=pool.retry_at_s if pool.failures else None,
        error=pool.error,
        tier=pool.tier(),
        tiers=pool.tiers.report(pool.tier()) if pool.backend.owns_replicas else (),
        step_down_at_s=pool.tiers.step_down_at_s,
        max_replicas=pool.pool.max_replicas,
        crashes=pool.crashes,
        removed=pool.removed,
        disabled=pool.disabled,
        slug=pool.slug,
        last_change=pool.history.change,
    )


def report_replica(record: ReplicaRecord, *, outdated: bool) -> ReplicaReport:
    """One replica as ``tidegate status`` shows it."""
    probe = record.probe
    return ReplicaReport(
        id=record.id,
        pool=record.pool,
        state=PUBLIC[record.state],
        since_s=record.since_s,
        phase=describe_phase(record),
        step=step_of(record),
        progress=record.progress,
        woken_from=record.woken_from,
        url=probe.url,
        pid=probe.pid,
        served_model=probe.served_model,
        gpus=probe.gpus,
        cpus=probe.cpus,
        pod=probe.pod,
        node=probe.node,
        error=record.error,
        outdated=outdated,
    )


def step_of(record: ReplicaRecord) -> str:
    """The step a replica on its way to ready is at, in one word; nothing for any other."""
    return start_steps.name_step(record.state, record.progress, record.probe.phase)


def describe_phase(record: ReplicaRecord) -> str:
    """What a replica is doing, where its state alone does not say."""
    match record.state:
        case State.SCHEDULED:
            return "waits for its start"
        case State.PREPARING:
            return start_steps.describe_step(step_of(record), record.progress)
        case State.STARTING if record.progress is not None:
            beside = start_steps.describe_progress(record.progress)
            return f"{record.probe.phase} ({beside})" if record.probe.phase else beside
        case State.STARTING:
            phase, cause = record.probe.phase, record.probe.cause
            return f"{phase}: {cause}" if cause else phase
        case State.DRAINING_TO_SLEEP | State.FALLING_ASLEEP:
            return record.state.value.replace("_", " ")
        case _:
            return ""
