"""The ladder: which tier after how long, and what counts as time that nobody was there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.tier_policy import Descent, LadderPolicy, Rung, choose_rung, descend
from modelcache.types import TIERS, Tier

ALL = frozenset(TIERS) - {Tier.RUNNING}
EVERY = LadderPolicy(sleeping_s=10, forked_s=20, paged_s=30, on_disk_s=40)
DEFAULTS = LadderPolicy()
BEGIN = Descent()
LOCAL = ALL - {Tier.REMOTE, Tier.SLEEPING}

STEPS = [
    ("begins on the hottest step", EVERY, ALL, 0, Tier.SLEEPING, 10),
    ("stays for its time", EVERY, ALL, 9, Tier.SLEEPING, 1),
    ("then goes one down", EVERY, ALL, 10, Tier.FORKED, 20),
    ("and another", EVERY, ALL, 45, Tier.PAGED, 15),
    ("and another", EVERY, ALL, 60, Tier.ON_DISK, 40),
    ("to the floor, for ever", EVERY, ALL, 150, Tier.REMOTE, None),
    ("a step that is not there takes no time", EVERY, ALL - {Tier.FORKED}, 10, Tier.PAGED, 30),
    ("nor does one of 0 s", LadderPolicy(sleeping_s=5, forked_s=0), ALL, 5, Tier.PAGED, None),
    ("for ever is for ever", DEFAULTS, ALL, 500, Tier.FORKED, None),
    ("without a fork server pages stay", DEFAULTS, LOCAL - {Tier.FORKED}, 500, Tier.PAGED, None),
    ("a directory does not leave", EVERY, frozenset({Tier.ON_DISK}), 500, Tier.ON_DISK, None),
    ("the coldest there is has no end", EVERY, LOCAL, 500, Tier.ON_DISK, None),
    ("what is not here is remote", DEFAULTS, frozenset({Tier.REMOTE}), 0, Tier.REMOTE, None),
    ("no tier at all is as cold as can be", DEFAULTS, frozenset(), 0, Tier.REMOTE, None),
    ("running is not a step", DEFAULTS, frozenset({Tier.RUNNING}), 0, Tier.REMOTE, None),
    ("sleep is nobody's default", DEFAULTS, ALL, 0, Tier.FORKED, None),
]


def idle_for(
    policy: LadderPolicy, tiers: frozenset[Tier], seconds: float, since: Descent = BEGIN
) -> tuple[Rung, Descent]:
    """A look every second."""
    began_s = since.seen_at_s or 0.0
    rung, descent = descend(policy, tiers, since, True, began_s)
    for second in range(1, round(seconds) + 1):
        rung, descent = descend(policy, tiers, descent, True, began_s + second)
    assert rung is not None
    return rung, descent


@pytest.mark.parametrize(("name", "policy", "tiers", "idle_s", "tier", "left_s"), STEPS)
def test_steps(
    name: str,
    policy: LadderPolicy,
    tiers: frozenset[Tier],
    idle_s: float,
    tier: Tier,
    left_s: float | None,
) -> None:
    rung, _ = idle_for(policy, tiers, idle_s)
    assert rung == Rung(tier=tier, left_s=None if left_s is None else pytest.approx(left_s)), name


def test_a_step_that_goes_away_does_not_shorten_the_next_ones() -> None:
    rung, descent = idle_for(EVERY, ALL, 10)
    assert rung.tier is Tier.FORKED
    # The engine that slept is gone now, so the pool cannot sleep any more.
    rung, descent = idle_for(EVERY, ALL - {Tier.SLEEPING}, 19, descent)
    assert rung == Rung(tier=Tier.FORKED, left_s=pytest.approx(1))
    rung, _ = idle_for(EVERY, ALL - {Tier.SLEEPING}, 1, descent)
    assert rung.tier is Tier.PAGED


def test_a_step_that_comes_back_is_taken_for_the_time_it_has_left() -> None:
    broken = ALL - {Tier.SLEEPING, Tier.FORKED}
    _, descent = idle_for(EVERY, ALL - {Tier.SLEEPING}, 5)
    rung, descent = idle_for(EVERY, broken, 10, descent)
    assert rung.tier is Tier.PAGED
    rung, _ = idle_for(EVERY, ALL - {Tier.SLEEPING}, 0, descent)
    assert rung == Rung(tier=Tier.FORKED, left_s=pytest.approx(15, abs=1))


def test_somebody_puts_it_back_on_top() -> None:
    _, descent = idle_for(EVERY, ALL, 50)
    rung, descent = descend(EVERY, ALL, descent, False, 51.0)
    assert (rung, descent) == (None, Descent())
    assert idle_for(EVERY, ALL, 0, descent)[0].tier is Tier.SLEEPING


def is_colder(one: Tier, other: Tier) -> bool:
    return TIERS.index(one) > TIERS.index(other)


SECONDS = st.none() | st.just(0.0) | st.floats(0.0, 100.0)
POLICIES = st.builds(
    LadderPolicy, sleeping_s=SECONDS, forked_s=SECONDS, paged_s=SECONDS, on_disk_s=SECONDS
)
TIER_SETS = st.frozensets(st.sampled_from(TIERS[1:]), min_size=1)


@given(POLICIES, TIER_SETS, st.lists(st.floats(0, 80), max_size=20))
def test_time_only_cools_and_no_step_ends_before_its_time(
    policy: LadderPolicy, tiers: frozenset[Tier], gaps: list[float]
) -> None:
    now_s = 0.0
    rung, descent = descend(policy, tiers, Descent(), True, now_s)
    entered: dict[Tier, float] = {}
    for gap_s in [*gaps, 1e-3]:
        assert rung is not None
        entered.setdefault(rung.tier, now_s)
        before = rung
        now_s += gap_s
        rung, descent = descend(policy, tiers, descent, True, now_s)
        assert rung is not None
        assert rung.tier in tiers
        assert not is_colder(before.tier, rung.tier)
        if is_colder(rung.tier, before.tier):
            stays_s = policy.stays_s(before.tier)
            assert stays_s is not None
            assert now_s - entered[before.tier] >= stays_s - 1e-6


LOOKS = st.lists(st.tuples(st.floats(0.0, 50.0), st.sampled_from([True, False, None])), max_size=30)


@given(LOOKS)
def test_only_time_between_two_looks_that_found_nobody_counts(
    looks: list[tuple[float, bool | None]],
) -> None:
    descent, now_s, expected_s, before = Descent(), 0.0, 0.0, None
    for gap_s, idle in looks:
        now_s += gap_s
        if idle is False:
            expected_s = 0.0
        elif idle and before:
            expected_s += gap_s
        rung, descent = descend(DEFAULTS, ALL, descent, idle, now_s)
        assert (rung is None) == (not idle)
        before = idle
        assert sum(descent.spent_s.values()) == pytest.approx(expected_s)


def test_a_clock_that_went_back_takes_no_time_away() -> None:
    _, descent = descend(EVERY, ALL, Descent(), True, 100.0)
    _, descent = descend(EVERY, ALL, descent, True, 90.0)
    assert descent.spent_s == {Tier.SLEEPING: 0.0}


def test_without_a_look_before_nothing_is_spent() -> None:
    assert choose_rung(EVERY, ALL, {}).tier is Tier.SLEEPING
