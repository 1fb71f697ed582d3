"""Locust, headless, against Tidegate in front of the simulated engine (or any endpoint)."""

from __future__ import annotations

import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, procs, tidegate

POOL = "simulated"
LOCUSTFILE = Path(__file__).with_name("locustfile.py")
SAMPLE_EVERY_S = 0.5

_POOL = """
[[pools]]
name = "simulated"
backend = "process"
engine = "simulated"
model = "simulated"
min_replicas = 0
max_replicas = 3
# Small, so that a minute's load shows replicas being added.
target_inflight_tokens = 2048
engine_args = ["--startup-s", "2"]
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One load run."""

    users: int = 30
    per_s: float = 10.0
    time_s: int = 60
    endpoint: str | None = None
    """An endpoint that runs already, instead of an own Tidegate with the simulated engine."""
    model: str = POOL
    output_tokens: int = 64
    prompt_words: int = 120
    think_s: float = 0.5
    out: Path = Path("bench/out")


class _Watcher(threading.Thread):
    """Samples the pool's replicas while the load runs."""

    def __init__(self, gate: tidegate.Tidegate) -> None:
        super().__init__(daemon=True)
        self.gate = gate
        self.ended = threading.Event()
        self.samples: list[dict[str, Any]] = []
        self.began_s = time.monotonic()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_EVERY_S):
            try:
                seen = self.gate.pool(POOL)
            except (OSError, KeyError, ValueError):
                continue
            keep = ("desired", "ready", "starting", "queued_requests", "inflight_requests",
                    "inflight_tokens")  # fmt: skip
            at = {"at_s": round(time.monotonic() - self.began_s, 2)}
            self.samples.append(at | {k: seen.get(k) for k in keep})


def _locust(options: Options, endpoint: str, stem: Path) -> subprocess.CompletedProcess[str]:
    argv = [
        sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary",
        "--users", str(options.users), "--spawn-rate", f"{options.per_s:g}",
        "--run-time", f"{options.time_s}s", "--stop-timeout", "10", "--host", endpoint,
        "--model", options.model, "--output-tokens", str(options.output_tokens),
        "--prompt-words", str(options.prompt_words), "--think-s", f"{options.think_s:g}",
        "--html", f"{stem}.html", "--figures", f"{stem}.figures.json", "--exit-code-on-error", "0",
    ]  # fmt: skip
    return subprocess.run(
        argv, capture_output=True, text=True, timeout=options.time_s + 60, check=False
    )


def _row(name: str, figure: Mapping[str, float], factor: float, digits: int) -> str:
    if not figure.get("count"):
        return f"| {name} | 0 | – | – | – | – | – |"
    cells = " | ".join(
        f"{figure[k] * factor:,.{digits}f}" for k in ("mean", "p50", "p90", "p99", "max")
    )
    return f"| {name} | {figure['count']:,} | {cells} |"


def markdown(made: Mapping[str, Any]) -> str:
    """The report to read."""
    figures, counts = made["figures"], made["figures"]["counts"]
    lines = [f"# Streaming chat under load, {made['date']}", ""]
    if made["simulated"]:
        lines += [
            "**Simulation.** The engine is Tidegate's simulated one: these figures say what the "
            "gateway and the scaling do, and nothing about any model or GPU.",
            "",
        ]
    lines += [
        f"`{made['command']}`: {made['users']} users for {made['time_s']} s, "
        f"{made['output_tokens']} tokens asked of each chat. {made['machine']['cpu']}, "
        f"{made['machine']['cores']} cores.",
        "",
        f"{counts['answered']:,} chats answered, {counts['failed']:,} failed, "
        f"{counts['tokens']:,} tokens.",
        "",
        "| | count | mean | p50 | p90 | p99 | max |",
        "|---|---|---|---|---|---|---|",
        _row("time to first token, ms", figures["ttft_s"], 1e3, 1),
        _row("between two tokens, ms", figures["itl_s"], 1e3, 1),
        _row("whole answer, ms", figures["e2e_s"], 1e3, 0),
        _row("tokens/s of an answer", figures["tokens_per_s"], 1, 1),
    ]
    for reason, count in figures["failures"].items():
        lines.append(f"\nFailed {count} times: `{reason}`")
    samples = made["replicas"]
    if samples:
        ready = [s for s in samples if s["ready"]]
        first = f"{ready[0]['at_s']:.1f} s after the load began" if ready else "never"
        lines += [
            "",
            f"The pool was at zero when the load began. First replica ready: {first}; most ready "
            f"at once: {max(s['ready'] or 0 for s in samples)}; most requests waiting in the "
            f"gateway: {max(s['queued_requests'] or 0 for s in samples)}. The time to first token "
            "includes the wait for the first replica.",
            "",
            "| s | desired | ready | starting | waiting | in flight |",
            "|---|---|---|---|---|---|",
        ]
        step = max(1, len(samples) // 20)
        lines += [
            f"| {s['at_s']:.0f} | {s['desired']} | {s['ready']} | {s['starting']} "
            f"| {s['queued_requests']} | {s['inflight_requests']} |"
            for s in samples[::step]
        ]
    return "\n".join(lines) + "\n"


def run(options: Options, command: str) -> int:
    """Load, write the report; exit code 1 when a chat failed or none was answered."""
    options.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    stem = options.out / f"load-{date}"
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        if options.endpoint is not None:
            done = _locust(options, options.endpoint, stem)
        else:
            gate = tidegate.start(_POOL, Path(folder))
            with procs.stopping(gate.child):
                print(f"SIMULATION: {options.users} users for {options.time_s} s on the simulated "
                      "engine, from zero replicas", flush=True)  # fmt: skip
                watcher = _Watcher(gate)
                watcher.start()
                done = _locust(options, f"http://127.0.0.1:{gate.port}", stem)
                watcher.ended.set()
                watcher.join(5)
                samples = watcher.samples
    figures_path = Path(f"{stem}.figures.json")
    if not figures_path.exists():
        print(done.stderr[-2000:], file=sys.stderr)
        return 1
    made = {
        "date": date, "command": command, "machine": machine.describe(),
        "simulated": options.endpoint is None, "endpoint": options.endpoint,
        "users": options.users, "time_s": options.time_s, "output_tokens": options.output_tokens,
        "figures": json.loads(figures_path.read_text()), "replicas": samples,
    }  # fmt: skip
    figures_path.unlink()
    Path(f"{stem}.json").write_text(json.dumps(made, indent=1) + "\n")
    text = markdown(made)
    Path(f"{stem}.md").write_text(text)
    print(text)
    print(f"wrote {stem}.md, {stem}.json and Locust's own {stem}.html")
    counts = made["figures"]["counts"]
    return 0 if counts["answered"] and not counts["failed"] else 1
