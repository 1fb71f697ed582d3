"""Replicas that a pool's demand asks for: the mean of a window over what one replica carries."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autoscaler.types import Demand, PoolPolicy, Signal

ROUNDING = 1e-6
"""Parts of a replica that are error of the mean's arithmetic, and ask for no other replica."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """Replicas one figure asks for, and the figure in words."""

    replicas: int
    signal: Signal
    text: str


def needs(policy: PoolPolicy, demand: Demand) -> tuple[Need | None, Need | None]:
    """Replicas the stable and the panic window ask for; ``None`` where nothing is known."""
    tokens, requests = policy.target_inflight_tokens, policy.target_inflight_requests
    stable = larger(
        need(demand.stable_tokens, tokens, Signal.STABLE_TOKENS, "tokens", policy.stable_window_s),
        need(
            demand.stable_requests,
            requests,
            Signal.STABLE_REQUESTS,
            "requests",
            policy.stable_window_s,
        ),
    )
    panic = larger(
        need(demand.panic_tokens, tokens, Signal.PANIC_TOKENS, "tokens", policy.panic_window_s),
        need(
            demand.panic_requests,
            requests,
            Signal.PANIC_REQUESTS,
            "requests",
            policy.panic_window_s,
        ),
    )
    return stable, panic


def need(
    mean: float | None, target: int | None, signal: Signal, noun: str, window_s: float
) -> Need | None:
    """Replicas that carry ``mean`` at ``target`` each; ``None`` without either."""
    if mean is None or target is None or not math.isfinite(mean):
        return None
    replicas = math.ceil(max(mean, 0.0) / target - ROUNDING)
    text = f"{mean:.0f} {noun} in flight and queued over {window_s:g} s, {target} per replica"
    return Need(replicas=replicas, signal=signal, text=text)


def larger(one: Need | None, other: Need | None) -> Need | None:
    """The need for more replicas, of those that are known."""
    if one is None or (other is not None and other.replicas > one.replicas):
        return other
    return one
