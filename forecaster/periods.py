"""Which periods a series has, if any.

A period must show three times over: in the spectrum (a peak above what the same values in random
order would give, at a level of 1 in 1,000 over all frequencies: Fisher's g test, 1929), in the
autocorrelation (a peak near that lag), and in the past itself (the value one period ago says more
of a step than the mean does). Steps are first made robust: what is far out is cut, and a slow
trend is taken away. The order of tests is that of Vlachos et al. (AUTOPERIOD, 2005); RobustPeriod
(Wen et al., 2021) adds wavelets and Huber regression, which cost more than a forecast may.
"""

from __future__ import annotations

import numpy as np

from forecaster.types import DAY_S, Floats

_MOST_PERIODS = 3
_REPETITIONS = 2.0
"""How often a period must fit into the history."""

_CLEAR_REPETITIONS = 3.0
_CLEAR_EXPLAINED = 0.6
"""With fewer repetitions than that it must explain so much of the variance."""

_LEAST_STEPS = 3
_SIGNIFICANCE = 1e-3
_CANDIDATES = 12
_LEAST_EXPLAINED = 0.1
_FAR_OUT = 4.0
_SMOOTH_PARTS = 96
_ENOUGH_CORRELATION = 0.5
_FIRST_OF_HIGHEST = 0.7


def find_periods(values: Floats, known: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The periods of ``values`` (NaN is unknown), in steps, strongest first; empty where none is
    significant. Those of ``known`` (a day, a week) are tried first, and found at lower strength
    than an odd one."""
    ready = _ready(values)
    if ready is None:
        return ()
    found: list[int] = []
    left = ready
    for _ in range(_MOST_PERIODS):
        period = _strongest(left, known, tuple(found))
        if period is None:
            break
        found.append(period)
        left = left - _smooth_profile(left, period)[np.arange(len(left)) % period]
    return tuple(found)


def day_and_week(step_s: float) -> tuple[int, ...]:
    """The periods that people make, in steps, as far as they are on the grid."""
    return tuple(
        round(seconds / step_s)
        for seconds in (DAY_S, 7 * DAY_S)
        if seconds % step_s == 0 and seconds >= 4 * step_s
    )


def _smooth_profile(values: Floats, period: int) -> Floats:
    """The mean of each place in the period, and of its neighbours in a long one: short bursts
    inside of a day stay, to be found as a period of their own."""
    places = np.arange(len(values)) % period
    sums: Floats = np.asarray(np.bincount(places, values, minlength=period))
    counts: Floats = np.asarray(np.bincount(places, minlength=period), dtype=np.float64)
    half = period // _SMOOTH_PARTS
    if half:
        kernel = np.ones(2 * half + 1)
        sums = np.convolve(np.r_[sums[-half:], sums, sums[:half]], kernel, "valid")
        counts = np.convolve(np.r_[counts[-half:], counts, counts[:half]], kernel, "valid")
    return np.asarray(sums / np.maximum(counts, 1))


def _ready(values: Floats) -> Floats | None:
    """Square roots without gaps, trend and what is far out; ``None`` where nothing varies."""
    good = np.isfinite(values)
    if good.sum() < 2 * _LEAST_STEPS + 2:
        return None
    steps = np.arange(len(values))
    root = np.sqrt(np.interp(steps, steps[good], values[good]))
    slope, level = np.polyfit(steps, root, 1)
    straight = root - slope * steps - level
    # Bursts at the beginning look like a trend too, but a weak one.
    root = straight if np.var(straight) < 0.5 * np.var(root) else root - root.mean()
    inner = np.clip(root, *np.quantile(root, (0.005, 0.995)))
    spread = float(np.std(inner))
    if spread <= 1e-9 * (1.0 + abs(float(level))):
        return None
    usual = 1.4826 * float(np.median(np.abs(root - np.median(root))))
    # Short bursts are most of what some pools have: where half of the steps are equal, the
    # deviation says what is far out, not the median.
    limit = _FAR_OUT * max(usual, spread)
    return np.asarray(np.clip(root, -limit, limit))


def _strongest(values: Floats, known: tuple[int, ...], found: tuple[int, ...]) -> int | None:
    count = len(values)
    longest = int(count / _REPETITIONS)
    size = 1 << (2 * count - 1).bit_length()
    spectrum = np.abs(np.fft.rfft(values - values.mean(), size)) ** 2
    if spectrum.sum() <= 0:
        return None
    correlation = np.fft.irfft(spectrum, size)[: longest + 2]
    # Of the overlap that each lag has.
    correlation = correlation / correlation[0] * count / (count - np.arange(longest + 2))
    noise = 1.0 / np.sqrt(count)
    gains = {}
    for lag in set(known) | _peaks(values, longest) | _tops(correlation):
        if not _LEAST_STEPS <= lag <= longest or any(_same(lag, one) for one in found):
            continue
        if correlation[lag] < min(3.0 * noise, _ENOUGH_CORRELATION):
            continue
        bar = _LEAST_EXPLAINED * (0.5 if lag in known else 1.0)
        if count < _CLEAR_REPETITIONS * lag:
            bar = _CLEAR_EXPLAINED
        gain = _explained(values, lag)
        if gain > bar:
            gains[lag] = gain
    if not gains:
        return None
    # What is nearly a day is a day; of multiples, which explain as much, the shortest is meant.
    best = max([lag for lag in known if lag in gains] or gains, key=lambda lag: gains[lag])
    shorter = [lag for lag in gains if lag <= best / 2 and gains[lag] > gains[best] - 0.05]
    return min(shorter, default=best)


def _peaks(values: Floats, longest: int) -> set[int]:
    """Lags of significant peaks of the spectrum, and of their neighbours."""
    power = np.abs(np.fft.rfft(values - values.mean())) ** 2
    power[0] = 0.0
    share = power / max(float(power.sum()), 1e-300)
    # The chance that a share is this large at one of m frequencies of noise.
    bar = 1.0 - (_SIGNIFICANCE / len(share)) ** (1.0 / max(len(share) - 1, 1))
    places = np.argsort(share)[::-1][:_CANDIDATES]
    lags: set[int] = set()
    for place in places[share[places] > bar].tolist():
        low, high = len(values) / (place + 0.6), len(values) / max(place - 0.6, 0.5)
        middle = len(values) / place
        lags |= {round(low), round(middle), round(high), int(middle), int(middle) + 1}
    return {lag for lag in lags if lag <= longest}


def _tops(correlation: Floats) -> set[int]:
    """The highest local maxima of the autocorrelation."""
    inner = correlation[1:-1]
    tops = np.flatnonzero((inner >= correlation[:-2]) & (inner > correlation[2:])) + 1
    tops = tops[tops >= _LEAST_STEPS]
    if not len(tops):
        return set()
    highest = tops[np.argsort(correlation[tops])[::-1][:_CANDIDATES]]
    first = tops[correlation[tops] > _FIRST_OF_HIGHEST * correlation[tops].max()][:_CANDIDATES]
    return set(highest.tolist()) | set(first.tolist())


def _explained(values: Floats, period: int) -> float:
    """The share of the variance that the other periods' mean at each place takes away from each
    step, which noise does not have: each step is left out of the mean that it is compared with."""
    places = np.arange(len(values)) % period
    counts = np.bincount(places, minlength=period)
    sums = np.bincount(places, values, minlength=period)
    others = counts[places] - 1
    kept = others >= 1
    guess = (sums[places] - values)[kept] / others[kept]
    whole = float(np.var(values[kept]))
    return 1.0 - float(np.mean((values[kept] - guess) ** 2)) / whole if whole > 0 else 0.0


def _same(lag: int, other: int) -> bool:
    ratio = lag / other
    return abs(ratio - round(ratio)) < 0.02 * ratio and ratio > 0.98
