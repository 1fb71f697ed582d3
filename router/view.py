"""A replica and a request as one pick sees them."""

from __future__ import annotations

from typing import Protocol

from router.types import Replica


class Request(Protocol):
    """What the router needs to know of a request.

    ``prompt_tokens`` and ``tokens`` (prompt plus expected output) are estimates;
    ``exclude`` holds the ids of replicas that already failed it.
    """

    prompt_tokens: int
    tokens: int
    exclude: frozenset[str]


class ReplicaView:
    """A published replica with the limits that apply to it and its slow-start window.

    ``window`` is how many requests it may have in flight now. It opens at ``initial_window`` when
    the replica becomes ready and grows by one with every first byte that comes back, so it doubles
    per service time until ``max_inflight_requests``: a fresh replica is never handed everything
    that was held for it at once, and how fast it is decides how fast it is filled.
    """

    __slots__ = (
        "max_inflight_requests",
        "max_inflight_tokens",
        "max_model_len_tokens",
        "replica",
        "slot",
        "window",
    )

    def __init__(
        self,
        replica: Replica,
        *,
        initial_window: int,
        max_inflight_requests: int,
        max_inflight_tokens: int | None,
    ) -> None:
        self.replica = replica
        self.slot = replica.slot
        limit = replica.max_inflight_requests
        self.max_inflight_requests = max_inflight_requests if limit is None else limit
        budget = replica.max_inflight_tokens
        self.max_inflight_tokens = max_inflight_tokens if budget is None else budget
        self.max_model_len_tokens = replica.max_model_len_tokens
        self.window = min(initial_window, self.max_inflight_requests)

    def answered(self) -> None:
        """A first byte came back: the replica keeps up, open its window by one."""
        if self.window < self.max_inflight_requests:
            self.window += 1

    def failed(self, initial_window: int) -> None:
        """The replica failed a request: close its window to where it began."""
        self.window = min(initial_window, self.max_inflight_requests)

    def __repr__(self) -> str:
        return f"<{self.replica.id} {self.replica.state} slot={self.slot} window={self.window}>"
