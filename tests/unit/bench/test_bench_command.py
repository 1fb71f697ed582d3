"""The bench's command line: what it says where it cannot begin, and what it notes of itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import bench.zero
from bench.__main__ import main

CODE = "import sys, runpy; sys.modules[{!r}] = None; runpy.run_module('bench', run_name='__main__')"


@pytest.mark.parametrize("module", ["psutil", "bench.load"])
def test_a_package_that_is_missing_is_one_line(module: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(module)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("bench: the bench needs packages that are not installed: `make dev`")


@pytest.mark.parametrize("given", [["--data", "/a/b"], ["--data=/a/b"], ["--data", "/a b/c"]])
def test_the_command_of_a_result_has_no_path_of_the_traces(
    monkeypatch: pytest.MonkeyPatch, given: list[str]
) -> None:
    noted = []

    def run(data: Path, out: Path, command: str, date: str) -> int:
        noted.append(command)
        return 0

    monkeypatch.setattr(bench.zero, "run", run)
    monkeypatch.setattr(sys, "argv", ["bench", "zero", *given, "--out", "there"])
    assert main() == 0
    (command,) = noted
    assert command.replace("=", " ") == "python -m bench zero --data DIR --out there"
