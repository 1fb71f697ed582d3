"""Bounds of the replica count that hold at certain times: pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autoscaler.types import PoolPolicy, TimedBounds


def bound_by_time(
    policy: PoolPolicy, bounds: Sequence[TimedBounds], wall_s: float, lead_s: float
) -> PoolPolicy:
    """The policy with the bounds of this moment (Unix time).

    A least number counts from ``lead_s`` before its window, so that the replicas are ready when it
    begins. Where several windows overlap the largest least and the largest most number count; the
    least wins over the most.
    """
    least, most = policy.min_replicas, policy.max_replicas
    least_now = [
        one.min_replicas
        for one in bounds
        if one.min_replicas is not None
        and (one.window.active(wall_s) or one.window.active(wall_s + lead_s))
    ]
    most_now = [
        one.max_replicas
        for one in bounds
        if one.max_replicas is not None and one.window.active(wall_s)
    ]
    least = max(least_now, default=least)
    most = max(most_now, default=most)
    return replace(policy, min_replicas=least, max_replicas=max(least, most))
