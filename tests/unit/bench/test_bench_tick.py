"""The bench of the control loop's tick measures what it says it does."""

from __future__ import annotations

import pytest

from bench import tick


def test_every_replica_is_there_and_every_pool_looks_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tick, "TICKS", 5)
    row = tick.measure(4, 3)
    assert row["errors"] == 0, row["last_error"]
    assert (row["pools"], row["replicas"], row["with_forecast"]) == (4, 12, 4)
    assert 0.0 < row["median_s"] <= row["most_s"]


@pytest.mark.parametrize(
    ("change", "passed"),
    [({}, True), ({"median_s": 1.5}, False), ({"replicas": 9}, False), ({"pool_us": 14.0}, False)],
)
def test_bars(change: dict[str, float], passed: bool) -> None:
    few = {
        "pools": 1, "replicas": 10, "with_forecast": 1, "errors": 0, "median_s": 0.01,
        "pool_us": 10.0,
    }  # fmt: skip
    forecasts = {"refit_median_s": 0.1}
    found = tick.find_verdicts({"ticks": [few, {**few, **change}, few], "forecasts": forecasts})
    assert all(one["passed"] for one in found) is passed
