"""How forecasts of a pool turned out: weights for mixing models, and whether to trust them at all.

What is provisioned is the largest demand over the lead, so that is what is scored: its pinball loss
and coverage, beside those of the last value.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from forecaster.calibrate import blended
from forecaster.types import DAY_S, Floats, Forecast, Forecaster, History, pinball

LEVELS = (0.5, 0.75, 0.9, 0.95, 0.975)
BASELINE = "last_value"
HISTORY_LEAST_DAYS = 2.0
_SCORED_LEAST = 20.0
"""Leads that do not overlap: forecasts made each minute for fifteen are one in fifteen."""

_COVERAGE_SLACK = 0.03
_COVERAGE_DEVIATIONS = 2.0
_SHARPNESS = 8.0
"""The weight of a model that loses 10 % more than the best is 0.9 to this power: 0.43."""

_HALF_LIFE_S = 12 * 3600.0
_WINDOW_S = 2.0 * DAY_S

Distrust = Literal["short_history", "not_scored", "coverage", "pinball"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastQuality:
    """Whether a pool's forecast is to be trusted, and the figures behind that: of the largest
    demand over the lead, at ``level``. NaN where nothing is scored yet. Losses are shares of the
    mean demand."""

    trusted: bool
    reason: Distrust | None
    """Why not; ``None`` where it is trusted."""

    level: float
    coverage: float
    pinball: float
    baseline_pinball: float
    scored: int


@dataclass(frozen=True, slots=True)
class _Turnout:
    step: int
    highest: float
    losses: Mapping[str, Floats]
    """By model, ``[level]``."""

    covered: Mapping[str, Floats]


class Scoreboard:
    """The forecasts of one pool that are still open, and how those of the last two days came out.
    Steps are numbered on any even grid, such as Unix time over ``step_s``."""

    def __init__(
        self, lead_steps: int, step_s: float = 60.0, levels: tuple[float, ...] = LEVELS
    ) -> None:
        if lead_steps < 1:
            raise ValueError(f"lead_steps is {lead_steps}, not 1 or more")
        self.lead_steps = lead_steps
        self.levels = levels
        self._half_life = _HALF_LIFE_S / step_s
        self._window = max(int(_WINDOW_S / step_s), 20 * lead_steps)
        self._open: deque[tuple[int, dict[str, Floats]]] = deque(maxlen=lead_steps + 1)
        self._values: dict[int, float] = {}
        self._turnouts: deque[_Turnout] = deque(maxlen=self._window)

    def expect(self, step: int, forecasts: Mapping[str, Forecast]) -> None:
        """Forecasts made when ``step`` had ended: their first step is the next one. Those with a
        shorter horizon than the lead are left out."""
        levels = np.array(self.levels)
        kept = {
            name: np.interp(levels, one.levels, one.maximum(self.lead_steps))
            for name, one in forecasts.items()
            if one.horizon_steps >= self.lead_steps
        }
        if kept:
            self._open.append((step, kept))

    def observe(self, step: int, value: float) -> None:
        """What came in ``step``; NaN is unknown, and what it is part of is not scored."""
        self._values[step] = value
        while self._open and self._open[0][0] + self.lead_steps <= step:
            made, expected = self._open.popleft()
            steps = range(made + 1, made + self.lead_steps + 1)
            came = [self._values.get(one, float("nan")) for one in steps]
            if np.isfinite(came).all():
                self._turnouts.append(self._scored(made, max(came), expected))
        for old in [one for one in self._values if one <= step - self.lead_steps]:
            del self._values[old]

    def _scored(self, step: int, highest: float, expected: Mapping[str, Floats]) -> _Turnout:
        levels = np.array(self.levels)
        return _Turnout(
            step,
            highest,
            {name: pinball(np.array(highest), rows, levels) for name, rows in expected.items()},
            {name: (highest <= rows).astype(np.float64) for name, rows in expected.items()},
        )

    def weights(self, models: Sequence[str]) -> dict[str, float]:
        """How much of the say each model gets, by its recent loss where all were scored: equal
        shares at first, and the more unequal the more was seen."""
        both = [one for one in self._turnouts if all(name in one.losses for name in models)]
        if not both or len(models) < 2:
            return {name: 1.0 / len(models) for name in models}
        age = both[-1].step - np.array([one.step for one in both])
        fading = 0.5 ** (age / self._half_life)
        losses = np.array(
            [float(fading @ [one.losses[name].mean() for one in both]) for name in models]
        )
        seen = float(fading.sum()) / self.lead_steps
        power = _SHARPNESS * seen / (seen + _SCORED_LEAST / 4)
        least = float(losses.min())
        small = 1e-12 + 1e-6 * float(losses.max())
        shares = ((least + small) / (losses + small)) ** power
        return dict(zip(models, (shares / shares.sum()).tolist(), strict=True))

    def quality(self, model: str, level: float, history_days: float) -> ForecastQuality:
        """Whether ``model`` deserves trust at ``level`` (the nearest that is scored)."""
        place = int(np.argmin(np.abs(np.array(self.levels) - level)))
        level = self.levels[place]
        scored = [one for one in self._turnouts if model in one.losses]
        beside = [one for one in scored if BASELINE in one.losses]
        coverage = loss = baseline = float("nan")
        if scored:
            coverage = float(np.mean([one.covered[model][place] for one in scored]))
        if beside:
            mean = max(float(np.mean([one.highest for one in beside])), 1e-300)
            loss = float(np.mean([one.losses[model][place] for one in beside])) / mean
            baseline = float(np.mean([one.losses[BASELINE][place] for one in beside])) / mean
        steps = max((one.step for one in beside), default=0)
        first = min((one.step for one in beside), default=0)
        apart = min(float(len(beside)), (steps - first) / self.lead_steps + 1)
        slack = _COVERAGE_DEVIATIONS * float(np.sqrt(level * (1 - level) / max(apart, 1.0)))
        reason: Distrust | None = None
        if history_days < HISTORY_LEAST_DAYS:
            reason = "short_history"
        elif not beside or apart < _SCORED_LEAST:
            reason = "not_scored"
        elif coverage < level - max(_COVERAGE_SLACK, slack):
            reason = "coverage"
        elif loss > baseline:
            reason = "pinball"
        return ForecastQuality(
            trusted=reason is None,
            reason=reason,
            level=level,
            coverage=coverage,
            pinball=loss,
            baseline_pinball=baseline,
            scored=len(scored),
        )


def mixed(
    history: History, forecasts: Mapping[str, Forecast], weights: Mapping[str, float]
) -> Forecast:
    """One forecast of several, by their weights."""
    parts = [(weights[name], one) for name, one in forecasts.items() if weights.get(name, 0.0) > 0]
    return blended("mix", history, parts)


def rehearsed(
    history: History,
    forecasters: Sequence[Forecaster],
    lead_steps: int,
    origins: int = 40,
) -> Scoreboard:
    """A scoreboard of what forecasts of the last two days would have been, so that a pool with
    history need not wait two days for trust. Each origin costs a refit of each model: this is work
    for a worker process. Origins are spread evenly; without room for one the board is empty."""
    board = Scoreboard(lead_steps, history.step_s)
    count = len(history.values)
    window = int(_WINDOW_S / history.step_s)
    first = max(count // 2, count - window)
    last = count - lead_steps
    if first < 1 or last < first:
        return board
    for start in np.unique(np.linspace(first, last, origins).astype(int)).tolist():
        past = History(
            values=history.values[:start], step_s=history.step_s, start_s=history.start_s
        )
        made: dict[str, Forecast] = {}
        for forecaster in forecasters:
            try:
                made[forecaster.name] = forecaster.forecast(past, lead_steps, LEVELS)
            except ValueError:
                continue
        board.expect(start - 1, made)
        for step in range(start, start + lead_steps):
            board.observe(step, float(history.values[step]))
    return board
