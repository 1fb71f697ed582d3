"""What all tests share: where things are, and that nothing is left out unseen.

A skipped test counts as a failed one: `make test` prepares everything the suite needs, so whatever
cannot run is something to be told about. At the end a table says, folder by folder, what ran.

With `-n 2` two worker processes share tests/unit; all the others, which look at the machine's
processes, memory and page cache, then run one after the other in one worker.
"""

from __future__ import annotations

import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

ROOT = Path(__file__).resolve().parent.parent
ENGINE_PYTHON = ROOT / ".venv-engine" / "bin" / "python"
MODEL = ROOT / ".tidegate" / "models" / "SmolLM2-135M-Instruct"
OUTCOMES = ("passed", "failed", "error")
TAKEN = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
FIRST = {"unit": 0, "sim": 1, "contract": 2, "packaging": 3}

# The same examples every time, and none of them too slow: a run fails for what has changed, not by
# chance and not because others use the machine. To look for new examples, give pytest
# `--hypothesis-profile=explore`.
for name, same in (("tidegate", True), ("explore", False)):
    settings.register_profile(
        name,
        deadline=None,
        derandomize=same,
        max_examples=50 if same else 500,
        suppress_health_check=[HealthCheck.too_slow],
        print_blob=True,
    )
settings.load_profile("tidegate")


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


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """A part that a test runs in this process takes the signals, as it does in its own; the next
    test must find them as they were."""
    before = {number: signal.getsignal(number) for number in TAKEN}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def pytest_configure(config: pytest.Config) -> None:
    # Under nohup, or in the background of a script, these are ignored, and every process that a
    # test starts would inherit that.
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)
    config.pluginmanager.register(Summary(), "summary by folder")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """First what finds most errors in the least time."""
    items.sort(key=lambda item: FIRST.get(_folder(item.nodeid).partition("/")[0], len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    """Who of the workers runs what: see above."""
    from xdist.scheduler import LoadScopeScheduling

    class UnitTestsShared(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if _folder(nodeid).startswith("unit") else "one after the other"

    config.option.loadscopereorder = False
    return UnitTestsShared(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Iterator[None]:
    report = yield
    if report.skipped:
        _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    report = yield
    if report.skipped:
        _refuse(report)
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


class Summary:
    """Counts by folder what ran and what was not chosen, in this process and in its workers."""

    def __init__(self) -> None:
        self.outcomes: dict[str, Counter[str]] = defaultdict(Counter)
        self.durations: Counter[str] = Counter()
        self.deselected: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = _folder(report.nodeid)
        self.durations[folder] += report.duration
        if report.failed:
            self.outcomes[folder]["failed" if report.when == "call" else "error"] += 1
        elif report.when == "call":
            self.outcomes[folder]["passed"] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.outcomes[_folder(report.nodeid)]["error"] += 1

    def pytest_deselected(self, items: list[pytest.Item]) -> None:
        self.deselected.update(_folder(item.nodeid) for item in items)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["deselected"] = dict(self.deselected)

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        # Each worker collects, and deselects, the same.
        self.deselected |= Counter(getattr(node, "workeroutput", {}).get("deselected", {}))

    def pytest_terminal_summary(
        self, terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
    ) -> None:
        """The table by folder, and what of the suite was not run and why."""
        ran, left = self.outcomes, self.deselected
        if not ran and not left:
            return
        write = terminalreporter.write_line
        terminalreporter.section("by folder")
        write(f"{'':28}{'passed':>8}{'failed':>8}{'errors':>8}{'not run':>9}{'seconds':>9}")
        for folder in sorted({*ran, *left}):
            counts = "".join(f"{ran[folder][outcome]:>8}" for outcome in OUTCOMES)
            write(f"{folder:28}{counts}{left[folder]:>9}{self.durations[folder]:>9.1f}")
        total = sum(left.values())
        if total:
            options = " ".join(sys.argv[1:])
            write(f"{total} tests were not run because they were not chosen ({options}).")
        elif exitstatus == pytest.ExitCode.INTERRUPTED or (exitstatus and config.option.maxfail):
            write("It was stopped before every test had run.")
        else:
            write("Every test that was collected ran; nothing was skipped.")


def _folder(nodeid: str) -> str:
    return str(Path(nodeid.partition("::")[0]).parent).removeprefix("tests/")
