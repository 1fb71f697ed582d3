"""The autoscaler's vocabulary: what it sees, what it decides, and why.

Times (``*_at_s``, ``since_s``) are readings of the control loop's clock, which is monotonic;
they are shown as differences from ``FleetReport.at_s``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from forecaster.cron import RecurringWindow
from loaders.engines.base import EngineLoad
from modelcache.types import Progress, Tier
from router.types import ReplicaState


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolDemand:
    """What the gateway saw of one pool at one moment, summed over its workers.

    Every figure is ``None`` when it is unknown, which is never read as zero. ``*_total`` are
    counters that only grow, so a request that came and went between two ticks is still seen:
    ``arrived_tokens_total`` are the tokens of the requests in ``arrivals_total``, a large body's
    from when it is whole.
    ``queued`` requests are those held in the gateway (at zero, or while all replicas are full);
    ``inflight`` ones are with an engine. Tokens are estimates: prompt + expected output.
    """

    observed_at_s: float
    inflight_requests: int | None = None
    inflight_tokens: int | None = None
    queued_requests: int | None = None
    queued_tokens: int | None = None
    arrivals_total: int | None = None
    arrived_tokens_total: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What the data path still has with one replica, summed over its workers."""

    inflight_requests: int
    inflight_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineObservation:
    """What the engine of a replica last said of itself, and when.

    The rates are means over the ``window_s`` between its last two readings, and ``None`` where they
    are not known: at the first, and where a counter began again. ``prefix_cache_hit_fraction`` is
    the share of the prompt tokens looked up then that its prefix cache had; ``None`` where none
    were.
    """

    observed_at_s: float
    load: EngineLoad
    window_s: float | None = None
    prefix_cache_hit_fraction: float | None = None
    prompt_tokens_per_s: float | None = None
    generation_tokens_per_s: float | None = None
    preemptions_per_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuCapacity:
    """A GPU of this machine. ``memory_bytes`` is ``None`` when unknown."""

    index: int
    memory_bytes: int | None = None
    name: str = ""
    free_bytes: int | None = None
    driver: str = ""
    uuid: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class XidEvent:
    """An error of a GPU that the driver reported, by NVIDIA's number. DCGM tells no time: then it
    is that of the first reading with it."""

    xid: int
    at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReading:
    """What one GPU is and does.

    ``figures`` are those of ``autoscaler.signals.gpus.figures`` that could be read, by name.
    ``throttle_reasons`` says why its clocks are lower than they could be; ``None`` is unknown.
    ``xids`` are its newest errors since this process began, newest last, and ``xid_counts`` how
    many there were, by number. ``processes`` is the device memory of each process that computes, by
    its pid. ``error`` says why nothing can be read of it.
    """

    gpu: GpuCapacity
    figures: Mapping[str, float] = field(default_factory=dict)
    throttle_reasons: tuple[str, ...] | None = None
    xids: tuple[XidEvent, ...] = ()
    xid_counts: Mapping[int, int] = field(default_factory=dict)
    processes: Mapping[int, int | None] | None = None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuReport:
    """The GPUs of this node, and when they were read. ``gpus`` is ``None`` where they are not
    known, and ``why_not`` then says why. ``source`` is ``nvml`` or ``dcgm``."""

    source: str
    gpus: tuple[GpuReading, ...] | None = None
    observed_at_s: float | None = None
    why_not: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One look at the data path, demand by pool name and load by replica id; at what engines say
    themselves, by replica id (one that is missing is not known); and at the GPUs of this node."""

    pools: Mapping[str, PoolDemand] = field(default_factory=dict)
    replicas: Mapping[str, ReplicaLoad] = field(default_factory=dict)
    engines: Mapping[str, EngineObservation] = field(default_factory=dict)
    gpus: GpuReport | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFigures:
    """Figures a pool may be scaled by: as targets those that are set, as seen those that are known.

    Requests that came per second and requests queued are of the pool as seen, and of one replica as
    a target. Latencies are quantiles 0.95 of the last minute. GPU utilization is the mean over the
    GPUs of the pool's replicas, 0 to 1.
    """

    requests_per_s: float | None = None
    queued_requests: float | None = None
    ttft_s: float | None = None
    itl_s: float | None = None
    e2e_s: float | None = None
    gpu_utilization_fraction: float | None = None


DELAY_S = (30.0, 60.0)
"""The shortest and the longest scale-down delay, where none is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPolicy:
    """One pool's settings as ``decide`` uses them: bounds, targets, windows.

    ``max_inflight_requests`` is the most requests one replica is given, where the pool says;
    it makes many small requests count as well as a few large ones.
    """

    pool: str
    min_replicas: int
    max_replicas: int
    target_inflight_tokens: int
    max_inflight_requests: int | None
    stable_window_s: float
    panic_window_s: float
    panic_threshold: float
    scale_down_delay_s: float | None
    """``None``: as long as a start takes, within ``DELAY_S``."""
    idle_to_zero_s: float
    """Whether learned or given: ``idle_reason`` says why it is that long, where it was learned."""
    max_scale_up_per_tick: int
    demand_stale_s: float
    max_scale_down_per_tick: int
    target_utilization_fraction: float
    backlog_s: float
    violated_second: float
    targets: TargetFigures = TargetFigures()
    idle_reason: str = ""

    def delay_s(self, lead_s: float | None) -> float:
        """How long a lower number must have been enough before replicas go, where a start takes
        ``lead_s``. A replica that is given up costs its next start: it is kept for about as long
        (ski-rental), but not for minutes, as it is one of several."""
        if self.scale_down_delay_s is not None:
            return self.scale_down_delay_s
        least_s, most_s = DELAY_S
        return most_s if lead_s is None else min(max(lead_s, least_s), most_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedBounds:
    """Within each of its windows a pool has at least and at most so many replicas (``None``: as
    without it)."""

    name: str
    window: RecurringWindow
    min_replicas: int | None = None
    max_replicas: int | None = None


class CapacitySource(StrEnum):
    """Where the figure of a replica's capacity comes from, the best first."""

    SATURATED = "saturated"
    """Seen while replicas were loaded as far as the SLO allows."""
    HISTORY = "history"
    """Seen so by an earlier control process, or with requests of other lengths."""
    DERIVED = "derived"
    """From the engine's KV cache, its limits and measured times; at most the hint."""
    HINT = "hint"
    """From the pool's settings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaCapacity:
    """Prompt and output tokens per second that one replica sustains within the SLO, for the mix of
    lengths that the pool has; tokens as demand counts them, before they are answered."""

    tokens_per_s: float
    source: CapacitySource


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastTally:
    """What came of forecasts whose window has passed, at the level that they are judged at: how
    many, how many of them covered it, and the sums of their pinball losses and of those of the last
    value, in tokens per second."""

    scored: int = 0
    covered: int = 0
    loss: float = 0.0
    last_value_loss: float = 0.0

    def since(self, earlier: ForecastTally) -> ForecastTally:
        """What was added; all of it where the earlier one is of another count."""
        if self.scored < earlier.scored:
            return self
        return ForecastTally(
            scored=self.scored - earlier.scored,
            covered=self.covered - earlier.covered,
            loss=self.loss - earlier.loss,
            last_value_loss=self.last_value_loss - earlier.last_value_loss,
        )

    def __add__(self, other: ForecastTally) -> ForecastTally:
        return ForecastTally(
            scored=self.scored + other.scored,
            covered=self.covered + other.covered,
            loss=self.loss + other.loss,
            last_value_loss=self.last_value_loss + other.last_value_loss,
        )


FINE_LEAD_S = 60.0
"""Shorter leads are forecast on a grid of seconds, not of minutes."""

NO_TALLY = ForecastTally()


@dataclass(frozen=True, slots=True, kw_only=True)
class FurtherForecast:
    """Quantiles of the highest demand within the next ``horizon_s``, at the levels of the outlook
    that it belongs to."""

    horizon_s: float
    tokens_per_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """A pool's forecast as ``decide`` reads it.

    ``tokens_per_s[i]`` is the quantile ``levels[i]`` of the highest demand until a replica that is
    asked for now would serve, which is also until one that is given up now could be back: that much
    has to be provisioned. ``distrust`` says why it is not to be used, for people; empty where it
    is.

    It was made on a grid of ``step_s``. ``scored`` forecasts of the last days have turned out:
    ``coverage`` is the part of them whose quantile 0.95 what came was not above, ``loss_ratio``
    their pinball loss there in parts of that of the last value; ``None`` before there are enough.
    ``weights`` say how much of it is which model's. ``tally`` is of all forecasts since the process
    that makes them began.
    ``least_tokens_per_s``: a demand of less is of no request. ``further`` is the same forecast for
    other times than the lead, for those who ask; decisions do not read it.
    """

    made_at_s: float
    model: str
    lead_s: float
    levels: tuple[float, ...]
    tokens_per_s: tuple[float, ...]
    distrust: str = ""
    least_tokens_per_s: float = 0.1
    step_s: float = 60.0
    scored: int = 0
    coverage: float | None = None
    loss_ratio: float | None = None
    weights: dict[str, float] = field(default_factory=dict)
    tally: ForecastTally = NO_TALLY
    further: tuple[FurtherForecast, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedDemand:
    """A pool's demand as ``decide`` reads it: now, and as means over the two windows.

    Tokens and requests are in flight and queued together; ``*_tokens_per_s`` are those of the
    requests that came; ``panic_deviation_tokens_per_s`` is the standard deviation of that rate over
    the earlier panic windows within the stable one, known while requests wait. ``None`` is unknown:
    never observed, stale, or a part of the sum missing.
    ``some_requests`` is true as soon as any known part is above zero, even where the sum is
    unknown; ``some_queued`` where requests are held.
    """

    tokens: int | None = None
    requests: int | None = None
    stable_tokens: float | None = None
    panic_tokens: float | None = None
    stable_requests: float | None = None
    panic_requests: float | None = None
    stable_tokens_per_s: float | None = None
    panic_tokens_per_s: float | None = None
    panic_deviation_tokens_per_s: float | None = None
    queued_tokens: int | None = None
    arrivals_total: int | None = None
    some_requests: bool = False
    some_queued: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatus:
    """What a pool has at this moment, counted by state, and what was asked of it.

    ``scheduled`` replicas wait for their start (after a failure, or for a free GPU); ``preparing``
    ones for their model; ``starting`` ones have a process that is loading; ``waking`` ones come
    back from sleep. ``ready_at_s`` is when a replica last became ready. ``wake_signal``: the data
    path reported a held request since the last decision. ``override``: the number an operator asked
    for. ``sleep_requested``: put to sleep by an operator, until the next request. ``arriving_s``:
    in how many seconds each replica on its way is expected to be ready. ``lead_s``: in how many one
    that is asked for now would be; ``None`` where no start was measured. ``prewarm``: why one
    replica shall run without a request, ahead of the next; empty where none need.
    """

    scheduled: int = 0
    preparing: int = 0
    starting: int = 0
    waking: int = 0
    ready: int = 0
    unhealthy: int = 0
    ready_at_s: float | None = None
    wake_signal: bool = False
    sleep_requested: bool = False
    override: int | None = None
    arriving_s: tuple[float, ...] = ()
    lead_s: float | None = None
    prewarm: str = ""

    @property
    def supply(self) -> int:
        """Replicas that are there or on their way. Pending ones count, or each tick would start
        more."""
        return self.scheduled + self.loading + self.ready + self.unhealthy

    @property
    def loading(self) -> int:
        """Replicas on their way that are being worked on: none of them is given up unasked."""
        return self.preparing + self.starting + self.waking


class Gap(NamedTuple):
    """A time without requests that has ended. ``weight``: as how many such gaps it counts."""

    length_s: float
    weight: float = 1.0


class ScaleReason(StrEnum):
    """Why a decision is what it is, for machines. ``detail`` says it to people."""

    AT_ZERO = "at_zero"
    WAKE = "wake"
    DEMAND = "demand"
    FORECAST = "forecast"
    PANIC = "panic"
    STEADY = "steady"
    SCALE_DOWN = "scale_down"
    SCALE_DOWN_DELAYED = "scale_down_delayed"
    IDLE = "idle"
    PREWARM = "prewarm"
    IDLE_TO_ZERO = "idle_to_zero"
    STARTING = "starting"
    BUSY = "busy"
    MINIMUM = "minimum"
    UNKNOWN_DEMAND = "unknown_demand"
    OVERRIDE = "override"
    OVERRIDE_WAITS = "override_waits"
    SLEEP_REQUESTED = "sleep_requested"
    ADVISE = "advise"
    OBSERVE = "observe"
    NO_CAPACITY = "no_capacity"
    STATIC = "static"
    DISABLED = "disabled"
    REMOVED = "removed"
    CLOSING = "closing"


NAMED = 20
"""Most names that an error lists."""


class NotKnown(LookupError):
    """There is no pool or replica of this name; the message names those that there are."""

    def __init__(self, kind: str, name: str, known: Sequence[str]) -> None:
        shown = ", ".join(known[:NAMED]) + (", …" if len(known) > NAMED else "")
        there_are = f"the {kind}s are {shown}" if known else f"there is no {kind} at all"
        super().__init__(f"There is no {kind} {name!r}; {there_are}.")


class Signal(StrEnum):
    """Which figure asked for the number."""

    NONE = "none"
    STABLE_TOKENS = "stable_tokens"
    PANIC_TOKENS = "panic_tokens"
    STABLE_REQUESTS = "stable_requests"
    PANIC_REQUESTS = "panic_requests"
    STABLE_TOKENS_PER_S = "stable_tokens_per_s"
    PANIC_TOKENS_PER_S = "panic_tokens_per_s"
    BACKLOG = "backlog"
    FORECAST = "forecast"
    TARGET = "target"
    ARRIVALS = "arrivals"
    HELD = "held"
    OVERRIDE = "override"


class Bound(StrEnum):
    """Which bound changed the number the signal asked for."""

    MIN_REPLICAS = "min_replicas"
    MAX_REPLICAS = "max_replicas"
    MAX_SCALE_UP = "max_scale_up"
    MAX_SCALE_DOWN = "max_scale_down"
    SCALE_DOWN_DELAY = "scale_down_delay"
    PANIC = "panic"
    IDLE_TO_ZERO = "idle_to_zero"
    NEVER_ZERO = "never_zero"
    STARTING = "starting"
    UNKNOWN_DEMAND = "unknown_demand"
    NO_CAPACITY = "no_capacity"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionInputs:
    """What a decision was made from, as it was then. ``rules`` are the replicas that each rule
    asked for by itself."""

    policy: PoolPolicy
    status: PoolStatus
    demand: WindowedDemand
    outlook: Outlook | None
    rules: tuple[tuple[Signal, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """How many replicas a pool shall have, and why."""

    pool: str
    at_s: float
    desired: int
    supply: int
    reason: ScaleReason
    detail: str
    signal: Signal = Signal.NONE
    bound: Bound | None = None
    panicking: bool = False
    reactive: int | None = None
    """What the windows and the backlog alone recommended, before bounds; ``None``: unknown."""
    forecast: int | None = None
    """What the forecast recommended; ``None`` without one that is trusted."""
    level: float | None = None
    """The quantile of the forecast that this number covers."""
    capacity: ReplicaCapacity | None = None
    fallback: str = ""
    """Why there is no forecast in it, for people; empty where there is one."""
    recommended: int | None = None
    """What would be done in the mode ``auto``, where the mode is another."""
    inputs: DecisionInputs | None = field(default=None, compare=False, repr=False)
    """``None`` where it needed none (static, disabled, closing), or they are no longer kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastDecision:
    """A decision and how often it was repeated before another took its place."""

    decision: Decision
    count: int
    first_at_s: float
    last_at_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramCounts:
    """``counts`` of values up to each of ``bounds_s`` (seconds) and, last, of those beyond, and the
    sum of all values."""

    bounds_s: tuple[float, ...]
    counts: tuple[int, ...]
    sum_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RecentTraffic:
    """What a pool was asked and answered in the last ``window_s`` seconds. Means are exact;
    quantiles are read off histograms, and say little of few values. ``None``: nothing was
    measured."""

    window_s: float
    arrivals_per_s: float | None = None
    """Requests that came."""
    arrived_prompt_tokens_per_s: float | None = None
    """Their prompts' tokens, estimated."""
    arrived_output_tokens_per_s: float | None = None
    """Their answers' tokens, as expected."""
    requests_per_s: float
    """Requests that ended, however."""
    errors_per_s: float
    """Those that an engine or the gateway answered with an error."""
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    queue_wait_mean_s: float | None = None
    """Request read to sent to an engine."""
    queue_wait_p50_s: float | None = None
    queue_wait_p95_s: float | None = None
    queue_wait_p99_s: float | None = None
    ttft_count: int
    """Streams whose first byte came."""
    ttft_mean_s: float | None
    """Request read to first byte, of streams."""
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None = None
    itl_count: int
    """Pauses between two tokens of a stream."""
    itl_mean_s: float | None
    """How long they were."""
    itl_p50_s: float | None
    itl_p95_s: float | None
    itl_p99_s: float | None = None
    e2e_mean_s: float | None = None
    """Request read to answer finished."""
    e2e_p50_s: float | None = None
    e2e_p95_s: float | None = None
    e2e_p99_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TierReport:
    """One tier of a pool on this node, from hot to cold.

    ``wake_s`` is the median of the ``wakes`` measured from there. ``stays_s`` is the time a pool at
    zero stays there, ``None`` for ever. ``why_not`` says why it is not to be had here.
    """

    tier: Tier
    available: bool
    wake_s: float | None = None
    wakes: int = 0
    stays_s: float | None = None
    why_not: str = ""
    start_times: HistogramCounts | None = None
    """How long starts and wakes out of it took until ready, since the control process began."""
    failed_starts: int = 0
    """Starts and wakes out of it that failed, since the control process began."""


def first_line(error: str) -> str:
    """What comes before the lines that an engine wrote."""
    return next(iter(error.strip().splitlines()), "")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """One replica as ``tidegate status`` shows it. ``step`` is one of
    ``STEPS_TO_READY`` of ``autoscaler.control.start_steps`` while it is on its way to ready, else
    nothing; ``phase`` says in a line what it is doing."""

    id: str
    pool: str
    state: ReplicaState
    since_s: float
    phase: str = ""
    step: str = ""
    progress: Progress | None = None
    woken_from: Tier | None = None
    url: str | None = None
    pid: int | None = None
    served_model: str | None = None
    gpus: tuple[int, ...] = ()
    cpus: tuple[int, ...] = ()
    pod: str = ""
    """The pod that it is, in a cluster."""
    node: str = ""
    """The node that its pod is on."""
    error: str | None = None
    outdated: bool = False
    """It was started with other arguments than its pool has now, and is to be replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolReport:
    """One pool as ``tidegate status`` shows it.

    ``error`` says why replicas fail, while they do: the newest failure with the engine's last log
    lines. ``failures`` counts them in a row; the next start is not before ``retry_at_s``. ``tier``
    is how warm it is (``None``: externally managed), ``step_down_at_s`` when it will be a tier
    colder without a request.
    """

    name: str
    desired: int
    override: int | None
    ready: int
    starting: int
    unhealthy: int
    draining: int
    sleeping: int
    wake_eta_s: float | None
    last_decision: Decision | None
    replicas: tuple[ReplicaReport, ...]
    failures: int = 0
    retry_at_s: float | None = None
    error: str | None = None
    tier: Tier | None = None
    tiers: tuple[TierReport, ...] = ()
    step_down_at_s: float | None = None
    max_replicas: int = 1
    crashes: int = 0
    """Replicas that failed after they had been ready, since the control process began."""
    removed: bool = False
    """The settings have it no more; it ends with its last request."""
    disabled: bool = False
    """An operator has taken it out of service: its requests are refused."""
    slug: str = ""
    """Its name as ids and labels can have it."""
    last_change: Decision | None = None
    """The newest decision for another number than the one before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetReport:
    """All pools at one moment. ``errors`` counts those the loop survived, by where they were
    raised; ``decisions`` counts decisions by (pool, reason)."""

    at_s: float
    pools: tuple[PoolReport, ...]
    decisions: Mapping[tuple[str, ScaleReason], int]
    errors: Mapping[str, int]
    last_error: str | None = None
