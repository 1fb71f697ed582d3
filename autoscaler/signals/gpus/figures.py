"""What is read of a GPU: one table of all figures, and where each comes from. Pure.

``field`` is NVML's field (``NVML_FI_DEV_…``), ``gpm`` its GPU performance metric
(``NVML_GPM_METRIC_…``, Hopper and later), ``dcgm`` the name in a DCGM exporter's page
(``DCGM_FI_…``), each with what its value is multiplied by to have the unit of our name. A figure
with neither ``field`` nor ``gpm`` is one of a call of its own (``nvml``), or only DCGM has it.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from autoscaler.types import GpuReport

KIB, MIB = 1024.0, 1024.0**2
PERCENT = 0.01
MAX_GPUS = 1_024
"""Of a node that are read."""
UTILIZATION = "utilization_fraction"
XIDS_KEPT = 16
"""The newest errors of a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFigure:
    """One figure: its name without ``gpu_``, and its help."""

    name: str
    help: str
    counter: bool = False
    field: str = ""
    field_scale: float = 1.0
    gpm: str = ""
    gpm_scale: float = 1.0
    dcgm: tuple[str, ...] = ()
    dcgm_scale: float = 1.0


def _figure(
    name: str,
    text: str,
    *,
    field: tuple[str, float] | str = "",
    gpm: tuple[str, float] | str = "",
    dcgm: tuple[str, float] | str = "",
) -> GpuFigure:
    """A row: a source is a name, or a name with its scale; of ``A|B`` the first that is there."""
    (f, fs), (g, gs), (d, ds) = (
        one if isinstance(one, tuple) else (one, 1.0) for one in (field, gpm, dcgm)
    )
    return GpuFigure(
        name=name,
        help=text,
        counter=name.endswith("_total"),
        field=f,
        field_scale=fs,
        gpm=g,
        gpm_scale=gs,
        dcgm=tuple(f"DCGM_FI_{one}" for one in d.split("|")) if d else (),
        dcgm_scale=ds,
    )


GPU_FIGURES: tuple[GpuFigure, ...] = (
    _figure("utilization_fraction", "Share of the time in which a kernel ran.",
            dcgm=("DEV_GPU_UTIL", PERCENT)),
    _figure("memory_copy_utilization_fraction",
            "Share of the time in which device memory was read or written.",
            dcgm=("DEV_MEM_COPY_UTIL", PERCENT)),
    _figure("encoder_utilization_fraction", "Utilisation of the video encoder.",
            dcgm=("DEV_ENC_UTIL", PERCENT)),
    _figure("decoder_utilization_fraction", "Utilisation of the video decoder.",
            dcgm=("DEV_DEC_UTIL", PERCENT)),
    _figure("graphics_engine_active_fraction",
            "Share of the time in which the graphics or compute engine was active.",
            gpm=("GRAPHICS_UTIL", PERCENT), dcgm="PROF_GR_ENGINE_ACTIVE"),
    _figure("sm_active_fraction", "Share of the multiprocessors that were active, on average.",
            gpm=("SM_UTIL", PERCENT), dcgm="PROF_SM_ACTIVE"),
    _figure("sm_occupancy_fraction", "Warps that were resident, of the most there can be.",
            gpm=("SM_OCCUPANCY", PERCENT), dcgm="PROF_SM_OCCUPANCY"),
    _figure("tensor_active_fraction", "Share of the time in which tensor cores were active.",
            gpm=("ANY_TENSOR_UTIL", PERCENT), dcgm="PROF_PIPE_TENSOR_ACTIVE"),
    _figure("fp64_active_fraction", "Share of the time in which FP64 pipes were active.",
            gpm=("FP64_UTIL", PERCENT), dcgm="PROF_PIPE_FP64_ACTIVE"),
    _figure("fp32_active_fraction", "Share of the time in which FP32 pipes were active.",
            gpm=("FP32_UTIL", PERCENT), dcgm="PROF_PIPE_FP32_ACTIVE"),
    _figure("fp16_active_fraction", "Share of the time in which FP16 pipes were active.",
            gpm=("FP16_UTIL", PERCENT), dcgm="PROF_PIPE_FP16_ACTIVE"),
    _figure("memory_bandwidth_fraction", "Device memory bandwidth in use.",
            gpm=("DRAM_BW_UTIL", PERCENT), dcgm="PROF_DRAM_ACTIVE"),
    _figure("memory_total_bytes", "Device memory.", dcgm=("DEV_FB_TOTAL", MIB)),
    _figure("memory_used_bytes", "Device memory in use.", dcgm=("DEV_FB_USED", MIB)),
    _figure("memory_free_bytes", "Device memory that is free.", dcgm=("DEV_FB_FREE", MIB)),
    _figure("memory_reserved_bytes", "Device memory that the driver keeps.",
            dcgm=("DEV_FB_RESERVED", MIB)),
    _figure("bar1_total_bytes", "BAR1 memory.", dcgm=("DEV_BAR1_TOTAL", MIB)),
    _figure("bar1_used_bytes", "BAR1 memory in use.", dcgm=("DEV_BAR1_USED", MIB)),
    _figure("processes", "Processes that compute."),
    _figure("power_watts", "Power draw.", dcgm="DEV_POWER_USAGE"),
    _figure("power_limit_watts", "Power limit that is enforced.",
            dcgm="DEV_ENFORCED_POWER_LIMIT|DEV_POWER_MGMT_LIMIT"),
    _figure("energy_joules_total", "Energy used since the driver was loaded.",
            field=("TOTAL_ENERGY_CONSUMPTION", 0.001),
            dcgm=("DEV_TOTAL_ENERGY_CONSUMPTION", 0.001)),
    _figure("temperature_celsius", "Temperature of the chip.", dcgm="DEV_GPU_TEMP"),
    _figure("memory_temperature_celsius", "Temperature of device memory.",
            field="MEMORY_TEMP", dcgm="DEV_MEMORY_TEMP"),
    _figure("slowdown_temperature_celsius", "Temperature from which the chip is slowed down.",
            dcgm="DEV_SLOWDOWN_TEMP"),
    _figure("shutdown_temperature_celsius", "Temperature at which the chip is shut down.",
            dcgm="DEV_SHUTDOWN_TEMP"),
    _figure("fan_speed_fraction", "Speed of the fan.", dcgm=("DEV_FAN_SPEED", PERCENT)),
    _figure("sm_clock_hertz", "Clock of the multiprocessors.", dcgm=("DEV_SM_CLOCK", 1e6)),
    _figure("memory_clock_hertz", "Clock of device memory.", dcgm=("DEV_MEM_CLOCK", 1e6)),
    _figure("video_clock_hertz", "Clock of the video engines.", dcgm=("DEV_VIDEO_CLOCK", 1e6)),
    _figure("max_sm_clock_hertz", "Highest clock of the multiprocessors.",
            dcgm=("DEV_MAX_SM_CLOCK", 1e6)),
    _figure("max_memory_clock_hertz", "Highest clock of device memory.",
            dcgm=("DEV_MAX_MEM_CLOCK", 1e6)),
    _figure("performance_state", "Performance state: 0 is the fastest.", dcgm="DEV_PSTATE"),
    _figure("throttled_by_power_seconds_total", "Time for which clocks were lowered for power.",
            field=("PERF_POLICY_POWER", 1e-9), dcgm=("DEV_POWER_VIOLATION", 1e-6)),
    _figure("throttled_by_heat_seconds_total", "Time for which clocks were lowered for heat.",
            field=("PERF_POLICY_THERMAL", 1e-9), dcgm=("DEV_THERMAL_VIOLATION", 1e-6)),
    _figure("throttled_by_board_limit_seconds_total",
            "Time for which clocks were lowered by limits of the board.",
            field=("PERF_POLICY_BOARD_LIMIT", 1e-9), dcgm=("DEV_BOARD_LIMIT_VIOLATION", 1e-6)),
    _figure("throttled_by_sync_boost_seconds_total",
            "Time for which clocks were lowered to be those of other GPUs.",
            field=("PERF_POLICY_SYNC_BOOST", 1e-9), dcgm=("DEV_SYNC_BOOST_VIOLATION", 1e-6)),
    _figure("ecc_corrected_errors_total", "Corrected ECC errors since the driver was loaded.",
            field="ECC_SBE_VOL_TOTAL", dcgm="DEV_ECC_SBE_VOL_TOTAL"),
    _figure("ecc_uncorrected_errors_total",
            "Uncorrected ECC errors since the driver was loaded.",
            field="ECC_DBE_VOL_TOTAL", dcgm="DEV_ECC_DBE_VOL_TOTAL"),
    _figure("ecc_corrected_errors_ever_total", "Corrected ECC errors of the GPU's lifetime.",
            field="ECC_SBE_AGG_TOTAL", dcgm="DEV_ECC_SBE_AGG_TOTAL"),
    _figure("ecc_uncorrected_errors_ever_total", "Uncorrected ECC errors of the GPU's lifetime.",
            field="ECC_DBE_AGG_TOTAL", dcgm="DEV_ECC_DBE_AGG_TOTAL"),
    _figure("retired_pages_corrected", "Memory pages retired for corrected errors.",
            field="RETIRED_SBE", dcgm="DEV_RETIRED_SBE"),
    _figure("retired_pages_uncorrected", "Memory pages retired for uncorrected errors.",
            field="RETIRED_DBE", dcgm="DEV_RETIRED_DBE"),
    _figure("retired_pages_pending", "1 where pages are retired at the next reset.",
            field="RETIRED_PENDING", dcgm="DEV_RETIRED_PENDING"),
    _figure("remapped_rows_corrected", "Memory rows remapped for corrected errors.",
            field="REMAPPED_COR", dcgm="DEV_CORRECTABLE_REMAPPED_ROWS"),
    _figure("remapped_rows_uncorrected", "Memory rows remapped for uncorrected errors.",
            field="REMAPPED_UNC", dcgm="DEV_UNCORRECTABLE_REMAPPED_ROWS"),
    _figure("row_remap_pending", "1 where rows are remapped at the next reset.",
            field="REMAPPED_PENDING", dcgm="DEV_ROW_REMAP_PENDING"),
    _figure("row_remap_failed", "1 where rows could not be remapped.",
            field="REMAPPED_FAILURE", dcgm="DEV_ROW_REMAP_FAILURE"),
    _figure("recovery_action", "What the driver asks for: 0 nothing, 1 reset, 2 reboot, "
            "3 drain P2P, 4 drain and reset.",
            field="GET_GPU_RECOVERY_ACTION",
            dcgm="DEV_GPU_RECOVERY_ACTION|DEV_GET_GPU_RECOVERY_ACTION"),
    _figure("pcie_link_generation", "PCIe generation of the link.", dcgm="DEV_PCIE_LINK_GEN"),
    _figure("pcie_link_width", "Lanes of the PCIe link.", dcgm="DEV_PCIE_LINK_WIDTH"),
    _figure("pcie_replays_total", "PCIe transfers that were repeated.",
            field="PCIE_REPLAY_COUNTER", dcgm="DEV_PCIE_REPLAY_COUNTER"),
    _figure("pcie_sent_bytes_total", "Bytes sent over PCIe.", field="PCIE_COUNT_TX_BYTES"),
    _figure("pcie_received_bytes_total", "Bytes received over PCIe.", field="PCIE_COUNT_RX_BYTES"),
    _figure("pcie_sent_bytes_per_second", "Bytes sent over PCIe in a second.",
            gpm=("PCIE_TX_PER_SEC", MIB), dcgm="PROF_PCIE_TX_BYTES"),
    _figure("pcie_received_bytes_per_second", "Bytes received over PCIe in a second.",
            gpm=("PCIE_RX_PER_SEC", MIB), dcgm="PROF_PCIE_RX_BYTES"),
    _figure("nvlink_links", "NVLinks.", field="NVLINK_LINK_COUNT"),
    _figure("nvlink_sent_bytes_total", "Bytes sent over NVLink.",
            field=("NVLINK_THROUGHPUT_DATA_TX", KIB)),
    _figure("nvlink_received_bytes_total", "Bytes received over NVLink.",
            field=("NVLINK_THROUGHPUT_DATA_RX", KIB)),
    _figure("nvlink_sent_bytes_per_second", "Bytes sent over NVLink in a second.",
            gpm=("NVLINK_TOTAL_TX_PER_SEC", MIB), dcgm="PROF_NVLINK_TX_BYTES"),
    _figure("nvlink_received_bytes_per_second", "Bytes received over NVLink in a second.",
            gpm=("NVLINK_TOTAL_RX_PER_SEC", MIB), dcgm="PROF_NVLINK_RX_BYTES"),
    _figure("nvlink_crc_flit_errors_total", "CRC errors of NVLink's flow control.",
            field="NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL",
            dcgm="DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL"),
    _figure("nvlink_crc_data_errors_total", "CRC errors of NVLink's data.",
            field="NVLINK_CRC_DATA_ERROR_COUNT_TOTAL",
            dcgm="DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL"),
    _figure("nvlink_replay_errors_total", "NVLink transfers that were repeated.",
            field="NVLINK_REPLAY_ERROR_COUNT_TOTAL", dcgm="DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL"),
    _figure("nvlink_recovery_errors_total", "Times that an NVLink was restored.",
            field="NVLINK_RECOVERY_ERROR_COUNT_TOTAL",
            dcgm="DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL"),
)  # fmt: skip

THROTTLE_REASONS: tuple[tuple[int, str], ...] = (
    (0x2, "application_clocks"),
    (0x4, "power_cap"),
    (0x8, "hardware_slowdown"),
    (0x10, "sync_boost"),
    (0x20, "software_thermal"),
    (0x40, "hardware_thermal"),
    (0x80, "power_brake"),
    (0x100, "display_clocks"),
)
"""Bits of NVML's clocks event reasons that lower clocks; 1, that the GPU is idle, is left out."""


def throttle_reasons(bits: int) -> tuple[str, ...]:
    """The names of the reasons for which clocks are lower than they could be."""
    return tuple(name for bit, name in THROTTLE_REASONS if bits & bit)


def gpu_utilization(seen: GpuReport | None, gpus: Set[int]) -> float | None:
    """The mean utilization, 0 to 1, of the GPUs among these that tell it; ``None`` of none."""
    readings = () if seen is None else seen.gpus or ()
    figures = [one.figures.get(UTILIZATION) for one in readings if one.gpu.index in gpus]
    known = [figure for figure in figures if figure is not None]
    return sum(known) / len(known) if known else None
