"""Knative's PodAutoscalers of our class: the pools, the ServerlessServices, and the status."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from autoscaler.backends.kubernetes.knative import read_scaling
from autoscaler.operator.model_pool import parse_spec, to_settings
from autoscaler.operator.pod_autoscaler import (
    InvalidPodAutoscaler,
    RevisionOutcome,
    find_serving,
    has_status,
    is_ours,
    make_serverless_service,
    make_status,
    to_pool,
)
from autoscaler.settings import EXTERNAL_KUBERNETES, PoolSettings
from autoscaler.types import PoolReport

NOW = "2026-11-30T12:00:00Z"
INITIALIZED = {"conditions": [{"type": "ScaleTargetInitialized", "status": "True"}]}


def revision(
    number: int = 1, reach: str = "Reachable", status: Any = None, **annotations: str
) -> dict[str, Any]:
    name = f"chat-{number:05}"
    named = {f"autoscaling.knative.dev/{key}": text for key, text in annotations.items()}
    target = {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{name}-deployment"}
    return {
        "metadata": {
            "name": name,
            "namespace": "models",
            "uid": f"uid-{number}",
            "generation": 2,
            "creationTimestamp": f"2026-11-30T1{number}:00:00Z",
            "labels": {"serving.knative.dev/service": "chat"},
            "annotations": {"autoscaling.knative.dev/class": "tidegate.dev", **named},
        },
        "spec": {"scaleTargetRef": target, "protocolType": "h2c", "reachability": reach},
        "status": status or {},
    }


def pool(found: dict[str, Any], *, serves: bool = True) -> PoolSettings:
    return to_pool(found, serves=serves)


def report(desired: int, ready: int) -> PoolReport:
    return PoolReport(
        name="chat-00001", desired=desired, override=None, ready=ready, starting=desired - ready,
        unhealthy=0, draining=0, sleeping=0, wake_eta_s=None, last_decision=None, replicas=(),
    )  # fmt: skip


def test_the_class_says_whose_it_is() -> None:
    assert is_ours(revision())
    assert not is_ours(revision(**{"class": "kpa.autoscaling.knative.dev"}))
    assert not is_ours({"metadata": {"name": "a"}})
    leaving = revision()
    leaving["metadata"]["deletionTimestamp"] = NOW
    assert not is_ours(leaving)


def test_a_pool_is_named_as_the_revision_and_answers_to_the_service() -> None:
    found = pool(revision())
    assert (found.name, found.aliases) == ("chat-00001", ("chat",))
    assert pool(revision(), serves=False).aliases == ()
    given = found.kubernetes
    assert (given.namespace, given.kind, given.name) == (
        "models", "Deployment", "chat-00001-deployment",
    )  # fmt: skip
    assert (given.port, given.scaled_by) == (8012, "tidegate")


def test_what_annotations_and_spec_say_of_a_pool() -> None:
    found = revision()
    found["metadata"]["annotations"] |= {
        "tidegate.dev/served-name": "Qwen/Qwen3-8B",
        "tidegate.dev/engine": "vllm",
    }
    found["spec"]["containerConcurrency"] = 16
    made = pool(found)
    assert (made.aliases, made.engine) == (("Qwen/Qwen3-8B",), "vllm")
    assert made.max_inflight_requests == 16


@pytest.mark.parametrize(
    ("found", "least", "most"),
    [
        (revision(), 1, 10),
        (revision(status=INITIALIZED), 0, 10),
        (revision(**{"initial-scale": "3"}), 3, 10),
        (revision(**{"initial-scale": "0"}), 0, 10),
        (revision(**{"initial-scale": "3", "max-scale": "2"}), 3, 3),
        (revision(**{"min-scale": "2", "max-scale": "5"}), 2, 5),
        (revision(status=INITIALIZED, minScale="2", maxScale="5"), 2, 5),
        (revision(reach="Unreachable", **{"min-scale": "2"}), 0, 10),
        (revision(status=INITIALIZED, **{"min-scale": "many", "max-scale": "-1"}), 0, 10),
    ],
)
def test_bounds(found: dict[str, Any], least: int, most: int) -> None:
    made = pool(found)
    assert (made.min_replicas, made.max_replicas) == (least, most)


@pytest.mark.parametrize(
    "change",
    [
        {"metadata": {"annotations": {"tidegate.dev/engine": "abacus"}}},
        {"spec": {"scaleTargetRef": {}}},
    ],
)
def test_what_is_no_pool(change: dict[str, Any]) -> None:
    found = revision()
    for part, values in change.items():
        found[part] |= values
    with pytest.raises(InvalidPodAutoscaler):
        pool(found)


@pytest.mark.parametrize(
    ("objects", "serving"),
    [
        ([revision(1)], "chat-00001"),
        ([revision(1), revision(2)], "chat-00002"),
        ([revision(1), revision(2, "")], "chat-00001"),
        ([revision(1, "Unreachable"), revision(2, "")], "chat-00002"),
        ([revision(2, "Unreachable"), revision(1, "Unreachable")], None),
    ],
)
def test_which_revision_answers_to_the_service(
    objects: list[dict[str, Any]], serving: str | None
) -> None:
    wanted = {} if serving is None else {"chat": f"models/{serving}"}
    assert find_serving(objects) == find_serving(objects[::-1]) == wanted


@pytest.mark.parametrize(
    ("reported", "mode"),
    [
        (None, "Proxy"),
        (report(0, 0), "Proxy"),
        (report(1, 0), "Proxy"),
        (report(1, 1), "Serve"),
        (report(0, 1), "Proxy"),  # before its last pod goes
    ],
)
def test_at_zero_the_activator_holds_requests(reported: PoolReport | None, mode: str) -> None:
    made = make_serverless_service(revision(), reported)
    assert made["spec"] == {
        "mode": mode,
        "objectRef": revision()["spec"]["scaleTargetRef"],
        "protocolType": "h2c",
    }
    (owner,) = made["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"], owner["controller"]) == ("PodAutoscaler", "uid-1", True)


SERVICES = {
    "serviceName": "chat-00001",
    "privateServiceName": "chat-00001-private",
    "conditions": [{"type": "Ready", "status": "True"}],
}


@pytest.mark.parametrize(
    ("found", "outcome", "states"),
    [
        # Active, ScaleTargetInitialized, SKSReady, Ready
        (revision(), RevisionOutcome(), "Unknown Unknown Unknown Unknown"),
        (revision(), RevisionOutcome(report=report(1, 1)), "True Unknown Unknown Unknown"),
        (
            revision(), RevisionOutcome(report=report(1, 0), services=SERVICES),
            "Unknown Unknown True Unknown",
        ),
        (
            revision(), RevisionOutcome(report=report(1, 1), services=SERVICES),
            "True True True True",
        ),
        # Knative takes a revision that is inactive before it has served for one that has failed.
        (
            revision(), RevisionOutcome(report=report(0, 0), services=SERVICES),
            "Unknown Unknown True Unknown",
        ),
        (
            revision(status=INITIALIZED), RevisionOutcome(report=report(0, 0), services=SERVICES),
            "False True True False",
        ),
        (
            revision(**{"initial-scale": "0"}),
            RevisionOutcome(report=report(0, 0), services=SERVICES),
            "False True True False",
        ),
        (
            revision(status=INITIALIZED), RevisionOutcome(report=report(1, 0), services=SERVICES),
            "Unknown True True Unknown",
        ),
        (revision(), RevisionOutcome(problem="taken"), "False Unknown Unknown False"),
    ],
)  # fmt: skip
def test_conditions(found: dict[str, Any], outcome: RevisionOutcome, states: str) -> None:
    made = {one["type"]: one["status"] for one in make_status(found, outcome, NOW)["conditions"]}
    order = ("Active", "ScaleTargetInitialized", "SKSReady", "Ready")
    assert " ".join(made[kind] for kind in order) == states


def test_status() -> None:
    made = make_status(revision(), RevisionOutcome(report=report(2, 1), services=SERVICES), NOW)
    assert made["observedGeneration"] == 2
    assert (made["desiredScale"], made["actualScale"]) == (2, 1)
    assert made["serviceName"] == "chat-00001"
    assert made["metricsServiceName"] == "chat-00001-private"
    unknown = make_status(revision(), RevisionOutcome(), NOW)
    assert "desiredScale" not in unknown
    assert (unknown["serviceName"], unknown["metricsServiceName"]) == ("", "")


def test_a_status_is_written_once_also_where_it_says_less_than_before() -> None:
    found = revision()
    whole = make_status(found, RevisionOutcome(report=report(1, 1)), NOW)
    found["status"] = whole
    assert has_status(found, whole)
    less = make_status(found, RevisionOutcome(problem="a name of another"), NOW)
    assert not has_status(found, less)
    found["status"] = whole | less  # as a merge patch leaves it
    assert "desiredScale" in found["status"]
    assert has_status(found, less)


def test_a_condition_keeps_its_time_while_it_is_as_before() -> None:
    outcome = RevisionOutcome(report=report(1, 1), services=SERVICES)
    status = make_status(revision(), outcome, NOW)
    later = make_status(revision(status=status), outcome, "2026-11-30T13:00:00Z")
    assert later == status
    gone = make_status(
        revision(status=status), RevisionOutcome(report=report(0, 0), services=SERVICES), "later"
    )
    since = {one["type"]: one["lastTransitionTime"] for one in gone["conditions"]}
    assert (since["Active"], since["SKSReady"]) == ("later", NOW)


EXAMPLES = Path(__file__).resolve().parents[4] / "deploy" / "kubernetes" / "examples"


@pytest.mark.parametrize(
    ("name", "target", "ours"),
    [("kpa", pytest.approx(12.0), False), ("hpa", None, False), ("class", None, True)],
)
def test_examples(name: str, target: float | None, ours: bool) -> None:
    documents = list(yaml.safe_load_all((EXAMPLES / f"knative-{name}.yaml").read_text()))
    service, *pools = documents
    template = service["spec"]["template"]
    found = revision()
    found["metadata"]["annotations"] = template["metadata"]["annotations"]
    found["spec"]["containerConcurrency"] = template["spec"]["containerConcurrency"]
    assert read_scaling(found).target == target
    assert is_ours(found) is ours
    if ours:
        assert pool(found).max_replicas == 8
        assert not pools
        return
    (given,) = pools
    given["metadata"]["namespace"] = "models"
    settings = to_settings(given, parse_spec(given))
    assert settings.kubernetes.name == service["metadata"]["name"]
    assert settings.backend_key == EXTERNAL_KUBERNETES
