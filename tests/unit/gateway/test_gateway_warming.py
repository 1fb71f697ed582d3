"""Who stands back for other readers of a disk, and who does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.cache import prewarm_behind
from gateway.warming import prewarm
from modelcache.foreground import ForegroundReads
from modelcache.types import FileRange


@pytest.mark.parametrize(("way", "stands_back"), [(prewarm_behind, True), (prewarm, False)])
def test_a_wake_waits_for_nobody_and_all_else_for_everybody(
    way: Any, stands_back: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def note(files: Any, *, yield_to: Any = None, **_: Any) -> None:
        seen.append(yield_to)

    monkeypatch.setattr("modelcache.pagecache.prewarm", note)
    (tmp_path / "x").write_bytes(b"x")
    way([FileRange(path=str(tmp_path / "x"))], lambda progress: None, lambda: False)
    assert [isinstance(one, ForegroundReads) for one in seen] == [stands_back]
