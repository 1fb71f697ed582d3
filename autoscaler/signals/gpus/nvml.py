"""The GPUs of this machine by NVIDIA's library (nvidia-ml-py; the extra ``gpu``).

Calls may take long, and hang where the driver does: ``reader`` makes them in a thread. Each figure
is read by itself: one that a GPU, or the driver's version, does not have is left out. The library
is loaded by the control process alone. It must not be in the fork server, whose engines inherit
what it has opened.
"""

from __future__ import annotations

import ctypes
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoscaler.signals.gpus.figures import GPU_FIGURES, MAX_GPUS, XIDS_KEPT, throttle_reasons
from autoscaler.types import GpuCapacity, GpuReading, XidEvent

MAX_EVENTS = 1_000
"""Errors taken from the driver in one reading; the next one takes more."""
_ALL_LINKS = 0xFFFFFFFF
"""As the scope of a field of NVLink: the sum over all links."""

_VALUE_TYPES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Which member of a field's value is set, by its ``valueType``."""


class NvmlUnavailable(Exception):
    """NVML cannot be used here; the message says why, for people."""


@dataclass(slots=True)
class _Device:
    """A GPU, and what is kept of it between readings."""

    index: int
    handle: Any
    xids: deque[XidEvent] = field(default_factory=lambda: deque(maxlen=XIDS_KEPT))
    counts: Counter[int] = field(default_factory=Counter)
    gpm_samples: list[Any] = field(default_factory=list)


class NvmlReader:
    """Reads all GPUs. For one thread at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._nvml: Any = None
        self._devices: list[_Device] = []
        self._events: Any = None
        self._driver = ""

    def read(self) -> tuple[GpuReading, ...]:
        """All GPUs now. Raises ``NvmlUnavailable``."""
        if self._nvml is None:
            self._open()
        nvml = self._nvml
        try:
            self._take_events()
            return tuple(self._read_device(device) for device in self._devices)
        except nvml.NVMLError as error:
            self.close()  # the driver may have been loaded anew: the next reading begins again
            raise NvmlUnavailable(f"NVML: {error}") from error

    def close(self) -> None:
        """Give the library back."""
        nvml, self._nvml = self._nvml, None
        if nvml is None:
            return
        for device in self._devices:
            for sample in device.gpm_samples:
                _try(nvml, nvml.nvmlGpmSampleFree, sample)
            device.gpm_samples.clear()
        if self._events is not None:
            _try(nvml, nvml.nvmlEventSetFree, self._events)
        _try(nvml, nvml.nvmlShutdown)

    def _open(self) -> None:
        try:
            import pynvml as nvml
        except ImportError:
            raise NvmlUnavailable(
                "the Python package nvidia-ml-py is not installed (the extra `gpu`)"
            ) from None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            raise NvmlUnavailable(f"NVML: {error}") from error
        self._nvml = nvml
        try:
            self._driver = _text(nvml.nvmlSystemGetDriverVersion())
            known = {device.index: device for device in self._devices}
            self._devices = []
            for index in range(min(MAX_GPUS, nvml.nvmlDeviceGetCount())):
                device = known.get(index) or _Device(index, None)
                device.handle = _try(nvml, nvml.nvmlDeviceGetHandleByIndex, index)
                self._devices.append(device)
            self._register_events()
        except nvml.NVMLError as error:
            self.close()
            raise NvmlUnavailable(f"NVML: {error}") from error

    def _register_events(self) -> None:
        """Have the driver tell of errors; without, there are none to be known."""
        nvml = self._nvml
        self._events = _try(nvml, nvml.nvmlEventSetCreate)
        if self._events is None:
            return
        for device in self._devices:
            if device.handle is not None:
                kinds = nvml.nvmlEventTypeXidCriticalError
                _try(nvml, nvml.nvmlDeviceRegisterEvents, device.handle, kinds, self._events)

    def _take_events(self) -> None:
        nvml = self._nvml
        by_handle = {_address(device.handle): device for device in self._devices}
        for _ in range(MAX_EVENTS if self._events is not None else 0):
            event = _try(nvml, nvml.nvmlEventSetWait_v2, self._events, 0)
            if event is None:
                return
            device = by_handle.get(_address(event.device))
            if device is not None and event.eventType == nvml.nvmlEventTypeXidCriticalError:
                xid = int(event.eventData)
                device.xids.append(XidEvent(xid=xid, at_s=self._clock()))
                device.counts[xid] += 1

    def _read_device(self, device: _Device) -> GpuReading:
        nvml, handle = self._nvml, device.handle
        unknown = GpuReading(
            gpu=GpuCapacity(index=device.index, driver=self._driver),
            xids=tuple(device.xids),
            xid_counts=dict(device.counts),
            error="it cannot be opened",
        )
        if handle is None:
            return unknown
        try:
            uuid = _text(nvml.nvmlDeviceGetUUID(handle))
            name = _text(nvml.nvmlDeviceGetName(handle))
            memory = _memory(nvml, handle)
        except nvml.NVMLError as error:
            gone = {nvml.NVML_ERROR_GPU_IS_LOST, nvml.NVML_ERROR_RESET_REQUIRED}
            if error.value not in gone:
                raise
            return replace(unknown, error=str(error))
        figures = {**memory, **_calls(nvml, handle), **_fields(nvml, handle)}
        figures |= _performance(nvml, device)
        reasons = _try(nvml, nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        processes = _try(nvml, nvml.nvmlDeviceGetComputeRunningProcesses, handle)
        used = None if processes is None else {one.pid: one.usedGpuMemory for one in processes}
        if used is not None:
            figures["processes"] = float(len(used))
        return replace(
            unknown,
            error=None,
            gpu=GpuCapacity(
                index=device.index,
                memory_bytes=int(memory["memory_total_bytes"]),
                name=name,
                free_bytes=int(memory["memory_free_bytes"]),
                driver=self._driver,
                uuid=uuid,
            ),
            figures=figures,
            throttle_reasons=None if reasons is None else throttle_reasons(reasons),
            processes=used,
        )


def _try(nvml: Any, call: Callable[..., Any], *arguments: object) -> Any:
    """What a call answers; ``None`` where this GPU or driver does not have it."""
    try:
        return call(*arguments)
    except nvml.NVMLError:
        return None


def _memory(nvml: Any, handle: Any) -> dict[str, float]:
    """Device memory; older drivers count what they keep themselves as used."""
    found = _try(nvml, nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    reserved = {}
    if found is None:
        found = nvml.nvmlDeviceGetMemoryInfo(handle)
    else:
        reserved["memory_reserved_bytes"] = float(found.reserved)
    return {
        "memory_total_bytes": float(found.total),
        "memory_used_bytes": float(found.used),
        "memory_free_bytes": float(found.free),
        **reserved,
    }


def _calls(nvml: Any, handle: Any) -> dict[str, float]:
    """The figures that have calls of their own."""
    found: dict[str, float | None] = {}

    def call(name: str, function: Callable[..., Any], *arguments: object, scale: float = 1) -> None:
        value = _try(nvml, function, handle, *arguments)
        if isinstance(value, list | tuple):
            value = value[0]
        found[name] = None if value is None else float(value) * scale

    use = _try(nvml, nvml.nvmlDeviceGetUtilizationRates, handle)
    if use is not None:
        found["utilization_fraction"] = use.gpu / 100
        found["memory_copy_utilization_fraction"] = use.memory / 100
    bar1 = _try(nvml, nvml.nvmlDeviceGetBAR1MemoryInfo, handle)
    if bar1 is not None:
        found["bar1_total_bytes"] = float(bar1.bar1Total)
        found["bar1_used_bytes"] = float(bar1.bar1Used)
    call("encoder_utilization_fraction", nvml.nvmlDeviceGetEncoderUtilization, scale=0.01)
    call("decoder_utilization_fraction", nvml.nvmlDeviceGetDecoderUtilization, scale=0.01)
    call("power_watts", nvml.nvmlDeviceGetPowerUsage, scale=0.001)
    call("power_limit_watts", nvml.nvmlDeviceGetEnforcedPowerLimit, scale=0.001)
    call("temperature_celsius", nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU)
    limit = nvml.nvmlDeviceGetTemperatureThreshold
    call("slowdown_temperature_celsius", limit, nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
    call("shutdown_temperature_celsius", limit, nvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN)
    call("fan_speed_fraction", nvml.nvmlDeviceGetFanSpeed, scale=0.01)
    clock = nvml.nvmlDeviceGetClockInfo
    call("sm_clock_hertz", clock, nvml.NVML_CLOCK_SM, scale=1e6)
    call("memory_clock_hertz", clock, nvml.NVML_CLOCK_MEM, scale=1e6)
    call("video_clock_hertz", clock, nvml.NVML_CLOCK_VIDEO, scale=1e6)
    most = nvml.nvmlDeviceGetMaxClockInfo
    call("max_sm_clock_hertz", most, nvml.NVML_CLOCK_SM, scale=1e6)
    call("max_memory_clock_hertz", most, nvml.NVML_CLOCK_MEM, scale=1e6)
    call("performance_state", nvml.nvmlDeviceGetPerformanceState)
    call("pcie_link_generation", nvml.nvmlDeviceGetCurrPcieLinkGeneration)
    call("pcie_link_width", nvml.nvmlDeviceGetCurrPcieLinkWidth)
    return {name: value for name, value in found.items() if value is not None}


def _fields(nvml: Any, handle: Any) -> dict[str, float]:
    """The figures that are fields, all in one call."""
    wanted = []
    for figure in GPU_FIGURES:
        number = getattr(nvml, f"NVML_FI_DEV_{figure.field}", None) if figure.field else None
        if number is not None:
            scope = _ALL_LINKS if figure.field.startswith("NVLINK_THROUGHPUT") else 0
            wanted.append((figure, (number, scope)))
    values = _try(nvml, nvml.nvmlDeviceGetFieldValues, handle, [field for _, field in wanted])
    found = {}
    for (figure, _), value in zip(wanted, values or (), strict=False):
        if value.nvmlReturn == nvml.NVML_SUCCESS and value.valueType < len(_VALUE_TYPES):
            number = float(getattr(value.value, _VALUE_TYPES[value.valueType]))
            if number >= 0:
                found[figure.name] = number * figure.field_scale
    return found


def _performance(nvml: Any, device: _Device) -> Mapping[str, float]:
    """The GPU performance metrics between the last reading and this one; none before Hopper."""
    wanted = [(one, f"NVML_GPM_METRIC_{one.gpm}") for one in GPU_FIGURES if one.gpm]
    support = _try(nvml, nvml.nvmlGpmQueryDeviceSupport, device.handle)
    if support is None or not support.isSupportedDevice:
        return {}
    sample = _try(nvml, nvml.nvmlGpmSampleAlloc)
    if sample is None:
        return {}
    device.gpm_samples.append(sample)
    if _try(nvml, nvml.nvmlGpmSampleGet, device.handle, sample) is None:
        _try(nvml, nvml.nvmlGpmSampleFree, device.gpm_samples.pop())
        return {}
    if len(device.gpm_samples) < 2:
        return {}
    earlier = device.gpm_samples.pop(0)
    asked = nvml.c_nvmlGpmMetricsGet_t()
    asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
    asked.numMetrics = len(wanted)
    asked.sample1, asked.sample2 = earlier, sample
    for place, (_, name) in enumerate(wanted):
        asked.metrics[place].metricId = getattr(nvml, name)
    answered = _try(nvml, nvml.nvmlGpmMetricsGet, asked)
    _try(nvml, nvml.nvmlGpmSampleFree, earlier)
    if answered is None:
        return {}
    return {
        figure.name: metric.value * figure.gpm_scale
        for (figure, _), metric in zip(wanted, answered.metrics, strict=False)
        if metric.nvmlReturn == nvml.NVML_SUCCESS and metric.value >= 0
    }


def _address(handle: Any) -> int | None:
    """What a handle points to: two of one GPU are different objects."""
    return None if handle is None else ctypes.cast(handle, ctypes.c_void_p).value


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value
