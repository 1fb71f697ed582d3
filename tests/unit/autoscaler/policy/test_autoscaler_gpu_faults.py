"""What an error of a GPU means: NVIDIA's table, and what the driver asks for before it."""

from __future__ import annotations

import pytest

from autoscaler.policy.gpu_faults import (
    PROCESS_FAULT_S,
    XID_ACTIONS,
    GpuAction,
    GpuFault,
    classify_xid,
    find_fault,
)
from autoscaler.types import GpuCapacity, GpuReading, XidEvent

NOW_S = 10_000.0
ACTIONS = {
    GpuAction.RESTART_PROCESS: (8, 11, 13, 25, 31, 32, 94),
    GpuAction.IGNORE: (43, 45, 63, 92, 137, 154, 171, 172),
    GpuAction.RESET_GPU: (*(46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143, 155, 156, 158),),
    GpuAction.DRAIN_AND_RESET: (48,),
    GpuAction.CHECK_NVLINK: (74, 144, 145, 146, 147, 148, 149, 150),
    GpuAction.RESTART_VM: (151,),
    GpuAction.REPLACE_GPU: (79, 157),
    GpuAction.UNKNOWN: (0, 1, 999),
}


@pytest.mark.parametrize(
    ("xid", "action"), [(xid, action) for action, xids in ACTIONS.items() for xid in xids]
)
def test_each_error_has_its_action(xid: int, action: GpuAction) -> None:
    assert classify_xid(xid) is action


def test_no_error_is_in_the_table_that_is_not_tested() -> None:
    assert set(XID_ACTIONS) == {xid for xids in ACTIONS.values() for xid in xids} - {0, 1, 999}


def reading(*xids: tuple[int, float], error: str | None = None, **figures: float) -> GpuReading:
    """A GPU with errors, each so many seconds ago."""
    events = tuple(XidEvent(xid=xid, at_s=NOW_S - ago_s) for xid, ago_s in xids)
    return GpuReading(gpu=GpuCapacity(index=0), figures=figures, xids=events, error=error)


@pytest.mark.parametrize(
    ("gpu", "action", "xid"),
    [
        pytest.param(reading(), None, None, id="nothing"),
        pytest.param(reading((31, 5)), GpuAction.RESTART_PROCESS, 31, id="a process"),
        pytest.param(reading((31, PROCESS_FAULT_S + 1)), None, None, id="a process, long ago"),
        pytest.param(reading((999, 5)), GpuAction.UNKNOWN, 999, id="one not known"),
        pytest.param(reading((43, 5), (63, 1)), None, None, id="only what is no fault"),
        pytest.param(reading((79, 5), (31, 1)), GpuAction.REPLACE_GPU, 79, id="the gravest"),
        pytest.param(reading((999, 5), (31, 1)), GpuAction.RESTART_PROCESS, 31, id="a known one"),
        pytest.param(reading((95, 1e6)), GpuAction.RESET_GPU, 95, id="a reset stays"),
        pytest.param(reading((95, 5), recovery_action=0), None, None, id="the driver: none"),
        pytest.param(
            reading((31, 5), recovery_action=0), GpuAction.RESTART_PROCESS, 31, id="the process yet"
        ),
        pytest.param(reading(recovery_action=1), GpuAction.RESET_GPU, None, id="driver: reset"),
        pytest.param(reading(recovery_action=2), GpuAction.REBOOT_NODE, None, id="driver: reboot"),
        pytest.param(reading(recovery_action=3), GpuAction.CHECK_NVLINK, None, id="driver: P2P"),
        pytest.param(
            reading((79, 5), recovery_action=4), GpuAction.DRAIN_AND_RESET, None, id="outranks"
        ),
        pytest.param(reading(recovery_action=77), GpuAction.UNKNOWN, None, id="driver: another"),
        pytest.param(reading(row_remap_failed=1), GpuAction.REPLACE_GPU, None, id="remap failed"),
        pytest.param(reading(row_remap_failed=0), None, None, id="remap did not fail"),
        pytest.param(reading(error="GPU is lost"), GpuAction.REBOOT_NODE, None, id="lost"),
        pytest.param(
            reading((79, 5), error="GPU is lost"), GpuAction.REPLACE_GPU, 79, id="lost, and why"
        ),
    ],
)
def test_the_gravest_fault_is_found(
    gpu: GpuReading, action: GpuAction | None, xid: int | None
) -> None:
    found = find_fault(gpu, NOW_S)
    if action is None:
        assert found is None
    else:
        assert isinstance(found, GpuFault)
        assert (found.action, found.xid) == (action, xid)
        assert found.detail
