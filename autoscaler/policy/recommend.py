"""How many replicas each signal asks for: windows, backlog, forecast. Pure functions.

Where a replica's capacity is known, demand is the tokens per second that arrive, over what one
replica sustains; until then it is the tokens in flight and queued, over ``target_inflight_tokens``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from autoscaler.types import (
    Outlook,
    PoolPolicy,
    PoolStatus,
    ReplicaCapacity,
    Signal,
    TargetFigures,
    WindowedDemand,
)

ROUNDING = 1e-6
"""Parts of a replica that are error of the mean's arithmetic, and ask for no other replica."""
LEAST_TAIL = 1e-4
"""Chances below it are taken for it: no sample says anything of them."""
CANDIDATES = 64
DRAIN_PER_LEAD = 4.0
"""What queues up over a long start is worked off in this part of it. To do it in seconds takes many
times the replicas, which are wanted for these seconds only."""
CHANCE = 2.0
"""Standard deviations."""
PER_REPLICA = ("requests_per_s", "queued_requests")
HELD_AT = ("ttft_s", "itl_s", "e2e_s", "gpu_utilization_fraction")
TOLERANCE = 0.1
"""Kubernetes' own."""
MOST_RATIO = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Replicas recommended by one figure, and the figure in words. ``level``: the quantile of the
    forecast that they cover."""

    replicas: int
    signal: Signal
    text: str
    level: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRecommendations:
    """What the two windows recommend; ``None`` where nothing is known."""

    stable: Recommendation | None
    panic: Recommendation | None


def recommend(
    policy: PoolPolicy,
    demand: WindowedDemand,
    capacity: ReplicaCapacity | None = None,
    utilization_fraction: float = 1.0,
) -> WindowRecommendations:
    """What the stable and the panic window recommend, with replicas loaded to this part of their
    capacity."""
    tokens, requests = policy.target_inflight_tokens, policy.max_inflight_requests
    stable_s, panic_s = policy.stable_window_s, policy.panic_window_s
    came, lately = demand.stable_tokens_per_s, demand.panic_tokens_per_s
    if capacity is not None and came is not None and lately is not None:
        each, lasting = capacity.tokens_per_s * utilization_fraction, lasting_rate(demand, lately)
        stable = divide_rate(came, each, Signal.STABLE_TOKENS_PER_S, stable_s)
        panic = divide_rate(lasting, each, Signal.PANIC_TOKENS_PER_S, panic_s)
    else:
        stable = divide(demand.stable_tokens, tokens, Signal.STABLE_TOKENS, "token", stable_s)
        panic = divide(demand.panic_tokens, tokens, Signal.PANIC_TOKENS, "token", panic_s)
    return WindowRecommendations(
        stable=larger(
            stable,
            divide(demand.stable_requests, requests, Signal.STABLE_REQUESTS, "request", stable_s),
        ),
        panic=larger(
            panic,
            divide(demand.panic_requests, requests, Signal.PANIC_REQUESTS, "request", panic_s),
        ),
    )


def divide(
    mean: float | None, target: int | None, signal: Signal, noun: str, window_s: float
) -> Recommendation | None:
    """Replicas that carry ``mean`` at ``target`` each; ``None`` without either."""
    if mean is None or target is None or not math.isfinite(mean):
        return None
    number = f"{mean:.0f} {noun}" if round(mean) == 1 else f"{mean:.0f} {noun}s"
    text = f"{number} in flight and queued over {window_s:g} s, {target} per replica"
    return Recommendation(replicas=replicas_for(mean, target), signal=signal, text=text)


def divide_rate(
    rate: float | None, each: float, signal: Signal, window_s: float
) -> Recommendation | None:
    """Replicas that carry tokens arriving at this rate, at ``each`` tokens per second."""
    if rate is None or not math.isfinite(rate):
        return None
    text = f"{rate:.0f} tokens/s arrived over {window_s:g} s, {each:.0f} per replica"
    return Recommendation(replicas=replicas_for(rate, each), signal=signal, text=text)


def replicas_for(load: float, each: float) -> int:
    """The fewest replicas that carry a load."""
    return math.ceil(max(load, 0.0) / each - ROUNDING)


def larger(one: Recommendation | None, other: Recommendation | None) -> Recommendation | None:
    """The one with more replicas, of those that are known."""
    if one is None or (other is not None and other.replicas > one.replicas):
        return other
    return one


def recommend_for_backlog(
    policy: PoolPolicy, status: PoolStatus, demand: WindowedDemand, capacity: ReplicaCapacity
) -> Recommendation | None:
    """What it takes to work off what is queued within ``backlog_s``.

    Replicas that are there count at once, those on their way from when they are expected, so that
    a start in progress is not asked for again. More are only worth it for what is still queued when
    they could be ready.
    """
    queued, rate = demand.queued_tokens, demand.panic_tokens_per_s
    if not queued or rate is None:
        return None
    each = capacity.tokens_per_s
    wanted = min(status.supply, replicas_for(rate + queued / policy.backlog_s, each))
    left, serving, now_s = float(queued), status.ready, 0.0
    lead_s = status.lead_s or 0.0
    lasting = lasting_rate(demand, rate)
    for arrives_s in (*sorted(one for one in status.arriving_s if one < lead_s), lead_s):
        left = max(0.0, left + (lasting - serving * each) * (arrives_s - now_s))
        now_s = arrives_s
        serving += 1
    if left > 0.0:
        within_s = max(policy.backlog_s, lead_s / DRAIN_PER_LEAD)
        wanted = max(wanted, replicas_for(lasting + left / within_s, each))
    text = f"{queued} tokens queued, to be worked off in {policy.backlog_s:g} s"
    return Recommendation(replicas=wanted, signal=Signal.BACKLOG, text=text)


def lasting_rate(demand: WindowedDemand, panic: float) -> float:
    """What of the panic window's tokens per second is more than chance, and so taken to last.

    Requests do not come evenly, and differ in size: an excess over the stable window of less than
    ``CHANCE`` standard deviations of the windows before is none, and of a larger one the part
    ``1 - chance² / excess²`` is kept (as in the positive-part James-Stein estimate).
    """
    stable, deviation = demand.stable_tokens_per_s, demand.panic_deviation_tokens_per_s
    if stable is None or deviation is None or panic <= stable:
        return panic
    excess, chance = panic - stable, CHANCE * deviation
    return stable + max(0.0, 1.0 - (chance / excess) ** 2) * excess


def recommend_for_targets(
    policy: PoolPolicy, status: PoolStatus, seen: TargetFigures
) -> Recommendation | None:
    """What the targets that the pool's settings give ask for; the largest, ``None`` without any.

    A number of the whole pool is divided by its target for one replica. A figure that is a quantile
    or a mean over replicas is held at its target as Kubernetes' HPA does it: the ready replicas
    times the ratio of the two, unless that is within ``TOLERANCE`` of 1; at most twice as many, for
    latency does not grow in proportion to load.
    """
    best: Recommendation | None = None
    for name in PER_REPLICA:
        target, value = getattr(policy.targets, name), getattr(seen, name)
        if target is not None and value is not None and math.isfinite(value):
            text = f"{name} is {value:g}, {target:g} per replica"
            found = Recommendation(
                replicas=replicas_for(value, target), signal=Signal.TARGET, text=text
            )
            best = larger(best, found)
    for name in HELD_AT:
        target, value = getattr(policy.targets, name), getattr(seen, name)
        if target is None or value is None or not math.isfinite(value) or not status.ready:
            continue
        ratio = value / target
        replicas = status.ready
        if abs(ratio - 1.0) > TOLERANCE:
            replicas = math.ceil(status.ready * min(ratio, MOST_RATIO) - ROUNDING)
        text = f"{name} is {value:.3g}, {target:g} is the target, with {status.ready} ready"
        best = larger(best, Recommendation(replicas=replicas, signal=Signal.TARGET, text=text))
    return best


def recommend_for_forecast(
    policy: PoolPolicy, outlook: Outlook, capacity: ReplicaCapacity
) -> Recommendation:
    """What the highest demand until a new replica would serve asks for."""
    levels, rates, each = outlook.levels, outlook.tokens_per_s, capacity.tokens_per_s
    replicas, level = provision(levels, rates, each, policy.violated_second)
    text = (
        f"{value_at(levels, rates, level):.0f} tokens/s at most within {outlook.lead_s:.0f} s with "
        f"a chance of {level:.1%} ({outlook.model}), {each:.0f} per replica"
    )
    return Recommendation(replicas=replicas, signal=Signal.FORECAST, text=text, level=level)


@lru_cache(maxsize=4_096)  # a forecast is decided on each second, and made twice a minute
def provision(
    levels: tuple[float, ...],
    tokens_per_s: tuple[float, ...],
    each: float,
    violated_second: float,
) -> tuple[int, float]:
    """The replicas of least expected cost for a demand that is known by its quantiles, and the
    quantile they cover.

    A replica-second costs 1. While demand is above what the replicas carry, a queue grows and all
    requests are late, so each such second costs ``violated_second`` for each replica's worth of
    demand. The sum of both is least where the density of demand falls below their ratio: a
    newsvendor whose loss does not grow with the shortage. There is no quantile to set.
    """
    needs = [value / each for value in tokens_per_s]
    load = max(1.0, value_at(levels, needs, 0.5))
    tail = [math.log(max(1.0 - level, LEAST_TAIL)) for level in levels]
    low = math.ceil(needs[0] - ROUNDING)
    last = len(needs) - 1
    slope = (needs[last] - needs[max(0, last - 2)]) / max(tail[max(0, last - 2)] - tail[last], 1e-9)
    high = math.ceil(needs[last] + slope * max(0.0, tail[last] - math.log(LEAST_TAIL)))
    step = max(1, (high - low) // CANDIDATES)
    best, best_cost, best_tail = max(1, low), math.inf, 0.0
    for replicas in range(max(1, low), max(1, low, high) + step, step):
        chance = math.exp(log_tail(needs, tail, float(replicas), slope))
        cost = replicas + violated_second * load * chance
        if cost < best_cost - ROUNDING:
            best, best_cost, best_tail = replicas, cost, chance
    return best, 1.0 - best_tail


def log_tail(needs: Sequence[float], tail: Sequence[float], replicas: float, slope: float) -> float:
    """The logarithm of the chance that more than so many are needed: linear between quantiles, and
    beyond the last as steep as before it."""
    if replicas < needs[0]:
        return 0.0
    for index in range(1, len(needs)):
        if replicas < needs[index]:
            span = needs[index] - needs[index - 1]
            part = (replicas - needs[index - 1]) / span
            return tail[index - 1] + part * (tail[index] - tail[index - 1])
    if slope <= 0.0:
        return math.log(LEAST_TAIL)
    return max(math.log(LEAST_TAIL), tail[-1] - (replicas - needs[-1]) / slope)


def value_at(levels: Sequence[float], values: Sequence[float], level: float) -> float:
    """The value at a level between those that are known; beyond them the outermost."""
    if level <= levels[0]:
        return values[0]
    for index in range(1, len(levels)):
        if level <= levels[index]:
            part = (level - levels[index - 1]) / (levels[index] - levels[index - 1])
            return values[index - 1] + part * (values[index] - values[index - 1])
    return values[-1]
