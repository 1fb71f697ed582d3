"""How forecasts of a pool turned out: weights for mixing models, and whether to trust them at all.

What is provisioned is the largest demand over the lead, so that is what is scored: its pinball loss
and coverage, beside those of the last value. All sums fade by half in a day, so that a pool needs
a few hundred bytes, and a forecast that was wrong is forgiven.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from forecaster.calibrate import blended
from forecaster.types import DAY_S, Floats, Forecast, History, pinball

LEVELS = (0.5, 0.75, 0.9, 0.95, 0.975)
BASELINE = "last_value"
SCORED_LEAST = 20.0
"""Leads that do not overlap: forecasts made each minute for fifteen are one in fifteen."""

_HALF_LIFE_S = DAY_S
_COVERAGE_SLACK = 0.03
_COVERAGE_DEVIATIONS = 2.0
_LOSS_MOST = 1.05
"""Times the last value's. A mix that has learned to be the last value is as good as it."""
_LOSS_CLEARLY_LESS = 0.9
"""Times the last value's: what comes is above such a forecast more often than it says, and yet who
goes by it is better off. Both are of the same quantile."""

_NEGLIGIBLE = 0.005
"""The part of demand by which a forecast may be off without being wrong: demand that hardly moves
is foretold so well by its last value that nothing is better, and it does not matter."""

_SHARPNESS = 4.0
"""The weight of a model that loses 10 % more than the best is 0.9 to this power: 0.66."""

_REHEARSED_S = 2.0 * DAY_S
_REHEARSED_ORIGINS = 40
_REFIT_ORIGINS = 10

Distrust = Literal["coverage", "pinball"]
MakeForecasts = Callable[[History, bool], Mapping[str, Forecast]]
"""The forecasts of what follows a history, by model; true asks to learn from it anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForecastQuality:
    """How a model's forecasts of the largest demand over the lead came out, at ``level``. NaN where
    that is not known yet."""

    reason: Distrust | None
    """Why the forecast is not to be trusted; ``None`` where nothing speaks against it."""

    level: float
    scored: int
    """Forecasts whose lead has passed."""

    apart: float
    """How many leads that do not overlap they are worth, the older the less."""

    coverage: float
    """The part of them that what came was not above, by more than half a percent."""

    loss_ratio: float
    """Their pinball loss in parts of that of the last value."""

    covered: int
    """Of all that were scored; so are the two sums, which are in the unit of the demand."""
    loss_sum: float
    baseline_loss_sum: float


class _Record:
    """One model's sums by level."""

    __slots__ = ("apart", "count", "demand", "faded", "step", "sums", "weight")

    def __init__(self, levels: int) -> None:
        self.faded = np.zeros((3, levels))
        """Own losses and those of the last value where both were scored; covered."""
        self.sums = np.zeros((3, levels))
        """The same, not faded."""
        self.demand = 0.0
        """What came, summed and faded."""
        self.weight = self.apart = 0.0
        self.count = 0
        self.step: int | None = None


class Scoreboard:
    """The forecasts of one pool that are still open, and how those of the last days came out.
    Steps are numbered on any even grid, such as Unix time over ``step_s``."""

    def __init__(
        self, lead_steps: int, step_s: float = 60.0, levels: tuple[float, ...] = LEVELS
    ) -> None:
        if lead_steps < 1:
            raise ValueError(f"lead_steps is {lead_steps}, not 1 or more")
        self.lead_steps = lead_steps
        self.step_s = step_s
        self.levels = levels
        self._levels = np.array(levels)
        self._half_life = _HALF_LIFE_S / step_s
        self._open: deque[tuple[int, dict[str, Floats]]] = deque(maxlen=lead_steps + 1)
        self._values: deque[tuple[int, float]] = deque(maxlen=lead_steps + 1)
        self._records: dict[str, _Record] = {}

    def expect(self, step: int, forecasts: Mapping[str, Forecast]) -> None:
        """Forecasts made when ``step`` had ended: their first step is the next one. Those with a
        shorter horizon than the lead are left out."""
        kept = {
            name: np.interp(self._levels, one.levels, one.maximum(self.lead_steps))
            for name, one in forecasts.items()
            if one.horizon_steps >= self.lead_steps
        }
        if kept:
            self._open.append((step, kept))

    def observe(self, step: int, value: float) -> None:
        """What came in ``step``; NaN is unknown, and what it is part of is not scored."""
        self._values.append((step, value))
        while self._open and self._open[0][0] + self.lead_steps <= step:
            made, expected = self._open.popleft()
            came = [value for at, value in self._values if made < at <= made + self.lead_steps]
            if len(came) == self.lead_steps and all(map(math.isfinite, came)):
                self._score(made, max(came), expected)

    def _score(self, step: int, highest: float, expected: Mapping[str, Floats]) -> None:
        losses = {
            name: pinball(np.array(highest), rows, self._levels) for name, rows in expected.items()
        }
        baseline = losses.get(BASELINE)
        for name, rows in expected.items():
            record = self._records.get(name)
            if record is None:
                record = self._records[name] = _Record(len(self.levels))
            passed = self.lead_steps if record.step is None else step - record.step
            fading = 0.5 ** (passed / self._half_life)
            record.step = step
            record.count += 1
            record.weight = record.weight * fading + 1.0
            record.apart = record.apart * fading + min(1.0, passed / self.lead_steps)
            own = losses[name]
            both = (own, baseline) if baseline is not None else (0.0 * own, 0.0 * own)
            news = np.array([*both, highest <= rows * (1.0 + _NEGLIGIBLE)])
            record.demand = record.demand * fading + highest
            record.faded = record.faded * fading + news
            record.sums += news

    def weights(self, prior: Mapping[str, float]) -> dict[str, float]:
        """How much of the say each model gets: the ``prior`` at first, and the more was seen the
        more by its recent loss beside that of the last value. A model of which nothing was scored
        yet has its prior."""
        records = {name: self._records.get(name) for name in prior}
        ratios = {
            name: float((one.faded[0, some] / one.faded[1, some]).mean())
            for name, one in records.items()
            if one is not None and (some := one.faded[1] > 0.0).any()
        }
        least = min(ratios.values(), default=1.0)
        shares = {}
        for name, share in prior.items():
            record, ratio = records[name], ratios.get(name)
            if record is not None and ratio is not None:
                power = _SHARPNESS * record.apart / (record.apart + SCORED_LEAST)
                share *= ((least + 1e-6) / (ratio + 1e-6)) ** power
            shares[name] = share
        whole = sum(shares.values())
        return {name: share / whole for name, share in shares.items()}

    def quality(self, model: str, level: float = 0.95) -> ForecastQuality:
        """How the forecasts of ``model`` came out at ``level`` (the nearest that is scored)."""
        place = int(np.argmin(np.abs(self._levels - level)))
        level = self.levels[place]
        record = self._records.get(model)
        coverage = ratio = math.nan
        if record is None:
            record = _Record(len(self.levels))
        loss, baseline, covered = record.faded[:, place].tolist()
        reason: Distrust | None = None
        if record.apart >= SCORED_LEAST:
            coverage = covered / record.weight
            if baseline > 0.0:
                ratio = loss / baseline
            nothing = (1.0 - level) * _NEGLIGIBLE * record.demand  # of a forecast too high by that
            deviation = math.sqrt(level * (1.0 - level) / record.apart)
            short = coverage < level - max(_COVERAGE_SLACK, _COVERAGE_DEVIATIONS * deviation)
            if short and not ratio < _LOSS_CLEARLY_LESS:
                reason = "coverage"
            elif ratio > _LOSS_MOST and loss - baseline > nothing:
                reason = "pinball"
        return ForecastQuality(
            reason=reason,
            level=level,
            scored=record.count,
            apart=record.apart,
            coverage=coverage,
            loss_ratio=ratio,
            covered=round(record.sums[2, place]),
            loss_sum=float(record.sums[0, place]),
            baseline_loss_sum=float(record.sums[1, place]),
        )


def mixed(
    history: History,
    forecasts: Mapping[str, Forecast],
    weights: Mapping[str, float],
    name: str = "mix",
) -> Forecast:
    """One forecast of several, by their weights."""
    parts = [(weights[one], made) for one, made in forecasts.items() if weights.get(one, 0.0) > 0]
    return blended(name, history, parts)


def rehearse(
    board: Scoreboard, history: History, make: MakeForecasts, first_step: int = 0
) -> Iterator[int]:
    """Score what forecasts of the last two days would have been, so that a pool with history need
    not wait two days for trust. ``first_step`` is the number of the history's first step.

    At most 40 points are spread evenly; models learn anew at each tenth of them, from what was
    known then. Each is one turn of the iterator, which says how many are left: a turn costs a
    forecast or a fit of each model, so the work can be done a little at a time.
    """
    values, lead = history.values, board.lead_steps
    count = len(values)
    first = max(count // 2, count - int(_REHEARSED_S / history.step_s))
    last = count - lead
    if first < 1 or last < first:
        return
    origins = min(_REHEARSED_ORIGINS, max(1, (last - first) // lead))
    starts = np.unique(np.linspace(first, last, origins).astype(int)).tolist()
    for place, start in enumerate(starts):
        past = replace(history, values=values[:start])
        if np.isfinite(values[start : start + lead]).all():
            with contextlib.suppress(ValueError):  # nothing was known then
                board.expect(first_step + start - 1, make(past, place % _REFIT_ORIGINS == 0))
            for step in range(start, start + lead):
                board.observe(first_step + step, float(values[step]))
        yield len(starts) - place - 1
