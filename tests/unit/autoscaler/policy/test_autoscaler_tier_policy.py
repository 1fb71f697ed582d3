"""Which tier after how long, and what counts as idle time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.tier_policy import TierChoice, TierState, TierTimes, choose_tier, pick_tier
from autoscaler.settings import TierSettings
from modelcache.types import TIERS, Tier

ALL = frozenset(TIERS) - {Tier.RUNNING}
EVERY = TierSettings(sleeping_s=10, forked_s=20, paged_s=30, on_disk_s=40).stays_s
DEFAULTS = TierSettings().stays_s
BEGIN = TierState()
LOCAL = ALL - {Tier.REMOTE, Tier.SLEEPING}

CASES = [
    ("begins on the hottest step", EVERY, ALL, 0, Tier.SLEEPING, 10),
    ("stays for its time", EVERY, ALL, 9, Tier.SLEEPING, 1),
    ("then goes one down", EVERY, ALL, 10, Tier.FORKED, 20),
    ("and another", EVERY, ALL, 45, Tier.PAGED, 15),
    ("and another", EVERY, ALL, 60, Tier.ON_DISK, 40),
    ("to the floor, for ever", EVERY, ALL, 150, Tier.REMOTE, None),
    ("a tier that is not there takes no time", EVERY, ALL - {Tier.FORKED}, 10, Tier.PAGED, 30),
    (
        "nor does one of 0 s",
        TierSettings(sleeping_s=5, forked_s=0).stays_s,
        ALL,
        5,
        Tier.PAGED,
        None,
    ),
    ("for ever is for ever", DEFAULTS, ALL, 500, Tier.FORKED, None),
    ("without a fork server pages stay", DEFAULTS, LOCAL - {Tier.FORKED}, 500, Tier.PAGED, None),
    ("a directory does not leave", EVERY, frozenset({Tier.ON_DISK}), 500, Tier.ON_DISK, None),
    ("the coldest there is has no end", EVERY, LOCAL, 500, Tier.ON_DISK, None),
    ("nor time that is left", EVERY, LOCAL, 51, Tier.ON_DISK, None),
    ("what is not here is remote", DEFAULTS, frozenset({Tier.REMOTE}), 0, Tier.REMOTE, None),
    ("no tier at all is as cold as can be", DEFAULTS, frozenset(), 0, Tier.REMOTE, None),
    ("running is not a step", DEFAULTS, frozenset({Tier.RUNNING}), 0, Tier.REMOTE, None),
    ("sleep is not the default", DEFAULTS, ALL, 0, Tier.FORKED, None),
]


def idle_for(
    policy: TierTimes, tiers: frozenset[Tier], seconds: float, since: TierState = BEGIN
) -> tuple[TierChoice, TierState]:
    """A reading every second."""
    began_s = since.seen_at_s or 0.0
    choice, state = choose_tier(policy, tiers, since, True, began_s)
    for second in range(1, round(seconds) + 1):
        choice, state = choose_tier(policy, tiers, state, True, began_s + second)
    assert choice is not None
    return choice, state


@pytest.mark.parametrize(("name", "policy", "tiers", "idle_s", "tier", "left_s"), CASES)
def test_tier_after_idle_time(
    name: str,
    policy: TierTimes,
    tiers: frozenset[Tier],
    idle_s: float,
    tier: Tier,
    left_s: float | None,
) -> None:
    choice, _ = idle_for(policy, tiers, idle_s)
    assert choice == TierChoice(
        tier=tier, left_s=None if left_s is None else pytest.approx(left_s)
    ), name


def test_a_tier_that_goes_away_does_not_shorten_the_next_ones() -> None:
    choice, state = idle_for(EVERY, ALL, 10)
    assert choice.tier is Tier.FORKED
    # The engine that slept is gone now, so the pool cannot sleep any more.
    choice, state = idle_for(EVERY, ALL - {Tier.SLEEPING}, 19, state)
    assert choice == TierChoice(tier=Tier.FORKED, left_s=pytest.approx(1))
    choice, _ = idle_for(EVERY, ALL - {Tier.SLEEPING}, 1, state)
    assert choice.tier is Tier.PAGED


def test_a_tier_that_comes_back_is_taken_for_the_time_it_has_left() -> None:
    broken = ALL - {Tier.SLEEPING, Tier.FORKED}
    _, state = idle_for(EVERY, ALL - {Tier.SLEEPING}, 5)
    choice, state = idle_for(EVERY, broken, 10, state)
    assert choice.tier is Tier.PAGED
    choice, _ = idle_for(EVERY, ALL - {Tier.SLEEPING}, 0, state)
    assert choice == TierChoice(tier=Tier.FORKED, left_s=pytest.approx(15, abs=1))


def test_demand_begins_anew() -> None:
    _, state = idle_for(EVERY, ALL, 50)
    choice, state = choose_tier(EVERY, ALL, state, False, 51.0)
    assert (choice, state) == (None, TierState())
    assert idle_for(EVERY, ALL, 0, state)[0].tier is Tier.SLEEPING


def is_colder(one: Tier, other: Tier) -> bool:
    return TIERS.index(one) > TIERS.index(other)


SECONDS = st.none() | st.just(0.0) | st.floats(0.0, 100.0)
POLICIES = st.fixed_dictionaries(
    dict.fromkeys((Tier.SLEEPING, Tier.FORKED, Tier.PAGED, Tier.ON_DISK), SECONDS)
)
TIER_SETS = st.frozensets(st.sampled_from(TIERS[1:]), min_size=2)


@given(POLICIES, TIER_SETS, st.lists(st.floats(0, 80), min_size=5, max_size=20))
def test_time_only_cools_and_no_tier_ends_before_its_time(
    policy: TierTimes, tiers: frozenset[Tier], gaps: list[float]
) -> None:
    now_s = 0.0
    choice, state = choose_tier(policy, tiers, TierState(), True, now_s)
    entered: dict[Tier, float] = {}
    for gap_s in [*gaps, 1e-3]:
        assert choice is not None
        entered.setdefault(choice.tier, now_s)
        before = choice
        now_s += gap_s
        choice, state = choose_tier(policy, tiers, state, True, now_s)
        assert choice is not None
        assert choice.tier in tiers
        assert not is_colder(before.tier, choice.tier)
        if is_colder(choice.tier, before.tier):
            stays_s = policy[before.tier]
            assert stays_s is not None
            assert now_s - entered[before.tier] >= stays_s - 1e-6


READINGS = st.lists(
    st.tuples(st.floats(0.0, 50.0), st.sampled_from([True, False, None])), max_size=30
)


@given(READINGS)
def test_only_time_between_two_readings_that_found_it_idle_counts(
    readings: list[tuple[float, bool | None]],
) -> None:
    state, now_s, expected_s, before = TierState(), 0.0, 0.0, None
    for gap_s, idle in readings:
        now_s += gap_s
        if idle is False:
            expected_s = 0.0
        elif idle and before:
            expected_s += gap_s
        choice, state = choose_tier(DEFAULTS, ALL, state, idle, now_s)
        assert (choice is None) == (not idle)
        before = idle
        assert sum(state.spent_s.values()) == pytest.approx(expected_s)


def test_a_clock_that_went_back_takes_no_time_away() -> None:
    _, state = choose_tier(EVERY, ALL, TierState(), True, 100.0)
    _, state = choose_tier(EVERY, ALL, state, True, 90.0)
    assert state.spent_s == {Tier.SLEEPING: 0.0}


def test_without_a_reading_before_nothing_is_spent() -> None:
    assert pick_tier(EVERY, ALL, {}).tier is Tier.SLEEPING
