"""The model's side of the cross-check, without an engine."""

from __future__ import annotations

import numpy as np
import pytest

from autoscaler.replay.engine import ReplicaModel
from autoscaler.replay.traces import RequestTrace
from bench import engine_model

ENGINE = ReplicaModel(
    prefill_tokens_per_s=100.0, itl_base_s=0.1, itl_slope_s=0.1, chunk_tokens=1_000.0
)


def test_one_request_takes_its_prefill_and_its_steps() -> None:
    one = np.array([50.0]), np.array([11.0])
    trace = RequestTrace(name="t", at_s=np.array([0.0]), prompt_tokens=one[0], output_tokens=one[1])
    (timing,) = engine_model.modelled(trace, ENGINE)
    assert timing.first_s == pytest.approx(0.5)
    assert timing.done_s - timing.first_s == pytest.approx(11 * 0.2)
    figures = engine_model.figures([timing])
    assert figures["ttft_mean_s"] == pytest.approx(0.5)
    assert figures["tokens_per_s"] == pytest.approx(61 / 2.7)


def test_a_drawn_trace_loads_the_engine_in_part() -> None:
    options = engine_model.Options(engine_python=None, model=None, requests=400)  # type: ignore[arg-type]
    trace = engine_model.draw(ReplicaModel(), options)
    assert len(trace.at_s) == len(trace.prompt_tokens) <= 400
    assert trace.at_s[0] == 0.0
    timings = engine_model.modelled(trace, ReplicaModel())
    assert len(timings) == len(trace.at_s)


def test_the_bar_is_a_quarter_of_ttft_and_throughput() -> None:
    fine = {"ttft_mean_s": 1.2, "tokens_per_s": 0.85, "itl_mean_s": 3.0}
    assert engine_model.passed({"ratios": fine})
    assert not engine_model.passed({"ratios": {**fine, "ttft_mean_s": 0.7}})
    assert not engine_model.passed({"ratios": {**fine, "tokens_per_s": 1.3}})
