"""The doctor on models, as tables: what a machine answers, what the doctor makes of it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gateway.admin.schema import CacheListing, CacheTraffic, CacheUsage
from gateway.doctor.checks import Check, Status, diagnose_cache, find_weights
from gateway.doctor.machine import ForkAbility, FormatSpeed, Machine, parse_speeds
from gateway.settings.schema import Settings
from modelcache.types import ModelEntry, Tier

GB = 10**9
OURS = FormatSpeed(format="tidegate", warm_bytes_s=9 * GB, cold_bytes_s=1.9 * GB)
PLAIN = FormatSpeed(format="safetensors", warm_bytes_s=9.5 * GB, cold_bytes_s=0.9 * GB)
ABSENT = FormatSpeed(format="runai_streamer", problem="not installed")


def listing(*models: ModelEntry) -> CacheListing:
    usage = CacheUsage(
        bytes_used=3 * GB, bytes_blobs=3 * GB, bytes_prepared=0, bytes_partial=0, bytes_records=0,
        free_bytes=50 * GB, quota_bytes=None,
    )  # fmt: skip
    return CacheListing(dir="d", usage=usage, traffic=CacheTraffic(), models=models, pools=())


HALF = ModelEntry(
    url="hf://org/m", revision="1", tier=Tier.REMOTE, size_bytes=2, bytes_unique=1, bytes_cached=0,
    complete=False, pinned=False,
)  # fmt: skip


@dataclass
class Answers:
    """A machine on which all is well, unless it is told otherwise."""

    models: CacheListing | str | None = field(default_factory=listing)
    unwritable: str | None = None
    free: int | None = 50 * GB
    missing: tuple[str, ...] = ()
    ways: str = "cachestat"
    lock: int | None = None
    forking: ForkAbility = field(
        default_factory=lambda: ForkAbility(seconds=8.4, memory_bytes=600_000_000)
    )
    formats: list[FormatSpeed] | str = field(default_factory=lambda: [OURS, PLAIN, ABSENT])
    asked: list[str] = field(default_factory=list)

    def listing(self, settings: Settings) -> CacheListing | str | None:
        return self.models

    def can_write(self, path: Path) -> str | None:
        return self.unwritable

    def disk_free_bytes(self, path: Path) -> int | None:
        return self.free

    def is_installed(self, package: str) -> bool:
        return package not in self.missing

    def page_ways(self, path: Path) -> str:
        return self.ways

    def lock_limit_bytes(self) -> int | None:
        return self.lock

    def fork_ability(self, python: Path, device: str) -> ForkAbility:
        self.asked.append(f"fork {device}")
        return self.forking

    def speeds(self, python: Path, weights: Sequence[Path]) -> list[FormatSpeed] | str:
        self.asked.append(f"speeds of {weights[0].name}")
        return self.formats


def settings(model: str = "", **cache: Any) -> Settings:
    pools = [{"name": "chat", "engine": "vllm", "model": model}] if model else []
    return Settings.model_validate({"modelcache": cache, "pools": pools})


def checks(
    answers: Answers,
    given: Settings | None = None,
    device: str | None = "cpu",
    measure: bool = True,
) -> dict[str, Check]:
    found = list(diagnose_cache(given or settings(), answers, device=device, measure=measure))
    assert all(one.finding for one in found)
    assert all(one.advice for one in found if one.status is not Status.OK)
    names = [one.name for one in found]
    assert len(names) == len(set(names)) or names.count("page cache") == 2
    return {one.name: one for one in found}


@pytest.fixture
def weights(tmp_path: Path) -> str:
    (tmp_path / "model.safetensors").write_bytes(b"x")
    return str(tmp_path)


def test_all_well(weights: str) -> None:
    found = checks(Answers(), settings(weights))
    assert list(found) == [
        "model cache", "model sources", "page cache", "fork server", "load format",
    ]  # fmt: skip
    assert {one.status for one in found.values()} == {Status.OK}
    assert "0 model revisions, 3.0 GB; 50.0 GB free on the disk" in found["model cache"].finding
    assert "8.4 s and 600 MB of memory" in found["fork server"].finding
    said = found["load format"].finding
    assert said.startswith("quickest here is tidegate: tidegate 1.9 GB/s from disk, 9.0 GB/s")
    assert "safetensors 900 MB/s from disk" in said
    assert "not installed: runai_streamer" in said


CASES: list[tuple[str, Answers, dict[str, Any], str, Status, str]] = [
    (
        "cache not writable", Answers(unwritable="Permission denied"), {}, "model cache",
        Status.FAIL, "Permission denied",
    ),
    (
        "cache cannot be read", Answers(models="its store lock is held"), {}, "model cache",
        Status.WARN, "store lock",
    ),
    ("disk full", Answers(free=GB), {}, "model cache", Status.WARN, "no space for a model"),
    (
        "quota beyond the disk", Answers(), {"quota_bytes": 900 * GB}, "model cache", Status.WARN,
        "smaller than the quota",
    ),
    ("free unknown", Answers(free=None), {}, "model cache", Status.OK, "? free on the disk"),
    (
        "incomplete", Answers(models=listing(HALF)), {}, "model cache", Status.OK, "1 incomplete",
    ),
    (
        "not made yet", Answers(models=None), {}, "model cache", Status.OK,
        "0 model revisions, 0 B;",
    ),
    (
        "extra missing, not asked for", Answers(missing=("ossfs",)), {}, "model sources",
        Status.OK, "oss:// (ossfs)",
    ),
    ("pages unknown", Answers(ways=""), {}, "page cache", Status.WARN, "residency is unknown"),
    (
        "locking too little", Answers(lock=8 << 20), {"page_lock": True}, "page cache",
        Status.WARN, "8.4 MB may be locked",
    ),
    (
        "locking enough", Answers(lock=8 << 20), {"page_lock": True, "page_budget_bytes": 1 << 20},
        "page cache", Status.OK, "cachestat",
    ),
    (
        "cannot fork", Answers(forking=ForkAbility(problem="an import has started threads: x")), {},
        "fork server", Status.WARN, "threads: x",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "cache", "name", "status", "says"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_findings(
    answers: Answers, cache: dict[str, Any], name: str, status: Status, says: str
) -> None:
    check = checks(answers, settings(**cache))[name]
    assert (check.status, says in check.finding) == (status, True), check


@pytest.mark.parametrize(
    ("model", "missing", "status"),
    [
        ("oss://bucket/m", ("ossfs",), Status.FAIL),
        ("oss://bucket/m", ("obstore",), Status.OK),
        ("hf://org/m", ("ossfs", "obstore"), Status.OK),
        ("https://host/m/", ("ossfs", "obstore"), Status.OK),
    ],
)
def test_a_pool_s_source_that_cannot_be_read_fails(
    model: str, missing: tuple[str, ...], status: Status
) -> None:
    check = checks(Answers(missing=missing), settings(model))["model sources"]
    assert check.status is status
    assert all(package in check.finding for package in missing)
    if status is Status.FAIL:
        assert f"-m pip install {missing[0].replace('_', '-')}" in (check.advice or "")


def test_a_quicker_format_is_named_and_only_a_choice_of_the_operator_s_is_warned_of(
    weights: str,
) -> None:
    fast = FormatSpeed(format="fastsafetensors", warm_bytes_s=12 * GB, cold_bytes_s=3 * GB)
    answers = Answers(formats=[OURS, PLAIN, fast])
    check = checks(answers, settings(weights))["load format"]
    assert check.status is Status.OK
    assert 'loaders.load_format = "fastsafetensors"' in check.finding
    given = settings(weights)
    loaders = given.loaders.model_copy(update={"load_format": PLAIN.format})
    check = checks(answers, given.model_copy(update={"loaders": loaders}))["load format"]
    assert check.status is Status.WARN
    assert 'loaders.load_format = "fastsafetensors"' in (check.advice or "")
    near = FormatSpeed(format="fastsafetensors", warm_bytes_s=12 * GB, cold_bytes_s=2 * GB)
    check = checks(Answers(formats=[OURS, PLAIN, near]), settings(weights))["load format"]
    assert check.status is Status.OK
    assert check.finding.startswith("quickest here is fastsafetensors")


@pytest.mark.parametrize(
    ("formats", "says"),
    [
        ("No module named vllm", "not measured: No module named vllm"),
        ([FormatSpeed(format="tidegate", problem="it crashed")], "tidegate: it crashed"),
    ],
)
def test_formats_that_cannot_be_measured_warn(
    weights: str, formats: list[FormatSpeed] | str, says: str
) -> None:
    check = checks(Answers(formats=formats), settings(weights))["load format"]
    assert check.status is Status.WARN
    assert says in check.finding


def test_nothing_is_started_where_nothing_can_be_or_shall_be(weights: str) -> None:
    for device, measure in ((None, True), ("cpu", False)):
        answers = Answers()
        assert "fork server" not in checks(answers, settings(weights), device, measure)
        assert answers.asked == []
    answers = Answers()
    assert "no model with safetensors" in checks(answers, settings())["load format"].finding
    assert answers.asked == ["fork cpu"]


def test_weights_are_found_in_a_pool_s_directory(tmp_path: Path, weights: str) -> None:
    (empty := tmp_path / "empty").mkdir()
    assert find_weights(settings(weights)) == [Path(weights) / "model.safetensors"]
    assert find_weights(settings(str(empty))) == []
    assert find_weights(settings("hf://org/m")) == []


# The machine itself


def test_a_secret_of_the_cluster_that_is_missing_is_to_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MY_SECRET", raising=False)
    given = Settings.model_validate(
        {
            "state_dir": str(tmp_path),
            "modelcache": {"peer_port": 0, "peer_token_env": "MY_SECRET"},
        }
    )
    check = next(iter(diagnose_cache(given, Machine(os.environ), device=None, measure=False)))
    assert (check.name, check.status) == ("model cache", Status.WARN)
    assert "MY_SECRET" in check.finding
    assert (check.advice or "").startswith("set the environment variable MY_SECRET")


def test_this_machine_answers(tmp_path: Path) -> None:
    machine = Machine(os.environ)
    given = Settings.model_validate({"state_dir": str(tmp_path / "not" / "there")})
    assert machine.listing(given) is None
    assert machine.can_write(tmp_path) is None
    assert (machine.disk_free_bytes(tmp_path) or 0) > 0
    assert machine.is_installed("pytest")
    assert not machine.is_installed("no_such_package")
    assert machine.page_ways(tmp_path) in ("cachestat", "mincore")
    assert machine.lock_limit_bytes() is None or os.geteuid() != 0
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_is_not_there_is_said(tmp_path: Path) -> None:
    machine, python = Machine(os.environ), tmp_path / "python"
    assert machine.fork_ability(python, "cpu").problem == "No such file or directory"
    assert machine.speeds(python, [tmp_path / "x"]) == "No such file or directory"


def test_an_engine_without_vllm_is_said(tmp_path: Path) -> None:
    machine, python = Machine(os.environ), Path(sys.executable)
    assert "vllm" in machine.fork_ability(python, "cpu").problem
    assert "vllm" in str(machine.speeds(python, [tmp_path / "x"]))


def test_figures_are_read_among_what_libraries_print() -> None:
    text = (
        "INFO something\n"
        '{"format": "tidegate", "warm_bytes_s": 1.0, "cold_bytes_s": null, "problem": ""}\n'
        '{"other": 1}\n[]\n'
        '{"format": "x", "warm_bytes_s": null, "cold_bytes_s": null, "problem": "no"}\n'
    )
    assert parse_speeds(text) == [
        FormatSpeed(format="tidegate", warm_bytes_s=1.0),
        FormatSpeed(format="x", problem="no"),
    ]
