"""A published replica as one worker routes to it."""

from __future__ import annotations

from router.types import Replica, ReplicaState


class Endpoint:
    """A replica with the limits that apply to it and its slow-start window.

    ``window`` is how many requests it may have in flight now. It opens at ``initial_window`` when
    the replica becomes ready and grows by one with every first byte that comes back, so it doubles
    per service time until ``max_inflight_requests``: a fresh replica is never handed everything
    that was held for it at once, and how fast it is decides how fast it is filled.

    ``failure_rate`` (0 to 1), ``ejections`` in a row and ``ejected_until_s`` are what
    ``router.failures`` keeps of its answers; a replica that becomes ready begins without.

    A limit that the replica does not say is the given one; ``max_inflight_tokens`` may be ``None``
    (bounded by requests only) and ``max_model_len_tokens`` is where the engine does not report it.
    """

    __slots__ = (
        "ejected_until_s",
        "ejections",
        "failure_rate",
        "id",
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
        self.window = 0
        self.update(
            replica,
            initial_window=initial_window,
            max_inflight_requests=max_inflight_requests,
            max_inflight_tokens=max_inflight_tokens,
        )

    def update(
        self,
        replica: Replica,
        *,
        initial_window: int,
        max_inflight_requests: int,
        max_inflight_tokens: int | None,
    ) -> None:
        """Take what was published of the replica since. One that was ready and still is keeps its
        window; any other begins slowly."""
        was_ready = self.replica.state is ReplicaState.READY and self.window > 0
        self.replica = replica
        self.id: str = replica.id
        self.slot: int = replica.slot
        limit = replica.max_inflight_requests
        self.max_inflight_requests: int = max_inflight_requests if limit is None else limit
        budget = replica.max_inflight_tokens
        self.max_inflight_tokens: int | None = max_inflight_tokens if budget is None else budget
        self.max_model_len_tokens: int | None = replica.max_model_len_tokens
        if was_ready and replica.state is ReplicaState.READY:
            self.window = min(self.window, self.max_inflight_requests)
        else:
            self.window = min(initial_window, self.max_inflight_requests)
            self.failure_rate: float = 0.0
            self.ejections = 0
            self.ejected_until_s: float = 0.0

    def answered(self) -> None:
        """A first byte came back: the replica keeps up, open its window by one."""
        if self.window < self.max_inflight_requests:
            self.window += 1

    def failed(self, initial_window: int) -> None:
        """The replica failed a request: close its window to where it began."""
        self.window = min(initial_window, self.max_inflight_requests)

    def __repr__(self) -> str:
        return f"<{self.id} {self.replica.state} slot={self.slot} window={self.window}>"
