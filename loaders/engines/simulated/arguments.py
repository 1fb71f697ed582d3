"""The settings of the simulated engine, its command line, and the help that explains them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from loaders.engines.base import START_PHASES
from loaders.engines.simulated.faults import KINDS, TRIGGERS, parse
from loaders.engines.simulated.http1 import HttpLimits
from loaders.engines.simulated.scheduler import EngineModel


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """One simulated engine. ``startup_s`` has a duration for each of ``START_PHASES``."""

    served_models: tuple[str, ...]
    model_path: str
    host: str = "127.0.0.1"
    port: int = 8000
    model: EngineModel = field(default_factory=EngineModel)
    limits: HttpLimits = field(default_factory=HttpLimits)
    startup_s: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    late_port: bool = False
    sleep_s: tuple[float, float] = (0.5, 0.5)
    wake_s: tuple[float, float] = (0.5, 2.0)
    output_tokens: int = 128
    output_spread_fraction: float = 0.5
    embedding_size: int = 64
    seed: int = 0
    virtual_time: bool = False
    drain_s: float = 30.0
    api_keys: tuple[str, ...] = ()
    request_id_headers: bool = False
    faults: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.served_models or not all(self.served_models):
            raise ValueError("a model name is needed")
        if not 0 <= self.port <= 65_535:
            raise ValueError(f"port must be 0..65535, is {self.port}")
        durations = (*self.startup_s, *self.sleep_s, *self.wake_s, self.drain_s)
        if not all(d >= 0 and math.isfinite(d) for d in durations):
            raise ValueError(f"durations must be finite and at least 0: {durations}")
        if self.output_tokens < 1 or not 0 <= self.output_spread_fraction <= 1:
            raise ValueError("output-tokens must be at least 1, its spread a fraction 0..1")
        if not 1 <= self.embedding_size <= 16_384:
            raise ValueError(f"embedding-size must be 1..16384, is {self.embedding_size}")
        for text in self.faults:
            parse(text)


_ABOUT = """\
A simulated inference engine: vLLM's HTTP API and metric names, a model of its scheduler, and no
language model behind it. Answers are filler words of a plausible length. Use it to try Tidegate
without an engine, to test it, and to load it; no figure it gives says anything about a real one.

Time passes as on a real engine: a step takes as long as its prompt tokens at the prefill rate
plus one token for each sequence at the decode rate; sequences share steps (continuous batching),
KV blocks and cached prefixes, wait when the batch is full, and are preempted when blocks run out.
"""

_EXAMPLES = """\
examples:
  an engine that is ready at once
    python -m loaders.engines.simulated --model demo --port 9000
  one that takes 20 s to start and answers like a large model on a small GPU
    python -m loaders.engines.simulated --model demo --port 9000 --startup-s 20 \\
        --prefill-tokens-per-s 3000 --decode-tokens-per-s 25 --max-num-seqs 16
  a cheap target for a load test: all the time spent is the network's and yours
    python -m loaders.engines.simulated --model demo --port 9000 \\
        --prefill-tokens-per-s inf --decode-tokens-per-s inf
  one that dies at its eleventh request; one whose every third answer is a 500
    python -m loaders.engines.simulated --model demo --port 9000 --fault crash:after_requests=10
    python -m loaders.engines.simulated --model demo --port 9000 --fault error500:every=3

while it runs:
  curl localhost:9000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}'
  curl localhost:9000/metrics
  curl -X POST 'localhost:9000/sleep?level=1'; curl -X POST localhost:9000/wake_up
  curl localhost:9000/simulated/faults -d '{"faults": ["slow:factor=5,for_s=30"]}'
"""

_STARTUP_SHARES = (0.4, 0.2, 0.25, 0.15)
# Flags that engines are commonly started with, and how many values each takes.
_WITHOUT_EFFECT = {
    "--enforce-eager": 0,
    "--trust-remote-code": 0,
    "--enable-sleep-mode": 0,
    "--enable-auto-tool-choice": 0,
    "--disable-log-requests": 0,
    "--disable-log-stats": 0,
    "--disable-uvicorn-access-log": 0,
    "--no-enable-log-requests": 0,
    "--dtype": 1,
    "--gpu-memory-utilization": 1,
    "--tensor-parallel-size": 1,
    "--pipeline-parallel-size": 1,
    "--data-parallel-size": 1,
    "--load-format": 1,
    "--quantization": 1,
    "--kv-cache-dtype": 1,
    "--tool-call-parser": 1,
    "--reasoning-parser": 1,
    "--download-dir": 1,
    "--tokenizer": 1,
    "--uvicorn-log-level": 1,
}


def _faults_help() -> str:
    lines = ["faults: KIND[:name=value,…]"]
    lines += [f"  {kind:15} {meaning}" for kind, meaning in KINDS.items()]
    lines.append("when they strike; counted from when the fault is set:")
    lines += [f"  {name:15} {meaning}" for name, meaning in TRIGGERS.items()]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m loaders.engines.simulated",
        description=_ABOUT,
        epilog=f"{_faults_help()}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_serving(parser)
    _add_engine(parser)
    _add_life(parser)
    ignored = parser.add_argument_group(
        "accepted for vLLM's sake, without effect", ", ".join(_WITHOUT_EFFECT)
    )
    for name, values in _WITHOUT_EFFECT.items():
        if values:
            ignored.add_argument(name, help=argparse.SUPPRESS)
        else:
            ignored.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser


def _add_serving(parser: argparse.ArgumentParser) -> None:
    limits = HttpLimits()
    add = parser.add_argument_group("what is served, and where").add_argument
    add("--model", required=True, metavar="NAME", help="any name or path: nothing is loaded")
    add(
        "--served-model-name",
        nargs="+",
        metavar="NAME",
        help="what clients put in `model`, aliases after it (default: --model)",
    )
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="port, 0 for any free one (%(default)s)")
    add("--api-key", action="append", default=[], help="a key that /v1 asks for; repeatable")
    add(
        "--enable-request-id-headers",
        action="store_true",
        help="answer with x-request-id, as vLLM does with this flag only",
    )
    for name, value, text in (
        ("--max-connections", limits.max_connections, "connections at once; more are closed"),
        ("--max-head-bytes", limits.max_head_bytes, "request line and headers"),
        ("--max-body-bytes", limits.max_body_bytes, "request body"),
    ):
        add(name, type=int, default=value, metavar="N", help=f"{text} (%(default)s)")
    add(
        "--keepalive-s",
        type=float,
        default=limits.keepalive_s,
        metavar="S",
        help="idle connections are closed after this, as by vLLM's server (%(default)s)",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    model = EngineModel()
    add = parser.add_argument_group("the engine; rates may be `inf`").add_argument
    for name, rate, text in (
        ("--prefill-tokens-per-s", model.prefill_tokens_per_s, "prompt tokens, over all sequences"),
        ("--decode-tokens-per-s", model.decode_tokens_per_s, "of one sequence that is alone"),
        ("--batch-slowdown", model.batch_slowdown, "a step's decoding is longer by this fraction "
         "for each further sequence"),
        ("--step-overhead-s", model.step_overhead_s, "what every step takes besides"),
    ):  # fmt: skip
        add(name, type=float, default=rate, metavar="X", help=f"{text} (%(default)g)")
    for name, number, text in (
        ("--max-num-seqs", model.max_num_seqs, "sequences in a step"),
        ("--max-num-batched-tokens", model.max_num_batched_tokens, "tokens in a step"),
        ("--max-num-queued-reqs", model.max_num_queued_reqs, "waiting and running; more get 503"),
        ("--max-model-len", model.max_model_len_tokens, "prompt and answer, in tokens"),
        ("--block-size", model.block_size_tokens, "tokens in a KV block"),
    ):
        add(name, type=int, default=number, metavar="N", help=f"{text} (%(default)s)")
    add(
        "--kv-blocks",
        "--num-gpu-blocks-override",
        type=int,
        metavar="N",
        help=f"KV blocks ({model.kv_blocks}, or what one longest sequence needs)",
    )
    for name, text in (
        ("--enable-prefix-caching", "keep the blocks of past prompts (on)"),
        ("--enable-chunked-prefill", "long prompts in several steps (on)"),
    ):
        add(name, action=argparse.BooleanOptionalAction, default=True, help=text)
    add(
        "--output-tokens",
        type=int,
        default=128,
        metavar="N",
        help="where an answer ends by itself, on average (%(default)s)",
    )
    add(
        "--output-spread",
        type=float,
        default=0.5,
        metavar="X",
        help="… give or take this fraction of it, by the prompt (%(default)s)",
    )
    add("--embedding-size", type=int, default=64, metavar="N", help="of vectors (%(default)s)")
    add("--seed", type=int, default=0, help="of everything that looks random (%(default)s)")


def _add_life(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("its life, in seconds").add_argument
    shares = ", ".join(
        f"{p} {s:.0%}" for p, s in zip(START_PHASES, _STARTUP_SHARES, strict=True)
    ).replace("%", "%%")
    add("--startup-s", type=float, default=0.0, metavar="S", help=f"whole start-up: {shares} (0)")
    for phase in START_PHASES:
        add(f"--{phase}-s", type=float, metavar="S", help="this phase, in place of its share")
    add(
        "--late-port",
        action="store_true",
        help="refuse connections until ready, as vLLM does, in place of answering 503",
    )
    for name, text, defaults in (
        ("--sleep-s", "falling asleep at level 1 and 2", (0.5, 0.5)),
        ("--wake-s", "waking up from level 1 and 2", (0.5, 2.0)),
    ):
        add(
            name,
            type=float,
            nargs=2,
            default=defaults,
            metavar=("L1", "L2"),
            help=f"{text} ({defaults[0]} {defaults[1]})",
        )
    add(
        "--drain-s",
        type=float,
        default=30.0,
        metavar="S",
        help="after SIGTERM, requests under way have this long to finish (%(default)g)",
    )
    add(
        "--virtual-time",
        action="store_true",
        help="the engine's time runs as fast as it can: nothing waits, metrics show virtual time",
    )
    add(
        "--fault",
        "--faults",
        action="append",
        default=[],
        metavar="KIND[:…]",
        help="something that goes wrong, see below; repeatable",
    )


def settings_from(argv: Sequence[str]) -> EngineSettings:
    """The settings that ``argv`` asks for; exits with 2 and a sentence where it is wrong."""
    parser = _parser()
    given = parser.parse_args(argv)
    try:
        return _settings(given)
    except ValueError as error:
        parser.error(str(error))


def _settings(given: argparse.Namespace) -> EngineSettings:
    blocks = given.kv_blocks
    if blocks is None:
        least = -(-given.max_model_len // max(1, given.block_size))
        blocks = max(EngineModel().kv_blocks, least)
    phases = []
    for phase, share in zip(START_PHASES, _STARTUP_SHARES, strict=True):
        own = getattr(given, f"{phase}_s")
        phases.append(given.startup_s * share if own is None else own)
    return EngineSettings(
        served_models=tuple(given.served_model_name or [given.model]),
        model_path=given.model,
        host=given.host,
        port=given.port,
        model=EngineModel(
            prefill_tokens_per_s=given.prefill_tokens_per_s,
            decode_tokens_per_s=given.decode_tokens_per_s,
            batch_slowdown=given.batch_slowdown,
            step_overhead_s=given.step_overhead_s,
            max_num_seqs=given.max_num_seqs,
            max_num_batched_tokens=given.max_num_batched_tokens,
            max_num_queued_reqs=given.max_num_queued_reqs,
            max_model_len_tokens=given.max_model_len,
            kv_blocks=blocks,
            block_size_tokens=given.block_size,
            prefix_caching=given.enable_prefix_caching,
            chunked_prefill=given.enable_chunked_prefill,
        ),
        limits=HttpLimits(
            max_head_bytes=given.max_head_bytes,
            max_body_bytes=given.max_body_bytes,
            max_connections=given.max_connections,
            keepalive_s=given.keepalive_s,
        ),
        startup_s=(phases[0], phases[1], phases[2], phases[3]),
        late_port=given.late_port,
        sleep_s=tuple(given.sleep_s),
        wake_s=tuple(given.wake_s),
        output_tokens=given.output_tokens,
        output_spread_fraction=given.output_spread,
        embedding_size=given.embedding_size,
        seed=given.seed,
        virtual_time=given.virtual_time,
        drain_s=given.drain_s,
        api_keys=tuple(given.api_key),
        request_id_headers=given.enable_request_id_headers,
        faults=tuple(given.fault),
    )
