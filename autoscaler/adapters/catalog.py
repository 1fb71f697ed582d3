"""The pools of one answer, found by name, by object and by label. Pure; an index is made when it is
first asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Protocol

from autoscaler.adapters.series import Labels, label_of
from autoscaler.adapters.types import KubernetesObject, PoolSignals, ReplicaSignals


class LabelFilter(Protocol):
    """What a label selector is to a set of labels; ``label_selectors`` has the one of
    Kubernetes."""

    @property
    def is_everything(self) -> bool:
        """Whether it selects whatever there is."""
        ...

    def matches(self, labels: Labels) -> bool:
        """Whether they are selected."""
        ...

    def required(self) -> Iterator[tuple[str, frozenset[str]]]:
        """Labels that must be there, and the values that each may have."""
        ...


Described = tuple[KubernetesObject, PoolSignals, ReplicaSignals | None]
"""An object, and what it is: a pool, or a replica of one."""


class Catalog:
    """``pools`` as they are at one moment."""

    def __init__(self, pools: Sequence[PoolSignals] = ()) -> None:
        self.pools = tuple(pools)

    @cached_property
    def _by_label(self) -> Mapping[str, Sequence[PoolSignals]]:
        found: dict[str, list[PoolSignals]] = {}
        for pool in self.pools:
            found.setdefault(label_of(pool), []).append(pool)
        return found

    def labelled(self, selector: LabelFilter) -> Sequence[PoolSignals]:
        """Pools that a selector may select, by their names."""
        for key, values in selector.required():
            if key == "pool":
                return [one for value in sorted(values) for one in self._by_label.get(value, ())]
        return self.pools

    @cached_property
    def _objects(self) -> Mapping[tuple[str, str], _Objects]:
        found: dict[tuple[str, str], list[Described]] = {}
        for pool in self.pools:
            for one in pool.objects:
                found.setdefault((resource_of(one), one.namespace), []).append((one, pool, None))
            for replica in pool.replicas:
                pod = replica.pod
                if pod is not None:
                    place = found.setdefault((resource_of(pod), pod.namespace), [])
                    place.append((pod, pool, replica))
        return {key: _Objects(described) for key, described in found.items()}

    def named(self, resource: str, namespace: str, name: str) -> Sequence[Described]:
        """What there is of an object."""
        objects = self._objects.get((resource, namespace))
        return () if objects is None else objects.by_name.get(name, ())

    def selected(self, resource: str, namespace: str, selector: LabelFilter) -> list[Described]:
        """The objects that a selector selects."""
        objects = self._objects.get((resource, namespace))
        if objects is None:
            return []
        if selector.is_everything:
            return list(objects.everything)
        return [
            one
            for one in objects.candidates(selector)
            if one[0].labels is not None and selector.matches(one[0].labels)
        ]


class _Objects:
    """Objects of one resource in one namespace."""

    def __init__(self, described: Sequence[Described]) -> None:
        self.everything = described

    @cached_property
    def by_name(self) -> Mapping[str, Sequence[Described]]:
        found: dict[str, list[Described]] = {}
        for one in self.everything:
            found.setdefault(one[0].name, []).append(one)
        return found

    @cached_property
    def _by_label(self) -> Mapping[tuple[str, str], Sequence[Described]]:
        found: dict[tuple[str, str], list[Described]] = {}
        for one in self.everything:
            for label in (one[0].labels or {}).items():
                found.setdefault(label, []).append(one)
        return found

    def candidates(self, selector: LabelFilter) -> Iterable[Described]:
        """Those that have the first label that is required."""
        for key, values in selector.required():
            return [one for value in sorted(values) for one in self._by_label.get((key, value), ())]
        return self.everything


def resource_of(found: KubernetesObject) -> str:
    """``deployments.apps``, ``services``: a resource as paths have it."""
    return f"{found.resource}.{found.group}" if found.group else found.resource
