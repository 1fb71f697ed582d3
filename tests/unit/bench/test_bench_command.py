"""The bench's command line: what it says where it cannot begin."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = "import sys, runpy; sys.modules[{!r}] = None; runpy.run_module('bench', run_name='__main__')"


@pytest.mark.parametrize("module", ["psutil", "bench.load"])
def test_a_package_that_is_missing_is_one_line(module: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(module)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 2
    (line,) = ran.stderr.splitlines()
    assert line.startswith("bench: the bench needs packages that are not installed: `make dev`")
