"""Which pod stands for which replica: pure.

The control loop starts and ends replicas one by one; a workload has a number, and chooses itself
which of its pods comes or goes. A replica keeps its pod while that lives, and gets another when the
workload has replaced it (a node was drained, a template changed), or has ended it in place of one
that no replica has any more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autoscaler.backends.kubernetes.pods import Pod


def bind(bound: Mapping[str, str | None], pods: Iterable[Pod]) -> dict[str, str | None]:
    """The pod of each replica, by name, given those that they had (oldest replica first).

    A pod that is terminating stands for none. The pods that are nearest to serving are given first.
    """
    living = {pod.name: pod for pod in pods if not pod.terminating}
    kept = {replica: pod if pod in living else None for replica, pod in bound.items()}
    taken = {pod for pod in kept.values() if pod is not None}
    free = [pod for name, pod in living.items() if name not in taken]
    free.sort(key=lambda pod: (not pod.ready, not pod.node, pod.created, pod.name), reverse=True)
    for replica, pod in kept.items():
        if pod is None and free:
            kept[replica] = free.pop().name
    return kept
