"""What of a pool's settings reaches its engines."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from autoscaler.policy.placement import GpuCapacity
from autoscaler.settings import PoolSettings
from gateway.compose.engines import gpu_memory_fraction

GIB = 1 << 30


def pool(**fields: object) -> PoolSettings:
    given = {"name": "m", "engine": "vllm", "model": "/m", **fields}
    return PoolSettings.model_validate(given)


@pytest.mark.parametrize(
    ("wanted", "gpus", "fraction"),
    [
        (None, [GpuCapacity(index=0, memory_bytes=80 * GIB)], None),
        (20 * GIB, [GpuCapacity(index=0, memory_bytes=80 * GIB)], 0.25),
        (
            20 * GIB,
            [
                GpuCapacity(index=0, memory_bytes=80 * GIB),
                GpuCapacity(index=1, memory_bytes=40 * GIB),
            ],
            0.5,
        ),
        (160 * GIB, [GpuCapacity(index=0, memory_bytes=80 * GIB)], 1.0),
        (20 * GIB, [GpuCapacity(index=0)], None),
        (20 * GIB, None, None),
    ],
)
def test_bytes_of_a_gpu_become_the_share_that_vllm_is_told(
    wanted: int | None, gpus: Sequence[GpuCapacity] | None, fraction: float | None
) -> None:
    given = {} if wanted is None else {"gpus_per_replica": 1, "gpu_memory_bytes": wanted}
    assert gpu_memory_fraction(pool(process=given), lambda: gpus) == fraction
