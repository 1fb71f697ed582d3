"""What a request would cost at each endpoint: lower is better.

A scorer sees the request and all candidates at once and returns one cost for each. Costs are in
tokens of work, so that they add up without weights: a prefix hit is worth the tokens it saves, a
queue costs the tokens in it. ``None`` abstains: unknown is neither the best score nor the worst,
and ``pick`` gives such an endpoint the mean of the scorer's other costs.

A new scorer is a subclass of ``Scorer`` here. Which scorers the workers use is said in one place,
``DEFAULT_SCORERS`` of ``router.pick``; only tests and benches pass others. ``Scorer`` is an
abstract class and not a protocol, because compiled code calls its method directly.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from router.endpoint import Endpoint
from router.ledger import Ledger
from router.request import RoutingRequest


class Scorer(ABC):
    """See the module."""

    @abstractmethod
    def score(
        self, request: RoutingRequest, candidates: list[Endpoint], ledger: Ledger
    ) -> list[float | None]:
        """One cost in tokens for each candidate, in their order; ``None`` where it abstains.

        The list is a new one: the caller adds up in it."""


class OutstandingTokens(Scorer):
    """The work that the request would wait behind.

    cost = estimated tokens (prompt + expected output) in flight at the endpoint, over all workers
    """

    def score(
        self, request: RoutingRequest, candidates: list[Endpoint], ledger: Ledger
    ) -> list[float | None]:
        """Never abstains: the ledger knows every slot."""
        tokens = ledger.tokens
        return [float(tokens[endpoint.slot]) for endpoint in candidates]


class PrefillTokens(Scorer):
    """The part of the prompt that the endpoint would have to compute.

    cost = max(0, prompt_tokens - block_tokens * leading blocks of the prompt that it has cached)

    ``cached`` holds the hashes of the blocks known to be in each endpoint's KV cache, by slot, as
    the owner of the index keeps it; ``block_tokens`` is the engine's block size. Abstains for a
    request without block hashes and for an endpoint of which nothing is known (``None``).
    """

    def __init__(self, cached: list[set[bytes] | None], block_tokens: int) -> None:
        self.cached = cached
        self.block_tokens = block_tokens

    def score(
        self, request: RoutingRequest, candidates: list[Endpoint], ledger: Ledger
    ) -> list[float | None]:
        """Looks up blocks until the first that is missing: a later one cannot be used."""
        hashes = request.block_hashes
        if hashes is None:
            return [None] * len(candidates)
        cached, block_tokens, prompt_tokens = (
            self.cached,
            self.block_tokens,
            request.prompt_tokens,
        )
        costs: list[float | None] = []
        for endpoint in candidates:
            slot = endpoint.slot
            known = cached[slot] if slot < len(cached) else None
            if known is None:
                costs.append(None)
                continue
            left = prompt_tokens
            for block in hashes:
                if left <= 0 or block not in known:
                    break
                left -= block_tokens
            costs.append(float(left) if left > 0 else 0.0)
        return costs
