"""What replicas carried is there for the next control process, and its rows are bounded."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from direct_writer import DirectWriter

from autoscaler.control.learned_history import LearnedHistory, PoolLoad
from autoscaler.policy.capacity import SAMPLES, LoadSample, Mix

WALL_S = 1_700_000_000.0
DAY_S = 86_400.0
LOAD = LoadSample(
    tokens_per_s=900.5, mix=Mix(500.0, 200.0), within_slo=True, waited=True, accelerator="cpu"
)


class Rig:
    """Minutes that are kept. ``later_s`` is how long ago it began."""

    def __init__(self, directory: Path) -> None:
        self.later_s = 0.0
        self.writer = DirectWriter(directory / "history.sqlite3", self.wall_s)
        self.history = LearnedHistory(
            store=self.writer.store,
            writer=self.writer,  # type: ignore[arg-type]
            wall_s=self.wall_s,
        )

    def wall_s(self) -> float:
        return WALL_S + self.later_s

    def add(self, *loads: PoolLoad, minutes: int = 1) -> None:
        self.history.add_loads(loads)
        self.later_s += 60.0 * minutes

    def read(self, **setups: str) -> dict[str, tuple[LoadSample, ...]]:
        return asyncio.run(self.history.read_loads(setups))


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_minute_comes_back_as_it_was_and_only_to_its_setup(rig: Rig) -> None:
    beyond = replace(LOAD, within_slo=False, waited=False, accelerator="")
    rig.add(PoolLoad("chat", "a", LOAD), PoolLoad("code", "a", beyond))
    rig.add(PoolLoad("chat", "a", beyond))
    rig.add(PoolLoad("chat", "b", beyond))
    assert rig.read(chat="a", code="a", none="a") == {
        "chat": (LOAD, beyond),
        "code": (beyond,),
        "none": (),
    }
    assert rig.read(code="b") == {"code": ()}


def test_the_newest_of_each_pool_are_kept(rig: Rig) -> None:
    rig.add(PoolLoad("code", "a", LOAD))
    for number in range(SAMPLES + 5):
        rig.add(PoolLoad("chat", "a", replace(LOAD, tokens_per_s=float(number))))
    found = rig.read(chat="a", code="a")
    assert [one.tokens_per_s for one in found["chat"]] == [
        float(number) for number in range(5, SAMPLES + 5)
    ]
    assert found["code"] == (LOAD,)


def test_what_is_too_old_is_forgotten(rig: Rig) -> None:
    rig.add(PoolLoad("chat", "a", LOAD), minutes=31 * 24 * 60)
    rig.add(PoolLoad("code", "a", LOAD))
    assert rig.read(chat="a", code="a") == {"chat": (), "code": (LOAD,)}


def test_the_gaps_of_a_pool_are_those_that_were_kept_last(rig: Rig) -> None:
    for minute in range(3):
        rig.history.put_gaps({"chat": b"%d" % minute, "code": b"code"})
        rig.later_s += 60.0
    rig.history.put_gaps({"chat": b"new"})
    found = asyncio.run(rig.history.read_gaps(["chat", "code", "none"]))
    assert found == {"chat": b"new", "code": b"code"}


def test_nothing_piles_up_while_it_cannot_be_written(rig: Rig) -> None:
    rig.writer.error = "no space left on device"
    rig.add(PoolLoad("chat", "a", LOAD))
    rig.writer.error = None
    assert rig.read(chat="a") == {"chat": ()}
