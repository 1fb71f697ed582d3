"""What is known at each step of a history: level, volatility, and what past periods did next.

All of it is in square-root space, where the spread of counts does not depend on their level, and
each row uses only steps up to its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from forecaster.types import DAY_S, Floats

_LEVEL_WINDOWS_S = (60, 120, 180, 300, 480, 900, 1800, 3600, 7200, 21_600, DAY_S)
_WINDOWS_SEEN = 7
"""How often a window must fit into the history to be of use: its mean has to have varied."""

_BASE_WINDOW_S = 300
_VOLATILITY_WINDOWS_S = (900, 3600, 14_400)
_PERIODS_SEEN = 7
_HARMONICS = 4
_DAYS_FOR_HARMONICS = 4
_LINEAR_TO = 2.0
"""Usual moves up to which a move counts by its size."""


def trailing_mean(values: Floats, steps: int) -> Floats:
    """The mean of each step and those before it, ``steps`` together or as many as there are."""
    heaped = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - steps, 0)
    return np.asarray((heaped[end] - heaped[begin]) / (end - begin))


def centred_mean(values: Floats, half: int) -> Floats:
    """The mean of each step and the ``half`` before and after it, as far as there are."""
    heaped = np.concatenate([[0.0], np.cumsum(values)])
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


@dataclass(frozen=True, slots=True)
class _Season:
    """What earlier periods had at each step, by a robust profile and by the last one alone."""

    period: int
    half: int
    profile: Floats
    """Of each step to one period after the last: the median of the periods before it."""

    smooth: Floats

    def columns(self, lead: int) -> tuple[Floats, Floats, Floats]:
        """Of each step: the change that past periods had over the lead, by the profile and by the
        last one alone, and their level then. NaN where there was none."""
        steps = np.arange(len(self.smooth))
        back = -(-(lead + self.half) // self.period)
        then = _taken(self.profile, steps + lead - (back - 1) * self.period)
        now = _taken(self.profile, steps)
        last_then = _taken(self.smooth, steps + lead - back * self.period)
        last_now = _taken(self.smooth, steps - back * self.period)
        return then - now, last_then - last_now, then


def _taken(values: Floats, at: np.ndarray) -> Floats:
    return np.where((at >= 0) & (at < len(values)), values[np.clip(at, 0, len(values) - 1)], np.nan)


def _season(root: Floats, period: int) -> _Season:
    half = period // 192
    smooth = centred_mean(root, half)
    steps = np.arange(len(root) + period)
    passed = np.column_stack(
        [
            np.where(
                steps - k * period + half < len(root), _taken(smooth, steps - k * period), np.nan
            )
            for k in range(1, _PERIODS_SEEN + 1)
        ]
    )
    return _Season(period, half, _row_medians(passed), smooth)


class FeatureTable:
    """The features of each step of a history without gaps: those that every lead shares, and those
    of one lead. ``moves`` are differences from the level of the last minutes; there a burst is a
    hundred times an ordinary value, so they are used by their size's logarithm (arsinh)."""

    def __init__(
        self, root: Floats, step_s: float, periods: tuple[int, ...], learned_of: int
    ) -> None:
        """``root`` is the square root of the values; ``periods`` are in steps. Which features there
        are depends on how many steps are learned of, which may be fewer than there are."""
        windows = sorted(
            {
                max(1, round(window / step_s))
                for window in _LEVEL_WINDOWS_S
                if window * _WINDOWS_SEEN <= learned_of * step_s
            }
            | {1}
        )
        levels = [trailing_mean(root, window) for window in windows]
        self.base = trailing_mean(root, max(1, round(_BASE_WINDOW_S / step_s)))
        """The level that forecasts start from."""

        day = round(DAY_S / step_s)
        moves = [level - self.base for level in levels]
        self.moves = np.column_stack([_squashed(move) for move in moves])
        plain = [self.base]
        if day in periods and learned_of >= _DAYS_FOR_HARMONICS * day:
            # A sine and a cosine span every shift, so that one pair serves all leads.
            phase = 2 * np.pi * np.arange(len(root)) / day
            for harmonic in range(1, _HARMONICS + 1):
                plain += [np.sin(harmonic * phase), np.cos(harmonic * phase)]
        self.plain = np.column_stack(plain)
        squares = root * root
        small = 0.02 * float(root.mean()) + 1e-12
        volatility = [
            np.sqrt(np.maximum(trailing_mean(squares, one) - trailing_mean(root, one) ** 2, 0.0))
            for one in sorted({max(3, round(window / step_s)) for window in _VOLATILITY_WINDOWS_S})
        ]
        self.spread = np.column_stack(
            [np.log(one + small / 20) for one in volatility]
            + [np.log(one + small) for one in levels[::3]]
            + [np.log(np.abs(self.moves[:, one]) + 0.3) for one in (0, len(windows) // 2, -1)]
        )
        """What the size of errors depends on: the logarithms of volatility, level and moves."""

        self._seasons = [_season(root, period) for period in periods]

    def of_lead(self, lead: int) -> tuple[Floats, Floats]:
        """``moves`` and ``plain`` of one lead: what past periods did over it."""
        moves, plain = [], []
        for season in self._seasons:
            change, last_change, then = season.columns(lead)
            moves += [_squashed(np.nan_to_num(one)) for one in (change, last_change)]
            moves.append(_squashed(np.where(np.isfinite(then), then - self.base, 0.0)))
            plain.append(np.where(np.isfinite(then), then, self.base))
        empty = np.empty((len(self.base), 0))
        return (np.column_stack(moves), np.column_stack(plain)) if moves else (empty, empty)


def _squashed(move: Floats) -> Floats:
    usual = 1.4826 * float(np.median(np.abs(move))) + 0.1 * float(move.std()) + 1e-9
    return np.asarray(_LINEAR_TO * np.arcsinh(move / (_LINEAR_TO * usual)))
