"""What a replica carries: from which minutes it is learned, and what counts before."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoscaler.policy.capacity import (
    SAMPLES,
    CapacityState,
    LoadSample,
    derive_tokens_per_s,
    estimate_capacity,
    note_load,
    running_most,
)
from autoscaler.types import CapacitySource

S = CapacitySource


def calm(rate: float) -> LoadSample:
    return LoadSample(tokens_per_s=rate, within_slo=True, waited=False)


def full(rate: float) -> LoadSample:
    return LoadSample(tokens_per_s=rate, within_slo=True, waited=True)


def late(rate: float) -> LoadSample:
    return LoadSample(tokens_per_s=rate, within_slo=False, waited=True)


CASES = [
    # name, samples, learned, derived, hint, expected
    ("nothing is known", [], None, None, None, None),
    ("a hint", [], None, None, 500.0, (500.0, S.HINT)),
    ("derived before a hint", [], None, 800.0, 500.0, (800.0, S.DERIVED)),
    ("learned earlier before derived", [], 700.0, 800.0, 500.0, (700.0, S.HISTORY)),
    ("what was done already is no less", [calm(900)], None, None, 500.0, (900.0, S.HINT)),
    ("done, and nothing said of a limit", [calm(900)], None, None, None, None),
    ("at its limit", [full(1_000), full(1_100), full(1_050)], 700.0, 800.0, 500.0,
     (1_050.0, S.SATURATED)),
    ("one limit may have been a start", [full(300), calm(900)], None, 800.0, None,
     (900.0, S.DERIVED)),
    ("beyond the SLO", [calm(900), late(1_300), late(1_200), late(1_400)], None, None, None,
     (900.0, S.SATURATED)),
    ("never within the SLO", [late(400), late(500), late(600)], None, 900.0, None,
     (500.0, S.SATURATED)),
    ("a limit below the best", [calm(900), late(800), late(800), late(800)], None, None, None,
     (800.0, S.SATURATED)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("samples", "learned", "derived", "hint", "expected"),
    [pytest.param(*case[1:], id=case[0]) for case in CASES],
)
def test_capacity(
    samples: list[LoadSample],
    learned: float | None,
    derived: float | None,
    hint: float | None,
    expected: tuple[float, CapacitySource] | None,
) -> None:
    state = CapacityState(learned_tokens_per_s=learned)
    for sample in samples:
        state = note_load(state, sample)
    found = estimate_capacity(state, derived=derived, hint=hint)
    assert (None if found is None else (found.tokens_per_s, found.source)) == expected


def test_derived_of_the_cache_and_the_limits() -> None:
    most = running_most(kv_tokens=60_000, max_requests=256, prompt_tokens=500, output_tokens=200)
    assert most == 100
    assert running_most(kv_tokens=None, max_requests=None, prompt_tokens=1, output_tokens=1) is None
    found = derive_tokens_per_s(prompt_tokens=500, output_tokens=200, e2e_s=7, running_most=100)
    assert found == pytest.approx(10_000)
    assert (
        derive_tokens_per_s(prompt_tokens=500, output_tokens=200, e2e_s=0, running_most=100) is None
    )


samples = st.lists(
    st.builds(
        LoadSample, tokens_per_s=st.floats(0, 1e6), within_slo=st.booleans(), waited=st.booleans()
    ),
    max_size=300,
)


@given(samples)
def test_any_minutes_give_what_was_seen_and_their_number_is_bounded(seen: list[LoadSample]) -> None:
    state = CapacityState()
    for sample in seen:
        state = note_load(state, sample)
    assert len(state.samples) <= SAMPLES
    found = estimate_capacity(state)
    if found is not None:
        rates = [one.tokens_per_s for one in seen]
        assert 0 < min(rate for rate in rates if rate) <= found.tokens_per_s <= max(rates)
