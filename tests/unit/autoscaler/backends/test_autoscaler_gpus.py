"""The GPUs of this machine: what ``nvidia-smi`` prints, and what is remembered of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from autoscaler.backends.process.gpus import GpuInventory, list_gpus, parse_gpus
from autoscaler.policy.placement import GpuCapacity


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


def test_gpus_are_looked_for_once_and_remembered_when_they_cannot_be_told() -> None:
    looks: list[Sequence[GpuCapacity] | None] = [
        None,
        [GpuCapacity(index=0, memory_bytes=80)],
        None,
    ]
    inventory = GpuInventory(lambda: looks.pop(0))
    assert inventory.seen() is None  # unknown: asked again
    assert inventory.seen() == [GpuCapacity(index=0, memory_bytes=80)]
    assert inventory.seen() == [GpuCapacity(index=0, memory_bytes=80)]
    assert inventory.look() is None  # who looks is told what there is now
    assert inventory.seen() == [GpuCapacity(index=0, memory_bytes=80)]
    assert looks == []
