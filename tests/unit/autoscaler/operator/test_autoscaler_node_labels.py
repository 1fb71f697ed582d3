"""Labels that say which models a node has."""

from __future__ import annotations

from typing import Any

import pytest

from autoscaler.operator.node_labels import AGENT_LABEL, MOST_LABELS, PREFIX, find_changes, label_of

QWEN = "hf://Qwen/Qwen3-8B"


def test_a_model_has_one_label_however_it_is_written() -> None:
    assert label_of(QWEN) == label_of("Qwen/Qwen3-8B") == label_of("hf://Qwen/Qwen3-8B@main")
    assert label_of(QWEN) != label_of("s3://bucket/Qwen3-8B")
    name = label_of(QWEN).removeprefix(PREFIX)
    assert 0 < len(name) <= 63
    assert name.isalnum()


@pytest.mark.parametrize("model", ["", "/mnt/models/qwen", "./qwen", "ftp://x/y", "a b"])
def test_what_no_cache_fetches_has_none(model: str) -> None:
    assert label_of(model) == ""


def test_only_what_is_different_is_changed() -> None:
    label = label_of(QWEN)
    other = label_of("s3://bucket/old")
    assert find_changes({}, [QWEN]) == {
        "labels": {label: "true", AGENT_LABEL: "true"},
        "annotations": {label: QWEN},
    }
    node: dict[str, Any] = {
        "labels": {AGENT_LABEL: "true", label: "true", other: "true", "kubernetes.io/os": "linux"},
        "annotations": {label: QWEN, other: "s3://bucket/old", "a": "b"},
    }
    assert find_changes(node, [QWEN]) == {"labels": {other: None}, "annotations": {other: None}}
    node["labels"].pop(other)
    node["annotations"].pop(other)
    assert find_changes(node, [QWEN]) == {}
    assert find_changes(node, []) == {"labels": {label: None}, "annotations": {label: None}}


def test_a_node_has_no_more_labels_than_it_can_bear() -> None:
    models = [f"s3://bucket/{number}" for number in range(2 * MOST_LABELS)]
    assert len(find_changes({}, models)["annotations"]) == MOST_LABELS
