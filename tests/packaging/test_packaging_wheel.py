"""The wheel that would be published: complete, nothing else in it, and usable as installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

PACKAGES = {"gateway", "autoscaler", "loaders", "forecaster", "modelcache", "router"}


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(target)],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return next(target.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def test_it_holds_every_module_of_the_packages_and_nothing_else(root: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {
        str(path.relative_to(root))
        for package in PACKAGES
        for path in (root / package).rglob("*.py")
    }
    assert modules <= names
    assert {name.split("/")[0] for name in names} == PACKAGES
    assert not [name for name in names if name.endswith((".pyc", ".log"))]


def test_its_metadata_names_the_command_the_licence_and_the_pythons(unpacked: Path) -> None:
    info = next(unpacked.glob("tidegate-*.dist-info"))
    metadata = Parser().parsestr((info / "METADATA").read_text())
    assert metadata["Name"] == "tidegate"
    assert metadata["License-Expression"] == "Apache-2.0"
    pythons = set(metadata["Requires-Python"].replace(" ", "").split(","))
    assert pythons == {">=3.11", "<3.14"}
    assert "tidegate = gateway.cli.main:main" in (info / "entry_points.txt").read_text()
    assert [path for path in info.rglob("LICENSE*") if path.stat().st_size > 1000]


def test_no_requirement_is_an_engine(unpacked: Path) -> None:
    info = next(unpacked.glob("tidegate-*.dist-info"))
    required = Parser().parsestr((info / "METADATA").read_text()).get_all("Requires-Dist") or []
    plain = [line for line in required if "extra ==" not in line]
    assert plain
    for heavy in ("torch", "vllm", "transformers", "numpy", "ray", "kubernetes"):
        assert not [line for line in plain if line.lower().startswith(heavy)]


def test_the_command_starts_from_the_unpacked_wheel(unpacked: Path, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r}); sys.argv = ['tidegate', '--help']\n"
        "import gateway.cli.main\n"
        "origin = gateway.cli.main.__file__\n"
        f"assert origin.startswith({str(unpacked)!r}), origin\n"
        "gateway.cli.main.assert_ours()\n"
        "gateway.cli.main.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout
