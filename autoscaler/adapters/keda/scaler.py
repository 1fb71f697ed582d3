"""What KEDA is answered. Pure.

A trigger's metadata name a pool, and optionally the metric it is scaled by. KEDA must never scale
to zero because of an error, so that what is not known is one, and never "not active".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from autoscaler.adapters.series import METRICS, PublishedMetric, is_called, label_of, pool_series
from autoscaler.adapters.types import PoolSignals

DEFAULT_METRIC = "tidegate_desired_replicas"
NAMED = 20
"""Most names that an error lists."""


class BadTrigger(ValueError):
    """Metadata that cannot be used; the message names the field, its value, and what there is."""


class NotKnownYet(LookupError):
    """The answer is not known now; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trigger:
    """A trigger of a ScaledObject: a pool, a metric of it, which of its series, and how much of it
    one replica is for."""

    namespace: str
    pool: str
    metric: PublishedMetric
    labels: Mapping[str, str]
    target: float


def read_trigger(namespace: str, metadata: Mapping[str, str]) -> Trigger:
    """The trigger of a ScaledObject's metadata. Raises ``BadTrigger``."""
    pool = metadata.get("pool", "").strip()
    if not pool:
        raise BadTrigger("pool is missing: the name of a pool of Tidegate")
    name = metadata.get("metric", "").strip() or DEFAULT_METRIC
    metric = METRICS.get(name)
    if metric is None or metric.of_pool is None:
        raise BadTrigger(f"metric is {name!r}, which there is not; there are {', '.join(METRICS)}")
    labels = {}
    for label in metric.labels:
        labels[label] = metadata.get(label, "").strip()
        if not labels[label]:
            raise BadTrigger(f"{label} is missing: {name} has a series for each")
    text = metadata.get("target", "").strip()
    if not text and metric.target is None:
        raise BadTrigger(f"target is missing: how much of {name} one replica is for")
    try:
        target = float(text) if text else metric.target or 0.0
    except ValueError:
        target = math.nan
    if not (math.isfinite(target) and target > 0.0):
        raise BadTrigger(f"target is {text!r}, not a number above 0")
    return Trigger(namespace=namespace, pool=pool, metric=metric, labels=labels, target=target)


def find_pool(trigger: Trigger, pools: Sequence[PoolSignals]) -> PoolSignals:
    """The trigger's pool, of those that its namespace may see. Raises ``BadTrigger``."""
    seen = [one for one in pools if one.namespace in (None, trigger.namespace)]
    for one in seen:
        if is_called(one, trigger.pool):
            return one
    names = [label_of(one) for one in seen]
    shown = ", ".join(names[:NAMED]) + (", …" if len(names) > NAMED else "")
    raise BadTrigger(f"pool is {trigger.pool!r}, which there is not; there are {shown or 'none'}")


def is_active(pool: PoolSignals) -> bool:
    """Whether there shall be a replica: a request is held or in flight, or Tidegate wants one,
    ahead of a request too. Raises ``NotKnownYet``."""
    if pool.active or (pool.desired_replicas or 0) > 0:
        return True
    if pool.active is None:
        raise NotKnownYet(f"whether pool {pool.pool!r} has a request is not known")
    return False


def find_value(trigger: Trigger, pool: PoolSignals) -> float:
    """The metric's value. Raises ``NotKnownYet``, and ``BadTrigger`` for a series that there is
    not."""
    found = list(pool_series(trigger.metric, pool))
    for series in found:
        if all(series.labels.get(name) == value for name, value in trigger.labels.items()):
            if series.value is None:
                break
            return max(0.0, series.value)
    else:
        if found:
            name = next(iter(trigger.labels))
            there = sorted({one.labels[name] for one in found})
            given = ", ".join(f"{key}={value}" for key, value in trigger.labels.items())
            raise BadTrigger(f"{trigger.metric.name} has no {given}; {name} is {', '.join(there)}")
    raise NotKnownYet(f"{trigger.metric.name} of pool {pool.pool!r} is not known")
