"""The admin API's operations: one row for each route, from which server, console and
``/openapi.json`` (``describe``) are made. A test compares docs/reference/admin-api.md with
``OPERATIONS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import or_
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from autoscaler import types
from autoscaler.adapters import types as signals
from gateway.admin import schema
from gateway.admin.schema import (
    ERRORS,
    AdminAnswer,
    AdminIndex,
    AdminRequest,
    ApiDocument,
    CacheListing,
    DecisionsAnswer,
    DecisionsQuery,
    DrainAnswer,
    ErrorAnswer,
    EvictAnswer,
    EvictRequest,
    ExplainAnswer,
    ExplainQuery,
    FillAnswer,
    FillRequest,
    HistoryAnswer,
    HistoryListing,
    HistoryQuery,
    Liveness,
    ModelAnswer,
    ModelRequest,
    NoFields,
    PinAnswer,
    PreloadAnswer,
    PreloadRequest,
    PrewarmAnswer,
    PrewarmRequest,
    ProgressLine,
    Readiness,
    ReloadAnswer,
    ReplicateAnswer,
    ReplicateRequest,
    ResultLine,
    ScaleAnswer,
    ScaleRequest,
    ScoreAnswer,
    ScoreQuery,
    ServiceAnswer,
    SignalsAnswer,
    SignalsQuery,
    SleepAnswer,
    SleepRequest,
    StatusAnswer,
    VerifyAnswer,
    VerifyRequest,
    WakeAnswer,
)
from gateway.settings.fields import docstrings

LINES_TYPE = "application/x-ndjson"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EVERYWHERE = ("cross_site", "host_not_allowed", "internal_error")
"""Errors that any operation may have."""
OPEN = ("metrics", "healthz", "readyz")
"""Operations that TCP clients may have without the token: probes' and Prometheus'."""
OF_A_BODY = ("bad_json", "unknown_field", "body_timeout", "body_too_large", "content_type")

MAX_BODY_BYTES = 65_536
"""A change is a few words; more is a mistake."""
MAX_FILL_BYTES = 2_097_152
"""Half a day of every series takes a tenth of it."""

AnswerType = type[AdminAnswer] | type[StatusAnswer] | type[ApiDocument]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route. ``answer`` is ``None`` for plain text. With ``lines`` it takes long: it answers
    200 at once with JSON lines, ``ProgressLine`` s and at the end a ``ResultLine`` of its answer or
    an ``ErrorAnswer``; closing the connection cancels it. ``errors`` are codes of its own."""

    name: str
    method: Literal["GET", "POST"]
    path: str
    summary: str
    answer: AnswerType | None
    request: type[AdminRequest] | None = None
    query: type[AdminRequest] | None = None
    lines: bool = False
    errors: tuple[str, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES

    @property
    def answers(self) -> tuple[Any, ...]:
        """The types of what it answers with 200: of each line, where it answers in lines."""
        if self.lines:
            return ProgressLine, ResultLine[self.answer], ErrorAnswer  # type: ignore[name-defined]
        return () if self.answer is None else (self.answer,)

    def parse(self, text: str | bytes) -> Any:
        """An answer, or a line of it, of one of its types. Raises ``ValueError`` where it is
        none."""
        adapter: Any = TypeAdapter(reduce(or_, self.answers))
        return adapter.validate_json(text)


def _get(path: str, name: str, answer: AnswerType | None, summary: str) -> Operation:
    return Operation(name=name, method="GET", path=path, summary=summary, answer=answer)


def _pool(
    name: str, request: type[AdminRequest], answer: type[AdminAnswer], summary: str
) -> Operation:
    return Operation(
        name=name,
        method="POST",
        path=f"/pools/{{pool}}/{name}",
        summary=summary,
        request=request,
        answer=answer,
        errors=("pool_not_found", "bad_value", "timeout"),
    )


def _model(
    verb: str,
    request: type[ModelRequest],
    answer: type[ModelAnswer],
    summary: str,
    lines: bool = False,
) -> Operation:
    errors: tuple[str, ...] = ("bad_value", "model_not_found", "model_in_use", "no_space")
    errors += ("source_failed", "model_damaged", "cache_failed", "model_not_allowed")
    return Operation(
        name=verb,
        method="POST",
        path=f"/models/{verb}",
        summary=summary,
        request=request,
        answer=answer,
        lines=lines,
        errors=(*errors, "cancelled", "too_many") if lines else errors,
    )


INDEX = _get("/", "index", AdminIndex, "What there is here.")
OPENAPI = Operation(
    name="openapi",
    method="GET",
    path="/openapi.json",
    summary="This API, as OpenAPI 3.1 describes it.",
    answer=ApiDocument,
)
METRICS = _get("/metrics", "metrics", None, "Prometheus text.")
HEALTHZ = _get("/healthz", "healthz", Liveness, "200 as long as the process lives.")
READYZ = Operation(
    name="readyz",
    method="GET",
    path="/readyz",
    summary="200 while requests are accepted, else 503 with the reason.",
    answer=Readiness,
    errors=("not_ready",),
)
STATUS = _get("/status", "status", StatusAnswer, "Workers, pools, replicas and last decisions.")
SIGNALS = Operation(
    name="signals",
    method="GET",
    path="/signals",
    summary="What is published of the pools to other autoscalers; waits for a change if asked to.",
    query=SignalsQuery,
    answer=SignalsAnswer,
    errors=("bad_value", "unknown_field", "not_ready"),
)
EXPLAIN = Operation(
    name="explain",
    method="GET",
    path="/pools/{pool}/explain",
    summary="The pool's decisions with their reasons, newest last.",
    query=ExplainQuery,
    answer=ExplainAnswer,
    errors=("pool_not_found", "bad_value", "unknown_field"),
)
SCALE = _pool(
    "scale", ScaleRequest, ScaleAnswer, "Hold a pool at a number of replicas, or give it back."
)
SLEEP = _pool("sleep", SleepRequest, SleepAnswer, "Put a pool's idle ready replicas to sleep.")
WAKE = _pool("wake", NoFields, WakeAnswer, "Wake a pool, as a request for it would.")
DISABLE = _pool(
    "disable", NoFields, ServiceAnswer, "Take a pool out of service: its requests are refused."
)
ENABLE = _pool("enable", NoFields, ServiceAnswer, "Take a pool back into service.")
DRAIN = Operation(
    name="drain",
    method="POST",
    path="/replicas/{replica}/drain",
    summary="Give a replica no more requests, and stop it when it has finished.",
    request=NoFields,
    answer=DrainAnswer,
    errors=("replica_not_found", "bad_value", "timeout"),
)
RELOAD = Operation(
    name="reload",
    method="POST",
    path="/reload",
    summary="Read the settings again, and apply what is different in them.",
    request=NoFields,
    answer=ReloadAnswer,
    errors=("bad_settings", "not_ready"),
)
HISTORY = Operation(
    name="history",
    method="GET",
    path="/history",
    summary="What is kept of the past: of which pools, from when to when.",
    answer=HistoryListing,
    errors=("history_failed",),
)
POOL_HISTORY = Operation(
    name="pool_history",
    method="GET",
    path="/pools/{pool}/history",
    summary="A pool's past, minute by minute; two weeks at once at most.",
    query=HistoryQuery,
    answer=HistoryAnswer,
    errors=("pool_not_found", "bad_value", "unknown_field", "history_failed"),
)
DECISIONS = Operation(
    name="decisions",
    method="GET",
    path="/pools/{pool}/decisions",
    summary="The decision that held at a moment of the past, and those around it.",
    query=DecisionsQuery,
    answer=DecisionsAnswer,
    errors=(
        "pool_not_found", "decision_not_found", "bad_value", "unknown_field", "history_failed",
    ),
)  # fmt: skip
SCORE = Operation(
    name="score",
    method="GET",
    path="/pools/{pool}/score",
    summary="What the decisions of a stretch of the past cost and brought.",
    query=ScoreQuery,
    answer=ScoreAnswer,
    errors=(
        "pool_not_found", "decision_not_found", "bad_value", "unknown_field", "history_failed",
    ),
)  # fmt: skip
FILL_HISTORY = Operation(
    name="fill_history",
    method="POST",
    path="/pools/{pool}/history",
    summary="Add to a pool's past what is unknown in it.",
    request=FillRequest,
    answer=FillAnswer,
    errors=("pool_not_found", "bad_value", "history_failed"),
    max_body_bytes=MAX_FILL_BYTES,
)
MODELS = _get("/models", "models", CacheListing, "The models in the cache, and what they take.")
VERBS = {
    one.name: one
    for one in (
        _model("preload", PreloadRequest, PreloadAnswer, "Bring a model to the disk.", lines=True),
        _model(
            "prewarm",
            PrewarmRequest,
            PrewarmAnswer,
            "Bring the weights that engines open into the page cache.",
            lines=True,
        ),
        _model(
            "verify",
            VerifyRequest,
            VerifyAnswer,
            "Read every byte of a model again and compare it with its digests.",
            lines=True,
        ),
        _model(
            "replicate",
            ReplicateRequest,
            ReplicateAnswer,
            "Have other sites preload a model.",
            lines=True,
        ),
        _model("pin", ModelRequest, PinAnswer, "Keep a model on the disk whatever happens."),
        _model("unpin", ModelRequest, PinAnswer, "Let a pinned model be evicted again."),
        _model("evict", EvictRequest, EvictAnswer, "Take a revision of a model from the disk."),
    )
}
"""The operations over one model, by verb."""

COMMON = (INDEX, OPENAPI, METRICS, HEALTHZ, READYZ, STATUS)
CACHE = (MODELS, *VERBS.values())
POOLS = (SIGNALS, EXPLAIN, SCALE, SLEEP, WAKE, DISABLE, ENABLE, DRAIN, RELOAD)
PAST = (HISTORY, POOL_HISTORY, DECISIONS, SCORE, FILL_HISTORY)
OPERATIONS = (*COMMON, *POOLS, *PAST, *CACHE)
"""Every operation of a gateway's admin listener; a cache agent has ``COMMON`` and ``CACHE``."""


# ── OpenAPI ───────────────────────────────────────────────────────────────────────────────────────


def describe(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these operations."""
    models = list(dict.fromkeys(one for operation in operations for one in _models(operation)))
    refs, defs = models_json_schema(models, ref_template="#/components/schemas/{model}")
    for name, fields in (docstrings(types) | docstrings(signals) | docstrings(schema)).items():
        for field, text in fields.items():
            defs["$defs"].get(name, {}).get("properties", {}).get(field, {})["description"] = text
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tidegate admin API", "version": version},
        "paths": paths,
        "components": {
            "schemas": defs.get("$defs", {}),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _models(operation: Operation) -> Iterator[tuple[Any, JsonSchemaMode]]:
    yield ErrorAnswer, "serialization"
    for answer in operation.answers:
        yield answer, "serialization"
    if operation.request is not None:
        yield operation.request, "validation"


def _operation(operation: Operation, refs: dict[Any, Any]) -> dict[str, Any]:
    schemas = [refs[one, "serialization"] for one in operation.answers]
    media = METRICS_TYPE if not schemas else LINES_TYPE if operation.lines else "application/json"
    answer = {"type": "string"} if not schemas else schemas[0]
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "security": [] if operation.name in OPEN else [{"token": []}],
        "parameters": list(_parameters(operation)),
        "responses": {
            "200": {
                "description": operation.summary,
                "content": {media: {"schema": {"oneOf": schemas} if operation.lines else answer}},
            },
            **_errors(operation, refs[ErrorAnswer, "serialization"]),
        },
    }
    if operation.request is not None:
        required = any(field.is_required() for field in operation.request.model_fields.values())
        found["requestBody"] = {
            "required": required,
            "content": {"application/json": {"schema": refs[operation.request, "validation"]}},
        }
    return found


def _parameters(operation: Operation) -> Iterator[dict[str, Any]]:
    for part in operation.path.split("/"):
        if part.startswith("{"):
            text = {"type": "string"}
            yield {"name": part.strip("{}"), "in": "path", "required": True, "schema": text}
    if operation.query is not None:
        properties = operation.query.model_json_schema()["properties"]
        for name, kind in properties.items():
            yield {"name": name, "in": "query", "schema": kind}


def _errors(operation: Operation, ref: dict[str, Any]) -> dict[str, Any]:
    codes = {*EVERYWHERE, *operation.errors, *(OF_A_BODY if operation.request else ())}
    if operation.name not in OPEN:
        codes.add("unauthorized")
    by_status: dict[str, list[str]] = {}
    for code in sorted(codes, key=lambda code: (ERRORS[code], code)):
        by_status.setdefault(str(ERRORS[code]), []).append(code)
    content = {"application/json": {"schema": ref}}
    return {
        status: {"description": ", ".join(codes), "content": content}
        for status, codes in by_status.items()
    }
