"""What a scaling policy is, and what it sees of a pool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolObservation:
    """One look at a pool. ``None`` is unknown, which is not zero.

    ``arrivals_total`` and ``arrived_tokens_total`` only grow: requests that came, and their prompt
    and output tokens. Where a trace has no tokens, each request counts as one. ``queued`` ones
    wait for a replica, ``inflight`` ones are with one; draining replicas are not among ``ready``
    or ``starting``. ``utilization`` is the busy share (0 to 1) of the ready replicas over the
    last 15 s; ``ttft_s`` and ``itl_s`` are 90th percentiles of the last minute.
    """

    ready: int
    starting: int
    arrivals_total: float
    arrived_tokens_total: float
    queued_requests: float
    queued_tokens: float
    inflight_requests: float
    inflight_tokens: float
    utilization: float | None = None
    ttft_s: float | None = None
    itl_s: float | None = None


class ScalingPolicy(Protocol):
    """Says how many replicas a pool shall have. It owns its state; time is a parameter."""

    @property
    def name(self) -> str:
        """What it is called in tables and plots."""
        ...

    @property
    def interval_s(self) -> float:
        """How often it is stepped."""
        ...

    def step(self, now_s: float, seen: PoolObservation) -> int:
        """The desired replicas at ``now_s`` (Unix time, or seconds since the trace began)."""
        ...


@runtime_checkable
class ForecastingPolicy(ScalingPolicy, Protocol):
    """One that can also say what demand it expects, for plots."""

    def band(self) -> tuple[float, float] | None:
        """The middle and the upper edge of the demand it expects now, in tokens per second;
        ``None`` while it does not."""
        ...
