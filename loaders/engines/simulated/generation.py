"""The engine at work: its scheduler in time, and the sequences of each request.

``EngineCore`` runs the scheduler's steps on the event loop. A ``Generation`` has the sequences of a
request in the engine, and sends its ``Reply``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from loaders.engines.simulated.api.bodies import Reply
from loaders.engines.simulated.http1 import HttpExchange
from loaders.engines.simulated.metrics import Metrics
from loaders.engines.simulated.scheduler import Scheduler, Sequence, SequenceState, StepOutput
from loaders.engines.simulated.tokens import block_hashes, padded, token_count

_STEPS_PER_TURN = 64
"""Steps before the event loop gets its turn: with infinite rates there would be no end."""
_OVER = (SequenceState.FINISHED, SequenceState.ABORTED)


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
            owner: Generation = sequence.owner
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


class Generation:
    """The sequences of one reply, which owns them: the engine tells it once per turn that some of
    them got on."""

    def __init__(
        self,
        engine: EngineCore,
        exchange: HttpExchange,
        reply: Reply,
        *,
        cut_after_chunks: int | None = None,
        cut_by_reset: bool = False,
        ended: Callable[[Generation], None],
    ) -> None:
        size = engine.scheduler.model.block_size_tokens
        self.dirty = False
        self._sequences = reply.sequences = [
            Sequence(
                prompt_tokens=token_count(prompt),
                output_tokens=answer.tokens,
                block_hashes=block_hashes(padded(prompt) + answer.text, size),
                owner=self,
            )
            for prompt, answer in zip(reply.prompts, reply.answers, strict=True)
        ]
        self._engine = engine
        self._exchange = exchange
        self._reply = reply
        self._cut_after = cut_after_chunks
        self._cut_by_reset = cut_by_reset
        self._ended = ended
        self._sent = [0] * len(reply.answers)
        self._open = set(range(len(reply.answers)))

    def start(self) -> None:
        """Submit the sequences and begin to answer. Raises as ``EngineCore.submit``."""
        self._engine.submit(self._sequences)
        exchange = self._exchange
        exchange.on_gone = self.cancel
        if self._reply.stream:
            exchange.on_drained = self.progressed
            exchange.stream()
            self._send(self._reply.begin())

    def cancel(self) -> None:
        """The client is gone: the engine drops what it was doing."""
        self._engine.abort(self._sequences)
        self._open.clear()
        self._ended(self)

    def stop(self) -> None:
        """The engine ends it: the client gets what there is, with the finish reason ``abort``."""
        self._engine.abort(self._sequences)
        answers = self._reply.answers
        for index in self._open:
            produced = self._sequences[index].produced
            cut = answers[index]
            answers[index] = replace(
                cut, text=cut.text[: 4 * produced], tokens=produced, finish_reason="abort"
            )
        self.progressed()

    def finish_reason(self, sequence: Sequence) -> str:
        """What metrics count the end of ``sequence`` as."""
        answer = self._reply.answers[self._sequences.index(sequence)]
        return "length" if answer.finish_reason == "length" else "stop"

    def progressed(self) -> None:
        """Send what is new, where the reader keeps up; answer, where all is there."""
        self.dirty = False
        if self._exchange.done:
            return
        if self._reply.stream:
            if self._exchange.writable:
                self._send_new()
        elif all(s.state in _OVER for s in self._sequences):
            if self._cut_after is not None:
                self._exchange.cut(reset=self._cut_by_reset)
            else:
                self._exchange.respond(200, self._reply.whole())
            self._ended(self)

    def _send_new(self) -> None:
        reply = self._reply
        events: list[bytes] = []
        for choice in sorted(self._open):
            sequence, answer = self._sequences[choice], reply.answers[choice]
            sent, produced = self._sent[choice], sequence.produced
            over = sequence.state in _OVER
            for token in range(sent, produced):
                piece = answer.text[4 * token : 4 * token + 4].decode("ascii")
                last = over and token + 1 == produced
                events += reply.token(choice, piece, first=token == 0, last=last)
            if over:
                if sent == produced:
                    events += reply.token(choice, "", first=sent == 0, last=True)
                self._open.discard(choice)
            self._sent[choice] = produced
        whole = not self._open
        if whole:
            events += reply.end()
        self._send(events)
        if whole and not self._exchange.done:
            self._exchange.end()
            self._ended(self)

    def _send(self, events: list[bytes]) -> None:
        if self._cut_after is None or len(events) < self._cut_after:
            if self._cut_after is not None:
                self._cut_after -= len(events)
            self._exchange.send(events)
            return
        self._exchange.send(events[: self._cut_after])
        self._exchange.cut(reset=self._cut_by_reset)
        self.cancel()
