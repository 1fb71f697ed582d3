"""A small file of the control process."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from autoscaler import state_file
from autoscaler.state_file import StateFile


class Counted(BaseModel):
    count: int


def test_the_event_loop_goes_on_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk may take its time, or hang; what was asked for last is what stays."""
    path = tmp_path / "deep" / "count.json"
    write = state_file.write_whole

    async def story() -> None:
        loop = asyncio.get_running_loop()

        def slow(*given: Any, **options: Any) -> None:
            turned = threading.Event()
            loop.call_soon_threadsafe(turned.set)
            assert turned.wait(5.0)
            write(*given, **options)

        monkeypatch.setattr(state_file, "write_whole", slow)
        file = StateFile(path, Counted, "it begins at 0")
        assert file.read() is None
        await asyncio.gather(*(file.write(Counted(count=number)) for number in range(5)))
        assert file.read() == Counted(count=4)

    asyncio.run(story())


def test_what_cannot_be_kept_is_an_error_and_without_a_path_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        asyncio.run(StateFile(tmp_path / "file" / "x.json", Counted, "").write(Counted(count=1)))
    nothing = StateFile(None, Counted, "")
    asyncio.run(nothing.write(Counted(count=1)))
    assert nothing.read() is None
