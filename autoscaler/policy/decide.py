"""How many replicas a pool shall have: one pure function of what is known, and when.

The number is the largest of what the forecast recommends (demand at its highest until a new
replica would serve), and what the windows and the backlog do. A forecast that is trusted brings the
headroom with it; without one replicas are loaded to ``target_utilization_fraction``. Scaling down
is limited by what must not be cut (requests, starting replicas, unknown demand, a panic, without a
forecast the scale-down delay), and the number is bounded by ``min_replicas`` and ``max_replicas``.
Each step can only change the number together with the reason for it, so the decision explains
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoscaler.policy.recommend import (
    Recommendation,
    WindowRecommendations,
    larger,
    recommend,
    recommend_for_backlog,
    recommend_for_forecast,
    recommend_for_targets,
)
from autoscaler.types import (
    Bound,
    Decision,
    DecisionInputs,
    Outlook,
    PoolPolicy,
    PoolStatus,
    ReplicaCapacity,
    ScaleReason,
    Signal,
    TargetFigures,
    WindowedDemand,
)

RECENT_BUCKETS = 64
NOTHING_SEEN = TargetFigures()


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRecommendation:
    """The most replicas that were recommended in a stretch of time that began at ``at_s``."""

    at_s: float
    until_s: float
    replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DecideState:
    """What one decision remembers for the next.

    ``active_at_s``: when a request was last known of. ``panic_until_s``: the end of the panic, if
    there is one, and ``panic_peak`` the most it recommended. ``recent``: recommendations of the
    scale-down delay, oldest first, bounded in number.
    """

    arrivals_total: int | None = None
    active_at_s: float | None = None
    panic_until_s: float | None = None
    panic_peak: int = 0
    recent: tuple[PastRecommendation, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """A number on its way to a decision, with the reason it has so far."""

    desired: int
    reason: ScaleReason
    detail: str
    signal: Signal = Signal.NONE
    bound: Bound | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendations:
    """All that the number is made from. ``forecast`` is ``None`` without one that is trusted, and
    ``fallback`` says why."""

    windows: WindowRecommendations
    extra: Recommendation | None = None
    """The larger of what the backlog and the pool's targets ask for."""
    forecast: Recommendation | None = None
    fallback: str = ""


def decide(
    policy: PoolPolicy,
    status: PoolStatus,
    demand: WindowedDemand,
    state: DecideState,
    now_s: float,
    *,
    capacity: ReplicaCapacity | None = None,
    outlook: Outlook | None = None,
    seen: TargetFigures = NOTHING_SEEN,
) -> tuple[Decision, DecideState]:
    """How many replicas the pool shall have at ``now_s``, why, and what to remember.

    ``capacity`` and ``outlook`` are ``None`` where they are not known: then it reacts alone.
    ``seen`` are the figures that the policy may have targets for.
    """
    arrived = has_arrived(demand, state)
    active = demand.some_requests or demand.some_queued or arrived or status.wake_signal
    state = remember_activity(state, demand, active, now_s)
    found = recommend_all(policy, status, demand, capacity, outlook, seen)
    windows = found.windows
    state = watch_panic(policy, status, windows, state, now_s)
    panicking = state.panic_until_s is not None

    reactive = propose(status, found, state)
    delay_s = policy.delay_s(status.lead_s)
    state = remember_recommendation(state, reactive.desired, delay_s, now_s)
    proposal = look_ahead(status, found, reactive)
    if active:
        proposal = wake(status, proposal, demand)
    if proposal.desired < status.supply:
        proposal = limit_scale_down(policy, status, demand, found, proposal, state, now_s)
    if not active and policy.min_replicas == 0:
        proposal = scale_to_zero(policy, status, demand, proposal, state, now_s)
    proposal = apply_bounds(policy, status, proposal)
    if status.sleep_requested and not (arrived or status.wake_signal or demand.some_queued):
        proposal = Proposal(
            desired=0,
            reason=ScaleReason.SLEEP_REQUESTED,
            detail="an operator put it to sleep, and no request has come since",
        )
    elif status.override is not None:
        proposal = apply_override(status, demand, proposal, status.override, active=active)
    forecast = found.forecast
    decision = Decision(
        pool=policy.pool,
        at_s=now_s,
        desired=proposal.desired,
        supply=status.supply,
        reason=proposal.reason,
        detail=proposal.detail,
        signal=proposal.signal,
        bound=proposal.bound,
        panicking=panicking,
        reactive=None if windows.stable is None else reactive.desired,
        forecast=None if forecast is None else forecast.replicas,
        level=None if forecast is None else forecast.level,
        capacity=capacity,
        fallback=found.fallback,
        inputs=DecisionInputs(
            policy=policy,
            status=status,
            demand=demand,
            outlook=outlook,
            rules=tuple(
                [
                    (one.signal, one.replicas)
                    for one in (windows.stable, windows.panic, found.extra, forecast)
                    if one is not None
                ]
            ),
        ),
    )
    return decision, state


def recommend_all(
    policy: PoolPolicy,
    status: PoolStatus,
    demand: WindowedDemand,
    capacity: ReplicaCapacity | None,
    outlook: Outlook | None,
    seen: TargetFigures,
) -> Recommendations:
    """What each signal recommends."""
    fallback = ""
    if outlook is None:
        fallback = "there is no forecast yet"
    elif outlook.distrust:
        fallback = outlook.distrust
    elif capacity is None:
        fallback = "what one replica carries is not known yet"
    share = 1.0 if not fallback else policy.target_utilization_fraction
    windows = recommend(policy, demand, capacity, share)
    backlog = None
    if capacity is not None:
        backlog = recommend_for_backlog(policy, status, demand, capacity)
    extra = larger(backlog, recommend_for_targets(policy, status, seen))
    if fallback or outlook is None or capacity is None:
        return Recommendations(windows=windows, extra=extra, fallback=fallback)
    forecast = recommend_for_forecast(policy, outlook, capacity)
    return Recommendations(windows=windows, extra=extra, forecast=forecast)


def hold_back(decision: Decision, status: PoolStatus, policy: PoolPolicy, mode: str) -> Decision:
    """The decision in a mode that does not carry it out: what there is stays, but a request that
    waits still wakes the pool, and ``min_replicas`` and operators are obeyed."""
    if mode == "auto" or status.override is not None or status.sleep_requested:
        return decision
    kept = max(status.supply, policy.min_replicas)
    if decision.reason is ScaleReason.WAKE:
        kept = max(kept, 1)
    return replace(
        decision,
        desired=kept,
        reason=ScaleReason(mode),
        detail=f"would have {decision.desired} ({decision.detail})",
        recommended=decision.desired,
    )


def decide_removed(
    policy: PoolPolicy, status: PoolStatus, demand: WindowedDemand, state: DecideState, now_s: float
) -> tuple[Decision, DecideState]:
    """The same for a pool that was removed: what its last requests need, then nothing."""
    some = demand.some_requests or demand.some_queued
    if some:
        free = replace(policy, min_replicas=0, max_replicas=max(1, policy.max_replicas))
        decision, state = decide(free, status, demand, state, now_s)
        detail = f"the pool was removed; until its requests are answered: {decision.detail}"
        return replace(decision, reason=ScaleReason.REMOVED, detail=detail), state
    known = not is_unknown(demand)
    decision = Decision(
        pool=policy.pool,
        at_s=now_s,
        desired=0 if known else status.supply,
        supply=status.supply,
        reason=ScaleReason.REMOVED if known else ScaleReason.UNKNOWN_DEMAND,
        detail="the pool was removed and has no request left"
        if known
        else "the pool was removed, and whether it has requests left is unknown",
        bound=None if known else Bound.UNKNOWN_DEMAND,
    )
    return decision, state


def note_replacement(decision: Decision, outdated: int, *, no_capacity: bool) -> Decision:
    """The decision with a word on its outdated replicas, while there are any."""
    if not outdated:
        return decision
    detail = f"{decision.detail}; {outdated} with earlier start-up arguments to be replaced"
    if no_capacity:
        detail += ", one after the other: there is no capacity for a new one beside them"
        return replace(decision, detail=detail, bound=Bound.NO_CAPACITY)
    return replace(decision, detail=detail)


def has_arrived(demand: WindowedDemand, state: DecideState) -> bool:
    """Whether requests came since the last decision, even if they have gone again.

    A counter that went backwards was reset, so something may have come; one that is unknown says
    nothing.
    """
    if demand.arrivals_total is None:
        return False
    if state.arrivals_total is None:
        return demand.arrivals_total > 0
    return demand.arrivals_total != state.arrivals_total


def remember_activity(
    state: DecideState, demand: WindowedDemand, active: bool, now_s: float
) -> DecideState:
    """The state with the arrivals seen, and the time of activity moved if there is any."""
    seen = state.arrivals_total if demand.arrivals_total is None else demand.arrivals_total
    began_s = now_s if active or state.active_at_s is None else state.active_at_s
    return replace(state, arrivals_total=seen, active_at_s=began_s)


def watch_panic(
    policy: PoolPolicy,
    status: PoolStatus,
    windows: WindowRecommendations,
    state: DecideState,
    now_s: float,
) -> DecideState:
    """Enter, prolong or leave the panic. ``propose`` then holds the number at its peak, and
    ``limit_scale_down`` keeps what the panic window recommends, in a panic or not.

    A pool with ``max_replicas`` of 1 cannot grow in a panic, so it has none. A panic lasts a stable
    window past the last moment over the threshold, so that when it ends the stable mean has seen
    all of the burst: what follows is not a fall to the mean of before.
    """
    panic = windows.panic
    over = (
        panic is not None
        and panic.replicas / max(1, status.ready) >= policy.panic_threshold
        and policy.max_replicas > 1
    )
    if not over and state.panic_until_s is not None and now_s >= state.panic_until_s:
        return replace(state, panic_until_s=None, panic_peak=0)
    if not over and state.panic_until_s is None:
        return state
    known = [one.replicas for one in (panic, windows.stable) if one is not None]
    held = min(status.supply, policy.max_replicas)
    peak = min(max([state.panic_peak, held, *known]), policy.max_replicas)
    until_s = now_s + policy.stable_window_s if over else state.panic_until_s
    return replace(state, panic_until_s=until_s, panic_peak=peak)


def propose(status: PoolStatus, found: Recommendations, state: DecideState) -> Proposal:
    """What demand recommends by itself, before scaling down is limited.

    In a panic (``watch_panic``) the larger of the two windows counts, and nothing below the peak.
    """
    windows, extra = found.windows, found.extra
    stable = windows.stable
    if stable is None:
        return Proposal(
            desired=status.supply,
            reason=ScaleReason.UNKNOWN_DEMAND,
            detail="demand is unknown, so the replicas there are stay",
            bound=Bound.UNKNOWN_DEMAND,
        )
    best = larger(stable, extra) or stable
    if state.panic_until_s is not None:
        best = larger(best, windows.panic) or best
        if state.panic_peak > best.replicas:
            return Proposal(
                desired=state.panic_peak,
                reason=ScaleReason.PANIC,
                detail=f"a burst needed {state.panic_peak}; none is removed while it may last",
                signal=best.signal,
                bound=Bound.PANIC,
            )
    reason = ScaleReason.STEADY
    if best.replicas > status.supply:
        panicking = state.panic_until_s is not None
        reason = ScaleReason.PANIC if panicking else ScaleReason.DEMAND
    elif best.replicas < status.supply:
        reason = ScaleReason.SCALE_DOWN
    return Proposal(desired=best.replicas, reason=reason, detail=best.text, signal=best.signal)


def look_ahead(status: PoolStatus, found: Recommendations, reactive: Proposal) -> Proposal:
    """The forecast's number where it is larger than what demand recommends by itself."""
    forecast = found.forecast
    if forecast is None or forecast.replicas <= reactive.desired:
        return reactive
    reason = ScaleReason.FORECAST
    if forecast.replicas < status.supply:
        reason = ScaleReason.SCALE_DOWN
    return Proposal(
        desired=forecast.replicas, reason=reason, detail=forecast.text, signal=forecast.signal
    )


def remember_recommendation(
    state: DecideState, replicas: int, delay_s: float, now_s: float
) -> DecideState:
    """The state with this one added, those past the delay dropped, and neighbours merged."""
    width_s = delay_s / RECENT_BUCKETS
    since_s = now_s - delay_s
    recent = [one for one in state.recent if one.until_s >= since_s]
    newest = PastRecommendation(at_s=now_s, until_s=now_s, replicas=replicas)
    if recent and (now_s - recent[-1].at_s < width_s or recent[-1].replicas == replicas):
        last = recent.pop()
        newest = PastRecommendation(
            at_s=last.at_s, until_s=now_s, replicas=max(last.replicas, replicas)
        )
    return replace(state, recent=(*recent, newest))


def wake(status: PoolStatus, proposal: Proposal, demand: WindowedDemand) -> Proposal:
    """At least one replica as soon as there is a request, even one that has gone again."""
    if status.supply > 0 and proposal.desired > 0:
        return proposal
    if demand.some_requests or demand.some_queued or status.wake_signal:
        signal, detail = Signal.HELD, "a request is held or in flight"
    else:
        signal, detail = Signal.ARRIVALS, "a request came since the last decision"
    if status.supply > 0:
        return Proposal(
            desired=1, reason=ScaleReason.BUSY, detail=detail, signal=signal, bound=Bound.NEVER_ZERO
        )
    desired = max(1, proposal.desired)
    if proposal.desired > 1:
        detail = f"{detail}; {proposal.detail}"
    return Proposal(desired=desired, reason=ScaleReason.WAKE, detail=detail, signal=signal)


def limit_scale_down(
    policy: PoolPolicy,
    status: PoolStatus,
    demand: WindowedDemand,
    found: Recommendations,
    proposal: Proposal,
    state: DecideState,
    now_s: float,
) -> Proposal:
    """Put off as much of a scale-down as must wait.

    What the panic window recommends stays outside a panic (``watch_panic``) too: the load of the
    last seconds needs it. What the forecast recommends is needed before a replica that is given up
    now could be back, which tells a lull from an end; without a forecast the scale-down delay does.
    """
    if is_unknown(demand):
        return replace(
            proposal,
            desired=status.supply,
            reason=ScaleReason.UNKNOWN_DEMAND,
            detail="demand is unknown, which is never a reason to remove a replica",
            bound=Bound.UNKNOWN_DEMAND,
        )
    panic = found.windows.panic
    if panic is not None and panic.replicas > proposal.desired:
        proposal = Proposal(
            desired=min(panic.replicas, status.supply),
            reason=ScaleReason.STEADY
            if panic.replicas >= status.supply
            else ScaleReason.SCALE_DOWN,
            detail=panic.text,
            signal=panic.signal,
        )
    delay_s = policy.delay_s(status.lead_s)
    past = [one.replicas for one in state.recent if one.until_s >= now_s - delay_s]
    most = max(past, default=0) if found.forecast is None else 0
    if delay_s > 0 and most > proposal.desired:
        proposal = replace(
            proposal,
            desired=min(most, status.supply),
            reason=ScaleReason.SCALE_DOWN_DELAYED,
            detail=f"{proposal.detail}; the largest recommendation of the last "
            f"{delay_s:g} s is {most}",
            bound=Bound.SCALE_DOWN_DELAY,
        )
    least = status.supply - policy.max_scale_down_per_tick
    if proposal.desired < least:
        proposal = replace(
            proposal,
            desired=least,
            bound=Bound.MAX_SCALE_DOWN,
            detail=f"{proposal.detail}; at most {policy.max_scale_down_per_tick} are removed at "
            "once",
        )
    # With none ready a request waits for those that load. Else they go before any that is ready.
    there = status.supply - status.scheduled
    if status.loading and not status.ready and proposal.desired < there:
        return replace(
            proposal,
            desired=there,
            reason=ScaleReason.STARTING,
            detail=f"{proposal.detail}; a replica is loading, none is removed before it is ready",
            bound=Bound.STARTING,
        )
    return proposal


def scale_to_zero(
    policy: PoolPolicy,
    status: PoolStatus,
    demand: WindowedDemand,
    proposal: Proposal,
    state: DecideState,
    now_s: float,
) -> Proposal:
    """Go to zero, or stay there, only when idle long enough and nothing is on its way. Ahead of a
    request that is expected there is one replica."""
    if status.prewarm and proposal.desired <= 1:
        return Proposal(desired=1, reason=ScaleReason.PREWARM, detail=status.prewarm)
    if status.prewarm:
        return proposal
    # A forecast is of one replica at least: whether that pays at zero is what ``prewarm`` says.
    if status.supply == 0 and (proposal.desired == 0 or proposal.signal is Signal.FORECAST):
        return Proposal(desired=0, reason=ScaleReason.AT_ZERO, detail="scaled to zero, no demand")
    if proposal.reason is ScaleReason.UNKNOWN_DEMAND:
        return proposal
    if status.loading:
        if proposal.desired > 0:
            return proposal
        text = f"{proposal.detail}; a replica is loading, so it does not go to zero"
        return replace(proposal, desired=1, detail=text, bound=Bound.STARTING)
    if is_unknown(demand) or demand.arrivals_total is None:
        if proposal.desired > 0:
            return proposal
        return replace(
            proposal,
            desired=1,
            reason=ScaleReason.UNKNOWN_DEMAND,
            detail="demand is unknown, which is never a reason to go to zero",
            bound=Bound.UNKNOWN_DEMAND,
        )
    moments = [at_s for at_s in (state.active_at_s, status.ready_at_s) if at_s is not None]
    if now_s - max(moments, default=now_s) >= policy.idle_to_zero_s:
        return Proposal(
            desired=0,
            reason=ScaleReason.IDLE_TO_ZERO if status.supply else ScaleReason.AT_ZERO,
            detail=f"no request for {describe_idle(policy)}",
        )
    if proposal.desired > 0:
        return proposal
    return replace(
        proposal,
        desired=1,
        reason=ScaleReason.IDLE,
        detail=f"no request; to zero after {describe_idle(policy)}",
        bound=Bound.IDLE_TO_ZERO,
    )


def describe_idle(policy: PoolPolicy) -> str:
    """How long a pool runs without a request, and why."""
    text = (
        f"{policy.idle_to_zero_s:.3g} s" if policy.idle_reason else f"{policy.idle_to_zero_s:g} s"
    )
    return f"{text} ({policy.idle_reason})" if policy.idle_reason else text


def apply_bounds(policy: PoolPolicy, status: PoolStatus, proposal: Proposal) -> Proposal:
    """Keep the number between the pool's bounds, and its growth below the limit per decision."""
    most_now = max(status.supply, policy.min_replicas) + policy.max_scale_up_per_tick
    if proposal.desired < policy.min_replicas:
        return replace(
            proposal,
            desired=policy.min_replicas,
            reason=ScaleReason.MINIMUM,
            bound=Bound.MIN_REPLICAS,
            detail=f"{proposal.detail}; min_replicas is {policy.min_replicas}",
        )
    if proposal.desired > policy.max_replicas:
        proposal = replace(
            proposal,
            desired=policy.max_replicas,
            bound=Bound.MAX_REPLICAS,
            detail=f"{proposal.detail}; {proposal.desired} recommended, max_replicas is "
            f"{policy.max_replicas}",
        )
    if proposal.desired > most_now:
        proposal = replace(
            proposal,
            desired=most_now,
            bound=Bound.MAX_SCALE_UP,
            detail=f"{proposal.detail}; at most {policy.max_scale_up_per_tick} are started at once",
        )
    return proposal


def apply_override(
    status: PoolStatus, demand: WindowedDemand, proposal: Proposal, override: int, *, active: bool
) -> Proposal:
    """Put the operator's number in place of the recommended one.

    Zero means "at zero until a request comes": it waits for requests that are held, in flight or
    unknown, and one that comes later still wakes the pool. No number cuts an answer. A download of
    the model that is under way is cancelled: what has come of it is kept.
    """
    if override > 0:
        return Proposal(
            desired=override,
            reason=ScaleReason.OVERRIDE,
            detail=f"an operator asked for {override}; without that: {proposal.desired}",
            signal=Signal.OVERRIDE,
        )
    obstacle = None
    if active:
        obstacle = "a request is held or in flight"
    elif status.starting or status.waking:
        obstacle = "a replica is loading"
    elif is_unknown(demand) and status.supply > 0:
        obstacle = "demand is unknown"
    if obstacle is not None:
        return Proposal(
            desired=1,
            reason=ScaleReason.OVERRIDE_WAITS,
            detail=f"an operator asked for 0, but {obstacle}",
            signal=Signal.OVERRIDE,
            bound=Bound.NEVER_ZERO,
        )
    return Proposal(
        desired=0,
        reason=ScaleReason.OVERRIDE,
        detail="an operator asked for 0",
        signal=Signal.OVERRIDE,
    )


def is_unknown(demand: WindowedDemand) -> bool:
    """Whether any part of the demand of this moment is not known."""
    return demand.tokens is None or demand.requests is None
