"""Settings of the autoscaler: how pools are scaled, and which pools there are."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    model_validator,
)
from pydantic_core import PydanticCustomError

from autoscaler.types import PoolPolicy, TargetFigures, TimedBounds
from forecaster.cron import MOST_DURATION_S, RecurringWindow
from loaders.engines.base import ENGINES, EngineName, engine_of
from modelcache.refs import parse_ref
from modelcache.types import Tier

HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
OWN_HEADERS = frozenset({"host", "content-length", "transfer-encoding", "connection", "upgrade"})
URL_PATH = re.compile(r"[\x21-\x7e]*")
DNS_LABEL = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"
DNS_NAME = r"^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$"
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_url(url: str) -> str:
    """A server's base URL, without a trailing ``/`` or ``/v1``; ``ValueError`` when it is none. Its
    path, if any, goes before that of each request."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("must be http://host:port or https://host:port")
    if parts.username or parts.password:
        raise ValueError("must not carry a password: use headers or api_key_env")
    if parts.query or parts.fragment:
        raise ValueError("must not have a query or a fragment")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError("has a port that is not 0 to 65535") from None
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    if not URL_PATH.fullmatch(path):
        raise ValueError("has a path with characters that a request cannot carry")
    return f"{parts.scheme}://{parts.netloc}{path}"


def check_env(env: dict[str, str]) -> dict[str, str]:
    """Environment variables as given; ``ValueError`` for what no process can be given."""
    for name, value in env.items():
        if not ENV_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of an environment variable")
        if "\0" in value:
            raise ValueError(f"{name} holds a NUL character")
    return env


def check_headers(headers: dict[str, str]) -> dict[str, str]:
    """Headers as given; ``ValueError`` for what would break a request's framing."""
    for name, value in headers.items():
        if not HEADER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a header")
        if name.lower() in OWN_HEADERS:
            raise ValueError(f"{name} is set by Tidegate itself")
        if not value.isascii() or not value.isprintable():
            raise ValueError(f"{name} holds characters a header cannot carry")
    return headers


def check_argument(text: str) -> str:
    """One argument as given; ``ValueError`` for what no process can be given."""
    if "\0" in text:
        raise ValueError("holds a NUL character")
    return text


Name = Annotated[
    str, StringConstraints(min_length=1, max_length=256, pattern=r"^[^\s\x00-\x1f\x7f]+$")
]
PortName = Annotated[str, StringConstraints(pattern=DNS_LABEL, max_length=15)]
Url = Annotated[str, AfterValidator(check_url)]
Argument = Annotated[str, AfterValidator(check_argument)]


class ConsistentSettings(BaseModel):
    """Settings whose fields may contradict one another; let pass by a validation with a context."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def _conflicts(self) -> Iterator[str]:
        """The contradictions, each in words; all are raised in one validation error."""
        return iter(())

    @model_validator(mode="after")
    def _consistent(self, info: ValidationInfo) -> Self:
        if info.context is None and (text := "; ".join(self._conflicts())):
            raise PydanticCustomError("conflict", "{text}", {"text": text})
        return self


ScalingMode = Literal["auto", "advise", "observe"]
"""What is done with a decision."""


SlowModel = Literal["prophet", "stl_ets", "holt_winters"]


class ForecastSettings(BaseModel):
    """When forecasts are used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    history_least_s: float = Field(default=172_800.0, ge=0.0, le=604_800.0)
    """Seconds of a pool's demand that must be known before its forecast is used. Two days show
    whether a day repeats; before that it reacts. Forecasts look at eight days, some of whose
    minutes may be unknown: more than a week might never be met."""

    slow_models: tuple[SlowModel, ...] = Field(default=(), max_length=3)
    """Further models in the mix, where the extra ``models`` is installed. Each pool is fitted every
    three hours, in a process of its own. On our traces they brought nothing."""


UNMEASURED_IDLE_S = 300.0
"""How long an idle pool is kept while nothing is known of what its wake takes."""


class PriceSettings(BaseModel):
    """What a replica, memory and a waiting user cost, all in one currency. Decisions that weigh a
    replica against a wait use them; only what they are to one another matters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    replica_hour: float = Field(default=2.0, gt=0.0, le=1e6)
    """Price of one replica for an hour. 2 is about that of a GPU of the H100 class on demand."""

    waited_second: float = Field(default=0.01, gt=0.0, le=1e6)
    """Price of one second that one request waits longer than it should (for a cold start, or in a
    queue). 0.01 is 36 an hour, the time of a person; a batch job's waits are worth far less."""

    violated_second: float = Field(default=12.0, gt=0.0, le=1e6)
    """Price of a second in which one replica's worth of requests is answered beyond the SLO, in
    seconds of a replica. It sets how much headroom a forecast is given: the more this is, the fewer
    requests are late and the more replicas idle. 1 is the most requests within the SLO per
    replica-hour."""

    memory_gib_hour: float = Field(default=0.004, ge=0.0, le=1e6)
    """Price of one GiB of host memory for an hour, for what is kept warm at zero. 0.004 is about
    what clouds ask."""


class HistorySettings(ConsistentSettings):
    """How much of the past is kept in ``state_dir``: series of each pool, minute by minute."""

    max_age_s: float = Field(default=5_184_000.0, ge=3_600.0, le=315_360_000.0)
    """Seconds for which a minute is kept. 60 days show what changes from week to week."""

    max_bytes: int = Field(default=1_073_741_824, ge=1_048_576, le=1_099_511_627_776)
    """Bytes of the file; decisions of more than a day ago go first, then the oldest minutes. A busy
    pool takes some 400 kB a day, one without requests 55 kB."""


class AutoscalerSettings(ConsistentSettings):
    """How many replicas a pool has, and how they are started, watched and stopped."""

    mode: ScalingMode = "auto"
    """``auto``: decisions are carried out. ``advise``: they are published, for another autoscaler
    or for people, and only what requests that wait, ``min_replicas`` and operators ask for is
    done. ``observe``: likewise, and they are not published as a recommendation either, only
    recorded."""

    tick_s: float = Field(default=1.0, ge=0.05, le=60.0)
    """Seconds between two decisions for every pool. A held request is decided on at once, without
    waiting for the tick. 1 follows a burst closely and costs next to nothing."""

    stable_window_s: float = Field(default=60.0, ge=1.0, le=3_600.0)
    """Seconds of demand whose mean sets the replicas in quiet times. 60 is Knative's."""

    panic_window_s: float = Field(default=12.0, ge=0.5, le=600.0)
    """Seconds of demand whose mean is watched for bursts; not longer than ``stable_window_s``.
    Over Knative's tenth of the stable window (6) the means of few, large requests differ so much
    by chance that replicas are started for nothing."""

    panic_threshold: float = Field(default=2.0, ge=1.1, le=100.0)
    """A pool panics when the panic window asks for this many times the replicas that are ready.
    While it panics it only grows. 2 is Knative's."""

    scale_down_delay_s: float | None = Field(default=None, ge=0.0, le=86_400.0)
    """Seconds a lower number must have been enough before replicas go: the largest recommendation
    of that time counts. Unset: as long as a start takes, 30 at least and 60 at most. With a
    forecast that is trusted there is none, for it says what is needed again."""

    idle_to_zero_s: float | None = Field(default=None, ge=0.0, le=604_800.0)
    """Seconds without a request before the last replica of a pool with ``min_replicas = 0`` goes.
    Unset: as long as keeping it costs less than the wakes that spares, by the gaps between the
    pool's requests, its measured wakes and ``prices``; 300 until a start was measured."""

    max_scale_up_per_tick: int = Field(default=8, ge=1, le=1_000)
    """Replicas of one pool started by one decision at most, so that a burst does not start a fleet
    before its first engine is up."""

    max_scale_down_per_tick: int = Field(default=1_000, ge=1, le=10_000)
    """Replicas of one pool removed by one decision at most."""

    target_utilization_fraction: float = Field(default=0.7, gt=0.0, le=1.0)
    """The part of its capacity that a replica is loaded to where no forecast is trusted; with one,
    the forecast says how much headroom is needed. 0.7 is Knative's, and usual for an HPA."""

    backlog_s: float = Field(default=10.0, ge=1.0, le=3_600.0)
    """Seconds in which what is queued shall be worked off; where a start takes more than four times
    as long, a quarter of a start."""

    demand_stale_s: float = Field(default=10.0, ge=0.1, le=600.0)
    """Seconds after which an observation of demand no longer counts as known. On unknown demand a
    pool is never made smaller."""

    start_timeout_s: float = Field(default=600.0, ge=0.1, le=86_400.0)
    """Seconds an engine has from its start until it is ready; only this ends a slow start, no
    health check does. Large models on slow disks take many minutes."""

    prepare_timeout_s: float = Field(default=7_200.0, ge=0.1, le=604_800.0)
    """Seconds a model may take to arrive on this node before its engine is started; what has come
    by then is kept for the next try. 140 GB at 20 MB/s are two hours."""

    start_poll_s: float = Field(default=0.25, ge=0.01, le=60.0)
    """Seconds between two looks at an engine that is starting. All of it is added to a
    client's wait, and a look is one small request."""

    health_interval_s: float = Field(default=2.0, ge=0.05, le=600.0)
    """Seconds between two health checks of a replica that is ready or unhealthy. At most 100 are
    checked in a second: of more than 200 each is checked less often. One that fails a request is
    checked at once."""

    health_timeout_s: float = Field(default=5.0, ge=0.05, le=300.0)
    """Seconds one health check may take before it counts as failed. A busy engine is slow to
    answer; 5 is generous for one small request."""

    metrics_interval_s: float = Field(default=5.0, ge=0.5, le=3_600.0)
    """Seconds between two readings of a replica's own metrics (requests that run and wait, use of
    its KV cache) and of the GPUs. At most 50 replicas are read in a second, so that this takes no
    more than a fifth of a core: of very many each is read less often."""

    dcgm_url: Url | None = None
    """Page of this node's DCGM exporter (``http://127.0.0.1:9400/metrics``), from which GPUs are
    read. Unset: NVIDIA's library is asked, where the package nvidia-ml-py is installed (the extra
    ``gpu``)."""

    health_failures: int = Field(default=3, ge=1, le=100)
    """Health checks in a row that must fail before a ready replica is given no more requests. One
    success brings it back."""

    unhealthy_restart_s: float = Field(default=60.0, ge=0.1, le=86_400.0)
    """Seconds a replica may stay unhealthy before it is stopped and replaced (never one of a
    ``static`` pool)."""

    backoff_initial_s: float = Field(default=1.0, ge=0.01, le=3_600.0)
    """Seconds before a pool whose engine failed to start, or died, starts the next; doubled by
    each failure in a row."""

    backoff_max_s: float = Field(default=60.0, ge=0.01, le=86_400.0)
    """Longest wait between two starts of an engine that keeps failing; it is tried at this rate
    for ever. Not shorter than ``backoff_initial_s``."""

    backoff_reset_s: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """Seconds a replica must have been ready before its pool's earlier failures are forgotten. An
    engine that dies sooner is in a crash loop even if it answered for a moment."""

    drain_s: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """Seconds a replica that is to go may take to finish its requests; it is given no new ones.
    Then it is stopped whatever it still has."""

    drain_settle_s: float = Field(default=0.5, ge=0.0, le=60.0)
    """Seconds after the data path learned that a replica drains before "nothing in flight" is
    believed: a request may have been on its way to it."""

    terminate_s: float = Field(default=10.0, ge=0.1, le=600.0)
    """Seconds between SIGTERM and SIGKILL of an engine's whole process group."""

    keep_engines_s: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """Seconds an engine goes on after its control process has died. A ``tidegate up`` with the same
    ``state_dir`` that comes in time takes over the engines that still listen and that it would
    start in the same way; else they end. 0: engines end with their control process."""

    call_timeout_s: float = Field(default=60.0, ge=0.1, le=3_600.0)
    """Seconds one call to a backend may take (start, sleep, wake) before it counts as failed. A
    wake from host memory takes about 3 s for 64 GiB."""

    failed_kept: int = Field(default=3, ge=0, le=100)
    """Replicas that failed and are still shown in the status of a pool, the newest of them."""

    log_bytes: int = Field(default=10_485_760, ge=4_096, le=1_099_511_627_776)
    """Bytes of one log file of one replica before the next is begun. 10 MiB hold a day of vLLM's
    usual output."""

    log_files: int = Field(default=3, ge=1, le=100)
    """Log files kept of one replica, the current one included; the oldest goes."""

    log_replicas: int = Field(default=20, ge=1, le=10_000)
    """Replicas of one pool whose logs are kept after they have ended, newest first. With
    ``log_bytes`` and ``log_files`` this bounds the disk used by logs."""

    log_tail_lines: int = Field(default=12, ge=1, le=1_000)
    """Last lines of an engine's log that a failure quotes."""

    history_size: int = Field(default=256, ge=1, le=100_000)
    """Decisions kept per pool for ``tidegate explain``; equal ones in a row count as one."""

    history: HistorySettings = HistorySettings()
    """How much of the past is kept."""

    wake_samples: int = Field(default=8, ge=1, le=1_000)
    """Newest measured wake times of a model and tier that are kept. The estimate of the next wake
    is their maximum, so that a client told to come back is not told too early."""

    forecast: ForecastSettings = ForecastSettings()
    """When forecasts are used."""

    host_memory_bytes: int | None = Field(default=None, ge=1)
    """Most host memory that engines without GPUs may take of this machine, all together; what one
    takes is ``process.memory_bytes`` of its pool. Models that do not fit beside each other take
    turns. Unset: no limit."""

    min_loaded_s: float = Field(default=5.0, ge=0.0, le=86_400.0)
    """Seconds a replica is left loaded, from when it is ready, before it makes room for another
    model while it is idle."""

    turn_s: float = Field(default=60.0, ge=0.0, le=86_400.0)
    """Seconds a replica may be loaded while it is busy and another model waits for its memory; then
    it gets no new requests, and makes room when it has none left. It bounds how long a model waits
    for its turn."""

    prices: PriceSettings = PriceSettings()
    """What a replica, memory and a waiting user cost."""

    def _conflicts(self) -> Iterator[str]:
        if self.panic_window_s > self.stable_window_s:
            yield (
                f"panic_window_s ({self.panic_window_s:g}) is longer than stable_window_s "
                f"({self.stable_window_s:g})"
            )
        if self.backoff_max_s < self.backoff_initial_s:
            yield (
                f"backoff_max_s ({self.backoff_max_s:g}) is shorter than backoff_initial_s "
                f"({self.backoff_initial_s:g})"
            )


class TierSettings(ConsistentSettings):
    """How warm a pool stays at zero: seconds in each tier before the next colder one. Unset: for as
    long as it costs less than the wakes it spares, by the pool's past and ``autoscaler.prices``. 0
    leaves a tier out, and so does a machine or an engine that does not have it."""

    sleep: bool = False
    """Start engines so that they can sleep, their weights in host memory, and let them for as long
    as it pays. Needs an engine that can (vLLM on a GPU, the simulated one); where it cannot, this
    tier is left out. Models that share a GPU wake in about a second then."""

    sleeping_s: float | None = Field(default=0.0, ge=0.0, le=31_536_000.0)
    """Seconds an engine sleeps before it is ended; more than 0 includes ``sleep``. 0 leaves it to
    ``sleep``."""

    forked_s: float | None = Field(default=None, ge=0.0, le=31_536_000.0)
    """Seconds an engine process stands by, everything imported and no weights loaded. Shares most
    of its memory with the fork server. Unset: as long as it pays, where there is a fork server."""

    paged_s: float | None = Field(default=None, ge=0.0, le=31_536_000.0)
    """Seconds the weights are kept in the page cache, within ``modelcache.page_budget_bytes``.
    Unset: as long as it pays."""

    on_disk_s: float | None = Field(default=None, ge=0.0, le=31_536_000.0)
    """Seconds the weights of a model with a URL stay on this node's disk before they are given up;
    a directory is never removed. Unset: until the model cache needs the room."""

    sleep_level: int = Field(default=1, ge=1, le=2)
    """How deep an engine sleeps: 1 keeps its weights in host memory, 2 drops them."""

    @property
    def sleeps(self) -> bool:
        """Whether engines are started so that they can sleep."""
        return self.sleep or self.sleeping_s != 0

    @property
    def keeps_pages(self) -> bool:
        """Whether there is any tier in which the weights are in the page cache."""
        return self.forked_s != 0 or self.paged_s != 0

    @property
    def stays_s(self) -> dict[Tier, float | None]:
        """Seconds in each tier that has a limit; ``remote`` has none, and ``running`` is not
        ended by time alone."""
        return {
            Tier.SLEEPING: None if self.sleep and self.sleeping_s == 0 else self.sleeping_s,
            Tier.FORKED: self.forked_s,
            Tier.PAGED: self.paged_s,
            Tier.ON_DISK: self.on_disk_s,
        }


class ProcessPoolSettings(ConsistentSettings):
    """What a replica of a ``process`` pool is given of this machine."""

    gpus: tuple[Annotated[int, Field(ge=0, le=1_023)], ...] = Field(default=(), max_length=1_024)
    """Indices of the GPUs this pool may use, as ``nvidia-smi`` numbers them. Empty: every GPU of
    the machine, if ``gpus_per_replica`` asks for any."""

    gpus_per_replica: int = Field(default=0, ge=0, le=1_024)
    """GPUs one replica is given (``CUDA_VISIBLE_DEVICES``). 0 gives none, and sets nothing."""

    gpu_memory_bytes: int | None = Field(default=None, ge=1)
    """Memory one replica takes of each of its GPUs, so that replicas can share one. Unset: a GPU
    given to a replica is given to no other."""

    memory_bytes: int | None = Field(default=None, ge=1)
    """Host memory one replica without GPUs takes of ``autoscaler.host_memory_bytes``. Unset: what
    was measured; until it was, a replica is loaded alone."""

    cpus_per_replica: int | None = Field(default=None, ge=1, le=4_096)
    """CPU cores one replica is pinned to, its own while there are enough. Unset: not pinned."""

    def _conflicts(self) -> Iterator[str]:
        if len(set(self.gpus)) != len(self.gpus):
            yield "gpus repeat an index"
        if self.gpus and not self.gpus_per_replica:
            yield "gpus is set, but gpus_per_replica is 0"
        if self.gpus and self.gpus_per_replica > len(self.gpus):
            yield f"gpus_per_replica ({self.gpus_per_replica}) > the {len(self.gpus)} gpus given"
        if self.gpu_memory_bytes is not None and not self.gpus_per_replica:
            yield "gpu_memory_bytes is set, but gpus_per_replica is 0"


BackendName = Literal["process", "static", "kubernetes"]
"""Where the replicas of a pool run. A pool's settings for its backend have a table of that name."""


EXTERNAL_KUBERNETES = "kubernetes_external"


class StaticPoolSettings(ConsistentSettings):
    """Where the servers of a ``static`` pool are, and how they are asked."""

    urls: tuple[Url, ...] = Field(default=(), max_length=1_000)
    """Base URLs of the servers, one replica each; at least one is required. A path is kept
    (``https://node/team-a``), a trailing ``/v1`` taken off."""

    headers: Annotated[dict[str, str], AfterValidator(check_headers)] = Field(default_factory=dict)
    """Headers added to every request to the servers."""

    api_key_env: str | None = Field(default=None, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    """Environment variable with the key sent to the servers as ``Authorization: Bearer``; keys do
    not belong in files."""

    health_path: str = Field(default="/health", pattern=r"^/[\x21-\x7e]*$")
    """Path that answers 200 when a server is well. A server that answers 404 is asked for
    ``/v1/models`` instead."""

    def _conflicts(self) -> Iterator[str]:
        if len(set(self.urls)) != len(self.urls):
            yield "urls repeat a server"
        if self.api_key_env and any(name.lower() == "authorization" for name in self.headers):
            yield "api_key_env and headers both set Authorization"


class KubernetesPoolSettings(ConsistentSettings):
    """Which workload of a cluster has the replicas of a ``kubernetes`` pool, and who scales it."""

    namespace: str | None = Field(default=None, pattern=DNS_LABEL, max_length=63)
    """Namespace of the workload. Unset: the one that Tidegate runs in."""

    api_version: str = Field(default="apps/v1", pattern=r"^([a-z0-9.-]+/)?v[a-z0-9]+$")
    """Group and version of the workload's kind."""

    kind: str = Field(default="Deployment", pattern=r"^[A-Z][A-Za-z0-9]*$")
    """Kind of the workload: any that has a ``/scale`` subresource (``Deployment``, ``StatefulSet``,
    ``LeaderWorkerSet``), KServe's ``InferenceService``, ``RayCluster`` or ``RayService``, or, with
    ``api_version = "serving.knative.dev/v1"``, Knative's ``Service``."""

    name: str | None = Field(default=None, pattern=DNS_NAME, max_length=253)
    """Name of the workload; required."""

    worker_group: str = Field(default="", max_length=63)
    """Worker group of a ``RayCluster`` or ``RayService``. Empty: the only one."""

    service: str | None = Field(default=None, pattern=DNS_LABEL, max_length=63)
    """Service whose EndpointSlices have the addresses of the replicas. Unset: the pods' own
    addresses, at ``port``."""

    port: int | PortName | None = None
    """Port of the engine, by number or by its name in the EndpointSlices. Unset: the Service's only
    port, or that named ``http``; a pod's own is 8000, as vLLM's."""

    service_url: Url | None = None
    """One address in front of all replicas, where they have none of their own (Ray Serve)."""

    health_path: str = Field(default="/health", pattern=r"^/[\x21-\x7e]*$")
    """Path that answers 200 when an engine is well."""

    scaled_by: Literal["tidegate", "hpa", "keda", "knative"] = "tidegate"
    """Who writes the workload's number of replicas while it has any. Whoever else it is, Tidegate
    routes to what there is, publishes what it would have, and holds requests at zero."""

    zero_owner: Literal["tidegate", "hpa", "keda", "none"] | None = None
    """Who takes the workload to zero and back. Unset: ``tidegate``, and with KEDA or Knative
    nobody but them. Never two."""

    @property
    def owner_of_zero(self) -> str:
        """Who takes it to zero and back."""
        if self.zero_owner is not None:
            return self.zero_owner
        return "tidegate" if self.scaled_by in {"tidegate", "hpa"} else self.scaled_by

    @property
    def is_written(self) -> bool:
        """Whether Tidegate writes the workload's number, be it only to zero and back."""
        return "tidegate" in {self.scaled_by, self.owner_of_zero}

    def _conflicts(self) -> Iterator[str]:
        if self.api_version.startswith("serving.knative.dev/") and self.scaled_by != "knative":
            yield (
                f"scaled_by is {self.scaled_by}, but Knative scales its own Services: say knative, "
                "or give the Service the autoscaler class tidegate.dev instead"
            )
        if isinstance(self.port, int) and not 1 <= self.port <= 65_535:
            yield f"port ({self.port}) is not 1 to 65535"
        if self.zero_owner in {"hpa", "keda"} and self.scaled_by != self.zero_owner:
            yield (
                f"zero_owner is {self.zero_owner}, but scaled_by is {self.scaled_by}: who takes a "
                "workload to zero and back also scales it, or Tidegate does"
            )
        if self.scaled_by == "keda" and self.zero_owner == "tidegate":
            yield (
                "zero_owner is tidegate, but scaled_by is keda: KEDA takes a workload to zero "
                'itself unless its minReplicaCount is 1; then say scaled_by = "hpa", which KEDA '
                "drives"
            )


class KnativeSettings(BaseModel):
    """What Tidegate has to do with Knative, where the cluster has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    autoscaler_url: str = Field(
        default="ws://autoscaler.knative-serving.svc:8080", pattern=r"^(wss?://[\x21-\x7e]+)?$"
    )
    """Where Knative's autoscaler takes statistics, by which it is asked for the replicas of its
    Services ahead of demand. Empty: it is not asked."""

    pod_autoscalers: bool = False
    """Whether pools are also the revisions of Knative Services whose autoscaler class is
    ``tidegate.dev``."""


class KubernetesSettings(ConsistentSettings):
    """The cluster that ``kubernetes`` pools are in."""

    kubeconfig: str | None = Field(default=None, min_length=1)
    """File with the address and the credentials of the API server. Unset: the service account of
    the pod, else ``KUBECONFIG`` and ``~/.kube/config``."""

    namespace: str | None = Field(default=None, pattern=DNS_LABEL, max_length=63)
    """Namespace of the lease, of ModelPools, and of pools that name none. Unset: that of the pod or
    of the kubeconfig's context."""

    lease: str | None = Field(default=None, pattern=DNS_NAME, max_length=253)
    """Lease by which several Tidegates elect the one that serves and scales; the others wait, not
    ready, to take its place. Unset: this is the only one."""

    lease_s: float = Field(default=15.0, ge=1.0, le=3_600.0)
    """Seconds after which a leader that has ended without notice is replaced."""

    label_leader: bool = False
    """The leader's pod gets the label ``tidegate.dev/leader`` with the lease's name, by which a
    Service finds it, and those that wait are ready at ``/readyz``: so rollouts and evictions count
    them. Needs ``lease``, and the pod's name as its host name, as Kubernetes gives it."""

    model_pools: bool = False
    """Whether pools are also those of the ModelPool resources in the cluster, beside those of the
    settings."""

    all_namespaces: bool = False
    """ModelPools and Knative Services of all namespaces, not only of ``namespace``."""

    knative: KnativeSettings = KnativeSettings()
    """What Tidegate has to do with Knative, where the cluster has it."""

    ahpa_pools: bool = False
    """Whether AdvancedHorizontalPodAutoscalers (AHPA) are pools too, beside ModelPools: Tidegate
    routes to their workloads and records what it would have, and AHPA scales them, those of
    ModelPools included, until it is deleted."""

    node: str | None = Field(default=None, pattern=DNS_NAME, max_length=253)
    """Node that this cache agent is on, which it labels with the models it has, so that pods which
    need them prefer it. Unset: no node is labelled."""

    node_cache_image: str | None = Field(default=None, min_length=1, max_length=1_024)
    """Image of Tidegate, for the containers by which pods use the cache of their node
    (``useNodeCache`` and ``preloadNodes`` of a ModelPool). Unset: that of its own pod."""

    node_cache_dir: str = Field(default="/var/lib/tidegate", pattern=r"^/[\x21-\x7e]*$")
    """Directory of nodes in which their cache agents have ``cache`` and, as ``state_dir``,
    ``agent``."""

    @property
    def has_pools(self) -> bool:
        """Whether pools come from resources of the cluster."""
        return self.model_pools or self.knative.pod_autoscalers

    def _conflicts(self) -> Iterator[str]:
        if self.label_leader and self.lease is None:
            yield "lease is missing: label_leader is set, and needs it"
        if self.label_leader and self.lease is not None and len(self.lease) > 63:
            yield "lease is longer than 63 characters, which a label may not be (label_leader)"
        if self.ahpa_pools and not self.model_pools:
            yield "ahpa_pools is set, but model_pools is not"


class ScheduleSettings(ConsistentSettings):
    """Windows which recur: bounds of a pool's replicas that hold in them, or demand that comes."""

    name: str = Field(min_length=1, max_length=256)
    """What it is called in ``explain``."""

    cron: str = Field(min_length=1, max_length=200)
    """When a window begins: minute, hour, day of month, month, day of week."""

    duration_s: float = Field(gt=0.0, le=MOST_DURATION_S)
    """Seconds a window lasts."""

    timezone: str = Field(default="UTC", min_length=1, max_length=100)
    """Time zone of ``cron``, by its IANA name."""

    min_replicas: int | None = Field(default=None, ge=0, le=10_000)
    """Fewest replicas in a window, ready when it begins. Unset: as without it."""

    max_replicas: int | None = Field(default=None, ge=1, le=10_000)
    """Most replicas in a window. Unset: as without it."""

    expect_demand: bool = False
    """Expect in a window at least the demand that there was at that time of those of the last eight
    days: for a burst that comes too seldom to be recognised, such as a job on Mondays."""

    @property
    def window(self) -> RecurringWindow:
        """As forecasts use it."""
        return RecurringWindow.parse(self.cron, self.duration_s, self.timezone)

    @property
    def bounds(self) -> TimedBounds:
        """As decisions use it."""
        return TimedBounds(
            name=self.name,
            window=self.window,
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
        )

    def _conflicts(self) -> Iterator[str]:
        try:
            _ = self.bounds
        except ValueError as error:
            yield str(error)
        if self.min_replicas is None and self.max_replicas is None and not self.expect_demand:
            yield "neither min_replicas, max_replicas nor expect_demand is set"
        elif (self.min_replicas or 0) > (self.max_replicas or 10_000):
            yield f"min_replicas ({self.min_replicas}) > max_replicas ({self.max_replicas})"


class SloSettings(BaseModel):
    """What a request is promised: a replica's capacity is what it carries within these."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    ttft_s: float = Field(default=5.0, gt=0.0, le=3_600.0)
    """Seconds until the first token, for 95 of 100 requests."""

    itl_s: float | None = Field(default=None, gt=0.0, le=60.0)
    """Seconds between two tokens, for 95 of 100 pauses. Unset: any."""


class TargetSettings(BaseModel):
    """Figures at which a pool is held, for those who scale by them; the largest need wins."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    requests_per_s: float | None = Field(default=None, gt=0.0, le=1e6)
    """Requests per second of one replica, over ``autoscaler.stable_window_s``."""

    queued_requests: float | None = Field(default=None, gt=0.0, le=1e6)
    """Requests held in the gateway or waiting in engines, for one replica."""

    ttft_s: float | None = Field(default=None, gt=0.0, le=3_600.0)
    """Seconds until the first token, for 95 of 100 requests of the last minute."""

    itl_s: float | None = Field(default=None, gt=0.0, le=60.0)
    """Seconds between two tokens, for 95 of 100 pauses of the last minute."""

    e2e_s: float | None = Field(default=None, gt=0.0, le=86_400.0)
    """Seconds until an answer is whole, for 95 of 100 requests of the last minute."""

    gpu_utilization_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """Mean utilization of the GPUs of its replicas."""


class PoolSettings(ConsistentSettings):
    """One model that is served, and the replicas that serve it."""

    name: Name
    """What clients write in ``"model"``. Without white space, unique among names and aliases."""

    aliases: tuple[Name, ...] = Field(default=(), max_length=100)
    """Further names clients may use for this pool. A server that lists one as a model of its own is
    asked for it by that name."""

    adapters: tuple[Name, ...] = Field(default=(), max_length=1_000)
    """LoRA adapters that the engines serve beside the model, each by the name in the engine's
    ``--lora-modules``. Clients ask for them by name, and ``GET /v1/models`` lists them."""

    backend: BackendName = "process"
    """``process``: engines are child processes of Tidegate. ``static``: externally
    managed servers at ``static.urls``: health-checked and routed to, never started or stopped.
    ``kubernetes``: pods of a workload that Tidegate, or another autoscaler, scales."""

    engine: EngineName | None = None
    """Which engine a ``process`` pool starts; required there. ``simulated`` answers instantly and
    is no model."""

    model: str | None = Field(default=None, min_length=1, max_length=4_096)
    """For ``process``: a directory, a URL (``hf://``, ``s3://``, ``oss://``, ``gs://``, ``http(s)://``,
    ``file://``) or a hub's ``org/name``, which are fetched into the model cache, or a name the
    engine knows; required. For ``static``: the name the servers know the model by; unset: the one
    they list, or the pool's own."""

    min_replicas: int = Field(default=0, ge=0, le=10_000)
    """Fewest replicas of a ``process`` pool. 0 lets it go to zero without requests."""

    max_replicas: int = Field(default=1, ge=1, le=10_000)
    """Most replicas of a ``process`` pool. 1, because a second engine rarely fits beside the
    first unless that was planned for."""

    target_inflight_tokens: int = Field(default=8_192, ge=1, le=1_000_000_000)
    """Tokens (prompt and expected output of all its requests) one replica carries comfortably: a
    hint for the first hours, until what it carries within ``slo`` is learned. 8192 are some 20
    ordinary chats at once."""

    max_inflight_requests: int | None = Field(default=None, ge=1, le=100_000)
    """Requests one replica is given at once. Unset: ``router.max_inflight_requests``."""

    max_inflight_tokens: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Tokens one replica is given at once. Unset: ``router.max_inflight_tokens``."""

    max_model_len_tokens: int | None = Field(default=None, ge=1, le=1_000_000_000)
    """Longest prompt and answer together. Given to a vLLM that is started; unset: the model's own,
    as the engine reports it."""

    replica_hour_price: float | None = Field(default=None, gt=0.0, le=1e6)
    """This pool's own ``autoscaler.prices.replica_hour``: a replica on four GPUs costs four times
    as much."""

    violated_second_price: float | None = Field(default=None, gt=0.0, le=1e6)
    """This pool's own ``autoscaler.prices.violated_second``: how much headroom its forecast is
    given."""

    mode: ScalingMode | None = None
    """This pool's own ``autoscaler.mode``."""

    schedules: tuple[ScheduleSettings, ...] = Field(default=(), max_length=100)
    """Bounds that hold at certain times, in place of ``min_replicas`` and ``max_replicas``, and
    demand that comes at certain times. Where windows overlap the largest of each counts."""

    slo: SloSettings = SloSettings()
    """What a request is promised."""

    targets: TargetSettings = TargetSettings()
    """Further figures it is scaled by."""

    idle_to_zero_s: float | None = Field(default=None, ge=0.0, le=604_800.0)
    """This pool's own ``autoscaler.idle_to_zero_s``."""

    scale_down_delay_s: float | None = Field(default=None, ge=0.0, le=86_400.0)
    """This pool's own ``autoscaler.scale_down_delay_s``."""

    start_timeout_s: float | None = Field(default=None, ge=0.1, le=86_400.0)
    """This pool's own ``autoscaler.start_timeout_s``."""

    prepare_timeout_s: float | None = Field(default=None, ge=0.1, le=604_800.0)
    """This pool's own ``autoscaler.prepare_timeout_s``."""

    engine_args: tuple[Argument, ...] = Field(default=(), max_length=1_000)
    """Further arguments of the engine's command line, as the engine spells them."""

    env: Annotated[dict[str, str], AfterValidator(check_env)] = Field(default_factory=dict)
    """Further environment variables of the engine."""

    process: ProcessPoolSettings = ProcessPoolSettings()
    """What a replica of a ``process`` pool is given of this machine."""

    static: StaticPoolSettings = StaticPoolSettings()
    """Where the servers of a ``static`` pool are, and how they are asked."""

    kubernetes: KubernetesPoolSettings = KubernetesPoolSettings()
    """Which workload has the replicas of a ``kubernetes`` pool, and who scales it."""

    tiers: TierSettings = TierSettings()
    """How warm a ``process`` pool stays while it is at zero."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names that clients may use for this pool."""
        return (self.name, *self.aliases, *self.adapters)

    @property
    def backend_key(self) -> str:
        """Which backend has its replicas: workloads that another autoscaler scales have their
        own."""
        if self.backend == "kubernetes" and self.kubernetes.scaled_by != "tidegate":
            return EXTERNAL_KUBERNETES
        return self.backend

    def _conflicts(self) -> Iterator[str]:
        if self.min_replicas > self.max_replicas:
            yield f"min_replicas ({self.min_replicas}) > max_replicas ({self.max_replicas})"
        if len(set(self.names)) != len(self.names):
            yield "aliases or adapters repeat a name"
        match self.backend:
            case "process":
                yield from self._process_conflicts()
            case "static":
                yield from self._static_conflicts()
            case "kubernetes":
                if self.kubernetes.name is None:
                    yield "kubernetes.name is missing: a kubernetes pool needs its workload's"
        for name, unset in (
            ("process", ProcessPoolSettings()),
            ("static", StaticPoolSettings()),
            ("kubernetes", KubernetesPoolSettings()),
        ):
            if name != self.backend and getattr(self, name) != unset:
                yield f'{name} is only for backend = "{name}"'
        if self.backend != "process" and self.tiers != TierSettings():
            yield 'tiers is only for backend = "process"'

    def _process_conflicts(self) -> Iterator[str]:
        if self.engine is None:
            names = " or ".join(f'"{name}"' for name in ENGINES)
            yield f"engine is missing: a process pool needs one ({names})"
        else:
            problems = engine_of(self.engine).check(self.engine_args)
            yield from (f"engine_args {problem}" for problem in problems)
        if self.model is None:
            yield "model is missing: a process pool needs the path, URL or name of one"
        elif "://" in self.model:
            try:
                parse_ref(self.model)
            except ValueError as error:
                yield f"model cannot be fetched: {error}"

    def _static_conflicts(self) -> Iterator[str]:
        if not self.static.urls:
            yield "static.urls is missing: a static pool needs at least one"
        for field in ("engine", "engine_args", "env", "min_replicas"):
            if getattr(self, field):
                yield f'{field} is not for backend = "static"'


def make_slug(name: str, taken: Collection[str]) -> str:
    """A name for a pool that is fit for ids, paths and files, and is not taken."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.")[:100] or "pool"
    number, unique = 1, slug
    while unique in taken:
        number += 1
        unique = f"{slug}.{number}"
    return unique


def hints_of(pools: Iterable[PoolSettings]) -> dict[str, tuple[RecurringWindow, ...]]:
    """By pool, the windows in which its demand is expected."""
    return {
        pool.name: tuple(one.window for one in pool.schedules if one.expect_demand)
        for pool in pools
        if pool.schedules
    }


def make_policy(pool: PoolSettings, settings: AutoscalerSettings) -> PoolPolicy:
    """The policy of one pool: its own settings over the autoscaler's."""
    return PoolPolicy(
        pool=pool.name,
        min_replicas=pool.min_replicas,
        max_replicas=pool.max_replicas,
        target_inflight_tokens=pool.target_inflight_tokens,
        max_inflight_requests=pool.max_inflight_requests,
        stable_window_s=settings.stable_window_s,
        panic_window_s=settings.panic_window_s,
        panic_threshold=settings.panic_threshold,
        scale_down_delay_s=settings.scale_down_delay_s
        if pool.scale_down_delay_s is None
        else pool.scale_down_delay_s,
        idle_to_zero_s=first(
            pool.idle_to_zero_s,
            UNMEASURED_IDLE_S if settings.idle_to_zero_s is None else settings.idle_to_zero_s,
        ),
        max_scale_up_per_tick=settings.max_scale_up_per_tick,
        max_scale_down_per_tick=settings.max_scale_down_per_tick,
        target_utilization_fraction=settings.target_utilization_fraction,
        backlog_s=settings.backlog_s,
        violated_second=first(pool.violated_second_price, settings.prices.violated_second),
        targets=TargetFigures(**pool.targets.model_dump()),
        demand_stale_s=settings.demand_stale_s,
    )


def first(own: float | None, otherwise: float) -> float:
    """A pool's own value where it has one."""
    return otherwise if own is None else own
