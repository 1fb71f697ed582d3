"""What every forecaster does with any history: it keeps the promises of a forecast, or says that
the history is too short."""

from __future__ import annotations

import numpy as np
import pytest

from forecaster.models.automatic import Automatic
from forecaster.models.direct import Direct
from forecaster.models.last_value import LastValue
from forecaster.models.prophet import ProphetModel
from forecaster.models.seasonal import PeriodicQuantile, SeasonalNaive
from forecaster.models.statistical import HoltWinters, StlEts
from forecaster.types import QUANTILES, Forecaster, History

DAY = 288
RNG = np.random.default_rng(7)
TIDE = 40 + 30 * np.sin(2 * np.pi * np.arange(4 * DAY) / DAY)


def poisson(rate: np.ndarray) -> np.ndarray:
    return RNG.poisson(rate).astype(float)


def gap(values: np.ndarray, first: int, last: int, what: float) -> np.ndarray:
    values = values.copy()
    values[first:last] = what
    return values


HISTORIES = {
    "one value": np.array([3.0]),
    "five minutes": np.array([3.0, 4, 6, 5, 4]),
    "tide": poisson(TIDE),
    "constant": np.full(500, 7.0),
    "zero": np.zeros(500),
    "sparse": (RNG.random(2 * DAY) < 0.02) * 3.0,
    "huge": poisson(TIDE) * 1e12,
    "tiny": poisson(TIDE) * 1e-12,
    "growth after launch": np.exp(np.arange(400) / 80.0),
    "level shift": poisson(np.r_[np.full(600, 10.0), np.full(30, 200.0)]),
    "unknown at the end": gap(poisson(TIDE), -30, 4 * DAY, np.nan),
    "unknown for a day": gap(poisson(TIDE), DAY, 2 * DAY, np.nan),
    "mostly unknown": gap(poisson(TIDE), 40, 4 * DAY - 20, np.nan),
    "zero for hours": gap(poisson(TIDE), 2 * DAY, 2 * DAY + 60, 0.0),
    "spike": gap(poisson(TIDE), 500, 502, 1e7),
}


class ForecasterContract:
    """A forecaster is a subclass with a ``forecaster``."""

    step_s = 300.0

    def forecaster(self) -> Forecaster:
        raise NotImplementedError

    @pytest.mark.parametrize("case", HISTORIES)
    @pytest.mark.parametrize("horizon", [1, 48])
    def test_any_history_gives_a_forecast_or_is_too_short(self, case: str, horizon: int) -> None:
        values = HISTORIES[case].copy()
        history = History(values=values, step_s=self.step_s, start_s=1.7e9)
        try:
            made = self.forecaster().forecast(history, horizon, QUANTILES)
        except ValueError:
            assert np.isfinite(values).sum() < 2 * DAY, "a history of two days is not too short"
            return
        assert made.quantiles.shape == (len(QUANTILES), horizon)
        assert made.mean.shape == (horizon,)
        assert (made.model, made.step_s) == (self.forecaster().name, self.step_s)
        assert made.start_s == 1.7e9 + len(values) * self.step_s
        for rows in (made.quantiles, made.mean, made.maxima):
            assert np.isfinite(rows).all()
            assert (rows >= 0).all()
        assert (np.diff(made.quantiles, axis=0) >= 0).all()
        by_lead = np.array([made.maximum(lead) for lead in range(1, horizon + 1)])
        assert (np.diff(by_lead, axis=0) >= 0).all(), "the maximum rises with the lead"
        assert (np.diff(by_lead, axis=1) >= 0).all(), "and with the level"
        assert (made.quantiles <= by_lead.T).all()
        assert np.array_equal(values, HISTORIES[case], equal_nan=True), "the history is not changed"

    @pytest.mark.parametrize("levels", [(0.5,), (0.01, 0.999)])
    def test_the_levels_that_were_asked_for(self, levels: tuple[float, ...]) -> None:
        history = History(values=HISTORIES["tide"], step_s=self.step_s)
        made = self.forecaster().forecast(history, 6, levels)
        assert made.levels == levels
        assert made.quantiles.shape == (len(levels), 6)

    def test_the_unit_does_not_matter(self) -> None:
        small, large = (
            self.forecaster().forecast(
                History(values=HISTORIES["tide"] * unit, step_s=self.step_s), 12, (0.5, 0.95)
            )
            for unit in (1.0, 1e6)
        )
        assert np.allclose(small.quantiles * 1e6, large.quantiles, rtol=0.02)

    def test_one_history_gives_one_forecast(self) -> None:
        history = History(values=HISTORIES["tide"], step_s=self.step_s)
        first, second = (self.forecaster().forecast(history, 12, (0.5, 0.95)) for _ in range(2))
        assert np.array_equal(first.maxima, second.maxima)


class TestLastValue(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return LastValue()


class TestDirect(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return Direct()


class TestAutomatic(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return Automatic()


class TestSeasonalNaive(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return SeasonalNaive()


class TestPeriodicQuantile(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return PeriodicQuantile(period=DAY)


class TestStlEts(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return StlEts()


class TestHoltWinters(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return HoltWinters()


class TestProphet(ForecasterContract):
    def forecaster(self) -> Forecaster:
        return ProphetModel()
