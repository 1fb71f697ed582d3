"""Which binaries belong to which source, and that none is taken for another's."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import pytest

from gateway import compiled


@pytest.fixture
def copied(tmp_path: Path, root: Path) -> Path:
    for folder in ("gateway/datapath", "gateway/picker", "router"):
        shutil.copytree(root / folder, tmp_path / folder)
    return tmp_path


def test_any_edit_is_another_digest(copied: Path, root: Path) -> None:
    same = compiled.source_digest(copied)
    assert same == compiled.source_digest(root)
    edited = copied / "router" / "pick.py"
    edited.write_text(edited.read_text() + "\n# a remark\n")
    assert compiled.source_digest(copied) != same


def test_modules_are_all_there() -> None:
    for name in compiled.MODULES:
        assert importlib.util.find_spec(name) is not None


def test_nothing_is_installed_without_binaries_or_when_switched_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.delenv("TIDEGATE_COMPILED", raising=False)
    before = list(sys.meta_path)
    assert not compiled.is_available()
    assert compiled.install() is False
    folder = compiled.compiled_folder()
    folder.mkdir(parents=True)
    (folder / "done").write_text("")
    assert compiled.is_available()
    monkeypatch.setenv("TIDEGATE_COMPILED", "0")
    assert compiled.install() is False
    assert sys.meta_path == before


def test_old_binaries_go_and_the_newest_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(compiled.KEPT + 2):
        folder = tmp_path / f"digest{number}"
        folder.mkdir()
        (folder / "done").write_text("")
        os.utime(folder, (number, number))
    compiled.remove_old(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [f"digest{number}" for number in range(2, compiled.KEPT + 2)]


def test_without_mypy_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert compiled.main(["build"]) == 1
    assert "-m pip install mypy setuptools" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["make"], ["build", "now"]])
def test_wrong_words_are_usage(arguments: list[str]) -> None:
    assert compiled.main(arguments) == 2
