"""The suite's own rule, tried on a small suite: a skip fails, and the table says what ran."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NOTES_ITS_WORKER = (
    "import os\nimport pytest\n\n"
    "@pytest.mark.parametrize('number', range(5))\ndef test_where(number):\n"
    "    open(os.environ.get('PYTEST_XDIST_WORKER', 'alone'), 'w').close()\n"
)
SUITE = {
    "sim/test_first.py": NOTES_ITS_WORKER,
    "contract/test_second.py": NOTES_ITS_WORKER,
    "unit/a/test_good.py": "def test_one():\n    pass\n\ndef test_two():\n    pass\n",
    "unit/b/test_skipping.py": (
        "import pytest\n\n"
        "@pytest.mark.skip(reason='too lazy')\ndef test_marked():\n    pass\n\n"
        "def test_called():\n    pytest.skip('not today')\n\n"
        "@pytest.mark.xfail(reason='known bug')\ndef test_expected():\n    assert False\n"
    ),
    "e2e/test_module.py": "import pytest\npytest.importorskip('no_such_module')\n",
}


@pytest.fixture(params=["0", "2"], ids=["alone", "two workers"])
def workers(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run_suite(tmp_path: Path, root: Path, *arguments: str) -> tuple[int, str]:
    tests = tmp_path / "tests"
    tests.mkdir()
    shutil.copy(root / "tests" / "conftest.py", tests)
    for name, text in SUITE.items():
        path = tests / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    return done.returncode, done.stdout


def test_every_way_of_skipping_fails_and_is_named(tmp_path: Path, root: Path, workers: str) -> None:
    code, said = run_suite(tmp_path, root, "-n", workers, "--continue-on-collection-errors")
    assert code == 1, said
    assert "skipped" not in said.splitlines()[-1]
    for reason in ("too lazy", "not today", "known bug", "no_such_module"):
        assert reason in said
    assert said.count("here nothing may be skipped") >= 4
    rows = {
        line.split()[0]: line.split()[1:4]
        for line in said.splitlines()
        if line[:4] in ("unit", "e2e ")
    }
    assert rows["unit/a"] == ["2", "0", "0"]
    assert sum(map(int, rows["unit/b"][1:])) == 3
    assert rows["unit/b"][0] == "0"
    assert rows["e2e"][2] == "1"


def test_what_was_not_chosen_is_counted(tmp_path: Path, root: Path, workers: str) -> None:
    code, said = run_suite(
        tmp_path, root, "-n", workers, "--ignore=tests/unit/b", "--ignore=tests/e2e", "-k", "one"
    )
    assert code == 0, said
    assert "1 tests were not run because they were not chosen" in said


def test_a_whole_run_says_so_and_only_unit_tests_are_shared(tmp_path: Path, root: Path) -> None:
    code, said = run_suite(tmp_path, root, "-n", "2", "--ignore=tests/unit/b", "--ignore=tests/e2e")
    assert code == 0, said
    assert "nothing was skipped" in said
    assert len(list(tmp_path.glob("gw*"))) == 1
