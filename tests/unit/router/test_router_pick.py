"""filter → score → pick, as tables; and properties of any pick."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.endpoint import Endpoint
from router.filters import find_candidates, fits_context, has_room
from router.ledger import Ledger
from router.pick import DEFAULT_SCORERS, add_costs, pick
from router.request import RoutingRequest
from router.scorers import OutstandingTokens, PrefillTokens, Scorer
from router.types import Replica, ReplicaState


def ask(prompt: int = 10, tokens: int = 100, *exclude: str, **known: object) -> RoutingRequest:
    request = RoutingRequest(prompt, tokens, **known)  # type: ignore[arg-type]
    request.exclude = frozenset(exclude)
    return request


def endpoint(
    slot: int,
    *,
    state: ReplicaState = ReplicaState.READY,
    window: int = 100,
    most: int = 100,
    budget: int | None = None,
    context: int | None = None,
) -> Endpoint:
    replica = Replica(
        id=f"r{slot}",
        pool="m",
        slot=slot,
        url="http://x",
        state=state,
        max_model_len_tokens=context,
        max_inflight_requests=most,
        max_inflight_tokens=budget,
    )
    return Endpoint(
        replica, initial_window=window, max_inflight_requests=256, max_inflight_tokens=None
    )


def ledger(*rows: tuple[int, int], others: list[tuple[int, int]] | None = None) -> Ledger:
    """A ledger with (requests, tokens) per slot, and what other workers have there."""
    read = None
    if others is not None:
        read = lambda: ([r for r, _ in others], [t for _, t in others], [0] * len(others))  # noqa: E731
    return Ledger([r for r, _ in rows], [t for _, t in rows], [0] * len(rows), read)


class Given(Scorer):
    """Costs as a test gives them, by slot."""

    def __init__(self, **costs: float | None) -> None:
        self.costs = costs

    def score(
        self, request: RoutingRequest, candidates: list[Endpoint], ledger: Ledger
    ) -> list[float | None]:
        return [self.costs.get(one.id) for one in candidates]


# Filters


@pytest.mark.parametrize(
    ("context", "prompt", "fits"),
    [
        (None, 10**9, True),  # unknown is not zero: the engine will say
        (1000, 1000, True),
        (1000, 2000, True),  # an estimate may be twice too large
        (1000, 2001, False),
    ],
)
def test_context(context: int | None, prompt: int, fits: bool) -> None:
    assert fits_context(endpoint(0, context=context), ask(prompt)) is fits


@pytest.mark.parametrize(
    ("mine", "theirs", "window", "budget", "tokens", "room"),
    [
        ((0, 0), (0, 0), 8, None, 100, True),
        ((7, 0), (0, 0), 8, None, 100, True),
        ((8, 0), (0, 0), 8, None, 100, False),
        ((4, 0), (4, 0), 8, None, 100, False),  # other workers fill the window too
        ((1, 900), (0, 0), 8, 1000, 100, True),
        ((1, 901), (0, 0), 8, 1000, 100, False),
        ((1, 500), (1, 401), 8, 1000, 100, False),
        ((0, 0), (0, 0), 8, 1000, 5000, True),  # an idle replica takes even what is too large
        ((0, 0), (1, 10), 8, 1000, 5000, False),
    ],
)
def test_room(
    mine: tuple[int, int],
    theirs: tuple[int, int],
    window: int,
    budget: int | None,
    tokens: int,
    room: bool,
) -> None:
    counts = ledger(mine, others=[theirs])
    assert has_room(endpoint(0, window=window, budget=budget), ask(10, tokens), counts) is room


def test_excluded_and_full_replicas_are_not_picked() -> None:
    ready = [endpoint(0), endpoint(1, window=1), endpoint(2)]
    counts = ledger((0, 0), (1, 0), (5, 5000))
    assert pick(ready, ask(10, 100, "r0"), counts, random.random) is ready[2]
    assert pick(ready, ask(10, 100, "r0", "r2"), counts, random.random) is None
    assert pick([], ask(), counts, random.random) is None


def test_a_long_prompt_goes_to_a_replica_it_fits_even_a_busier_one() -> None:
    short, long = endpoint(0, context=100), endpoint(1, context=10_000)
    counts = ledger((0, 0), (3, 3000))
    assert pick([short, long], ask(5000), counts, random.random) is long


def test_a_long_prompt_waits_for_the_replica_it_fits() -> None:
    short, long = endpoint(0, context=100), endpoint(1, context=10_000, window=1)
    counts = ledger((0, 0), (1, 3000))
    assert pick([short, long], ask(5000), counts, random.random) is None


def test_a_prompt_that_fits_nowhere_goes_to_an_engine_that_will_say_so() -> None:
    ready = [endpoint(0, context=100), endpoint(1, context=200)]
    counts = ledger((1, 100), (1, 50))
    assert find_candidates(ready, ask(5000), counts) == ready
    assert pick(ready, ask(5000), counts, random.random) is ready[1]


# The endpoint


@pytest.mark.parametrize(
    ("initial", "opened", "most", "window"),
    [(8, 0, 256, 8), (8, 5, 256, 13), (8, 500, 256, 256), (50, 0, 5, 5), (1, 0, 1, 1)],
)
def test_the_window_opens_with_answers_up_to_the_limit(
    initial: int, opened: int, most: int, window: int
) -> None:
    one = endpoint(0, window=initial, most=most)
    assert one.window(opened) == window
    counts = Ledger([window], [0], [opened])
    assert not has_room(one, ask(), counts)
    counts = Ledger([window - 1], [0], [opened])
    assert has_room(one, ask(), counts)


def test_what_other_workers_saw_opens_the_window_too() -> None:
    """The window is compared with the requests of all workers, so it is of all workers."""
    one = endpoint(0, window=2, most=100)
    counts = Ledger([1], [0], [0], lambda: ([20], [0], [30]))
    assert has_room(one, ask(), counts)
    counts = Ledger([1], [0], [0], lambda: ([20], [0], [19]))
    assert not has_room(one, ask(), counts)


def test_limits_unknown_to_the_replica_come_from_the_settings() -> None:
    replica = Replica(id="r", pool="m", slot=0, url="", state=ReplicaState.READY)
    seen = Endpoint(replica, initial_window=8, max_inflight_requests=7, max_inflight_tokens=9)
    assert (seen.max_inflight_requests, seen.max_inflight_tokens, seen.window(0)) == (7, 9, 7)


# Scorers


A, B, C = b"a", b"b", b"c"


@pytest.mark.parametrize(
    ("cached", "hashes", "costs"),
    [
        ([{A, B, C}, {A}, set()], (A, B, C), [52.0, 84.0, 100.0]),
        ([{B, C}, {A, C}, {b"x"}], (A, B, C), [100.0, 84.0, 100.0]),  # leading blocks only
        ([{A}, None], (A, B), [84.0, None, None]),  # nothing is known of slots 1 and 2
        ([{A}], None, [None, None, None]),
        ([{A}, set(), set()], (A,) * 9, [0.0, 100.0, 100.0]),  # never below 0
    ],
)
def test_prefill_tokens(
    cached: list[set[bytes] | None],
    hashes: tuple[bytes, ...] | None,
    costs: list[float | None],
) -> None:
    ready = [endpoint(0), endpoint(1), endpoint(2)]
    request = ask(100, 200, block_hashes=hashes)
    scorer = PrefillTokens(cached, block_tokens=16)
    assert scorer.score(request, ready, ledger((0, 0), (0, 0), (0, 0))) == costs


def test_least_outstanding_tokens_of_all_workers_wins() -> None:
    ready = [endpoint(0), endpoint(1), endpoint(2)]
    counts = ledger((1, 500), (9, 100), (1, 300))
    assert OutstandingTokens().score(ask(), ready, counts) == [500.0, 100.0, 300.0]
    assert pick(ready, ask(), counts, random.random) is ready[1]
    shared = ledger((1, 100), (1, 200), (1, 300), others=[(1, 500), (0, 0), (1, 0)])
    assert pick(ready, ask(), shared, random.random) is ready[1]


def test_a_prefix_hit_is_worth_the_tokens_it_saves() -> None:
    ready = [endpoint(0), endpoint(1)]
    scorers = (OutstandingTokens(), PrefillTokens([{A, B}, set()], block_tokens=16))
    request = ask(64, 128, block_hashes=(A, B, C))
    assert pick(ready, request, ledger((1, 30), (0, 0)), random.random, scorers) is ready[0]
    assert pick(ready, request, ledger((1, 33), (0, 0)), random.random, scorers) is ready[1]


def test_an_abstention_counts_as_the_mean_of_the_others() -> None:
    ready = [endpoint(0), endpoint(1), endpoint(2)]
    counts = ledger((1, 10), (1, 20), (1, 30))
    partial = Given(r0=None, r1=100.0, r2=300.0)
    assert add_costs(ask(), ready, counts, (partial,)) == [200.0, 100.0, 300.0]
    for both in ((partial, OutstandingTokens()), (OutstandingTokens(), partial)):
        assert add_costs(ask(), ready, counts, both) == [210.0, 120.0, 330.0]
    # One that abstains is not the best: no data is no merit.
    assert pick(ready, ask(), counts, random.random, (partial,)) is ready[1]


def test_a_scorer_that_abstains_on_all_decides_nothing() -> None:
    ready = [endpoint(0), endpoint(1)]
    counts = ledger((1, 10), (1, 20))
    assert add_costs(ask(), ready, counts, (Given(), OutstandingTokens())) == [10.0, 20.0]
    assert add_costs(ask(), ready, counts, (Given(),)) == [0.0, 0.0]


# The pick


def test_ties_are_broken_by_two_choices() -> None:
    """Of equals, two are drawn; of those the one with fewer requests wins."""
    ready = [endpoint(slot) for slot in range(4)]
    counts = ledger((3, 50), (1, 50), (2, 50), (9, 50))
    picks: Counter[int] = Counter()
    chance = random.Random(7)
    for _ in range(4000):
        picked = pick(ready, ask(), counts, chance.random)
        assert picked is not None
        picks[picked.slot] += 1
    assert picks[3] == 0  # the most loaded loses every draw of two
    assert picks[1] > picks[2] > picks[0] > 400
    assert picks[1] == pytest.approx(2000, rel=0.15)  # it is in half of all pairs


def test_two_different_replicas_are_drawn() -> None:
    ready = [endpoint(0), endpoint(1)]
    counts = ledger((1, 50), (0, 50))
    for step in range(100):
        assert pick(ready, ask(), counts, lambda value=step / 100: value) is ready[1]


ROWS = st.lists(
    st.tuples(
        st.integers(0, 6),  # requests
        st.integers(0, 4),  # tokens, few values for many ties
        st.integers(0, 3),  # the others' requests
        st.integers(0, 2),
        st.integers(1, 8),  # window
        st.sampled_from([None, 3, 6]),
        st.sampled_from([None, 100, 1000]),
        st.sampled_from([None, 0.0, 1.0, 2.0]),  # what a second scorer says
        st.sampled_from([False, False, False, True]),  # excluded; few, so that some are left
    ),
    max_size=6,
)


@settings(max_examples=300)
@given(ROWS, st.integers(1, 4), st.sampled_from([10, 150, 1500, 5000]), st.booleans(), st.data())
def test_the_pick_is_a_cheapest_candidate_and_the_same_for_the_same_chance(
    rows: list[tuple[int, int, int, int, int, int | None, int | None, float | None, bool]],
    tokens: int,
    prompt: int,
    shared: bool,
    data: st.DataObject,
) -> None:
    ready = [
        endpoint(slot, window=row[4], budget=row[5], context=row[6])
        for slot, row in enumerate(rows)
    ]
    others = [(row[2], row[3]) for row in rows] if shared else None
    counts = ledger(*((row[0], row[1]) for row in rows), others=others)
    excluded = [one.id for one, row in zip(ready, rows, strict=True) if row[8]]
    request = ask(prompt, tokens, *excluded)
    second = Given(**{one.id: row[7] for one, row in zip(ready, rows, strict=True)})
    scorers = data.draw(st.sampled_from([DEFAULT_SCORERS, (*DEFAULT_SCORERS, second)]))
    seed = data.draw(st.integers(0, 99))
    picked = pick(ready, request, counts, random.Random(seed).random, scorers)
    assert picked is pick(ready, request, counts, random.Random(seed).random, scorers)
    # The same, said at length.
    roomy = [one for one in ready if has_room(one, request, counts) and one.id not in excluded]
    if any(fits_context(one, request) for one in ready):
        roomy = [one for one in roomy if fits_context(one, request)]
    if not roomy:
        assert picked is None
        return
    costs = {one.id: float(counts.tokens[one.slot]) for one in roomy}
    known = [cost for one in roomy if (cost := second.costs[one.id]) is not None]
    if len(scorers) == 2 and known:
        mean = sum(known) / len(known)
        for one in roomy:
            cost = second.costs[one.id]
            costs[one.id] += mean if cost is None else cost
    assert picked is not None
    assert costs[picked.id] == min(costs.values())
