"""A machine with GPUs, as NVIDIA's library and tool have it: in status, metrics and the table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import fake_nvml
import pytest
from tidegate_process import Tidegate, simulated, up

NVIDIA_SMI = """\
#!/bin/sh
echo '0, NVIDIA Fake, 81920, 81920, 580.1'
echo '1, NVIDIA Fake, 81920, 81920, 580.1'
"""


@pytest.fixture(scope="module")
def tidegate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tidegate]:
    folder = tmp_path_factory.mktemp("gpus")
    fake_nvml.build(folder)
    tool = folder / "nvidia-smi"
    tool.write_text(NVIDIA_SMI)
    tool.chmod(0o755)
    environ = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": str(folder),
        "FAKE_NVML_XID": "31",
    }
    pool = simulated("on-a-gpu", min_replicas=1, process={"gpus_per_replica": 1})
    autoscaler = {"metrics_interval_s": 0.5}
    with up(folder / "up", pools=[pool], environ=environ, autoscaler=autoscaler) as running:
        running.wait_ready("on-a-gpu", 1)
        yield running


def test_gpus_are_in_status_with_their_replicas_and_faults(tidegate: Tidegate) -> None:
    tidegate.wait("readings", lambda: tidegate.admin("/status")["gpus"]["gpus"] is not None)
    node = tidegate.admin("/status")["gpus"]
    assert (node["source"], node["why_not"]) == ("nvml", "")
    assert node["age_s"] < 60
    zero, one = node["gpus"]
    assert (zero["index"], zero["uuid"], zero["name"]) == (0, "GPU-0", "NVIDIA Fake")
    assert zero["figures"]["utilization_fraction"] == 0.87
    assert zero["throttle_reasons"] == ["power_cap", "hardware_thermal"]
    assert zero["replicas"] == [tidegate.pool("on-a-gpu")["replicas"][0]["id"]]
    assert one["replicas"] == []
    assert (zero["fault"]["action"], zero["fault"]["xid"]) == ("restart_process", 31)
    assert (one["fault"]["action"], one["fault"]["xid"]) == ("reset_gpu", None)
    of_replica = tidegate.pool("on-a-gpu")["replicas"][0]["gpu_fault"]
    assert of_replica["at_s"] == pytest.approx(zero["fault"]["at_s"], abs=1)
    assert {**of_replica, "at_s": 0} == {**zero["fault"], "at_s": 0}


def test_gpus_are_in_metrics(tidegate: Tidegate) -> None:
    gpu = {"gpu": "0", "uuid": "GPU-0"}
    tidegate.wait_count(0.87, "tidegate_gpu_utilization_fraction", **gpu)
    tidegate.wait_count(19 << 30, "tidegate_gpu_memory_used_bytes", **gpu)
    tidegate.wait_count(1, "tidegate_gpu_throttled", **gpu, reason="power_cap")
    tidegate.wait_count(0, "tidegate_gpu_throttled", **gpu, reason="sync_boost")
    tidegate.wait_count(1, "tidegate_gpu_xid_errors_total", **gpu, xid="31")
    tidegate.wait_count(1, "tidegate_gpu_fault", gpu="1", action="reset_gpu")
    tidegate.wait_count(1, "tidegate_replica_gpu", pool="on-a-gpu", gpu="0")


def test_the_table_of_gpus(tidegate: Tidegate) -> None:
    settings = tidegate.state_dir.parent / "tidegate.toml"
    argv = [sys.executable, "-m", "gateway.cli.main", "status", "--config", str(settings)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True)
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    replica = tidegate.pool("on-a-gpu")["replicas"][0]["id"]
    row = next(line for line in lines if line.startswith("0 NVIDIA Fake"))
    assert row.startswith(f"0 NVIDIA Fake 87 % 20.4 GB of 85.9 GB 312 W 61 °C {replica} XID 31: ")
    assert "clocks lowered: power cap, hardware thermal" in row


def test_only_the_control_process_has_the_library(tidegate: Tidegate) -> None:
    def has(pid: int) -> bool:
        return fake_nvml.NAME in Path(f"/proc/{pid}/maps").read_text()

    assert has(tidegate.pid)
    others = set(tidegate.survivors()) - {tidegate.pid}
    assert len(others) >= 2
    assert [pid for pid in others if has(pid)] == []
