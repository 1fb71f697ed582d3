"""Models that are slow to fit: in a process of their own, kept and seen from later."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import psutil
import pytest

from autoscaler.control.slow_models import HORIZON_S, REFIT_S, SlowModels, fit, missing
from forecaster.types import Forecast, History

HISTORY = History(values=np.random.default_rng(1).poisson(600.0, 300).astype(float), start_s=6e8)
MODELS = ("holt_winters",)

pytestmark = pytest.mark.timeout(300)  # statsmodels is long to be imported on a busy machine


def until(condition: Callable[[], Mapping[str, Forecast]]) -> Mapping[str, Forecast]:
    end_s = time.monotonic() + 200
    while not (found := condition()) and time.monotonic() < end_s:
        time.sleep(0.02)
    return found


def test_a_pool_is_fitted_once_in_a_while() -> None:
    slow = SlowModels()
    assert slow.forecasts("m", HISTORY, MODELS) == {}
    (made,) = until(lambda: slow.forecasts("m", HISTORY, MODELS)).values()
    assert made.model == "holt_winters"
    assert made.start_s == HISTORY.end_s
    assert made.horizon_steps * made.step_s == HORIZON_S
    assert float(made.mean[60]) == pytest.approx(600.0, rel=0.1)
    afterwards = replace(HISTORY, start_s=6e8 + REFIT_S - 60)
    assert slow.forecasts("m", afterwards, MODELS)["holt_winters"] is made
    assert slow.forecasts("m", afterwards, ()) == {}
    due = replace(HISTORY, start_s=6e8 + REFIT_S)
    again = until(
        lambda: {
            name: one
            for name, one in slow.forecasts("m", due, MODELS).items()
            if one.start_s == due.end_s
        }
    )
    assert again


def test_one_that_fails_or_is_killed_takes_nothing_with_it() -> None:
    slow = SlowModels()
    nothing = replace(HISTORY, values=np.full(30, np.nan))
    slow.forecasts("without a known value", nothing, MODELS)
    slow.forecasts("next", HISTORY, MODELS)
    assert until(lambda: slow.forecasts("next", HISTORY, MODELS))
    assert slow.forecasts("without a known value", nothing, MODELS) == {}
    made = [one for one in psutil.Process().children() if SlowModels.__module__ in one.cmdline()]
    max(made, key=lambda one: one.create_time()).kill()
    slow.forecasts("while it is dead", HISTORY, MODELS)
    slow.forecasts("after that", HISTORY, MODELS)
    assert until(lambda: slow.forecasts("after that", HISTORY, MODELS))


def test_what_is_not_installed_is_said_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing(("holt_winters", "prophet")) == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (line,) = missing(("prophet",))
    assert "prophet" in line
    monkeypatch.setitem(sys.modules, "prophet", None)  # its import fails
    assert list(fit(("prophet", "holt_winters"), HISTORY)) == ["holt_winters"]
