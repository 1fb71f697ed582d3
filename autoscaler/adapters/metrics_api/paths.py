"""The paths of the metrics APIs, and what there is at each: one reading of a request. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs, unquote

CUSTOM = "custom.metrics.k8s.io"
EXTERNAL = "external.metrics.k8s.io"
EVERY_NAME = "*"
MAX_PATH = 8_192
"""Characters of a path and of a query, each."""


class BadRequest(ValueError):
    """A request that cannot be read; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalQuery:
    """A metric of this namespace's pools."""

    version: str
    namespace: str
    metric: str
    selector: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CustomQuery:
    """A metric of objects of ``resource`` (``deployments.apps``): of one by its ``name``, or of all
    that ``selector`` selects (``*``). ``metric_selector`` is over the metric's own labels."""

    version: str
    namespace: str
    resource: str
    name: str
    metric: str
    selector: str
    metric_selector: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceQuery:
    """A metric of a namespace itself, of its pools together. ``is_root_scoped``: it was asked for
    as that of an object in no namespace (``namespaces/NAME/METRIC``), not as clients do
    (``namespaces/NAME/metrics/METRIC``)."""

    version: str
    namespace: str
    metric: str
    metric_selector: str
    is_root_scoped: bool


MetricQuery = ExternalQuery | CustomQuery | NamespaceQuery


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What is no metric: a discovery document, a probe."""

    path: str


Query = MetricQuery | Page


def read_path(raw_path: str, query_string: str) -> Query | None:
    """What a request asks for, from its path and query as they were sent; ``None`` where there is
    nothing. Raises ``BadRequest``."""
    if len(raw_path) > MAX_PATH or len(query_string) > MAX_PATH:
        raise BadRequest(f"the path or the query has more than {MAX_PATH} characters")
    parts = [unquote(part) for part in raw_path.split("/")[1:]]
    match parts:
        case ["apis", group, version, "namespaces", namespace, *rest] if all(rest) and namespace:
            query = _read_query(query_string)
            selector = query.get("labelSelector", "")
            match group, rest:
                case "external.metrics.k8s.io", [metric]:
                    return ExternalQuery(
                        version=version, namespace=namespace, metric=metric, selector=selector
                    )
                case "custom.metrics.k8s.io", [resource, name, metric]:
                    return CustomQuery(
                        version=version,
                        namespace=namespace,
                        resource=resource,
                        name=name,
                        metric=metric,
                        selector=selector,
                        metric_selector=query.get("metricLabelSelector", ""),
                    )
                case "custom.metrics.k8s.io", [metric] | ["metrics", metric]:
                    return NamespaceQuery(
                        version=version,
                        namespace=namespace,
                        metric=metric,
                        metric_selector=query.get("metricLabelSelector", ""),
                        is_root_scoped=len(rest) == 1,
                    )
            return None
    return Page(path="/" + "/".join(parts).rstrip("/"))


def _read_query(text: str) -> Mapping[str, str]:
    """The parameters, the first of each name: as Go reads them."""
    try:
        given = parse_qs(text, keep_blank_values=True, errors="strict", max_num_fields=32)
    except ValueError as error:
        raise BadRequest(f"the query cannot be read: {error}") from None
    return {name: values[0] for name, values in given.items()}


def served(apis: Sequence[str]) -> dict[str, list[str]]:
    """Versions by group, the newest first."""
    found: dict[str, list[str]] = {}
    for api in sorted(apis, reverse=True):
        group, _, version = api.partition("/")
        if version:
            found.setdefault(group, []).append(version)
    return found
