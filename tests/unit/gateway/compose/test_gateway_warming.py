"""Who stands back for other readers of a disk, and where a pool's model is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.compose.cache import locate, prewarm, prewarm_behind
from gateway.compose.engines import fork_plan
from gateway.settings.schema import Settings
from modelcache.pagecache.pressure import ForegroundReads
from modelcache.types import FileRange, NotFound


@pytest.mark.parametrize(("way", "stands_back"), [(prewarm_behind, True), (prewarm, False)])
def test_a_wake_waits_for_nobody_and_all_else_for_everybody(
    way: Any, stands_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(files: Any, *, yield_to: Any = None, **_: Any) -> None:
        seen.append(yield_to)

    monkeypatch.setattr("modelcache.pagecache.residency.prewarm", note)
    (tmp_path / "x").write_bytes(b"x")
    way([FileRange(path=str(tmp_path / "x"))], lambda progress: None, lambda: False)
    assert [isinstance(one, ForegroundReads) for one in seen] == [stands_back]


def test_a_model_is_where_its_steps_have_left_it(tmp_path: Path) -> None:
    plain, kept = tmp_path / "plain", tmp_path / "kept"
    for folder in (plain, kept):
        folder.mkdir()
        (folder / "x").write_bytes(b"x")
    step = {"kind": "command", "argv": [sys.executable, "-c", "open('made', 'w').write('1')"]}
    settings = Settings.model_validate(
        {
            "modelcache": {"dir": str(tmp_path / "cache"), "steps": {str(kept): [step]}},
            "pools": [
                {"name": name, "engine": "vllm", "model": model}
                for name, model in (
                    ("plain", str(plain)),
                    ("kept", str(kept)),
                    ("named", "org/name"),
                    ("away", "s3://models/m"),
                )
            ],
        }
    )
    at = {one.name: one for one in settings.pools}
    assert locate(at["plain"], settings, {}) == str(plain)
    assert (Path(locate(at["kept"], settings, {})) / "made").is_file()
    assert locate(at["named"], settings, {}) == "org/name"
    with pytest.raises(NotFound, match="tidegate model preload"):
        locate(at["away"], settings, {})


@pytest.mark.parametrize(
    ("fields", "forks"),
    [
        ({}, True),
        ({"backend": "kubernetes", "kubernetes": {"name": "m"}}, False),
    ],
)
def test_the_fork_server_is_for_engines_of_this_machine(
    fields: dict[str, Any], forks: bool
) -> None:
    pool = {"name": "m", "engine": "vllm", "model": "org/m", **fields}
    settings = Settings.model_validate({"pools": [pool]})
    plan = fork_plan(settings, {}, None, lambda model: None)
    assert (plan is not None) is forks
