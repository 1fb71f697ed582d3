"""A published replica as one worker routes to it."""

from __future__ import annotations

from urllib.parse import urlsplit

from router.types import Replica, ReplicaState


def address_of(url: str) -> str:
    """``host:port`` of an engine's URL, an IPv6 address in brackets."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Endpoint:
    """A replica with the limits that apply to it and its slow-start window.

    The window is how many requests it may have in flight now, from all workers. It opens at
    ``initial_window`` when the replica becomes ready and grows by one with every answer that
    begins, whichever worker sees it (``Ledger.opened``), so it doubles per service time until
    ``max_inflight_requests``: a fresh replica is never handed everything that was held for it at
    once, and how fast it is decides how fast it is filled.

    ``failure_rate`` (0 to 1), ``ejections`` in a row and ``ejected_until_s`` are what
    ``router.failures`` keeps of its answers; a replica that becomes ready begins without.

    ``address`` is its ``host:port``. A limit that the replica does not say is the given one;
    ``max_inflight_tokens`` may be ``None`` (bounded by requests only) and ``max_model_len_tokens``
    is where the engine does not report it.
    """

    __slots__ = (
        "address",
        "ejected_until_s",
        "ejections",
        "failure_rate",
        "id",
        "initial_window",
        "max_inflight_requests",
        "max_inflight_tokens",
        "max_model_len_tokens",
        "replica",
        "slot",
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
        self.address = address_of(replica.url)
        self._begin()
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
    ) -> bool:
        """Take what was published of the replica since. Returns whether it begins anew, with the
        window that it opens at: one that was ready and still is goes on."""
        goes_on = self.replica.state is replica.state is ReplicaState.READY
        self.replica = replica
        self.initial_window = initial_window
        self.id: str = replica.id
        self.slot: int = replica.slot
        limit = replica.max_inflight_requests
        self.max_inflight_requests: int = max_inflight_requests if limit is None else limit
        budget = replica.max_inflight_tokens
        self.max_inflight_tokens: int | None = max_inflight_tokens if budget is None else budget
        self.max_model_len_tokens: int | None = replica.max_model_len_tokens
        if not goes_on:
            self._begin()
        return not goes_on

    def _begin(self) -> None:
        self.failure_rate: float = 0.0
        self.ejections = 0
        self.ejected_until_s: float = 0.0

    def window(self, opened: int) -> int:
        """How many requests it may have in flight, where its window has ``opened`` by so many."""
        return min(self.initial_window + opened, self.max_inflight_requests)

    def __repr__(self) -> str:
        return f"<{self.id} {self.replica.state} slot={self.slot}>"
