"""What all tests share: where things are, and that nothing is left out unseen.

A skipped test counts as a failed one: `make test` prepares everything the suite needs, so whatever
cannot run is something to be told about. At the end a table says, folder by folder, what ran.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
ENGINE_PYTHON = ROOT / ".venv-engine" / "bin" / "python"
MODEL = ROOT / ".tidegate" / "models" / "SmolLM2-135M-Instruct"
OUTCOMES = ("passed", "failed", "error")

# The same examples every time, and none of them too slow: a run fails for what has changed, not by
# chance and not because others use the machine. To look for new examples, give pytest
# `--hypothesis-profile=explore`.
for name, same in (("tidegate", True), ("explore", False)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=same,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
settings.load_profile("tidegate")

deselected = pytest.StashKey[Counter[str]]()
outcomes = pytest.StashKey[dict[str, Counter[str]]]()
durations = pytest.StashKey[Counter[str]]()


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def engine_python() -> Path:
    """The interpreter vLLM is installed for."""
    if not ENGINE_PYTHON.exists():
        pytest.fail(f"{ENGINE_PYTHON} is missing: `make engine` (or `make test`) makes it")
    return ENGINE_PYTHON


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model's checkpoint."""
    if not (MODEL / "tidegate-manifest.json").exists():
        pytest.fail(f"{MODEL} is missing: `make engine` (or `make test`) makes it")
    return MODEL


def pytest_configure(config: pytest.Config) -> None:
    # Under nohup, or in the background of a script, these are ignored, and every process that a
    # test starts would inherit that.
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    config.stash[deselected] = Counter()
    config.stash[outcomes] = defaultdict(Counter)
    config.stash[durations] = Counter()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    folder = _folder(item.nodeid)
    if report.skipped:
        _refuse(report)
    item.config.stash[durations][folder] += report.duration
    if report.failed:
        item.config.stash[outcomes][folder]["failed" if report.when == "call" else "error"] += 1
    elif report.when == "call":
        item.config.stash[outcomes][folder]["passed"] += 1
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    report = yield
    if report.skipped:
        _refuse(report)
    if report.failed:
        collector.config.stash[outcomes][_folder(collector.nodeid)]["error"] += 1
    return report


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Make a skip, or an expected failure, a failure that quotes its reason."""
    reason = getattr(report, "wasxfail", None)
    if reason is not None:
        del report.wasxfail
    elif isinstance(report.longrepr, tuple):
        reason = report.longrepr[2]
    report.outcome = "failed"
    report.longrepr = f"{report.nodeid} did not run ({reason}): here nothing may be skipped"


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        item.config.stash[deselected][_folder(item.nodeid)] += 1


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """The table by folder, and what of the suite was not run and why."""
    ran, left = config.stash[outcomes], config.stash[deselected]
    if not ran and not left:
        return
    write = terminalreporter.write_line
    terminalreporter.section("by folder")
    write(f"{'':28}{'passed':>8}{'failed':>8}{'errors':>8}{'not run':>9}{'seconds':>9}")
    for folder in sorted({*ran, *left}):
        counts = "".join(f"{ran[folder][outcome]:>8}" for outcome in OUTCOMES)
        seconds = config.stash[durations][folder]
        write(f"{folder:28}{counts}{left[folder]:>9}{seconds:>9.1f}")
    total = sum(left.values())
    if total:
        options = " ".join(sys.argv[1:])
        write(f"{total} tests were not run because they were not chosen ({options}).")
    else:
        write("Every test that was collected ran; nothing was skipped.")


def _folder(nodeid: str) -> str:
    return str(Path(nodeid.partition("::")[0]).parent).removeprefix("tests/")
