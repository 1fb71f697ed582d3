"""Every metric: its name, its help and, for those of the data path, its place in shared memory.

Names stand here and nowhere else; ``gateway.admin.metrics_page`` only fills in the values.

A worker counts in lists and copies them into its own block of shared memory (``shared.py``) many
times a second; the control process sums the blocks at each scrape. So counting costs next
to nothing, no message is sent, and a worker that dies takes at most a moment's counts with it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

from gateway.datapath.protocol.errors import Reason


class Metric(NamedTuple):
    """A counter or gauge: name without prefix, help text, fixed extra labels."""

    name: str
    help: str
    labels: tuple[tuple[str, str], ...] = ()
    gauge: bool = False


class Buckets(NamedTuple):
    """A histogram: name without prefix, help text, upper bounds in the metric's unit, fixed extra
    labels."""

    name: str
    help: str
    bounds: tuple[float, ...]
    labels: tuple[tuple[str, str], ...] = ()


def _by(
    name: str,
    label: str,
    values: Sequence[str],
    text: str,
    labels: tuple[tuple[str, str], ...] = (),
) -> list[Metric]:
    """One metric for each value of a label; the first has the help text."""
    return [
        Metric(name, "" if index else text, ((label, value), *labels))
        for index, value in enumerate(values)
    ]


# Chosen for language models: from an answer out of a warm cache to one that was held for minutes.
_TTFT_S = (
    *(0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 20.0, 40.0),
    *(80.0, 160.0, 320.0, 640.0),
)
_E2E_S = (
    *(0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.5, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0, 45.0, 60.0, 90.0),
    *(120.0, 180.0, 300.0, 600.0, 1200.0),
)
_ITL_S = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15),
    *(0.2, 0.3, 0.5, 1.0, 2.5, 5.0),
)
_WAIT_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0),
    *(45.0, 60.0, 90.0, 120.0, 180.0, 300.0, 600.0),
)
_LENGTH_TOKENS = (
    *(1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000),
    *(200_000, 500_000, 1_000_000),
)

# Per pool. The first ones are what the autoscaler reads; their order is part of the layout.
ARRIVALS: Final = 0
ARRIVED_PROMPT_TOKENS: Final = 1
ARRIVED_OUTPUT_TOKENS: Final = 2
INFLIGHT_REQUESTS: Final = 3
INFLIGHT_TOKENS: Final = 4
QUEUED_REQUESTS: Final = 5
QUEUED_TOKENS: Final = 6
QUEUED_BYTES: Final = 7
OK: Final = 8
CLIENT_ERROR: Final = 9
ENGINE_ERROR: Final = 10
CANCELLED: Final = 11
REJECTED: Final = 12
RETRIES: Final = 13
HELD: Final = 14
PROMPT_TOKENS: Final = 15
OUTPUT_TOKENS: Final = 16
CHUNKS: Final = 17
REQUEST_BYTES: Final = 18
RESPONSE_BYTES: Final = 19
EJECTIONS: Final = 20
HELD_SINCE: Final = 21
"""When the oldest held request began to wait: ms of the monotonic clock, 0 for none."""

REASONS: Final[tuple[Reason, ...]] = tuple(Reason)
FINISH_REASONS: Final = ("stop", "length", "tool_calls", "abort", "error", "repetition", "other")
"""As vLLM's ``finish_reason``; those of the other APIs are mapped to them."""
CODES: Final = (
    *("200", "201", "204", "400", "401", "403", "404", "405", "408", "409", "413", "415", "422"),
    *("429", "500", "501", "502", "503", "504", "507", "1xx", "2xx", "3xx", "4xx", "5xx"),
)
"""Statuses that are counted one by one, and the classes of all others."""

_POOL_PLAIN: Final[tuple[Metric, ...]] = (
    Metric("arrivals_total", "Requests that named this pool and were read whole or in part."),
    Metric("arrived_prompt_tokens_total", "Estimated prompt tokens of the requests that came."),
    Metric("arrived_output_tokens_total", "Output tokens expected of the requests that came."),
    Metric("inflight_requests", "Requests with an engine now.", gauge=True),
    Metric("inflight_tokens", "Estimated tokens of the requests with an engine.", gauge=True),
    Metric("queued_requests", "Requests held in the gateway now.", gauge=True),
    Metric("queued_tokens", "Estimated tokens of the requests held in the gateway.", gauge=True),
    Metric("queued_bytes", "Body bytes of the requests held in the gateway.", gauge=True),
    Metric("requests_total", "Finished requests by outcome.", (("outcome", "ok"),)),
    Metric("requests_total", "", (("outcome", "client_error"),)),
    Metric("requests_total", "", (("outcome", "engine_error"),)),
    Metric("requests_total", "", (("outcome", "cancelled"),)),
    Metric("requests_total", "", (("outcome", "rejected"),)),
    Metric("retries_total", "Attempts repeated on another connection or replica."),
    Metric("held_total", "Requests that had to wait in the gateway for a replica."),
    Metric("prompt_tokens_total", "Prompt tokens by the engines' usage, or else estimated."),
    Metric("generation_tokens_total", "Output tokens from usage, or else counted stream events."),
    Metric("stream_chunks_total", "Blocks of streamed answers relayed."),
    Metric("request_bytes_total", "Request body bytes passed to engines."),
    Metric("response_bytes_total", "Response bytes passed to clients."),
    Metric("ejections_total", "Replicas that were given no requests for a while: they failed."),
    Metric("oldest_held_seconds", "Age of the oldest request that is held now.", gauge=True),
)
POOL_METRICS: Final[tuple[Metric, ...]] = (
    *_POOL_PLAIN,
    *_by("rejections_total", "reason", REASONS, "Answers the gateway gave in the engine's place."),
    *_by("request_success_total", "finished_reason", FINISH_REASONS, "Answers, by why they ended."),
    *_by("responses_total", "code", CODES, "Answers by status; those of the gateway too."),
)
_REASONS_AT: Final = len(_POOL_PLAIN)
REASON_INDEX: Final = {reason: _REASONS_AT + index for index, reason in enumerate(REASONS)}
_FINISH_AT: Final = _REASONS_AT + len(REASONS)
FINISH_INDEX: Final = {name: _FINISH_AT + index for index, name in enumerate(FINISH_REASONS)}
_CODES_AT: Final = _FINISH_AT + len(FINISH_REASONS)
_CODE_ORDER: Final = {int(code): n for n, code in enumerate(CODES) if code.isdigit()}
_CLASSES_AT: Final = len(_CODE_ORDER)


def code_index(status: int) -> int:
    """Where answers with this HTTP status are counted in a pool's integers."""
    return _CODES_AT + _code(status)


OK_CODE: Final = _CODES_AT
"""That of 200."""


def worker_code_index(status: int) -> int:
    """Where they are counted in a worker's, of requests that named no pool."""
    return _WORKER_CODES_AT + _code(status)


def _code(status: int) -> int:
    index = _CODE_ORDER.get(status)
    return _CLASSES_AT + min(max(status // 100, 1), 5) - 1 if index is None else index


ENDPOINTS: Final = ("chat", "completions", "messages", "responses", "embeddings", "other")
ENDPOINT_INDEX: Final = {
    b"/v1/chat/completions": 0,
    b"/v1/completions": 1,
    b"/v1/messages": 2,
    b"/v1/responses": 3,
    b"/v1/embeddings": 4,
}
"""The kind of an endpoint by its path, as an index of ``ENDPOINTS``."""
OTHER_ENDPOINT: Final = len(ENDPOINTS) - 1


def _by_endpoint(name: str, text: str, bounds: tuple[float, ...]) -> list[Buckets]:
    return [
        Buckets(name, text, bounds, (("endpoint", endpoint), ("stream", stream)))
        for endpoint in ENDPOINTS
        for stream in ("false", "true")
    ]


# Each with one for every endpoint, not streamed and streamed: ``TTFT + 2 * endpoint + stream``.
TTFT: Final = 0
E2E: Final = 2 * len(ENDPOINTS)
ITL: Final = 2 * E2E
QUEUE_WAIT: Final = ITL + 1
HELD_TIME: Final = ITL + 2
PROMPT_LENGTH: Final = ITL + 3
OUTPUT_LENGTH: Final = ITL + 4
POOL_HISTOGRAMS: Final[tuple[Buckets, ...]] = (
    *_by_endpoint(
        "time_to_first_token_seconds",
        "Request head read to first answer byte of the body.",
        _TTFT_S,
    ),
    *_by_endpoint("e2e_request_latency_seconds", "Request head read to answer finished.", _E2E_S),
    Buckets(
        "inter_token_latency_seconds",
        "Between two tokens of a streamed answer; tokens that come together share their gap.",
        _ITL_S,
    ),
    Buckets("request_queue_time_seconds", "Request head read to sent to an engine.", _WAIT_S),
    Buckets("held_seconds", "Time in the hold queue, of those that were held.", _WAIT_S),
    Buckets(
        "request_prompt_tokens",
        "Prompt tokens of a request, by usage or estimated.",
        _LENGTH_TOKENS,
    ),
    Buckets("request_generation_tokens", "Output tokens of an answer.", _LENGTH_TOKENS),
)

# Per worker.
CONNECTIONS: Final = 0
ACCEPTED: Final = 1
BUFFERED_BYTES: Final = 2
UPSTREAM_CONNECTIONS: Final = 3
UPSTREAM_OPENED: Final = 4
TLS_NOT_AFTER: Final = 5
_WORKER_PLAIN: Final[tuple[Metric, ...]] = (
    Metric(
        "connections",
        "Client connections open now; of the endpoint picker: requests under way.",
        gauge=True,
    ),
    Metric(
        "connections_accepted_total",
        "Client connections accepted; of the endpoint picker: requests that Envoy asked about.",
    ),
    Metric("buffered_bytes", "Request body bytes held in memory.", gauge=True),
    Metric("upstream_connections", "Connections to engines open now.", gauge=True),
    Metric("upstream_connections_opened_total", "Connections opened to engines."),
    Metric(
        "tls_certificate_not_after_timestamp_seconds",
        "Unix time at which the certificate that clients are shown expires; absent without TLS.",
        gauge=True,
    ),
)
WORKER_METRICS: Final[tuple[Metric, ...]] = (
    *_WORKER_PLAIN,
    *_by("rejections_total", "reason", REASONS, "", (("pool", ""),)),
    *_by("responses_total", "code", CODES, "", (("pool", ""),)),
)
"""Those with a ``pool`` are of requests that named none, over all workers."""
_WORKER_REASONS_AT: Final = len(_WORKER_PLAIN)
_WORKER_CODES_AT: Final = _WORKER_REASONS_AT + len(REASONS)
WORKER_REASON_INDEX: Final = {
    reason: _WORKER_REASONS_AT + index for index, reason in enumerate(REASONS)
}

# Per replica.
REPLICA_OK: Final = 0
REPLICA_ERROR: Final = 1
REPLICA_FIRST_TOKENS: Final = 2
REPLICA_FIRST_TOKEN_US: Final = 3
REPLICA_INTEGERS: Final = 4

# Of the control side. The labels here are the fixed ones; the control side fills in the values.
BUILD: Final = Metric("build", "The Tidegate that answers.", gauge=True)
REPLICAS: Final = Metric("replicas", "Replicas by state.", gauge=True)
DESIRED_REPLICAS: Final = Metric("desired_replicas", "Desired replicas.", gauge=True)
RECOMMENDED_REPLICAS: Final = Metric(
    "recommended_replicas",
    "Replicas recommended, whether that is carried out or not; absent in the mode `observe`.",
    gauge=True,
)
REACTIVE_REPLICAS: Final = Metric(
    "reactive_replicas", "Replicas that demand recommends by itself.", gauge=True
)
FORECAST_REPLICAS: Final = Metric(
    "forecast_replicas",
    "Replicas that the forecast recommends; absent without one that is trusted.",
    gauge=True,
)
FORECAST_TRUSTED: Final = Metric(
    "forecast_trusted", "1 while decisions use the forecast.", gauge=True
)
CAPACITY: Final = Metric(
    "replica_capacity_tokens_per_second",
    "Tokens per second that one replica sustains within the SLO, by where that is known from.",
    gauge=True,
)
WAKE_ETA: Final = Metric(
    "wake_eta_seconds",
    "Measured time from a start to ready; absent until one was measured.",
    gauge=True,
)
TIER: Final = Metric("tier", "1 for the tier that the pool is in.", gauge=True)
TIER_WAKE: Final = Metric(
    "tier_wake_seconds",
    "Median measured time from a start or wake out of this tier to ready, on this node.",
    gauge=True,
)
STARTING_REPLICAS: Final = Metric(
    "starting_replicas", "Starting replicas, by their step.", gauge=True
)
PREPARED_BYTES: Final = Metric(
    "prepared_bytes", "Bytes of models fetched so far for starting replicas.", gauge=True
)
PREPARE_BYTES: Final = Metric(
    "prepare_bytes", "Bytes of models to fetch for starting replicas, as far as known.", gauge=True
)
FORK_SERVER: Final = Metric(
    "fork_server", "1 for the state that the fork server is in; absent without one.", gauge=True
)
FORK_SERVER_BYTES: Final = Metric(
    "fork_server_bytes", "Proportional set size of the fork server.", gauge=True
)
FORKS: Final = Metric("forks_total", "Engines forked.")
FORK_SERVER_CRASHES: Final = Metric(
    "fork_server_crashes_total", "Times that the fork server ended or failed to start."
)
STANDBY_BYTES: Final = Metric(
    "standby_bytes",
    "Proportional set size of the standby engine.",
    gauge=True,
)
START_FAILURES: Final = Metric("start_failures", "Failed starts in a row.", gauge=True)
STARTS: Final = Metric(
    "starts_total",
    "Starts and wakes, by the tier they began from: those out of sleeping are wakes.",
)
START_TIME: Final = Metric(
    "start_time_seconds", "Start or wake begun to ready, by the tier it began from."
)
REPLICA_CRASHES: Final = Metric(
    "replica_crashes_total", "Replicas that failed after they had been ready."
)
MAX_REPLICAS: Final = Metric("max_replicas", "The pool's max_replicas.", gauge=True)
REPLICA_REQUESTS: Final = Metric(
    "replica_requests_total", "Answers of the replica: ok below 500, error from 500 or cut."
)
REPLICA_INFLIGHT_REQUESTS: Final = Metric(
    "replica_inflight_requests", "Requests with the replica now.", gauge=True
)
REPLICA_INFLIGHT_TOKENS: Final = Metric(
    "replica_inflight_tokens", "Estimated tokens of the requests with the replica.", gauge=True
)
REPLICA_TTFT: Final = Metric(
    "replica_time_to_first_token_seconds",
    "Sent to the replica to its first answer byte: how often, and the sum.",
)
ENGINE_METRICS: Final[dict[str, Metric]] = {
    "running_requests": Metric("engine_running_requests", "Requests the engine runs.", gauge=True),
    "waiting_requests": Metric(
        "engine_waiting_requests", "Requests that wait in the engine.", gauge=True
    ),
    "max_running_requests": Metric(
        "engine_max_running_requests", "Most requests the engine runs at once.", gauge=True
    ),
    "kv_cache_usage_fraction": Metric(
        "engine_kv_cache_usage_fraction", "Use of the engine's KV cache, 0 to 1.", gauge=True
    ),
    "kv_cache_tokens": Metric(
        "engine_kv_cache_tokens", "Tokens that the engine's KV cache holds.", gauge=True
    ),
    "prefix_cache_queries_tokens": Metric(
        "engine_prefix_cache_queries_tokens_total",
        "Prompt tokens looked up in the engine's prefix cache.",
    ),
    "prefix_cache_hits_tokens": Metric(
        "engine_prefix_cache_hits_tokens_total",
        "Prompt tokens found in the engine's prefix cache.",
    ),
    "preemptions": Metric("engine_preemptions_total", "Requests the engine has preempted."),
    "prompt_tokens": Metric("engine_prompt_tokens_total", "Prompt tokens, as the engine counts."),
    "generation_tokens": Metric(
        "engine_generation_tokens_total", "Generated tokens, as the engine counts."
    ),
    "sleep_level": Metric("engine_sleep_level", "How deep the engine sleeps; 0 awake.", gauge=True),
}
"""What a replica's engine says itself, by the field of its ``EngineLoad``."""
ENGINE_HIT_FRACTION: Final = Metric(
    "engine_prefix_cache_hit_fraction",
    "Prompt tokens found in the prefix cache of those looked up between the last two readings.",
    gauge=True,
)
ENGINE_AGE: Final = Metric(
    "engine_metrics_age_seconds", "Age of what the engine said last.", gauge=True
)
GPU_INFO: Final = Metric("gpu_info", "The GPUs of this node.", gauge=True)
GPU_THROTTLED: Final = Metric(
    "gpu_throttled", "1 for each reason for which the GPU's clocks are lowered.", gauge=True
)
GPU_XIDS: Final = Metric(
    "gpu_xid_errors_total", "Errors of the GPU that the driver has reported, by NVIDIA's number."
)
GPU_FAULT: Final = Metric(
    "gpu_fault", "1 for what is to be done about the GPU's gravest fault.", gauge=True
)
REPLICA_GPU: Final = Metric("replica_gpu", "1 for each GPU that the replica has.", gauge=True)
WORKER_RESTARTS: Final = Metric("worker_restarts_total", "Times that the worker was restarted.")
WORKER_PROCESS_METRICS: Final[dict[str, Metric]] = {
    "process_cpu_seconds_total": Metric("worker_cpu_seconds_total", "CPU time of the worker."),
    "process_resident_memory_bytes": Metric(
        "worker_resident_memory_bytes", "Resident memory of the worker.", gauge=True
    ),
    "process_open_fds": Metric(
        "worker_open_fds", "Open file descriptors of the worker.", gauge=True
    ),
}
"""Of each worker process, by prometheus-client's name for this process's own figure."""
DECISIONS: Final = Metric("decisions_total", "Decisions of the autoscaler, by reason.")
CONTROL_ERRORS: Final = Metric(
    "control_errors_total", "Errors the control loop met and survived, by where they were raised."
)

FORECASTS_SCORED: Final = Metric(
    "forecasts_scored_total", "Forecasts whose lead has passed, at the quantile 0.95."
)
FORECASTS_COVERED: Final = Metric(
    "forecasts_covered_total", "Of those, the ones that what came was within."
)
FORECAST_LOSS: Final = Metric(
    "forecast_loss_tokens_per_second_total", "Their pinball losses, summed."
)
LAST_VALUE_LOSS: Final = Metric(
    "last_value_loss_tokens_per_second_total",
    "The pinball losses of the last value in their place, summed.",
)
HISTORY_BYTES: Final = Metric(
    "history_bytes", "Size of the file with the past of the pools.", gauge=True
)
HISTORY_FAILURES: Final = Metric(
    "history_write_failures_total", "Times that the past of the pools could not be written."
)

# Of the model cache, by the name of the figure in its traffic report.
CACHE_METRICS: Final[dict[str, Metric]] = {
    "store_bytes": Metric(
        "cache_read_bytes_total",
        "Bytes of models read, by origin.",
        (("origin", "store"),),
    ),
    "peer_bytes": Metric("cache_read_bytes_total", "", (("origin", "peers"),)),
    "wasted_bytes": Metric(
        "cache_wasted_bytes_total", "Bytes read and discarded: interrupted, wrong, or read twice."
    ),
    "sent_bytes": Metric("cache_sent_bytes_total", "Bytes of models sent to peers."),
    "retries": Metric("cache_retries_total", "Reads of a source that were repeated."),
    "peer_failures": Metric("cache_peer_failures_total", "Reads from peers that failed."),
}

CACHE_LOOK_FAILURES: Final = Metric(
    "cache_look_failures_total", "Failed readings of the model cache's disk use."
)
CACHE_BYTES: Final = Metric("cache_bytes", "Disk use of the model cache, by kind.", gauge=True)
CACHE_QUOTA: Final = Metric(
    "cache_quota_bytes", "Quota of the model cache; absent without one.", gauge=True
)

# Where each histogram starts inside a pool's block: its bucket counts, then the overflow bucket.
HISTOGRAM_OFFSETS: Final[list[int]] = []
_offset = len(POOL_METRICS)
for _histogram in POOL_HISTOGRAMS:
    HISTOGRAM_OFFSETS.append(_offset)
    _offset += len(_histogram.bounds) + 1
_BOUNDS: Final = tuple(tuple(map(float, histogram.bounds)) for histogram in POOL_HISTOGRAMS)
POOL_INTEGERS: Final = _offset
POOL_SUMS: Final = len(POOL_HISTOGRAMS)
WORKER_INTEGERS: Final = len(WORKER_METRICS)


class PoolCounters:
    """One worker's counters of one pool: counted in lists, published into shared memory.

    A list element costs a quarter of a shared word to count in, and a request counts a dozen
    times. ``flush`` runs several times a second, and before other processes must read a count.
    """

    __slots__ = ("_integers_row", "_sums_row", "dirty", "integers", "sums")

    def __init__(self, integers_row: Any, sums_row: Any) -> None:
        self._integers_row = integers_row
        self._sums_row = sums_row
        self.integers: list[int] = list(integers_row)
        self.sums: list[float] = list(sums_row)
        self.dirty = False

    def observe(self, histogram: int, value: float, times: int = 1) -> None:
        """Add one value, in the histogram's unit, as often as it was seen."""
        at = HISTOGRAM_OFFSETS[histogram]
        for bound in _BOUNDS[histogram]:  # compiled, this is a third of what a bisection costs
            if value <= bound:
                break
            at += 1
        self.integers[at] += times
        self.sums[histogram] += value * times

    def flush(self) -> None:
        """Publish."""
        self._integers_row[:] = array("q", self.integers)
        self._sums_row[:] = array("d", self.sums)
        self.dirty = False
