"""What keeping an idle pool warm costs, and the plan that costs least."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoscaler.policy.idle_cost import IdlePlan, TierPrice, lower_envelope, plan_idle
from autoscaler.types import Gap
from modelcache.types import TIERS, Tier

WAKE_PRICE, LOAD_S = 540.0, 30.0


def tier(name: Tier, hold_price_s: float, wake_s: float, wake_price: float) -> TierPrice:
    return TierPrice(tier=name, hold_price_s=hold_price_s, wake_s=wake_s, wake_price=wake_price)


TWO = (tier(Tier.RUNNING, 1.0, 0.0, 0.0), tier(Tier.ON_DISK, 0.0, LOAD_S, WAKE_PRICE))
LADDER = (
    tier(Tier.RUNNING, 1.0, 0.0, 0.0),
    tier(Tier.SLEEPING, 0.1, 2.0, 20.0),
    tier(Tier.FORKED, 0.05, 10.0, 100.0),
    tier(Tier.PAGED, 0.04, 30.0, 300.0),
    tier(Tier.ON_DISK, 0.001, 40.0, 400.0),
)


def moments(plan: IdlePlan) -> list[tuple[float, Tier]]:
    return [(round(one.at_s, 1), one.tier) for one in plan.steps]


def price(plan: IdlePlan, tiers: tuple[TierPrice, ...], length_s: float) -> float:
    """What one gap costs under a plan that only goes down."""
    by_tier = {one.tier: one for one in tiers}
    ends = [one.at_s for one in plan.steps[1:]] + [float("inf")]
    held = sum(
        by_tier[step.tier].hold_price_s * max(0.0, min(end_s, length_s) - step.at_s)
        for step, end_s in zip(plan.steps, ends, strict=True)
    )
    # A gap that ends at the moment of a step ends before it.
    before = [one for one in plan.steps if one.at_s < length_s] or [plan.steps[0]]
    return held + by_tier[before[-1].tier].wake_price


@pytest.mark.parametrize(
    ("name", "gaps", "tiers", "expected"),
    [
        ("nothing known: break-even", [], TWO, [(0.0, Tier.RUNNING), (540.0, Tier.ON_DISK)]),
        (
            "nothing known: the envelope, without the tier above it",
            [],
            LADDER,
            [
                (0.0, Tier.RUNNING),
                (22.2, Tier.SLEEPING),
                (1600.0, Tier.FORKED),
                (6122.4, Tier.ON_DISK),
            ],
        ),
        ("one tier has no steps", [Gap(5.0)], TWO[1:], [(0.0, Tier.ON_DISK)]),
        (
            "one long gap halves the time",
            [Gap(86_400.0)],
            TWO,
            [(0.0, Tier.RUNNING), (270.0, Tier.ON_DISK)],
        ),
        (
            "long gaps of all lengths: down at once",
            [Gap(10_000.0 + 500.0 * n) for n in range(99)],
            TWO,
            [(0.0, Tier.RUNNING), (5.4, Tier.ON_DISK)],
        ),
        (
            "gaps that end soon are waited for, past break-even",
            [Gap(600.0)] * 50,
            (TWO[0], tier(Tier.ON_DISK, 0.0, LOAD_S, 620.0)),
            [(0.0, Tier.RUNNING), (620.0, Tier.ON_DISK)],
        ),
        (
            "no gap was longer than a minute: then break-even",
            [Gap(30.0 + n) for n in range(30)],
            TWO,
            [(0.0, Tier.RUNNING), (540.0, Tier.ON_DISK)],
        ),
        (
            "a request an hour: down soon, and up a wake before it",
            [Gap(3600.0)] * 30,
            TWO,
            [
                (0.0, Tier.RUNNING),
                (17.4, Tier.ON_DISK),
                (3498.0, Tier.RUNNING),
                (3600.0, Tier.ON_DISK),
            ],
        ),
        (
            "what happened a few times is no pattern",
            [Gap(3600.0)] * 4,
            TWO,
            [(0.0, Tier.RUNNING), (108.0, Tier.ON_DISK)],
        ),
        (
            "a weight is so many gaps",
            [Gap(3600.0, 4.0)],
            TWO,
            [(0.0, Tier.RUNNING), (108.0, Tier.ON_DISK)],
        ),
    ],
)
def test_the_plan(
    name: str,
    gaps: list[Gap],
    tiers: tuple[TierPrice, ...],
    expected: list[tuple[float, Tier]],
) -> None:
    assert moments(plan_idle(gaps, tiers)) == expected


def test_a_plan_says_what_it_costs() -> None:
    plan = plan_idle([Gap(100.0)] * 8 + [Gap(5000.0)] * 2, TWO)
    # Held for 100 s each time; two of ten gaps go on, and wake.
    assert plan.price == pytest.approx(100.0 + 0.2 * (WAKE_PRICE + (180.0 - 100.0)), abs=1.0)
    assert plan.safe_price == pytest.approx(0.8 * 100.0 + 0.2 * 2 * WAKE_PRICE)
    assert plan.kept_price == pytest.approx(0.8 * 100.0 + 0.2 * 5000.0)
    assert plan.gaps == 10
    assert sum(one.hold_price + one.wake_price for one in plan.steps) == pytest.approx(plan.price)


def test_where_a_pool_is_at_a_moment() -> None:
    plan = plan_idle([], LADDER)
    assert [plan.tier_at(at_s) for at_s in (0.0, 22.0, 23.0, 1e9)] == [
        Tier.RUNNING,
        Tier.RUNNING,
        Tier.SLEEPING,
        Tier.ON_DISK,
    ]


PRICES = st.floats(0.0, 1e3, allow_nan=False)
LENGTHS = st.floats(0.5, 1e6, allow_nan=False)


@st.composite
def ladders(draw: st.DrawFn) -> tuple[TierPrice, ...]:
    names = draw(st.lists(st.sampled_from(TIERS), min_size=1, max_size=5, unique=True))
    return tuple(tier(name, draw(PRICES), draw(PRICES), draw(PRICES)) for name in names)


@given(ladders(), LENGTHS)
def test_without_gaps_none_costs_more_than_twice_the_least(
    tiers: tuple[TierPrice, ...], length_s: float
) -> None:
    least = min(one.hold_price_s * length_s + one.wake_price for one in tiers)
    assert price(plan_idle([], tiers), tiers, length_s) <= 2.0 * least * (1 + 1e-9) + 1e-9


@given(ladders())
def test_the_envelope_is_each_lengths_cheapest(tiers: tuple[TierPrice, ...]) -> None:
    def least(some: list[TierPrice], length_s: float) -> float:
        return min(one.hold_price_s * length_s + one.wake_price for one in some)

    for length_s in (0.0, 1.0, 60.0, 1e3, 1e5, 1e7):
        assert least(lower_envelope(tiers), length_s) == pytest.approx(least(list(tiers), length_s))


@settings(max_examples=40, deadline=None)
@given(ladders(), st.lists(st.builds(Gap, LENGTHS, st.floats(1.0, 100.0)), max_size=40))
def test_steps_are_in_order_and_no_tier_follows_itself(
    tiers: tuple[TierPrice, ...], gaps: list[Gap]
) -> None:
    steps = plan_idle(gaps, tiers).steps
    assert steps[0].at_s == 0.0
    assert all(one.at_s <= two.at_s and one.tier is not two.tier for one, two in pairwise(steps))
    assert {one.tier for one in steps} <= {one.tier for one in tiers}


@settings(max_examples=40, deadline=None)
@given(ladders(), st.lists(st.builds(Gap, LENGTHS, st.floats(1.0, 100.0)), min_size=1, max_size=40))
def test_what_is_known_never_makes_it_dearer_than_the_safe_plan(
    tiers: tuple[TierPrice, ...], gaps: list[Gap]
) -> None:
    plan = plan_idle(gaps, tiers)
    assert plan.price <= plan.safe_price * (1 + 1e-9) + 1e-6
