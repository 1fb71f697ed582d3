"""One request for text: what is read of its body, its sequences in the engine, its answer on the
wire."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from loaders.engines.simulated.api.answers import GeneratedText, Speaker
from loaders.engines.simulated.api.bodies import RequestError
from loaders.engines.simulated.core import EngineCore
from loaders.engines.simulated.http1 import HttpExchange
from loaders.engines.simulated.scheduler import Sequence, SequenceState
from loaders.engines.simulated.tokens import block_hashes, padded, token_count

_OVER = (SequenceState.FINISHED, SequenceState.ABORTED)
_encode = msgspec.json.Encoder().encode


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The engine as one request sees it."""

    served_models: tuple[str, ...]
    max_model_len_tokens: int
    speaker: Speaker
    embedding_size: int
    request_id: str = ""
    created_s: int = 0

    def model(self, name: str | None) -> str:
        """The model that a request names, or the one served. Raises the 404."""
        if name and name not in self.served_models:
            served = ", ".join(self.served_models)
            message = f"The model `{name}` does not exist. Valid aliases: {served}."
            raise RequestError(404, message, param="model")
        return name or self.served_models[0]


class Format(ABC):
    """How one API words an answer. Choices are numbered from 0, in the order of the answers."""

    def begin(self) -> list[bytes]:
        """The events sent as soon as the request is accepted."""
        return []

    def token(self, choice: int, text: str, *, first: bool, last: bool) -> list[bytes]:
        """The events for one token of a choice, which shows ``text``.

        ``first`` before any other, ``last`` where the choice ends with it. An answer that the
        engine ended itself has a last one without text, which is no token.
        """
        return []

    def end(self) -> list[bytes]:
        """The events that end the stream."""
        return []

    @abstractmethod
    def whole(self) -> bytes:
        """The answer in one piece, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRequest:
    """A request that was read: prompts with their answers, and who words them."""

    answers: list[tuple[bytes, GeneratedText]]
    wording: Callable[[Generation], Format]
    stream: bool = False


Prepare = Callable[[dict[str, Any], Context], PreparedRequest]
"""Reads the body of one API's request. Raises ``RequestError``."""


def named_event(fields: dict[str, Any]) -> bytes:
    """One event, named by its ``type``."""
    return b"event: %s\ndata: %s\n\n" % (str(fields["type"]).encode(), _encode(fields))


class Generation:
    """Sequences submitted for one exchange. It is the owner that the engine tells."""

    def __init__(
        self,
        engine: EngineCore,
        exchange: HttpExchange,
        answers: list[tuple[bytes, GeneratedText]],
        *,
        stream: bool,
        cut_after_chunks: int | None = None,
        cut_by_reset: bool = False,
        ended: Callable[[Generation], None],
    ) -> None:
        size = engine.scheduler.model.block_size_tokens
        self.dirty = False
        self.answers = [answer for _, answer in answers]
        self.sequences = [
            Sequence(
                prompt_tokens=token_count(prompt),
                output_tokens=answer.tokens,
                block_hashes=block_hashes(padded(prompt) + answer.text, size),
                owner=self,
            )
            for prompt, answer in answers
        ]
        self._engine = engine
        self._exchange = exchange
        self._stream = stream
        self._cut_after = cut_after_chunks
        self._cut_by_reset = cut_by_reset
        self._ended = ended
        self._sent = [0] * len(answers)
        self._open = set(range(len(answers)))
        self._format: Format  # from ``start`` on; nothing is produced before

    def start(self, wording: Format) -> None:
        """Submit the sequences and begin to answer. Raises as ``EngineCore.submit``."""
        self._engine.submit(self.sequences)
        self._format = wording
        exchange = self._exchange
        exchange.on_gone = self.cancel
        if self._stream:
            exchange.on_drained = self.progressed
            exchange.stream()
            self._send(wording.begin())

    def cancel(self) -> None:
        """The client is gone: the engine drops what it was doing."""
        self._engine.abort(self.sequences)
        self._open.clear()
        self._ended(self)

    def stop(self) -> None:
        """The engine ends it: the client gets what there is, with the finish reason ``abort``."""
        self._engine.abort(self.sequences)
        for index in self._open:
            produced = self.sequences[index].produced
            cut = self.answers[index]
            self.answers[index] = replace(
                cut, text=cut.text[: 4 * produced], tokens=produced, finish_reason="abort"
            )
        self.progressed()

    def finish_reason(self, sequence: Sequence) -> str:
        """What metrics count the end of ``sequence`` as."""
        answer = self.answers[self.sequences.index(sequence)]
        return "length" if answer.finish_reason == "length" else "stop"

    def progressed(self) -> None:
        """Send what is new, where the reader keeps up; answer, where all is there."""
        self.dirty = False
        if self._exchange.done:
            return
        if self._stream:
            if self._exchange.writable:
                self._send_new()
        elif all(s.state in _OVER for s in self.sequences):
            if self._cut_after is not None:
                self._exchange.cut(reset=self._cut_by_reset)
            else:
                self._exchange.respond(200, self._format.whole())
            self._ended(self)

    def _send_new(self) -> None:
        wording = self._format
        events: list[bytes] = []
        for choice in sorted(self._open):
            sequence, answer = self.sequences[choice], self.answers[choice]
            sent, produced = self._sent[choice], sequence.produced
            over = sequence.state in _OVER
            for token in range(sent, produced):
                piece = answer.text[4 * token : 4 * token + 4].decode("ascii")
                last = over and token + 1 == produced
                events += wording.token(choice, piece, first=token == 0, last=last)
            if over:
                if sent == produced:
                    events += wording.token(choice, "", first=sent == 0, last=True)
                self._open.discard(choice)
            self._sent[choice] = produced
        whole = not self._open
        if whole:
            events += wording.end()
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
