"""filter → score → pick: the one decision the router makes.

One path for every set of scorers, the default one included. With one scorer and four replicas a
compiled pick takes about a microsecond; ``python -m bench pick`` measures it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

from router.endpoint import Endpoint
from router.filters import find_candidates
from router.ledger import Ledger
from router.request import RoutingRequest
from router.scorers import OutstandingTokens, Scorer

DEFAULT_SCORERS: Final[tuple[Scorer, ...]] = (OutstandingTokens(),)
"""The scorers of every worker. ``PrefillTokens`` is not among them: no index of the engines' prefix
caches is kept."""


def add_costs(
    request: RoutingRequest,
    candidates: list[Endpoint],
    ledger: Ledger,
    scorers: tuple[Scorer, ...],
) -> list[float]:
    """The sum of the scorers' costs for each candidate.

    An abstention counts as the mean of that scorer's other costs; a scorer that abstains on every
    candidate decides nothing.
    """
    totals: list[float] = []
    for scorer in scorers:
        costs = scorer.score(request, candidates, ledger)
        known = 0
        total = 0.0
        for cost in costs:
            if cost is not None:
                known += 1
                total += cost
        if known == 0:
            continue
        mean = total / known
        if totals:
            for index, cost in enumerate(costs):
                totals[index] += mean if cost is None else cost
        elif known == len(costs):
            totals = cast(list[float], costs)
        else:
            totals = [mean if cost is None else cost for cost in costs]
    return totals or [0.0] * len(candidates)


def pick(
    ready: list[Endpoint],
    request: RoutingRequest,
    ledger: Ledger,
    random: Callable[[], float],
    scorers: tuple[Scorer, ...] = DEFAULT_SCORERS,
) -> Endpoint | None:
    """The endpoint that should take the request, or ``None`` when none can now.

    Least cost wins. Among equals, two are drawn and the one with fewer requests in flight is
    taken (power of two choices, Mitzenmacher 2001), so that workers whose pictures are a moment
    old do not all run to the same replica. ``random()`` gives a number in [0, 1); the same numbers
    give the same pick.
    """
    candidates = find_candidates(ready, request, ledger)
    if len(candidates) < 2:
        return candidates[0] if candidates else None
    costs = add_costs(request, candidates, ledger, scorers)
    least = costs[0]
    best: list[Endpoint] = []
    for index, cost in enumerate(costs):
        if cost < least:
            least = cost
            best = [candidates[index]]
        elif cost == least:
            best.append(candidates[index])
    count = len(best)
    if count == 1:
        return best[0]
    first = int(random() * count)
    second = int(random() * (count - 1))
    one, two = best[first], best[second if second < first else second + 1]
    if ledger.requests[two.slot] < ledger.requests[one.slot]:
        return two
    return one
