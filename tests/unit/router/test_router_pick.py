"""filter → score → pick, as tables; and the fast path held to the general one."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.filters import fits_context, has_room, is_ready
from router.ledger import Ledger
from router.pick import DEFAULT_SCORERS, candidates, costs, least_loaded, pick
from router.scorers import outstanding_tokens
from router.types import Replica, ReplicaState
from router.view import ReplicaView


@dataclasses.dataclass
class Ask:
    prompt_tokens: int = 10
    tokens: int = 100
    exclude: frozenset[str] = frozenset()


def view(
    slot: int,
    *,
    state: ReplicaState = ReplicaState.READY,
    window: int = 100,
    most: int = 100,
    budget: int | None = None,
    context: int | None = None,
) -> ReplicaView:
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
    return ReplicaView(
        replica, initial_window=window, max_inflight_requests=256, max_inflight_tokens=None
    )


def ledger(*rows: tuple[int, int], others: list[tuple[int, int]] | None = None) -> Ledger:
    """A ledger with (requests, tokens) per slot, and what other workers have there."""
    read = None
    if others is not None:
        read = lambda: ([r for r, _ in others], [t for _, t in others])  # noqa: E731
    return Ledger([r for r, _ in rows], [t for _, t in rows], read)


@pytest.mark.parametrize("state", ReplicaState)
def test_only_ready_replicas_pass(state: ReplicaState) -> None:
    assert is_ready(view(0, state=state)) is (state is ReplicaState.READY)


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
    assert fits_context(view(0, context=context), Ask(prompt_tokens=prompt)) is fits


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
    books = ledger(mine, others=[theirs])
    assert has_room(view(0, window=window, budget=budget), Ask(tokens=tokens), books) is room


def test_the_window_starts_slowly_opens_with_answers_and_closes_with_a_failure() -> None:
    fresh = view(0, window=2, most=5)
    seen = [fresh.window]
    for _ in range(10):
        if fresh.window < fresh.max_inflight_requests:
            fresh.answered()
        seen.append(fresh.window)
    assert seen[:5] == [2, 3, 4, 5, 5]
    assert max(seen) == 5
    fresh.failed(2)
    assert fresh.window == 2
    assert view(0, window=50, most=5).window == 5  # never more than it may have at all


def test_limits_unknown_to_the_replica_come_from_the_settings() -> None:
    replica = Replica(id="r", pool="m", slot=0, url="", state=ReplicaState.READY)
    seen = ReplicaView(replica, initial_window=8, max_inflight_requests=7, max_inflight_tokens=9)
    assert (seen.max_inflight_requests, seen.max_inflight_tokens, seen.window) == (7, 9, 7)


def test_least_outstanding_tokens_wins() -> None:
    views = [view(0), view(1), view(2)]
    books = ledger((1, 500), (9, 100), (1, 300))
    assert outstanding_tokens(views[1], Ask(), books) == 100
    assert pick(views, Ask(), books, random.random) is views[1]


def test_the_other_workers_tokens_count() -> None:
    views = [view(0), view(1)]
    books = ledger((1, 100), (1, 200), others=[(1, 500), (0, 0)])
    assert pick(views, Ask(), books, random.random) is views[1]


def test_excluded_and_full_replicas_are_not_picked() -> None:
    views = [view(0), view(1, window=1), view(2)]
    books = ledger((0, 0), (1, 0), (5, 5000))
    assert pick(views, Ask(exclude=frozenset({"r0"})), books, random.random) is views[2]
    assert pick(views, Ask(exclude=frozenset({"r0", "r2"})), books, random.random) is None
    assert pick([], Ask(), books, random.random) is None


def test_a_long_prompt_goes_to_a_replica_it_fits_even_a_busier_one() -> None:
    short, long = view(0, context=100), view(1, context=10_000)
    books = ledger((0, 0), (3, 3000))
    assert pick([short, long], Ask(prompt_tokens=5000), books, random.random) is long


def test_a_long_prompt_waits_for_the_replica_it_fits() -> None:
    short, long = view(0, context=100), view(1, context=10_000, window=1)
    books = ledger((0, 0), (1, 3000))
    assert pick([short, long], Ask(prompt_tokens=5000), books, random.random) is None


def test_a_prompt_that_fits_nowhere_goes_to_an_engine_that_will_say_so() -> None:
    views = [view(0, context=100), view(1, context=200)]
    books = ledger((1, 100), (1, 50))
    assert candidates(views, Ask(prompt_tokens=5000), books) == views
    assert pick(views, Ask(prompt_tokens=5000), books, random.random) is views[1]


def test_an_abstention_counts_as_the_mean_of_the_others() -> None:
    views = [view(0), view(1), view(2)]
    books = ledger((1, 10), (1, 20), (1, 30))

    def half_blind(seen: ReplicaView, request: object, books: Ledger) -> float | None:
        return {0: None, 1: 100.0, 2: 300.0}[seen.slot]

    assert costs(views, Ask(), books, [half_blind]) == [200.0, 100.0, 300.0]
    both = costs(views, Ask(), books, [half_blind, outstanding_tokens])
    assert both == [210.0, 120.0, 330.0]
    # One that abstains is not the best: no data is no merit.
    assert pick(views, Ask(), books, random.random, [half_blind]) is views[1]


def test_scorers_that_all_abstain_decide_nothing() -> None:
    views = [view(0), view(1)]
    books = ledger((1, 10), (1, 20))
    nothing = [lambda *_: None, outstanding_tokens]
    assert costs(views, Ask(), books, nothing) == [10.0, 20.0]
    assert costs(views, Ask(), books, nothing[:1]) == [0.0, 0.0]


def test_ties_are_broken_by_two_choices() -> None:
    """Of equals, two are drawn; of those the one with fewer requests wins."""
    views = [view(slot) for slot in range(4)]
    books = ledger((3, 50), (1, 50), (2, 50), (9, 50))
    counts: Counter[int] = Counter()
    chance = random.Random(7)
    for _ in range(4000):
        picked = pick(views, Ask(), books, chance.random)
        assert picked is not None
        counts[picked.slot] += 1
    assert counts[3] == 0  # the most loaded loses every draw of two
    assert counts[1] > counts[2] > counts[0] > 400
    assert counts[1] == pytest.approx(2000, rel=0.15)  # it is in half of all pairs


def test_two_different_replicas_are_drawn() -> None:
    views = [view(0), view(1)]
    books = ledger((1, 50), (0, 50))
    for step in range(100):
        assert pick(views, Ask(), books, lambda value=step / 100: value) is views[1]


@given(
    st.lists(
        st.tuples(
            st.integers(0, 6),  # requests
            st.integers(0, 4),  # tokens, few values for many ties
            st.integers(0, 3),  # the others' requests
            st.integers(0, 2),
            st.integers(1, 8),  # window
            st.sampled_from([None, 3, 6]),
            st.sampled_from([None, 100, 1000]),
        ),
        max_size=6,
    ),
    st.integers(1, 4),
    st.sampled_from([10, 150, 1500, 5000]),
    st.booleans(),
)
def test_the_fast_path_gives_what_the_general_one_gives(
    rows: list[tuple[int, int, int, int, int, int | None, int | None]],
    tokens: int,
    prompt: int,
    shared: bool,
) -> None:
    views = [
        view(slot, window=row[4], budget=row[5], context=row[6]) for slot, row in enumerate(rows)
    ]
    others = [(row[2], row[3]) for row in rows] if shared else None
    books = ledger(*((row[0], row[1]) for row in rows), others=others)
    ask = Ask(prompt_tokens=prompt, tokens=tokens)
    fast = least_loaded(views, ask, books)
    allowed = candidates(views, ask, books)
    cost = costs(allowed, ask, books, DEFAULT_SCORERS)
    best = [seen for seen, value in zip(allowed, cost, strict=True) if value == min(cost)]
    if fast is not None:
        assert fast == best
    picked = pick(views, ask, books, random.Random(1).random)
    assert picked in best or (picked is None and not best)
