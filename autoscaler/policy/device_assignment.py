"""Which GPUs and CPU cores a replica is given: pure functions of what there is and what is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoscaler.types import GpuCapacity


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuUse:
    """A GPU given to a replica: that much of its memory, or all of it (``None``)."""

    index: int
    memory_bytes: int | None = None


def assign_gpus(
    *,
    count: int,
    memory_bytes: int | None,
    allowed: Sequence[int],
    inventory: Sequence[GpuCapacity] | None,
    uses: Iterable[GpuUse],
) -> tuple[int, ...] | None:
    """The indices of ``count`` GPUs for one replica; ``None`` when too few are free.

    ``memory_bytes`` is what it takes of each; unset, it takes whole unused GPUs.
    ``allowed`` limits the choice (empty: all). An ``inventory`` of ``None`` is unknown, not
    empty: then the allowed indices are believed, and never shared. Of several GPUs with room
    the fullest is taken, so that whole ones stay free; between equals the lowest index.
    """
    if count == 0:
        return ()
    known = {gpu.index: gpu for gpu in inventory or ()}
    if inventory is None:
        known = {index: GpuCapacity(index=index) for index in allowed}
    candidates = [known[index] for index in allowed or sorted(known) if index in known]
    taken = list(uses)
    free: list[tuple[float, int]] = []
    for gpu in candidates:
        left = capacity_left(gpu, memory_bytes, [use for use in taken if use.index == gpu.index])
        if left is not None:
            free.append((left, gpu.index))
    if len(free) < count:
        return None
    return tuple(sorted(index for _, index in sorted(free)[:count]))


def capacity_left(
    gpu: GpuCapacity, memory_bytes: int | None, uses: Sequence[GpuUse]
) -> float | None:
    """Bytes that would be left on a GPU; ``None`` if it is too full for the replica."""
    if not uses:
        if memory_bytes is None or gpu.memory_bytes is None:
            return float("inf") if memory_bytes is not None else 0.0
        left = gpu.memory_bytes - memory_bytes
        return left if left >= 0 else None
    if memory_bytes is None or gpu.memory_bytes is None:
        return None
    used = 0
    for use in uses:
        if use.memory_bytes is None:
            return None
        used += use.memory_bytes
    left = gpu.memory_bytes - used - memory_bytes
    return left if left >= 0 else None


def assign_cpus(
    *, count: int | None, available: Sequence[int], taken: Iterable[int]
) -> tuple[int, ...]:
    """``count`` CPU cores for one replica, those with the fewest replicas on them first.

    Empty when none were asked for: the replica is not pinned. Never more than there are.
    """
    if count is None:
        return ()
    uses = Counter(taken)
    order = sorted(available, key=lambda core: (uses[core], core))
    return tuple(sorted(order[:count]))
