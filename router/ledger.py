"""What is in flight, requests and tokens per replica, and how far windows are open; across workers.

Each worker counts in lists of its own and mirrors every change into rows that others may read
(shared memory; plain lists in tests and simulations). It writes only its own rows, so there is no
lock and no update can be lost. The others' rows are read in bulk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# A mutable sequence of integers: a list, or a memoryview, which is one to the code but not to the
# type checker.
Row = Any


class LedgerError(Exception):
    """The ledger's counts do not agree: a bug in the data path, never a user's mistake."""


class Ledger:
    """Inflight requests and tokens by replica slot, as this worker knows them.

    ``requests`` and ``tokens`` are of all workers, and so is ``opened``, by how many requests a
    replica's window has opened: this worker's part is exact, the others' as old as the last
    ``refresh``, which reads their sums for the first slots, as many as are in use, from ``others``.
    ``shared`` says whether there are other workers at all.
    """

    __slots__ = (
        "_opened_row",
        "_others",
        "_own_opened",
        "_own_requests",
        "_own_tokens",
        "_requests_row",
        "_tokens_row",
        "opened",
        "requests",
        "shared",
        "tokens",
    )

    def __init__(
        self,
        requests_row: Row,
        tokens_row: Row,
        opened_row: Row,
        others: Callable[[], tuple[list[int], list[int], list[int]]] | None = None,
    ) -> None:
        self._requests_row = requests_row
        self._tokens_row = tokens_row
        self._opened_row = opened_row
        self._others = others
        self.shared = others is not None
        self._own_requests: list[int] = list(requests_row)
        self._own_tokens: list[int] = list(tokens_row)
        self._own_opened: list[int] = list(opened_row)
        self.requests: list[int] = list(requests_row)
        self.tokens: list[int] = list(tokens_row)
        self.opened: list[int] = list(opened_row)
        self.refresh()

    def refresh(self) -> None:
        """Read again what the other workers have."""
        if self._others is not None:
            requests, tokens, opened = self._others()
            count = len(requests)
            self.requests[:count] = map(int.__add__, self._own_requests[:count], requests)
            self.tokens[:count] = map(int.__add__, self._own_tokens[:count], tokens)
            self.opened[:count] = map(int.__add__, self._own_opened[:count], opened)

    def reserve(self, slot: int, tokens: int) -> None:
        """A request of ``tokens`` estimated tokens goes to the replica in ``slot``."""
        self._add(slot, 1, tokens)

    def resize(self, slot: int, more_tokens: int) -> None:
        """A request in flight turns out to have more tokens than were reserved for it."""
        self._add(slot, 0, more_tokens)

    def settle(self, slot: int, tokens: int) -> None:
        """That request is over, however it ended. ``tokens`` is what was reserved for it."""
        self._add(slot, -1, -tokens)

    def _add(self, slot: int, requests: int, tokens: int) -> None:
        self.requests[slot] += requests
        self.tokens[slot] += tokens
        self._requests_row[slot] = self._own_requests[slot] = self._own_requests[slot] + requests
        self._tokens_row[slot] = self._own_tokens[slot] = self._own_tokens[slot] + tokens

    def open_window(self, slot: int) -> None:
        """The replica in ``slot`` keeps up: its window is wider by one, for all workers."""
        self.opened[slot] += 1
        self._opened_row[slot] = self._own_opened[slot] = self._own_opened[slot] + 1

    def close_window(self, slot: int) -> None:
        """Take back what this worker has opened the window by."""
        self.opened[slot] -= self._own_opened[slot]
        self._opened_row[slot] = self._own_opened[slot] = 0

    def check_integrity(self) -> None:
        """Raise ``LedgerError`` where this worker's own counts cannot be true."""
        for slot, (requests, tokens) in enumerate(
            zip(self._own_requests, self._own_tokens, strict=True)
        ):
            if requests < 0 or tokens < 0 or (requests == 0 and tokens != 0):
                raise LedgerError(f"slot {slot}: {requests} requests, {tokens} tokens in flight")
            if (self._requests_row[slot], self._tokens_row[slot]) != (requests, tokens):
                raise LedgerError(f"slot {slot}: the shared rows differ from the worker's own")
        if list(self._opened_row) != self._own_opened or min(self._own_opened, default=0) < 0:
            raise LedgerError("the windows' row differs from the worker's own")
        own = (self._own_requests, self._own_tokens)
        if not self.shared and (self.requests, self.tokens) != own:
            raise LedgerError("the totals differ from the only worker's own")
