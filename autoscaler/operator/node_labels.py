"""Labels of nodes that say which models their cache agent has: schedulers prefer such nodes.

A label's name is a digest of the model's URL, because URLs are no names of labels; an annotation
beside it has the URL for people. The agent of a node keeps them, and needs the right to patch it.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from autoscaler.backends.kubernetes.client import KubernetesClient, KubernetesError, resource
from modelcache.refs import parse_ref

LOG = logging.getLogger("tidegate.kubernetes")

PREFIX = "model.tidegate.dev/"
AGENT_LABEL = f"{PREFIX}agent"
"""The label of nodes that have an agent."""
MOST_LABELS = 200
"""Models that one node is labelled with, at most."""
LOOK_S = 10.0
"""Between two looks at what the cache has."""


def label_of(model: str) -> str:
    """The label of nodes that have a model, given as users write it; empty for one that no cache
    fetches."""
    try:
        ref = parse_ref(model)
    except ValueError:
        return ""
    if "://" not in ref.url:
        return ""
    return PREFIX + hashlib.sha256(ref.url.encode()).hexdigest()[:32]


def find_changes(
    metadata: Mapping[str, Any], models: Iterable[str]
) -> dict[str, dict[str, str | None]]:
    """What is to be patched in a node's ``metadata`` so that it names its agent, these models
    (URLs) and no others; empty where nothing is."""
    wanted = {label_of(model): model for model in sorted(set(models)) if label_of(model)}
    wanted = dict(list(wanted.items())[:MOST_LABELS])
    labels = {AGENT_LABEL: "true", **dict.fromkeys(wanted, "true")}
    changes: dict[str, dict[str, str | None]] = {}
    for part, values in (
        ("labels", labels),
        ("annotations", wanted),
    ):
        there = {
            name: value
            for name, value in (metadata.get(part) or {}).items()
            if name.startswith(PREFIX)
        }
        different: dict[str, str | None] = {
            name: value for name, value in values.items() if there.get(name) != value
        }
        different |= dict.fromkeys(there.keys() - values.keys())
        if different:
            changes[part] = different
    return changes


async def keep_labels(
    client: KubernetesClient, node: str, models: Callable[[], Iterable[str]]
) -> None:
    """Keep the labels of a node as ``models`` says, until cancelled. ``models`` may block; what
    fails is logged once, and tried again."""
    kind = resource("v1", "Node", namespaced=False)
    failing = False
    while True:
        try:
            wanted = await asyncio.to_thread(models)
            found = await client.get(kind, node)
            if found is None:
                raise KubernetesError(f"there is no node {node!r} (kubernetes.node)", 404)
            changes = find_changes(found["metadata"], wanted)
            if changes:
                await client.merge(kind, node, {"metadata": changes})
                LOG.info("node %s: labelled with its models", node)
            failing = False
        except KubernetesError as error:
            if not failing:
                LOG.warning("the models of node %s are not on it as labels: %s", node, error)
            failing = True
        await asyncio.sleep(LOOK_S)
