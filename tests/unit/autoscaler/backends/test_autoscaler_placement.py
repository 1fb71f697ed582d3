"""The GPUs of this machine: what ``nvidia-smi`` prints, and the share of one a replica is given."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from autoscaler.backends.process.placement import gpu_memory_fraction, list_gpus, parse_gpus
from autoscaler.settings import ProcessPoolSettings
from autoscaler.types import GpuCapacity

GIB = 1 << 30


def test_nvidia_smi_is_read() -> None:
    text = "0, NVIDIA H100 80GB HBM3, 81559, 81000, 570.86.15\n1, X, 10, 9, 570.86.15\n\n"
    first, second = parse_gpus(text)
    assert (first.index, first.name, first.memory_bytes) == (
        0,
        "NVIDIA H100 80GB HBM3",
        81559 << 20,
    )
    assert (second.free_bytes, second.driver) == (9 << 20, "570.86.15")
    for wrong in ("No devices were found", "0, X, [N/A], 9, 1"):
        with pytest.raises(ValueError):
            parse_gpus(wrong)


def test_a_driver_that_does_not_answer_is_not_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' \nexit 9\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert list_gpus() is None
    tool.write_text("#!/bin/sh\necho '0, X, 100, 90, 1.2'\n")
    gpus = list_gpus()
    assert gpus is not None
    assert gpus[0].memory_bytes == 100 << 20


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
    assert gpu_memory_fraction(ProcessPoolSettings.model_validate(given), gpus) == fraction
