"""What is expected of a pool, from its past: experts' forecasts, mixed by how they turned out, and
whether to trust the mix. Needs numpy.

What has to be provisioned is demand at its highest until a replica that is asked for now would
serve. A minute grid says nothing of the next ten seconds, so for a lead below a minute the forecast
is made of the finer grid of the last hours.

A forecast that is trusted when it should not be costs more than it brings. So each is scored when
the time that it was for has passed, beside the last value. It is left aside while the pool's
history is short, while what came is above of its quantile too often, and while simply assuming the
last value had been better. A pool that comes with a past is scored on that first, a little at each
forecast. The control process and the replay both run this.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from autoscaler.types import FINE_LEAD_S, ForecastTally, FurtherForecast, Outlook
from forecaster.calibrate import later
from forecaster.cron import RecurringWindow
from forecaster.hints import with_hints
from forecaster.models.automatic import Automatic, AutomaticFit
from forecaster.models.last_value import LastValue
from forecaster.scoreboard import BASELINE, Scoreboard, mixed, rehearse
from forecaster.types import Floats, Forecast, History

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.965, 0.98, 0.99, 0.995)
"""The quantiles that are asked for: dense where costs are weighed against violations."""
MIX = "mix"
HISTORY_LEAST_S = 172_800.0
REFIT_STEPS = 60
REFIT_PART = 24
"""A fit is kept for this part of the history that it was made of, at most."""
SLOW_PRIOR = 0.1
"""The say of a slow model before any of its forecasts was scored, the others have 1 together."""
LEAD_CHANGE_MOST = 1.34
"""Scores are kept while the lead changes by no more: a wake takes a little longer each time."""
REHEARSED_A_TURN = 8
"""Of 40 points of the past, so that no other pool waits for longer than a second."""
FURTHER_STEPS = (1, 5, 15)
"""Minutes ahead that are forecast beside the lead."""
FEW = 0.1
LEAST_TOKENS_PER_S = 0.1


class OutlookMaker:
    """Makes the outlooks of one pool. What was learned of its past is kept for ``REFIT_STEPS``
    steps (regressions change slowly, and cost several times what a forecast does), how forecasts
    turned out for good."""

    def __init__(self, history_least_s: float = HISTORY_LEAST_S) -> None:
        self.history_least_s = history_least_s
        self.hints: Sequence[RecurringWindow] = ()
        """Windows in which the operator expects the demand of earlier ones, at least."""
        self.slow: Mapping[str, Forecast] = {}
        """By model, forecasts of an earlier history, which are too slow to be made each time."""
        self._track: _Track | None = None
        self._before = ForecastTally()
        """Of earlier tracks."""
        self._further_experts = _Experts()
        self._further: tuple[int, tuple[FurtherForecast, ...]] = (-1, ())
        """The newest, and the step after the history that they are of."""

    def make(
        self, minutes: History, fine: History, lead_s: float, now_s: float, so_far: float = math.nan
    ) -> Outlook:
        """The outlook of the pool at ``now_s``.

        ``minutes`` and ``fine`` are tokens per second by minute and by ``FINE_STEP_S``, up to now;
        those of one pool are of one clock. ``so_far`` is the rate of the minute that runs; such an
        outlook is not scored. Raises ``ValueError`` where the one that is needed has
        no known value.
        """
        short = lead_s < FINE_LEAD_S
        history = fine if short else minutes
        steps = math.ceil(lead_s / history.step_s) + 1
        track = self._track
        if track is None or not track.goes_on(history, steps):
            self._before = self._tally()
            track = self._track = _Track(history, steps)
        track.hints, track.slow = self.hints, self.slow
        found, weights = track.follow(history, steps, math.nan if short else so_far)
        quality = track.board.quality(MIX)
        known_s = float(np.isfinite(minutes.values).sum()) * minutes.step_s
        least_s = self.history_least_s
        distrust = ""
        if known_s < least_s:
            distrust = f"{known_s / 3600:.1f} h of history, {least_s / 3600:g} h are needed"
        elif track.rehearsing:
            distrust = "how forecasts of its past turn out is being tried"
        elif quality.reason == "coverage":
            distrust = (
                f"only {quality.coverage:.0%} of its recent forecasts covered what came, "
                f"{quality.level:.0%} should"
            )
        elif quality.reason == "pinball":
            distrust = (
                "the last value was better than the forecast of late "
                f"(loss {quality.loss_ratio:.2f} times its)"
            )
        return Outlook(
            made_at_s=now_s,
            model=found.model,
            lead_s=lead_s,
            levels=found.levels,
            tokens_per_s=tuple(float(rate) for rate in found.maximum(steps)),
            distrust=distrust,
            least_tokens_per_s=find_least(history.values),
            step_s=history.step_s,
            scored=quality.scored,
            coverage=_known(quality.coverage),
            loss_ratio=_known(quality.loss_ratio),
            weights=weights,
            tally=self._tally(),
        )

    @property
    def rehearsing(self) -> bool:
        """Whether the pool's past is still being scored: a few more outlooks, and it is done."""
        return self._track is not None and self._track.rehearsing

    def further(self, minutes: History) -> tuple[FurtherForecast, ...]:
        """The same mix for ``FURTHER_STEPS`` ahead, after an outlook was made. It is made once for
        each minute of the history: a tenth of what an outlook takes."""
        track = self._track
        if track is None:
            raise ValueError("no outlook was made yet")
        end, most = _end(minutes), FURTHER_STEPS[-1]
        if self._further[0] != end:
            if track.board.step_s != minutes.step_s:  # its scores are of seconds
                track = _Track(minutes, most)
                track.hints, track.slow = self.hints, self.slow
            found = track.mix(self._further_experts, minutes, most, False)[MIX]
            self._further = (
                end,
                tuple(
                    FurtherForecast(
                        horizon_s=steps * minutes.step_s,
                        tokens_per_s=tuple(float(rate) for rate in found.maximum(steps)),
                    )
                    for steps in FURTHER_STEPS
                ),
            )
        return self._further[1]

    def ahead(self, history: History, horizon_steps: int) -> Ahead:
        """The same mix for further ahead, after an outlook of this history was made."""
        track, experts = self._track, _Experts()
        if track is None:
            raise ValueError("no outlook was made yet")
        steps = max(horizon_steps, track.board.lead_steps)
        forecast = track.mix(experts, history, steps, False)[MIX]
        return Ahead(forecast=forecast, periods=experts.periods)

    def _tally(self) -> ForecastTally:
        before, track = self._before, self._track
        if track is None:
            return before
        return before + make_tally(track.board).since(track.rehearsed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ahead:
    """A forecast of many steps, for people: scaling needs no more than an outlook. ``periods`` are
    those that were found in the history, in steps, the strongest first."""

    forecast: Forecast
    periods: tuple[int, ...]


def make_tally(board: Scoreboard) -> ForecastTally:
    """How the mixed forecasts turned out."""
    quality = board.quality(MIX)
    return ForecastTally(
        scored=quality.scored,
        covered=quality.covered,
        loss=quality.loss_sum,
        last_value_loss=quality.baseline_loss_sum,
    )


class _Track:
    """The forecasts of one pool on one grid, for leads of about ``steps``."""

    def __init__(self, history: History, steps: int) -> None:
        self.board = Scoreboard(steps, history.step_s)
        self.hints: Sequence[RecurringWindow] = ()
        self.slow: Mapping[str, Forecast] = {}
        self._experts = _Experts()
        self._seen = _end(history)
        first = self._seen - len(history.values)
        rehearsed = _Experts()
        self._rehearsal: Iterator[int] = rehearse(
            self.board, history, lambda past, anew: self.mix(rehearsed, past, steps, anew),
            first,
        )  # fmt: skip
        self.rehearsing = True
        self.rehearsed = ForecastTally()
        """What of the board is of the past that it came with."""

    def goes_on(self, history: History, steps: int) -> bool:
        """Whether these scores say something of such a lead, at such a time."""
        lead = self.board.lead_steps
        apart = max(lead, steps) / min(lead, steps)
        passed = _end(history) - self._seen
        same = history.step_s == self.board.step_s and apart <= LEAD_CHANGE_MOST
        return same and 0 <= passed <= len(history.values)

    def follow(
        self, history: History, steps: int, so_far: float
    ) -> tuple[Forecast, dict[str, float]]:
        """The forecast after this history, with what came since the last one taken into account,
        and the parts of the models in it. ``so_far`` (NaN: not known) is the rate in the step that
        runs, which counts where no step has ended since the last forecast."""
        end = _end(history)
        passed = end - self._seen
        if self.rehearsing:
            left = list(itertools.islice(self._rehearsal, REHEARSED_A_TURN))
            self.rehearsing = bool(left and left[-1])
            self.rehearsed = make_tally(self.board)
        else:
            for step in range(end - passed, end):
                self.board.observe(step, float(history.values[step - end]))
        self._seen = end
        steps = max(steps, self.board.lead_steps)
        if not passed and math.isfinite(so_far):
            history = replace(history, values=np.append(history.values, so_far))
        forecasts = self.mix(self._experts, history, steps, False)
        if passed and not self.rehearsing:
            self.board.expect(end - 1, forecasts)
        return forecasts[MIX], self._experts.weights

    def mix(
        self, experts: _Experts, history: History, steps: int, anew: bool
    ) -> dict[str, Forecast]:
        """What each model says, and all together."""
        found = experts.forecasts(history, steps, anew)
        prior = dict(experts.prior)
        for name, made in self.slow.items():
            if (part := later(made, history, steps)) is not None:
                found[name], prior[name] = part, SLOW_PRIOR
        experts.weights = self.board.weights(prior)
        together = mixed(history, found, experts.weights, MIX)
        return found | {MIX: with_hints(together, history, self.hints)}


class _Experts:
    """What forecasts one pool, and what was learned of its past."""

    def __init__(self) -> None:
        self._fit: AutomaticFit | None = None
        self._steps = 0
        self._age = self._end = 0
        self.prior: dict[str, float] = {}
        self.weights: dict[str, float] = {}
        self.periods: tuple[int, ...] = ()

    def forecasts(self, history: History, steps: int, anew: bool) -> dict[str, Forecast]:
        """By model; the last value is always among them."""
        known = int(np.isfinite(history.values).sum())
        # A short history is learned of anew each time: each step of it is news.
        due = anew or self._age >= min(REFIT_STEPS, known // REFIT_PART)
        if self._fit is None or steps > self._steps or due:
            self._fit, self._steps, self._age = Automatic().fit(history, steps), steps, 0
            self.prior = {BASELINE: 0.0} | self._fit.shares
            self.periods = self._fit.periods
        end = _end(history)
        self._age += end != self._end  # the step that runs and then ends is one
        self._end = end
        found = self._fit.parts(history, steps, LEVELS)
        if BASELINE not in found:
            found[BASELINE] = LastValue().forecast(history, steps, LEVELS)
        return found


def _end(history: History) -> int:
    """The number of the step after the last."""
    if history.end_s is None:
        return len(history.values)
    return round(history.end_s / history.step_s)


def _known(value: float) -> float | None:
    return value if math.isfinite(value) else None


def find_least(values: Floats) -> float:
    """What a forecast must come to, to be of any request: half of what the quieter of the steps
    with requests had. A model's mean of many quiet steps and a few busy ones is less."""
    busy = values[values > 0.0]
    return max(LEAST_TOKENS_PER_S, float(np.quantile(busy, FEW)) / 2.0 if len(busy) else 0.0)
