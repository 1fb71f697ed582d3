"""How good a replica is for a request: lower is better, ``None`` abstains.

A scorer returns a cost in tokens, so that scorers add up without weights that cannot be explained:
a prefix hit is worth the tokens it saves, a queue costs the tokens in it. Abstaining is not the
best score: a replica on which a scorer abstains gets the mean of the others.
"""

from __future__ import annotations

from collections.abc import Callable

from router.ledger import Ledger
from router.view import ReplicaView, Request

Scorer = Callable[[ReplicaView, Request, Ledger], float | None]


def outstanding_tokens(view: ReplicaView, request: Request, ledger: Ledger) -> float:
    """Tokens in flight on the replica, over all workers: the work a new request waits behind."""
    slot = view.slot
    return ledger.tokens[slot] + ledger.other_tokens[slot]
