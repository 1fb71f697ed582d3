"""Which engines are taken over: a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from process_fixtures import tiny_pool

from autoscaler.backends.base import ReplicaSpec
from autoscaler.backends.process.backend import adopted_spec, why_not_adopted
from autoscaler.backends.process.family import ProcessRecord, StartedEngine
from autoscaler.backends.process.procs import ProcessId
from loaders.engines.base import Placement

ENGINE = StartedEngine(
    pool="tiny",
    model="/models/tiny",
    placement=Placement(host="127.0.0.1", port=1),
    digest="d",
    log="/logs/r-1.log",
)
RECORD = ProcessRecord(
    replica_id="r-1", boot_id="b", leader=ProcessId(7, 70), mark="a" * 32, engine=ENGINE
)
WANTED = ReplicaSpec(id="any", pool=tiny_pool(), digest="d")
KNOWN: dict[str, Any] = {"keep_s": 60.0, "boot_id": "b", "is_ours": True}


@pytest.mark.parametrize(
    ("record", "wanted", "known", "part"),
    [
        (RECORD, WANTED, {}, ""),
        (RECORD, WANTED, {"is_ours": False}, "engine that runs"),
        (RECORD, WANTED, {"boot_id": "another"}, "engine that runs"),
        (RECORD, WANTED, {"keep_s": 0.0}, "keep_engines_s"),
        (RECORD, None, {}, "no pool tiny"),
        (RECORD, replace(WANTED, digest="other"), {}, "settings of tiny"),
        (replace(RECORD, ending=True), WANTED, {}, "engine that runs"),
        (replace(RECORD, engine=None), WANTED, {}, "engine that runs"),
        # One that stands by has no digest yet, nor has what was never given one.
        (replace(RECORD, engine=replace(ENGINE, digest="")), WANTED, {}, "settings of tiny"),
        (
            replace(RECORD, engine=replace(ENGINE, digest="")),
            replace(WANTED, digest=""),
            {},
            "settings of tiny",
        ),
    ],
)
def test_an_engine_is_taken_over_if_nothing_speaks_against_it(
    record: ProcessRecord, wanted: ReplicaSpec | None, known: dict[str, Any], part: str
) -> None:
    reason = why_not_adopted(record, wanted, **{**KNOWN, **known})
    assert (part in reason) if part else (reason == "")


def test_it_goes_on_as_the_replica_it_was_with_the_model_it_has() -> None:
    spec = adopted_spec(RECORD, WANTED)
    assert (spec.id, spec.digest, spec.pool.model) == ("r-1", "d", "/models/tiny")
