"""What an error of a GPU means, and what to do about it. Pure.

NVIDIA numbers the errors that its driver reports (XID). The table follows NVIDIA's catalog of
XIDs; what the driver itself recommends (its recovery action) outranks it. Nothing is done about a
fault: it is shown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from autoscaler.types import GpuReading


class GpuAction(StrEnum):
    """What to do about a fault, from mild to grave."""

    IGNORE = "ignore"
    RESTART_PROCESS = "restart_process"
    CHECK_NVLINK = "check_nvlink"
    RESET_GPU = "reset_gpu"
    DRAIN_AND_RESET = "drain_and_reset"
    RESTART_VM = "restart_vm"
    REBOOT_NODE = "reboot_node"
    REPLACE_GPU = "replace_gpu"
    UNKNOWN = "unknown"
    """An error that the table does not have."""


_ORDER = (GpuAction.IGNORE, GpuAction.UNKNOWN, *(one for one in list(GpuAction)[1:-1]))

XID_ACTIONS: Mapping[int, GpuAction] = {
    **dict.fromkeys((8, 11, 13, 25, 31, 32, 94), GpuAction.RESTART_PROCESS),
    **dict.fromkeys((43, 45, 63, 92, 137, 154, 171, 172), GpuAction.IGNORE),
    **dict.fromkeys((46, 62, 64, 95, 109, 110, 119, 120, 136, 140, 143), GpuAction.RESET_GPU),
    **dict.fromkeys((155, 156, 158), GpuAction.RESET_GPU),
    48: GpuAction.DRAIN_AND_RESET,
    **dict.fromkeys((74, *range(144, 151)), GpuAction.CHECK_NVLINK),
    151: GpuAction.RESTART_VM,
    **dict.fromkeys((79, 157), GpuAction.REPLACE_GPU),
}
"""45 and 154 follow another error; 171 and 172 say of 48 which memory it was."""

RECOVERY_ACTIONS: Mapping[int, GpuAction] = {
    0: GpuAction.IGNORE,
    1: GpuAction.RESET_GPU,
    2: GpuAction.REBOOT_NODE,
    3: GpuAction.CHECK_NVLINK,
    4: GpuAction.DRAIN_AND_RESET,
    6: GpuAction.RESET_GPU,
    7: GpuAction.REBOOT_NODE,
}
"""NVML's recovery actions; 3 asks that traffic between GPUs is drained."""

PROCESS_FAULT_S = 600.0
"""An error that ended a process is shown for so long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFault:
    """What is wrong with a GPU. ``xid`` is the error that says so, where it is one."""

    action: GpuAction
    detail: str
    xid: int | None = None
    at_s: float | None = None


def classify_xid(xid: int) -> GpuAction:
    """What to do about an error, by its number."""
    return XID_ACTIONS.get(xid, GpuAction.UNKNOWN)


def find_fault(reading: GpuReading, now_s: float) -> GpuFault | None:
    """The gravest fault of a GPU; ``None`` where none is known.

    An error of a process is a fault for ``PROCESS_FAULT_S``. A graver one stays until the driver
    says that nothing is to be done about it any more, which not every driver can.
    """
    faults = []
    if reading.error is not None:
        text = f"the GPU cannot be read: {reading.error}"
        faults.append(GpuFault(action=GpuAction.REBOOT_NODE, detail=text))
    if reading.figures.get("row_remap_failed"):
        text = "rows of its memory could not be remapped"
        faults.append(GpuFault(action=GpuAction.REPLACE_GPU, detail=text))
    asked = reading.figures.get("recovery_action")
    recovery = None if asked is None else RECOVERY_ACTIONS.get(round(asked), GpuAction.UNKNOWN)
    if recovery not in {None, GpuAction.IGNORE}:
        text = "the driver asks for it"
        faults.append(GpuFault(action=recovery or GpuAction.UNKNOWN, detail=text))
    for event in reading.xids:
        action = classify_xid(event.xid)
        brief = action in {GpuAction.RESTART_PROCESS, GpuAction.UNKNOWN}
        over = now_s - event.at_s > PROCESS_FAULT_S if brief else recovery is not None
        if action is not GpuAction.IGNORE and not over:
            faults.append(
                GpuFault(action=action, detail=f"XID {event.xid}", xid=event.xid, at_s=event.at_s)
            )
    return max(faults, key=lambda one: _ORDER.index(one.action), default=None)
