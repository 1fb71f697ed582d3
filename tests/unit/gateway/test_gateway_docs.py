"""The documentation against what it is about: files, commands, settings, metrics, tables.

What can be compared is compared, so that a page that was true when it was written is still true.
"""

from __future__ import annotations

import hashlib
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families

from autoscaler import types
from autoscaler.adapters.measures import AdapterMeasures
from autoscaler.adapters.series import METRICS as PUBLISHED
from autoscaler.backends.process.fork_server import FORK_STATES
from autoscaler.control.start_steps import STEPS_TO_READY
from autoscaler.policy.gpu_faults import GpuAction
from autoscaler.policy.lifecycle import TABLE, State
from autoscaler.signals.gpus.figures import GPU_FIGURES, THROTTLE_REASONS
from gateway.admin import metrics_page
from gateway.admin.schema import ForkServerEntry, HistoryState, StandbyEntry
from gateway.cli.verbs import app
from gateway.datapath.metrics import E2E, TLS_NOT_AFTER, TTFT, PoolCounters
from gateway.datapath.protocol.errors import Reason
from gateway.datapath.shared import Shared
from gateway.settings.load import load
from gateway.settings.schema import Settings
from loaders.engines.base import EngineLoad
from modelcache.fetch.transfer import Transfer
from modelcache.serving import describe
from modelcache.settings import ModelCacheSettings
from modelcache.store.capacity import Usage
from modelcache.types import TIERS, Progress, Tier
from router.types import ReplicaState

ROOT = Path(__file__).resolve().parents[3]
TRANSFER = Transfer(ModelCacheSettings())
USAGE = Usage(
    bytes_used=10,
    bytes_blobs=4,
    bytes_prepared=3,
    bytes_partial=2,
    bytes_records=1,
    bytes_promised=0,
    free_bytes=5,
    quota_bytes=20,
    reserve_bytes=0,
)
FORKS = ForkServerEntry(
    state="ready",
    reason="",
    pid=1,
    pss_bytes=7,
    import_s=None,
    forked=3,
    crashes=2,
    standbys=(StandbyEntry(pool="p", pid=2, parked=True, pss_bytes=5),),
)
ENGINE = types.EngineObservation(
    observed_at_s=0.0,
    load=EngineLoad(**dict.fromkeys(EngineLoad.__slots__, 1)),
    prefix_cache_hit_fraction=0.5,
)
GPUS = types.GpuReport(
    source="nvml",
    gpus=(
        types.GpuReading(
            gpu=types.GpuCapacity(index=0, uuid="GPU-0", name="n", driver="d"),
            figures={figure.name: 1.0 for figure in GPU_FIGURES},
            throttle_reasons=(),
            xids=(types.XidEvent(xid=79, at_s=0.0),),
            xid_counts={79: 1},
        ),
    ),
)
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "bench/README.md", "deploy/**/*.md")
    for path in ROOT.glob(pattern)
    if not path.name.startswith(".")
)
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in PAGES}
README, COMMANDS = TEXTS["README.md"], TEXTS["docs/reference/commands.md"]
CONFIGURE, OPERATE = TEXTS["docs/configure.md"], TEXTS["docs/operate.md"]
METRICS, SCALING = TEXTS["docs/reference/metrics.md"], TEXTS["docs/reference/scaling.md"]
TROUBLESHOOT = TEXTS["docs/troubleshoot.md"]
APACHE_2_SHA256 = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
HISTOGRAM_ENDS = ("_bucket", "_sum", "_count")


def between(text: str, name: str) -> str:
    """What stands between the two comments of a marked block."""
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    assert text.count(start) == text.count(end) == 1
    return text.partition(start)[2].partition(end)[0].strip()


def code_in(text: str) -> Iterator[str]:
    """Every line of a fenced block, without its prompt, and every code span."""
    fences = re.split(r"^```.*$", text, flags=re.MULTILINE)
    for block in fences[1::2]:
        yield from (line.removeprefix("$ ") for line in block.splitlines())
    for prose in fences[0::2]:
        yield from re.findall(r"`([^`]+)`", prose)


CODE = [(page, code) for page, text in TEXTS.items() for code in code_in(text)]


def rows_of(text: str, heading: str) -> dict[str, list[str]]:
    """The first table after a text, by the code span in its first cell."""
    table = text.partition(heading)[2].lstrip("\n").split("\n\n", 2)
    lines = next(part for part in table if part.lstrip().startswith("|")).strip().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in rows}


def verbs(command: Any, path: str = "tidegate") -> dict[str, Any]:
    """Every command line verb with its whole name."""
    if not hasattr(command, "commands"):
        return {path: command}
    found = {path: command}
    for name, inner in command.commands.items():
        found |= verbs(inner, f"{path} {name}")
    return found


VERBS = verbs(typer.main.get_command(app))
TARGETS = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_every_make_target_is_in_the_reference_and_no_other_anywhere() -> None:
    assert {"run", "test", "lint", "bench", "clean"} <= TARGETS
    for target in TARGETS:
        assert f"`make {target}`" in COMMANDS
    for page, code in CODE:
        for line in re.findall(r"\bmake ((?:[a-z][a-z-]* ?)+)", code.partition("#")[0]):
            assert set(line.split()) <= TARGETS, f"{page}: make {line}"


def test_every_verb_is_in_the_reference_and_no_other_anywhere() -> None:
    leaves = {name for name, command in VERBS.items() if not hasattr(command, "commands")}
    assert {"tidegate up", "tidegate status", "tidegate config show"} <= leaves
    for name in leaves:
        assert f"`{name}" in COMMANDS
    for page, code in CODE:
        for said in re.findall(r"(?:^|[\s/])tidegate ([a-z]+(?: [a-z]+)?)", code):
            words = said.split()
            name = f"tidegate {words[0]}"
            assert name in VERBS, f"{page}: {name}"
            if hasattr(VERBS[name], "commands") and len(words) > 1:
                assert f"tidegate {said}" in VERBS, f"{page}: tidegate {said}"


def test_options_that_are_shown_exist() -> None:
    seen = 0
    for page, code in CODE:
        match = re.match(r"(?:\S+=\S+ )*\S*tidegate ([a-z]+(?: [a-z]+)?)(.*)", code)
        if match is None:
            continue
        words = match[1].split()
        name = f"tidegate {match[1]}"
        command = VERBS[name if name in VERBS else f"tidegate {words[0]}"]
        known = {option for one in command.params for option in one.opts} | {"--help"}
        for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", match[2]):
            seen += 1
            assert option in known, f"{page}: {code}"
    assert seen > 5


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as a forge makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"(?s)```.*?```", "", text), re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page: str) -> None:
    prose = re.sub(r"(?s)```.*?```", "", TEXTS[page])
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        place = (ROOT / page).parent / path if path else ROOT / page
        assert place.exists(), target
        if anchor:
            assert anchor in anchors(place.read_text()), target


def test_lifecycle_table_is_the_lifecycle() -> None:
    lines = [
        f"| {state} | {event} | {step.state} | {', '.join(step.actions) or '–'} |"
        for state in State
        for event, step in TABLE[state].items()
    ]
    assert between(SCALING, "lifecycle").splitlines()[2:] == lines


def metric_families() -> list[Any]:
    """Every family that Tidegate can expose, from a page with one of each."""
    replica = types.ReplicaReport(
        gpus=(0,),
        id="p-1",
        pool="p",
        state=ReplicaState.STARTING,
        since_s=0.0,
        step="fetching",
        progress=Progress(phase="fetching", bytes_done=1, bytes_total=2),
    )
    pool = types.PoolReport(
        name="p",
        desired=0,
        override=None,
        ready=0,
        starting=0,
        unhealthy=0,
        draining=0,
        sleeping=0,
        wake_eta_s=1.0,
        last_decision=types.Decision(
            pool="p",
            at_s=0.0,
            desired=1,
            supply=1,
            reason=types.ScaleReason.FORECAST,
            detail="",
            reactive=1,
            forecast=1,
            capacity=types.ReplicaCapacity(tokens_per_s=1.0, source=types.CapacitySource.SATURATED),
        ),
        replicas=(replica,),
        tier=Tier.REMOTE,
        tiers=(
            types.TierReport(
                tier=Tier.REMOTE,
                available=True,
                wake_s=1.0,
                wakes=1,
                start_times=types.HistogramCounts(bounds_s=(1.0,), counts=(1, 0), sum_s=1.0),
            ),
        ),
    )
    report = types.FleetReport(
        at_s=0.0,
        pools=(pool,),
        decisions={("p", types.ScaleReason.WAKE): 1},
        errors={"observe": 1},
    )
    shared = Shared.create(workers=1, max_replicas=4, max_pools=1)
    shared.worker_counters(0)[TLS_NOT_AFTER] = 1
    counters = PoolCounters(*shared.pool_rows(0, 0))
    for histogram in (TTFT, E2E):
        counters.observe(histogram, 1.0)
    counters.flush()
    page = metrics_page.render(
        shared=shared,
        pools={"p": 0},
        report=report,
        version="1",
        traffic=describe(None, TRANSFER),
        replicas={"p-1": 0},
        workers=[{"index": 0, "pid": os.getpid(), "restarts": 0}],
        forks=FORKS,
        engines={"p-1": ENGINE},
        gpus=GPUS,
    )
    page += metrics_page.render_forecasts({"chat": types.ForecastTally(scored=1)})
    page += metrics_page.render_history(HistoryState(size_bytes=1, failures=0, error=None))
    page += metrics_page.render_cache(USAGE)
    return list(text_string_to_metric_families(page.decode()))


def test_what_is_not_known_of_the_fork_server_is_left_out() -> None:
    def samples(forks: ForkServerEntry | None) -> dict[str, float]:
        shared = Shared.create(workers=1, max_replicas=4, max_pools=1)
        page = metrics_page.render(
            shared=shared,
            pools={},
            report=None,
            version="1",
            traffic={},
            replicas={},
            workers=(),
            forks=forks,
        )
        return {
            " ".join([one.name, *one.labels.values()]): one.value
            for family in text_string_to_metric_families(page.decode())
            for one in family.samples
            if "fork" in one.name or "standby" in one.name
        }

    assert samples(None) == {}
    known = samples(FORKS)
    assert known["tidegate_fork_server ready"] == 1
    assert known["tidegate_fork_server importing"] == 0
    assert known["tidegate_fork_server_bytes"] == 7
    assert known["tidegate_standby_bytes p"] == 5
    gone = samples(FORKS.model_copy(update={"state": "waiting", "pss_bytes": None, "standbys": ()}))
    assert gone["tidegate_fork_server waiting"] == 1
    assert gone["tidegate_fork_server_crashes_total"] == 2
    assert set(known) - set(gone) == {"tidegate_fork_server_bytes", "tidegate_standby_bytes p"}


def test_metrics_table_is_what_is_exposed() -> None:
    lines = []
    for family in metric_families():
        labels = sorted({name for one in family.samples for name in one.labels} - {"le"})
        name = family.samples[0].name if family.type == "counter" else family.name
        shown = ", ".join(f"`{label}`" for label in labels)
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    assert len(lines) > 25
    assert between(METRICS, "metrics").splitlines()[2:] == lines


def test_metrics_named_anywhere_exist() -> None:
    known = {sample.name for family in metric_families() for sample in family.samples}
    known |= {name.removesuffix(end) for name in known for end in HISTOGRAM_ENDS}
    known |= {"tidegate_simulated_engine"}  # the simulated engine's own
    known |= set(PUBLISHED) | adapter_s_own()
    for page, text in TEXTS.items():
        named = set(re.findall(r"\btidegate_[a-z0-9_]+\b(?!\*)", text))
        assert named <= known, page


def test_label_values_are_explained() -> None:
    for family in ("tidegate_requests", "tidegate_starts"):
        outcomes = {
            sample.labels["outcome"]
            for one in metric_families()
            if one.name == family
            for sample in one.samples
        }
        assert set(rows_of(METRICS, f"`outcome` of `{family}_total`")) == outcomes
    reasons = rows_of(METRICS, "`reason` of `tidegate_decisions_total`")
    assert set(reasons) == set(types.ScaleReason)
    assert set(rows_of(METRICS, "`tier` of `tidegate_tier`")) == set(TIERS)
    assert set(rows_of(METRICS, "`kind` of `tidegate_cache_bytes`")) == set(
        metrics_page.CACHE_KINDS
    )
    assert set(rows_of(METRICS, "`state` of `tidegate_fork_server`")) == set(FORK_STATES)
    assert set(rows_of(METRICS, "`step` of `tidegate_starting_replicas`")) == set(STEPS_TO_READY)
    reasons = rows_of(METRICS, "`reason` of `tidegate_gpu_throttled`")
    assert set(reasons) == {name for _, name in THROTTLE_REASONS}
    actions = rows_of(METRICS, "`action` of `tidegate_gpu_fault`")
    assert set(actions) == set(GpuAction) - {GpuAction.IGNORE}
    for state in ReplicaState:
        assert f"`{state}`" in METRICS


def test_every_reason_of_the_gateway_is_explained_with_its_status() -> None:
    rows = rows_of(TROUBLESHOOT, "## x-tidegate-reason")
    assert set(rows) == set(Reason)
    sources = "".join(path.read_text() for path in (ROOT / "gateway" / "datapath").rglob("*.py"))
    for reason in Reason:
        given = re.findall(rf"ApiError\(\s*(\d+|\w+),\s*Reason\.{reason.name}\b", sources)
        numbers = {status for status in given if status.isdigit()}
        status = rows[reason][0]
        if f"Reason.{reason.name}" not in sources:
            assert rows[reason][1] == "not given by this version", reason
        elif status != "–":
            assert numbers == {status}, reason


def find_setting(path: str) -> Any:
    """The default of a dotted setting; ``KeyError`` for one that is not there."""
    here: Any = Settings()
    for name in path.split("."):
        if name not in type(here).model_fields:
            raise KeyError(path)
        here = getattr(here, name)
    return here


def test_limits_table_has_the_defaults() -> None:
    units = {"MiB": 1 << 20, "": 1, "s": 1, "bytes": 1, "lines": 1}
    seen = 0
    for first, (value, _) in rows_of(CONFIGURE, "## Limits").items():
        names = re.findall(r"`?([a-z]+[._][a-z_.]*[a-z])`?", first.partition("(per")[0])
        numbers = re.findall(r"(\d[\d,]*\d|\d) ?([A-Za-z]*)", value)
        assert len(names) == len(numbers) >= 1, first
        for name, (number, unit) in zip(names, numbers, strict=True):
            seen += 1
            shown = int(number.replace(",", "")) * units[unit]
            assert find_setting(f"gateway.{name}") == shown, name
    assert seen > 12


def test_settings_files_that_are_shown_load(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", README + CONFIGURE + OPERATE, re.DOTALL)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        path = tmp_path / f"{number}.toml"
        path.write_text(block)
        assert load(path, {}, ()).settings is not None


def test_environment_variables_named_exist() -> None:
    sources = "".join(
        path.read_text()
        for folder in ("gateway", "autoscaler", "loaders", "modelcache", "deploy")
        for path in (ROOT / folder).rglob("*.py")
    )
    for page, text in TEXTS.items():
        for name in set(re.findall(r"\bTIDEGATE_[A-Z][A-Z_]*[A-Z]\b", text)):
            assert name in sources, f"{page}: {name}"


def test_picture_is_drawn_for_light_and_dark() -> None:
    picture = ROOT / "docs" / "img" / "tidegate.svg"
    root = ET.fromstring(picture.read_text())
    assert root.attrib["viewBox"]
    assert "(prefers-color-scheme: dark)" in picture.read_text()
    assert "(docs/img/tidegate.svg)" in README


def test_licence_is_the_whole_text() -> None:
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == APACHE_2_SHA256


def test_measured_block_says_by_which_command() -> None:
    measured = between(README, "measured")
    assert "python -m bench" in measured or "make bench" in measured
    for path in re.findall(r"\(bench/results/([^)]+)\)", measured):
        assert (ROOT / "bench" / "results" / path).exists()


def test_pages_name_no_place_of_one_machine() -> None:
    for page, text in TEXTS.items():
        assert re.search(r"(?<![\w.])/(?:work|root|tmp|home)/", text) is None, page


def test_decisions_are_numbered_once_and_have_their_parts() -> None:
    folder = ROOT / "docs" / "decisions"
    pages = sorted(folder.glob("[0-9]*.md"))
    assert len({page.name[:4] for page in pages}) == len(pages) >= 8
    for page in pages:
        text = page.read_text()
        assert text.startswith(f"# {page.name[:4]} "), page.name
        for part in ("**Context.**", "**Decision.**", "**Rejected.**"):
            assert part in text, page.name


def adapter_s_own() -> set[str]:
    """The adapter's metrics of itself."""
    page = AdapterMeasures("1", SimpleNamespace(age_s=None, failures=0)).page().decode()
    return set(re.findall(r"^# TYPE (tidegate_adapter_\w+)", page, re.MULTILINE))


def test_the_adapter_s_page_has_its_metrics() -> None:
    page = TEXTS["docs/reference/adapter.md"]
    rows = rows_of(f"#\n{between(page, 'adapter-metrics')}", "#")
    documented = {
        name: (tuple(re.findall("`(.*?)`", labels)), of_pods == "yes", of_namespaces == "yes", text)
        for name, (labels, of_pods, of_namespaces, text) in rows.items()
    }
    assert documented == {
        one.name: (one.labels, one.of_replica is not None, one.is_additive, one.help)
        for one in PUBLISHED.values()
    }
    own = adapter_s_own()
    named = set(re.findall(r"`(tidegate_adapter_\w+)`", page))
    assert {one for one in own if "_process_" not in one and "build" not in one} == named
