"""Numbers as Kubernetes writes them."""

from __future__ import annotations

import math

import pytest

from autoscaler.adapters.metrics_api.quantity import to_quantity


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.0, "0"),
        (-0.0, "0"),
        (-3.5, "0"),
        (-math.inf, "0"),
        (1, "1"),
        (3.0, "3"),
        (0.5, "500m"),
        (1.5, "1500m"),
        (0.001, "1m"),
        (0.0001, "1m"),
        (0.07, "70m"),
        (2.3, "2300m"),
        (0.1 + 0.2, "301m"),
        (1e-12, "1m"),
        (1 / 3, "334m"),
        (123456.7891, "123456790m"),
        (1e6, "1000000"),
        (1e15, "1000000000000000"),
        (1e18, "9223372036854775"),
        (math.inf, "9223372036854775"),
    ],
)
def test_a_quantity(value: float, expected: str) -> None:
    assert to_quantity(value) == expected


def test_nan_is_none() -> None:
    with pytest.raises(ValueError, match="NaN"):
        to_quantity(math.nan)
