"""The loader with torch, under the engine's Python, beside the safetensors library.

One process runs all checks (importing torch takes longer than most of them); each is a test here.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
SCRIPT = SUPPORT / "loading_checks.py"
NAMES = re.findall(r"^def check_(\w+)", SCRIPT.read_text(), re.MULTILINE)
LIMIT_S = 280

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(LIMIT_S + 20)]


@pytest.fixture(scope="module")
def results(engine_python: Path, model_dir: Path, root: Path) -> dict[str, str]:
    """What went wrong, by check."""
    path = os.pathsep.join((str(root), str(SUPPORT)))
    ran = subprocess.run(
        [str(engine_python), str(SCRIPT), str(model_dir)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        check=False,
    )
    found = dict(json.loads(line) for line in ran.stdout.splitlines())
    assert ran.returncode == 0, f"{found.keys()}\n{ran.stderr[-3000:]}"
    return found


@pytest.mark.parametrize("name", NAMES)
def test_loading(results: dict[str, str], name: str) -> None:
    assert results[name] == ""


def test_every_check_ran(results: dict[str, str]) -> None:
    assert sorted(results) == sorted(NAMES)
    assert len(NAMES) > 8
