"""Models that take seconds to fit (Prophet, STL with exponential smoothing, Holt-Winters), in a
process of their own, one pool after another, so that no other forecast waits for them.

It is started by the process that makes forecasts, and is as nice as that, which asks for a fit of
each pool every ``REFIT_S``. What is forecast then stays of use, seen from later
(``forecaster.calibrate.later``), until the next. It ends with its standard input.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING

import msgspec

from autoscaler.messages import read_message, write_message

if TYPE_CHECKING:
    from forecaster.types import Forecast, Forecaster, History

LOG = logging.getLogger("tidegate.forecast")

REFIT_S = 10_800.0
HORIZON_S = 2 * REFIT_S
"""A fit is of use for as long, should the next be late."""
FIT_S = 300.0
"""Seconds that all models of a pool may take, the start of the process included."""
WAITING_MOST = 1_000
POOLS_MOST = 1_000
"""Whose forecasts are kept: some 300 kB each."""


class SlowJob(msgspec.Struct, frozen=True, kw_only=True):
    """A history: doubles, the oldest first, NaN where unknown; and the models to fit to it."""

    values: bytes
    step_s: float
    start_s: float
    models: tuple[str, ...]


class SlowForecast(msgspec.Struct, frozen=True, kw_only=True):
    """A forecast, its arrays as doubles."""

    model: str
    quantiles: bytes
    mean: bytes
    maxima: bytes


def make_models() -> Mapping[str, Callable[[], Forecaster]]:
    """By name; nothing heavy is imported until one is asked."""
    from forecaster.models.prophet import ProphetModel
    from forecaster.models.statistical import HoltWinters, StlEts

    return {"prophet": ProphetModel, "stl_ets": StlEts, "holt_winters": HoltWinters}


def missing(models: Sequence[str]) -> list[str]:
    """A line for each of these models whose package is not installed."""
    needs = {"prophet": "prophet", "stl_ets": "statsmodels", "holt_winters": "statsmodels"}
    return [
        f"the forecast model {name} needs {needs[name]}: install Tidegate with its extra `models`"
        for name in models
        if importlib.util.find_spec(needs[name]) is None
    ]


def fit(models: Sequence[str], history: History) -> dict[str, Forecast]:
    """What each model says; one that is not installed, or fails, says nothing."""
    from autoscaler.policy.outlook import LEVELS

    known, found = make_models(), {}
    horizon = round(HORIZON_S / history.step_s)
    for name in models:
        try:
            found[name] = known[name]().forecast(history, horizon, LEVELS)
        except Exception:  # noqa: BLE001 -- whatever it is, the others are asked
            continue
    return found


class SlowModels:
    """Has histories fitted in the process, by a thread that waits for it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[float, Mapping[str, Forecast]]] = {}
        self._asked: set[str] = set()
        self._jobs: queue.SimpleQueue[tuple[str, History, tuple[str, ...]]] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def forecasts(
        self, pool: str, history: History, models: tuple[str, ...]
    ) -> Mapping[str, Forecast]:
        """What was forecast of a pool last, by model; a new fit is asked for where it is time."""
        if not models or history.end_s is None:
            return {}
        at_s, found = self._kept.get(pool, (-REFIT_S, {}))
        due = history.end_s - at_s >= REFIT_S
        if due and pool not in self._asked and len(self._asked) < WAITING_MOST:
            self._asked.add(pool)
            self._jobs.put((pool, history, models))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, daemon=True)
                self._thread.start()
        return {name: one for name, one in found.items() if name in models}

    def _work(self) -> None:
        while True:
            pool, history, models = self._jobs.get()
            found = self._ask(history, models)
            self._kept.pop(pool, None)
            self._kept[pool] = (history.end_s or 0.0, found)
            if len(self._kept) > POOLS_MOST:
                del self._kept[next(iter(self._kept))]
            self._asked.discard(pool)

    def _ask(self, history: History, models: tuple[str, ...]) -> dict[str, Forecast]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "autoscaler.control.slow_models"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        process = self._process
        job = SlowJob(
            values=history.values.tobytes(),
            step_s=history.step_s,
            start_s=history.start_s or 0.0,
            models=models,
        )
        timer = threading.Timer(FIT_S, process.kill)
        timer.start()
        try:
            body = _exchange(process.stdin, process.stdout, msgspec.msgpack.encode(job))
        finally:
            timer.cancel()
        if body is None:  # it was killed, or has crashed
            process.kill()
            process.wait()
            self._process = None
            return {}
        made = msgspec.msgpack.decode(body, type=list[SlowForecast])
        return {one.model: _read(one, history) for one in made}


def _exchange(jobs: IO[bytes] | None, results: IO[bytes] | None, body: bytes) -> bytes | None:
    if jobs is None or results is None:
        return None
    try:
        write_message(jobs, body)
    except OSError:
        return None
    return read_message(results)


def _read(made: SlowForecast, history: History) -> Forecast:
    import numpy as np

    from autoscaler.policy.outlook import LEVELS
    from forecaster.types import Forecast

    return Forecast(
        model=made.model,
        step_s=history.step_s,
        levels=LEVELS,
        quantiles=np.frombuffer(made.quantiles).reshape(len(LEVELS), -1),
        mean=np.frombuffer(made.mean),
        maxima=np.frombuffer(made.maxima).reshape(len(LEVELS), -1),
        start_s=history.end_s,
    )


def main() -> None:
    """Answer jobs until the standard input ends."""
    import numpy as np

    from forecaster.types import History

    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no message
    said: set[str] = set()
    while (body := read_message(sys.stdin.buffer)) is not None:
        job = msgspec.msgpack.decode(body, type=SlowJob)
        for line in set(missing(job.models)) - said:
            said.add(line)
            LOG.warning("%s", line)  # on the standard error, which is the control process's
        values = np.frombuffer(job.values)
        found = fit(job.models, History(values=values, step_s=job.step_s, start_s=job.start_s))
        made = [
            SlowForecast(
                model=name,
                quantiles=one.quantiles.tobytes(),
                mean=one.mean.tobytes(),
                maxima=one.maxima.tobytes(),
            )
            for name, one in found.items()
        ]
        try:
            write_message(results, msgspec.msgpack.encode(made))
        except BrokenPipeError:
            os._exit(0)  # who asked has ended in the meantime


if __name__ == "__main__":
    main()
