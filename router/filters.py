"""Which endpoints may take a request now. Each filter is one question about one endpoint.

That a replica is ready is not asked here: the data path offers only ready ones, and asks once for
each change of the fleet instead of once for each request.
"""

from __future__ import annotations

from router.endpoint import Endpoint
from router.ledger import Ledger
from router.request import RoutingRequest


def fits_context(endpoint: Endpoint, request: RoutingRequest) -> bool:
    """The prompt fits the replica's context. Where the context is unknown, the engine decides.

    The prompt's size is an estimate, so a replica is only ruled out when even half of the
    estimate would not fit: a wrong refusal is worse than an engine's own clear error.
    """
    limit = endpoint.max_model_len_tokens
    return limit is None or request.prompt_tokens <= 2 * limit


def has_room(endpoint: Endpoint, request: RoutingRequest, ledger: Ledger) -> bool:
    """The replica can take one more now: its window is open and its token budget allows it.

    An idle replica always has room, else a request larger than the budget would wait for ever.
    """
    slot = endpoint.slot
    inflight = ledger.requests[slot]
    if inflight == 0:
        return True
    if inflight >= endpoint.max_inflight_requests:
        return False
    if inflight >= endpoint.initial_window + ledger.opened[slot]:
        return False
    budget = endpoint.max_inflight_tokens
    return budget is None or ledger.tokens[slot] + request.tokens <= budget


def find_subset(ready: list[Endpoint], subset: frozenset[str]) -> list[Endpoint]:
    """Those of the endpoints that have one of these addresses."""
    return [endpoint for endpoint in ready if endpoint.address in subset]


def find_candidates(
    ready: list[Endpoint], request: RoutingRequest, ledger: Ledger
) -> list[Endpoint]:
    """The endpoints that pass every filter, in the order given."""
    if request.subset is not None:
        ready = find_subset(ready, request.subset)
    exclude = request.exclude
    some_excluded = len(exclude) > 0
    candidates: list[Endpoint] = []
    too_short = False
    for endpoint in ready:
        if not has_room(endpoint, request, ledger) or (some_excluded and endpoint.id in exclude):
            continue
        if not fits_context(endpoint, request):
            too_short = True
        candidates.append(endpoint)
    if too_short and any(fits_context(endpoint, request) for endpoint in ready):
        return [endpoint for endpoint in candidates if fits_context(endpoint, request)]
    # Where no replica of the pool is long enough, the engine's own error tells the client by how
    # much, and holding the request would only delay it.
    return candidates
