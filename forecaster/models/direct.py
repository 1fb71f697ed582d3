"""Our own model: for each lead a regression on what is known now, with the spread of its errors.

For each lead ``h`` of a grid, and for both the value at ``h`` and the largest value until ``h``:

1. The square root of the target, less the level of the last minutes, is regressed on the features
   (ridge, recent rows weigh more).
2. The logarithm of the size of the errors is regressed on volatility and level, because errors are
   larger in some hours than in others.
3. Errors divided by that size are a sample; its weighted quantiles, recent rows and those of a
   like size first, times the size expected now, make the quantiles (conformal prediction on
   standardised errors, localised).

All errors are of rows that the regression did not see: a day is left out at a time, which costs
one small system of equations a day, because the products that a regression needs are sums over
days. docs/reference/forecasting.md has the features, the sources and what was measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
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

_ANCHORS = (0.1, 0.5, 0.9)
"""Of the sizes of errors that were expected: at each of these quantiles the errors have quantiles
of their own."""

_ELSEWHERE = 0.1
"""The weight of the other errors there."""

_MOST_DEVIATIONS = 6.0
_LINEAR_TO = 2.0
_SMALL_MOVE = 0.3
_PIECE_ROWS = 128
_STEPS_OF_A_LEAD = 8
_STRIDE_MOST = 6
"""Rows of a long lead overlap: an eighth of the lead apart they say as much."""

_LEVELS = np.concatenate(
    [[0.001, 0.0025, 0.005], np.linspace(0.01, 0.99, 99), [0.995, 0.9975, 0.999]]
)
"""Quantiles of errors that a fit keeps; those between are interpolated."""


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
        return self.fit(history, horizon_steps).forecast(history, horizon_steps, levels)

    def fit(self, history: History, horizon_steps: int) -> DirectFit:
        """The regressions, to forecast from this history or from later ends of it. Raises
        ``ValueError`` where fewer than 120 steps are left to learn from."""
        known = np.flatnonzero(np.isfinite(history.values))
        if len(known) < _ROWS_LEAST:
            raise ValueError(f"{len(known)} known steps, fewer than {_ROWS_LEAST}")
        values = history.values[known[0] :]
        unit = float(np.sqrt(np.nanmean(values))) or 1.0
        root, filled = _in_roots(values, unit)
        day = round(DAY_S / history.step_s)
        periods = self.periods
        if periods is None:
            periods = (day,) if len(root) >= 3 * day else ()
        table = FeatureTable(filled, history.step_s, periods, len(root))
        regressions = _Regressions(root, table, day)
        leads = tuple(
            lead
            for lead in lead_grid(horizon_steps)
            if len(root) - lead >= max(_ROWS_LEAST, 2 * lead) or lead == 1
        )
        return DirectFit(
            name=self.name,
            periods=periods,
            unit=unit,
            learned_of=len(root),
            shared=regressions.shared,
            leads={lead: regressions.of_lead(lead) for lead in leads},
        )


@dataclass(frozen=True, slots=True)
class _Moves:
    """How differences become columns of size 1: by their size up to ``_LINEAR_TO`` usual ones, by
    its logarithm beyond (arsinh), for a burst is a hundred times an ordinary one. Zero stays zero:
    no move is no reason to move."""

    usual: Floats
    size: Floats

    @classmethod
    def of(cls, columns: Floats) -> _Moves:
        """Of the rows that are learned from."""
        usual = 1.4826 * np.median(np.abs(columns), axis=0) + 0.1 * columns.std(axis=0) + 1e-9
        moves = cls(usual, np.ones_like(usual))
        deviation = np.sqrt(np.mean(moves(columns) ** 2, axis=0))
        return cls(usual, np.where(deviation <= 1e-9, np.inf, deviation))

    def __call__(self, columns: Floats) -> Floats:
        squashed = _LINEAR_TO * np.arcsinh(columns / (_LINEAR_TO * self.usual))
        return np.asarray(squashed / self.size)


@dataclass(frozen=True, slots=True)
class _Plain:
    """How levels become columns of size 1 around 0; one that hardly moves becomes 0."""

    shift: Floats
    size: Floats

    @classmethod
    def of(cls, columns: Floats) -> _Plain:
        """Of the rows that are learned from."""
        mean, deviation = columns.mean(axis=0), columns.std(axis=0)
        flat = deviation <= 1e-9 * (1.0 + np.abs(mean))
        return cls(mean, np.where(flat, np.inf, deviation))

    def __call__(self, columns: Floats) -> Floats:
        scaled = (columns - self.shift) / self.size
        return np.asarray(np.clip(scaled, -_MOST_DEVIATIONS, _MOST_DEVIATIONS))


@dataclass(frozen=True, slots=True)
class _Shared:
    """The columns that all leads share: for the guess, and for the size of its errors."""

    moves: _Moves
    plain: _Plain
    spread: _Plain

    @classmethod
    def of(cls, table: FeatureTable, seen: slice) -> _Shared:
        moves = _Moves.of(table.moves[seen])
        spread = _Plain.of(_spreads(table, moves)[seen])
        return cls(moves, _Plain.of(table.plain[seen]), spread)

    def __call__(self, table: FeatureTable) -> tuple[Floats, Floats]:
        """For each row of the table; the last column is 1."""
        ones = np.ones((len(table.base), 1))
        guess = np.hstack([self.moves(table.moves), self.plain(table.plain), ones])
        return guess, np.hstack([self.spread(_spreads(table, self.moves)), ones])


def _spreads(table: FeatureTable, moves: _Moves) -> Floats:
    places = [0, table.moves.shape[1] // 2, -1]
    some = moves(table.moves)[:, places]
    return np.hstack([table.sizes, np.log(np.abs(some) + _SMALL_MOVE)])


@dataclass(frozen=True, slots=True)
class _LeadFit:
    """The regressions of one lead. Each has a column for both targets: the value at the lead, and
    the largest until it. ``errors`` are the quantiles ``_LEVELS`` of errors of size 1, by the
    logarithm of the size that was expected (``anchors``): ``[anchor, level, target]``."""

    moves: _Moves
    plain: _Plain
    guess: Floats
    size: Floats
    anchors: Floats
    errors: Floats

    def quantiles(self, table: FeatureTable, shared: tuple[Floats, Floats], lead: int) -> Floats:
        """``[level, target]`` in square-root space, from the last row of a table."""
        moves, plain = table.of_lead(lead)
        columns = np.hstack([self.moves(moves[-1]), self.plain(plain[-1]), shared[0][-1]])
        expected = shared[1][-1] @ self.size
        errors = [
            rows @ _shares(one, at)
            for one, at, rows in zip(expected, self.anchors.T, self.errors.T, strict=True)
        ]
        spread = np.exp(expected) * np.stack(errors, axis=-1)
        return np.asarray(table.base[-1] + columns @ self.guess + spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class DirectFit:
    """What was learned of a history, by lead. The values it was learned of are not kept."""

    name: str
    periods: tuple[int, ...]
    unit: float
    learned_of: int
    shared: _Shared
    leads: Mapping[int, _LeadFit]

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """What follows ``history``, which is that of the fit, or that with more at its end. Beyond
        the longest lead it stays as there."""
        known = np.flatnonzero(np.isfinite(history.values))
        if not len(known):
            raise ValueError("the history has no known value")
        _, filled = _in_roots(history.values[known[0] :], self.unit)
        table = FeatureTable(filled, history.step_s, self.periods, self.learned_of, last_only=True)
        shared = self.shared(table)
        leads = tuple(self.leads)
        found = np.array([fit.quantiles(table, shared, lead) for lead, fit in self.leads.items()])
        found = np.clip(found, 0.0, 2.0 * float(np.max(filled))) ** 2 * self.unit**2
        places = [np.interp(levels, _LEVELS, one) for row in found for one in row.T]
        at_leads = np.array(places).reshape(len(leads), 2, len(levels))
        rows = over_steps(at_leads[:, 0].T, leads, horizon_steps)
        tops = over_steps(at_leads[:, 1].T, leads, horizon_steps)
        mean = over_steps(found[:, _MEAN_FROM:_MEAN_TO, 0].mean(axis=1)[None], leads, horizon_steps)
        return made_forecast(self.name, history, levels, rows, mean[0], tops)


_MEAN_FROM, _MEAN_TO = 3, 102
"""The evenly spaced part of ``_LEVELS``."""


def _in_roots(values: Floats, unit: float) -> tuple[Floats, Floats]:
    """The square roots in parts of ``unit``, with gaps and with gaps filled."""
    root = np.sqrt(values) / unit
    steps = np.arange(len(root))
    good = np.isfinite(root)
    return root, np.interp(steps, steps[good], root[good])


class _Regressions:
    """The regressions of one history. ``root`` may have gaps, the table has none."""

    def __init__(self, root: Floats, table: FeatureTable, day: int) -> None:
        self._root = root
        self._table = table
        self._first = max(0, len(root) - _ROWS_MOST)
        self._age = (len(root) - 1 - np.arange(len(root))) / day
        self.shared = _Shared.of(table, slice(self._first, None))
        self._columns, self._spreads = self.shared(table)

    def of_lead(self, lead: int) -> _LeadFit:
        """The regressions of one lead."""
        first, end = self._first, len(self._root) - lead
        moves, plain = self._table.of_lead(lead)
        own_moves, own_plain = _Moves.of(moves[first:]), _Plain.of(plain[first:])
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
        penalty = _RIDGE * (1.0 + _RIDGE_OVERLAP * lead / len(self._root))
        columns = np.hstack([own_moves(moves[rows]), own_plain(plain[rows]), self._columns[rows]])
        guess, errors = _ridge(columns, both, weights, blocks, penalty)
        small = 0.1 * np.median(np.abs(errors), axis=0) + 1e-9
        sizes = np.log(np.abs(errors) + small)
        size, missed = _ridge(self._spreads[rows], sizes, weights, blocks, _RIDGE_SPREAD)
        expected = (sizes - missed)[known]
        scaled = errors[known] / np.exp(expected)
        anchors = np.quantile(expected, _ANCHORS, axis=0)
        fading = [0.5 ** (self._age[rows][known] / half) for half in _HALF_LIVES_ERRORS_DAYS]
        found = [
            _quantiles_of_errors(*of_target, fading)
            for of_target in zip(scaled.T, expected.T, anchors.T, strict=True)
        ]
        return _LeadFit(own_moves, own_plain, guess, size, anchors, np.stack(found, axis=-1))


def _shares(expected: Floats, anchors: Floats) -> Floats:
    """How much each anchor counts, ``[anchor]`` or ``[anchor, row]``: between two by the distance,
    beyond the outer ones all."""
    return np.array([np.interp(expected, anchors, one) for one in np.eye(len(anchors))])


def _quantiles_of_errors(
    scaled: Floats, expected: Floats, anchors: Floats, fading: list[Floats]
) -> Floats:
    """The quantiles ``[anchor, level]`` of errors of size 1. Those of rows where about as large an
    error was expected weigh most: what errors of silent nights look like says little of the day."""
    order = np.argsort(scaled, kind="stable")
    scaled, expected = scaled[order], expected[order]
    near = _ELSEWHERE + _shares(expected, anchors)
    samples = [
        [weighted_quantiles(scaled, one * weights[order], _LEVELS) for one in near]
        for weights in fading
    ]
    return np.asarray(np.mean(samples, axis=0))


def _ridge(
    seen: Floats,
    wanted: Floats,
    weights: Floats,
    blocks: list[slice],
    penalty: float,
) -> tuple[Floats, Floats]:
    """The coefficients ``[column, target]``, and the errors ``[row, target]`` of regressions that
    had not seen their block. The last column is the one that is not shrunk."""
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
    return np.asarray(np.linalg.solve(product + shrink, side)), errors


def _product(left: Floats, right: Floats) -> Floats:
    """``left.T @ right``, in pieces that are too small for BLAS to share among threads: threads
    that wait for each other on busy cores made it ten times slower than one."""
    whole = len(left) - len(left) % _PIECE_ROWS
    pieces = left[:whole].reshape(-1, _PIECE_ROWS, left.shape[1]).transpose(0, 2, 1)
    others = right[:whole].reshape(-1, _PIECE_ROWS, right.shape[1])
    return np.asarray((pieces @ others).sum(axis=0) + left[whole:].T @ right[whole:])
