"""From what is known of pools to metrics: all of them, by label, and never a made-up value."""

from __future__ import annotations

from dataclasses import replace

import pytest
from signal_rig import deployment, pod, service, signals, unknown

from autoscaler.adapters.catalog import Catalog
from autoscaler.adapters.metrics_api.lookup import (
    BadSelector,
    NotAvailable,
    find_custom,
    find_external,
    find_namespace,
)
from autoscaler.adapters.metrics_api.paths import CustomQuery, ExternalQuery, NamespaceQuery
from autoscaler.adapters.series import METRICS, label_of, pool_series, replica_series
from autoscaler.adapters.types import LatencyQuantiles, PoolSignals, ReplicaSignals

CHAT, OTHER = signals(), signals("org/other", desired_replicas=1, namespace="ml")


def external(metric: str, selector: str = "", namespace: str = "default") -> ExternalQuery:
    return ExternalQuery(version="v1beta1", namespace=namespace, metric=metric, selector=selector)


def custom(
    metric: str,
    resource: str = "deployments.apps",
    name: str = "chat",
    selector: str = "",
    metric_selector: str = "",
    namespace: str = "default",
) -> CustomQuery:
    return CustomQuery(
        version="v1beta2", namespace=namespace, resource=resource, name=name, metric=metric,
        selector=selector, metric_selector=metric_selector,
    )  # fmt: skip


def values(pool: PoolSignals, metric: str) -> dict[str, float | None]:
    return {
        ",".join(value for name, value in one.labels.items() if name != "pool"): one.value
        for one in pool_series(METRICS[metric], pool)
    }


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("tidegate_desired_replicas", {"": 3}),
        ("tidegate_ready_replicas", {"": 2}),
        ("tidegate_active", {"": 1.0}),
        (
            "tidegate_forecast_tokens_per_second",
            {"0.5,lead": 95.0, "0.95,lead": 140.0, "0.5,5m": 350.0, "0.95,5m": 395.0},
        ),
        ("tidegate_requests_per_second", {"": 2.5}),
        ("tidegate_input_tokens_per_second", {"": 300.0}),
        ("tidegate_output_tokens_per_second", {"": 80.0}),
        ("tidegate_queued_requests", {"": 3}),
        ("tidegate_queued_tokens", {"": 900}),
        ("tidegate_inflight_requests", {"": 8}),
        ("tidegate_inflight_tokens", {"": 4_000}),
        ("tidegate_running_requests", {"": 6}),
        ("tidegate_waiting_requests", {"": 2}),
        ("tidegate_queue_wait_seconds", {"0.5": 0.01, "0.95": 0.2, "0.99": 0.4}),
        ("tidegate_ttft_seconds", {"0.5": 0.1, "0.95": 0.5, "0.99": 0.9}),
        ("tidegate_itl_seconds", {"0.5": 0.02, "0.95": 0.03, "0.99": 0.05}),
        ("tidegate_e2e_seconds", {"0.5": 1.0, "0.95": 3.0, "0.99": 4.0}),
        ("tidegate_kv_cache_usage_fraction", {"": 0.4}),
        ("tidegate_kv_cache_usage_max_fraction", {"": 0.6}),
        ("tidegate_gpu_utilization_fraction", {"": 0.9}),
    ],
)
def test_a_pool_has_every_metric(metric: str, expected: dict[str, float]) -> None:
    assert values(CHAT, metric) == pytest.approx(expected)


def test_the_table_above_is_whole() -> None:
    tested = test_a_pool_has_every_metric.pytestmark[0].args[1]
    assert [one[0] for one in tested] == list(METRICS)


@pytest.mark.parametrize("metric", [name for name in METRICS if "replicas" not in name])
def test_what_is_unknown_has_no_value(metric: str) -> None:
    found = values(unknown(), metric)
    # Of no ready replica the sum is known.
    sums = metric in ("tidegate_running_requests", "tidegate_waiting_requests")
    assert set(found.values()) <= ({0} if sums else {None})


def test_latencies_of_an_idle_pool_are_zero_and_of_a_busy_one_unknown() -> None:
    none = LatencyQuantiles()
    quiet = signals(ttft=none, requests_per_s=0.0, queued_requests=0, inflight_requests=0)
    assert set(values(quiet, "tidegate_ttft_seconds").values()) == {0.0}
    for busy in (
        signals(ttft=none, requests_per_s=0.0, queued_requests=0, inflight_requests=1),
        signals(ttft=none, requests_per_s=None, queued_requests=0, inflight_requests=0),
    ):
        assert set(values(busy, "tidegate_ttft_seconds").values()) == {None}


def test_a_sum_over_replicas_is_unknown_where_one_is() -> None:
    replicas = (
        ReplicaSignals(replica="a", ready=True, running_requests=3),
        ReplicaSignals(replica="b", ready=True),
    )
    assert values(signals(replicas=replicas), "tidegate_running_requests") == {"": None}
    starting = (replicas[0], ReplicaSignals(replica="b", ready=False))
    assert values(signals(replicas=starting), "tidegate_running_requests") == {"": 3}


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (signals("org/model"), "org-model"),
        (PoolSignals(pool="org/model", ready_replicas=0), "org-model"),
        (PoolSignals(pool="x", slug="a" * 100, ready_replicas=0), "a" * 63),
        (PoolSignals(pool="x", slug="_" + "a" * 61 + "-b", ready_replicas=0), "a" * 61),
    ],
)
def test_a_pool_s_name_as_a_label(pool: PoolSignals, expected: str) -> None:
    assert label_of(pool) == expected


# -- external ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (external("tidegate_desired_replicas"), [3]),
        (external("tidegate_desired_replicas", "pool=chat"), [3]),
        (external("tidegate_desired_replicas", namespace="ml"), [3, 1]),
        (external("tidegate_desired_replicas", "pool=org-other", "ml"), [1]),
        (external("tidegate_desired_replicas", "namespace=ml", "ml"), [1]),
        (external("tidegate_ttft_seconds", "pool=chat,quantile=0.95"), [0.5]),
        (external("tidegate_ttft_seconds", "quantile in (0.5,0.99)"), [0.1, 0.9]),
        (
            external("tidegate_forecast_tokens_per_second", "horizon=lead,quantile=0.95"),
            [pytest.approx(140.0)],
        ),
    ],
)
def test_external_series_that_are_selected(query: ExternalQuery, expected: list[float]) -> None:
    assert [one.value for one in find_external(query, Catalog((CHAT, OTHER)))] == expected


@pytest.mark.parametrize(
    "query",
    [
        external("tidegate_nix"),
        external("tidegate_desired_replicas", "pool=nobody"),
        external("tidegate_desired_replicas", "pool=org-other"),  # of another namespace
        external("tidegate_forecast_tokens_per_second", "horizon=1h"),
    ],
)
def test_an_external_metric_that_there_is_not(query: ExternalQuery) -> None:
    with pytest.raises(NotAvailable):
        find_external(query, Catalog((CHAT, OTHER)))


def test_a_sum_of_which_a_part_is_unknown_is_not_available() -> None:
    pools = (CHAT, unknown("new"))
    with pytest.raises(NotAvailable, match="new"):
        find_external(external("tidegate_queued_requests"), Catalog(pools))
    found = find_external(external("tidegate_queued_requests", "pool=chat"), Catalog(pools))
    assert [one.value for one in found] == [3]


def test_a_selector_that_cannot_be_read() -> None:
    with pytest.raises(BadSelector, match="labelSelector"):
        find_external(external("tidegate_queued_requests", "pool in"), Catalog((CHAT,)))
    with pytest.raises(BadSelector, match="metricLabelSelector"):
        find_custom(custom("tidegate_queued_requests", metric_selector="a,,"), Catalog((CHAT,)))


# -- custom -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (custom("tidegate_inflight_tokens"), {"chat": 4_000}),
        (custom("tidegate_inflight_tokens", "services"), {"chat": 4_000}),
        (custom("tidegate_inflight_tokens", name="*"), {"chat": 4_000, "second": 7}),
        (custom("tidegate_inflight_tokens", name="*", selector="app=chat"), {"chat": 4_000}),
        (custom("tidegate_inflight_tokens", name="*", selector="app!=chat"), {"second": 7}),
        (
            custom("tidegate_ttft_seconds", metric_selector="quantile=0.95"),
            {"chat": 0.5},
        ),
        (custom("tidegate_inflight_tokens", "pods", "chat-2"), {"chat-2": 4_000}),
        (
            custom("tidegate_inflight_tokens", "pods", "*", "app=chat"),
            {"chat-1": 2_000, "chat-2": 4_000},
        ),
        (
            custom("tidegate_kv_cache_usage_fraction", "pods", "*", "app", "replica=chat-1"),
            {"chat-1": 0.2},
        ),
    ],
)
def test_metrics_of_objects(query: CustomQuery, expected: dict[str, float]) -> None:
    second = signals(
        "second", objects=(deployment("second", app="second"),), inflight_tokens=7, replicas=()
    )
    found = find_custom(query, Catalog((CHAT, second)))
    assert {one.object.name: one.series.value for one in found} == pytest.approx(expected)


@pytest.mark.parametrize(
    "query",
    [
        custom("tidegate_nix"),
        custom("tidegate_inflight_tokens", name="nobody"),
        custom("tidegate_inflight_tokens", namespace="elsewhere"),
        custom("tidegate_inflight_tokens", "statefulsets.apps"),
        custom("tidegate_inflight_tokens", "deployments"),
        custom("tidegate_inflight_tokens", name="*", selector="app=nobody"),
        custom("tidegate_ttft_seconds", "pods", "*"),
        custom("tidegate_inflight_tokens", "namespaces", "default"),
    ],
)
def test_a_metric_that_an_object_has_not(query: CustomQuery) -> None:
    with pytest.raises(NotAvailable):
        find_custom(query, Catalog((CHAT,)))


@pytest.mark.parametrize(
    ("selector", "expected"),
    [("", ["known", "unknown"]), ("app", ["known"]), ("!tier", ["known"]), ("app!=x", ["known"])],
)
def test_an_object_whose_labels_are_unknown_is_selected_by_no_selector(
    selector: str, expected: list[str]
) -> None:
    unknown_labels = replace(deployment("unknown"), labels=None)
    pools = Catalog(
        (
            signals("known", objects=(deployment("known", app="a"),)),
            signals("unknown", objects=(unknown_labels,)),
        )
    )
    found = find_custom(custom("tidegate_queued_tokens", name="*", selector=selector), pools)
    assert [one.object.name for one in found] == expected


def test_of_several_pods_those_that_are_known() -> None:
    replicas = (
        ReplicaSignals(replica="a", ready=True, pod=pod("a"), inflight_tokens=5),
        ReplicaSignals(replica="b", ready=True, pod=pod("b")),
        ReplicaSignals(replica="c", ready=True, inflight_tokens=9),
    )
    pools = Catalog((signals(replicas=replicas),))
    found = find_custom(custom("tidegate_inflight_tokens", "pods", "*"), pools)
    assert [(one.object.name, one.series.value) for one in found] == [("a", 5)]
    with pytest.raises(NotAvailable, match="not known"):
        find_custom(custom("tidegate_inflight_tokens", "pods", "b"), pools)


def test_one_of_several_series_must_be_selected() -> None:
    with pytest.raises(BadSelector, match="quantile"):
        find_custom(custom("tidegate_ttft_seconds"), Catalog((CHAT,)))


def namespace(metric: str, name: str = "ml", selector: str = "") -> NamespaceQuery:
    return NamespaceQuery(
        version="v1beta2", namespace=name, metric=metric, metric_selector=selector,
        is_root_scoped=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("query", "expected", "window_s"),
    [
        (namespace("tidegate_desired_replicas"), 4, None),
        (namespace("tidegate_desired_replicas", "default"), 3, None),
        (namespace("tidegate_desired_replicas", selector="pool=org-other"), 1, None),
        (namespace("tidegate_requests_per_second"), 5.0, 60.0),
        (namespace("tidegate_waiting_requests", selector="pool!=chat"), 2, None),
    ],
)
def test_a_namespace_has_the_sum_over_its_pools(
    query: NamespaceQuery, expected: float, window_s: float | None
) -> None:
    (found,) = find_namespace(query, Catalog([CHAT, OTHER]))
    assert (found.object.resource, found.object.name) == ("namespaces", query.namespace)
    assert found.series.value == expected
    assert found.series.window_s == window_s


@pytest.mark.parametrize(
    ("query", "word"),
    [
        (namespace("tidegate_ttft_seconds"), "not their sum"),
        (namespace("tidegate_forecast_tokens_per_second"), "not their sum"),
        (namespace("tidegate_gpu_utilization_fraction"), "not their sum"),
        (namespace("nix"), "there is no metric"),
        (namespace("tidegate_queued_requests", selector="pool=nix"), "nothing"),
        (namespace("tidegate_queued_requests", "*"), "by its name"),
    ],
)
def test_a_metric_that_a_namespace_has_not(query: NamespaceQuery, word: str) -> None:
    with pytest.raises(NotAvailable, match=word):
        find_namespace(query, Catalog([CHAT, OTHER]))


def test_a_namespace_s_sum_of_which_a_part_is_unknown_is_not_available() -> None:
    pools = Catalog([OTHER, unknown("new")])
    with pytest.raises(NotAvailable, match="not known of new"):
        find_namespace(namespace("tidegate_queued_requests"), pools)
    with pytest.raises(BadSelector, match="metricLabelSelector"):
        find_namespace(namespace("tidegate_queued_requests", selector="a in"), pools)


def test_replicas_are_told_apart() -> None:
    running, ttft = METRICS["tidegate_running_requests"], METRICS["tidegate_ttft_seconds"]
    found = [one for each in CHAT.replicas for one in replica_series(running, CHAT, each)]
    assert [one.labels["replica"] for one in found] == ["chat-1", "chat-2"]
    assert list(replica_series(ttft, CHAT, CHAT.replicas[0])) == []
    assert service("s").labels == {}
