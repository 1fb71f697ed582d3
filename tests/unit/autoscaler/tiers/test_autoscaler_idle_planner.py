"""How long a pool is kept warm: its gaps, what its tiers cost, and what a forecast adds."""

from __future__ import annotations

import pytest

from autoscaler.settings import PriceSettings
from autoscaler.tiers.idle_planner import IdlePlanner, expect_wake_s, price_tiers
from autoscaler.types import Outlook
from modelcache.types import Tier

PRICES = PriceSettings(replica_hour=3.6, waited_second=0.01, memory_gib_hour=0.0)
"""A replica costs 0.001 a second: a wake of 30 s is worth 300 s of it."""
DISK = frozenset({Tier.ON_DISK})
NOW_S = 10_000.0


def planner(gaps_s: list[float], wake_s: float | None = 30.0) -> IdlePlanner:
    """One that has seen these gaps, and has been idle since ``NOW_S``."""
    made = IdlePlanner()
    at_s = 0.0
    made.observe(at_s, at_s, known=True)
    for gap_s in gaps_s:
        made.observe(at_s, at_s + 1.0, known=True)
        at_s += gap_s
        made.observe(at_s, at_s, known=True)
    plan(made, wake_s, at_s=NOW_S)
    return made


def plan(made: IdlePlanner, wake_s: float | None = 30.0, at_s: float = NOW_S) -> None:
    if made.observe(at_s, at_s + 0.5, known=True):
        measured = {} if wake_s is None else {Tier.ON_DISK: wake_s}
        made.make_plan(DISK, measured, PRICES, replica_hour=3.6, model_bytes=None, now_s=at_s)


def outlook(*rates: float, distrust: str = "") -> Outlook:
    return Outlook(
        made_at_s=NOW_S,
        model="m",
        lead_s=60.0,
        levels=(0.5, 0.8, 0.95),
        tokens_per_s=rates,
        distrust=distrust,
    )


@pytest.mark.parametrize(
    ("name", "gaps_s", "wake_s", "expected"),
    [
        ("nothing is known of a wake", [40.0], None, None),
        ("no gap is known: break-even", [], 30.0, 300.0),
        ("long gaps: at once, as far as so few are trusted", [5_000.0] * 2, 30.0, 100.0),
        ("short gaps: break-even, for none lasted longer", [40.0] * 20, 30.0, 300.0),
    ],
)
def test_how_long_it_runs(
    name: str, gaps_s: list[float], wake_s: float | None, expected: float | None
) -> None:
    assert planner(gaps_s, wake_s).idle_to_zero_s == pytest.approx(expected)


def test_a_gap_with_unknown_demand_is_none() -> None:
    made = IdlePlanner()
    made.observe(0.0, 0.0, known=True)
    made.observe(0.0, 10.0, known=True)
    made.observe(0.0, 20.0, known=False)
    made.observe(30.0, 30.0, known=True)
    assert made.gaps.read(40.0) == ()
    made.observe(30.0, 35.0, known=True)
    made.observe(50.0, 50.0, known=True)
    assert [one.length_s for one in made.gaps.read(60.0)] == [20.0]


def test_time_in_tiers_follows_the_plan() -> None:
    made = IdlePlanner()
    made.observe(NOW_S, NOW_S, known=True)
    made.observe(NOW_S, NOW_S + 1.0, known=True)
    prices = PriceSettings(replica_hour=3.6, waited_second=0.01, memory_gib_hour=0.036)
    made.make_plan(
        frozenset({Tier.PAGED, Tier.ON_DISK, Tier.REMOTE}),
        {Tier.PAGED: 10.0, Tier.ON_DISK: 30.0, Tier.REMOTE: 300.0},
        prices,
        replica_hour=3.6,
        model_bytes=10 << 30,
        now_s=NOW_S,
    )
    # 10 GiB at 0.036 an hour are 0.0001 a second; a wake from the disk waits 20 s longer.
    assert made.idle_to_zero_s == pytest.approx(0.1 / 0.0009)
    assert made.stays_s[Tier.PAGED] == pytest.approx(0.2 / 0.0001 - 0.1 / 0.0009)
    assert (made.stays_s[Tier.ON_DISK], made.stays_s[Tier.SLEEPING]) == (None, 0.0)


def test_it_comes_up_ahead_of_a_request_that_comes_every_hour() -> None:
    made = planner([3_600.0] * 24)
    assert made.prewarm(None, Tier.ON_DISK, NOW_S + 1_800.0) == ""
    assert made.prewarm(None, Tier.ON_DISK, NOW_S + 3_590.0) != ""
    assert made.prewarm(None, Tier.ON_DISK, NOW_S + 4_000.0) == ""
    # With an idle time that the settings give, a forecast is all that brings it up.
    assert made.prewarm(None, Tier.ON_DISK, NOW_S + 3_590.0, planned=False) == ""
    sure = outlook(50.0, 50.0, 90.0)
    assert made.prewarm(sure, Tier.ON_DISK, NOW_S + 3_590.0, planned=False) != ""


@pytest.mark.parametrize(
    ("name", "rates", "distrust", "expected"),
    [
        ("a request is likely enough for its wait", (0.0, 50.0, 90.0), "", True),
        ("a request is unlikely", (0.0, 0.0, 90.0), "", False),
        ("none is expected", (0.0, 0.0, 0.0), "", False),
        ("a forecast that is not trusted", (50.0, 50.0, 90.0), "it lost to the last value", False),
    ],
)
def test_it_comes_up_ahead_of_a_forecast_request(
    name: str, rates: tuple[float, ...], distrust: str, expected: bool
) -> None:
    # To run for a window of 120 s in vain costs 0.12, a wake 0.3, a step of 60 s 0.06: it pays from
    # a chance of a third on.
    found = planner([5_000.0] * 2).prewarm(
        outlook(*rates, distrust=distrust), Tier.ON_DISK, NOW_S + 500.0
    )
    assert bool(found) is expected
    # It stays up for that as well.
    found = planner([5_000.0] * 2).prewarm(
        outlook(*rates, distrust=distrust), Tier.RUNNING, NOW_S + 500.0
    )
    assert bool(found) is expected


def test_it_stays_up_for_the_whole_window_of_a_forecast_that_changes() -> None:
    made, at_s = planner([5_000.0] * 2), NOW_S + 500.0
    sure, none = outlook(50.0, 50.0, 90.0), outlook(0.0, 0.0, 0.0)
    assert made.prewarm(none, Tier.ON_DISK, at_s) == ""
    assert made.prewarm(sure, Tier.ON_DISK, at_s) != ""
    assert made.prewarm(none, Tier.RUNNING, at_s + 119.0) != ""
    assert made.prewarm(none, Tier.RUNNING, at_s + 120.0) == ""
    # A request that comes has ended it.
    assert made.prewarm(sure, Tier.ON_DISK, at_s + 200.0) != ""
    made.observe(at_s + 210.0, at_s + 210.0, known=True)
    plan(made, at_s=at_s + 211.0)
    assert made.prewarm(none, Tier.RUNNING, at_s + 212.0) == ""


def test_wakes_that_were_not_measured() -> None:
    assert expect_wake_s(Tier.ON_DISK, {Tier.ON_DISK: 10.0}) == 10.0
    assert expect_wake_s(Tier.PAGED, {Tier.ON_DISK: 10.0}) == pytest.approx(9.0)
    # A colder tier is never taken to be as good as a warmer one.
    assert expect_wake_s(Tier.ON_DISK, {Tier.FORKED: 2.0}) == pytest.approx(2.0 / 0.9 / 0.6)
    assert expect_wake_s(Tier.PAGED, {Tier.FORKED: 2.0}) == pytest.approx(2.0 / 0.6)
    assert expect_wake_s(Tier.ON_DISK, {}) is None


def test_remote_is_planned_only_where_there_is_nothing_else() -> None:
    def tiers(*there: Tier) -> list[Tier]:
        found = price_tiers(
            set(there), {Tier.REMOTE: 60.0}, PRICES, replica_hour=1.0, model_bytes=1
        )
        return [one.tier for one in found]

    assert tiers(Tier.ON_DISK, Tier.REMOTE) == [Tier.RUNNING, Tier.ON_DISK]
    assert tiers(Tier.REMOTE) == [Tier.RUNNING, Tier.REMOTE]
