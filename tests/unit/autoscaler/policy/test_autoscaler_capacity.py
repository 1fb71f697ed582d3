"""What a replica carries: from which minutes it is learned, and what counts before."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.capacity import (
    SAMPLES,
    CapacityState,
    LoadSample,
    Mix,
    derive_tokens_per_s,
    estimate_capacity,
    is_telling,
    note_load,
    running_most,
)
from autoscaler.replay.engine import ReplicaModel, Slo
from autoscaler.types import CapacitySource

S = CapacitySource
CHAT = Mix(500.0, 200.0)
SUMMARY = Mix(4_000.0, 100.0)


def calm(rate: float, mix: Mix = CHAT, accelerator: str = "") -> LoadSample:
    return LoadSample(
        tokens_per_s=rate, mix=mix, within_slo=True, waited=False, accelerator=accelerator
    )


def full(rate: float, mix: Mix = CHAT, accelerator: str = "") -> LoadSample:
    return LoadSample(
        tokens_per_s=rate, mix=mix, within_slo=True, waited=True, accelerator=accelerator
    )


def late(rate: float, mix: Mix = CHAT) -> LoadSample:
    return LoadSample(tokens_per_s=rate, mix=mix, within_slo=False, waited=True)


CASES = [
    # name, earlier, samples, derived, hint, expected
    ("nothing is known", [], [], None, None, None),
    ("a hint", [], [], None, 500.0, (500.0, S.HINT)),
    ("derived before a hint", [], [], 800.0, 500.0, (800.0, S.DERIVED)),
    ("seen earlier before derived", [full(700)] * 3, [], 800.0, 500.0, (700.0, S.HISTORY)),
    ("some earlier and some now", [full(700)] * 2, [full(600)], 800.0, None, (700.0, S.HISTORY)),
    ("more was done since", [full(700)] * 3, [calm(750)], 800.0, None, (750.0, S.HISTORY)),
    ("what was done already is no less", [], [calm(900)], None, 500.0, (900.0, S.HINT)),
    ("done earlier is no less", [calm(900)], [], None, 500.0, (900.0, S.HINT)),
    ("done, and nothing said of a limit", [], [calm(900)], None, None, None),
    ("at its limit", [full(700)] * 9, [full(1_000), full(1_100), full(1_050)], 800.0, 500.0,
     (1_050.0, S.SATURATED)),
    ("one limit may have been a start", [], [full(300), calm(900)], 800.0, None,
     (900.0, S.DERIVED)),
    ("beyond the SLO", [], [calm(900), late(1_300), late(1_200), late(1_400)], None, None,
     (900.0, S.SATURATED)),
    ("beyond the SLO earlier", [calm(900), late(1_300), late(1_200), late(1_400)], [], None, None,
     (900.0, S.HISTORY)),
    ("never within the SLO", [], [late(400), late(500), late(600)], 900.0, None,
     (500.0, S.SATURATED)),
    ("a limit below the best", [], [calm(900), late(800), late(800), late(800)], None, None,
     (800.0, S.SATURATED)),
    ("of requests of these lengths", [full(900)] * 9, [full(3_000, SUMMARY)] * 9 + [full(800)] * 3,
     None, None, (800.0, S.SATURATED)),
    ("of these lengths earlier", [full(900)] * 3, [full(3_000, SUMMARY)] * 9, None, None,
     (900.0, S.HISTORY)),
    ("of any lengths, by their work", [], [full(1_230, SUMMARY)] * 3, 100.0, None,
     (pytest.approx(1_230 / 4_100 * 1_100 * 700 / 325), S.HISTORY)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("earlier", "samples", "derived", "hint", "expected"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_capacity(
    earlier: list[LoadSample],
    samples: list[LoadSample],
    derived: float | None,
    hint: float | None,
    expected: tuple[float, CapacitySource] | None,
) -> None:
    state = CapacityState(earlier=tuple(earlier))
    for sample in samples:
        state = note_load(state, sample)
    found = estimate_capacity(state, mix=CHAT, derived=derived, hint=hint)
    assert (None if found is None else (found.tokens_per_s, found.source)) == expected


def test_before_any_request_it_is_of_those_that_came_last() -> None:
    state = CapacityState(earlier=(*[full(700)] * 3, *[full(3_000, SUMMARY)] * 3))
    found = estimate_capacity(state)
    assert found is not None
    assert found.tokens_per_s == 3_000


@pytest.mark.parametrize(
    ("now", "expected"),
    [
        ("NVIDIA L4", (300.0, S.HISTORY)),
        ("NVIDIA H200", (3_000.0, S.SATURATED)),
        ("", (3_000.0, S.SATURATED)),
        ("cpu", None),
    ],
)
def test_what_one_accelerator_carries_says_nothing_of_another(
    now: str, expected: tuple[float, CapacitySource] | None
) -> None:
    state = CapacityState(
        earlier=(full(300, accelerator="NVIDIA L4"),) * 3,
        samples=(full(3_000, accelerator="NVIDIA H200"),) * 3,
    )
    found = estimate_capacity(state, mix=CHAT, accelerator=now)
    assert (None if found is None else (found.tokens_per_s, found.source)) == expected


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (calm(500), False),
        (calm(950), True),
        (full(500), True),
        (late(500), True),
        (full(0.0), False),
        (full(float("nan")), False),
        (calm(500, accelerator="NVIDIA L4"), True),
        (calm(500, SUMMARY), False),
        (calm(500, Mix(10.0, 900.0)), True),
    ],
)
def test_a_minute_tells_something_new_or_does_not(sample: LoadSample, expected: bool) -> None:
    state = CapacityState(earlier=(calm(900, accelerator="cpu"), full(3_000, SUMMARY, "cpu")))
    state = note_load(state, calm(800, accelerator="cpu"))
    assert is_telling(state, sample) is expected


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        (CHAT, Mix(900.0, 120.0), True),
        (CHAT, Mix(1_200.0, 200.0), False),
        (CHAT, Mix(500.0, 80.0), False),
        (Mix(0.0, 1.0), Mix(10.0, 4.0), True),
    ],
)
def test_alike_are_lengths_within_a_factor(one: Mix, other: Mix, expected: bool) -> None:
    assert one.is_like(other) is other.is_like(one) is expected


def test_another_mix_is_carried_about_as_the_engine_model_has_it() -> None:
    """Converted, a capacity is nearer to that of another mix than it is as it was."""
    engine, slo = ReplicaModel(), Slo()
    mixes = [Mix(100.0, 400.0), CHAT, Mix(2_000.0, 300.0), SUMMARY, Mix(8_000.0, 50.0)]
    for one in mixes:
        for other in mixes:
            known, true = (engine.capacity_tokens_per_s(*mix, slo) for mix in (one, other))
            error = abs(math.log(one.convert(known, other) / true))
            assert error < math.log(2.0)
            if not one.is_like(other):
                assert error < abs(math.log(known / true))


def test_derived_of_the_cache_and_the_limits() -> None:
    assert running_most(CHAT, kv_tokens=60_000, requests_most=256) == 100
    assert running_most(CHAT, kv_tokens=60_000, requests_most=32) == 32
    assert running_most(CHAT, kv_tokens=None, requests_most=None) is None
    assert derive_tokens_per_s(CHAT, e2e_s=7, running_most=100) == pytest.approx(10_000)
    assert derive_tokens_per_s(CHAT, e2e_s=0, running_most=100) is None
    step = derive_tokens_per_s(CHAT, e2e_s=7, running_most=100, itl_s=0.05, batched_tokens_most=256)
    assert step == pytest.approx(5_120)


samples = st.lists(
    st.builds(
        LoadSample,
        tokens_per_s=st.floats(0, 1e6),
        mix=st.builds(Mix, st.floats(0, 1e6), st.floats(0, 1e6)),
        within_slo=st.booleans(),
        waited=st.booleans(),
        accelerator=st.sampled_from(["", "cpu", "NVIDIA H200"]),
    ),
    max_size=300,
)


@given(samples, st.sampled_from([None, CHAT, Mix(0.0, 0.0)]))
def test_any_minutes_give_a_rate_and_their_number_is_bounded(
    seen: list[LoadSample], mix: Mix | None
) -> None:
    state = CapacityState()
    for sample in seen:
        if is_telling(state, sample):
            state = note_load(state, sample)
    assert len(state.samples) <= SAMPLES
    found = estimate_capacity(state, mix=mix)
    if found is not None:
        rates = [one.tokens_per_s for one in seen if one.tokens_per_s > 0.0]
        factor = 1.0 if mix is None and len({one.mix for one in seen}) == 1 else 4.0
        assert min(rates) / factor <= found.tokens_per_s * 1.000001
        assert found.tokens_per_s <= max(rates) * factor * 1.000001


def test_calm_minutes_do_not_make_it_forget_its_limits() -> None:
    state = CapacityState()
    for sample in [full(1_000)] * 3 + [calm(300)] * 2 * SAMPLES:
        if is_telling(state, sample):
            state = note_load(state, sample)
    found = estimate_capacity(state, mix=CHAT)
    assert found is not None
    assert found.source is S.SATURATED
