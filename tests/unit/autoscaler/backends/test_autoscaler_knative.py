"""How Knative scales a revision, and what is reported so that it has a number of pods."""

from __future__ import annotations

import math
from typing import Any

import pytest

from autoscaler.backends.kubernetes.knative import (
    RevisionScaling,
    find_extra_load,
    read_annotation,
    read_scaling,
)

PREFIX = "autoscaling.knative.dev/"


def pod_autoscaler(concurrency: int = 0, **annotations: str) -> dict[str, Any]:
    named = {f"{PREFIX}{name.replace('_', '-')}": text for name, text in annotations.items()}
    return {
        "metadata": {"name": "chat-00001", "annotations": named},
        "spec": {"containerConcurrency": concurrency},
    }


@pytest.mark.parametrize(
    ("found", "metric", "target"),
    [
        (pod_autoscaler(), "concurrency", 70.0),
        (pod_autoscaler(10), "concurrency", 7.0),
        (pod_autoscaler(target="20"), "concurrency", 14.0),
        (pod_autoscaler(10, target="20"), "concurrency", 7.0),
        (pod_autoscaler(10, target="4"), "concurrency", 2.8),
        (pod_autoscaler(1, target_utilization_percentage="100"), "concurrency", 1.0),
        (pod_autoscaler(target="x"), "concurrency", 70.0),
        (pod_autoscaler(metric="rps"), "rps", 140.0),
        (pod_autoscaler(10, metric="rps", target="50"), "rps", 35.0),
        (pod_autoscaler(target="0.001"), "concurrency", 0.01),
        (pod_autoscaler(**{"class": "hpa.autoscaling.knative.dev"}), "concurrency", None),
        (pod_autoscaler(**{"class": "tidegate.dev"}), "concurrency", None),
    ],
)
def test_the_target_of_a_pod(found: dict[str, Any], metric: str, target: float | None) -> None:
    scaling = read_scaling(found)
    assert (scaling.revision, scaling.metric) == ("chat-00001", metric)
    assert scaling.target == (None if target is None else pytest.approx(target))


def test_a_pod_autoscaler_without_annotations_or_spec() -> None:
    assert read_scaling({"metadata": {"name": "a"}}).target == pytest.approx(70.0)


def test_annotations_have_two_spellings() -> None:
    found = {"metadata": {"name": "a", "annotations": {f"{PREFIX}minScale": "2"}}}
    assert read_annotation(found, "min-scale") == "2"
    found["metadata"]["annotations"][f"{PREFIX}min-scale"] = "3"  # type: ignore[index]
    assert read_annotation(found, "min-scale") == "3"
    assert read_annotation(found, "max-scale", "0") == "0"


TEN = RevisionScaling(revision="chat-00001", target=10.0)


@pytest.mark.parametrize(
    ("replicas", "seen", "extra"),
    [
        (0, 0, 0.0),
        (0, 25, 0.0),
        (1, 0, 5.0),
        (1, 5, 0.0),
        (5, 0, 45.0),
        (5, 12, 33.0),
        (2, 400, 0.0),
        (3, None, None),
        (0, None, None),
    ],
)
def test_extra_load(replicas: int, seen: float | None, extra: float | None) -> None:
    assert find_extra_load(TEN, replicas, seen) == extra


def test_nothing_is_reported_to_who_does_not_scale_it() -> None:
    assert find_extra_load(RevisionScaling(revision="a", target=None), 3, 0) is None


@pytest.mark.parametrize("target", [0.01, 0.7, 7.0, 140.0])
def test_with_it_knative_has_that_number(target: float) -> None:
    scaling = RevisionScaling(revision="a", target=target)
    for replicas in range(1, 40):
        for pods in range(replicas + 1):
            seen = max(0.0, (pods - 0.5) * target)
            extra = find_extra_load(scaling, replicas, seen)
            assert extra is not None
            assert math.ceil((seen + extra) / target) == replicas
