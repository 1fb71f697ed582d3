"""Phases of a start, from lines that vLLM 0.32 wrote."""

from __future__ import annotations

import pytest

from loaders.engines.base import START_PHASES, engine_of, later_phase

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
        ("Starting to load model /models/m...", "loading"),
        ("Loading safetensors checkpoint shards:   0% Completed | 0/1 [00:00<?, ?it/s]", "loading"),
        ("Loading weights with load format tidegate: 1 files", "loading"),
        ("Compiling a graph for compile range (1, 8192) takes 27.47 s", "compiling"),
        ("Dynamo bytecode transform time: 6.58 s", "compiling"),
        ("Loading weights took 1.30 seconds", "warming"),
        ("Capturing CUDA graphs (decode, FULL):  10%", "warming"),
        ("GPU KV cache size: 46,592 tokens", "warming"),
        ("Starting vLLM server on http://127.0.0.1:18765", "warming"),
    ],
)  # fmt: skip
def test_a_line_shows_its_phase(line: str, phase: str) -> None:
    assert engine_of("vllm").start_phase([line], "importing") == phase


def test_a_phase_is_not_left_backwards() -> None:
    lines = ["Starting to load model m", "Compiling a graph", "Loading weights with x"]
    vllm = engine_of("vllm")
    assert vllm.start_phase(lines, "importing") == "compiling"
    assert vllm.start_phase(["Starting to load model m"], "warming") == "warming"
    assert [later_phase(START_PHASES[0], one) for one in START_PHASES] == list(START_PHASES)
    assert later_phase("loading", "serving") == "loading"


def test_phases_of_the_simulated_engine() -> None:
    lines = ["start-up: loading for 2 s (simulated)"]
    assert engine_of("simulated").start_phase(lines, "importing") == "loading"
    assert engine_of(None).start_phase(lines, "importing") == "importing"
