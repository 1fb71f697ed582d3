"""The admin API's types: what each request and answer consists of.

The one definition of it. The server validates and serialises with these types, the console parses
into them (``--json`` prints them), and ``/openapi.json`` is made of them. Which operation takes and
answers what is in ``gateway.admin.operations``. Moments (``*_at_s``) are Unix time; ``None`` is
unknown, which is not zero. Requests forbid unknown fields; answers may gain fields.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, RootModel, SerializeAsAny

from autoscaler.adapters.types import PoolSignals
from autoscaler.policy.gpu_faults import GpuAction
from autoscaler.types import (
    Bound,
    RecentTraffic,
    ReplicaCapacity,
    ScaleReason,
    Signal,
    TierReport,
)
from gateway.settings.changes import PoolChange
from modelcache.types import ModelEntry, Progress, Residency, Tier
from router.types import ReplicaState


class AdminRequest(BaseModel):
    """A request's body."""

    # Built when it is first used, and without descriptions (``openapi`` adds them): the console
    # imports all of them for one answer.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class AdminAnswer(BaseModel):
    """An answer, or a part of one. Made from any object with the same attributes."""

    model_config = ConfigDict(frozen=True, from_attributes=True, defer_build=True)


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────

ERRORS = {
    "bad_json": 400,
    "bad_settings": 400,
    "bad_value": 400,
    "client_closed": 400,
    "unknown_field": 400,
    "unauthorized": 401,
    "cross_site": 403,
    "model_not_allowed": 403,
    "decision_not_found": 404,
    "model_not_found": 404,
    "no_pools": 404,
    "pool_not_found": 404,
    "replica_not_found": 404,
    "route_not_found": 404,
    "method_not_allowed": 405,
    "body_timeout": 408,
    "model_in_use": 409,
    "body_too_large": 413,
    "content_type": 415,
    "host_not_allowed": 421,
    "too_many": 429,
    "cancelled": 499,
    "cache_failed": 500,
    "history_failed": 500,
    "internal_error": 500,
    "model_damaged": 500,
    "source_failed": 502,
    "not_ready": 503,
    "timeout": 504,
    "no_space": 507,
}
"""Every error code of the admin API with its HTTP status."""


FAULT = "Tidegate failed at this; its log says how."
"""The message of an ``internal_error``: the traceback goes to the log, never to a client."""


class ErrorDetail(AdminAnswer):
    """What is wrong, as OpenAI's errors say it, and the HTTP status."""

    message: str
    type: str
    param: str | None = None
    """The field or the path's part that it is about."""
    code: str
    """One of ``ERRORS``; also in the header ``x-tidegate-reason``."""
    status: int


class ErrorAnswer(AdminAnswer):
    """The one shape of an error."""

    error: ErrorDetail


class AdminError(Exception):
    """A refusal: one of ``ERRORS`` with its message."""

    def __init__(
        self, code: str, message: str, *, param: str | None = None, **headers: str
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = ERRORS[code]
        self.param = param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def answer(self) -> ErrorAnswer:
        """It as the body of an answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return ErrorAnswer(
            error=ErrorDetail(
                message=str(self), type=kind, param=self.param, code=self.code, status=self.status
            )
        )


# ── Health ────────────────────────────────────────────────────────────────────────────────────────


class AdminIndex(AdminAnswer):
    """What there is here."""

    tidegate: Literal["admin"] = "admin"
    endpoints: dict[str, str]
    """Summaries by ``METHOD /path``."""


class ApiDocument(RootModel[dict[str, Any]]):
    """An OpenAPI document."""


class Liveness(AdminAnswer):
    """The process lives."""

    status: Literal["alive"] = "alive"


class Readiness(AdminAnswer):
    """Requests are accepted."""

    ready: bool
    reason: str


# ── Status ────────────────────────────────────────────────────────────────────────────────────────


class WorkerEntry(AdminAnswer):
    """One process of the data path."""

    index: int
    kind: Literal["http", "picker"]
    """``http`` carries requests itself, ``picker`` is asked by an Envoy where they go."""
    pid: int | None
    state: Literal["starting", "listening", "unresponsive", "draining"]
    restarts: int
    connections: int
    upstream_connections: int


class DecisionInputsEntry(AdminAnswer):
    """What a decision was made from, as it was then."""

    ready: int
    lead_s: float | None
    """Seconds that a replica asked for then would take to be ready."""
    min_replicas: int | None
    max_replicas: int | None
    override: int | None
    requests: int | None
    """In flight and queued, as ``tokens`` are."""
    tokens: int | None
    queued_tokens: int | None
    stable_window_s: float
    stable_tokens_per_s: float | None
    """Tokens of the requests that came, over this window; ``panic_tokens_per_s`` over the short
    one."""
    panic_tokens_per_s: float | None
    model: str
    """That made the forecast; empty without one."""
    forecast_median_tokens_per_s: float | None
    """Quantiles 0.5 and 0.95 of the highest demand within the lead, by the forecast."""
    forecast_high_tokens_per_s: float | None
    rules: tuple[tuple[str, int], ...]
    """The replicas that each rule asked for by itself."""
    alone: int | None
    """What reaction without a forecast recommends, at the target utilization."""


class DecisionEntry(AdminAnswer):
    """How many replicas a pool shall have, and why."""

    at_s: float
    desired: int
    supply: int
    """Replicas that are there, healthy or not, or on their way."""
    reason: ScaleReason
    detail: str
    """The reason in words."""
    signal: Signal
    """The figure that asked for the number."""
    bound: Bound | None
    """The bound that changed the number which the signal asked for."""
    panicking: bool
    reactive: int | None = None
    """What demand recommended by itself, before bounds."""
    forecast: int | None = None
    """What the forecast recommended; ``null`` where none is trusted."""
    level: float | None = None
    """The quantile of the forecast that this number covers."""
    capacity: ReplicaCapacity | None = None
    """What one replica sustains within the SLO, and where that is known from."""
    fallback: str = ""
    """Why there is no forecast in it; empty where there is one."""
    recommended: int | None = None
    """What would be done in the mode ``auto``, where the mode is another."""
    inputs: DecisionInputsEntry | None = None
    """What it was made from; ``null`` where it needed nothing, in ``/status``, and for all but the
    newest of ``explain``."""


class PastDecisionEntry(DecisionEntry):
    """A decision, and how often it was repeated before another took its place."""

    count: int
    first_at_s: float
    last_at_s: float


class EngineEntry(AdminAnswer):
    """What a replica's engine says of itself. ``null``: it does not say. Rates are means between
    its last two readings; counters grow from the engine's start."""

    age_s: float
    """Seconds since it said so."""
    running_requests: int | None
    waiting_requests: int | None
    max_running_requests: int | None
    """Most requests that it runs at once."""
    kv_cache_usage_fraction: float | None
    kv_cache_tokens: int | None
    """Tokens that its KV cache holds."""
    prefix_cache_hit_fraction: float | None
    """Share of the prompt tokens looked up in its prefix cache that were there."""
    prompt_tokens_per_s: float | None
    generation_tokens_per_s: float | None
    preemptions_per_s: float | None
    prefix_cache_queries_tokens: float | None
    prefix_cache_hits_tokens: float | None
    preemptions: int | None
    prompt_tokens: float | None
    generation_tokens: float | None
    sleep_level: int | None
    """0 while it is awake."""


class GpuFaultEntry(AdminAnswer):
    """What is wrong with a GPU, and what to do about it."""

    action: GpuAction
    detail: str
    xid: int | None
    """NVIDIA's number of the error that says so, where it is one."""
    at_s: float | None


class GpuEntry(AdminAnswer):
    """One GPU of this node."""

    index: int
    uuid: str
    name: str
    driver: str
    figures: dict[str, float]
    """What was read of it, by the names of its metrics without ``tidegate_gpu_``."""
    throttle_reasons: tuple[str, ...] | None
    """Why its clocks are lower than they could be."""
    xid_counts: dict[int, int]
    """Errors since this process began, by NVIDIA's number."""
    processes: dict[int, int | None] | None
    """Bytes of its memory that each process takes, by pid; ``null``: not known."""
    error: str | None
    """Why nothing can be read of it."""
    fault: GpuFaultEntry | None
    replicas: tuple[str, ...]
    """Those that were given it."""


class NodeGpus(AdminAnswer):
    """The GPUs of this node. ``gpus`` is ``null`` where they are not known: ``why_not``."""

    source: str
    """``nvml`` or ``dcgm``."""
    age_s: float | None
    why_not: str
    gpus: tuple[GpuEntry, ...] | None


class ReplicaEntry(AdminAnswer):
    """One replica."""

    id: str
    state: ReplicaState
    url: str | None
    pid: int | None
    served_model: str | None
    gpus: tuple[int, ...]
    cpus: tuple[int, ...]
    inflight_requests: int | None
    inflight_tokens: int | None
    phase: str
    """What it is at while it starts, for people."""
    step: str
    """The first word of ``phase``, for machines."""
    progress: Progress | None
    """How much of its model is here, while it is being fetched or prepared."""
    woken_from: Tier | None
    since_s: float
    """Seconds in its state."""
    error: str | None
    outdated: bool = False
    """It was started with other arguments than its pool has now, and is to be replaced."""
    pod: str = ""
    """The pod that it is, in a cluster."""
    node: str = ""
    """The node that its pod is on."""
    engine: EngineEntry | None = None
    """What its engine says of itself; ``null`` where that could not be read."""
    gpu_fault: GpuFaultEntry | None = None
    """A fault of one of its GPUs."""


class PoolEntry(AdminAnswer):
    """One pool."""

    name: str
    aliases: tuple[str, ...]
    engine: str
    backend: str
    model: str | None
    min_replicas: int
    max_replicas: int
    desired: int
    override: int | None
    """The number an operator holds it at."""
    ready: int
    starting: int
    unhealthy: int
    draining: int
    sleeping: int
    queued_requests: int | None
    queued_tokens: int | None
    inflight_requests: int | None
    inflight_tokens: int | None
    arrivals_total: int | None
    recent: RecentTraffic | None
    """``null`` in its first seconds."""
    wake_eta_s: float | None
    tier: Tier | None
    """How warm it is; ``null`` where it is externally managed."""
    tiers: tuple[TierReport, ...]
    step_down_in_s: float | None
    """Seconds until it is a tier colder, without demand."""
    last_decision: DecisionEntry | None
    failures: int
    """Failed starts in a row."""
    retry_in_s: float | None
    error: str | None
    """Why replicas fail, with the engine's last log lines."""
    replicas: tuple[ReplicaEntry, ...]
    removed: bool = False
    """The settings have it no more; it serves the requests it has, and ends."""
    disabled: bool = False
    """An operator has taken it out of service: its requests are refused."""


class StandbyEntry(AdminAnswer):
    """A forked engine that waits for its weights."""

    pool: str
    pid: int
    parked: bool
    """False until it has imported everything."""
    pss_bytes: int | None


class ForkServerEntry(AdminAnswer):
    """The fork server: ``state`` is off, importing, ready, waiting or unfit."""

    state: str
    reason: str
    pid: int | None
    pss_bytes: int | None
    import_s: float | None
    forked: int
    crashes: int
    standbys: tuple[StandbyEntry, ...]


class HistoryState(AdminAnswer):
    """Whether the past of the pools is kept."""

    size_bytes: int | None
    """Of the file; ``null`` before it was written for the first time."""
    failures: int
    """Writes that failed since the process began."""
    error: str | None
    """Why the newest write failed; ``null`` where it did not."""


class GatewayStatus(AdminAnswer):
    """A running Tidegate."""

    kind: Literal["gateway"] = "gateway"
    version: str
    endpoint: str
    admin: str
    picker: str | None = None
    """``host:port`` of the endpoint picker; ``null`` without one."""
    uptime_s: float
    workers: tuple[WorkerEntry, ...]
    pools: tuple[PoolEntry, ...]
    fork_server: ForkServerEntry | None
    gpus: NodeGpus | None = None
    history: HistoryState | None = None
    errors: dict[str, int]
    """Errors that the control loop survived, by where they were raised."""
    last_error: str | None


class SignalsQuery(AdminRequest):
    """What the caller has already."""

    after: int | None = Field(default=None, ge=0)
    """The version of its newest answer: this one comes at once where there is another version, else
    after ``wait_s``. Unset: at once."""
    wait_s: float = Field(default=0.0, ge=0.0, le=30.0, allow_inf_nan=False)


class SignalsAnswer(AdminAnswer):
    """What is published of the pools to other autoscalers."""

    version: int
    """Another as soon as a pool has its first request, or no more."""
    at_s: float
    pools: tuple[PoolSignals, ...]


class CacheUsage(AdminAnswer):
    """What the model cache takes of the disk."""

    bytes_used: int
    bytes_blobs: int
    """Fetched models."""
    bytes_prepared: int
    """Results of preparation steps."""
    bytes_partial: int
    """Files that are being fetched."""
    bytes_records: int
    bytes_promised: int = 0
    """What steps under way will still take; not part of the sum."""
    free_bytes: int
    quota_bytes: int | None
    reserve_bytes: int = 0


class PeerEntry(AdminAnswer):
    """A peer as this node knows it."""

    url: str
    node: str | None = None
    reached: bool
    banned: str | None = None
    """Why it is not asked for a while."""
    given_bytes: int = 0


class CacheTraffic(AdminAnswer):
    """What was read from stores and peers and given to peers, since the process began."""

    store_bytes: int = 0
    peer_bytes: int = 0
    wasted_bytes: int = 0
    """Read and thrown away."""
    retries: int = 0
    peer_failures: int = 0
    sent_bytes: int = 0
    peers: tuple[PeerEntry, ...] = ()


class AgentStatus(AdminAnswer):
    """A running cache agent."""

    kind: Literal["agent"] = "agent"
    version: str
    peer_url: str | None
    """Where peers are served."""
    dir: str
    usage: CacheUsage
    traffic: CacheTraffic


class StatusAnswer(RootModel[Annotated[GatewayStatus | AgentStatus, Field(discriminator="kind")]]):
    """What runs here: a gateway or a cache agent."""

    model_config = ConfigDict(defer_build=True)


# ── Pools and replicas ────────────────────────────────────────────────────────────────────────────


class ExplainQuery(AdminRequest):
    """Which decisions."""

    limit: int | None = Field(default=None, ge=1, le=1_000_000)
    """Only the newest so many."""


class ExplainAnswer(AdminAnswer):
    """A pool's decisions, newest last."""

    pool: str
    decisions: tuple[PastDecisionEntry, ...]
    current: PoolEntry | None = None
    """The pool as it is now, with what fails in it; ``null`` where it has just gone."""


class ScaleRequest(AdminRequest):
    """How many replicas to hold a pool at."""

    replicas: int | None = Field(ge=0)
    """``null`` gives the pool back to the autoscaler."""


class ScaleAnswer(AdminAnswer):
    """What the pool is held at."""

    pool: str
    override: int | None
    disabled: bool = False
    """The pool is out of service: the number counts from its ``enable`` on."""


class SleepRequest(AdminRequest):
    """How deep."""

    level: int = Field(default=1, ge=1, le=2)
    """1 keeps the weights in host memory, 2 drops them."""


class SleepAnswer(AdminAnswer):
    """What the pool has now."""

    pool: str
    sleeping: int
    ready: int


class ServiceAnswer(AdminAnswer):
    """Whether the pool is out of service now."""

    pool: str
    disabled: bool


class WakeAnswer(AdminAnswer):
    """What the pool has now."""

    pool: str
    starting: int
    ready: int


class ReloadAnswer(AdminAnswer):
    """What is different in the settings that were read again."""

    added: tuple[str, ...]
    """Pools."""
    changed: tuple[PoolChange, ...]
    removed: tuple[str, ...]
    """Pools; they serve the requests they have, and end."""
    applied: tuple[str, ...]
    """Other settings that apply from now on, by their dotted names."""
    needs_restart: tuple[str, ...]
    """Settings that apply from the next start on."""


class NoFields(AdminRequest):
    """Nothing needs saying."""


class DrainAnswer(AdminAnswer):
    """What becomes of the replica."""

    replica: str
    state: Literal["draining"] = "draining"


# ── History ───────────────────────────────────────────────────────────────────────────────────────

SeriesValues = dict[str, tuple[float | None, ...]]
"""By series, all equally long: a value a minute, ``null`` where it is unknown."""


class HistoryExtent(AdminAnswer):
    """From when to when there is a history of a pool, and how many minutes of it."""

    pool: str
    from_s: float
    until_s: float
    minutes: int


class HistoryListing(AdminAnswer):
    """What is kept of the past."""

    path: str
    size_bytes: int
    max_bytes: int
    max_age_s: float
    series: tuple[str, ...]
    """That there are of each pool."""
    pools: tuple[HistoryExtent, ...]


class HistoryQuery(AdminRequest):
    """Which part of a pool's past."""

    from_s: float | None = Field(default=None, allow_inf_nan=False)
    """Unix time; unset: all there is."""
    until_s: float | None = Field(default=None, allow_inf_nan=False)
    """Unset: now."""
    series: str | None = None
    """Names apart by commas; unset: all."""


class HistoryAnswer(AdminAnswer):
    """A part of a pool's past."""

    pool: str
    start_s: float
    """Unix time of the first minute."""
    step_s: float = 60.0
    series: SeriesValues


class DecisionsQuery(AdminRequest):
    """Which past decisions."""

    at_s: float | None = Field(default=None, ge=0.0, le=1e12, allow_inf_nan=False)
    """Unix time; unset: now."""
    limit: int = Field(default=20, ge=1, le=10_000)
    """Most of them, around that time."""


class DecisionsAnswer(AdminAnswer):
    """The decision that held at a moment, and those around it, oldest first. Of a pool one a minute
    is kept, and each change."""

    pool: str
    at_s: float
    decision: PastDecisionEntry
    decisions: tuple[PastDecisionEntry, ...]


class ScoreQuery(AdminRequest):
    """Which stretch of the past."""

    from_s: float | None = Field(default=None, ge=0.0, le=1e12, allow_inf_nan=False)
    """Unix time; unset: a day before the end."""
    until_s: float | None = Field(default=None, allow_inf_nan=False)
    """Unset: now."""


class CostEntry(AdminAnswer):
    """What a policy's replicas cost, and whom they may have hurt."""

    replica_s: float
    """Seconds that replicas were there or on their way, summed over them."""
    short_s: float
    """Seconds in which demand was above what the ready ones carry."""


class ScoreAnswer(AdminAnswer):
    """What a pool's decisions cost and brought, against reaction alone."""

    pool: str
    from_s: float
    until_s: float
    scored_s: float
    unknown_s: float
    """Seconds of which demand, capacity or replicas are not known."""
    trusted_s: float
    """Seconds in which the forecast was used."""
    ran: CostEntry
    reactive: CostEntry
    """As computed for reaction alone, from the same demand."""
    auto: CostEntry | None
    """As computed for the mode ``auto``, where the mode was another."""
    above_replica_s: float
    """Replica-seconds beyond those of reaction alone, while there were more."""
    below_replica_s: float
    """The same, while there were fewer."""
    forecasts: int
    """That were scored: their lead has passed."""
    coverage: float | None
    """The part of them that covered what came, at their quantile 0.95."""
    loss_ratio: float | None
    """Their pinball loss in parts of that of the last value."""


class FillRequest(AdminRequest):
    """Minutes of a pool's past from elsewhere."""

    start_s: float = Field(ge=0.0, multiple_of=60.0, le=1e12)
    """Unix time of the first minute."""
    series: dict[str, tuple[Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None, ...]]
    """As those that are read."""


class FillAnswer(AdminAnswer):
    """What became of them."""

    pool: str
    minutes: int
    """That have passed and are not too old to be kept."""


# ── The model cache ───────────────────────────────────────────────────────────────────────────────


class ModelRequest(AdminRequest):
    """A model of the cache."""

    model: str = Field(min_length=1)
    """A URL, ``org/name`` of a hub, a directory, ``prepared://KEY``, or the name of a pool."""
    revision: str | None = None
    """A branch, tag or commit; of what is here also its beginning. ``null``: the newest."""


class PreloadRequest(ModelRequest):
    """A model to bring to the disk."""

    expected_use_at_s: float | None = None
    """When it will be used; what is used later is evicted sooner."""


class PrewarmRequest(ModelRequest):
    """A model whose weights to bring into the page cache."""

    rank: int = Field(default=0, ge=0)
    """Only what this tensor-parallel rank of ``world_size`` needs."""
    world_size: int = Field(default=1, ge=1)


class VerifyRequest(ModelRequest):
    """A model to read again."""

    repair: bool = False
    """Fetch what is damaged."""


class ReplicateRequest(ModelRequest):
    """A model that other sites shall preload."""

    sites: tuple[str, ...] = ()
    """Names in ``modelcache.sites``; empty for all."""


class EvictRequest(ModelRequest):
    """A revision to take from the disk, with what preparation steps have made of it."""

    force: bool = False
    """Also where it is pinned."""
    prepared: bool = False
    """Only what was made of it."""
    all: bool = False
    """All revisions."""


class CacheListing(AdminAnswer):
    """Every revision that is on the disk or on its way."""

    dir: str
    usage: CacheUsage
    traffic: CacheTraffic
    models: tuple[ModelEntry, ...]
    pools: tuple[str, ...]
    """Names that stand for the models of pools."""


class ModelAnswer(AdminAnswer):
    """What was done, to which model."""

    verb: str
    model: str
    """Its canonical URL, or its path."""
    revision: str | None
    elapsed_s: float = 0.0


class PinAnswer(ModelAnswer):
    """Whether the model is pinned now."""

    pinned: bool


class ModelOnDisk(ModelAnswer):
    """A model that is on the disk."""

    path: str
    """The directory that engines open, unless it is ``prepared``."""
    size_bytes: int | None
    """``null`` for a directory that is used where it lies."""
    files: int | None
    note: str
    """What its user should know; empty for nothing."""
    prepared: str | None
    """The directory with the result of its preparation steps; ``null`` for a model without."""


class PreloadAnswer(ModelOnDisk):
    """What was brought to the disk."""

    was_there: bool
    prepared_s: float | None = None
    """What the steps took; ``null`` where their result was there."""


class PrewarmedPages(AdminAnswer):
    """What was read into the page cache."""

    bytes_total: int
    bytes_read: int
    bytes_skipped: int = 0
    """Cached already."""
    bytes_missing: int = 0
    """Past the end of files."""
    elapsed_s: float = 0.0
    yielded_s: float = 0.0
    """Time stood back for other readers of the disk."""
    cpu_s: float = 0.0
    after: Residency


class PrewarmAnswer(ModelOnDisk):
    """What is in the page cache now."""

    pages: PrewarmedPages
    not_kept: str
    """Why the pages are not kept there; empty where they are."""


class DamagedFile(AdminAnswer):
    """Something that is not what it was."""

    path: str
    problem: str
    digest: str = ""
    piece: int | None = None


class VerifyAnswer(ModelAnswer):
    """What is damaged."""

    damage: tuple[DamagedFile, ...]
    repaired: bool


class SiteOutcome(AdminAnswer):
    """What became of a model at one site."""

    site: str
    done: bool
    revision: str | None = None
    size_bytes: int | None = None
    error: str | None = None


class ReplicateAnswer(ModelAnswer):
    """What became of it at each site."""

    sites: dict[str, SiteOutcome]


class EvictAnswer(ModelAnswer):
    """What is gone."""

    revisions: tuple[str, ...]
    freed_bytes: int
    left: tuple[str, ...]
    """Revisions that are still here."""
    prepared: bool
    """Only what was made of it is gone."""


Result = TypeVar("Result", bound=ModelAnswer)


class ProgressLine(AdminAnswer):
    """How far it is."""

    progress: Progress


class ResultLine(AdminAnswer, Generic[Result]):
    """The last line of what succeeded."""

    result: SerializeAsAny[Result]


def build_types() -> None:
    """Build every type now: a server's threads use them, and building is not safe in threads."""
    kinds: list[type[BaseModel]] = [AdminRequest, AdminAnswer, StatusAnswer]
    while kinds:
        kind = kinds.pop()
        kind.model_rebuild()
        kinds += kind.__subclasses__()
