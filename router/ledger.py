"""Who has how much in flight: requests and tokens per replica, across workers.

Each worker counts in lists of its own and mirrors every change into two rows that others may read
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

    ``requests`` and ``tokens`` are this worker's own, always exact. ``others`` reads the sums of
    the other workers' rows; between two ``refresh`` their part is as old as the last one.
    ``shared`` says whether there are others at all.
    """

    __slots__ = (
        "_others",
        "_requests_row",
        "_tokens_row",
        "other_requests",
        "other_tokens",
        "requests",
        "shared",
        "tokens",
    )

    def __init__(
        self,
        requests_row: Row,
        tokens_row: Row,
        others: Callable[[], tuple[list[int], list[int]]] | None = None,
    ) -> None:
        self._requests_row = requests_row
        self._tokens_row = tokens_row
        self._others = others
        self.shared = others is not None
        self.requests: list[int] = list(requests_row)
        self.tokens: list[int] = list(tokens_row)
        self.other_requests: list[int] = [0] * len(self.requests)
        self.other_tokens: list[int] = [0] * len(self.tokens)
        self.refresh()

    def refresh(self) -> None:
        """Re-read what the other workers have in flight."""
        if self._others is not None:
            self.other_requests, self.other_tokens = self._others()

    def inflight_requests(self, slot: int) -> int:
        """Requests in flight on a replica, all workers together."""
        total: int = self.requests[slot] + self.other_requests[slot]
        return total

    def inflight_tokens(self, slot: int) -> int:
        """Estimated tokens in flight on a replica, all workers together."""
        total: int = self.tokens[slot] + self.other_tokens[slot]
        return total

    def reserve(self, slot: int, tokens: int) -> None:
        """A request of ``tokens`` estimated tokens goes to the replica in ``slot``."""
        self._requests_row[slot] = self.requests[slot] = self.requests[slot] + 1
        self._tokens_row[slot] = self.tokens[slot] = self.tokens[slot] + tokens

    def settle(self, slot: int, tokens: int) -> None:
        """That request is over, however it ended. ``tokens`` is what was reserved for it."""
        self._requests_row[slot] = self.requests[slot] = self.requests[slot] - 1
        self._tokens_row[slot] = self.tokens[slot] = self.tokens[slot] - tokens

    def check_integrity(self) -> None:
        """Raise ``LedgerError`` where this worker's own counts cannot be true."""
        for slot, (requests, tokens) in enumerate(zip(self.requests, self.tokens, strict=True)):
            if requests < 0 or tokens < 0 or (requests == 0 and tokens != 0):
                raise LedgerError(f"slot {slot}: {requests} requests, {tokens} tokens in flight")
            if (self._requests_row[slot], self._tokens_row[slot]) != (requests, tokens):
                raise LedgerError(f"slot {slot}: the shared rows differ from the worker's own")
