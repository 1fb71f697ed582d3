"""What a request is thought to cost, and how that is learned."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.tokens import TokenEstimator


def estimator(rate: float = 0.05) -> TokenEstimator:
    return TokenEstimator(bytes_per_token=4.0, output_tokens=256.0, learning_rate=rate)


@pytest.mark.parametrize(
    ("size", "bound", "prompt", "total"),
    [
        (0, None, 1, 257),
        (4000, None, 1001, 1257),
        (4000, 16, 1001, 1017),
        (4000, 10_000, 1001, 1257),  # a bound above the mean does not raise the estimate
        (0, 1, 1, 2),
    ],
)
def test_estimates(size: int, bound: int | None, prompt: int, total: int) -> None:
    assert estimator().estimate(size, bound) == (prompt, total)


def test_it_follows_a_models_own_ratio_and_length() -> None:
    learned = estimator()
    for _ in range(200):
        learned.learn(3000, 1000, 40)
    assert learned.bytes_per_token == pytest.approx(3.0, rel=0.01)
    assert learned.output_tokens == pytest.approx(40, rel=0.05)
    assert learned.estimate(3000, None)[0] == pytest.approx(1001, rel=0.02)


@pytest.mark.parametrize(
    ("size", "prompt", "output"),
    [
        (1000, None, None),  # unknown teaches nothing
        (1000, 15, None),  # too short to say anything
        (10_000_000, 100, None),  # an image: not what text costs
        (10, 1000, None),  # a broken report
        (1000, 0, None),
        (1000, None, -5),
    ],
)
def test_what_teaches_nothing(size: int, prompt: int | None, output: int | None) -> None:
    learned = estimator()
    learned.learn(size, prompt, output)
    assert (learned.bytes_per_token, learned.output_tokens) == (4.0, 256.0)


def test_zero_output_is_learned() -> None:
    learned = estimator(rate=1.0)
    learned.learn(1000, None, 0)
    assert learned.output_tokens == 0
    assert learned.estimate(1000, None) == (251, 251)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**8),
            st.one_of(st.none(), st.integers(0, 10**8)),
            st.one_of(st.none(), st.integers(-5, 10**8)),
        ),
        max_size=50,
    ),
    st.integers(0, 10**8),
    st.one_of(st.none(), st.integers(1, 10**9)),
)
def test_no_report_makes_an_entry_free_or_the_ratio_absurd(
    reports: list[tuple[int, int | None, int | None]], size: int, bound: int | None
) -> None:
    learned = estimator(rate=0.5)
    for report in reports:
        learned.learn(*report)
    assert 0.5 <= learned.bytes_per_token <= 64
    prompt, total = learned.estimate(size, bound)
    assert 1 <= prompt <= total
