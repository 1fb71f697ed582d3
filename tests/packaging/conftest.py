"""The bootstrap's modules, imported as they are when `make` runs them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BOOTSTRAP_MODULES = (
    "progress",
    "environments",
    "requirements_check",
    "control_plane_programs",
    "prepare",
)


@pytest.fixture(scope="module")
def deploy(root: Path) -> Iterator[Path]:
    """The bootstrap's directory, importable as it is when the bootstrap runs."""
    sys.path.insert(0, str(root / "deploy"))
    yield root / "deploy"
    sys.path.remove(str(root / "deploy"))
    for name in BOOTSTRAP_MODULES:
        sys.modules.pop(name, None)


@pytest.fixture
def environments(deploy: Path) -> ModuleType:
    return importlib.import_module("environments")


@pytest.fixture
def prepare(deploy: Path) -> ModuleType:
    return importlib.import_module("prepare")


@pytest.fixture
def requirements_check(deploy: Path) -> ModuleType:
    return importlib.import_module("requirements_check")


@pytest.fixture
def control_plane_programs(deploy: Path) -> ModuleType:
    return importlib.import_module("control_plane_programs")


@pytest.fixture
def progress(deploy: Path) -> ModuleType:
    return importlib.import_module("progress")


@pytest.fixture(scope="module")
def made(deploy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with one small environment in it, made once."""
    environments = importlib.import_module("environments")
    root = tmp_path_factory.mktemp("checkout")
    environments.Environment(environments.Workshop(root), ".venv").make("small")
    return root
