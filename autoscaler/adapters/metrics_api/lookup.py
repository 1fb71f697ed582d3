"""From a query to the values that answer it. Pure."""

from __future__ import annotations

from autoscaler.adapters.catalog import Catalog
from autoscaler.adapters.metrics_api.documents import ObjectValue
from autoscaler.adapters.metrics_api.paths import (
    EVERY_NAME,
    CustomQuery,
    ExternalQuery,
    NamespaceQuery,
)
from autoscaler.adapters.series import (
    METRICS,
    PublishedMetric,
    PublishedSeries,
    pool_series,
    replica_series,
)
from autoscaler.adapters.types import KubernetesObject
from autoscaler.label_selectors import (
    LabelSelector,
    SelectorError,
    parse_selector,
)


class NotAvailable(LookupError):
    """There is no such metric, nothing that is selected has it, or it is not known of it."""


class BadSelector(ValueError):
    """A selector that cannot be read, or selects several series where one is needed."""


def find_external(query: ExternalQuery, catalog: Catalog) -> list[PublishedSeries]:
    """The selected series. An autoscaler adds them up, so all of them must be known.

    Raises ``NotAvailable`` and ``BadSelector``.
    """
    metric = _metric(query.metric)
    return _find_all(metric, query.namespace, "labelSelector", query.selector, catalog)


def find_namespace(query: NamespaceQuery, catalog: Catalog) -> list[ObjectValue]:
    """The sum over the pools of a namespace, all of which must be known; of metrics that add up.

    Raises ``NotAvailable`` and ``BadSelector``.
    """
    metric = _metric(query.metric)
    if query.namespace == EVERY_NAME:
        raise NotAvailable("metrics of namespaces are served of one by its name, not of all")
    if not metric.is_additive:
        names = ", ".join(one.name for one in METRICS.values() if one.is_additive)
        raise NotAvailable(
            f"{metric.name} of several pools is not their sum, so a namespace has none; it has "
            f"{names}"
        )
    field = "metricLabelSelector"
    found = _find_all(metric, query.namespace, field, query.metric_selector, catalog)
    windows = [one.window_s for one in found if one.window_s is not None]
    whole = PublishedSeries(
        metric=metric,
        labels={},
        value=sum(one.value for one in found if one.value is not None),
        window_s=max(windows, default=None),
    )
    namespace = KubernetesObject(resource="namespaces", namespace="", name=query.namespace)
    return [ObjectValue(object=namespace, series=whole)]


def _find_all(
    metric: PublishedMetric, namespace: str, field: str, text: str, catalog: Catalog
) -> list[PublishedSeries]:
    """The series of a namespace's pools that the selector in this field selects; they are to be
    added up, so all must be known."""
    selector = _parse(field, text)
    found = [
        series
        for pool in catalog.labelled(selector)
        if pool.namespace in (None, namespace)
        for series in pool_series(metric, pool)
        if selector.matches(series.labels)
    ]
    if not found:
        raise NotAvailable(_nothing(metric, f"in namespace {namespace}", text))
    unknown = [one for one in found if one.value is None]
    if unknown:
        names = ", ".join(sorted({one.labels["pool"] for one in unknown}))
        raise NotAvailable(f"{metric.name} is not known of {names}")
    return found


def find_custom(query: CustomQuery, catalog: Catalog) -> list[ObjectValue]:
    """The values of an object, or of those that are selected; of several, those that are known.

    Raises ``NotAvailable`` and ``BadSelector``.
    """
    metric = _metric(query.metric)
    chosen = _parse("labelSelector", query.selector)
    series = _parse("metricLabelSelector", query.metric_selector)
    if query.name == EVERY_NAME:
        described = catalog.selected(query.resource, query.namespace, chosen)
    else:
        described = list(catalog.named(query.resource, query.namespace, query.name))
    found = [
        ObjectValue(object=one, series=each)
        for one, pool, replica in described
        for each in (
            pool_series(metric, pool) if replica is None else replica_series(metric, pool, replica)
        )
        if series.matches(each.labels)
    ]
    where = f"{query.resource} {query.name} in namespace {query.namespace}"
    if not found:
        raise NotAvailable(_nothing(metric, f"of {where}", query.metric_selector or query.selector))
    known = [one for one in found if one.series.value is not None]
    if not known:
        raise NotAvailable(f"{metric.name} is not known of {where}")
    names = [one.object.name for one in found]
    if len(set(names)) != len(names):
        labels = " and ".join(metric.labels) or "pool"
        raise BadSelector(
            f"{metric.name} of {where} is several series: select one by its {labels} "
            "(metricLabelSelector, in an HPA the metric's selector)"
        )
    return known


def _metric(name: str) -> PublishedMetric:
    try:
        return METRICS[name]
    except KeyError:
        raise NotAvailable(f"there is no metric {name!r}; there are {', '.join(METRICS)}") from None


def _parse(field: str, text: str) -> LabelSelector:
    try:
        return parse_selector(text)
    except SelectorError as error:
        raise BadSelector(f"{field} {text!r}: {error}") from None


def _nothing(metric: PublishedMetric, where: str, selector: str) -> str:
    chosen = f" that {selector!r} selects" if selector else ""
    return f"nothing {where}{chosen} has {metric.name}"
