"""Many requests held at zero replicas while the engine starts: all answered, once each.

Half of the requests stream. Each must get exactly one whole answer: one id, one finish, one
``[DONE]`` if it streams; no id twice; and the engine itself must have counted as many finished
requests as were sent, so that none was sent to it twice and thrown away.
"""

from __future__ import annotations

import asyncio
import datetime
import json
import re
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import machine, procs, stats, tidegate, workload
from bench.asking import Answer, ask

MODEL_FOLDER = Path(".tidegate/models/SmolLM2-135M-Instruct")
ENGINE_PYTHON = Path(".venv-engine/bin/python")
POOL = "cold"

_POOL = """
[[pools]]
name = "cold"
backend = "process"
engine = "{engine}"
model = "{model}"
min_replicas = 0
max_replicas = 1
{more}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One run."""

    requests: int = 200
    engine: str | None = None
    """``vllm``, ``simulated``, or unset: vLLM where it is installed, else an error says what to
    do."""
    tokens: int = 16
    gap_ms: float = 5.0
    """Between two requests, so that there is an order to keep."""
    limit_s: float = 420.0
    out: Path = Path("bench/out")


class EngineMissingError(RuntimeError):
    """vLLM or the default model is not there; the message says how to get them."""


def _pool(options: Options) -> tuple[str, str]:
    """The pool's configuration, and the engine's name for the report."""
    present = ENGINE_PYTHON.exists() and (MODEL_FOLDER / "config.json").exists()
    if options.engine == "simulated":
        more = 'engine_args = ["--startup-s", "5"]'
        return _POOL.format(engine="simulated", model="cold", more=more), "simulated"
    if not present:
        raise EngineMissingError(
            f"no vLLM at {ENGINE_PYTHON} or no model at {MODEL_FOLDER}: `make engine` prepares "
            "both; `--engine simulated` runs without them"
        )
    more = "max_model_len_tokens = 2048"
    pool = _POOL.format(engine="vllm", model=MODEL_FOLDER.resolve(), more=more)
    return f'{pool}\n[loaders]\nengine_python = "{ENGINE_PYTHON.absolute()}"\n', "vLLM"


def _request(index: int, tokens: int) -> bytes:
    """Even ones stream."""
    document = {
        "model": POOL,
        "messages": [{"role": "user", "content": f"Count upwards from {index}."}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": index % 2 == 0,
    }
    return workload.http_request(json.dumps(document).encode())


async def _ask_all(gate: tidegate.Tidegate, options: Options) -> tuple[list[Answer], float | None]:
    """All answers, and when the first replica was seen ready."""
    ready_s: float | None = None

    async def watch() -> None:
        nonlocal ready_s
        while True:
            seen = await asyncio.to_thread(gate.pool, POOL)
            if seen["ready"]:
                ready_s = time.monotonic()
                return
            await asyncio.sleep(0.1)

    watcher = asyncio.create_task(watch())
    running = []
    for index in range(options.requests):
        answer = Answer(index=index, stream=index % 2 == 0)
        request = _request(index, options.tokens)
        running.append(
            asyncio.create_task(ask(gate.port, request, answer, limit_s=options.limit_s))
        )
        await asyncio.sleep(options.gap_ms / 1e3)
    answers = await asyncio.gather(*running)
    watcher.cancel()
    await asyncio.gather(watcher, return_exceptions=True)
    return list(answers), ready_s


def finished_by_engine(metrics: str) -> int | None:
    """Requests the engine says it finished; ``None`` when its metrics do not have it."""
    found = re.findall(r"^vllm:request_success_total(?:\{[^}]*\})? (\S+)", metrics, re.MULTILINE)
    return round(sum(float(value) for value in found)) if found else None


def _engine_count(gate: tidegate.Tidegate) -> int | None:
    urls = [r["url"] for r in gate.pool(POOL)["replicas"] if r["url"]]
    total: int | None = None
    for url in urls:
        with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
            count = finished_by_engine(answer.read().decode())
        if count is not None:
            total = (total or 0) + count
    return total


def summarise(
    answers: Sequence[Answer], ready_s: float | None, engine_count: int | None
) -> dict[str, Any]:
    """Figures of a run, all times in seconds."""
    began_s = min(answer.sent_s for answer in answers)
    whole = [answer for answer in answers if answer.whole_once()]
    ids = [identifier for answer in answers for identifier in answer.ids]
    first = sorted((a.first_s, a.index) for a in whole if a.first_s is not None)
    waits = [at_s - answers[index].sent_s for at_s, index in first]
    streams = [index for _, index in first if answers[index].stream]
    held = None if ready_s is None else [ready_s - a.sent_s for a in answers if a.sent_s < ready_s]
    return {
        "sent": len(answers),
        "whole_once": len(whole),
        "ids_twice": len(ids) - len(set(ids)),
        "engine_finished": engine_count,
        "errors": sorted({a.error for a in answers if a.error}),
        "statuses": dict(Counter(str(a.status) for a in answers)),
        "ready_after_s": None if ready_s is None else ready_s - began_s,
        "held_at_ready": None if held is None else len(held),
        "first_token_s": {
            name: stats.percentile(waits, q)
            for name, q in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))
        },
        "all_answered_after_s": max((a.ended_s or 0.0) for a in answers) - began_s,
        "out_of_order_fraction": stats.inversions(streams),
        "keepalive_comments": sum(a.comments for a in answers),
        "streams_with_comments": sum(a.comments > 0 for a in answers if a.stream),
    }  # fmt: skip


def passed(made: Mapping[str, Any]) -> bool:
    """Every request answered once: seen by the clients, and counted by the engine if it counts."""
    counted = made["engine_finished"]
    return (
        made["whole_once"] == made["sent"]
        and made["ids_twice"] == 0
        and (counted is None or counted == made["sent"])
    )


def _number(value: float | None, unit: str = " s") -> str:
    return "–" if value is None else f"{value:.1f}{unit}"


def markdown(made: Mapping[str, Any]) -> str:
    """The report to read."""
    first = made["first_token_s"]
    lines = [
        f"# Held at zero, {made['date']}",
        "",
        f"{made['sent']} requests to a pool at zero replicas, half of them streaming, engine: "
        f"{made['engine']}.",
        "" if made["engine"] != "simulated" else "\n**Simulation**: no model was run.\n",
        "| | |",
        "|---|---|",
        f"| answered whole, once | {made['whole_once']} of {made['sent']} |",
        f"| finished, as the engine counts | {made['engine_finished']} |",
        f"| answer ids seen twice | {made['ids_twice']} |",
        f"| first replica ready after | {_number(made['ready_after_s'])} |",
        f"| held at that moment | {made['held_at_ready']} |",
        f"| first token after, p50 / p90 / p99 / max | {_number(first['p50'])} / "
        f"{_number(first['p90'])} / {_number(first['p99'])} / {_number(first['max'])} |",
        f"| all answered after | {_number(made['all_answered_after_s'])} |",
        f"| pairs of streams answered out of order | {made['out_of_order_fraction']:.1%} |",
        f"| keepalive comments | {made['keepalive_comments']} on "
        f"{made['streams_with_comments']} streams |",
        "",
        f"Result: {'**passed**' if made['passed'] else '**FAILED**'}",
        *(f"\nError: `{error}`" for error in made["errors"]),
    ]
    return "\n".join(lines) + "\n"


def run(options: Options, command: str) -> int:
    """Hold, wake, answer, report; exit code 1 unless every request was answered exactly once."""
    pool, engine = _pool(options)
    options.out.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    with tempfile.TemporaryDirectory(prefix="tidegate-bench-") as folder:
        gate = tidegate.start(pool, Path(folder))
        with procs.stopping(gate.child):
            if not tidegate.wait_at_zero(gate, POOL, limit_s=30):
                raise procs.NotReadyError("the pool is not at zero to begin with")
            print(f"{options.requests} requests at zero replicas, engine {engine}; at most "
                  f"{options.limit_s:.0f} s", flush=True)  # fmt: skip
            answers, ready_s = asyncio.run(_ask_all(gate, options))
            made = summarise(answers, ready_s, _engine_count(gate))
    made |= {"date": date, "command": command, "engine": engine, "machine": machine.describe()}
    made["passed"] = passed(made)
    stem = options.out / f"coldhold-{engine.lower()}-{date}"
    Path(f"{stem}.json").write_text(json.dumps(made, indent=1) + "\n")
    text = markdown(made)
    Path(f"{stem}.md").write_text(text)
    print(text)
    print(f"wrote {stem}.md and {stem}.json")
    return 0 if made["passed"] else 1
