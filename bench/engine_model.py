"""The replay's engine model beside the real vLLM: the same short trace, TTFT and throughput.

The model's four figures are measured first, one thing at a time: the prefill rate from single
prompts of several lengths, the ITL from batches of several sizes. Then a trace of random lengths
that comes by chance is sent to the engine, and played by the model through ``router.pick``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from autoscaler.replay.engine import ReplicaModel, Slo
from autoscaler.replay.requests import PlayedRequest, RequestPool
from autoscaler.replay.supply import Starts
from autoscaler.replay.traces import RequestTrace
from bench import procs

WITHIN = 0.25
PROMPTS = (32, 256, 480)
BATCHES = (1, 4, 8)
LENGTH_S = 60.0
"""Of the trace, about."""
VOCABULARY = 20_000
ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is run."""

    engine_python: Path
    model: Path
    requests: int = 60
    """At most."""
    load: float = 0.6
    seed: int = 1
    limit_s: float = 240.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One request, in seconds since the trace began."""

    at_s: float
    first_s: float
    done_s: float
    prompt_tokens: float
    output_tokens: float


def say(text: str) -> None:
    """How far it is, on standard error."""
    print(text, file=sys.stderr, flush=True)


async def ask(client: httpx.AsyncClient, rng: np.random.Generator, prompt: int, output: int,
              zero_s: float) -> Timing:  # fmt: skip
    """One completion of random tokens, which no prefix cache knows."""
    body = {
        "model": "m",
        "prompt": rng.integers(100, VOCABULARY, prompt).tolist(),
        "max_tokens": output,
        "ignore_eos": True,
        "temperature": 0.0,
        "stream": True,
    }
    at_s = time.monotonic() - zero_s
    first_s = None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if first_s is None and line.startswith("data: {"):
                first_s = time.monotonic() - zero_s
    done_s = time.monotonic() - zero_s
    return Timing(
        at_s=at_s,
        first_s=done_s if first_s is None else first_s,
        done_s=done_s,
        prompt_tokens=prompt,
        output_tokens=output,
    )


async def calibrate(client: httpx.AsyncClient, rng: np.random.Generator) -> ReplicaModel:
    """The model's figures, by least squares."""
    await ask(client, rng, 64, 8, time.monotonic())
    firsts = []
    for prompt in PROMPTS:
        got = [await ask(client, rng, prompt, 1, time.monotonic()) for _ in range(2)]
        firsts.append(min(one.first_s - one.at_s for one in got))
    slope, _ = np.polyfit(PROMPTS, firsts, 1)
    itls = []
    for batch in BATCHES:
        zero_s = time.monotonic()
        every = await asyncio.gather(*(ask(client, rng, 16, 24, zero_s) for _ in range(batch)))
        # From when all decode to when the first is done.
        itls.append(
            statistics.median((one.done_s - one.first_s) / (one.output_tokens - 1) for one in every)
        )
    itl_slope, itl_base = np.polyfit(BATCHES, itls, 1)
    return ReplicaModel(
        prefill_tokens_per_s=float(1.0 / slope),
        itl_base_s=max(1e-3, float(itl_base)),
        itl_slope_s=max(0.0, float(itl_slope)),
        max_running_requests=64,
        kv_tokens=20_000.0,
        chunk_tokens=CHUNK_TOKENS,
    )


def draw(engine: ReplicaModel, options: Options) -> RequestTrace:
    """Random lengths, at a part of what the engine could do at most."""
    rng = np.random.default_rng(options.seed)
    prompts = np.clip(rng.lognormal(5.0, 0.7, options.requests), 16, 900).round()
    outputs = np.clip(rng.lognormal(3.5, 0.5, options.requests), 8, 120).round()
    work_s = engine.work_s(float(prompts.mean()), float(outputs.mean()), Slo(ttft_s=60, itl_s=1e3))
    gaps = rng.exponential(work_s / options.load, options.requests)
    at_s = np.cumsum(gaps) - gaps[0]
    count = max(8, int(np.searchsorted(at_s, LENGTH_S)))
    return RequestTrace(
        name="drawn",
        at_s=at_s[:count],
        prompt_tokens=prompts[:count],
        output_tokens=outputs[:count],
    )


async def measured(
    client: httpx.AsyncClient, trace: RequestTrace, rng: np.random.Generator
) -> list[Timing]:
    """The trace sent to the engine."""
    zero_s = time.monotonic()

    async def one(index: int) -> Timing:
        await asyncio.sleep(max(0.0, zero_s + float(trace.at_s[index]) - time.monotonic()))
        prompt, output = trace.prompt_tokens[index], trace.output_tokens[index]
        return await ask(client, rng, int(prompt), int(output), zero_s)

    return list(await asyncio.gather(*(one(index) for index in range(len(trace.at_s)))))


def modelled(trace: RequestTrace, engine: ReplicaModel) -> list[Timing]:
    """The trace played by one replica of the model."""
    pool = RequestPool(
        trace, engine, Slo(ttft_s=60.0, itl_s=1e3), Starts.flat(0.0), ready=1, max_replicas=1,
        scored_from_s=0.0, seed=0,
    )  # fmt: skip
    timings: list[Timing] = []

    def note(request: PlayedRequest) -> None:
        timings.append(
            Timing(
                at_s=request.at_s,
                first_s=request.first_s,
                done_s=request.done_s,
                prompt_tokens=request.prompt_tokens,
                output_tokens=request.output_tokens,
            )
        )

    pool.on_answer = note
    while len(timings) < len(trace.at_s):
        pool.advance()
    return timings


def figures(timings: Sequence[Timing]) -> dict[str, float]:
    """What is compared."""
    firsts = sorted(one.first_s - one.at_s for one in timings)
    paces = [(one.done_s - one.first_s) / (one.output_tokens - 1) for one in timings]
    whole_s = max(one.done_s for one in timings) - min(one.at_s for one in timings)
    return {
        "ttft_mean_s": statistics.mean(firsts),
        "ttft_p50_s": firsts[len(firsts) // 2],
        "ttft_p90_s": firsts[int(0.9 * len(firsts))],
        "itl_mean_s": statistics.mean(paces),
        "tokens_per_s": sum(one.prompt_tokens + one.output_tokens for one in timings) / whole_s,
        "in_flight": sum(one.done_s - one.at_s for one in timings) / whole_s,
    }


async def compare(port: int, options: Options) -> dict[str, Any]:
    """Calibrate, send, play."""
    rng = np.random.default_rng(options.seed)
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, timeout=options.limit_s) as client:
        engine = await calibrate(client, rng)
        say(f"{engine}")
        trace = draw(engine, options)
        say(f"{len(trace.at_s)} requests in {trace.at_s[-1]:.0f} s")
        real = figures(await measured(client, trace, rng))
    model = figures(modelled(trace, engine))
    return {
        "engine": dataclasses.asdict(engine),
        "requests": len(trace.at_s),
        "length_s": float(trace.at_s[-1]),
        "real": real,
        "model": model,
        "ratios": {name: model[name] / real[name] for name in real},
    }


def run(options: Options) -> dict[str, Any]:
    """Start vLLM, compare, end it."""
    port = procs.free_port()
    with tempfile.TemporaryDirectory() as folder:
        child = procs.start(
            "vllm",
            [
                options.engine_python, "-m", "vllm.entrypoints.openai.api_server",
                "--model", options.model, "--served-model-name", "m", "--host", "127.0.0.1",
                "--port", str(port), "--max-model-len", "2048", "--enforce-eager",
                "--no-enable-prefix-caching", "--max-num-batched-tokens", str(CHUNK_TOKENS),
                "--max-num-seqs", "64",
            ],
            log=Path(folder) / "vllm.log", env=ENV,
        )  # fmt: skip
        with procs.stopping(child):
            procs.wait_ready(child, port, b"GET /health HTTP/1.0\r\n\r\n", limit_s=options.limit_s)
            say("vLLM is ready")
            return asyncio.run(compare(port, options))


def passed(made: dict[str, Any]) -> bool:
    """TTFT and throughput within the bar."""
    return all(
        1 / (1 + WITHIN) <= made["ratios"][name] <= 1 + WITHIN
        for name in ("ttft_mean_s", "tokens_per_s")
    )


def terminal(made: dict[str, Any]) -> str:
    """A line for each figure."""
    lines = [f"{'':<14} {'vLLM':>9} {'model':>9} {'ratio':>6}"]
    for name, real in made["real"].items():
        lines.append(
            f"{name:<14} {real:9.3f} {made['model'][name]:9.3f} {made['ratios'][name]:6.2f}"
        )
    return "\n".join(lines)


def write(made: dict[str, Any], path: Path) -> None:
    """The record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(made, indent=1) + "\n")
