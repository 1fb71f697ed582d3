"""What is known at each step of a history: level, volatility, and what past periods did next.

All of it is in square-root space, where the spread of counts does not depend on their level, and
each row uses only steps up to its own.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from forecaster.types import DAY_S, Floats

Steps = NDArray[np.int_]

_LEVEL_WINDOWS_S = (60, 120, 180, 300, 480, 900, 1800, 3600, 7200, 21_600, DAY_S)
_WINDOWS_SEEN = 7
"""How often a window must fit into the history to be of use: its mean has to have varied."""

_BASE_WINDOW_S = 300
_VOLATILITY_WINDOWS_S = (900, 3600, 14_400)
_PERIODS_SEEN = 7
_HARMONICS = 4
_DAYS_FOR_HARMONICS = 4


def trailing_mean(values: Floats, steps: int) -> Floats:
    """The mean of each step and those before it, ``steps`` together or as many as there are."""
    return _mean_until(_heaped(values), np.arange(len(values)), steps)


def _heaped(values: Floats) -> Floats:
    return np.concatenate([[0.0], np.cumsum(values)])


def _mean_until(heaped: Floats, at: Steps, steps: int) -> Floats:
    """Means of the ``steps`` up to and with each of ``at``, from the sums of all before."""
    end = at + 1
    begin = np.maximum(end - steps, 0)
    return np.asarray((heaped[end] - heaped[begin]) / (end - begin))


def centred_mean(values: Floats, half: int) -> Floats:
    """The mean of each step and the ``half`` before and after it, as far as there are."""
    heaped = _heaped(values)
    at = np.arange(len(values))
    begin, end = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return np.asarray((heaped[end] - heaped[begin]) / (end - begin))


def _row_medians(table: Floats) -> Floats:
    """The median of what is known in each row; NaN where nothing is."""
    table = np.sort(table, axis=1)
    counts = np.isfinite(table).sum(axis=1)
    rows = np.arange(len(table))
    low = table[rows, np.maximum((counts - 1) // 2, 0)]
    high = table[rows, np.minimum(counts // 2, table.shape[1] - 1)]
    return np.asarray(np.where(counts > 0, (low + high) / 2, np.nan))


class _Season:
    """What earlier periods had at each step, by a robust profile and by the last one alone."""

    def __init__(self, root: Floats, period: int, *, all_steps: bool) -> None:
        self._period = period
        self._half = period // 192
        self._smooth = centred_mean(root, self._half)
        self._profile: Floats | None = None
        if all_steps:
            self._profile = self._median_at(np.arange(len(root) + period))

    def columns(self, lead: int, at: Steps) -> tuple[Floats, Floats, Floats]:
        """Of each of these steps: the change that past periods had over the lead, by the profile
        and by the last one alone, and their level then. NaN where there was none."""
        period = self._period
        back = -(-(lead + self._half) // period)
        then = self._profile_at(at + lead - (back - 1) * period)
        now = self._profile_at(at)
        last_then = _taken(self._smooth, at + lead - back * period)
        last_now = _taken(self._smooth, at - back * period)
        return then - now, last_then - last_now, then

    def _profile_at(self, at: Steps) -> Floats:
        return self._median_at(at) if self._profile is None else _taken(self._profile, at)

    def _median_at(self, at: Steps) -> Floats:
        """The median of up to ``_PERIODS_SEEN`` periods before each of these steps, of which one
        period at most may be after the last known."""
        passed = np.column_stack(
            [
                np.where(
                    at - k * self._period + self._half < len(self._smooth),
                    _taken(self._smooth, at - k * self._period),
                    np.nan,
                )
                for k in range(1, _PERIODS_SEEN + 1)
            ]
        )
        return _row_medians(passed)


def _taken(values: Floats, at: Steps) -> Floats:
    return np.where((at >= 0) & (at < len(values)), values[np.clip(at, 0, len(values) - 1)], np.nan)


class FeatureTable:
    """The features of the steps of a history without gaps: those that every lead shares, and those
    of one lead. ``moves`` are differences from the level of the last minutes."""

    def __init__(
        self,
        root: Floats,
        step_s: float,
        periods: tuple[int, ...],
        learned_of: int,
        *,
        last_only: bool = False,
    ) -> None:
        """``root`` is the square root of the values; ``periods`` are in steps. Which features there
        are depends on how many steps are learned of, which may be fewer than there are. A row for
        each step, or with ``last_only`` one for the last."""
        windows = sorted(
            {
                max(1, round(window / step_s))
                for window in _LEVEL_WINDOWS_S
                if window * _WINDOWS_SEEN <= learned_of * step_s
            }
            | {1}
        )
        self._at = np.arange(len(root) - 1 if last_only else 0, len(root))
        heaped, squares = _heaped(root), _heaped(root * root)
        levels = [_mean_until(heaped, self._at, window) for window in windows]
        self.base = _mean_until(heaped, self._at, max(1, round(_BASE_WINDOW_S / step_s)))
        """The level that forecasts start from."""

        self.moves = np.column_stack([level - self.base for level in levels])
        day = round(DAY_S / step_s)
        plain = [self.base]
        if day in periods and learned_of >= _DAYS_FOR_HARMONICS * day:
            # A sine and a cosine span every shift, so that one pair serves all leads.
            phase = 2 * np.pi * self._at / day
            for harmonic in range(1, _HARMONICS + 1):
                plain += [np.sin(harmonic * phase), np.cos(harmonic * phase)]
        self.plain = np.column_stack(plain)
        small = 0.02 * float(root.mean()) + 1e-12
        volatility = [
            np.sqrt(
                np.maximum(
                    _mean_until(squares, self._at, one) - _mean_until(heaped, self._at, one) ** 2,
                    0.0,
                )
            )
            for one in sorted({max(3, round(window / step_s)) for window in _VOLATILITY_WINDOWS_S})
        ]
        self.sizes = np.column_stack(
            [np.log(one + small / 20) for one in volatility]
            + [np.log(one + small) for one in levels[::3]]
        )
        """What the size of errors depends on, beside the moves: the logarithms of volatility and
        level."""

        self._seasons = [_Season(root, period, all_steps=not last_only) for period in periods]

    def of_lead(self, lead: int) -> tuple[Floats, Floats]:
        """``moves`` and ``plain`` of one lead: what past periods did over it."""
        moves, plain = [], []
        for season in self._seasons:
            change, last_change, then = season.columns(lead, self._at)
            moves += [np.nan_to_num(one) for one in (change, last_change)]
            moves.append(np.where(np.isfinite(then), then - self.base, 0.0))
            plain.append(np.where(np.isfinite(then), then, self.base))
        empty = np.empty((len(self.base), 0))
        return (np.column_stack(moves), np.column_stack(plain)) if moves else (empty, empty)
