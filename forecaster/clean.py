"""What of a history is not demand: zeros of a collector that was down, and absurd single values.

Both become unknown, and only inside the history: what its end is cannot be known yet, and it is
taken as it stands.
"""

from __future__ import annotations

import numpy as np

from forecaster.types import Floats

_OUTAGE_STEPS_LEAST = 3
_OUTAGES_MOST = 4
_OUTAGES_SHARE_MOST = 0.5
"""Of the steps outside of them. Bursts with nothing between are demand, however few there were."""

_ZEROS_MOST = 0.005
"""Share of zeros outside of long runs in a series for which a run of zeros is an outage."""

_NEAR_STEPS = 5
_USUAL_SHARE = 0.25
_SPIKE_TIMES = 20.0
_SPIKES_MOST = 0.001


def cleaned(values: Floats) -> Floats:
    """A copy in which outages and single absurd values are NaN. A real zero stays zero: in a series
    that is zero now and then, or that fades to zero, runs of zeros are demand."""
    values = np.where(np.isfinite(values) & (values >= 0), values, np.nan)
    values[_outages(values)] = np.nan
    values[_spikes(values)] = np.nan
    return values


def _outages(values: Floats) -> np.ndarray:
    """Long runs of zeros that begin and end abruptly, in a series that is otherwise never zero."""
    nothing = np.zeros(len(values), dtype=bool)
    zero = values == 0
    edges = np.flatnonzero(np.diff(np.concatenate([[0], zero.astype(int), [0]])))
    runs = [
        (int(first), int(last))
        for first, last in zip(edges[::2], edges[1::2], strict=True)
        if last - first >= _OUTAGE_STEPS_LEAST
    ]
    inner = [(first, last) for first, last in runs if first > 0 and last < len(values)]
    if not 0 < len(inner) <= _OUTAGES_MOST:
        return nothing
    outside = ~nothing
    for first, last in runs:
        outside[first:last] = False
    rest = values[outside & np.isfinite(values)]
    if sum(last - first for first, last in inner) > _OUTAGES_SHARE_MOST * len(rest):
        return nothing
    if not len(rest) or (rest == 0).mean() > _ZEROS_MOST:
        return nothing
    usual = _USUAL_SHARE * float(np.median(rest))
    for first, last in inner:
        before = values[max(0, first - _NEAR_STEPS) : first]
        after = values[last : last + _NEAR_STEPS]
        if np.nanmean(before) > usual and np.nanmean(after) > usual:
            nothing[first:last] = True
    return nothing


def _spikes(values: Floats) -> np.ndarray:
    """Single steps far above everything within five steps of them, and too few to be a habit."""
    nothing = np.zeros(len(values), dtype=bool)
    known = values[np.isfinite(values)]
    if len(known) < 100 or not known.any():
        return nothing
    # Of what is not zero: a pool with a burst an hour is not all spikes.
    far = _SPIKE_TIMES * float(np.quantile(known[known > 0], 0.9))
    places = np.flatnonzero(values > far)
    places = places[(places >= 1) & (places < len(values) - 1)]
    if not len(places) or len(places) > max(1, _SPIKES_MOST * len(known)):
        return nothing
    for place in places.tolist():
        around = np.r_[
            values[max(0, place - _NEAR_STEPS) : place],
            values[place + 1 : place + 1 + _NEAR_STEPS],
        ]
        around = around[np.isfinite(around)]
        nothing[place] = len(around) > 0 and bool(around.max() * _SPIKE_TIMES < values[place])
    return nothing
