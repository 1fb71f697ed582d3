"""How long wakes took: measured seconds per model, node and tier, kept over restarts."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from autoscaler.state_file import StateFile
from modelcache.types import TIERS, Tier

MODELS = 1_000
"""Pairs of model and node that are remembered, the last used of them."""

LEAD_LEVEL = 0.9

Seconds = Annotated[float, Field(ge=0.0, le=1e9)]


class MeasuredWakes(BaseModel):
    """The wakes of one model on one node out of one tier, in seconds, oldest first."""

    model_config = ConfigDict(strict=True)

    model: str
    node: str
    tier: Tier
    seconds: list[Seconds]


class WakeTimesFile(BaseModel):
    """What is kept on disk."""

    model_config = ConfigDict(strict=True)

    version: Literal[1] = 1
    wakes: list[MeasuredWakes]


class WakeTimes:
    """The newest ``samples`` wake times of each model and tier on ``node``, and those of other
    nodes as they were found. ``path`` unset: nothing is kept on disk."""

    def __init__(self, *, samples: int, node: str = "", path: Path | None = None) -> None:
        self._node = node
        self._samples = samples
        self._times: dict[tuple[str, str], dict[Tier, deque[float]]] = {}
        self._file = StateFile(path, WakeTimesFile, "wake times are measured anew")
        found = self._file.read()
        for one in () if found is None else found.wakes:
            self._put((one.model, one.node), one.tier, one.seconds)

    def add(self, model: str, tier: Tier, seconds: float) -> None:
        """Remember that a wake of ``model`` out of ``tier`` took so long."""
        self._put((model, self._node), tier, [seconds])

    def measured(self, model: str, tier: Tier) -> tuple[float, ...]:
        """The times of this model, node and tier, oldest first."""
        return tuple(self._times.get((model, self._node), {}).get(tier, ()))

    def median_s(self, model: str, tier: Tier) -> float | None:
        """The usual time; ``None`` where none was measured."""
        times_s = self.measured(model, tier)
        return statistics.median(times_s) if times_s else None

    def lead_s(self, model: str, tier: Tier) -> float | None:
        """How long to ask for a replica ahead of demand: the time that nine of ten wakes out of
        ``tier``, or else the nearest tier that was measured, did not exceed. ``None`` where this
        model was never woken here."""
        for near in self._nearest(tier):
            if times_s := sorted(self.measured(model, near)):
                return times_s[min(len(times_s) - 1, int(LEAD_LEVEL * len(times_s)))]
        return None

    def estimate_s(self, model: str, tier: Tier) -> float | None:
        """A time the next wake out of ``tier`` will hardly exceed: the longest of those measured.

        Where none was, that of the nearest colder tier, which takes longer; else of the nearest
        warmer one. ``None`` where this model was never woken here.
        """
        for near in self._nearest(tier):
            if times_s := self.measured(model, near):
                return max(times_s)
        return None

    @staticmethod
    def _nearest(tier: Tier) -> tuple[Tier, ...]:
        """The tier, those colder, then those warmer, each the nearest first."""
        place = TIERS.index(tier)
        return (*TIERS[place:], *reversed(TIERS[:place]))

    async def save(self) -> None:
        """Keep them on disk. Raises ``OSError``."""
        await self._file.write(WakeTimesFile(wakes=self._measured()))

    def _put(self, key: tuple[str, str], tier: Tier, times_s: Iterable[float]) -> None:
        tiers = self._times.pop(key, {})
        self._times[key] = tiers
        tiers.setdefault(tier, deque(maxlen=self._samples)).extend(times_s)
        while len(self._times) > MODELS:
            del self._times[next(iter(self._times))]

    def _measured(self) -> list[MeasuredWakes]:
        return [
            MeasuredWakes(
                model=model,
                node=node,
                tier=tier,
                seconds=[round(one, 3) for one in times_s],
            )
            for (model, node), tiers in self._times.items()
            for tier, times_s in tiers.items()
        ]
