"""Our own model: for each lead a regression on what is known now, with the spread of its errors.

For each lead ``h`` of a grid, and for both the value at ``h`` and the largest value until ``h``:

1. The square root of the target, less the level of the last minutes, is regressed on the features
   (ridge, recent rows weigh more).
2. The logarithm of the size of the errors is regressed on volatility and level, because errors are
   larger in some hours than in others.
3. Errors divided by that size are a sample; its weighted quantiles, recent rows first, times the
   size expected now, make the quantiles (conformal prediction on standardised errors).

All errors are of rows that the regression did not see: a day is left out at a time, which costs
one small system of equations a day, because the products that a regression needs are sums over
days. docs/reference/forecasting.md has the features, the sources and what was measured.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from forecaster.calibrate import (
    lead_grid,
    made_forecast,
    over_steps,
    targets,
    weighted_quantiles,
)
from forecaster.models.features import FeatureTable
from forecaster.types import DAY_S, QUANTILES, Floats, Forecast, History

_ROWS_MOST = 10_080
_ROWS_LEAST = 120
_BLOCKS = 7
_RIDGE = 3e-3
_RIDGE_OVERLAP = 300.0
"""Rows less than a lead apart share their target: a short history says little of a long lead."""

_RIDGE_SPREAD = 1e-2
_HALF_LIFE_DAYS = 7.0
_HALF_LIVES_ERRORS_DAYS = (0.4, 3.0)
"""A change of regime within hours, and enough errors for the tails: the mean of both quantiles."""

_MOST_DEVIATIONS = 6.0
_PIECE_ROWS = 128
_STEPS_OF_A_LEAD = 8
_STRIDE_MOST = 6
"""Rows of a long lead overlap: an eighth of the lead apart they say as much."""

_MEAN_LEVELS = np.linspace(0.01, 0.99, 50)


@dataclass(frozen=True, slots=True)
class Direct:
    """The direct model. ``periods`` are the seasons to look at, in steps; ``None``: a day, where
    the history has two."""

    periods: tuple[int, ...] | None = None
    name: str = "direct"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Raises ``ValueError`` where fewer than 120 steps are left to learn from."""
        known = np.flatnonzero(np.isfinite(history.values))
        if len(known) < _ROWS_LEAST:
            raise ValueError(f"{len(known)} known steps, fewer than {_ROWS_LEAST}")
        values = history.values[known[0] :]
        unit = float(np.sqrt(np.nanmean(values))) or 1.0
        root = np.sqrt(values) / unit
        steps = np.arange(len(root))
        good = np.isfinite(root)
        filled = np.interp(steps, steps[good], root[good])
        day = round(DAY_S / history.step_s)
        periods = self.periods
        if periods is None:
            periods = (day,) if len(root) >= 3 * day else ()
        table = FeatureTable(filled, history.step_s, periods)
        leads = tuple(
            lead
            for lead in lead_grid(horizon_steps)
            if len(root) - lead >= max(_ROWS_LEAST, 2 * lead) or lead == 1
        )
        wanted = np.concatenate([levels, _MEAN_LEVELS])
        fit = _Fit(root, table, day)
        found = np.array([fit.quantiles(lead, wanted) for lead in leads])  # [lead, level, target]
        found = np.clip(found, 0.0, 2.0 * float(np.max(filled))) ** 2 * unit**2
        count = len(levels)
        rows = over_steps(found[:, :, 0].T, leads, horizon_steps)
        tops = over_steps(found[:, :count, 1].T, leads, horizon_steps)
        return made_forecast(
            self.name, history, levels, rows[:count], rows[count:].mean(axis=0), tops
        )


class _Fit:
    """The regressions of one history. ``root`` may have gaps, the table has none."""

    def __init__(self, root: Floats, table: FeatureTable, day: int) -> None:
        self._root = root
        self._table = table
        self._first = max(0, len(root) - _ROWS_MOST)
        self._age = (len(root) - 1 - np.arange(len(root))) / day
        ones = np.ones((len(root) - self._first, 1))
        shared = self._columns(table.moves, table.plain)
        self._shared = np.hstack([shared, ones])
        self._spread = np.hstack([_standardised(table.spread[self._first :]), ones])

    def _columns(self, moves: Floats, plain: Floats) -> Floats:
        # Moves keep their zero: no move is no reason to move.
        deviation = np.sqrt(np.mean(moves[self._first :] ** 2, axis=0))
        flat = deviation <= 1e-9
        return np.hstack(
            [
                moves[self._first :] / np.where(flat, np.inf, deviation),
                _standardised(plain[self._first :]),
            ]
        )

    def quantiles(self, lead: int, wanted: Floats) -> Floats:
        """``[level, target]`` in square-root space; the targets are the value at the lead, and the
        largest until it."""
        first, end = self._first, len(self._root) - lead
        stride = int(np.clip(lead // _STEPS_OF_A_LEAD, 1, _STRIDE_MOST))
        first += (end - 1 - first) % stride
        rows = slice(first, end, stride)
        both = np.column_stack(targets(self._root, lead))[rows] - self._table.base[rows, None]
        known = np.isfinite(both).all(axis=1)
        both[~known] = 0.0
        weights = known * 0.5 ** (self._age[rows] / _HALF_LIFE_DAYS)
        count = len(weights)
        edges = np.linspace(0, count, max(2, min(_BLOCKS, count // 60)) + 1).astype(int)
        blocks = [slice(a, b) for a, b in itertools.pairwise(edges)]
        columns = np.hstack([self._columns(*self._table.of_lead(lead)), self._shared])
        inside = slice(first - self._first, end - self._first, stride)
        penalty = _RIDGE * (1.0 + _RIDGE_OVERLAP * lead / len(self._root))
        guess, errors = _ridge(columns[inside], columns[-1], both, weights, blocks, penalty)
        small = 0.1 * np.median(np.abs(errors), axis=0) + 1e-9
        sizes = np.log(np.abs(errors) + small)
        size, missed = _ridge(
            self._spread[inside], self._spread[-1], sizes, weights, blocks, _RIDGE_SPREAD
        )
        scaled = (errors / np.exp(sizes - missed))[known]
        age = self._age[rows][known]
        sample = np.mean(
            [
                [weighted_quantiles(row, 0.5 ** (age / half_life), wanted) for row in scaled.T]
                for half_life in _HALF_LIVES_ERRORS_DAYS
            ],
            axis=0,
        )
        spread = np.exp(size) * sample.T
        return np.asarray(self._table.base[-1] + guess + spread)


def _standardised(columns: Floats) -> Floats:
    """With mean 0 and deviation 1; what hardly moves becomes 0."""
    mean, deviation = columns.mean(axis=0), columns.std(axis=0)
    flat = deviation <= 1e-9 * (1.0 + np.abs(mean))
    scaled = (columns - mean) / np.where(flat, np.inf, deviation)
    return np.asarray(np.clip(scaled, -_MOST_DEVIATIONS, _MOST_DEVIATIONS))


def _ridge(
    seen: Floats,
    last: Floats,
    wanted: Floats,
    weights: Floats,
    blocks: list[slice],
    penalty: float,
) -> tuple[Floats, Floats]:
    """What is expected at the features ``last`` (``[target]``), and the errors ``[row, target]`` of
    regressions that had not seen their block. The last column is the one that is not shrunk."""
    weighed = seen * weights[:, None]
    shrink = np.eye(seen.shape[1]) * penalty * weights.sum()
    shrink[-1, -1] = 1e-9
    products = [_product(weighed[block], seen[block]) for block in blocks]
    sides = [_product(weighed[block], wanted[block]) for block in blocks]
    product, side = np.sum(products, axis=0), np.sum(sides, axis=0)
    errors = np.empty_like(wanted)
    for block, own_product, own_side in zip(blocks, products, sides, strict=True):
        found = np.linalg.solve(product - own_product + shrink, side - own_side)
        errors[block] = wanted[block] - seen[block] @ found
    expected: Floats = last @ np.linalg.solve(product + shrink, side)
    return expected, errors


def _product(left: Floats, right: Floats) -> Floats:
    """``left.T @ right``, in pieces that are too small for BLAS to share among threads: threads
    that wait for each other on busy cores made it ten times slower than one."""
    whole = len(left) - len(left) % _PIECE_ROWS
    pieces = left[:whole].reshape(-1, _PIECE_ROWS, left.shape[1]).transpose(0, 2, 1)
    others = right[:whole].reshape(-1, _PIECE_ROWS, right.shape[1])
    return np.asarray((pieces @ others).sum(axis=0) + left[whole:].T @ right[whole:])
