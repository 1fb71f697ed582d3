"""The settings of the simulated engine, its command line, and the help that explains them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

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
    share_port: bool = False
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
    python -P -m loaders.engines.simulated --model demo --port 9000
  one that takes 20 s to start and answers like a large model on a small GPU
    python -P -m loaders.engines.simulated --model demo --port 9000 --startup-s 20 \\
        --prefill-tokens-per-s 3000 --decode-tokens-per-s 25 --max-num-seqs 16
  a cheap target for a load test: all the time spent is the network's and yours
    python -P -m loaders.engines.simulated --model demo --port 9000 \\
        --prefill-tokens-per-s inf --decode-tokens-per-s inf
  one that dies at its eleventh request; one whose every third answer is a 500
    python -P -m loaders.engines.simulated --model demo --port 9000 --fault crash:after_requests=10
    python -P -m loaders.engines.simulated --model demo --port 9000 --fault error500:every=3

while it runs:
  curl localhost:9000/v1/chat/completions -H 'content-type: application/json' \\
      -d '{"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}'
  curl localhost:9000/metrics
  curl -X POST 'localhost:9000/sleep?level=1'; curl -X POST localhost:9000/wake_up
  curl localhost:9000/simulated/faults -d '{"faults": ["slow:factor=5,for_s=30"]}'
"""

_STARTUP_SHARES = (0.4, 0.2, 0.25, 0.15)
# Flags that engines are commonly started with: switches, and those with a value.
_SWITCHES_IGNORED = (
    *("--enforce-eager", "--trust-remote-code", "--enable-sleep-mode"),
    *("--enable-auto-tool-choice", "--disable-log-requests", "--disable-log-stats"),
    *("--disable-uvicorn-access-log", "--no-enable-log-requests"),
)
_VALUES_IGNORED = (
    *("--dtype", "--gpu-memory-utilization", "--tensor-parallel-size", "--pipeline-parallel-size"),
    *("--data-parallel-size", "--load-format", "--quantization", "--kv-cache-dtype"),
    *("--tool-call-parser", "--reasoning-parser", "--download-dir", "--tokenizer"),
    "--uvicorn-log-level",
)


def _faults_help() -> str:
    lines = ["faults: KIND[:name=value,…]"]
    lines += [f"  {kind:15} {meaning}" for kind, meaning in KINDS.items()]
    lines.append("when they strike; counted from when the fault is set:")
    lines += [f"  {name:15} {meaning}" for name, meaning in TRIGGERS.items()]
    return "\n".join(lines)


def _add_numbers(add: Callable[..., Any], defaults: object, *rows: tuple[str, str, str]) -> None:
    """Flags with one number, each (flag, field of ``defaults``, help)."""
    for flag, name, text in rows:
        value = getattr(defaults, name)
        shown = f"{value:g}" if isinstance(value, float) else value
        metavar = "S" if name.endswith("_s") and "_per_" not in name else "N"
        add(flag, dest=name, type=type(value), default=value, metavar=metavar,
            help=f"{text} ({shown})")  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    """Every flag is stored under the name of its field, except those that ``_settings`` reads."""
    parser = argparse.ArgumentParser(
        prog="python -P -m loaders.engines.simulated",
        description=_ABOUT,
        epilog=f"{_faults_help()}\n\n{_EXAMPLES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    settings, model = EngineSettings(served_models=("NAME",), model_path="NAME"), EngineModel()

    add = parser.add_argument_group("what is served, and where").add_argument
    add("--model", dest="model_path", required=True, metavar="NAME",
        help="any name or path: nothing is loaded")  # fmt: skip
    add("--served-model-name", dest="served_models", nargs="+", metavar="NAME",
        help="what clients put in `model`, aliases after it (default: --model)")  # fmt: skip
    add("--host", default=settings.host, help="address to listen on (%(default)s)")
    add("--api-key", dest="api_keys", action="append", default=[], metavar="KEY",
        help="a key that /v1 asks for; repeatable")  # fmt: skip
    add("--enable-request-id-headers", dest="request_id_headers", action="store_true",
        help="answer with x-request-id, as vLLM does with this flag only")  # fmt: skip
    _add_numbers(add, settings, ("--port", "port", "port, 0 for any free one"))
    _add_numbers(
        add,
        settings.limits,
        ("--max-connections", "max_connections", "connections at once; more are closed"),
        ("--max-head-bytes", "max_head_bytes", "request line and headers"),
        ("--max-body-bytes", "max_body_bytes", "request body"),
        ("--keepalive-s", "keepalive_s", "idle connections are closed after this, as by vLLM"),
    )

    add = parser.add_argument_group("the engine; rates may be `inf`").add_argument
    _add_numbers(
        add,
        model,
        ("--prefill-tokens-per-s", "prefill_tokens_per_s", "prompt tokens, over all sequences"),
        ("--decode-tokens-per-s", "decode_tokens_per_s", "of one sequence that is alone"),
        ("--batch-slowdown", "batch_slowdown", "a step's decoding is longer by this fraction for "
         "each further sequence"),
        ("--step-overhead-s", "step_overhead_s", "what every step takes besides"),
        ("--max-num-seqs", "max_num_seqs", "sequences in a step"),
        ("--max-num-batched-tokens", "max_num_batched_tokens", "tokens in a step"),
        ("--max-num-queued-reqs", "max_num_queued_reqs", "waiting and running; more get 503"),
        ("--max-model-len", "max_model_len_tokens", "prompt and answer, in tokens"),
        ("--block-size", "block_size_tokens", "tokens in a KV block"),
    )  # fmt: skip
    add("--kv-blocks", "--num-gpu-blocks-override", type=int, metavar="N",
        help=f"KV blocks ({model.kv_blocks}, or what one longest sequence needs)")  # fmt: skip
    for name, dest, text in (
        ("--enable-prefix-caching", "prefix_caching", "keep the blocks of past prompts (on)"),
        ("--enable-chunked-prefill", "chunked_prefill", "long prompts in several steps (on)"),
    ):
        add(name, dest=dest, action=argparse.BooleanOptionalAction, default=True, help=text)
    _add_numbers(
        add,
        settings,
        ("--output-tokens", "output_tokens", "where an answer ends by itself, on average"),
        ("--output-spread", "output_spread_fraction", "… give or take this fraction of it, by the "
         "prompt"),
        ("--embedding-size", "embedding_size", "of vectors"),
        ("--seed", "seed", "of everything that looks random"),
    )  # fmt: skip

    add = parser.add_argument_group("its life, in seconds").add_argument
    shares = ", ".join(
        f"{p} {s:.0%}" for p, s in zip(START_PHASES, _STARTUP_SHARES, strict=True)
    ).replace("%", "%%")
    add("--startup-s", type=float, default=0.0, metavar="S", help=f"whole start-up: {shares} (0)")
    for phase in START_PHASES:
        add(f"--{phase}-s", type=float, metavar="S", help="this phase, in place of its share")
    add("--late-port", action="store_true",
        help="refuse connections until ready, as vLLM does, in place of answering 503")  # fmt: skip
    add("--share-port", action="store_true",
        help="bind a port that another process of this user has reserved")  # fmt: skip
    for name, dest, text in (
        ("--sleep-s", "sleep_s", "falling asleep at level 1 and 2"),
        ("--wake-s", "wake_s", "waking up from level 1 and 2"),
    ):
        default = getattr(settings, dest)
        add(name, type=float, nargs=2, default=default, metavar=("L1", "L2"),
            help=f"{text} ({default[0]} {default[1]})")  # fmt: skip
    about = "after SIGTERM, requests under way have this long to finish"
    _add_numbers(add, settings, ("--drain-s", "drain_s", about))
    add("--virtual-time", action="store_true", help="the engine's time runs as fast as it can: "
        "nothing waits, metrics show virtual time")  # fmt: skip
    add("--fault", "--faults", dest="faults", action="append", default=[], metavar="KIND[:…]",
        help="something that goes wrong, see below; repeatable")  # fmt: skip

    ignored = parser.add_argument_group(
        "accepted for vLLM's sake, without effect",
        ", ".join((*_SWITCHES_IGNORED, *_VALUES_IGNORED)),
    )
    for name in _SWITCHES_IGNORED:
        ignored.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    for name in _VALUES_IGNORED:
        ignored.add_argument(name, help=argparse.SUPPRESS)
    return parser


def settings_from(argv: Sequence[str]) -> EngineSettings:
    """The settings that ``argv`` asks for; exits with 2 and a sentence where it is wrong."""
    parser = _parser()
    given = vars(parser.parse_args(argv))
    try:
        return _settings(given)
    except ValueError as error:
        parser.error(str(error))


def _settings(given: dict[str, Any]) -> EngineSettings:
    if given["kv_blocks"] is None:
        least = -(-given["max_model_len_tokens"] // max(1, given["block_size_tokens"]))
        given["kv_blocks"] = max(EngineModel().kv_blocks, least)
    phases = []
    for phase, share in zip(START_PHASES, _STARTUP_SHARES, strict=True):
        own = given[f"{phase}_s"]
        phases.append(given["startup_s"] * share if own is None else own)
    given["startup_s"] = phases
    given["served_models"] = given["served_models"] or [given["model_path"]]
    return EngineSettings(
        **_fields(EngineSettings, given),
        model=EngineModel(**_fields(EngineModel, given)),
        limits=HttpLimits(**_fields(HttpLimits, given)),
    )


def _fields(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """What was given for the fields of a dataclass; its sequences are tuples."""
    names = [field.name for field in fields(kind) if field.name in given]
    return {n: tuple(given[n]) if isinstance(given[n], list) else given[n] for n in names}
