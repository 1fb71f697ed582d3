"""The process that makes forecasts, so that the control loop never waits for one.

It reads a job, answers it, and ends with its standard input, and so with the control process.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from autoscaler.control.slow_models import SlowModels
from autoscaler.messages import read_message, write_message
from autoscaler.types import Outlook

if TYPE_CHECKING:
    from autoscaler.policy.outlook import OutlookMaker

NICENESS = 10
"""Requests come before forecasts."""
MOST_POOLS = 10_000


class ForecastJob(msgspec.Struct, frozen=True, kw_only=True):
    """The past of a pool in tokens per second: doubles, oldest first, NaN where unknown; by minute
    and, for a short lead, by five seconds. ``end_s`` and ``fine_end_s`` are the Unix times at which
    they end; ``so_far`` is the rate in the minute after, NaN before much of it has passed.
    ``hints`` are windows of demand: cron expression, seconds, time zone. ``begins_anew``: the past
    is another than that of the jobs before."""

    pool: str
    minutes: bytes
    end_s: float
    so_far: float = math.nan
    fine: bytes
    fine_end_s: float
    lead_s: float
    now_s: float
    begins_anew: bool = False
    history_least_s: float
    hints: tuple[tuple[str, float, str], ...] = ()
    slow_models: tuple[str, ...] = ()


class ForecastResult(msgspec.Struct, frozen=True, kw_only=True):
    """What has come of a job, or why nothing has."""

    pool: str
    found: Outlook | None = None
    error: str = ""


def answer(job: ForecastJob, makers: dict[str, OutlookMaker], slow: SlowModels) -> ForecastResult:
    """The result of a job; an error of a model is a result too. ``makers`` are those of the pools
    by name, the one that was longest not asked first."""
    import numpy as np

    from autoscaler.policy.outlook import OutlookMaker
    from autoscaler.signals.rates import FINE_STEP_S
    from autoscaler.signals.series import MINUTE_S
    from forecaster.cron import RecurringWindow
    from forecaster.types import History

    maker = makers.pop(job.pool, None)
    if maker is None or job.begins_anew:
        maker = OutlookMaker()
    makers[job.pool] = maker
    if len(makers) > MOST_POOLS:
        del makers[next(iter(makers))]

    def history(data: bytes, step_s: float, end_s: float) -> History:
        values = np.frombuffer(data)
        return History(values=values, step_s=step_s, start_s=end_s - len(values) * step_s)

    minutes = history(job.minutes, MINUTE_S, job.end_s)
    fine = history(job.fine, FINE_STEP_S, job.fine_end_s)
    maker.history_least_s = job.history_least_s
    try:
        maker.slow = slow.forecasts(job.pool, minutes, job.slow_models)
        maker.hints = [RecurringWindow.parse(*one) for one in job.hints]
        found = maker.make(minutes, fine, job.lead_s, job.now_s, job.so_far)
        if not found.distrust:
            found = replace(found, further=maker.further(minutes))
    except Exception as error:  # noqa: BLE001 -- one pool's history must not end the process
        return ForecastResult(pool=job.pool, error=f"{type(error).__name__}: {error}")
    return ForecastResult(pool=job.pool, found=found)


def main() -> None:
    """Answer jobs until the standard input ends."""
    os.nice(NICENESS)
    jobs, results = sys.stdin.buffer, sys.stdout.buffer
    sys.stdout = sys.stderr  # what a library prints must not get among the messages
    makers: dict[str, OutlookMaker] = {}
    slow = SlowModels()
    while (body := read_message(jobs)) is not None:
        job = msgspec.msgpack.decode(body, type=ForecastJob)
        result = msgspec.msgpack.encode(answer(job, makers, slow))
        try:
            write_message(results, result)
        except BrokenPipeError:  # the control process has ended in the meantime
            os.dup2(os.open(os.devnull, os.O_WRONLY), results.fileno())  # for the flush at exit
            return


if __name__ == "__main__":
    main()
