"""Which replicas may take a request at all. Each filter is one question about one replica.

Two kinds, for speed: *standing* filters depend only on the published fleet and are applied once
per fleet change; *request* filters depend on the request and the ledger and run for every pick.
"""

from __future__ import annotations

from router.ledger import Ledger
from router.types import ReplicaState
from router.view import ReplicaView, Request


def is_ready(view: ReplicaView) -> bool:
    """Standing: only ready replicas; starting, draining, sleeping and failed ones are not."""
    return view.replica.state is ReplicaState.READY


def fits_context(view: ReplicaView, request: Request) -> bool:
    """The prompt fits the replica's context. Unknown context: the engine will say, not we.

    The prompt's size is an estimate, so a replica is only ruled out when even half of the
    estimate would not fit: a wrong refusal is worse than an engine's own clear error.
    """
    limit = view.max_model_len_tokens
    return limit is None or request.prompt_tokens <= 2 * limit


def has_room(view: ReplicaView, request: Request, ledger: Ledger) -> bool:
    """The replica can take one more now: its window is open and its token budget allows it.

    An idle replica always has room, else a request larger than the budget would wait for ever.
    """
    slot = view.slot
    inflight = ledger.requests[slot] + ledger.other_requests[slot]
    if inflight == 0:
        return True
    if inflight >= view.window:
        return False
    budget = view.max_inflight_tokens
    return budget is None or (
        ledger.tokens[slot] + ledger.other_tokens[slot] + request.tokens <= budget
    )
