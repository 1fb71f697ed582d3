"""The replicas a pool's demand asks for: the mean of a window over what one replica carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaler.types import PoolPolicy, Signal, WindowedDemand

ROUNDING = 1e-6
"""Parts of a replica that are error of the mean's arithmetic, and ask for no other replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Replicas recommended by one figure, and the figure in words."""

    replicas: int
    signal: Signal
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowRecommendations:
    """What the two windows recommend; ``None`` where nothing is known."""

    stable: Recommendation | None
    panic: Recommendation | None


def recommend(policy: PoolPolicy, demand: WindowedDemand) -> WindowRecommendations:
    """What the stable and the panic window recommend."""
    tokens, requests = policy.target_inflight_tokens, policy.max_inflight_requests
    stable_s, panic_s = policy.stable_window_s, policy.panic_window_s
    stable = larger(
        divide(demand.stable_tokens, tokens, Signal.STABLE_TOKENS, "token", stable_s),
        divide(demand.stable_requests, requests, Signal.STABLE_REQUESTS, "request", stable_s),
    )
    panic = larger(
        divide(demand.panic_tokens, tokens, Signal.PANIC_TOKENS, "token", panic_s),
        divide(demand.panic_requests, requests, Signal.PANIC_REQUESTS, "request", panic_s),
    )
    return WindowRecommendations(stable=stable, panic=panic)


def divide(
    mean: float | None, target: int | None, signal: Signal, noun: str, window_s: float
) -> Recommendation | None:
    """Replicas that carry ``mean`` at ``target`` each; ``None`` without either."""
    if mean is None or target is None or not math.isfinite(mean):
        return None
    replicas = math.ceil(max(mean, 0.0) / target - ROUNDING)
    number = f"{mean:.0f} {noun}" if round(mean) == 1 else f"{mean:.0f} {noun}s"
    text = f"{number} in flight and queued over {window_s:g} s, {target} per replica"
    return Recommendation(replicas=replicas, signal=signal, text=text)


def larger(one: Recommendation | None, other: Recommendation | None) -> Recommendation | None:
    """The one with more replicas, of those that are known."""
    if one is None or (other is not None and other.replicas > one.replicas):
        return other
    return one
