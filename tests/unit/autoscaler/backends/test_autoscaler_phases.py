"""Phases of a start, from lines that vLLM 0.32 wrote."""

from __future__ import annotations

import pytest

from autoscaler.backends.process.logs import message_of
from autoscaler.backends.process.phases import PHASES, later, phase_of
from autoscaler.control.start_steps import describe_step

CONFIG = "Initializing a V1 LLM engine (v0.32.0) with config: " + "warmup, capture, " * 40


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("Triton is installed, but doesn't include CPU backend. Disabling Triton.", "importing"),
        ("Registered model loader `tidegate` with load format `tidegate`", "importing"),
        ("Inductor compilation was disabled by user settings, optimizations", "importing"),
        ("Enforce eager set, disabling torch.compile, CUDAGraphs, and JIT kernel warmup. This is "
         "equivalent to setting -cc.mode=none -cc.cudagraph_mode=none", "importing"),
        (CONFIG, "importing"),
        ("(Worker pid=7412) INFO 11-24 17:17:12 [cpu_model_runner.py:68] Starting to load model "
         "/models/m...", "loading"),
        ("Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]", "loading"),
        ("Loading weights with load format tidegate: 1 files", "loading"),
        ("Compiling a graph for compile range (1, 8192) takes 27.47 s", "compiling"),
        ("Dynamo bytecode transform time: 6.58 s", "compiling"),
        ("INFO 11-24 17:17:14 [loader.py:501] Loading weights took 1.30 seconds", "warming"),
        ("Capturing CUDA graphs (decode, FULL):  10%", "warming"),
        ("GPU KV cache size: 46,592 tokens", "warming"),
        ("Starting vLLM server on http://127.0.0.1:18765", "warming"),
    ],
)  # fmt: skip
def test_a_line_shows_its_phase(line: str, phase: str) -> None:
    assert phase_of([message_of(line)]) == phase


def test_a_phase_is_not_left_backwards() -> None:
    lines = ["Starting to load model m", "Compiling a graph", "Loading weights with x"]
    assert phase_of(lines) == "compiling"
    assert phase_of(["Starting to load model m"], "warming") == "warming"
    assert [later(PHASES[0], one) for one in PHASES] == list(PHASES)
    assert later("loading", "serving") == "loading"


@pytest.mark.parametrize(
    ("step", "failures", "told"),
    [
        ("scheduled", 0, "scheduled"),
        ("scheduled", 1, "scheduled, after 1 failed start"),
        ("scheduled", 5, "scheduled, after 5 failed starts"),
        ("loading", 5, "loading"),
    ],
)
def test_who_waits_is_told_of_failed_starts(step: str, failures: int, told: str) -> None:
    assert describe_step(step, None, failures) == told
