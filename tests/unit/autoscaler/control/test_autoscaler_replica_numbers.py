"""Numbers of replicas over restarts."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from autoscaler.control.replica_numbers import ReplicaNumbers


def test_no_id_is_given_twice_over_restarts(tmp_path: Path) -> None:
    async def story() -> None:
        path = tmp_path / "numbers.json"
        first = ReplicaNumbers(path)
        assert [first.make_id("m"), first.make_id("m"), first.make_id("n-1")] == [
            *("m-1", "m-2", "n-1-1"),
        ]
        assert first.are_new
        await asyncio.gather(first.save(), first.save())
        assert not first.are_new
        second = ReplicaNumbers(path)
        assert not second.are_new
        second.note("m-7")  # it was adopted
        second.note("odd")
        second.note("m-" + "9" * 99)
        assert [second.make_id("m"), second.make_id("n-1")] == ["m-8", "n-1-2"]

    asyncio.run(story())


@pytest.mark.parametrize(
    "text", ["", "[" * 100_000, '{"numbers": {"m": -1}}', '{"numbers": 1e400}']
)
def test_what_cannot_be_read_begins_anew(tmp_path: Path, text: str) -> None:
    path = tmp_path / "numbers.json"
    path.write_text(text)
    assert ReplicaNumbers(path).make_id("m") == "m-1"
