"""Whether a forecast is to be used: what it said against what came. Pure.

A forecast that is trusted when it should not be costs more than it brings. So each is scored when
the time it was for has passed, and is left aside while the pool's history is short, while what came
is outside of its quantile too often, or while simply assuming the last value had been better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autoscaler.types import ForecastTally

SCORED = 1_440
"""Forecasts that are remembered: a day of minutes."""
SCORED_LEAST = 60
"""Before so many are scored, history alone decides."""
LEVEL = 0.95
COVERAGE_LEAST = 0.85
"""Of forecasts at the quantile 0.95. A few hours of one bad day are no reason to leave them."""
LOSS_MOST = 1.05
"""Times the pinball loss of the last value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastScore:
    """One forecast of the highest demand of a lead window, and the same by the last value, at the
    quantile 0.95, with what came. All in tokens per second."""

    forecast: float
    last_value: float
    came: float

    @property
    def covered(self) -> bool:
        """Whether what came was within the forecast."""
        return self.came <= self.forecast


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality:
    """How good a pool's forecasts have been: the share of windows within the quantile 0.95, and
    the pinball loss in parts of that of the last value. ``None`` before there are enough."""

    scored: int
    coverage: float | None = None
    loss_ratio: float | None = None


def pinball(quantile: float, came: float, level: float = LEVEL) -> float:
    """The loss of a quantile: ``level`` times what it was short by, or the rest of it times what it
    was over."""
    return level * (came - quantile) if came > quantile else (1.0 - level) * (quantile - came)


def measure(scores: Sequence[ForecastScore]) -> Quality:
    """The quality of the newest forecasts."""
    if len(scores) < SCORED_LEAST:
        return Quality(scored=len(scores))
    loss = sum(pinball(one.forecast, one.came) for one in scores)
    last = sum(pinball(one.last_value, one.came) for one in scores)
    return Quality(
        scored=len(scores),
        coverage=sum(one.covered for one in scores) / len(scores),
        loss_ratio=loss / last if last > 0.0 else None,
    )


def add_score(tally: ForecastTally, score: ForecastScore) -> ForecastTally:
    """The tally with one more forecast."""
    return ForecastTally(
        scored=tally.scored + 1,
        covered=tally.covered + score.covered,
        loss=tally.loss + pinball(score.forecast, score.came),
        last_value_loss=tally.last_value_loss + pinball(score.last_value, score.came),
    )


def find_distrust(history_s: float, history_least_s: float, quality: Quality) -> str:
    """Why the forecast is not to be used, for people; empty where it is."""
    if history_s < history_least_s:
        return f"{history_s / 3600:.1f} h of history, {history_least_s / 3600:g} h are needed"
    if quality.coverage is not None and quality.coverage < COVERAGE_LEAST:
        return (
            f"only {quality.coverage:.0%} of the last {quality.scored} forecasts covered what came"
        )
    if quality.loss_ratio is not None and quality.loss_ratio > LOSS_MOST:
        return (
            f"the last value was better than the forecast in the last {quality.scored} "
            f"(loss {quality.loss_ratio:.2f} times its)"
        )
    return ""
