"""Which GPUs and CPU cores a replica is given: pure functions of what there is and what is used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autoscaler.policy.packing import DeviceMemory, Need, gpu_devices, gpu_name, gpus_of
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
    known = [GpuCapacity(index=index) for index in allowed] if inventory is None else inventory
    memory = DeviceMemory(gpu_devices(known))
    for use in uses:
        memory.take([gpu_name(use.index)], use.memory_bytes)
    names = tuple(gpu_name(index) for index in sorted(allowed or {gpu.index for gpu in known}))
    chosen = memory.choose(Need(devices=names, count=count, memory_bytes=memory_bytes))
    return None if chosen is None else gpus_of(chosen)


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
