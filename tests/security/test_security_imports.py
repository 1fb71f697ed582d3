"""Nothing that Tidegate runs imports what lies in its working directory."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from asking import ask_now, chat, text_of
from tidegate_process import simulated, up

from gateway.doctor.machine import Machine

PLANTED = (
    *("uvloop", "random", "msgspec", "json", "typer", "httpx", "torch", "vllm", "numpy"),
    *("sitecustomize", "usercustomize", "pathlib", "_tidegate"),
)
"""Of the standard library, of what Tidegate and engines use, and what nobody has."""
FOLDERS = ("gateway", "autoscaler", "loaders", "forecaster", "modelcache", "router", "deploy")
COMMAND = str(Path(sys.executable).with_name("tidegate"))


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which whatever is imported leaves ``imported``."""
    folder = tmp_path / "trap"
    folder.mkdir()
    for name in PLANTED:
        text = f"open({str(folder / 'imported')!r}, 'a').write('{name} ')\nraise SystemExit(3)\n"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.chdir(folder)
    return folder


def was_imported(trap: Path) -> str:
    path = trap / "imported"
    return path.read_text() if path.exists() else ""


def test_the_trap_works(trap: Path) -> None:
    subprocess.run([sys.executable, "-c", "import _tidegate"], check=False)
    assert was_imported(trap) == "_tidegate "


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        ((COMMAND, "config", "check"), 0),
        ((COMMAND, "doctor", "--no-measure"), 1),
        ((sys.executable, "-m", "gateway.cli.main", "--version"), 0),
        ((sys.executable, "-P", "-m", "loaders.engines.simulated", "--help"), 0),
        ((sys.executable, "-P", "-m", "modelcache.prepare.default_model", "verify", "nowhere"), 1),
    ],
)
def test_commands(trap: Path, argv: tuple[str, ...], code: int) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=100)
    assert (was_imported(trap), done.returncode) == ("", code), done.stderr


def test_a_whole_tidegate_and_its_engine(trap: Path, tmp_path: Path) -> None:
    """Workers, guards, the engine."""
    with up(tmp_path / "own", pools=[simulated("one")], cwd=trap) as tidegate:
        text_of(ask_now(tidegate, chat("one")))
        assert os.readlink(f"/proc/{tidegate.pid}/cwd") == str(trap)
    assert was_imported(trap) == ""


def test_what_doctor_runs_with_the_python_of_engines(trap: Path, tmp_path: Path) -> None:
    python = Path(sys.executable)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes((2).to_bytes(8, "little") + b"{}")
    machine = Machine(os.environ)
    machine.engine_device(python)
    machine.fork_ability(python, "cpu")
    machine.speeds(python, [weights])
    assert was_imported(trap) == ""


def test_every_python_that_is_started_is_told_so(root: Path) -> None:
    """``-m`` goes with ``-I`` or ``-P``."""
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                words = node.elts if isinstance(node, ast.List | ast.Tuple) else []
                given = [word.value for word in words if isinstance(word, ast.Constant)]
                if len(given) < len(words) and {"-m"} & {*given}:
                    assert {"-I", "-P"} & {*given}, f"{path}:{node.lineno}"
