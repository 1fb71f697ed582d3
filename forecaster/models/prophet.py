"""Prophet (Taylor and Letham, 2018): several seconds a fit, so it runs in a worker process or a
command, never in the control loop."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np

from forecaster.calibrate import made_forecast
from forecaster.types import DAY_S, MOST_STEPS, QUANTILES, Forecast, History

_PATHS = 300
_SEED = 9
_LEAST_STEPS = 20
_GRID_LEAST_S = 300.0


@dataclass(frozen=True, slots=True)
class ProphetModel:
    """Trend and seasons of a day and a week, fitted to roots on a grid of five minutes: finer
    ones take minutes. Its quantiles are those of the paths that it draws. It has a calendar, so a
    history without ``start_s`` is taken to begin on a Thursday at midnight UTC."""

    name: str = "prophet"

    def forecast(
        self, history: History, horizon_steps: int, levels: tuple[float, ...] = QUANTILES
    ) -> Forecast:
        """Raises ``ValueError`` where there are fewer than 20 steps."""
        # Both write to the standard error unless they are told before they are imported.
        for noisy in ("cmdstanpy", "prophet"):
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
            if not logging.getLogger(noisy).handlers:
                logging.getLogger(noisy).addHandler(logging.NullHandler())
        import pandas as pd
        from prophet import Prophet

        values = history.values[-MOST_STEPS:]
        if np.isfinite(values).sum() < _LEAST_STEPS:
            raise ValueError(f"fewer than {_LEAST_STEPS} known steps")
        together = max(1, int(_GRID_LEAST_S / history.step_s))
        if len(values) < _LEAST_STEPS * together:
            together = 1
        values = values[len(values) % together :]
        end_s = history.end_s if history.end_s is not None else len(values) * history.step_s
        begin_s = end_s - len(values) * history.step_s
        groups = values.reshape(-1, together)
        known = np.isfinite(groups).any(axis=1)
        unit = max(float(np.nanmean(values)), 1e-300)
        root = np.sqrt(np.nanmean(groups[known] / unit, axis=1))
        at = begin_s + (np.arange(len(groups))[known] + 0.5) * together * history.step_s
        model = Prophet(
            daily_seasonality=len(values) * history.step_s >= 2 * DAY_S,
            weekly_seasonality=len(values) * history.step_s >= 14 * DAY_S,
            yearly_seasonality=False,
            uncertainty_samples=_PATHS,
        )
        model.fit(pd.DataFrame({"ds": pd.to_datetime(at, unit="s"), "y": root}), seed=_SEED)
        ahead = end_s + (np.arange(horizon_steps) + 0.5) * history.step_s
        np.random.seed(_SEED)  # Prophet draws from numpy's global state
        drawn = model.predictive_samples(pd.DataFrame({"ds": pd.to_datetime(ahead, unit="s")}))
        paths = np.maximum(np.asarray(drawn["yhat"]), 0.0) ** 2 * unit
        tops = np.maximum.accumulate(paths, axis=0)
        return made_forecast(
            self.name,
            history,
            levels,
            np.quantile(paths, levels, axis=1),
            paths.mean(axis=1),
            np.quantile(tops, levels, axis=1),
        )
