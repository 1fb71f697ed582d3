"""What is evicted: tables, and what holds whatever there is."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelcache.store.eviction import Choice, EvictionCandidate, choose, distance_s, worth

NOW_S = 1_000.0


def one(
    key: str,
    size_bytes: int = 10,
    *,
    used: float | None = 900.0,
    expected: float | None = None,
    cost: float | None = None,
    kept: str = "",
    spare: bool = False,
    parts: dict[str, int] | None = None,
) -> EvictionCandidate:
    return EvictionCandidate(
        key=key,
        parts={key: size_bytes} if parts is None else parts,
        kept_because=kept,
        spare=spare,
        used_at_s=used,
        expected_use_at_s=expected,
        reload_s_per_gb=cost,
    )


def order_of(*candidates: EvictionCandidate) -> str:
    """The whole order: each time one piece more is wanted than the last time."""
    order: list[str] = []
    while len(order) < len(candidates):
        left = [candidate for candidate in candidates if candidate.key not in order]
        order.extend(choose(left, 1, NOW_S).keys)
    return " ".join(order)


@pytest.mark.parametrize(
    ("name", "candidates", "order"),
    [
        ("LRU", (one("b", used=500), one("a", used=900), one("c", used=100)), "c b a"),
        ("never used is oldest", (one("a", used=1), one("b", used=None)), "b a"),
        (
            "used just now, or in a clock's future",
            (one("a", used=1_500), one("b", used=990)),
            "b a",
        ),
        ("ties go by name", (one("b"), one("a"), one("c")), "a b c"),
        (
            "what is expected last",
            (one("soon", expected=1_010), one("late", expected=5_000), one("mid", expected=1_200)),
            "late mid soon",
        ),
        (
            "expected beats used: as far ahead as the other is behind",
            (one("tonight", used=999, expected=9_000), one("lately", used=700)),
            "tonight lately",
        ),
        (
            "an expectation overdue fades",
            (one("a", used=1, expected=999), one("b", used=1, expected=600)),
            "b a",
        ),
        (
            "what is cheap to load again",
            (
                one("dear", used=500, cost=60),
                one("cheap", used=500, cost=2),
                one("unknown", used=500),
            ),
            "unknown cheap dear",
        ),
        (
            "dear but long unused against cheap and fresh",
            (one("dear", used=0, cost=5), one("fresh", used=990, cost=1)),
            "dear fresh",
        ),
        (
            "what nobody uses meanwhile, however dear and fresh",
            (one("old", used=1), one("spare", used=999, cost=900, spare=True)),
            "spare old",
        ),
        (
            "spare ones among each other like all",
            (one("b", used=500, spare=True), one("a", used=900, spare=True)),
            "b a",
        ),
        (
            "dear enough outlives fresh",
            (one("dear", used=0, cost=500), one("fresh", used=990, cost=1)),
            "fresh dear",
        ),
    ],
)
def test_what_is_worth_least_goes_first(
    name: str, candidates: tuple[EvictionCandidate, ...], order: str
) -> None:
    assert order_of(*candidates) == order, name


def test_the_next_use_is_as_far_ahead_as_is_known() -> None:
    assert distance_s(one("a", expected=1_060, used=5), NOW_S) == 60
    assert distance_s(one("a", expected=940, used=5), NOW_S) == 60
    assert distance_s(one("a", used=400), NOW_S) == 600
    assert distance_s(one("a", used=None), NOW_S) == NOW_S
    # Never so near that its worth has no bound.
    assert distance_s(one("a", expected=NOW_S), NOW_S) == 1
    assert distance_s(one("a", used=None), 0.0) == 1
    assert worth(one("a", used=900, cost=50), NOW_S) == 0.5
    assert worth(one("a", used=900), NOW_S) == 0.01


TWINS = (
    one("a", used=100, parts={"own-a": 1, "shared": 10}),
    one("b", used=200, parts={"own-b": 2, "shared": 10}),
    one("c", used=300, parts={"own-c": 4}),
)


@pytest.mark.parametrize(
    ("name", "candidates", "needed", "choice"),
    [
        ("nothing", TWINS, 0, Choice(keys=(), bytes_freed=0, enough=True)),
        ("less than nothing", TWINS, -5, Choice(keys=(), bytes_freed=0, enough=True)),
        ("there is nothing", (), 1, Choice(keys=(), bytes_freed=0, enough=False)),
        ("its own", TWINS, 1, Choice(keys=("a",), bytes_freed=1, enough=True)),
        (
            "shared goes with the last",
            TWINS,
            3,
            Choice(keys=("a", "b"), bytes_freed=13, enough=True),
        ),
        ("everything", TWINS, 17, Choice(keys=("a", "b", "c"), bytes_freed=17, enough=True)),
        ("too much", TWINS, 18, Choice(keys=(), bytes_freed=17, enough=False)),
        (
            "none in vain: what the big one made superfluous stays",
            (one("small", 1, used=100), one("big", 50, used=200), one("new", 50, used=300)),
            40,
            Choice(keys=("big",), bytes_freed=50, enough=True),
        ),
        (
            "leased and pinned stay, and what they share with others too",
            (
                one("a", used=100, parts={"own": 1, "shared": 10}),
                one("b", used=0, parts={"shared": 10, "own-b": 99}, kept="leased by engine"),
                one("c", 7, used=500),
            ),
            5,
            Choice(keys=("c",), bytes_freed=7, enough=True, kept={"b": "leased by engine"}),
        ),
        (
            "all that may go would not do",
            (one("a", 5), one("b", 50, kept="pinned")),
            6,
            Choice(keys=(), bytes_freed=5, enough=False, kept={"b": "pinned"}),
        ),
        (
            "what frees nothing does not go",
            (one("adopted", used=0, parts={"x": 0}), one("own", 9, used=900)),
            9,
            Choice(keys=("own",), bytes_freed=9, enough=True),
        ),
    ],
)
def test_as_much_goes_as_is_needed(
    name: str, candidates: tuple[EvictionCandidate, ...], needed: int, choice: Choice
) -> None:
    assert choose(candidates, needed, NOW_S) == choice, name


def freed(candidates: list[EvictionCandidate], going: set[str]) -> int:
    """What goes with these: the parts that nobody who stays has."""
    stays = {part for one in candidates if one.key not in going for part in one.parts}
    parts = {part: size for one in candidates for part, size in one.parts.items()}
    return sum(size for part, size in parts.items() if part not in stays)


times = st.none() | st.floats(0, 2_000)
SIZES = {"p": 1, "q": 10, "r": 100, "s": 0, "t": 1_000}


@st.composite
def some(draw: st.DrawFn) -> list[EvictionCandidate]:
    keys = draw(st.lists(st.sampled_from("abcdefg"), unique=True))
    return [
        EvictionCandidate(
            key=key,
            parts={part: SIZES[part] for part in draw(st.sets(st.sampled_from(sorted(SIZES))))},
            kept_because=draw(st.sampled_from(["", "", "pinned"])),
            used_at_s=draw(times),
            expected_use_at_s=draw(times),
            reload_s_per_gb=draw(st.none() | st.floats(0, 100)),
        )
        for key in keys
    ]


@given(some(), st.integers(0, 1_300), st.floats(0, 2_000))
@settings(max_examples=120, deadline=None)
def test_it_is_enough_none_goes_in_vain_and_what_is_kept_stays(
    candidates: list[EvictionCandidate], needed: int, now_s: float
) -> None:
    choice = choose(candidates, needed, now_s)
    may_go = {one.key for one in candidates if not one.kept_because}
    going = set(choice.keys)
    assert going <= may_go
    assert len(going) == len(choice.keys)
    assert choice.kept == {one.key: one.kept_because for one in candidates if one.kept_because}
    assert choice.enough == (freed(candidates, may_go) >= needed or needed <= 0)
    if choice.enough:
        # What no candidate has is freed by none.
        assert choice.bytes_freed == (freed(candidates, going) if going else 0)
        assert choice.bytes_freed >= needed
        for fewer in combinations(sorted(going), max(len(going) - 1, 0)):
            assert not going or freed(candidates, set(fewer)) < needed
    else:
        assert not going
        assert choice.bytes_freed == freed(candidates, may_go)
    assert choose(candidates[::-1], needed, now_s) == choice, "the order given is chance"
