"""The scheduler in time: runs its steps on the event loop and hands out what they produced."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from loaders.engines.simulated.metrics import Metrics
from loaders.engines.simulated.scheduler import Scheduler, Sequence, StepOutput

_STEPS_PER_TURN = 64
"""Steps before the event loop gets its turn: with infinite rates there would be no end."""


class SequenceOwner(Protocol):
    """The request that owns sequences; it learns once per turn that some of them got on."""

    dirty: bool

    def progressed(self) -> None:
        """Some of its sequences produced tokens or finished."""

    def finish_reason(self, sequence: Sequence) -> str:
        """What metrics count the end of ``sequence`` as."""


class EngineCore:
    """One scheduler, its metrics, and the clock it lives by: the loop's, or a virtual one."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics, *, virtual_time: bool) -> None:
        self.scheduler = scheduler
        self.metrics = metrics
        self._virtual_s: float | None = 0.0 if virtual_time else None
        self._timer: asyncio.Handle | None = None
        self.stalled = False

    @property
    def now(self) -> float:
        """The engine's time, in seconds from some origin."""
        if self._virtual_s is not None:
            return self._virtual_s
        return asyncio.get_running_loop().time()

    async def spend(self, duration_s: float) -> None:
        """Let ``duration_s`` of the engine's time pass."""
        if self._virtual_s is not None:
            self._virtual_s += duration_s
            await asyncio.sleep(0)
        elif duration_s > 0:
            await asyncio.sleep(duration_s)

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue ``sequences``. Raises as ``Scheduler.submit``, having queued none of them."""
        now = self.now
        queued = 0
        try:
            for sequence in sequences:
                self.scheduler.submit(sequence, now)
                queued += 1
        except Exception:
            for sequence in sequences[:queued]:
                self.scheduler.abort(sequence, now)
            raise
        self._look_soon()

    def abort(self, sequences: list[Sequence]) -> None:
        """Forget ``sequences``: their client is gone."""
        now = self.now
        for sequence in sequences:
            if self.scheduler.abort(sequence, now):
                self.metrics.record_finished(sequence, "abort")
        self._look_soon()

    def set_paused(self, paused: bool) -> None:
        """Asleep, or awake again."""
        self.scheduler.paused = paused
        self._look_soon()

    def set_stalled(self, stalled: bool) -> None:
        """Hung: the step under way never ends. Or as if nothing had been."""
        if self.stalled and not stalled:
            self.scheduler.hold(self.now)
        self.stalled = stalled
        self._look_soon()

    def _look_soon(self) -> None:
        # Where a step is under way, what came meanwhile has to wait for its end.
        if self._timer is None:
            self._look_at(None)

    def _look_at(self, when_s: float | None) -> None:
        loop = asyncio.get_running_loop()
        if when_s is None or self._virtual_s is not None:
            self._timer = loop.call_soon(self._turn)
        else:
            self._timer = loop.call_at(when_s, self._turn)

    def _turn(self) -> None:
        self._timer = None
        if self.stalled:
            return
        scheduler = self.scheduler
        if self._virtual_s is not None and scheduler.next_at is not None:
            self._virtual_s = max(self._virtual_s, scheduler.next_at)
        progress = scheduler.advance(self.now, _STEPS_PER_TURN)
        if progress.steps:
            self._hand_out(progress)
        if scheduler.next_at is not None:
            self._look_at(None if scheduler.next_at <= self.now else scheduler.next_at)

    def _hand_out(self, progress: StepOutput) -> None:
        metrics = self.metrics
        metrics.record(progress)
        for sequence in progress.first:
            metrics.record_first_token(sequence)
        dirty: list[Callable[[], None]] = []
        for sequence in progress.produced:
            owner: SequenceOwner = sequence.owner
            if not owner.dirty:
                owner.dirty = True
                dirty.append(owner.progressed)
        for sequence in progress.finished:
            owner = sequence.owner
            metrics.record_finished(sequence, owner.finish_reason(sequence))
            if not owner.dirty:
                owner.dirty = True
                dirty.append(owner.progressed)
        for tell in dirty:
            tell()
