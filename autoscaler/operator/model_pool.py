"""The resource ModelPool (tidegate.dev/v1alpha1): its fields, and the settings they stand for.
Pure.

The custom resource definition is made of these classes, so the API server refuses what they would
refuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from autoscaler.settings import (
    DNS_LABEL,
    DNS_NAME,
    KubernetesPoolSettings,
    PoolSettings,
    ScalingMode,
    ScheduleSettings,
    SloSettings,
    TargetSettings,
)
from loaders.engines.base import EngineName

GROUP, VERSION, KIND, PLURAL = "tidegate.dev", "v1alpha1", "ModelPool", "modelpools"
API_VERSION = f"{GROUP}/{VERSION}"

Count = Annotated[int, Field(ge=0, le=10_000)]
Label = Annotated[str, Field(pattern=DNS_LABEL, max_length=63)]
DnsName = Annotated[str, Field(pattern=DNS_NAME, max_length=253)]
ModelName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^\S+$")]


class ResourcePart(BaseModel):
    """A part of the resource: fields in camel case, unknown ones refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
    )


class TargetRef(ResourcePart):
    """A workload that exists: Tidegate sets its number of replicas, and nothing else of it."""

    api_version: str = Field(default="apps/v1", pattern=r"^([a-z0-9.-]+/)?v[a-z0-9]+$")
    """Group and version of its kind."""

    kind: str = Field(default="Deployment", pattern=r"^[A-Z][A-Za-z0-9]*$")
    """Any kind with a /scale subresource, InferenceService, RayCluster, RayService, or Service
    of Knative."""

    name: DnsName
    """Its name, in the namespace of the ModelPool."""

    worker_group: str = Field(default="", max_length=63)
    """Worker group of a RayCluster or RayService. Empty: the only one."""


class Template(ResourcePart):
    """A workload that Tidegate makes and keeps: an engine's pods."""

    kind: Literal["Deployment", "StatefulSet", "LeaderWorkerSet"] = "Deployment"
    """What the pods are a part of. LeaderWorkerSet: a replica is a group of pods."""

    group_size: int = Field(default=1, ge=1, le=1_000)
    """Pods of one replica of a LeaderWorkerSet."""

    metadata: dict[str, Any] = Field(default_factory=dict)
    """Labels and annotations of the pods."""

    spec: dict[str, Any]
    """The pods' spec. The engine is the container named engine, else the first. Where it leaves
    them out it is given a port, a readiness probe, time to finish its answers and, for vLLM,
    arguments."""


class SloSpec(ResourcePart):
    """What a request is promised."""

    ttft_seconds: float | None = Field(default=None, gt=0.0, le=3_600.0)
    """Seconds until the first token, for 95 of 100 requests."""

    itl_seconds: float | None = Field(default=None, gt=0.0, le=60.0)
    """Seconds between two tokens, for 95 of 100 pauses."""


class TargetsSpec(ResourcePart):
    """Figures at which it is held; the largest need counts."""

    requests_per_second: float | None = Field(default=None, gt=0.0, le=1e6)
    """Requests per second of one replica."""

    queued_requests: float | None = Field(default=None, gt=0.0, le=1e6)
    """Requests held in the gateway or waiting in engines, for one replica."""

    ttft_seconds: float | None = Field(default=None, gt=0.0, le=3_600.0)
    """Seconds until the first token, for 95 of 100 requests of the last minute."""

    itl_seconds: float | None = Field(default=None, gt=0.0, le=60.0)
    """Seconds between two tokens, for 95 of 100 pauses of the last minute."""

    e2e_seconds: float | None = Field(default=None, gt=0.0, le=86_400.0, alias="e2eSeconds")
    """Seconds until an answer is whole, for 95 of 100 requests of the last minute."""

    gpu_utilization_fraction: float | None = Field(default=None, gt=0.0, le=1.0)
    """Mean utilization of the GPUs of its replicas."""


class Schedule(ResourcePart):
    """A window which recurs: bounds that hold in it, or demand that comes."""

    name: str = Field(min_length=1, max_length=256)
    """What it is called."""

    cron: str = Field(min_length=1, max_length=200)
    """When it begins: minute, hour, day of month, month, day of week."""

    duration_seconds: float = Field(gt=0.0, le=2_678_400.0)
    """Seconds it lasts."""

    timezone: str = Field(default="UTC", min_length=1, max_length=100)
    """Time zone of cron, by its IANA name."""

    min_replicas: Count | None = None
    """Fewest replicas in it, ready when it begins."""

    max_replicas: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Most replicas in it."""

    expect_demand: bool = False
    """Expect in it at least the demand of that time in the last eight days."""


class ModelPoolSpec(ResourcePart):
    """What a ModelPool is to be."""

    served_name: ModelName | None = None
    """What clients write in "model". Unset: the name of the ModelPool."""

    aliases: tuple[ModelName, ...] = Field(default=(), max_length=100)
    """Further names that clients may use."""

    adapters: tuple[ModelName, ...] = Field(default=(), max_length=1_000)
    """LoRA adapters that the engines serve beside the model."""

    model: str | None = Field(default=None, min_length=1, max_length=4_096)
    """The model by which engines know it, or are told to serve it."""

    engine: EngineName | None = None
    """The engine. Unset: any OpenAI-compatible one."""

    engine_args: tuple[str, ...] = Field(default=(), max_length=1_000)
    """Further arguments of a vLLM that is given its arguments by Tidegate."""

    replicas: Count | None = None
    """The number that kubectl scale or an HPA on the ModelPool asks for, in place of the demand.
    Unset: by demand."""

    min_replicas: Count = 0
    """Fewest replicas. 0: at zero without requests."""

    max_replicas: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Most replicas."""

    scaled_by: Literal["tidegate", "hpa", "keda", "knative"] = "tidegate"
    """Who sets the workload's number of replicas while it has any."""

    zero_owner: Literal["tidegate", "hpa", "keda", "none"] | None = None
    """Who takes it to zero and back; never two. Unset: tidegate, or KEDA or Knative where they
    scale."""

    target_ref: TargetRef | None = None
    """A workload that exists; this or template."""

    template: Template | None = None
    """A workload that Tidegate makes; this or targetRef."""

    service: Label | None = None
    """Service whose EndpointSlices have the replicas' addresses. Unset: the pods' own."""

    port: Annotated[int, Field(ge=1, le=65_535)] = 8_000
    """The engine's port in its pods."""

    port_name: str | None = Field(default=None, pattern=DNS_LABEL, max_length=15)
    """The port by its name in the Service's EndpointSlices."""

    service_url: str | None = Field(default=None, pattern=r"^https?://", max_length=2_048)
    """One address in front of all replicas, where they have none of their own."""

    health_path: str = Field(default="/health", pattern=r"^/[\x21-\x7e]*$", max_length=1_024)
    """Path that answers 200 when an engine is well."""

    mode: ScalingMode = "auto"
    """auto: decisions are carried out. advise: only published. observe: only recorded."""

    target_inflight_tokens: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Tokens one replica carries comfortably, until that is learned."""

    max_inflight_requests: Annotated[int, Field(ge=1, le=100_000)] | None = None
    """Requests one replica is given at once."""

    max_inflight_tokens: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Tokens one replica is given at once."""

    max_model_len_tokens: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Longest prompt and answer together."""

    idle_to_zero_seconds: Annotated[float, Field(ge=0.0, le=604_800.0)] | None = None
    """Seconds without a request before the last replica goes. Unset: as long as it pays."""

    scale_down_delay_seconds: Annotated[float, Field(ge=0.0, le=86_400.0)] | None = None
    """Seconds a lower number must have been enough."""

    start_timeout_seconds: Annotated[float, Field(ge=0.1, le=86_400.0)] | None = None
    """Seconds a replica has from its start until it is ready."""

    replica_hour_price: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Price of one replica for an hour, beside what a wait costs. Unset: that of the settings."""

    violated_second_price: Annotated[float, Field(gt=0.0, le=1e6)] | None = None
    """Price of a second in which one replica's worth of requests is late, in seconds of a replica:
    more is more headroom. Unset: that of the settings."""

    slo: SloSpec = SloSpec()
    """What a request is promised."""

    targets: TargetsSpec = TargetsSpec()
    """Further figures it is scaled by."""

    schedules: tuple[Schedule, ...] = Field(default=(), max_length=100)
    """Bounds that hold at certain times, and demand that comes at certain times."""

    queue_name: Label | None = None
    """Kueue's LocalQueue that admits the template's pods, and the Job of preloadNodes."""

    prefer_cached_nodes: bool = True
    """Prefer nodes whose cache agent has the model."""

    use_node_cache: bool = False
    """Engines of the template start from the cache of their node's agent, at /tidegate/model, on
    nodes with an agent only; the agent fetches what is missing. Needs Kubernetes 1.29."""

    preload_nodes: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Nodes that a Job brings the model to, by their cache agents, before it is needed there."""


RULES: tuple[tuple[str, str], ...] = (
    (
        "has(self.targetRef) != has(self.template)",
        "exactly one of targetRef and template is needed",
    ),
    (
        "(has(self.minReplicas) ? self.minReplicas : 0) <= "
        "(has(self.maxReplicas) ? self.maxReplicas : 1)",
        "minReplicas is more than maxReplicas",
    ),
    (
        "!has(self.zeroOwner) || !(self.zeroOwner in ['hpa', 'keda']) || "
        "(has(self.scaledBy) && self.scaledBy == self.zeroOwner)",
        "zeroOwner hpa or keda needs scaledBy of the same: who owns zero also scales, or Tidegate",
    ),
    (
        "!has(self.zeroOwner) || self.zeroOwner != 'tidegate' || !has(self.scaledBy) || "
        "!(self.scaledBy in ['keda', 'knative'])",
        "zeroOwner tidegate cannot be with scaledBy keda or knative: they go to zero themselves",
    ),
    (
        "!has(self.queueName) || has(self.template) || "
        "(has(self.preloadNodes) && self.preloadNodes > 0)",
        "queueName is only for template and preloadNodes: an existing workload has its own label",
    ),
    (
        "!has(self.template) || !has(self.scaledBy) || self.scaledBy != 'knative'",
        "scaledBy knative is only for targetRef",
    ),
    (
        "!has(self.useNodeCache) || !self.useNodeCache || (has(self.template) && has(self.model))",
        "useNodeCache needs template and model",
    ),
    (
        "!has(self.preloadNodes) || self.preloadNodes == 0 || has(self.model)",
        "preloadNodes needs model",
    ),
)
"""What fields say of each other, in CEL, and what is said where they do not hold."""

LEFT_BEHIND = "the workload made of it would be left behind: make another ModelPool"
TRANSITIONS: tuple[tuple[str, str], ...] = (
    (
        "!has(oldSelf.template) || has(self.template)",
        f"template cannot be replaced by targetRef, for {LEFT_BEHIND}",
    ),
    (
        "!has(oldSelf.template) || !has(self.template) || "
        "(has(oldSelf.template.kind) ? oldSelf.template.kind : 'Deployment') == "
        "(has(self.template.kind) ? self.template.kind : 'Deployment')",
        f"template.kind cannot change, for {LEFT_BEHIND}",
    ),
)
"""What a change of the spec must keep, in CEL: the API server alone has both, so from 1.25 on."""


class InvalidModelPool(ValueError):
    """A ModelPool that stands for no pool; the message says why, for its status."""


def parse_spec(found: Mapping[str, Any]) -> ModelPoolSpec:
    """The spec of a ModelPool. Raises ``InvalidModelPool``."""
    try:
        spec = ModelPoolSpec.model_validate(found.get("spec") or {})
    except ValidationError as error:
        raise InvalidModelPool(describe(error)) from None
    # API servers before 1.25 know no CEL.
    owner, scaler = spec.zero_owner, spec.scaled_by
    holds = (
        (spec.target_ref is None) != (spec.template is None),
        spec.min_replicas <= spec.max_replicas,
        owner not in {"hpa", "keda"} or owner == scaler,
        owner != "tidegate" or scaler not in {"keda", "knative"},
        spec.queue_name is None or spec.template is not None or spec.preload_nodes > 0,
        spec.template is None or scaler != "knative",
        not spec.use_node_cache or (spec.template is not None and spec.model is not None),
        spec.preload_nodes == 0 or spec.model is not None,
    )
    broken = [text for held, (_, text) in zip(holds, RULES, strict=True) if not held]
    if broken:
        raise InvalidModelPool(f"spec: {'; '.join(broken)}")
    return spec


def describe(error: ValidationError) -> str:
    """What is wrong, in a line."""
    parts = []
    for one in error.errors():
        place = ".".join(str(part) for part in ("spec", *one["loc"]))
        parts.append(f"{place}: {one['msg']}")
    return "; ".join(parts)


def to_settings(
    found: Mapping[str, Any], spec: ModelPoolSpec, *, taken_over: str = ""
) -> PoolSettings:
    """The pool that a ModelPool stands for. ``taken_over`` names another autoscaler that scales its
    workload, which Tidegate then leaves alone. Raises ``InvalidModelPool``."""
    metadata = found["metadata"]
    target = spec.target_ref or TargetRef(
        name=metadata["name"],
        kind=(spec.template or Template(spec={})).kind,
        api_version=api_version_of(spec),
    )
    try:
        values: dict[str, Any] = {
            "name": spec.served_name or metadata["name"],
            "aliases": spec.aliases,
            "adapters": spec.adapters,
            "backend": "kubernetes",
            "engine": spec.engine,
            "model": spec.model,
            "min_replicas": spec.min_replicas,
            "max_replicas": spec.max_replicas,
            "max_inflight_requests": spec.max_inflight_requests,
            "max_inflight_tokens": spec.max_inflight_tokens,
            "max_model_len_tokens": spec.max_model_len_tokens,
            "mode": spec.mode,
            "idle_to_zero_s": spec.idle_to_zero_seconds,
            "scale_down_delay_s": spec.scale_down_delay_seconds,
            "start_timeout_s": spec.start_timeout_seconds,
            "replica_hour_price": spec.replica_hour_price,
            "violated_second_price": spec.violated_second_price,
            "kubernetes": KubernetesPoolSettings(
                namespace=metadata["namespace"],
                api_version=target.api_version,
                kind=target.kind,
                name=target.name,
                worker_group=target.worker_group,
                service=spec.service,
                port=spec.port_name if spec.service and spec.port_name else spec.port,
                service_url=spec.service_url,
                health_path=spec.health_path,
                scaled_by="hpa" if taken_over else spec.scaled_by,
                zero_owner="none" if taken_over else spec.zero_owner,
            ),
            "slo": SloSettings(
                **without_none(ttft_s=spec.slo.ttft_seconds, itl_s=spec.slo.itl_seconds)
            ),
            "targets": TargetSettings(
                requests_per_s=spec.targets.requests_per_second,
                queued_requests=spec.targets.queued_requests,
                ttft_s=spec.targets.ttft_seconds,
                itl_s=spec.targets.itl_seconds,
                e2e_s=spec.targets.e2e_seconds,
                gpu_utilization_fraction=spec.targets.gpu_utilization_fraction,
            ),
        }
        if spec.target_inflight_tokens is not None:
            values["target_inflight_tokens"] = spec.target_inflight_tokens
        values["schedules"] = tuple(
            ScheduleSettings(
                name=one.name,
                cron=one.cron,
                duration_s=one.duration_seconds,
                timezone=one.timezone,
                min_replicas=one.min_replicas,
                max_replicas=one.max_replicas,
                expect_demand=one.expect_demand,
            )
            for one in spec.schedules
        )
        return PoolSettings(**values)
    except ValidationError as error:
        raise InvalidModelPool(describe(error)) from None


def api_version_of(spec: ModelPoolSpec) -> str:
    """Group and version of the workload that is made of a template."""
    if spec.template is not None and spec.template.kind == "LeaderWorkerSet":
        return "leaderworkerset.x-k8s.io/v1"
    return "apps/v1"


def without_none(**values: float | None) -> dict[str, Any]:
    """Those that are set."""
    return {name: value for name, value in values.items() if value is not None}


COLUMNS: tuple[tuple[str, str, str, int], ...] = (
    ("Ready", "integer", ".status.readyReplicas", 0),
    ("Desired", "integer", ".status.desiredReplicas", 0),
    ("Max", "integer", ".spec.maxReplicas", 0),
    ("Reason", "string", ".status.reason", 0),
    ("Serving", "string", ".status.conditions[?(@.type=='Ready')].status", 0),
    ("Scaled-By", "string", ".spec.scaledBy", 1),
    ("Age", "date", ".metadata.creationTimestamp", 0),
)


def make_crd() -> dict[str, Any]:
    """The custom resource definition."""
    spec = structural(ModelPoolSpec.model_json_schema(by_alias=True))
    spec["x-kubernetes-validations"] = [
        {"rule": rule, "message": message} for rule, message in (*RULES, *TRANSITIONS)
    ]
    status = {
        "type": "object",
        "properties": {
            "observedGeneration": {"type": "integer", "format": "int64"},
            "replicas": {"type": "integer", "description": "Pods that are there or coming."},
            "readyReplicas": {"type": "integer", "description": "Replicas that serve."},
            "desiredReplicas": {"type": "integer", "description": "What Tidegate would have."},
            "selector": {"type": "string", "description": "Selector of the pods, for /scale."},
            "reason": {"type": "string", "description": "Why desiredReplicas is what it is."},
            "message": {"type": "string", "description": "The same, for people."},
            "conditions": {
                "type": "array",
                "x-kubernetes-list-type": "map",
                "x-kubernetes-list-map-keys": ["type"],
                "items": {
                    "type": "object",
                    "required": ["type", "status", "reason", "lastTransitionTime"],
                    "properties": {
                        "type": {"type": "string"},
                        "status": {"type": "string", "enum": ["True", "False", "Unknown"]},
                        "reason": {"type": "string"},
                        "message": {"type": "string"},
                        "observedGeneration": {"type": "integer", "format": "int64"},
                        "lastTransitionTime": {"type": "string", "format": "date-time"},
                    },
                },
            },
        },
    }
    schema = {
        "type": "object",
        "description": "A model that Tidegate serves: its workload is scaled by demand, to zero.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string"},
            "kind": {"type": "string"},
            "metadata": {"type": "object"},
            "spec": spec,
            "status": status,
        },
    }
    columns = [
        {"name": name, "type": kind, "jsonPath": path, **({"priority": low} if low else {})}
        for name, kind, path, low in COLUMNS
    ]
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/part-of": "tidegate"},
        },
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["mp"],
                "categories": ["all"],
            },
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": schema},
                    "subresources": {
                        "status": {},
                        "scale": {
                            "specReplicasPath": ".spec.replicas",
                            "statusReplicasPath": ".status.replicas",
                            "labelSelectorPath": ".status.selector",
                        },
                    },
                    "additionalPrinterColumns": columns,
                }
            ],
        },
    }


KEPT = (
    "type",
    "description",
    "enum",
    "pattern",
    "minLength",
    "maxLength",
    "minimum",
    "maximum",
    "minItems",
    "maxItems",
    "required",
)


def structural(schema: Mapping[str, Any], named: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A JSON schema of pydantic as a structural schema of Kubernetes: without references,
    alternatives of null, titles, or bounds that are numbers by themselves."""
    named = schema.get("$defs", {}) if named is None else named
    if "$ref" in schema:
        target = named[schema["$ref"].rpartition("/")[2]]
        schema = {**target, **{key: value for key, value in schema.items() if key != "$ref"}}
    if "anyOf" in schema:
        (only,) = (one for one in schema["anyOf"] if one.get("type") != "null")
        schema = {**only, **{key: value for key, value in schema.items() if key != "anyOf"}}
        return structural(schema, named)
    found = {key: schema[key] for key in KEPT if key in schema}
    if "description" in found:
        found["description"] = " ".join(found["description"].split())
    if "const" in schema:
        found["enum"] = [schema["const"]]
    for bound, key in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if bound in schema:
            found |= {key: schema[bound], bound: True}
    if schema.get("default") not in (None, "", [], {}) and schema.get("type") != "object":
        found["default"] = schema["default"]
    if "items" in schema:
        found["items"] = structural(schema["items"], named)
    if schema.get("properties"):
        found["properties"] = {
            name: structural(one, named) for name, one in schema["properties"].items()
        }
    elif schema.get("type") == "object":
        found["x-kubernetes-preserve-unknown-fields"] = True
    return found
