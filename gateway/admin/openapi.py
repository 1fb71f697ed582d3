"""The OpenAPI 3.1 document of the admin API, made from ``schema`` and ``operations``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic.json_schema import JsonSchemaMode, models_json_schema

from gateway.admin import schema
from gateway.admin.operations import Operation
from gateway.admin.schema import ERRORS, ErrorAnswer
from gateway.settings.fields import docstrings

LINES_TYPE = "application/x-ndjson"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EVERYWHERE = ("cross_site", "host_not_allowed", "internal_error")
"""Errors that any operation may have."""
OF_A_BODY = ("bad_json", "unknown_field", "body_timeout", "body_too_large", "content_type")


def describe(operations: Sequence[Operation], version: str) -> dict[str, Any]:
    """The document of these operations."""
    models = list(dict.fromkeys(one for operation in operations for one in _models(operation)))
    refs, defs = models_json_schema(models, ref_template="#/components/schemas/{model}")
    for name, fields in docstrings(schema).items():
        for field, text in fields.items():
            defs["$defs"].get(name, {}).get("properties", {}).get(field, {})["description"] = text
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation, refs)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Tidegate admin API", "version": version},
        "paths": paths,
        "components": {"schemas": defs.get("$defs", {})},
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
    schema = {"type": "string"} if not schemas else schemas[0]
    found: dict[str, Any] = {
        "operationId": operation.name,
        "summary": operation.summary,
        "parameters": list(_parameters(operation)),
        "responses": {
            "200": {
                "description": operation.summary,
                "content": {media: {"schema": {"oneOf": schemas} if operation.lines else schema}},
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
        for name, schema in properties.items():
            yield {"name": name, "in": "query", "schema": schema}


def _errors(operation: Operation, ref: dict[str, Any]) -> dict[str, Any]:
    codes = {*EVERYWHERE, *operation.errors, *(OF_A_BODY if operation.request else ())}
    by_status: dict[str, list[str]] = {}
    for code in sorted(codes, key=lambda code: (ERRORS[code], code)):
        by_status.setdefault(str(ERRORS[code]), []).append(code)
    content = {"application/json": {"schema": ref}}
    return {
        status: {"description": ", ".join(codes), "content": content}
        for status, codes in by_status.items()
    }
