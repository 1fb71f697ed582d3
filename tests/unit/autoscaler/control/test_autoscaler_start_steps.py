"""What clients are told while a replica starts."""

from __future__ import annotations

import pytest

from autoscaler.control.start_steps import describe_step


@pytest.mark.parametrize(
    ("step", "failures", "told"),
    [
        ("scheduled", 0, "scheduled"),
        ("scheduled", 1, "scheduled, after 1 failed start"),
        ("scheduled", 5, "scheduled, after 5 failed starts"),
        ("loading", 5, "loading"),
    ],
)
def test_who_waits_is_told_of_failed_starts(step: str, failures: int, told: str) -> None:
    assert describe_step(step, None, failures) == told
