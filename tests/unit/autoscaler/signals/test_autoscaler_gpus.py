"""GPUs as NVML and DCGM tell of them: each figure in our units, unknown where there is none."""

from __future__ import annotations

import asyncio
import ctypes
import http.server
import sys
import threading
import time
from collections.abc import Callable, Iterator

import fake_nvml
import httpx
import pynvml
import pytest
from virtual_time import now, run_virtual

from autoscaler.signals.gpus.dcgm import DcgmXids, read_dcgm
from autoscaler.signals.gpus.figures import (
    GPU_FIGURES,
    THROTTLE_REASONS,
    XIDS_KEPT,
    throttle_reasons,
)
from autoscaler.signals.gpus.nvml import NvmlReader, NvmlUnavailable
from autoscaler.signals.gpus.reader import RETRY_S, GpuReader
from autoscaler.types import XidEvent
from loaders.engines.client import EngineClient

GIB = float(1 << 30)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return fake_nvml.load(fake_nvml.build(tmp_path_factory.mktemp("nvml")))


@pytest.fixture
def nvml(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The library that pynvml has loaded."""
    monkeypatch.setattr(pynvml, "nvmlLib", library)
    monkeypatch.setattr(pynvml, "_nvmlGetFunctionPointer_cache", {})
    library.fake_reset()
    yield library
    library.fake_reset()


@pytest.fixture
def reader(nvml: ctypes.CDLL) -> Iterator[NvmlReader]:
    made = NvmlReader(lambda: 100.0)
    yield made
    made.close()
    assert nvml.fake_opened() == 0
    assert nvml.fake_samples() == 0


def test_there_are_more_than_forty_figures_with_names_that_end_in_their_unit() -> None:
    names = [one.name for one in GPU_FIGURES]
    assert len(names) >= 40
    assert len(set(names)) == len(names)
    assert all(one.help for one in GPU_FIGURES)
    assert all(one.counter == one.name.endswith("_total") for one in GPU_FIGURES)
    fields = {f"NVML_FI_DEV_{one.field}" for one in GPU_FIGURES if one.field}
    fields |= {f"NVML_GPM_METRIC_{one.gpm}" for one in GPU_FIGURES if one.gpm}
    assert {one for one in fields if not hasattr(pynvml, one)} == set()


def test_nvml_tells_every_figure_in_our_units(reader: NvmlReader) -> None:
    reader.read()
    zero, one = reader.read()  # performance metrics are between two readings
    assert (zero.gpu.index, zero.gpu.uuid, zero.gpu.name) == (0, "GPU-0", "NVIDIA Fake")
    assert (zero.gpu.driver, zero.gpu.memory_bytes) == ("580.1", 80 << 30)
    assert zero.gpu.free_bytes == 60 << 30
    assert (one.gpu.index, one.gpu.uuid) == (1, "GPU-1")
    left_out = {"pcie_replays_total", "fp64_active_fraction"}  # this GPU does not have them
    assert set(zero.figures) == {figure.name for figure in GPU_FIGURES} - left_out
    expected = {
        "utilization_fraction": 0.87,
        "memory_copy_utilization_fraction": 0.43,
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": 19 * GIB,
        "memory_free_bytes": 60 * GIB,
        "memory_reserved_bytes": GIB,
        "bar1_used_bytes": GIB,
        "encoder_utilization_fraction": 0.11,
        "power_watts": 312.5,
        "power_limit_watts": 700,
        "temperature_celsius": 61,
        "memory_temperature_celsius": 71,
        "slowdown_temperature_celsius": 90,
        "shutdown_temperature_celsius": 95,
        "fan_speed_fraction": 0.3,
        "sm_clock_hertz": 1.001e9,
        "memory_clock_hertz": 1.002e9,
        "video_clock_hertz": 1.003e9,
        "max_sm_clock_hertz": 2.001e9,
        "performance_state": 2,
        "pcie_link_generation": 5,
        "energy_joules_total": 1_000.083,
        "throttled_by_power_seconds_total": 0.001000074,
        "ecc_corrected_errors_total": 1_000_003,
        "row_remap_pending": 0,
        "recovery_action": 0,
        "pcie_sent_bytes_total": 1_000_197,
        "nvlink_sent_bytes_total": 1_000_138 * 1_024,
        "sm_active_fraction": 0.02,
        "memory_bandwidth_fraction": 0.1,
        "pcie_sent_bytes_per_second": 20 * (1 << 20),
        "nvlink_received_bytes_per_second": 60 * (1 << 20),
        "processes": 2,
    }
    assert {name: zero.figures[name] for name in expected} == pytest.approx(expected)
    assert one.figures["recovery_action"] == 1
    assert zero.throttle_reasons == ("power_cap", "hardware_thermal")
    assert zero.processes == {4711: 18 << 30, 4712: None}
    assert one.processes == {}
    assert zero.error is None


def test_an_old_gpu_tells_what_it_has(reader: NvmlReader, nvml: ctypes.CDLL) -> None:
    nvml.fake_plain(1)
    reader.read()
    zero = reader.read()[0]
    assert zero.figures == {
        "memory_total_bytes": 80 * GIB,
        "memory_used_bytes": 20 * GIB,
        "memory_free_bytes": 60 * GIB,
        "utilization_fraction": 0.87,
        "memory_copy_utilization_fraction": 0.43,
    }
    assert zero.throttle_reasons is None
    assert zero.processes is None


def test_errors_that_the_driver_reports_are_kept_and_counted(
    reader: NvmlReader, nvml: ctypes.CDLL
) -> None:
    reader.read()
    for xid in (31, 31, 79):
        nvml.fake_xid(1, xid)
    zero, one = reader.read()
    assert zero.xids == ()
    assert one.xids == tuple(XidEvent(xid=xid, at_s=100.0) for xid in (31, 31, 79))
    assert one.xid_counts == {31: 2, 79: 1}
    for _ in range(40):
        nvml.fake_xid(1, 13)
    again = reader.read()[1]
    assert len(again.xids) == XIDS_KEPT
    assert again.xid_counts == {31: 2, 79: 1, 13: 40}


def test_a_gpu_that_is_lost_says_so_and_the_others_are_read(
    reader: NvmlReader, nvml: ctypes.CDLL
) -> None:
    nvml.fake_xid(1, 79)
    reader.read()
    nvml.fake_lose(1)
    zero, one = reader.read()
    assert zero.error is None
    assert zero.figures["utilization_fraction"] == 0.87
    assert "lost" in (one.error or "").lower()
    assert one.figures == {}
    assert one.xid_counts == {79: 1}


def test_a_driver_that_is_loaded_anew_is_opened_anew(reader: NvmlReader, nvml: ctypes.CDLL) -> None:
    nvml.fake_xid(0, 31)
    assert len(reader.read()) == 2
    nvml.fake_drop_driver(1)
    with pytest.raises(NvmlUnavailable):
        reader.read()
    with pytest.raises(NvmlUnavailable):
        reader.read()
    nvml.fake_drop_driver(0)
    assert reader.read()[0].xid_counts == {31: 1}
    assert nvml.fake_opened() == 1


def test_without_the_package_or_the_library_it_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailable, match="nvidia-ml-py is not installed"):
        NvmlReader(time.monotonic).read()


def story(gpus: GpuReader, seconds: float) -> None:
    """Run one for a while, on real time."""

    async def run() -> None:
        running = asyncio.create_task(gpus.run())
        await asyncio.sleep(seconds)
        running.cancel()
        await gpus.close()

    asyncio.run(run())


def test_a_library_that_hangs_takes_one_thread_and_the_gpus_are_unknown(nvml: ctypes.CDLL) -> None:
    def threads() -> int:
        return sum(one.name == "nvml" for one in threading.enumerate())

    async def wait(what: str, gpus: GpuReader, known: bool) -> None:
        for _ in range(1_000):
            if (gpus.report().gpus is not None) is known:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(what)

    async def run() -> None:
        gpus = GpuReader(interval_s=0.05, timeout_s=0.1, sleep=lambda seconds: asyncio.sleep(0.05))
        running = asyncio.create_task(gpus.run())
        await wait("a first reading", gpus, True)
        nvml.fake_hang(1)
        await wait("unknown", gpus, False)
        assert "no answer in 0.1 s" in gpus.report().why_not
        await asyncio.sleep(0.5)
        assert threads() == 1
        nvml.fake_hang(0)
        await wait("known again", gpus, True)
        running.cancel()
        await gpus.close()

    asyncio.run(run())


def exporter(gpus_of: Callable[[], bytes | None]) -> tuple[GpuReader, list[float]]:
    """A reader of an exporter on virtual time, and when that was asked."""
    asked: list[float] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(now())
        page = gpus_of()
        return httpx.Response(503) if page is None else httpx.Response(200, content=page)

    client = EngineClient(timeout_s=2, transport=httpx.MockTransport(answer))
    made = GpuReader(
        interval_s=5, timeout_s=2, dcgm_url="http://dcgm/metrics", client=client, clock=now
    )
    return made, asked


def test_gpus_are_read_once_an_interval_and_after_a_failure_more_rarely() -> None:
    page: bytes | None = None

    async def run() -> None:
        nonlocal page
        gpus, asked = exporter(lambda: page)
        running = asyncio.create_task(gpus.run())
        await asyncio.sleep(3 * RETRY_S - 1)
        assert len(asked) == 3
        assert gpus.report().gpus is None
        page = dcgm_page(0)
        await asyncio.sleep(1 + 4 * 5 + 1)
        assert len(asked) == 3 + 5
        assert gpus.report().gpus is not None
        page = None
        await asyncio.sleep(5)
        assert gpus.report().gpus is None  # a failed reading is unknown at once
        running.cancel()
        await gpus.close()

    run_virtual(run())


def test_what_is_old_is_unknown() -> None:
    async def run() -> None:
        gpus, _ = exporter(lambda: dcgm_page(0))
        running = asyncio.create_task(gpus.run())
        await asyncio.sleep(1)
        running.cancel()
        await asyncio.sleep(2 * 5 + 2 - 1.5)
        assert gpus.report().gpus is not None
        await asyncio.sleep(1)
        assert gpus.report().gpus is None
        assert gpus.report().why_not
        await gpus.close()

    run_virtual(run())


LABELS = (
    'gpu="{gpu}",UUID="GPU-{gpu}",pci_bus_id="00000000:0{gpu}:00.0",device="nvidia{gpu}",'
    'modelName="NVIDIA H100",Hostname="node-1",DCGM_FI_DRIVER_VERSION="570.86.15"'
)
NAMES = {
    "DEV_GPU_UTIL": 87, "DEV_MEM_COPY_UTIL": 43, "DEV_FB_USED": 1_024, "DEV_FB_FREE": 3_072,
    "DEV_FB_RESERVED": 512, "DEV_POWER_USAGE": 312.5, "DEV_GPU_TEMP": 61,
    "DEV_SM_CLOCK": 1_980, "DEV_TOTAL_ENERGY_CONSUMPTION": 5_000, "DEV_POWER_VIOLATION": 2_000_000,
    "DEV_XID_ERRORS": 0, "DEV_CLOCKS_EVENT_REASONS": 0x44, "DEV_ROW_REMAP_FAILURE": 0,
    "PROF_DRAM_ACTIVE": 0.25, "PROF_PCIE_TX_BYTES": 1_000, "DEV_MEMORY_TEMP": 2147483632,
    "DEV_NVLINK_BANDWIDTH_TOTAL": 9,
}  # fmt: skip


def dcgm_page(*gpus: int, **values: float) -> bytes:
    """A page of a DCGM exporter."""
    lines = []
    for name, value in {**NAMES, **values}.items():
        lines += [f"# HELP DCGM_FI_{name} What it is.", f"# TYPE DCGM_FI_{name} gauge"]
        for gpu in gpus:
            lines.append(f"DCGM_FI_{name}{{{LABELS.format(gpu=gpu)}}} {value}")
    return ("\n".join(lines) + "\n").encode()


def test_a_dcgm_page_tells_figures_in_our_units() -> None:
    found = read_dcgm(dcgm_page(10, 2), {}, 5.0)
    assert found is not None
    assert [one.gpu.index for one in found] == [2, 10]
    two = found[0]
    assert (two.gpu.uuid, two.gpu.name, two.gpu.driver) == ("GPU-2", "NVIDIA H100", "570.86.15")
    assert two.gpu.memory_bytes == 4_608 << 20
    assert two.gpu.free_bytes == 3_072 << 20
    assert two.figures == pytest.approx(
        {
            "utilization_fraction": 0.87,
            "memory_copy_utilization_fraction": 0.43,
            "memory_used_bytes": GIB,
            "memory_free_bytes": 3 * GIB,
            "memory_reserved_bytes": GIB / 2,
            "memory_total_bytes": 4.5 * GIB,
            "power_watts": 312.5,
            "temperature_celsius": 61,
            "sm_clock_hertz": 1.98e9,
            "energy_joules_total": 5,
            "throttled_by_power_seconds_total": 2,
            "row_remap_failed": 0,
            "memory_bandwidth_fraction": 0.25,
            "pcie_sent_bytes_per_second": 1_000,
        }
    )
    assert two.throttle_reasons == ("power_cap", "hardware_thermal")
    assert two.processes is None


def test_the_newest_error_on_a_dcgm_page_is_one_until_there_is_another() -> None:
    xids: dict[str, DcgmXids] = {}
    seen = []
    for at_s, xid in enumerate((0, 31, 31, 79, 31, 5_000, 0)):
        found = read_dcgm(dcgm_page(0, DEV_XID_ERRORS=xid), xids, float(at_s))
        assert found is not None
        seen.append(found[0])
    assert seen[0].xids == ()
    assert seen[-1].xids == tuple(
        XidEvent(xid=xid, at_s=at_s) for xid, at_s in ((31, 1.0), (79, 3.0), (31, 4.0))
    )
    assert seen[-1].xid_counts == {31: 2, 79: 1}


def test_parts_of_a_gpu_are_not_the_gpu() -> None:
    part = b'DCGM_FI_DEV_GPU_TEMP{gpu="0",UUID="GPU-0",GPU_I_ID="1",GPU_I_PROFILE="1g.10gb"} 9\n'
    found = read_dcgm(part + dcgm_page(0), {}, 0.0)
    assert found is not None
    assert found[0].figures["temperature_celsius"] == 61
    assert read_dcgm(part, {}, 0.0) is None


@pytest.mark.parametrize(
    "page",
    [b"", b"<html></html>\n", b"vllm:num_requests_running 1\n", dcgm_page(0)[:-1]]
    + [b'DCGM_FI_DEV_GPU_TEMP{gpu="%s"} 1\n' % gpu for gpu in (b"", b"a", b"-1", b"99999")],
)
def test_another_page_or_half_a_one_is_unknown(page: bytes) -> None:
    assert read_dcgm(page, {}, 0.0) is None


class Exporter(http.server.BaseHTTPRequestHandler):
    page: bytes | None = None
    paths: list[str]

    def do_GET(self) -> None:
        self.paths.append(self.path)
        self.send_response(200 if self.page else 503)
        self.send_header("Content-Length", str(len(self.page or b"")))
        self.end_headers()
        self.wfile.write(self.page or b"")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("path", ["", "/metrics", "/dcgm/metrics"])
def test_a_dcgm_exporter_is_asked_over_http(path: str) -> None:
    handler = type("Handler", (Exporter,), {"page": dcgm_page(0, 1), "paths": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        gpus = GpuReader(
            interval_s=60, timeout_s=5, dcgm_url=f"http://127.0.0.1:{server.server_port}{path}"
        )
        assert gpus.report().gpus is None
        story(gpus, 0.5)
        server.shutdown()
    report = gpus.report()
    assert (report.source, report.why_not) == ("dcgm", "")
    assert [one.gpu.index for one in report.gpus or ()] == [0, 1]
    assert handler.paths == [path or "/metrics"]


@pytest.mark.parametrize(
    ("page", "said"),
    [(None, "was answered 503"), (b"x 1\n", "by no DCGM exporter"), (b"", "was answered 503")],
)
def test_an_exporter_that_fails_is_unknown(page: bytes | None, said: str) -> None:
    handler = type("Handler", (Exporter,), {"page": page, "paths": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/metrics"
        gpus = GpuReader(interval_s=60, timeout_s=5, dcgm_url=url)
        story(gpus, 0.5)
        server.shutdown()
    assert gpus.report().gpus is None
    assert said in gpus.report().why_not


def test_reasons_by_their_bits() -> None:
    assert throttle_reasons(0) == throttle_reasons(1) == ()  # idle is no reason
    assert len(throttle_reasons((1 << 64) - 1)) == len(THROTTLE_REASONS)
