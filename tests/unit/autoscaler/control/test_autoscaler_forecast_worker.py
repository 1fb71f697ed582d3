"""The process that makes forecasts, alone."""

import subprocess
import sys

import msgspec
import numpy as np

from autoscaler.control.forecast_worker import ForecastJob
from autoscaler.messages import LENGTH


def test_a_control_process_that_ends_while_it_works_ends_it_without_a_word() -> None:
    job = ForecastJob(
        pool="chat",
        minutes=np.ones(60).tobytes(),
        end_s=3600.0,
        fine=b"",
        fine_end_s=3600.0,
        lead_s=120.0,
        now_s=0.0,
        history_least_s=0.0,
    )
    body = msgspec.msgpack.encode(job)
    worker = subprocess.Popen(
        [sys.executable, "-P", "-m", "autoscaler.control.forecast_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert worker.stdin is not None
    assert worker.stdout is not None
    assert worker.stderr is not None
    with worker:
        worker.stdout.close()
        worker.stdin.write(LENGTH.pack(len(body)) + body)
        worker.stdin.close()
        assert worker.stderr.read() == b""
    assert worker.returncode == 0
