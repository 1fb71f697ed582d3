"""The label by which a Service finds, among several Tidegates, the one that leads.

Readiness cannot say it: a Deployment with one pod that is ready and others that wait would never
finish a rollout, and its disruption budget would forbid every eviction of the one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from autoscaler.backends.kubernetes.client import KubernetesClient, KubernetesError, resource

LOG = logging.getLogger("tidegate.kubernetes")

LEADER_LABEL = "tidegate.dev/leader"
"""Of the pod that leads; its value is the lease's name."""
RETRY_S = 1.0
LOOK_S = 0.25


async def mark_leader(client: KubernetesClient, *, lease: str, pod: str, namespace: str) -> None:
    """Give this pod the label, then take it from those that led before: a Service always has one.
    Raises ``KubernetesError``."""
    kind = resource("v1", "Pod")
    await client.merge(kind, pod, {"metadata": {"labels": {LEADER_LABEL: lease}}}, namespace)
    found, _ = await client.read_all(kind, namespace, {LEADER_LABEL: lease})
    for other in found:
        name = other["metadata"]["name"]
        if name != pod:
            await unmark(client, pod=name, namespace=namespace)


async def unmark(client: KubernetesClient, *, pod: str, namespace: str) -> None:
    """Take the label from a pod, if that is there. Raises ``KubernetesError``."""
    try:
        patch = {"metadata": {"labels": {LEADER_LABEL: None}}}
        await client.merge(resource("v1", "Pod"), pod, patch, namespace)
    except KubernetesError as error:
        if error.status != 404:
            raise


async def wait_unmarked(client: KubernetesClient, *, pod: str, namespace: str) -> None:
    """Until this pod does not have the label: another one took it. Raises ``KubernetesError``."""
    while True:
        found = await client.get(resource("v1", "Pod"), pod, namespace)
        if found is None or LEADER_LABEL not in (found["metadata"].get("labels") or {}):
            return
        await asyncio.sleep(LOOK_S)


async def keep_marked(
    client: Callable[[], KubernetesClient], *, lease: str, pod: str, namespace: str
) -> None:
    """Mark this pod, again and again until that has succeeded."""
    failing = False
    while True:
        try:
            await mark_leader(client(), lease=lease, pod=pod, namespace=namespace)
            LOG.info("pod %s has the label %s=%s", pod, LEADER_LABEL, lease)
            return
        except KubernetesError as error:
            if not failing:
                LOG.warning("pod %s does not get the label %s: %s", pod, LEADER_LABEL, error)
            failing = True
        await asyncio.sleep(RETRY_S)
